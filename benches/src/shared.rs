//! Models of one shared pool.

use anyhow::Result;
use cuda_vmm::{
    Device, EngineOptions, ModelOptions, SharedMemoryPool, SharedPoolOptions, Stream,
    VirtualMemoryPool,
};
use std::sync::Arc;

/// The bytes of a shared pool.
#[derive(Clone, Copy, Debug)]
pub struct SharedSizes {
    /// Of a page.
    pub page_bytes: usize,
    /// Of the addresses of each model.
    pub capacity_bytes: usize,
    /// Of the memory that is made ahead of each model.
    pub ahead_bytes: usize,
}

/// The name of a model in the pool.
pub fn model_name(number: usize) -> String {
    format!("model {number}")
}

/// A shared pool with a model for each stream, which uses its memory.
///
/// # Errors
/// The pool's.
pub fn shared_models(
    device: &Device,
    engine: EngineOptions,
    sizes: SharedSizes,
    streams: &[Stream],
) -> Result<(SharedMemoryPool, Vec<Arc<VirtualMemoryPool>>)> {
    let options = SharedPoolOptions::new()
        .engine(engine)
        .page_bytes(sizes.page_bytes);
    let shared = SharedMemoryPool::with_options(device, options)?;
    let mut models = Vec::with_capacity(streams.len());
    for (number, stream) in streams.iter().enumerate() {
        let name = model_name(number);
        let mut options = ModelOptions::new(sizes.capacity_bytes);
        options.ahead_bytes_max = sizes.ahead_bytes;
        shared.register_model_with(&name, options)?;
        let model = shared.model(&name)?;
        model.use_stream(stream)?;
        models.push(model);
    }
    Ok((shared, models))
}
