//! Depends on the facade, with the oldest Candle that it takes, from a path, as engines have theirs.

use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::{Result, TensorPool};

#[path = "../../facade/src/main.rs"]
mod quick_start;

/// Only the Candle of that path has this constant.
const FROM: &str = candle_core::FROM_A_PATH;

fn main() -> Result<()> {
    println!("candle: {FROM} of a path");
    quick_start::main()?;
    let pool = TensorPool::new(&Device::Cpu)?;
    let mut cache = pool.kv_cache(2, 4096);
    let token = Tensor::ones((1, 8, 1, 128), DType::F32, &Device::Cpu)?;
    let (k, v) = cache.append(&token, &token)?;
    println!("cache: {:?} {:?}", k.dims(), v.dims());
    Ok(())
}
