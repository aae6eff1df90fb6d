//! What the device may do through addresses that are unmapped, read-only, or closed to it again.
//!
//! A call that names such addresses is refused (`work`). Here the work was queued, or captured,
//! while the memory was open, and meets it as it is when it runs.

use crate::Case;
use crate::common::Gate;
use crate::graph::{graph, launch};
use crate::kit::{Kit, Object, call, descriptor};
use cuda_vmm::sys::*;

/// What a page is turned into while work on it is queued.
#[derive(Clone, Copy)]
enum Turned {
    ReadOnly,
    Closed,
    Unmapped,
}

fn set(kit: &Kit, address: u64, flags: CUmemAccess_flags) {
    let access = descriptor(kit.device.raw(), flags);
    kit.must(call!(kit, cuMemSetAccess(address, kit.page, &access, 1)));
}

impl Turned {
    fn turn(self, kit: &mut Kit, address: u64) {
        match self {
            Self::ReadOnly => set(kit, address, CU_MEM_ACCESS_FLAGS_PROT_READ),
            Self::Closed => set(kit, address, CU_MEM_ACCESS_FLAGS_PROT_NONE),
            Self::Unmapped => kit.must(kit.unmap(address, kit.page)),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::ReadOnly => "made read-only",
            Self::Closed => "closed",
            Self::Unmapped => "unmapped",
        }
    }
}

/// Work on a page and a scratch page beside it.
type Work = fn(&Kit, u64, u64, Object) -> CUresult;

const WRITE: (&str, Work) = ("a queued memset", |kit, page, _, stream| {
    call!(kit, cuMemsetD8Async(page, 9, kit.page, stream.raw()))
});
const READ: (&str, Work) = ("a queued copy", |kit, page, scratch, stream| {
    call!(
        kit,
        cuMemcpyDtoDAsync(scratch, page, kit.page, stream.raw())
    )
});

/// Queues work behind a gate, turns the page into something else, and lets the work run. Notes how
/// the work ended.
fn queued(kit: &mut Kit, work: Work, turned: Turned) -> (u64, u64) {
    let (page, stream) = (kit.addresses(2), kit.stream());
    let scratch = page + kit.page as u64;
    kit.back(page, 1);
    kit.back(scratch, 1);
    kit.fill(page, 5);
    kit.fill(scratch, 6);
    let gate = Gate::close(&kit.device, stream.raw());
    let code = work(kit, page, scratch, stream);
    kit.answer(code);
    gate.wait_until_reached();
    turned.turn(kit, page);
    gate.open();
    let code = call!(kit, cuStreamSynchronize(stream.raw()));
    kit.answer(code);
    (page, scratch)
}

/// The context lives on.
pub fn cases() -> Vec<Case> {
    let code = |flags: &'static str, set_to: CUmemAccess_flags| {
        Case::new(
            format!("the access of a page is {flags}"),
            &["SUCCESS", flags],
            move |kit| {
                let (address, handle) = (kit.addresses(1), kit.memory(1));
                kit.map(address, 1, handle);
                set(kit, address, set_to);
                let (mut flags, location) = (99, crate::kit::location(kit.device.raw()));
                let code = call!(kit, cuMemGetAccess(&mut flags, &location, address));
                kit.answer(code);
                kit.note(match flags as CUmemAccess_flags {
                    CU_MEM_ACCESS_FLAGS_PROT_NONE => "NONE",
                    CU_MEM_ACCESS_FLAGS_PROT_READ => "READ",
                    CU_MEM_ACCESS_FLAGS_PROT_READWRITE => "READWRITE",
                    _ => "another",
                });
            },
        )
    };
    vec![
        code("NONE", CU_MEM_ACCESS_FLAGS_PROT_NONE),
        code("READ", CU_MEM_ACCESS_FLAGS_PROT_READ),
        code("READWRITE", CU_MEM_ACCESS_FLAGS_PROT_READWRITE),
        Case::new(
            "a queued copy from memory that was made read-only",
            &["SUCCESS", "SUCCESS", "reads 5"],
            |kit| {
                let (_, scratch) = queued(kit, READ.1, Turned::ReadOnly);
                kit.read(scratch);
            },
        ),
        Case::new(
            "access that is given again after it was taken",
            &["INVALID_VALUE", "SUCCESS", "reads 8"],
            |kit| {
                let address = kit.addresses(1);
                kit.back(address, 1);
                set(kit, address, CU_MEM_ACCESS_FLAGS_PROT_NONE);
                let code = call!(kit, cuMemsetD8(address, 7, kit.page));
                kit.answer(code);
                set(kit, address, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
                let code = call!(kit, cuMemsetD8(address, 8, kit.page));
                kit.answer(code);
                kit.read(address);
            },
        ),
    ]
}

/// Work that is accepted and ends in an illegal access, and the next call after it.
fn poisoned(name: String, before: &[&'static str], act: impl Fn(&mut Kit) + 'static) -> Case {
    let ending = ["SUCCESS", "ILLEGAL_ADDRESS", "ILLEGAL_ADDRESS"];
    let expected = [before, &ending].concat();
    Case::new(name, &expected, move |kit| {
        act(kit);
        let (mut free, mut total) = (0, 0);
        let code = call!(kit, cuMemGetInfo(&mut free, &mut total));
        kit.answer(code);
    })
}

pub fn poisoning_cases() -> Vec<Case> {
    let rows = [
        (WRITE, Turned::ReadOnly),
        (WRITE, Turned::Closed),
        (READ, Turned::Closed),
        (READ, Turned::Unmapped),
    ];
    let mut cases = Vec::from(rows.map(|((name, work), turned)| {
        let name = format!("{name} on memory that was {}", turned.name());
        poisoned(name, &[], move |kit| {
            queued(kit, work, turned);
        })
    }));
    for turned in [Turned::ReadOnly, Turned::Closed] {
        let name = format!("a graph is replayed on memory that was {}", turned.name());
        // The capture ends, and the graph is instantiated.
        cases.push(poisoned(name, &["SUCCESS", "SUCCESS"], move |kit| {
            let (stage, _, exec) = graph(kit);
            turned.turn(kit, stage.open);
            launch(kit, &stage, exec);
        }));
    }
    cases
}
