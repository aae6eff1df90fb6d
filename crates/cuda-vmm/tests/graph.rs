//! Work that is captured once and launched many times, and blocks that a launch holds.

mod common;

use common::{PAGE, Simulated, failure, manual};
use cuda_vmm::pool::blocks::{BlockBacking, ElementSize, LayerSpec, TensorSpec};
use cuda_vmm::sim::{Fault, SimConfig};
use cuda_vmm::sys::*;
use cuda_vmm::{Engine, Graph, Result, Stream, VirtualMemoryPool, VmmError};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

/// A stream, and a page that it may fill.
struct Page {
    simulated: Simulated,
    stream: Stream,
    pool: VirtualMemoryPool,
    address: u64,
}

impl Page {
    fn new(config: SimConfig) -> Self {
        let simulated = Simulated::new(config);
        let stream = Stream::new(&simulated.device).expect("a stream");
        let engine = Engine::new(&simulated.device, manual()).expect("an engine");
        let pool = VirtualMemoryPool::on_engine(&engine, 64 * PAGE, PAGE).expect("a pool");
        pool.use_stream(&stream).expect("named");
        let address = pool.allocate(0, PAGE).expect("a page");
        Self {
            simulated,
            stream,
            pool,
            address,
        }
    }

    fn fill(&self, value: u8) -> Result<()> {
        // SAFETY: the page is live while the pool is.
        unsafe { self.stream.memset(self.address, value, PAGE) }
    }

    fn byte(&self) -> u8 {
        let mut byte = [0];
        // SAFETY: as above.
        unsafe { self.stream.read(self.address, &mut byte) }.expect("read");
        byte[0]
    }

    fn graph(&self, value: u8) -> Graph {
        let (graph, ()) = Graph::capture(&self.stream, || self.fill(value)).expect("captured");
        graph
    }
}

/// Launches a graph over memory that the test keeps.
fn launch(graph: &mut Graph) -> Result<()> {
    // SAFETY: the test keeps what the graph names.
    unsafe { graph.launch() }
}

#[test]
fn captured_work_runs_when_it_is_launched_and_as_often() {
    let page = Page::new(SimConfig::new());
    let before = page.simulated.books();
    page.fill(1).expect("filled");
    let mut graph = page.graph(7);
    assert_eq!(page.byte(), 1, "it has not run");
    let nodes = graph.nodes();
    assert_eq!((nodes.memsets, nodes.total()), (1, 1));
    graph.upload().expect("uploaded");
    for _ in 0..3 {
        launch(&mut graph).expect("launched");
        assert_eq!(page.byte(), 7);
        page.fill(1).expect("filled");
        // The pool grows and shrinks beside it.
        page.pool.allocate(PAGE, 8 * PAGE).expect("allocated");
        page.pool.deallocate(PAGE, 8 * PAGE).expect("freed");
    }
    page.stream.synchronize().expect("done");
    page.pool.engine().step();
    page.pool.engine().trim().expect("trimmed");
    drop(graph);
    assert_eq!(page.simulated.books(), before);
}

#[test]
fn each_driver_call_of_a_capture_fails_in_turn_and_leaves_nothing() {
    let page = Page::new(SimConfig::new());
    let before = page.simulated.books();
    let mut failures = 0;
    for call in 1.. {
        let simulator = &page.simulated.simulator;
        simulator.inject(Fault::nth_call(call, CUDA_ERROR_UNKNOWN));
        let captured = Graph::capture(&page.stream, || page.fill(7));
        simulator.clear_faults();
        let done = captured.is_ok();
        match captured {
            Ok((mut graph, ())) => launch(&mut graph).expect("launched"),
            Err(error) => assert_eq!(error.driver_code(), Some(CUDA_ERROR_UNKNOWN), "{call}"),
        }
        page.simulated.device.retry_quarantine();
        assert_eq!(page.simulated.books(), before, "{call}");
        assert!(!page.stream.is_capturing().expect("asked"), "{call}");
        page.fill(9).expect("the stream is usable");
        assert_eq!(page.byte(), 9);
        failures += u64::from(!done);
        // The last calls are those of the end, which fail in vain.
        if done && failures + 4 < call {
            break;
        }
    }
    assert!(failures >= 6, "{failures}");
}

#[test]
fn what_the_driver_does_not_destroy_is_tried_again() {
    for refused in [
        DriverFunction::cuGraphDestroy,
        DriverFunction::cuGraphExecDestroy,
    ] {
        let page = Page::new(SimConfig::new());
        let before = page.simulated.books();
        let simulator = &page.simulated.simulator;
        simulator.inject(Fault::always(refused, CUDA_ERROR_UNKNOWN));
        drop(page.graph(7));
        assert_eq!(page.simulated.books().graphs, 1, "{refused}");
        simulator.clear_faults();
        page.simulated.device.retry_quarantine();
        assert_eq!(page.simulated.books(), before, "{refused}");
    }
}

/// The capture ends, whatever the work does.
#[test]
fn work_that_fails_panics_or_ends_the_capture_leaves_the_stream_usable() {
    let page = Page::new(SimConfig::new());
    let before = page.simulated.books();
    let refused = Graph::capture(&page.stream, || {
        page.fill(7)?;
        Err::<(), _>(VmmError::Closed)
    });
    assert_eq!(refused.map(drop), Err(VmmError::Closed));
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        Graph::capture(&page.stream, || -> Result<()> { panic!("planned") }).map(drop)
    }));
    assert!(panicked.is_err());
    let waited = Graph::capture(&page.stream, || page.stream.synchronize());
    let unsupported = failure!(cuStreamSynchronize, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    assert_eq!(waited.map(drop), Err(unsupported));
    let waited = Graph::capture(&page.stream, || {
        _ = page.stream.synchronize();
        Ok::<_, VmmError>(())
    });
    let invalidated = failure!(cuStreamEndCapture, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    assert_eq!(waited.map(drop), Err(invalidated));
    let twice = Graph::capture(&page.stream, || {
        Graph::capture(&page.stream, || Ok::<_, VmmError>(())).map(drop)
    });
    let illegal = failure!(cuStreamBeginCapture, CUDA_ERROR_ILLEGAL_STATE);
    assert_eq!(twice.map(drop), Err(illegal));
    // SAFETY: the legacy stream outlives everything.
    let legacy = unsafe { Stream::borrow(&page.simulated.device, core::ptr::null_mut()) };
    let legacy = Graph::capture(&legacy, || Ok::<_, VmmError>(()));
    let unsupported = failure!(cuStreamBeginCapture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    assert_eq!(legacy.map(drop), Err(unsupported));
    assert_eq!(page.simulated.books(), before);
    launch(&mut page.graph(3)).expect("launched");
    assert_eq!(page.byte(), 3);
}

/// Allocates on the stream, fills, and frees if `frees`, as Candle does in a captured step.
fn allocate(page: &Page, bytes: usize, frees: bool) -> Result<()> {
    let table = *page.simulated.driver.table();
    let mut address = 0;
    common::with_context(&page.simulated.device, || {
        let stream = page.stream.raw();
        // SAFETY: the place is valid, and the address is freed once, if at all.
        unsafe {
            assert_eq!((table.cuMemAllocAsync)(&mut address, bytes, stream), 0);
            assert_eq!((table.cuMemsetD8Async)(address, 1, bytes, stream), 0);
            if frees {
                assert_eq!((table.cuMemFreeAsync)(address, stream), 0);
            }
        }
    });
    page.fill(5)
}

#[test]
fn memory_of_a_graph_is_counted_kept_and_trimmed() {
    let page = Page::new(SimConfig::new());
    let device = &page.simulated.device;
    let before = page.simulated.books();
    for frees in [true, false] {
        let work = || allocate(&page, 3 * PAGE, frees);
        let (mut graph, ()) = Graph::capture(&page.stream, work).expect("captured");
        let nodes = graph.nodes();
        assert_eq!((nodes.allocations, nodes.memsets), (1, 2));
        assert_eq!(nodes.frees, usize::from(frees));
        assert_eq!(device.graph_memory().expect("asked").reserved_bytes, 0);
        for _ in 0..3 {
            launch(&mut graph).expect("what it did not free is freed by the next launch");
            page.stream.synchronize().expect("done");
        }
        let memory = device.graph_memory().expect("asked");
        assert!(memory.reserved_bytes >= 3 * PAGE as u64, "{memory:?}");
        assert!(memory.reserved_bytes_max >= memory.reserved_bytes);
        assert!(memory.used_bytes_max >= 3 * PAGE as u64);
        drop(graph);
        device.trim_graph_memory().expect("trimmed");
        if frees {
            let memory = device.graph_memory().expect("asked");
            assert_eq!((memory.used_bytes, memory.reserved_bytes), (0, 0));
            assert_eq!(page.simulated.books(), before);
        }
    }
}

#[test]
fn a_launch_for_whose_allocations_there_is_no_memory_is_refused() {
    let page = Page::new(SimConfig::new().memory_bytes(8 * PAGE));
    let work = || allocate(&page, 16 * PAGE, true);
    let (mut graph, ()) = Graph::capture(&page.stream, work).expect("captured");
    page.fill(1).expect("filled");
    let error = launch(&mut graph).expect_err("too much");
    assert!(error.is_out_of_memory() && !error.is_poisoned(), "{error}");
    assert_eq!(page.byte(), 1, "nothing ran");
}

fn blocks(page: &Page) -> BlockBacking {
    let size = ElementSize::new(1).expect("a size");
    let tensor = TensorSpec::new("k", &[PAGE / 4], size).expect("a tensor");
    let spec = LayerSpec::new([tensor]).expect("a specification");
    let backing = BlockBacking::new(page.pool.engine(), spec, 64, PAGE).expect("blocks");
    backing.use_stream(&page.stream).expect("named");
    backing.back(0..8).expect("backed");
    backing
}

/// What gives blocks up waits for a launch that holds them, and counts.
#[test]
fn blocks_are_given_up_after_a_launch_and_the_generation_tells() {
    let page = Page::new(SimConfig::new());
    let backing = blocks(&page);
    let generation = || backing.hold().expect("held").generation();
    let first = generation();
    backing.back([20]).expect("backed");
    assert_eq!(generation(), first, "no block was given up");
    let plan = || backing.reclaim_candidates(usize::MAX, |block| (block > 3).then_some(0.));
    let give_up: [(&str, &(dyn Fn() + Sync)); 3] = [
        ("unback", &|| backing.unback([20]).expect("given up")),
        ("a plan", &|| {
            backing.commit(&plan(), &page.stream).expect("committed");
        }),
        ("a reservation that is not kept", &|| {
            drop(backing.try_reserve([30]).expect("backed"));
        }),
    ];
    for (count, (what, act)) in give_up.into_iter().enumerate() {
        let hold = backing.hold().expect("held");
        assert_eq!(hold.generation(), first + count as u64, "{what}");
        let named = [0, 1, 2, 3];
        std::thread::scope(|scope| {
            let other = scope.spawn(act);
            std::thread::sleep(Duration::from_millis(20));
            assert!(!other.is_finished(), "{what}");
            assert_eq!(hold.find_missing(named).expect("asked"), None, "{what}");
            drop(hold);
            other.join().expect("it goes on");
        });
        assert_eq!(generation(), first + count as u64 + 1, "{what}");
    }
    let hold = backing.hold().expect("held");
    // Another launch, and blocks that come, do not wait.
    drop(backing.hold().expect("held"));
    backing.back([40]).expect("backed");
    assert_eq!(hold.find_missing([0, 40, 20, 99]).expect("asked"), Some(20));
    assert_eq!(hold.find_missing([0, 99]).expect("asked"), Some(99));
}
