//! Traits that let a model run with any KV cache.
//!
//! [`KvCache`] is what a model needs of a cache, and [`KvCacheFactory`] makes one for each layer. A
//! model that is generic over the factory keeps Candle's caches as its default and runs with any
//! other.
//!
//! **For models you own**, the change is a type and a constructor: the field's type becomes `C:
//! KvCache`, and `KvCache::new(2, max_seq_len)` becomes `factory.layer(layer, 2, max_seq_len)?`.
//! **Models of `candle-transformers`** make their caches inside, out of reach. They need a small
//! upstream change; `docs/UPSTREAM.md` in the repository describes it.
//!
//! **Sliding windows.** After each step a model calls [`release_front`](KvCache::release_front)
//! with the tokens that no later query sees, and takes positions from
//! [`position`](KvCache::position). [`gqa_with`](crate::attention::gqa_with) has the mask.
//! [`ElasticRotatingKvCache`] is for models that use Candle's rotating cache.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use candle_cuda_vmm::kv_cache::{KvCache, KvCacheFactory, PreallocatedCaches};
//! # use candle_cuda_vmm::Result;
//!
//! struct Attention<C> {
//!     cache: C,
//! }
//!
//! impl<C: KvCache> Attention<C> {
//!     fn new<F: KvCacheFactory<Cache = C>>(factory: &F, layer: usize) -> Result<Self> {
//!         let cache = factory.layer(layer, 2, 4096)?;
//!         Ok(Self { cache })
//!     }
//!
//!     fn forward(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
//!         self.cache.append(k, v) // all there is by now
//!     }
//! }
//!
//! # fn main() -> Result<()> {
//! let mut attention = Attention::new(&PreallocatedCaches, 0)?;
//! let token = Tensor::zeros((1, 8, 1, 64), candle_core::DType::F32, &Device::Cpu)?;
//! attention.forward(&token, &token)?;
//! let (k, _) = attention.forward(&token, &token)?;
//! assert_eq!(k.dims(), [1, 8, 2, 64]);
//! # Ok(())
//! # }
//! ```

mod candle;
mod checks;
mod concat;
mod elastic;
mod fork;
mod preallocated;
mod ring;
mod rotating;
mod sequence;
mod traits;

pub use candle::CandleCache;
pub use concat::ConcatCaches;
pub use elastic::{ElasticCache, ElasticKvCache};
pub use preallocated::PreallocatedCaches;
pub use rotating::ElasticRotatingKvCache;
pub use sequence::{Sequence, SequenceCache, SequenceReservation};
pub use traits::{KvCache, KvCacheFactory};
