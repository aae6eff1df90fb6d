//! Quick start: 128 GiB of addresses, with memory for 1 GiB of them.
//!
//! `cargo run --example quick_start` runs on the CPU device, with the simulated driver. With
//! `--features cuda` it runs on GPU 0.

use candle_core::Device;
use candle_cuda_vmm::{Result, VirtualMemoryPool};

#[cfg(feature = "cuda")]
fn device() -> Result<Device> {
    Ok(Device::new_cuda(0)?)
}

#[cfg(not(feature = "cuda"))]
fn device() -> Result<Device> {
    Ok(Device::Cpu)
}

fn main() -> Result<()> {
    let device = device()?;

    // 128 GiB of addresses, in pages of 2 MiB.
    let mut pool =
        VirtualMemoryPool::new(128 * 1024 * 1024 * 1024, 2 * 1024 * 1024, device.clone())?;

    // 1 GiB of memory, behind the first addresses.
    let address = pool.allocate(0, 1024 * 1024 * 1024)?;
    println!(
        "allocated at address {address:#x} on {:?}",
        device.location()
    );
    println!("physical usage: {} bytes", pool.physical_memory_usage());

    // Free it.
    pool.deallocate(0, 1024 * 1024 * 1024)?;
    println!("after freeing: {} bytes", pool.physical_memory_usage());
    Ok(())
}
