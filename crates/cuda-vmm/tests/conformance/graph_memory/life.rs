//! How long memory of graphs is there: launches, and frees outside of them.

use super::reserve::note_reserve;
use super::{allocate, begin, end, trim};
use super::{clean, destroy_executable, executable, free, freeing, launch, leaving, wait};
use crate::Case;
use crate::capture::destroy;
use crate::graph::instantiate;
use crate::kit::{Object, call};
use cuda_vmm::sys::*;

pub fn lives() -> Vec<Case> {
    vec![
        Case::new(
            "cuMemFreeAsync and cuMemFree of what no launch allocated",
            &["INVALID_VALUE", "INVALID_VALUE"],
            |kit| {
                let (stream, address, graph) = leaving(kit);
                let exec = executable(kit, graph, 0);
                let code = free(kit, stream, address);
                kit.answer(code);
                let code = call!(kit, cuMemFree(address));
                kit.answer(code);
                clean(kit, stream, graph, exec);
            },
        ),
        Case::new(
            "what a launch leaves allocated is there until it is freed",
            &["reads 42", "SUCCESS", "reads 42", "SUCCESS"],
            |kit| {
                let (stream, address, graph) = leaving(kit);
                let exec = executable(kit, graph, 0);
                for synchronous in [false, true] {
                    kit.must(launch(kit, exec, stream));
                    wait(kit, stream);
                    kit.read(address);
                    let code = match synchronous {
                        true => call!(kit, cuMemFree(address)),
                        false => free(kit, stream, address),
                    };
                    kit.answer(code);
                }
                clean(kit, stream, graph, exec);
            },
        ),
        Case::new(
            "what a launch leaves allocated is freed twice",
            &["SUCCESS", "INVALID_VALUE"],
            |kit| {
                let (stream, address, graph) = leaving(kit);
                let exec = executable(kit, graph, 0);
                kit.must(launch(kit, exec, stream));
                for _ in 0..2 {
                    let code = free(kit, stream, address);
                    kit.answer(code);
                    wait(kit, stream);
                }
                clean(kit, stream, graph, exec);
            },
        ),
        Case::new(
            "what a launch leaves allocated outlives its graph",
            &["reads 42", "SUCCESS"],
            |kit| {
                let (stream, address, graph) = leaving(kit);
                let exec = executable(kit, graph, 0);
                kit.must(launch(kit, exec, stream));
                wait(kit, stream);
                destroy_executable(kit, exec);
                destroy(kit, Some(graph));
                kit.read(address);
                let code = free(kit, stream, address);
                kit.answer(code);
                wait(kit, stream);
                trim(kit);
            },
        ),
    ]
}

pub fn launches() -> Vec<Case> {
    vec![
        Case::new(
            "a second launch while the first leaves something allocated",
            &["SUCCESS", "INVALID_VALUE", "reads 42", "SUCCESS", "SUCCESS"],
            |kit| {
                let (stream, address, graph) = leaving(kit);
                let exec = executable(kit, graph, 0);
                for _ in 0..2 {
                    let code = launch(kit, exec, stream);
                    kit.answer(code);
                }
                wait(kit, stream);
                kit.read(address);
                let code = free(kit, stream, address);
                kit.answer(code);
                let code = launch(kit, exec, stream);
                kit.answer(code);
                kit.must(free(kit, stream, address));
                clean(kit, stream, graph, exec);
            },
        ),
        Case::new(
            "a second launch frees what the first leaves allocated, by its flag",
            &["SUCCESS", "SUCCESS", "reads 42", "SUCCESS"],
            |kit| {
                let (stream, address, graph) = leaving(kit);
                let flags = CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
                let exec = executable(kit, graph, flags);
                for _ in 0..2 {
                    let code = launch(kit, exec, stream);
                    kit.answer(code);
                }
                wait(kit, stream);
                kit.read(address);
                let code = free(kit, stream, address);
                kit.answer(code);
                clean(kit, stream, graph, exec);
            },
        ),
        Case::new(
            "a graph that allocates is instantiated twice",
            &["refused", "SUCCESS"],
            |kit| {
                let (_, _, graph) = freeing(kit);
                let first = executable(kit, graph, 0);
                let mut second = core::ptr::null_mut();
                let raw = graph.raw();
                let code = call!(kit, cuGraphInstantiateWithFlags(&mut second, raw, 0));
                // CUDA's documentation names no code.
                match code {
                    CUDA_SUCCESS => {
                        kit.note("made");
                        destroy_executable(kit, Object::new(second));
                    }
                    _ => kit.note("refused"),
                }
                destroy_executable(kit, first);
                let again = instantiate(kit, graph);
                destroy_executable(kit, again);
                destroy(kit, Some(graph));
            },
        ),
    ]
}

/// A launch for which there is no memory makes the driver keep what it had taken, as long as the
/// process has the device.
pub fn poisoning_cases() -> Vec<Case> {
    vec![Case::new(
        "a launch needs more memory than the device has",
        &["SUCCESS", "OUT_OF_MEMORY", "SUCCESS", "SUCCESS", "reserved"],
        |kit| {
            let (mut free_bytes, mut total) = (0, 0);
            kit.must(call!(kit, cuMemGetInfo(&mut free_bytes, &mut total)));
            let large = (total / 5 * 3).next_multiple_of(kit.page);
            let graphs = [(); 2].map(|()| {
                let stream = begin(kit);
                let address = allocate(kit, stream, large);
                let graph = end(kit, stream);
                (stream, address, graph, executable(kit, graph, 0))
            });
            for (stream, _, _, exec) in graphs {
                let code = launch(kit, exec, stream);
                kit.answer(code);
            }
            let [(stream, address, graph, exec), second] = graphs;
            let code = free(kit, stream, address);
            kit.answer(code);
            clean(kit, stream, graph, exec);
            let (stream, address, graph, exec) = second;
            let code = launch(kit, exec, stream);
            kit.answer(code);
            if code == CUDA_SUCCESS {
                kit.must(free(kit, stream, address));
            }
            clean(kit, stream, graph, exec);
            note_reserve(kit);
        },
    )]
}
