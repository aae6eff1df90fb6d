//! The kernels of the folder `kernels`, loaded once per Candle device.
//!
//! The build script makes an image of each file. An image holds machine code for the GPU that the
//! build targets, and PTX, which the driver compiles for newer GPUs.

use candle_core::CudaDevice;
use candle_core::cuda::cudarc::driver::{CudaFunction, CudaModule, CudaStream, DriverError};
use candle_core::cuda::cudarc::nvrtc::Ptx;
use cuda_vmm::PerProcess;
use std::sync::{Arc, Mutex, PoisonError, Weak};

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

/// An image that is loaded on a device.
struct Loaded {
    name: &'static str,
    /// The device's stream. It lives while the device, or a tensor on it, does.
    stream: Weak<CudaStream>,
    module: Arc<CudaModule>,
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
        self.module(device)?.load_function(entry)
    }

    fn module(&self, device: &CudaDevice) -> Result<Arc<CudaModule>, DriverError> {
        let stream = device.cuda_stream();
        let mut loaded = LOADED.get().lock().unwrap_or_else(PoisonError::into_inner);
        let is_this = |loaded: &&Loaded| {
            loaded.name == self.name && Weak::as_ptr(&loaded.stream) == Arc::as_ptr(&stream)
        };
        if let Some(loaded) = loaded.iter().find(is_this) {
            return Ok(loaded.module.clone());
        }
        // The lock is held while loading, so that a device has one module of each image.
        loaded.retain(|loaded| loaded.stream.strong_count() > 0);
        let module = (stream.context()).load_module(Ptx::from_binary(self.bytes.to_vec()))?;
        loaded.push(Loaded {
            name: self.name,
            stream: Arc::downgrade(&stream),
            module: module.clone(),
        });
        Ok(module)
    }
}
