//! Memory that graphs allocate and free, beyond the cases that the real driver passes too.
#![allow(
    clippy::macro_metavars_in_unsafe,
    reason = "every call of the table is unsafe"
)]

mod common;
use common::*;
use std::ptr::null_mut;

const INVALID: Answer = Err(CUDA_ERROR_INVALID_VALUE);
const PAGES: u64 = PAGE as u64;

/// A captured graph and its executable one.
#[derive(Clone, Copy)]
struct Made {
    address: u64,
    graph: CUgraph,
    exec: CUgraphExec,
}

fn begin(driver: &Driver, stream: CUstream) {
    let mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    call!(driver, cuStreamBeginCapture(stream, mode)).unwrap();
}

fn alloc(driver: &Driver, bytes: usize, stream: CUstream) -> Answer<u64> {
    let mut address = 0;
    call!(driver, cuMemAllocAsync(&mut address, bytes, stream)).map(|()| address)
}

fn free(driver: &Driver, address: u64, stream: CUstream) -> Answer {
    call!(driver, cuMemFreeAsync(address, stream))
}

fn end(driver: &Driver, stream: CUstream) -> CUgraph {
    let mut graph = null_mut();
    call!(driver, cuStreamEndCapture(stream, &mut graph)).unwrap();
    graph
}

fn instantiate(driver: &Driver, graph: CUgraph) -> CUgraphExec {
    let mut exec = null_mut();
    call!(driver, cuGraphInstantiateWithFlags(&mut exec, graph, 0)).unwrap();
    exec
}

/// Captures an allocation that is filled with 42, and freed if `frees`.
fn made(driver: &Driver, stream: CUstream, bytes: usize, frees: bool) -> Made {
    begin(driver, stream);
    let address = alloc(driver, bytes, stream).unwrap();
    driver.memset_async(address, 42, bytes, stream).unwrap();
    if frees {
        free(driver, address, stream).unwrap();
    }
    let graph = end(driver, stream);
    Made {
        address,
        graph,
        exec: instantiate(driver, graph),
    }
}

fn launch(driver: &Driver, made: Made, stream: CUstream) -> Answer {
    call!(driver, cuGraphLaunch(made.exec, stream))
}

fn synchronize(driver: &Driver, stream: CUstream) {
    call!(driver, cuStreamSynchronize(stream)).unwrap();
}

fn destroy(driver: &Driver, made: Made) {
    call!(driver, cuGraphExecDestroy(made.exec)).unwrap();
    call!(driver, cuGraphDestroy(made.graph)).unwrap();
}

fn trim(driver: &Driver) {
    call!(driver, cuDeviceGraphMemTrim(0)).unwrap();
}

/// Returns what is used, its high mark, what is reserved and its high mark, in pages.
fn attributes(driver: &Driver) -> [u64; 4] {
    [
        CU_GRAPH_MEM_ATTR_USED_MEM_CURRENT,
        CU_GRAPH_MEM_ATTR_USED_MEM_HIGH,
        CU_GRAPH_MEM_ATTR_RESERVED_MEM_CURRENT,
        CU_GRAPH_MEM_ATTR_RESERVED_MEM_HIGH,
    ]
    .map(|attribute| {
        let mut value = 0_u64;
        let place = (&raw mut value).cast();
        call!(driver, cuDeviceGetGraphMemAttribute(0, attribute, place)).unwrap();
        assert_eq!(value % PAGES, 0, "whole pages");
        value / PAGES
    })
}

#[test]
fn memory_is_taken_by_a_launch_and_given_back_by_a_trim() {
    for config in [SimConfig::new(), SimConfig::new().unbacked()] {
        let driver = Driver::new(config.memory_bytes(256 << 20));
        let before = driver.books();
        let stream = driver.stream().unwrap();
        let made = made(&driver, stream, 3 * PAGE + 1, true);
        call!(driver, cuGraphUpload(made.exec, stream)).unwrap();
        assert_eq!(attributes(&driver), [0; 4], "not before a launch");
        for _ in 0..2 {
            launch(&driver, made, stream).unwrap();
            synchronize(&driver, stream);
            assert_eq!(attributes(&driver), [4; 4]);
            let books = driver.books();
            assert_eq!(books.physical_bytes, 4 * PAGE);
            assert_eq!((books.handles, books.plain_allocations), (0, 0));
            let (mut free, mut total) = (0, 0);
            call!(driver, cuMemGetInfo(&mut free, &mut total)).unwrap();
            assert_eq!(total - free, 4 * PAGE);
            trim(&driver);
            assert_eq!(attributes(&driver), [0, 4, 0, 4]);
            assert_eq!(driver.books().physical_bytes, 0);
        }
        destroy(&driver, made);
        call!(driver, cuStreamDestroy(stream)).unwrap();
        assert_eq!(driver.books(), before);
    }
}

#[test]
fn graphs_share_the_reserve_unless_they_leave_something_allocated() {
    let driver = Driver::small();
    let stream = driver.stream().unwrap();
    let freeing = [2, 3].map(|pages| made(&driver, stream, pages * PAGE, true));
    for made in freeing {
        launch(&driver, made, stream).unwrap();
    }
    assert_eq!(attributes(&driver), [3; 4]);
    let leaving = made(&driver, stream, 2 * PAGE, false);
    launch(&driver, leaving, stream).unwrap();
    assert_eq!(attributes(&driver), [3; 4], "there is room");
    launch(&driver, freeing[1], stream).unwrap();
    assert_eq!(attributes(&driver), [5; 4]);
    synchronize(&driver, stream);
    for made in freeing {
        destroy(&driver, made);
    }
    assert_eq!(attributes(&driver), [2, 5, 5, 5], "of graphs that are gone");
    trim(&driver);
    assert_eq!(attributes(&driver), [2, 5, 2, 5]);
    assert_eq!(driver.read(leaving.address, 2).unwrap(), [42, 42]);
    free(&driver, leaving.address, stream).unwrap();
    destroy(&driver, leaving);
    synchronize(&driver, stream);
    trim(&driver);
    assert_eq!(attributes(&driver), [0, 5, 0, 5]);
}

#[test]
fn a_launch_for_which_there_is_too_little_memory_enqueues_nothing() {
    let driver = Driver::small();
    let stream = driver.stream().unwrap();
    let outside = driver.reserve(PAGE).unwrap();
    driver.back(outside, PAGE).unwrap();
    begin(&driver, stream);
    driver.memset_async(outside, 7, PAGE, stream).unwrap();
    let address = alloc(&driver, 128 * PAGE, stream).unwrap();
    let graph = end(&driver, stream);
    let exec = instantiate(&driver, graph);
    let made = Made {
        address,
        graph,
        exec,
    };
    let out = Err(CUDA_ERROR_OUT_OF_MEMORY);
    assert_eq!(launch(&driver, made, stream), out);
    synchronize(&driver, stream);
    assert_eq!(driver.read(outside, 1).unwrap(), [0]);
    assert_eq!(free(&driver, address, stream), INVALID, "not allocated");
    // What there was is lost: no trim gives it back.
    let lost = [0, 0, 127, 127];
    assert_eq!(attributes(&driver), lost);
    call!(driver, cuDeviceGraphMemTrim(0)).unwrap();
    assert_eq!(attributes(&driver), lost);
    assert_eq!(driver.create(PAGE), out.map(|()| 0));
}

#[test]
fn an_access_after_a_free_node_is_illegal() {
    let driver = Driver::small();
    let stream = driver.stream().unwrap();
    begin(&driver, stream);
    let address = alloc(&driver, PAGE, stream).unwrap();
    free(&driver, address, stream).unwrap();
    driver.memset_async(address, 1, PAGE, stream).unwrap();
    let graph = end(&driver, stream);
    let exec = instantiate(&driver, graph);
    call!(driver, cuGraphLaunch(exec, stream)).unwrap();
    let synchronized = call!(driver, cuStreamSynchronize(stream));
    assert_eq!(synchronized, Err(CUDA_ERROR_ILLEGAL_ADDRESS));
}

#[test]
fn calls_see_what_was_enqueued_and_work_what_has_run() {
    let driver = Driver::small();
    let stream = driver.stream().unwrap();
    let made = made(&driver, stream, PAGE, false);
    let fill = |value| driver.memset_async(made.address, value, PAGE, stream);
    assert_eq!(fill(1), INVALID, "before the launch");
    driver.simulator.hold_work();
    launch(&driver, made, stream).unwrap();
    fill(1).unwrap();
    free(&driver, made.address, stream).unwrap();
    assert_eq!(fill(1), INVALID, "after the free");
    assert_eq!(free(&driver, made.address, stream), INVALID, "twice");
    launch(&driver, made, stream).unwrap();
    driver.simulator.release_work();
    synchronize(&driver, stream);
    assert_eq!(driver.read(made.address, 1).unwrap(), [42]);
    call!(driver, cuMemFree(made.address)).unwrap();
    assert_eq!(fill(1), INVALID, "after the free");
    assert_eq!(call!(driver, cuMemFree(made.address)), INVALID, "twice");
}

#[test]
fn launches_of_one_graph_run_one_after_the_other() {
    let driver = Driver::small();
    let streams = [(); 2].map(|()| driver.stream().unwrap());
    let outside = driver.reserve(PAGE).unwrap();
    driver.back(outside, PAGE).unwrap();
    let made = made(&driver, streams[0], 4 * PAGE, true);
    driver.simulator.hold_work();
    driver.memset_async(outside, 1, PAGE, streams[0]).unwrap();
    for stream in streams.iter().cycle().take(20) {
        launch(&driver, made, *stream).unwrap();
    }
    driver.simulator.release_work();
    call!(driver, cuCtxSynchronize()).unwrap();
    assert!(!driver.simulator.is_poisoned(0));
}

#[test]
fn a_launch_that_is_under_way_keeps_its_memory() {
    let driver = Driver::small();
    let stream = driver.stream().unwrap();
    let made = made(&driver, stream, PAGE, true);
    driver.simulator.hold_work();
    launch(&driver, made, stream).unwrap();
    trim(&driver);
    assert_eq!(attributes(&driver), [1; 4]);
    destroy(&driver, made);
    trim(&driver);
    assert_eq!(attributes(&driver), [1; 4]);
    driver.simulator.release_work();
    synchronize(&driver, stream);
    trim(&driver);
    assert_eq!(attributes(&driver), [0, 1, 0, 1]);
}

#[test]
fn another_graph_frees_only_what_is_allocated_then() {
    let driver = Driver::small();
    let stream = driver.stream().unwrap();
    let leaving = made(&driver, stream, PAGE, false);
    begin(&driver, stream);
    free(&driver, leaving.address, stream).unwrap();
    let graph = end(&driver, stream);
    let exec = instantiate(&driver, graph);
    let frees = Made {
        address: 0,
        graph,
        exec,
    };
    assert_eq!(launch(&driver, frees, stream), INVALID);
    launch(&driver, leaving, stream).unwrap();
    launch(&driver, frees, stream).unwrap();
    assert_eq!(launch(&driver, frees, stream), INVALID, "twice");
    destroy(&driver, leaving);
    synchronize(&driver, stream);
    trim(&driver);
    assert_eq!(launch(&driver, frees, stream), INVALID, "it is gone");
}

#[test]
fn a_capture_that_makes_no_graph_keeps_no_addresses() {
    let driver = Driver::small();
    let stream = driver.stream().unwrap();
    begin(&driver, stream);
    let address = alloc(&driver, PAGE, stream).unwrap();
    let queried = call!(driver, cuStreamQuery(stream));
    assert_eq!(queried, Err(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED));
    let killed = Err(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    assert_eq!(alloc(&driver, PAGE, stream).map(|_| ()), killed);
    assert_eq!(free(&driver, address, stream), killed);
    let mut graph = null_mut();
    let ended = call!(driver, cuStreamEndCapture(stream, &mut graph));
    assert_eq!(ended, killed);
    begin(&driver, stream);
    assert_eq!(driver.memset_async(address, 1, 1, stream), INVALID);
    assert_eq!(free(&driver, address, stream), INVALID);
}

#[test]
fn the_end_of_a_context_frees_the_memory_of_its_graphs() {
    let driver = Driver::small();
    let stream = driver.stream().unwrap();
    let made = made(&driver, stream, PAGE, false);
    launch(&driver, made, stream).unwrap();
    synchronize(&driver, stream);
    assert_eq!(driver.books().physical_bytes, PAGE);
    call!(driver, cuDevicePrimaryCtxRelease(0)).unwrap();
    assert_eq!(driver.books(), Books::default());
    assert_eq!(attributes(&driver), [0, 1, 0, 1]);
}

#[test]
fn handles_of_graphs_and_nodes_are_checked() {
    let driver = Driver::small();
    let stream = driver.stream().unwrap();
    let made = made(&driver, stream, PAGE, true);
    let (mut count, mut kind) = (1, 0);
    let mut node = null_mut();
    let listed = call!(
        driver,
        cuGraphGetNodes(made.exec.cast(), &mut node, &mut count)
    );
    assert_eq!(listed, Err(CUDA_ERROR_INVALID_HANDLE), "executable");
    call!(driver, cuGraphGetNodes(made.graph, &mut node, &mut count)).unwrap();
    call!(driver, cuGraphNodeGetType(node, &mut kind)).unwrap();
    assert_eq!((count, kind), (1, CU_GRAPH_NODE_TYPE_MEM_ALLOC));
    assert_eq!(call!(driver, cuGraphNodeGetType(node, null_mut())), INVALID);
    let missing = null_mut();
    assert_eq!(
        call!(driver, cuGraphGetNodes(made.graph, &mut node, missing)),
        INVALID
    );
    let uploaded = call!(driver, cuGraphUpload(made.graph.cast(), stream));
    assert_eq!(uploaded, Err(CUDA_ERROR_INVALID_HANDLE));
    let attribute = CU_GRAPH_MEM_ATTR_USED_MEM_CURRENT;
    let asked = call!(
        driver,
        cuDeviceGetGraphMemAttribute(9, attribute, (&raw mut count).cast())
    );
    assert_eq!(asked, Err(CUDA_ERROR_INVALID_DEVICE));
    let trimmed = call!(driver, cuDeviceGraphMemTrim(-1));
    assert_eq!(trimmed, Err(CUDA_ERROR_INVALID_DEVICE));
    destroy(&driver, made);
    assert_eq!(
        call!(driver, cuGraphNodeGetType(node, &mut kind)),
        INVALID,
        "its graph is gone"
    );
}
