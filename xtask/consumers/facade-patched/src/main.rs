//! Depends on the facade, with a Candle that comes from a path, as engines have it.

use candle_core::Device;
use candle_cuda_vmm::{Result, VirtualMemoryPool};

/// Only the Candle of that path has this constant.
const FROM: &str = candle_core::FROM_A_PATH;

fn main() -> Result<()> {
    let mut pool = VirtualMemoryPool::new(
        128 * 1024 * 1024 * 1024, // 128 GiB of addresses
        2 * 1024 * 1024,          // in pages of 2 MiB
        Device::Cpu,
    )?;
    let address = pool.allocate(0, 1024 * 1024 * 1024)?;
    println!("candle: {FROM}");
    println!("address: {address:#x}");
    println!("allocated: {}", pool.physical_memory_usage());
    pool.deallocate(0, 1024 * 1024 * 1024)?;
    println!("deallocated: {}", pool.physical_memory_usage());
    Ok(())
}
