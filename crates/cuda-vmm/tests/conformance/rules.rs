//! What the calls that manage memory accept and refuse.

use crate::Case;
use crate::kit::{Kit, call, descriptor, properties};
use cuda_vmm::sys::*;

/// The number of a device that no machine has.
const NO_DEVICE: i32 = 77;

/// An address that no driver reserves.
pub const NEVER_RESERVED: u64 = 2 << 20;

pub fn cases() -> Vec<Case> {
    let mut cases = creating();
    cases.extend(reserving());
    cases.extend(mapping());
    cases.extend(accessing());
    cases.extend(unmapping());
    cases.extend(freeing());
    cases.extend(living_on());
    cases
}

fn creating() -> Vec<Case> {
    let create = |name, expected, create: fn(&mut Kit) -> CUresult| {
        Case::new(name, &[expected], move |kit| {
            let code = create(kit);
            kit.answer(code);
        })
    };
    vec![
        create("create size 0", "INVALID_VALUE", |kit| {
            kit.try_create(0, kit.device.raw(), 0)
        }),
        create("create a size between granules", "INVALID_VALUE", |kit| {
            kit.try_create(kit.page + 1, kit.device.raw(), 0)
        }),
        create("create more than there is", "OUT_OF_MEMORY", |kit| {
            let all = kit.device.total_bytes().next_multiple_of(kit.page);
            kit.try_create(all + kit.page, kit.device.raw(), 0)
        }),
        create("create for no device", "INVALID_DEVICE", |kit| {
            kit.try_create(kit.page, NO_DEVICE, 0)
        }),
        create("create with flags", "INVALID_VALUE", |kit| {
            kit.try_create(kit.page, kit.device.raw(), 1)
        }),
        create("granularity for no device", "SUCCESS", |kit| {
            let (mut bytes, properties) = (0, properties(NO_DEVICE));
            let option = CU_MEM_ALLOC_GRANULARITY_MINIMUM;
            call!(
                kit,
                cuMemGetAllocationGranularity(&mut bytes, &properties, option)
            )
        }),
    ]
}

fn reserving() -> Vec<Case> {
    type Arguments = fn(usize) -> (usize, usize, u64);
    let rows: [(_, _, Arguments); 7] = [
        ("reserve size 0", "INVALID_VALUE", |_| (0, 0, 0)),
        ("reserve a size between granules", "INVALID_VALUE", |page| {
            (page + 4096, 0, 0)
        }),
        ("reserve with alignment 3", "INVALID_VALUE", |page| {
            (page, 3, 0)
        }),
        ("reserve with alignment 4096", "SUCCESS", |page| {
            (page, 4096, 0)
        }),
        ("reserve with flags", "INVALID_VALUE", |page| (page, 0, 1)),
        ("reserve 2^46 bytes", "SUCCESS", |_| (1 << 46, 0, 0)),
        ("reserve 2^47 bytes", "OUT_OF_MEMORY", |_| (1 << 47, 0, 0)),
    ];
    let row = |(name, expected, arguments): (_, _, Arguments)| {
        Case::new(name, &[expected], move |kit| {
            let (bytes, alignment, flags) = arguments(kit.page);
            let code = kit.try_reserve(bytes, alignment, flags);
            kit.answer(code);
        })
    };
    rows.into_iter().map(row).collect()
}

fn mapping() -> Vec<Case> {
    vec![
        Case::new(
            "map the second half of a handle",
            &["NOT_SUPPORTED"],
            |kit| {
                let (address, handle) = (kit.addresses(4), kit.memory(2));
                let code = kit.try_map(address, kit.page, kit.page, handle);
                kit.answer(code);
            },
        ),
        Case::new(
            "map the first half of a handle",
            &["NOT_SUPPORTED"],
            |kit| {
                let (address, handle) = (kit.addresses(4), kit.memory(2));
                let code = kit.try_map(address, kit.page, 0, handle);
                kit.answer(code);
            },
        ),
        Case::new("map over what is mapped", &["INVALID_VALUE"; 3], |kit| {
            let (address, handle) = (kit.addresses(4), kit.memory(2));
            kit.map(address + kit.page as u64, 2, handle);
            for page in 0..3 {
                let over = address + (page * kit.page) as u64;
                let code = kit.try_map(over, 2 * kit.page, 0, handle);
                kit.answer(code);
            }
        }),
        Case::new(
            "one handle at two addresses",
            &["SUCCESS", "SUCCESS", "reads 21", "reads 22"],
            |kit| {
                let (first, handle) = (kit.addresses(3), kit.memory(1));
                let second = first + 2 * kit.page as u64;
                for address in [first, second] {
                    let code = kit.try_map(address, kit.page, 0, handle);
                    kit.answer(code);
                    kit.open(address, 1);
                }
                kit.fill(first, 21);
                kit.read(second);
                kit.fill(second, 22);
                kit.read(first);
            },
        ),
    ]
}

fn accessing() -> Vec<Case> {
    /// Two pages mapped of four.
    fn mapped(kit: &mut Kit) -> u64 {
        let (address, handle) = (kit.addresses(4), kit.memory(2));
        kit.map(address, 2, handle);
        address
    }
    type Call = fn(&mut Kit, u64) -> CUresult;
    let rows: [(_, Call); 8] = [
        ("the first half of a mapping", |kit, address| {
            kit.try_open(address, kit.page)
        }),
        ("the second half of a mapping", |kit, address| {
            kit.try_open(address + kit.page as u64, kit.page)
        }),
        ("what is mapped and what is not", |kit, address| {
            kit.try_open(address, 3 * kit.page)
        }),
        ("what is not mapped", |kit, address| {
            kit.try_open(address + 2 * kit.page as u64, kit.page)
        }),
        ("size 0", |kit, address| kit.try_open(address, 0)),
        ("no descriptors", |kit, address| {
            let access = descriptor(kit.device.raw(), CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
            call!(kit, cuMemSetAccess(address, 2 * kit.page, &access, 0))
        }),
        ("write without read", |kit, address| {
            let access = descriptor(kit.device.raw(), 2);
            call!(kit, cuMemSetAccess(address, 2 * kit.page, &access, 1))
        }),
        ("no device", |kit, address| {
            let access = descriptor(NO_DEVICE, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
            call!(kit, cuMemSetAccess(address, 2 * kit.page, &access, 1))
        }),
    ];
    let row = |(name, set): (_, Call)| {
        let expected = ["INVALID_VALUE", "SUCCESS", "reads 11"];
        Case::new(format!("set access: {name}"), &expected, move |kit| {
            let address = mapped(kit);
            let code = set(kit, address);
            kit.answer(code);
            // The refusal changed nothing.
            let code = kit.try_open(address, 2 * kit.page);
            kit.answer(code);
            kit.fill(address, 11);
            kit.read(address);
        })
    };
    rows.into_iter().map(row).collect()
}

fn unmapping() -> Vec<Case> {
    let mut cases = vec![
        Case::new(
            "unmap a part of a mapping",
            &["INVALID_VALUE", "INVALID_VALUE", "reads 12"],
            |kit| {
                let address = kit.addresses(4);
                kit.back(address, 2);
                kit.fill(address, 12);
                for part in [address, address + kit.page as u64] {
                    let code = kit.unmap(part, kit.page);
                    kit.answer(code);
                }
                kit.read(address);
            },
        ),
        Case::new(
            "unmap whole mappings and holes",
            &["SUCCESS", "INVALID_VALUE", "INVALID_VALUE"],
            |kit| {
                let address = kit.addresses(4);
                let pages = [address, address + 2 * kit.page as u64];
                for page in pages {
                    kit.back(page, 1);
                }
                let code = kit.unmap(address, 4 * kit.page);
                kit.answer(code);
                for page in pages {
                    let code = call!(kit, cuMemsetD8(page, 1, kit.page));
                    kit.answer(code);
                }
            },
        ),
    ];
    type Arguments = fn(u64, usize) -> (u64, usize);
    let rows: [(_, _, Arguments); 4] = [
        ("unmap what is not mapped", "SUCCESS", |address, page| {
            (address, page)
        }),
        ("unmap 4096 bytes, not mapped", "SUCCESS", |address, _| {
            (address, 4096)
        }),
        ("unmap size 0", "INVALID_VALUE", |address, _| (address, 0)),
        (
            "unmap what was never reserved",
            "INVALID_VALUE",
            |_, page| (NEVER_RESERVED, page),
        ),
    ];
    cases.extend(rows.map(|(name, expected, arguments)| {
        Case::new(name, &[expected], move |kit| {
            let (address, bytes) = arguments(kit.addresses(2), kit.page);
            let code = kit.unmap(address, bytes);
            kit.answer(code);
        })
    }));
    cases
}

fn freeing() -> Vec<Case> {
    vec![
        Case::new("free a part of a reservation", &["INVALID_VALUE"], |kit| {
            let address = kit.addresses(2);
            let code = kit.free(address, kit.page);
            kit.answer(code);
        }),
        Case::new("free twice", &["SUCCESS", "INVALID_VALUE"], |kit| {
            let address = kit.addresses(2);
            for _ in 0..2 {
                let code = kit.free(address, 2 * kit.page);
                kit.answer(code);
            }
        }),
        Case::new(
            "free with something mapped",
            &["INVALID_VALUE", "reads 13"],
            |kit| {
                let address = kit.addresses(2);
                let mapped = address + kit.page as u64;
                kit.back(mapped, 1);
                kit.fill(mapped, 13);
                let code = kit.free(address, 2 * kit.page);
                kit.answer(code);
                kit.read(mapped);
            },
        ),
    ]
}

fn living_on() -> Vec<Case> {
    vec![
        Case::new(
            "use memory whose handle is released",
            &["SUCCESS", "reads 31"],
            |kit| {
                let address = kit.addresses(1);
                let handle = kit.back(address, 1);
                let code = kit.release(handle);
                kit.answer(code);
                kit.fill(address, 31);
                kit.read(address);
            },
        ),
        Case::new(
            "retain a handle from a pointer",
            &["SUCCESS", "SUCCESS", "SUCCESS", "reads 32"],
            |kit| {
                let address = kit.addresses(1);
                let handle = kit.back(address, 1);
                kit.fill(address, 32);
                let code = kit.release(handle);
                kit.answer(code);
                let (code, handle) = kit.retain(address);
                kit.answer(code);
                kit.must(kit.unmap(address, kit.page));
                let code = kit.try_map(address, kit.page, 0, handle);
                kit.answer(code);
                kit.open(address, 1);
                kit.read(address);
            },
        ),
        Case::new(
            "cuMemFree of mapped memory",
            &["INVALID_VALUE", "reads 51", "reads 52"],
            |kit| {
                let address = kit.addresses(1);
                kit.back(address, 1);
                kit.fill(address, 51);
                let code = call!(kit, cuMemFree(address));
                kit.answer(code);
                kit.read(address);
                kit.fill(address, 52);
                kit.read(address);
            },
        ),
        Case::new(
            "cuMemFreeAsync of mapped memory",
            &["INVALID_VALUE", "reads 53", "reads 54"],
            |kit| {
                let (address, stream) = (kit.addresses(1), kit.stream());
                kit.back(address, 1);
                kit.fill(address, 53);
                let code = call!(kit, cuMemFreeAsync(address, stream.raw()));
                kit.answer(code);
                kit.read(address);
                kit.fill(address, 54);
                kit.read(address);
            },
        ),
    ]
}
