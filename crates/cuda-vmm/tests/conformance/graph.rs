//! What a graph does when it is replayed.

use crate::Case;
use crate::capture::{Stage, destroy};
use crate::kit::{Kit, Object, call};
use cuda_vmm::sys::*;

/// Makes a graph that can be launched, and notes how that went.
pub fn instantiate(kit: &mut Kit, graph: Object) -> Object {
    let mut exec = core::ptr::null_mut();
    let code = call!(kit, cuGraphInstantiateWithFlags(&mut exec, graph.raw(), 0));
    kit.answer(code);
    Object::new(exec)
}

/// Captures a memset of a page to 42 and makes it a graph that can be launched.
pub fn graph(kit: &mut Kit) -> (Stage, Object, Object) {
    let stage = Stage::new(kit);
    stage.begin(kit, CU_STREAM_CAPTURE_MODE_GLOBAL);
    let graph = stage.end(kit).expect("a graph");
    let exec = instantiate(kit, graph);
    (stage, graph, exec)
}

pub fn launch(kit: &mut Kit, stage: &Stage, exec: Object) {
    replay_on(kit, stage.captured, exec);
}

/// Launches a graph on a stream and waits for it, and notes how both went.
pub fn replay_on(kit: &mut Kit, stream: Object, exec: Object) {
    let code = call!(kit, cuGraphLaunch(exec.raw(), stream.raw()));
    kit.answer(code);
    let code = call!(kit, cuStreamSynchronize(stream.raw()));
    kit.answer(code);
}

pub fn replay() -> Case {
    let replayed = ["SUCCESS", "SUCCESS", "reads 42"];
    let mut expected = vec!["SUCCESS", "SUCCESS", "reads 1"];
    for _ in 0..2 {
        expected.extend(replayed);
    }
    // The memory that was there before keeps what it had.
    expected.push("reads 2");
    Case::new(
        "a graph writes to what is mapped when it is replayed",
        &expected,
        |kit| {
            let (stage, graph, exec) = graph(kit);
            kit.read(stage.open);
            launch(kit, &stage, exec);
            kit.read(stage.open);
            kit.fill(stage.open, 2);
            let (_, first) = kit.retain(stage.open);
            kit.must(kit.unmap(stage.open, kit.page));
            kit.back(stage.open, 1);
            kit.fill(stage.open, 3);
            launch(kit, &stage, exec);
            kit.read(stage.open);
            kit.map(stage.unmapped, 1, first);
            kit.open(stage.unmapped, 1);
            kit.read(stage.unmapped);
            kit.must(call!(kit, cuGraphExecDestroy(exec.raw())));
            destroy(kit, Some(graph));
        },
    )
}

pub fn poisoning_cases() -> Vec<Case> {
    let expected = [
        "SUCCESS",
        "SUCCESS",
        "SUCCESS",
        "ILLEGAL_ADDRESS",
        "ILLEGAL_ADDRESS",
    ];
    vec![Case::new(
        "a graph is replayed with nothing mapped",
        &expected,
        |kit| {
            let (stage, _, exec) = graph(kit);
            kit.must(kit.unmap(stage.open, kit.page));
            launch(kit, &stage, exec);
            let (mut free, mut total) = (0, 0);
            let code = call!(kit, cuMemGetInfo(&mut free, &mut total));
            kit.answer(code);
        },
    )]
}
