//! Three models whose KV caches grow token by token under one limit of physical memory.
//!
//! `cargo run --example kv_cache_simulation` runs on the CPU device, with the simulated driver.
//! With `--features cuda` it runs on GPU 0.

use candle_core::Device;
use candle_cuda_vmm::{Result, SharedMemoryPool, VmmError};
use std::collections::BTreeMap;

const GIB: usize = 1 << 30;
const MIB: usize = 1 << 20;
const KIB: usize = 1 << 10;

/// The tokens of one request: their addresses, and the size of each.
struct Request {
    model: &'static str,
    token_bytes: usize,
    tokens: Vec<usize>,
}

struct Server {
    pool: SharedMemoryPool,
    token_bytes: BTreeMap<&'static str, usize>,
}

impl Server {
    fn load(&mut self, model: &'static str, capacity: usize, token_bytes: usize) -> Result<()> {
        self.pool.register_model(model, capacity)?;
        self.token_bytes.insert(model, token_bytes);
        println!(
            "{model}: {} GiB of addresses, {} KiB a token",
            capacity / GIB,
            token_bytes / KIB
        );
        Ok(())
    }

    /// Allocates one token after another. If memory runs out, frees all of the request and returns
    /// the error.
    fn run(&mut self, model: &'static str, tokens: usize) -> Result<Request> {
        let mut request = Request {
            model,
            token_bytes: self.token_bytes[model],
            tokens: Vec::with_capacity(tokens),
        };
        for _ in 0..tokens {
            match self.pool.allocate_for_model(model, request.token_bytes) {
                Ok(address) => request.tokens.push(address),
                Err(error) => {
                    self.finish(request)?;
                    return Err(error);
                }
            }
        }
        Ok(request)
    }

    fn finish(&mut self, request: Request) -> Result<()> {
        for address in request.tokens {
            self.pool
                .deallocate_for_model_address(request.model, address, request.token_bytes)?;
        }
        Ok(())
    }

    fn report(&self) {
        let global = self.pool.global_stats();
        println!(
            "  in use: {} of {} MiB",
            global.physical_usage / MIB,
            global.physical_limit / MIB
        );
        for model in self.token_bytes.keys() {
            if let Some(stats) = self.pool.get_model_stats(model) {
                println!(
                    "  {model}: {} MiB in {} pages, fragmentation {:.2}",
                    stats.physical_usage / MIB,
                    stats.mapped_pages,
                    stats.fragmentation_ratio
                );
            }
        }
    }
}

#[cfg(feature = "cuda")]
fn device() -> Result<Device> {
    Ok(Device::new_cuda(0)?)
}

#[cfg(not(feature = "cuda"))]
fn device() -> Result<Device> {
    Ok(Device::Cpu)
}

fn main() -> Result<()> {
    let mut server = Server {
        pool: SharedMemoryPool::new(512 * MIB, device()?)?,
        token_bytes: BTreeMap::new(),
    };
    server.load("llama-7b", 64 * GIB, 512 * KIB)?;
    server.load("gpt2", 32 * GIB, 36 * KIB)?;
    server.load("mistral-7b", 64 * GIB, 128 * KIB)?;

    println!("three requests at once:");
    let llama = server.run("llama-7b", 700)?;
    let gpt = server.run("gpt2", 1000)?;
    let mistral = server.run("mistral-7b", 800)?;
    server.report();

    println!("one more does not fit:");
    match server.run("llama-7b", 300) {
        Err(error @ VmmError::OutOfPhysicalMemory { .. }) => println!("  {error}"),
        Err(error) => return Err(error),
        Ok(_) => return Err(VmmError::other("the limit did not hold")),
    }

    println!("until the first has ended:");
    server.finish(llama)?;
    let llama = server.run("llama-7b", 300)?;
    server.report();

    for request in [llama, gpt, mistral] {
        server.finish(request)?;
    }
    println!("all ended:");
    server.report();
    Ok(())
}
