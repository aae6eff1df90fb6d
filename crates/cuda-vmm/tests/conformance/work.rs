//! What work on memory is refused, what poisons the context, and what a context's event covers.

use crate::Case;
use crate::common::{Gate, with_context};
use crate::kit::{Kit, Object, call, descriptor};
use crate::rules::NEVER_RESERVED;
use cuda_vmm::sys::*;
use std::sync::mpsc::channel;

/// Makes memory other than open, and returns the first address and the bytes to touch.
type Prepare = fn(&mut Kit) -> (u64, usize);

/// Touches a range on a stream.
type Touch = fn(&Kit, u64, usize, Object) -> CUresult;

const MEMSET: (&str, Touch) = ("cuMemsetD8", |kit, address, bytes, _| {
    call!(kit, cuMemsetD8(address, 1, bytes))
});
const MEMSET_ASYNC: (&str, Touch) = ("cuMemsetD8Async", |kit, address, bytes, stream| {
    call!(kit, cuMemsetD8Async(address, 1, bytes, stream.raw()))
});
const READ: (&str, Touch) = ("cuMemcpyDtoH", |kit, address, bytes, _| {
    let mut host = vec![0u8; bytes];
    call!(kit, cuMemcpyDtoH(host.as_mut_ptr().cast(), address, bytes))
});
const WRITE: (&str, Touch) = ("cuMemcpyHtoD", |kit, address, bytes, _| {
    let host = vec![1u8; bytes];
    call!(kit, cuMemcpyHtoD(address, host.as_ptr().cast(), bytes))
});

pub fn cases(has_context_events: bool) -> Vec<Case> {
    let everything: &[(&str, Touch)] = &[MEMSET, MEMSET_ASYNC, READ, WRITE];
    let memsets: &[(&str, Touch)] = &[MEMSET, MEMSET_ASYNC];
    let rows: [(_, &[(&str, Touch)], Prepare); 5] = [
        ("what is not mapped", everything, |kit| {
            (kit.addresses(2), kit.page)
        }),
        ("what is mapped and what is not", memsets, |kit| {
            let address = kit.addresses(2);
            kit.back(address, 1);
            (address, 2 * kit.page)
        }),
        ("what is mapped without access", memsets, |kit| {
            let (address, handle) = (kit.addresses(2), kit.memory(1));
            kit.map(address, 1, handle);
            (address, kit.page)
        }),
        ("what may be read only", memsets, |kit| {
            let (address, handle) = (kit.addresses(2), kit.memory(1));
            kit.map(address, 1, handle);
            let access = descriptor(kit.device.raw(), CU_MEM_ACCESS_FLAGS_PROT_READ);
            kit.must(call!(kit, cuMemSetAccess(address, kit.page, &access, 1)));
            (address, kit.page)
        }),
        ("what was never reserved", memsets, |kit| {
            (NEVER_RESERVED, kit.page)
        }),
    ];
    let mut cases = Vec::new();
    for (name, touches, prepare) in rows {
        for &(call, touch) in touches {
            let expected = ["INVALID_VALUE", "SUCCESS"];
            cases.push(Case::new(
                format!("{call}: {name}"),
                &expected,
                move |kit| {
                    let stream = kit.stream();
                    let (address, bytes) = prepare(kit);
                    let code = touch(kit, address, bytes, stream);
                    kit.answer(code);
                    let code = call!(kit, cuCtxSynchronize());
                    kit.answer(code);
                },
            ));
        }
    }
    if has_context_events {
        cases.extend(context_events());
    }
    cases
}

/// Records a context's event behind a gate, asks for it, opens the gate and asks again.
fn context_event(kit: &mut Kit, gate: &Gate, finish: impl FnOnce()) {
    gate.wait_until_reached();
    let event = kit.event();
    let code = record(kit, event);
    kit.answer(code);
    let code = call!(kit, cuEventQuery(event.raw()));
    kit.answer(code);
    gate.open();
    finish();
    let code = call!(kit, cuEventSynchronize(event.raw()));
    kit.answer(code);
    let code = call!(kit, cuEventQuery(event.raw()));
    kit.answer(code);
}

/// `cuCtxRecordEvent`, which only cases that are left out where it is missing call.
pub fn record(kit: &Kit, event: Object) -> CUresult {
    let record = kit.table.cuCtxRecordEvent.expect("left out without it");
    // SAFETY: the context is retained by the device, and the event is alive.
    unsafe { record(kit.device.raw_context(), event.raw()) }
}

fn context_events() -> Vec<Case> {
    let expected = ["SUCCESS", "NOT_READY", "SUCCESS", "SUCCESS"];
    vec![
        Case::new(
            "cuCtxRecordEvent covers a stream that waits for no other",
            &expected,
            |kit| {
                let stream = kit.stream();
                let gate = Gate::close(&kit.device, stream.raw());
                context_event(kit, &gate, || ());
            },
        ),
        Case::new(
            "cuCtxRecordEvent covers another thread's own stream",
            &expected,
            |kit| {
                let device = kit.device.clone();
                std::thread::scope(|scope| {
                    let (closed, gate) = channel();
                    let (opened, finish) = channel::<()>();
                    let table = kit.table;
                    let other = scope.spawn(move || {
                        with_context(&device, || {
                            let own = core::ptr::without_provenance_mut(2);
                            let _ = closed.send(Gate::close(&device, own));
                            let _ = finish.recv();
                            // SAFETY: the default stream of this thread.
                            let code = unsafe { (table.cuStreamSynchronize)(own) };
                            assert_eq!(code, CUDA_SUCCESS, "cuStreamSynchronize");
                        });
                    });
                    let gate = gate.recv().expect("the other thread queued its work");
                    context_event(kit, &gate, || drop(opened));
                    other.join().expect("the other thread's stream is done");
                });
            },
        ),
    ]
}

pub fn poisoning_cases() -> Vec<Case> {
    vec![Case::new(
        "unmap under a queued memset",
        &[
            "SUCCESS",
            "SUCCESS",
            "ILLEGAL_ADDRESS",
            "ILLEGAL_ADDRESS",
            "ILLEGAL_ADDRESS",
            "ILLEGAL_ADDRESS",
            "SUCCESS",
            "SUCCESS",
            "SUCCESS",
        ],
        |kit| {
            let (address, stream, unused) = (kit.addresses(2), kit.stream(), kit.stream());
            kit.back(address, 1);
            let other = address + kit.page as u64;
            kit.back(other, 1);
            kit.fill(address, 1);
            let gate = Gate::close(&kit.device, stream.raw());
            let code = call!(kit, cuMemsetD8Async(address, 2, kit.page, stream.raw()));
            kit.answer(code);
            gate.wait_until_reached();
            let code = kit.unmap(address, kit.page);
            kit.answer(code);
            gate.open();
            let code = call!(kit, cuStreamSynchronize(stream.raw()));
            kit.answer(code);
            let (mut free, mut total) = (0, 0);
            let code = call!(kit, cuMemGetInfo(&mut free, &mut total));
            kit.answer(code);
            let mut event = core::ptr::null_mut();
            let flags = CU_EVENT_DISABLE_TIMING as _;
            let code = call!(kit, cuEventCreate(&mut event, flags));
            kit.answer(code);
            let code = call!(kit, cuStreamDestroy(unused.raw()));
            kit.answer(code);
            let code = kit.unmap(other, kit.page);
            kit.answer(code);
            let code = kit.try_create(kit.page, kit.device.raw(), 0);
            kit.answer(code);
            let code = kit.try_reserve(kit.page, 0, 0);
            kit.answer(code);
        },
    )]
}
