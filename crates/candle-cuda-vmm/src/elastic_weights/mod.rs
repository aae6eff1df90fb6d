//! Weights of a model in memory of a pool, which sleep and wake at the same addresses.

mod convert;
mod file;
mod layout;
mod model;
mod options;
mod shared;
mod source;

pub use file::weights_in;
pub use model::ElasticModel;
pub use options::WeightsOptions;

use crate::error::{Result, WeightsError};
use crate::tensor_pool::TensorPool;
use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::VarBuilder;
use convert::Conversion;
use cuda_vmm::{Arriving, HostStore, Keep, Slept, WakeOptions};
use file::{Stored, WeightsFile};
use layout::Layout;
use shared::{Backend, Shared};
use source::Source;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// Weights of safetensors files, or those that a function makes, in memory of a pool.
///
/// They are charged to the pool's account, as all else is. [`var_builder`](Self::var_builder) makes
/// tensors over them for any model that takes a `VarBuilder`: no byte is copied. While such a tensor
/// lives, its memory stays. So the weights can be put to sleep when the model and its builders are
/// dropped, and the same `VarBuilder` code makes the model again when they wake.
/// [`ElasticModel`] does both.
///
/// # Loading
/// Several threads read the files into pinned memory of a [`HostStore`], converting numbers on the
/// way if another type is asked for, while the device copies
/// ([`VirtualMemoryPool::fill`](cuda_vmm::VirtualMemoryPool::fill)). Files are not mapped.
///
/// # On a CPU device
/// The tensors are Candle's own, and the memory that a GPU would need for them is that of the
/// simulated device. A tensor that is left does not keep the weights awake.
///
/// ```
/// # #[cfg(all(feature = "simulator", not(feature = "cuda")))] {
/// use candle_core::{DType, Device, Tensor};
/// use candle_cuda_vmm::cuda_vmm::{HostStore, Keep, WakeOptions};
/// use candle_cuda_vmm::device::core_device;
/// use candle_cuda_vmm::{ElasticWeights, TensorPool, WeightsOptions};
///
/// # let folder = std::env::temp_dir().join(format!("elastic-weights-{}", std::process::id()));
/// # std::fs::create_dir_all(&folder)?;
/// # let file = folder.join("model.safetensors");
/// # let w = Tensor::ones((4, 8), DType::F32, &Device::Cpu)?;
/// # candle_core::safetensors::save(&[("linear.weight", w)].into(), &file)?;
/// let device = Device::Cpu;
/// let pool = TensorPool::new(&device)?;
/// let store = HostStore::new(&core_device(&device)?, 64 << 20)?;
/// let mut weights = ElasticWeights::load(&pool, &store, &[file], WeightsOptions::new())?;
/// let builder = weights.var_builder(DType::F32)?;
/// let linear = candle_nn::linear_no_bias(8, 4, builder.pp("linear"))?;
/// // The model serves here. Then others have the memory:
/// drop((linear, builder));
/// weights.sleep(Keep::Constant(&store))?;
/// assert_eq!(pool.committed_bytes(), 0);
/// weights.wake(&WakeOptions::new())?;
/// let linear = candle_nn::linear_no_bias(8, 4, weights.var_builder(DType::F32)?.pp("linear"))?;
/// # drop(linear);
/// # std::fs::remove_dir_all(&folder)?;
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct ElasticWeights {
    shared: Arc<Shared>,
    source: Source,
    /// For reading the source.
    store: HostStore,
    options: WeightsOptions,
    device: Device,
    asleep: Option<Contents>,
}

/// What became of the contents of weights that sleep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Contents {
    Kept,
    InSource,
}

impl ElasticWeights {
    /// Reserves addresses for all tensors of these files, allocates their memory, and reads them.
    /// [`make`](Self::make) is for weights that no file has.
    ///
    /// The pinned memory for reading, 2 MiB for each of four buffers of each thread, is the store's,
    /// and has gone back when the call returns.
    ///
    /// # Errors
    /// [`Weights`](crate::VmmError::Weights) if a file cannot be read or is wrong, if two have a
    /// tensor of the same name, if a number is not converted to the type that is asked for, or if
    /// parts do not [join](WeightsOptions::join); as
    /// for an allocation of the pool if there is no memory; as
    /// [`VirtualMemoryPool::fill`](cuda_vmm::VirtualMemoryPool::fill). Then nothing is held.
    pub fn load(
        pool: &TensorPool,
        store: &HostStore,
        files: &[impl AsRef<Path>],
        options: WeightsOptions,
    ) -> Result<Self> {
        let (files, layout) = open(files, &options)?;
        Self::of(pool, store, layout, Source::Files(files), options)
    }

    /// Reserves addresses for tensors of these names, shapes and types, allocates their memory, and
    /// fills it with what `make` returns for each, such as random numbers. It is called once for
    /// each tensor, on this thread, and again by a wake after [`Keep::Nothing`]. It must return the
    /// same numbers then, on any device, and they are converted to the type of the tensor.
    ///
    /// # Errors
    /// The first error of `make`; [`CandleError`](crate::VmmError::CandleError) with
    /// `UnexpectedShape` if it returns another shape; [`Weights`](crate::VmmError::Weights) with
    /// `NameTaken` for a name that comes twice, `Empty` if no tensor has an element, or if parts do
    /// not [join](WeightsOptions::join); else as [`load`](Self::load). Then nothing is held.
    ///
    /// ```
    /// # #[cfg(all(feature = "simulator", not(feature = "cuda")))] {
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_cuda_vmm::cuda_vmm::HostStore;
    /// use candle_cuda_vmm::device::core_device;
    /// use candle_cuda_vmm::{ElasticWeights, TensorPool, WeightsOptions};
    ///
    /// let device = Device::Cpu;
    /// let pool = TensorPool::new(&device)?;
    /// let store = HostStore::new(&core_device(&device)?, 64 << 20)?;
    /// let tensors = [("k", (4, 8), DType::F32), ("v", (2, 8), DType::F32)];
    /// let options = WeightsOptions::new().join("kv", ["k", "v"]);
    /// let ones = |_: &str, shape: &_| Tensor::ones(shape, DType::F32, &Device::Cpu);
    /// let weights = ElasticWeights::make(&pool, &store, tensors, options, ones)?;
    /// let kv = weights.var_builder(DType::F32)?.get((6, 8), "kv")?;
    /// assert_eq!(kv.sum_all()?.to_scalar::<f32>()?, 48.);
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn make<N: Into<String>, S: Into<Shape>>(
        pool: &TensorPool,
        store: &HostStore,
        tensors: impl IntoIterator<Item = (N, S, DType)>,
        options: WeightsOptions,
        make: impl Fn(&str, &Shape) -> candle_core::Result<Tensor> + Send + Sync + 'static,
    ) -> Result<Self> {
        let mut names = BTreeSet::new();
        let mut all = Vec::new();
        for (name, shape, dtype) in tensors {
            let stored = Stored {
                name: name.into(),
                dtype,
                shape: shape.into().into_dims(),
                begin: 0,
            };
            if !names.insert(stored.name.clone()) {
                return Err(WeightsError::NameTaken { name: stored.name }.into());
            }
            let to = options.dtype.filter(|_| dtype.is_float()).unwrap_or(dtype);
            all.push((stored, 0, to, Conversion::None));
        }
        let layout = Layout::new(all, &options.joins)?;
        if layout.bytes() == 0 {
            return Err(WeightsError::Empty { files: 0 }.into());
        }
        Self::of(pool, store, layout, Source::Made(Arc::new(make)), options)
    }

    fn of(
        pool: &TensorPool,
        store: &HostStore,
        layout: Layout,
        source: Source,
        options: WeightsOptions,
    ) -> Result<Self> {
        let mut shared = Shared::new(pool, layout)?;
        shared.read(&source, store, &options)?;
        Ok(Self {
            shared: Arc::new(shared),
            source,
            store: store.clone(),
            options,
            device: pool.device().clone(),
            asleep: None,
        })
    }

    /// A builder of tensors over the weights. A tensor that is asked for in another type than it has
    /// is converted, to memory of Candle's.
    ///
    /// # Errors
    /// [`WeightsError::Asleep`].
    pub fn var_builder(&self, dtype: DType) -> Result<VarBuilder<'static>> {
        if self.asleep.is_some() {
            return Err(WeightsError::Asleep.into());
        }
        let backend = Box::new(Backend(self.shared.clone()));
        Ok(VarBuilder::from_backend(
            backend,
            dtype,
            self.device.clone(),
        ))
    }

    /// The bytes of all tensors, with what is between them.
    pub fn bytes(&self) -> usize {
        self.shared.layout().bytes()
    }

    /// The names of all tensors, in the order of their addresses; those of
    /// [joins](WeightsOptions::join) are not among them.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let tensors = self.shared.layout().tensors().iter();
        tensors.map(|tensor| &*tensor.name)
    }

    /// The bytes from the first to the last tensor whose name begins with `prefix`, such as
    /// `model.layers.0.`: what to have [first](WakeOptions::first) in a wake.
    pub fn bytes_of(&self, prefix: &str) -> Option<Range<usize>> {
        self.shared.layout().bytes_of(prefix)
    }

    /// Whether the weights are asleep.
    pub fn is_asleep(&self) -> bool {
        self.asleep.is_some()
    }

    /// Gives all memory of the weights to others, and keeps the addresses. With
    /// [`Keep::Constant`] the contents are copied to the host the first time only, with
    /// [`Keep::Nothing`] they are read from the files, or made, again. What the device still computes with
    /// them must have ended: synchronise it before.
    ///
    /// # Errors
    /// [`WeightsError::Asleep`]; [`WeightsError::InUse`] if a builder is left;
    /// [`Vmm`](crate::VmmError::Vmm) as
    /// [`VirtualMemoryPool::sleep`](cuda_vmm::VirtualMemoryPool::sleep), with `KeptAwake` if a
    /// tensor is left or the device works with one. After an error the weights are awake.
    pub fn sleep(&mut self, keep: Keep<'_>) -> Result<Slept> {
        if self.asleep.is_some() {
            return Err(WeightsError::Asleep.into());
        }
        let contents = match keep {
            Keep::Nothing => Contents::InSource,
            Keep::Host(_) | Keep::Constant(_) => Contents::Kept,
        };
        let slept = self.own()?.sleep(keep)?;
        self.asleep = Some(contents);
        Ok(slept)
    }

    /// Has the memory of the weights at their addresses again, and their contents.
    ///
    /// # Errors
    /// [`WeightsError::Awake`]; [`WeightsError::Changed`] or [`WeightsError::File`] if the contents
    /// are to be read and a file has changed or gone, which is found before anything is allocated;
    /// [`Vmm`](crate::VmmError::Vmm) as
    /// [`VirtualMemoryPool::wake`](cuda_vmm::VirtualMemoryPool::wake). After an error the weights
    /// are asleep as they were, and can be woken later.
    pub fn wake(&mut self, options: &WakeOptions) -> Result<()> {
        let contents = self.asleep.ok_or(WeightsError::Awake)?;
        let source = match contents {
            Contents::Kept => None,
            Contents::InSource => Some(self.source.open_again()?),
        };
        let (store, load) = (self.store.clone(), self.options.clone());
        let shared = self.own()?;
        shared.wake(options)?;
        if let Some(source) = source {
            let read = shared.read(&source, &store, &load);
            if let Err(error) = read.and_then(|()| Ok(source.check_unchanged()?)) {
                // If that is refused, the next wake finds the memory there.
                _ = shared.sleep(Keep::Nothing);
                return Err(error);
            }
        }
        self.asleep = None;
        Ok(())
    }

    /// Has the memory of the weights again, and does not wait for their contents, if these were
    /// kept: they come in the order of [`WakeOptions::first`], and then in that of their addresses.
    /// Before work with some of them is queued, have it [wait](WeightsArriving::order) for those.
    /// What is computed before from others is nonsense, and no more than that.
    ///
    /// Contents that were not kept are read first, as by [`wake`](Self::wake).
    ///
    /// # Errors
    /// As [`wake`](Self::wake).
    pub fn wake_streaming(&mut self, options: &WakeOptions) -> Result<WeightsArriving> {
        match self.asleep.ok_or(WeightsError::Awake)? {
            Contents::InSource => {
                self.wake(options)?;
                Ok(WeightsArriving(None))
            }
            Contents::Kept => {
                let arriving = self.own()?.wake_streaming(options)?;
                self.asleep = None;
                Ok(WeightsArriving(Some(arriving)))
            }
        }
    }

    /// The weights, if nobody else has them.
    fn own(&mut self) -> core::result::Result<&mut Shared, WeightsError> {
        let builders = Arc::strong_count(&self.shared) - 1;
        Arc::get_mut(&mut self.shared).ok_or(WeightsError::InUse { builders })
    }
}

/// Contents of weights that are awake, and that are still on their way; see
/// [`ElasticWeights::wake_streaming`]. Dropping it waits until all have come.
#[derive(Debug)]
#[must_use = "dropping it waits for all contents"]
pub struct WeightsArriving(Option<Arriving>);

impl WeightsArriving {
    /// Makes what is queued on Candle's stream from now on wait for the tensors whose names begin
    /// with `prefix`, and those between them. Waits for nothing itself.
    ///
    /// # Errors
    /// [`Vmm`](crate::VmmError::Vmm) with `Driver`.
    pub fn order(&self, weights: &ElasticWeights, prefix: &str) -> Result<()> {
        match (&self.0, weights.bytes_of(prefix)) {
            (Some(arriving), Some(bytes)) => weights.shared.order(arriving, bytes),
            _ => Ok(()),
        }
    }

    /// Waits until all contents have come.
    ///
    /// # Errors
    /// As [`order`](Self::order).
    pub fn finish(self) -> Result<()> {
        Ok(self.0.map_or(Ok(()), Arriving::finish)?)
    }
}

/// Opens files, and says where their tensors go.
fn open(
    paths: &[impl AsRef<Path>],
    options: &WeightsOptions,
) -> core::result::Result<(Vec<WeightsFile>, Layout), WeightsError> {
    let mut files: Vec<WeightsFile> = Vec::new();
    let mut known: BTreeMap<String, usize> = BTreeMap::new();
    let mut all = Vec::new();
    for path in paths {
        let (file, tensors) = WeightsFile::open(path.as_ref())?;
        let number = files.len();
        files.push(file);
        for stored in tensors {
            if let Some(first) = known.insert(stored.name.clone(), number) {
                let path = |file: usize| files[file].path.clone();
                return Err(WeightsError::Duplicate {
                    name: stored.name,
                    first: path(first),
                    second: path(number),
                });
            }
            let to = options
                .dtype
                .filter(|_| stored.dtype.is_float())
                .unwrap_or(stored.dtype);
            let conversion = Conversion::between(stored.dtype, to);
            let conversion = conversion.ok_or_else(|| WeightsError::Conversion {
                name: stored.name.clone(),
                from: stored.dtype,
                to,
            })?;
            all.push((stored, number, to, conversion));
        }
    }
    let layout = Layout::new(all, &options.joins)?;
    match layout.bytes() {
        0 => Err(WeightsError::Empty { files: files.len() }),
        _ => Ok((files, layout)),
    }
}
