//! What one device may do with another's memory. The memory is the second device's; the first is
//! its peer.

use crate::Case;
use crate::common::{under_test, with_context};
use crate::kit::{Kit, call, descriptor};
use cuda_vmm::Device;
use cuda_vmm::sys::*;

/// The device whose memory it is not.
fn peer() -> &'static Device {
    &under_test().devices[0]
}

/// Gives owner and peer access in one call.
fn open_to_both(kit: &Kit, address: u64, peers: CUmemAccess_flags) -> CUresult {
    let access = [
        descriptor(kit.device.raw(), CU_MEM_ACCESS_FLAGS_PROT_READWRITE),
        descriptor(peer().raw(), peers),
    ];
    call!(kit, cuMemSetAccess(address, kit.page, access.as_ptr(), 2))
}

/// Sets every byte of a page by the peer, and waits.
fn fill_by_peer(kit: &Kit, address: u64, value: u8) -> CUresult {
    with_context(peer(), || {
        let code = call!(kit, cuMemsetD8(address, value, kit.page));
        if code == CUDA_SUCCESS {
            kit.must(call!(kit, cuCtxSynchronize()));
        }
        code
    })
}

fn read_by_peer(kit: &mut Kit, address: u64) {
    with_context(peer(), || kit.read(address));
}

/// What a device may do with a page.
fn access(kit: &mut Kit, device: &Device, address: u64) {
    let (mut flags, location) = (99, crate::kit::location(device.raw()));
    kit.must(call!(kit, cuMemGetAccess(&mut flags, &location, address)));
    let flags = flags.to_string();
    kit.note(&flags);
}

pub fn cases() -> Vec<Case> {
    vec![
        Case::new(
            "one call opens memory to its device and to a peer",
            &[
                "SUCCESS", "reads 71", "reads 71", "SUCCESS", "reads 72", "reads 72", "3", "3",
            ],
            |kit| {
                let (address, handle) = (kit.addresses(1), kit.memory(1));
                kit.map(address, 1, handle);
                let code = open_to_both(kit, address, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
                kit.answer(code);
                kit.fill(address, 71);
                kit.read(address);
                read_by_peer(kit, address);
                let code = fill_by_peer(kit, address, 72);
                kit.answer(code);
                kit.read(address);
                read_by_peer(kit, address);
                let owner = kit.device.clone();
                access(kit, &owner, address);
                access(kit, peer(), address);
            },
        ),
        Case::new(
            "memory that is open to its own device is closed to a peer",
            &["0", "INVALID_VALUE"],
            |kit| {
                let address = kit.addresses(1);
                kit.back(address, 1);
                access(kit, peer(), address);
                let code = fill_by_peer(kit, address, 73);
                kit.answer(code);
            },
        ),
        Case::new(
            "a peer may read what it may not write",
            &["SUCCESS", "1", "reads 74", "INVALID_VALUE", "reads 74"],
            |kit| {
                let (address, handle) = (kit.addresses(1), kit.memory(1));
                kit.map(address, 1, handle);
                let code = open_to_both(kit, address, CU_MEM_ACCESS_FLAGS_PROT_READ);
                kit.answer(code);
                access(kit, peer(), address);
                kit.fill(address, 74);
                read_by_peer(kit, address);
                let code = fill_by_peer(kit, address, 75);
                kit.answer(code);
                kit.read(address);
            },
        ),
        Case::new(
            "a peer that loses its access leaves the owner's",
            &["SUCCESS", "0", "INVALID_VALUE", "reads 76"],
            |kit| {
                let (address, handle) = (kit.addresses(1), kit.memory(1));
                kit.map(address, 1, handle);
                kit.must(open_to_both(
                    kit,
                    address,
                    CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
                ));
                let closed = descriptor(peer().raw(), CU_MEM_ACCESS_FLAGS_PROT_NONE);
                let code = call!(kit, cuMemSetAccess(address, kit.page, &closed, 1));
                kit.answer(code);
                access(kit, peer(), address);
                let code = fill_by_peer(kit, address, 77);
                kit.answer(code);
                kit.fill(address, 76);
                kit.read(address);
            },
        ),
        Case::new(
            "memory of two devices lies side by side and is copied across",
            &["SUCCESS", "reads 78"],
            |kit| {
                let address = kit.addresses(2);
                let second = address + kit.page as u64;
                kit.back(address, 1);
                let code = kit.try_create(kit.page, peer().raw(), 0);
                kit.must(code);
                let handle = kit.last_handle();
                kit.map(second, 1, handle);
                kit.must(open_to_both(
                    kit,
                    second,
                    CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
                ));
                kit.fill(address, 78);
                let code = call!(kit, cuMemcpyDtoD(second, address, kit.page));
                kit.answer(code);
                kit.must(call!(kit, cuCtxSynchronize()));
                read_by_peer(kit, second);
            },
        ),
    ]
}
