//! Memory that graphs allocate and free: its addresses, its life, and what the device reserves.

mod life;
mod nodes;
mod reserve;

use crate::Case;
use crate::capture::destroy;
use crate::graph::{instantiate, replay_on};
use crate::kit::{Kit, Object, call};
use cuda_vmm::sys::*;

/// Begins a capture on a stream of its own.
fn begin(kit: &mut Kit) -> Object {
    let stream = kit.stream();
    let mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
    kit.must(call!(kit, cuStreamBeginCapture(stream.raw(), mode)));
    stream
}

fn allocate(kit: &Kit, stream: Object, bytes: usize) -> u64 {
    let mut address = 0;
    kit.must(call!(
        kit,
        cuMemAllocAsync(&mut address, bytes, stream.raw())
    ));
    address
}

fn free(kit: &Kit, stream: Object, address: u64) -> CUresult {
    call!(kit, cuMemFreeAsync(address, stream.raw()))
}

fn fill(kit: &Kit, stream: Object, address: u64, value: u8) {
    let (page, stream) = (kit.page, stream.raw());
    kit.must(call!(kit, cuMemsetD8Async(address, value, page, stream)));
}

fn end(kit: &Kit, stream: Object) -> Object {
    let mut graph = core::ptr::null_mut();
    kit.must(call!(kit, cuStreamEndCapture(stream.raw(), &mut graph)));
    Object::new(graph)
}

/// Makes a graph that can be launched, which must succeed.
fn executable(kit: &Kit, graph: Object, flags: CUgraphInstantiate_flags) -> Object {
    let (mut exec, flags) = (core::ptr::null_mut(), flags.into());
    let graph = graph.raw();
    kit.must(call!(
        kit,
        cuGraphInstantiateWithFlags(&mut exec, graph, flags)
    ));
    Object::new(exec)
}

fn launch(kit: &Kit, exec: Object, stream: Object) -> CUresult {
    call!(kit, cuGraphLaunch(exec.raw(), stream.raw()))
}

fn wait(kit: &Kit, stream: Object) {
    kit.must(call!(kit, cuStreamSynchronize(stream.raw())));
}

fn destroy_executable(kit: &Kit, exec: Object) {
    kit.must(call!(kit, cuGraphExecDestroy(exec.raw())));
}

/// Gives back what the device reserves for graphs.
fn trim(kit: &Kit) {
    kit.must(call!(kit, cuDeviceGraphMemTrim(kit.device.raw())));
}

/// Destroys a graph with what was made of it, when its work is done, and what is reserved for it.
fn clean(kit: &Kit, stream: Object, graph: Object, exec: Object) {
    wait(kit, stream);
    destroy_executable(kit, exec);
    destroy(kit, Some(graph));
    trim(kit);
}

/// Captures an allocation of a page that is filled with 42 and not freed.
fn leaving(kit: &mut Kit) -> (Object, u64, Object) {
    let stream = begin(kit);
    let address = allocate(kit, stream, kit.page);
    fill(kit, stream, address, 42);
    let graph = end(kit, stream);
    (stream, address, graph)
}

/// The same, freed at the end.
fn freeing(kit: &mut Kit) -> (Object, u64, Object) {
    let stream = begin(kit);
    let address = allocate(kit, stream, kit.page);
    fill(kit, stream, address, 42);
    kit.must(free(kit, stream, address));
    let graph = end(kit, stream);
    (stream, address, graph)
}

pub fn cases() -> Vec<Case> {
    let mut cases = replays();
    cases.extend(captured_frees());
    cases.extend(life::lives());
    cases.extend(life::launches());
    cases.extend(reserve::cases());
    cases.extend(nodes::cases());
    cases
}

pub fn poisoning_cases() -> Vec<Case> {
    life::poisoning_cases()
}

fn replays() -> Vec<Case> {
    let replayed = ["SUCCESS", "SUCCESS", "reads 42"];
    vec![
        Case::new(
            "a graph allocates, fills, copies out and frees",
            &[&["SUCCESS"][..], &replayed, &replayed].concat(),
            |kit| {
                let outside = kit.addresses(1);
                kit.back(outside, 1);
                let stream = begin(kit);
                let address = allocate(kit, stream, kit.page);
                fill(kit, stream, address, 42);
                let (page, raw) = (kit.page, stream.raw());
                kit.must(call!(kit, cuMemcpyDtoDAsync(outside, address, page, raw)));
                kit.must(free(kit, stream, address));
                let graph = end(kit, stream);
                let exec = instantiate(kit, graph);
                for value in [1, 2] {
                    kit.fill(outside, value);
                    replay_on(kit, stream, exec);
                    kit.read(outside);
                }
                clean(kit, stream, graph, exec);
            },
        ),
        Case::new(
            "a graph is uploaded, launched and trimmed, and launched again",
            &["SUCCESS", "SUCCESS", "SUCCESS", "SUCCESS", "SUCCESS"],
            |kit| {
                let (stream, _, graph) = freeing(kit);
                let exec = executable(kit, graph, 0);
                let code = call!(kit, cuGraphUpload(exec.raw(), stream.raw()));
                kit.answer(code);
                replay_on(kit, stream, exec);
                trim(kit);
                replay_on(kit, stream, exec);
                clean(kit, stream, graph, exec);
            },
        ),
        Case::new(
            "a graph is uploaded on a captured stream",
            &["STREAM_CAPTURE_UNSUPPORTED", "STREAM_CAPTURE_INVALIDATED"],
            |kit| {
                let (stream, _, graph) = freeing(kit);
                let exec = executable(kit, graph, 0);
                let captured = begin(kit);
                let code = call!(kit, cuGraphUpload(exec.raw(), captured.raw()));
                kit.answer(code);
                let mut other = core::ptr::null_mut();
                let code = call!(kit, cuStreamEndCapture(captured.raw(), &mut other));
                kit.answer(code);
                destroy(kit, (!other.is_null()).then(|| Object::new(other)));
                clean(kit, stream, graph, exec);
            },
        ),
    ]
}

/// Captures one free that is refused, and shows that the capture goes on.
fn refused_free(name: &str, prepare: fn(&mut Kit) -> u64, give_back: fn(&Kit, u64)) -> Case {
    let name = format!("cuMemFreeAsync in a capture: {name}");
    Case::new(
        name,
        &["INVALID_VALUE", "SUCCESS", "SUCCESS", "SUCCESS"],
        move |kit| {
            let outside = prepare(kit);
            let stream = begin(kit);
            let address = allocate(kit, stream, kit.page);
            let code = free(kit, stream, outside);
            kit.answer(code);
            kit.must(free(kit, stream, address));
            let graph = end(kit, stream);
            let exec = instantiate(kit, graph);
            replay_on(kit, stream, exec);
            clean(kit, stream, graph, exec);
            give_back(kit, outside);
        },
    )
}

fn captured_frees() -> Vec<Case> {
    vec![
        refused_free(
            "memory of cuMemAlloc",
            |kit| {
                let mut address = 0;
                kit.must(call!(kit, cuMemAlloc(&mut address, kit.page)));
                address
            },
            |kit, address| kit.must(call!(kit, cuMemFree(address))),
        ),
        refused_free(
            "memory of cuMemAllocAsync outside of the capture",
            |kit| {
                let address = allocate(kit, Object::LEGACY, kit.page);
                kit.must(call!(kit, cuCtxSynchronize()));
                address
            },
            |kit, address| kit.must(call!(kit, cuMemFree(address))),
        ),
        refused_free(
            "mapped memory",
            |kit| {
                let address = kit.addresses(1);
                kit.back(address, 1);
                address
            },
            |_, _| (),
        ),
        Case::new(
            "cuMemFreeAsync in a capture: twice",
            &["SUCCESS", "INVALID_VALUE", "SUCCESS", "SUCCESS", "SUCCESS"],
            |kit| {
                let stream = begin(kit);
                let address = allocate(kit, stream, kit.page);
                for _ in 0..2 {
                    let code = free(kit, stream, address);
                    kit.answer(code);
                }
                let graph = end(kit, stream);
                let exec = instantiate(kit, graph);
                replay_on(kit, stream, exec);
                clean(kit, stream, graph, exec);
            },
        ),
        Case::new(
            "cuMemFreeAsync in a capture: what another graph frees itself",
            &["INVALID_VALUE"],
            |kit| {
                let (_, address, graph) = freeing(kit);
                let other = begin(kit);
                let code = free(kit, other, address);
                kit.answer(code);
                let second = end(kit, other);
                destroy(kit, Some(second));
                destroy(kit, Some(graph));
            },
        ),
        Case::new(
            "cuMemFreeAsync in a capture: what another graph leaves allocated",
            &["SUCCESS", "SUCCESS", "SUCCESS", "SUCCESS", "SUCCESS"],
            |kit| {
                let (stream, address, graph) = leaving(kit);
                let other = begin(kit);
                let code = free(kit, other, address);
                kit.answer(code);
                let second = end(kit, other);
                let execs = [graph, second].map(|graph| executable(kit, graph, 0));
                for _ in 0..2 {
                    for exec in execs {
                        let code = launch(kit, exec, stream);
                        kit.answer(code);
                    }
                }
                wait(kit, stream);
                destroy_executable(kit, execs[1]);
                destroy(kit, Some(second));
                clean(kit, stream, graph, execs[0]);
            },
        ),
        Case::new(
            "cuMemAllocAsync in a capture: no bytes",
            &["SUCCESS", "null", "SUCCESS", "0 nodes"],
            |kit| {
                let stream = begin(kit);
                let (mut address, raw) = (u64::MAX, stream.raw());
                let code = call!(kit, cuMemAllocAsync(&mut address, 0, raw));
                kit.answer(code);
                kit.note(if address == 0 { "null" } else { "an address" });
                let mut graph = core::ptr::null_mut();
                let code = call!(kit, cuStreamEndCapture(raw, &mut graph));
                kit.answer(code);
                let (mut count, nowhere) = (0, core::ptr::null_mut());
                kit.must(call!(kit, cuGraphGetNodes(graph, nowhere, &mut count)));
                kit.note(&format!("{count} nodes"));
                destroy(kit, Some(Object::new(graph)));
            },
        ),
    ]
}
