//! A kernel that gathers blocks by a table of their numbers, as attention over paged caches does.
//!
//! The kernel is `gather.cu`. Its PTX is committed, so that no build needs a CUDA compiler; `cargo
//! xtask test --cuda` keeps the two in step. The simulated driver has no kernels. There a host
//! function on the stream does the same: mapped addresses are addresses of the host.

use super::with_context;
use core::ffi::c_void;
use core::ptr::null_mut;
use cuda_vmm::sys::{CUDA_SUCCESS, CUfunction, CUmodule, CUresult, CUstream};
use cuda_vmm::{Device, DriverKind};

/// The PTX of `gather.cu`: `out[row] = pool[table[row]]`, where a row has `words` words of four
/// bytes.
const PTX: &str = concat!(include_str!("gather.ptx"), "\0");

/// Threads of a block.
const THREADS: u32 = 128;

/// Where a gather reads and writes.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// Where the rows go, one after the other.
    pub out: u64,
    /// The first block.
    pub pool: u64,
    /// The numbers of the blocks, 32 bits each.
    pub table: u64,
    /// How many rows there are.
    pub rows: u32,
    /// The size of a row and of a block, in words of four bytes.
    pub words: u32,
}

/// The kernel, loaded on one device.
pub struct Gather {
    device: Device,
    /// None on the simulated driver.
    loaded: Option<(CUmodule, CUfunction)>,
    /// What host functions of this gather are given; a graph may run them as long as this lives.
    #[allow(clippy::vec_box, reason = "host functions hold their addresses")]
    given: Vec<Box<Rows>>,
}

impl Gather {
    pub fn new(device: &Device) -> Self {
        let loaded = (device.driver().kind() == DriverKind::Real).then(|| load(device));
        Self {
            device: device.clone(),
            loaded,
            given: Vec::new(),
        }
    }

    /// Queues the gather, or adds it to the stream's capture.
    ///
    /// # Safety
    /// When it runs, the table, the blocks that it names and the rows are mapped and open to the
    /// device; and `self` lives until nothing can run it any more.
    pub unsafe fn launch(&mut self, stream: CUstream, rows: Rows) -> CUresult {
        let device = self.device.clone();
        let table = device.driver().table();
        match self.loaded {
            Some((_, function)) => with_context(&device, || {
                let Rows {
                    mut out,
                    mut pool,
                    mut table,
                    rows,
                    mut words,
                } = rows;
                let mut parameters: [*mut c_void; 4] = [
                    (&raw mut out).cast(),
                    (&raw mut pool).cast(),
                    (&raw mut table).cast(),
                    (&raw mut words).cast(),
                ];
                let launch = device.driver().table().cuLaunchKernel;
                // SAFETY: the parameters are those that the kernel declares, and are read before
                // the call returns; the memory is the caller's promise.
                unsafe {
                    launch(
                        function,
                        rows,
                        1,
                        1,
                        THREADS,
                        1,
                        1,
                        0,
                        stream,
                        parameters.as_mut_ptr(),
                        null_mut(),
                    )
                }
            }),
            None => {
                let mut given = Box::new(rows);
                let pointer = (&raw mut *given).cast();
                self.given.push(given);
                // SAFETY: the box lives as long as `self`.
                with_context(&device, || unsafe {
                    (table.cuLaunchHostFunc)(stream, Some(gather), pointer)
                })
            }
        }
    }
}

impl Drop for Gather {
    fn drop(&mut self) {
        if let Some((module, _)) = self.loaded {
            let unload = self.device.driver().table().cuModuleUnload;
            // SAFETY: unloaded once; the caller of `launch` has made sure that nothing runs it.
            let code = with_context(&self.device, || unsafe { unload(module) });
            debug_assert_eq!(code, CUDA_SUCCESS, "cuModuleUnload");
        }
    }
}

fn load(device: &Device) -> (CUmodule, CUfunction) {
    let table = device.driver().table();
    let (mut module, mut function) = (null_mut(), null_mut());
    with_context(device, || {
        // SAFETY: the image is PTX that ends with a zero, and `module` a valid place.
        let code = unsafe { (table.cuModuleLoadData)(&mut module, PTX.as_ptr().cast()) };
        assert_eq!(code, CUDA_SUCCESS, "cuModuleLoadData");
        // SAFETY: `function` is a valid place, and the module was just loaded.
        let code =
            unsafe { (table.cuModuleGetFunction)(&mut function, module, c"gather".as_ptr()) };
        assert_eq!(code, CUDA_SUCCESS, "cuModuleGetFunction");
    });
    (module, function)
}

/// The same on the host.
unsafe extern "C" fn gather(given: *mut c_void) {
    // SAFETY: `launch` gave this pointer to a `Rows` that lives as long as the gather.
    let Rows {
        out,
        pool,
        table,
        rows,
        words,
    } = unsafe { given.cast::<Rows>().read() };
    let bytes = 4 * words as usize;
    let at = |address: u64| core::ptr::with_exposed_provenance_mut::<u8>(address as usize);
    for row in 0..rows as usize {
        // SAFETY: the caller of `launch` promised that all of this is mapped.
        unsafe {
            let block = at(table).cast::<u32>().add(row).read() as usize;
            let (from, to) = (at(pool).add(block * bytes), at(out).add(row * bytes));
            to.copy_from_nonoverlapping(from, bytes);
        }
    }
}
