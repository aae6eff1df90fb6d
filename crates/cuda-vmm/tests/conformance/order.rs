//! In which order work is done: in a stream, between streams, and between streams and calls.

use crate::Case;
use crate::common::Gate;
use crate::kit::{Kit, Object, call};
use cuda_vmm::sys::*;

/// Two open pages, and a stream of each kind.
struct Stage {
    first: u64,
    second: u64,
    /// Waits for no other stream.
    alone: Object,
    /// Waits for the legacy stream, and it for this one.
    blocking: Object,
}

impl Stage {
    fn new(kit: &mut Kit) -> Self {
        let first = kit.addresses(2);
        let second = first + kit.page as u64;
        for page in [first, second] {
            kit.back(page, 1);
            kit.fill(page, 1);
        }
        Self {
            first,
            second,
            alone: kit.stream(),
            blocking: kit.stream_with(CU_STREAM_DEFAULT),
        }
    }

    fn memset(&self, kit: &Kit, page: u64, value: u8, stream: Object) {
        let stream = stream.raw();
        kit.must(call!(kit, cuMemsetD8Async(page, value, kit.page, stream)));
    }

    fn copy(&self, kit: &Kit, to: u64, from: u64, stream: Object) {
        let stream = stream.raw();
        kit.must(call!(kit, cuMemcpyDtoDAsync(to, from, kit.page, stream)));
    }
}

fn query(kit: &mut Kit, stream: Object) {
    let code = call!(kit, cuStreamQuery(stream.raw()));
    kit.answer(code);
}

fn synchronize(kit: &mut Kit, stream: Object) {
    let code = call!(kit, cuStreamSynchronize(stream.raw()));
    kit.answer(code);
}

pub fn cases() -> Vec<Case> {
    let mut cases = between_streams();
    cases.extend(legacy());
    cases.extend([
        Case::new(
            "a stream does its work in the order in which it was given",
            &["SUCCESS", "reads 3", "reads 2"],
            |kit| {
                let stage = Stage::new(kit);
                let stream = stage.alone;
                stage.memset(kit, stage.first, 2, stream);
                stage.copy(kit, stage.second, stage.first, stream);
                stage.memset(kit, stage.first, 3, stream);
                synchronize(kit, stream);
                kit.read(stage.first);
                kit.read(stage.second);
            },
        ),
        Case::new(
            "a stream and its event are not ready while work is before them",
            &[
                "SUCCESS",
                "NOT_READY",
                "NOT_READY",
                "SUCCESS",
                "SUCCESS",
                "SUCCESS",
            ],
            |kit| {
                let (stage, event) = (Stage::new(kit), kit.event());
                query(kit, stage.alone);
                let gate = Gate::close(&kit.device, stage.alone.raw());
                kit.must(call!(kit, cuEventRecord(event.raw(), stage.alone.raw())));
                query(kit, stage.alone);
                let code = call!(kit, cuEventQuery(event.raw()));
                kit.answer(code);
                gate.open();
                synchronize(kit, stage.alone);
                query(kit, stage.alone);
                let code = call!(kit, cuEventQuery(event.raw()));
                kit.answer(code);
            },
        ),
        Case::new(
            "an asynchronous copy to pageable host memory is done when the call returns",
            &["SUCCESS", "reads 2"],
            |kit| {
                let stage = Stage::new(kit);
                let (page, stream) = (kit.page, stage.alone.raw());
                let mut host = vec![0u8; page];
                let place = host.as_mut_ptr().cast();
                stage.memset(kit, stage.first, 2, stage.alone);
                let code = call!(kit, cuMemcpyDtoHAsync(place, stage.first, page, stream));
                kit.answer(code);
                let done = host.iter().all(|&byte| byte == 2);
                kit.note(if done { "reads 2" } else { "not yet" });
                // A driver that does otherwise must not write after the bytes are gone.
                kit.must(call!(kit, cuStreamSynchronize(stream)));
            },
        ),
        Case::new(
            "an event that was never recorded is complete",
            &["SUCCESS", "SUCCESS"],
            |kit| {
                let event = kit.event();
                let code = call!(kit, cuEventQuery(event.raw()));
                kit.answer(code);
                let code = call!(kit, cuEventSynchronize(event.raw()));
                kit.answer(code);
            },
        ),
        Case::new(
            "an event that is recorded again stands for the later place",
            &["NOT_READY", "SUCCESS", "SUCCESS"],
            |kit| {
                let (stage, event) = (Stage::new(kit), kit.event());
                kit.must(call!(kit, cuEventRecord(event.raw(), stage.alone.raw())));
                let gate = Gate::close(&kit.device, stage.alone.raw());
                kit.must(call!(kit, cuEventRecord(event.raw(), stage.alone.raw())));
                let code = call!(kit, cuEventQuery(event.raw()));
                kit.answer(code);
                gate.open();
                let code = call!(kit, cuEventSynchronize(event.raw()));
                kit.answer(code);
                let code = call!(kit, cuEventQuery(event.raw()));
                kit.answer(code);
            },
        ),
        Case::new(
            "memory calls do not wait for work that runs",
            &["SUCCESS", "SUCCESS", "SUCCESS", "NOT_READY"],
            |kit| {
                let (stage, more) = (Stage::new(kit), kit.addresses(1));
                let gate = Gate::close(&kit.device, stage.alone.raw());
                gate.wait_until_reached();
                let handle = kit.memory(1);
                let code = kit.try_map(more, kit.page, 0, handle);
                kit.answer(code);
                let code = kit.try_open(more, kit.page);
                kit.answer(code);
                let code = kit.unmap(more, kit.page);
                kit.answer(code);
                query(kit, stage.alone);
                gate.open();
            },
        ),
    ]);
    cases
}

fn between_streams() -> Vec<Case> {
    vec![
        Case::new(
            "streams that wait for no other overtake each other",
            &["SUCCESS", "NOT_READY", "reads 2", "SUCCESS"],
            |kit| {
                let (stage, other) = (Stage::new(kit), kit.stream());
                let gate = Gate::close(&kit.device, stage.alone.raw());
                stage.memset(kit, stage.first, 2, other);
                synchronize(kit, other);
                query(kit, stage.alone);
                kit.read(stage.first);
                gate.open();
                synchronize(kit, stage.alone);
            },
        ),
        Case::new(
            "a stream that waits for an event does its work after it",
            &["SUCCESS", "NOT_READY", "SUCCESS", "reads 2"],
            |kit| {
                let (stage, other, event) = (Stage::new(kit), kit.stream(), kit.event());
                let gate = Gate::close(&kit.device, stage.alone.raw());
                stage.memset(kit, stage.first, 2, stage.alone);
                kit.must(call!(kit, cuEventRecord(event.raw(), stage.alone.raw())));
                let code = call!(kit, cuStreamWaitEvent(other.raw(), event.raw(), 0));
                kit.answer(code);
                stage.copy(kit, stage.second, stage.first, other);
                query(kit, other);
                gate.open();
                synchronize(kit, other);
                kit.read(stage.second);
            },
        ),
        Case::new(
            "a context synchronise waits for every stream",
            &["SUCCESS", "SUCCESS", "reads 2"],
            |kit| {
                let stage = Stage::new(kit);
                let gate = Gate::close(&kit.device, stage.alone.raw());
                stage.memset(kit, stage.first, 2, stage.alone);
                std::thread::scope(|scope| {
                    scope.spawn(|| {
                        gate.wait_until_reached();
                        gate.open();
                    });
                    let code = call!(kit, cuCtxSynchronize());
                    kit.answer(code);
                });
                query(kit, stage.alone);
                kit.read(stage.first);
            },
        ),
    ]
}

fn legacy() -> Vec<Case> {
    let legacy = Object::LEGACY;
    vec![
        Case::new(
            "a blocking stream waits for the legacy stream",
            &["NOT_READY", "SUCCESS", "reads 3"],
            move |kit| {
                let stage = Stage::new(kit);
                let gate = Gate::close(&kit.device, legacy.raw());
                stage.memset(kit, stage.first, 2, legacy);
                stage.memset(kit, stage.first, 3, stage.blocking);
                query(kit, stage.blocking);
                gate.open();
                synchronize(kit, stage.blocking);
                kit.read(stage.first);
            },
        ),
        Case::new(
            "the legacy stream waits for a blocking stream",
            &["NOT_READY", "SUCCESS", "reads 3"],
            move |kit| {
                let stage = Stage::new(kit);
                let gate = Gate::close(&kit.device, stage.blocking.raw());
                stage.memset(kit, stage.first, 2, stage.blocking);
                stage.memset(kit, stage.first, 3, legacy);
                query(kit, legacy);
                gate.open();
                synchronize(kit, legacy);
                kit.read(stage.first);
            },
        ),
        Case::new(
            "a stream that waits for no other does not wait for the legacy stream",
            &["SUCCESS", "NOT_READY", "SUCCESS"],
            move |kit| {
                let stage = Stage::new(kit);
                let gate = Gate::close(&kit.device, legacy.raw());
                stage.memset(kit, stage.first, 2, stage.alone);
                synchronize(kit, stage.alone);
                query(kit, legacy);
                gate.open();
                synchronize(kit, legacy);
            },
        ),
    ]
}
