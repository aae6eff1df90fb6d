//! Depends on the core with the simulator: allocates and gives back.

use cuda_vmm::sim::SimConfig;
use cuda_vmm::{Driver, VirtualMemoryPool};

fn main() -> cuda_vmm::Result<()> {
    let driver = Driver::simulated(SimConfig::new())?;
    let pool = VirtualMemoryPool::new(&driver.device(0)?, 1 << 30, 2 << 20)?;
    let address = pool.allocate(0, 4 << 20)?;
    assert_eq!(address, pool.base_address());
    println!("driver: {}", driver.kind());
    println!("allocated: {}", pool.physical_memory_usage());
    pool.deallocate(0, 4 << 20)?;
    println!("deallocated: {}", pool.physical_memory_usage());
    pool.close()
}
