//! Depends on the facade: the quick start, on a CPU device.

use candle_core::Device;
use candle_cuda_vmm::{Result, VirtualMemoryPool};

pub fn main() -> Result<()> {
    let mut pool = VirtualMemoryPool::new(
        128 * 1024 * 1024 * 1024, // 128 GiB of addresses
        2 * 1024 * 1024,          // in pages of 2 MiB
        Device::Cpu,
    )?;
    let address = pool.allocate(0, 1024 * 1024 * 1024)?;
    println!("address: {address:#x}");
    println!("allocated: {}", pool.physical_memory_usage());
    pool.deallocate(0, 1024 * 1024 * 1024)?;
    println!("deallocated: {}", pool.physical_memory_usage());
    Ok(())
}
