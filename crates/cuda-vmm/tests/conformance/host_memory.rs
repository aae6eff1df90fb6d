//! Host memory that is registered: what is refused, and what a copy to or from it waits for.
//!
//! Only what CUDA's manual of the driver says is expected here: the errors of `cuMemHostRegister`
//! and `cuMemHostUnregister`, and "API synchronization behavior".

use crate::Case;
use crate::common::Gate;
use crate::kit::{Kit, call};
use cuda_vmm::sys::*;
use std::ffi::c_void;
use std::ptr::null_mut;

/// Host memory of a case, in whole pages of the host.
struct Host {
    address: *mut c_void,
    bytes: usize,
}

impl Host {
    fn new(bytes: usize) -> Self {
        let (access, kind) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        );
        // SAFETY: the system chooses addresses at which nothing is.
        let address = unsafe { libc::mmap(null_mut(), bytes, access, kind, -1, 0) };
        assert_ne!(address, libc::MAP_FAILED, "no host memory");
        Self { address, bytes }
    }

    fn register(&self, kit: &Kit) -> CUresult {
        let flags = CU_MEMHOSTREGISTER_PORTABLE;
        call!(kit, cuMemHostRegister(self.address, self.bytes, flags))
    }

    fn unregister(&self, kit: &Kit) -> CUresult {
        call!(kit, cuMemHostUnregister(self.address))
    }

    /// Sets every byte.
    fn fill(&self, value: u8) {
        // SAFETY: the memory is this object's, and no copy reads it now.
        unsafe { self.address.cast::<u8>().write_bytes(value, self.bytes) };
    }

    /// What the first and the last byte are.
    fn ends(&self) -> [u8; 2] {
        let first = self.address.cast::<u8>();
        // SAFETY: the memory is this object's. A copy may write it meanwhile, which the device
        // does and no thread.
        unsafe {
            [
                first.read_volatile(),
                first.add(self.bytes - 1).read_volatile(),
            ]
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // SAFETY: the mapping is this object's, whole, and each case has unregistered it.
        unsafe { libc::munmap(self.address, self.bytes) };
    }
}

pub fn cases() -> Vec<Case> {
    let mut cases = refused();
    cases.extend(copies());
    cases
}

fn refused() -> Vec<Case> {
    const NONE_CURRENT: &[&str] = &[
        "INVALID_CONTEXT",
        "HOST_MEMORY_NOT_REGISTERED",
        "SUCCESS",
        "SUCCESS",
    ];
    vec![
        Case::new(
            "register, unregister and register again",
            &["SUCCESS"; 4],
            |kit| {
                let host = Host::new(kit.page);
                for _ in 0..2 {
                    kit.answer(host.register(kit));
                    kit.answer(host.unregister(kit));
                }
            },
        ),
        Case::new(
            "register what is registered",
            &["SUCCESS", "HOST_MEMORY_ALREADY_REGISTERED", "SUCCESS"],
            |kit| {
                let host = Host::new(kit.page);
                kit.answer(host.register(kit));
                kit.answer(host.register(kit));
                kit.answer(host.unregister(kit));
            },
        ),
        Case::new(
            "unregister what is not registered, and what is no longer",
            &[
                "HOST_MEMORY_NOT_REGISTERED",
                "SUCCESS",
                "SUCCESS",
                "HOST_MEMORY_NOT_REGISTERED",
            ],
            |kit| {
                let host = Host::new(kit.page);
                kit.answer(host.unregister(kit));
                kit.answer(host.register(kit));
                kit.answer(host.unregister(kit));
                kit.answer(host.unregister(kit));
            },
        ),
        Case::new(
            "register nothing, at no address, or with flags that do not exist",
            &["INVALID_VALUE"; 3],
            |kit| {
                let host = Host::new(kit.page);
                let rows = [
                    (host.address, 0, 0),
                    (null_mut(), kit.page, 0),
                    (host.address, kit.page, 1 << 20),
                ];
                for (address, bytes, flags) in rows {
                    let code = call!(kit, cuMemHostRegister(address, bytes, flags));
                    kit.answer(code);
                }
            },
        ),
        Case::new(
            "register and unregister without a context",
            NONE_CURRENT,
            |kit| {
                let (host, context) = (Host::new(kit.page), kit.device.raw_context());
                kit.must(call!(kit, cuCtxSetCurrent(null_mut())));
                let codes = [host.register(kit), host.unregister(kit)];
                kit.must(call!(kit, cuCtxSetCurrent(context)));
                codes.into_iter().for_each(|code| kit.answer(code));
                kit.answer(host.register(kit));
                kit.must(call!(kit, cuCtxSetCurrent(null_mut())));
                let code = host.unregister(kit);
                kit.must(call!(kit, cuCtxSetCurrent(context)));
                kit.answer(code);
            },
        ),
    ]
}

fn copies() -> Vec<Case> {
    vec![
        Case::new(
            "a copy from registered memory reads it when the stream reaches it",
            &["SUCCESS", "NOT_READY", "SUCCESS", "reads 3"],
            |kit| {
                let (host, address, stream) = (Host::new(kit.page), kit.addresses(1), kit.stream());
                kit.back(address, 1);
                host.fill(2);
                kit.must(host.register(kit));
                let gate = Gate::close(&kit.device, stream.raw());
                let (from, stream) = (host.address.cast_const(), stream.raw());
                let code = call!(kit, cuMemcpyHtoDAsync(address, from, kit.page, stream));
                kit.answer(code);
                let code = call!(kit, cuStreamQuery(stream));
                kit.answer(code);
                // The copy waits behind the gate.
                host.fill(3);
                gate.open();
                let code = call!(kit, cuStreamSynchronize(stream));
                kit.answer(code);
                kit.read(address);
                kit.must(host.unregister(kit));
            },
        ),
        Case::new(
            "a copy to registered memory does not wait",
            &["SUCCESS", "holds [1, 1]", "SUCCESS", "holds [2, 2]"],
            |kit| {
                let (host, address, stream) = (Host::new(kit.page), kit.addresses(1), kit.stream());
                kit.back(address, 1);
                kit.fill(address, 2);
                host.fill(1);
                kit.must(host.register(kit));
                let gate = Gate::close(&kit.device, stream.raw());
                let stream = stream.raw();
                let code = call!(
                    kit,
                    cuMemcpyDtoHAsync(host.address, address, kit.page, stream)
                );
                kit.answer(code);
                kit.note(&format!("holds {:?}", host.ends()));
                gate.open();
                let code = call!(kit, cuStreamSynchronize(stream));
                kit.answer(code);
                kit.note(&format!("holds {:?}", host.ends()));
                kit.must(host.unregister(kit));
            },
        ),
    ]
}
