//! The kernels of the folder `kernels`, loaded once per Candle device.
//!
//! The build script makes an image of each file. An image holds machine code for the GPU that the
//! build targets, and PTX, which the driver compiles for newer GPUs.

#[cfg(feature = "attention")]
use crate::device::device_of_stream;
use candle_core::CudaDevice;
#[cfg(feature = "attention")]
use candle_core::cuda::cudarc::driver::sys::{
    CUdevice_attribute as DeviceAttribute, CUfunction_attribute as Attribute,
};
use candle_core::cuda::cudarc::driver::{CudaFunction, CudaModule, CudaStream, DriverError};
use candle_core::cuda::cudarc::nvrtc::Ptx;
#[cfg(feature = "attention")]
use cuda_vmm::DriverVersion;
use cuda_vmm::PerProcess;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// The oldest architecture with programmatic stream serialization.
#[cfg(feature = "attention")]
const OVERLAPS_MAJOR_MIN: usize = 9;
/// The oldest driver that captures such launches.
#[cfg(feature = "attention")]
const OVERLAPS_DRIVER_MIN: DriverVersion = DriverVersion {
    major: 12,
    minor: 3,
};

/// A compiled file of kernels.
#[derive(Debug)]
pub(crate) struct Image {
    name: &'static str,
    bytes: &'static [u8],
}

macro_rules! image {
    ($name:literal) => {
        Image {
            name: $name,
            bytes: include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".fatbin")),
        }
    };
}

/// The kernel that appends keys and values.
pub(crate) static APPEND: Image = image!("append");
/// The softmax of attention.
pub(crate) static SOFTMAX: Image = image!("softmax");
/// Attention of decode steps, by the dtype of K and V.
#[cfg(feature = "attention")]
pub(crate) static DECODE: [Image; 4] = [
    image!("attention/decode_f16"),
    image!("attention/decode_bf16"),
    image!("attention/decode_f32"),
    image!("attention/decode_f8"),
];
/// The kernels that copy rows of K and V.
#[cfg(feature = "attention")]
pub(crate) static READ: Image = image!("attention/read");
/// The kernels that rotate and write new tokens.
#[cfg(feature = "attention")]
pub(crate) static WRITE: Image = image!("attention/write");

/// The kernels that do what is between a layer's products.
#[cfg(feature = "attention")]
pub(crate) static FUSED: Image = image!("fused");
/// The products of one row with weights.
#[cfg(feature = "attention")]
pub(crate) static LINEAR: Image = image!("linear");
/// The kernels that draw tokens.
#[cfg(feature = "attention")]
pub(crate) static SAMPLE: Image = image!("sample");

/// A kernel of a device, and how it may be launched.
#[cfg(feature = "attention")]
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    pub(crate) function: CudaFunction,
    /// Threads that its blocks may have.
    pub(crate) threads_max: usize,
    /// Whether it may begin while the one before it ends: on a GPU that can, if it waits then.
    pub(crate) overlaps: bool,
}

#[cfg(feature = "attention")]
impl Kernel {
    fn new(device: &CudaDevice, function: CudaFunction) -> Result<Self, DriverError> {
        let size = |number| usize::try_from(number).unwrap_or_default();
        let stream = device.cuda_stream();
        let major = DeviceAttribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR;
        let major = size(stream.context().attribute(major)?);
        let driver = device_of_stream(&stream).map(|core| core.driver().version());
        let threads_max = Attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK;
        // The architecture of the source, which an older build's PTX has on a newer GPU too.
        let compiled_for = Attribute::CU_FUNC_ATTRIBUTE_PTX_VERSION;
        Ok(Self {
            threads_max: size(function.get_attribute(threads_max)?),
            overlaps: major >= OVERLAPS_MAJOR_MIN
                && size(function.get_attribute(compiled_for)?) >= 10 * OVERLAPS_MAJOR_MIN
                && driver.is_ok_and(|driver| driver >= OVERLAPS_DRIVER_MIN),
            function,
        })
    }
}

/// An image that is loaded on a device.
struct Loaded {
    name: &'static str,
    /// The device's stream. It lives while the device, or a tensor on it, does.
    stream: Weak<CudaStream>,
    module: Arc<CudaModule>,
    /// The kernels that were asked for by name.
    #[cfg(feature = "attention")]
    kernels: Vec<(String, Kernel)>,
}

/// The loaded images. A module keeps its context. Loading an image unloads those of dropped
/// devices.
static LOADED: PerProcess<Mutex<Vec<Loaded>>> = PerProcess::new();

impl Image {
    /// Returns a kernel of this image on a device. Loads the image if it is not loaded there
    /// (`cuModuleLoadData`).
    ///
    /// # Errors
    /// The driver's error if it refuses the image, for example because the GPU is older than the
    /// target. A later call tries again.
    pub(crate) fn function(
        &self,
        device: &CudaDevice,
        entry: &str,
    ) -> Result<CudaFunction, DriverError> {
        self.loaded(device, |loaded| loaded.module.clone())?
            .load_function(entry)
    }

    /// Returns a kernel, and how it may be launched. The driver is asked the first time only.
    ///
    /// # Errors
    /// As [`function`](Self::function).
    #[cfg(feature = "attention")]
    pub(crate) fn kernel(&self, device: &CudaDevice, entry: &str) -> Result<Kernel, DriverError> {
        let known = self.loaded(device, |loaded| {
            let mut kernels = loaded.kernels.iter();
            let known = kernels.find(|(name, _)| name == entry);
            known.map(|(_, kernel)| kernel.clone())
        })?;
        if let Some(kernel) = known {
            return Ok(kernel);
        }
        let kernel = Kernel::new(device, self.function(device, entry)?)?;
        let known = (entry.to_owned(), kernel.clone());
        self.loaded(device, |loaded| loaded.kernels.push(known))?;
        Ok(kernel)
    }

    /// Loads this image on a device if it is not loaded there, and calls `then` with it.
    fn loaded<R>(
        &self,
        device: &CudaDevice,
        then: impl FnOnce(&mut Loaded) -> R,
    ) -> Result<R, DriverError> {
        let stream = device.cuda_stream();
        let mut loaded = LOADED.get().lock().unwrap_or_else(PoisonError::into_inner);
        let is_this = |loaded: &Loaded| {
            loaded.name == self.name && Weak::as_ptr(&loaded.stream) == Arc::as_ptr(&stream)
        };
        if let Some(at) = loaded.iter().position(is_this) {
            return Ok(then(&mut loaded[at]));
        }
        // The lock is held while loading, so that a device has one module of each image.
        loaded.retain(|loaded| loaded.stream.strong_count() > 0);
        let module = (stream.context()).load_module(Ptx::from_binary(self.bytes.to_vec()))?;
        let mut new = Loaded {
            name: self.name,
            stream: Arc::downgrade(&stream),
            module,
            #[cfg(feature = "attention")]
            kernels: Vec::new(),
        };
        let result = then(&mut new);
        loaded.push(new);
        Ok(result)
    }
}
