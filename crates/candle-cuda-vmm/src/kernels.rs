//! The kernels of the folder `kernels`, loaded once for a Candle device.
//!
//! The build script makes an image of each file. It holds machine code for the GPU that the build
//! is for, and PTX, which the driver compiles for newer GPUs.

use candle_core::CudaDevice;
use candle_core::cuda::cudarc::driver::{CudaFunction, CudaModule, CudaStream, DriverError};
use candle_core::cuda::cudarc::nvrtc::Ptx;
use cuda_vmm::PerProcess;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// A compiled file.
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

/// A loaded image.
struct Loaded {
    name: &'static str,
    /// The device's stream. It lives while the device or a tensor of it does.
    stream: Weak<CudaStream>,
    module: Arc<CudaModule>,
}

/// The loaded images.
///
/// A module keeps its device's primary context. Modules of devices that are gone are unloaded when
/// the next image is loaded.
static LOADED: PerProcess<Mutex<Vec<Loaded>>> = PerProcess::new();

impl Image {
    /// A kernel of this image on a device; loads the image if it is not loaded there.
    ///
    /// # Errors
    /// If the driver refuses the image, for example because the GPU is older than the build is for.
    /// A later call tries again.
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
        // The lock is held so that a device has one module of each image.
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
