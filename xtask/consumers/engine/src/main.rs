//! Depends on the facade, with the oldest Candle that it takes, from a path, as engines have theirs.

use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::{Result, TensorPool, VirtualMemoryPool};

/// Only the Candle of that path has this constant.
const FROM: &str = candle_core::FROM_A_PATH;

fn main() -> Result<()> {
    let mut pool = VirtualMemoryPool::new(
        128 * 1024 * 1024 * 1024, // 128 GiB of addresses
        2 * 1024 * 1024,          // in pages of 2 MiB
        Device::Cpu,
    )?;
    let address = pool.allocate(0, 1024 * 1024 * 1024)?;
    println!("candle: {FROM} of a path");
    println!("address: {address:#x}");
    println!("allocated: {}", pool.physical_memory_usage());
    pool.deallocate(0, 1024 * 1024 * 1024)?;
    println!("deallocated: {}", pool.physical_memory_usage());

    let pool = TensorPool::new(&Device::Cpu)?;
    let mut cache = pool.kv_cache(2, 4096);
    let token = Tensor::ones((1, 8, 1, 128), DType::F32, &Device::Cpu)?;
    let (k, v) = cache.append(&token, &token)?;
    println!("cache: {:?} {:?}", k.dims(), v.dims());
    Ok(())
}
