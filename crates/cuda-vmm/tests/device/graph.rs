//! A captured graph over a pool that grows and shrinks: the kernel reads which blocks to take from
//! a table in memory, so one graph serves all tables.

use crate::common::{Gather, Rows, with_context};
use crate::{case, page};
use core::ptr::null_mut;
use cuda_vmm::sys::*;
use cuda_vmm::{
    CaptureGuard, Device, Engine, EngineOptions, Stream, VirtualMemoryPool, VmmError, WorkerMode,
};

/// A block, in bytes; small beside a page, so that blocks share pages.
const BLOCK: usize = 8 << 10;
const WORDS: u32 = (BLOCK / 4) as u32;
/// Rows of a gather.
const ROWS: usize = 4;

/// What every byte of a block is.
fn mark(block: usize) -> u8 {
    (block % 251) as u8 + 1
}

/// A pool of blocks, and beside it what a gather reads its table from and writes its rows to.
struct Fixture<'a> {
    device: &'a Device,
    engine: Engine,
    blocks: VirtualMemoryPool,
    aside: VirtualMemoryPool,
    stream: Stream,
}

impl<'a> Fixture<'a> {
    fn new(device: &'a Device) -> Self {
        let options = EngineOptions::new().worker(WorkerMode::Manual);
        let engine = Engine::new(device, options).expect("an engine");
        let blocks = VirtualMemoryPool::on_engine(&engine, 16 * page(), page()).expect("a pool");
        let aside = VirtualMemoryPool::on_engine(&engine, 2 * page(), page()).expect("a pool");
        let stream = Stream::new(device).expect("a stream");
        for pool in [&blocks, &aside] {
            pool.use_stream(&stream).expect("of this device");
        }
        aside.allocate(0, (ROWS + 1) * BLOCK).expect("room");
        Self {
            device,
            engine,
            blocks,
            aside,
            stream,
        }
    }

    fn rows(&self) -> Rows {
        Rows {
            out: self.aside.base_address() + BLOCK as u64,
            pool: self.blocks.base_address(),
            table: self.aside.base_address(),
            rows: ROWS as u32,
            words: WORDS,
        }
    }

    fn block(&self, number: usize) -> u64 {
        self.blocks.base_address() + (number * BLOCK) as u64
    }

    /// Fills blocks that are live, each with its own value.
    fn fill(&self, numbers: std::ops::Range<usize>) {
        for number in numbers {
            // SAFETY: the caller has made the block live.
            unsafe { self.stream.memset(self.block(number), mark(number), BLOCK) }.expect("queued");
        }
    }

    /// Replays the graph with a table of these blocks, and fails unless each row is its block, to
    /// the byte.
    fn replay(&self, exec: CUgraphExec, blocks: [usize; ROWS]) {
        let Rows { out, table, .. } = self.rows();
        let numbers: Vec<u8> = blocks
            .iter()
            .flat_map(|number| (*number as u32).to_le_bytes())
            .collect();
        // SAFETY: the table is live while the fixture is.
        unsafe { self.stream.write(table, &numbers) }.expect("written");
        let launch = self.device.driver().table().cuGraphLaunch;
        // SAFETY: graph and stream are alive, and the blocks of the table are live.
        let code = with_context(self.device, || unsafe { launch(exec, self.stream.raw()) });
        assert_eq!(code, CUDA_SUCCESS, "cuGraphLaunch");
        self.stream
            .synchronize()
            .expect("the graph met mapped memory");
        let mut rows = vec![0; ROWS * BLOCK];
        // SAFETY: the rows are live while the fixture is.
        unsafe { self.stream.read(out, &mut rows) }.expect("read");
        for (row, (bytes, block)) in rows.chunks(BLOCK).zip(blocks).enumerate() {
            let expected = vec![mark(block); BLOCK];
            assert!(
                bytes == expected,
                "row {row} is not block {block}: {:?}…",
                &bytes[..8]
            );
        }
    }
}

/// Captures what `work` queues on the stream; other work may go on meanwhile.
fn capture(device: &Device, stream: &Stream, work: impl FnOnce()) -> (CUgraph, CUgraphExec) {
    let table = *device.driver().table();
    let (mut graph, mut exec) = (null_mut(), null_mut());
    with_context(device, || {
        let mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
        // SAFETY: the stream is alive.
        let code = unsafe { (table.cuStreamBeginCapture)(stream.raw(), mode) };
        assert_eq!(code, CUDA_SUCCESS, "cuStreamBeginCapture");
        work();
        // SAFETY: as above, and `graph` is a valid place.
        let code = unsafe { (table.cuStreamEndCapture)(stream.raw(), &mut graph) };
        assert_eq!(code, CUDA_SUCCESS, "cuStreamEndCapture");
        // SAFETY: the graph was just made, and `exec` is a valid place.
        let code = unsafe { (table.cuGraphInstantiateWithFlags)(&mut exec, graph, 0) };
        assert_eq!(code, CUDA_SUCCESS, "cuGraphInstantiateWithFlags");
    });
    (graph, exec)
}

fn destroy(device: &Device, (graph, exec): (CUgraph, CUgraphExec)) {
    let table = *device.driver().table();
    with_context(device, || {
        // SAFETY: nothing runs it any more, and each is destroyed once.
        assert_eq!(unsafe { (table.cuGraphExecDestroy)(exec) }, CUDA_SUCCESS);
        // SAFETY: as above.
        assert_eq!(unsafe { (table.cuGraphDestroy)(graph) }, CUDA_SUCCESS);
    });
}

#[test]
fn a_graph_is_replayed_with_other_blocks_after_growing_and_after_trimming() {
    case(|device| {
        let mut gather = Gather::new(device);
        let fixture = Fixture::new(device);
        let Fixture {
            engine,
            blocks,
            stream,
            ..
        } = &fixture;
        let in_page = page() / BLOCK;
        blocks.allocate(0, page()).expect("room");
        fixture.fill(0..in_page.min(100));
        stream.synchronize().expect("done");
        let captured = capture(device, stream, || {
            // SAFETY: what the table names when the graph runs is live, and `gather` outlives the
            // graph.
            let code = unsafe { gather.launch(stream.raw(), fixture.rows()) };
            assert_eq!(code, CUDA_SUCCESS, "launched into the capture");
        });
        let exec = captured.1;
        let last = in_page.min(100) - 1;
        fixture.replay(exec, [last, 0, 0, last / 2]);

        // More pages, behind addresses that the graph never saw mapped.
        blocks.allocate(page(), 3 * page()).expect("room");
        let more = [in_page, 2 * in_page + last, 4 * in_page - 1];
        for number in more {
            fixture.fill(number..number + 1);
        }
        fixture.replay(exec, [more[2], 0, more[0], more[1]]);

        // And back: the pages are unmapped, and the graph goes on with those that are left.
        blocks.deallocate(page(), 3 * page()).expect("live");
        let held = engine.stats().committed_bytes;
        engine.step();
        let freed = held - engine.stats().committed_bytes;
        assert_eq!(freed, 3 * page(), "given back to the driver");
        fixture.replay(exec, [0, last, last, 0]);

        // The same addresses with other memory.
        blocks.allocate(page(), page()).expect("room");
        fixture.fill(in_page..in_page + 1);
        fixture.replay(exec, [in_page, 0, in_page, last]);
        destroy(device, captured);
    });
}

#[test]
fn a_pool_grows_and_frees_while_a_stream_is_captured() {
    case(|device| {
        let mut gather = Gather::new(device);
        let fixture = Fixture::new(device);
        let Fixture {
            engine,
            blocks,
            stream,
            ..
        } = &fixture;
        let other = Stream::new(device).expect("a stream");
        blocks.use_stream(&other).expect("of this device");
        blocks.allocate(0, 2 * page()).expect("room");
        fixture.fill(0..1);
        stream.synchronize().expect("done");
        let guard = CaptureGuard::new();
        let captured = capture(device, stream, || {
            // SAFETY: as above.
            let code = unsafe { gather.launch(stream.raw(), fixture.rows()) };
            assert_eq!(code, CUDA_SUCCESS, "launched into the capture");
            blocks
                .allocate(4 * page(), 2 * page())
                .expect("growing disturbs no capture");
            // SAFETY: just allocated.
            unsafe { other.memset(blocks.base_address() + 4 * page() as u64, 5, page()) }
                .expect("queued");
            blocks
                .deallocate(page(), page())
                .expect("freeing disturbs no capture");
            std::thread::scope(|scope| {
                let step = scope.spawn(|| engine.step());
                step.join()
                    .expect("a step of another thread disturbs no capture");
            });
            assert_eq!(
                engine.stats().parts.retiring_bytes,
                page(),
                "the captured stream gave no fence"
            );
        });
        drop(guard);
        fixture.replay(captured.1, [0; ROWS]);
        device.synchronize().expect("done");
        engine.step();
        assert_eq!(engine.stats().parts.retiring_bytes, 0);
        destroy(device, captured);
    });
}

#[test]
fn memory_that_is_pinned_for_a_graph_stays_whatever_is_freed_or_dropped() {
    case(|device| {
        let mut gather = Gather::new(device);
        let fixture = Fixture::new(device);
        let Fixture {
            engine,
            blocks,
            stream,
            ..
        } = &fixture;
        blocks.allocate(0, 3 * page()).expect("room");
        fixture.fill(0..1);
        let captured = capture(device, stream, || {
            // SAFETY: as above.
            let code = unsafe { gather.launch(stream.raw(), fixture.rows()) };
            assert_eq!(code, CUDA_SUCCESS, "launched into the capture");
        });
        let error = blocks
            .pin_for_graph(0, 4 * page())
            .expect_err("not all of it is live");
        let bytes = 4 * page();
        assert_eq!(error, VmmError::NotMapped { offset: 0, bytes });
        let pin = blocks.pin_for_graph(0, page()).expect("live");
        let settle = || {
            stream.synchronize().expect("done");
            engine.step();
            engine.stats()
        };
        // All is freed, and nothing is to be kept: but for what is pinned it goes.
        blocks.deallocate(0, 3 * page()).expect("live");
        let stats = settle();
        assert_eq!(stats.parts.parked_bytes, page(), "{stats}");
        assert_eq!(engine.trim(), Ok(0));
        // The graph reads what is there, though no allocation has it now.
        fixture.replay(captured.1, [0; ROWS]);
        // It can be had again at its addresses, without a driver call.
        blocks.allocate(0, page()).expect("parked");
        fixture.fill(0..1);
        fixture.replay(captured.1, [0; ROWS]);
        blocks.deallocate(0, page()).expect("live");
        assert_eq!(settle().parts.parked_bytes, page());
        drop(pin);
        assert_eq!(settle().parts.parked_bytes, 0);

        // A pool that is dropped leaves what is pinned until the pin is gone.
        let other = VirtualMemoryPool::on_engine(engine, page(), page()).expect("a pool");
        other.allocate(0, page()).expect("room");
        let pin = other.pin_for_graph(0, page()).expect("live");
        let held = engine.stats().committed_bytes;
        other.close().expect("left to the engine");
        assert_eq!(engine.stats().committed_bytes, held);
        drop(pin);
        assert_eq!(engine.stats().committed_bytes, held - page());
        destroy(device, captured);
    });
}
