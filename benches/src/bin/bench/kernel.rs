//! Work for a stream, as a program that serves models queues it: a kernel that writes.
//!
//! A memset of the driver's would not do: it looks its addresses up when it is called, and so waits while another
//! thread maps. A kernel's launch does not.

use anyhow::{Result, ensure};
use cuda_vmm::sys::{CUDA_SUCCESS, CUfunction, CUmodule};
use cuda_vmm::{Device, DriverKind, Stream};
use std::ffi::{CStr, CString, c_void};
use std::ptr::null_mut;

/// Loads a kernel from PTX for the process's life, and makes the device's context current on this
/// thread. The simulated driver has no kernels.
///
/// The PTX is generated from the `.cu` beside it, so that no build needs a CUDA compiler.
/// `cargo xtask test --cuda` keeps the two in step.
pub fn load(device: &Device, ptx: &str, name: &CStr) -> Result<Option<CUfunction>> {
    let table = device.driver().table();
    // SAFETY: the device retains its context; the thread has no other that it needs.
    let code = unsafe { (table.cuCtxSetCurrent)(device.raw_context()) };
    ensure!(code == CUDA_SUCCESS, "cuCtxSetCurrent answered {code}");
    if device.driver().kind() == DriverKind::Simulated {
        return Ok(None);
    }
    let image = CString::new(ptx)?;
    let (mut module, mut function): (CUmodule, _) = (null_mut(), null_mut());
    // SAFETY: the image is PTX that ends with a zero, and `module` a valid place.
    let code = unsafe { (table.cuModuleLoadData)(&mut module, image.as_ptr().cast()) };
    ensure!(code == CUDA_SUCCESS, "cuModuleLoadData answered {code}");
    // SAFETY: `function` is a valid place, and the module was just loaded.
    let code = unsafe { (table.cuModuleGetFunction)(&mut function, module, name.as_ptr()) };
    ensure!(code == CUDA_SUCCESS, "cuModuleGetFunction answered {code}");
    Ok(Some(function))
}

/// Launches a kernel in one dimension.
///
/// # Safety
/// The parameters are those that the kernel declares, and what it does with memory is right until the stream is past it.
pub unsafe fn launch(
    function: CUfunction,
    stream: &Stream,
    (blocks, threads): (u32, u32),
    parameters: &mut [*mut c_void],
) -> Result<()> {
    let launch = stream.device().driver().table().cuLaunchKernel;
    // SAFETY: the caller's promise; the parameters are read before the call returns.
    let code = unsafe {
        launch(
            function,
            blocks,
            1,
            1,
            threads,
            1,
            1,
            0,
            stream.raw(),
            parameters.as_mut_ptr(),
            null_mut(),
        )
    };
    ensure!(code == CUDA_SUCCESS, "cuLaunchKernel answered {code}");
    Ok(())
}

/// The kernel, loaded for the process's life.
#[derive(Clone, Copy)]
pub struct Fill(Option<CUfunction>);

impl Fill {
    /// Loads it; the simulated driver has no kernels, and a memset stands for it there.
    pub fn new(device: &Device) -> Result<Self> {
        load(device, include_str!("fill.ptx"), c"fill").map(Self)
    }

    /// Queues it on a stream of the device, whose context is current on this thread since [`new`](Self::new).
    ///
    /// # Safety
    /// The bytes are live until the stream is past this.
    pub unsafe fn launch(self, stream: &Stream, mut target: u64, bytes: usize) -> Result<()> {
        let Some(function) = self.0 else {
            // SAFETY: the caller's promise.
            return Ok(unsafe { stream.memset(target, 1, bytes) }?);
        };
        let mut words = (bytes / 4) as u32;
        let mut parameters: [*mut c_void; 2] = [(&raw mut target).cast(), (&raw mut words).cast()];
        // SAFETY: the parameters are those that the kernel declares; the memory is the caller's promise.
        unsafe { launch(function, stream, (1, 128), &mut parameters) }
    }
}
