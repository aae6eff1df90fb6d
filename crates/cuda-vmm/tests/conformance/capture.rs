//! Which calls kill a capture, by its mode, the calling thread and that thread's own mode.

use crate::Case;
use crate::common::set_current_context;
use crate::graph::instantiate;
use crate::kit::{Kit, Object, call};
use crate::work::record;
use cuda_vmm::sys::*;

/// The thread that makes the call while a stream is captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Caller {
    Capturing,
    CapturingRelaxed,
    Another,
    AnotherRelaxed,
}

impl Caller {
    fn name(self) -> &'static str {
        match self {
            Self::Capturing => "the capturing thread",
            Self::CapturingRelaxed => "the capturing thread, itself RELAXED",
            Self::Another => "another thread",
            Self::AnotherRelaxed => "another thread, itself RELAXED",
        }
    }
}

/// How a call bears on captures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// It disturbs none.
    Harmless,
    /// It kills those that are exposed to the caller.
    Unsafe,
    /// The same, and where none is exposed the call is refused.
    UnsafeRefused,
    /// It kills all of the context.
    WholeContext,
}

const MODES: [(&str, CUstreamCaptureMode); 3] = [
    ("GLOBAL", CU_STREAM_CAPTURE_MODE_GLOBAL),
    ("THREAD_LOCAL", CU_STREAM_CAPTURE_MODE_THREAD_LOCAL),
    ("RELAXED", CU_STREAM_CAPTURE_MODE_RELAXED),
];

/// Whether a capture of this mode is exposed to this caller.
fn exposed(mode: CUstreamCaptureMode, caller: Caller) -> bool {
    match (mode, caller) {
        (_, Caller::CapturingRelaxed | Caller::AnotherRelaxed) => false,
        (CU_STREAM_CAPTURE_MODE_GLOBAL, _) => true,
        (CU_STREAM_CAPTURE_MODE_THREAD_LOCAL, caller) => caller == Caller::Capturing,
        _ => false,
    }
}

/// What the call and the end of the capture answer.
fn expected(kind: Kind, exposed: bool) -> [&'static str; 2] {
    match (kind, exposed) {
        (Kind::Unsafe | Kind::UnsafeRefused, true) | (Kind::WholeContext, _) => {
            ["STREAM_CAPTURE_UNSUPPORTED", "STREAM_CAPTURE_INVALIDATED"]
        }
        (Kind::UnsafeRefused, false) => ["INVALID_VALUE", "SUCCESS"],
        (Kind::Harmless, _) | (Kind::Unsafe, false) => ["SUCCESS", "SUCCESS"],
    }
}

/// What there is beside the captured stream.
#[derive(Clone, Copy, Debug)]
pub struct Stage {
    pub captured: Object,
    other: Object,
    /// Recorded on the other stream.
    event: Object,
    /// An open page.
    pub open: u64,
    /// Another open page, which is asked to be freed.
    freed: u64,
    /// A page of addresses with nothing mapped.
    pub unmapped: u64,
}

impl Stage {
    pub fn new(kit: &mut Kit) -> Self {
        let address = kit.addresses(3);
        let [freed, unmapped] = [1, 2].map(|page| address + (page * kit.page) as u64);
        kit.back(address, 1);
        kit.back(freed, 1);
        let stage = Self {
            captured: kit.stream(),
            other: kit.stream(),
            event: kit.event(),
            open: address,
            freed,
            unmapped,
        };
        kit.fill(address, 1);
        kit.must(call!(
            kit,
            cuEventRecord(stage.event.raw(), stage.other.raw())
        ));
        kit.must(call!(kit, cuCtxSynchronize()));
        stage
    }

    /// Begins a capture and puts a memset into it.
    pub fn begin(&self, kit: &Kit, mode: CUstreamCaptureMode) {
        let stream = self.captured.raw();
        kit.must(call!(kit, cuStreamBeginCapture(stream, mode)));
        kit.must(call!(kit, cuMemsetD8Async(self.open, 42, kit.page, stream)));
    }

    /// Ends the capture and notes how; the graph, if there is one.
    pub fn end(&self, kit: &mut Kit) -> Option<Object> {
        let mut graph = core::ptr::null_mut();
        let stream = self.captured.raw();
        let code = call!(kit, cuStreamEndCapture(stream, &mut graph));
        kit.answer(code);
        (!graph.is_null()).then(|| Object::new(graph))
    }
}

pub fn destroy(kit: &Kit, graph: Option<Object>) {
    if let Some(graph) = graph {
        kit.must(call!(kit, cuGraphDestroy(graph.raw())));
    }
}

/// Sets the thread's own capture mode and returns the one before.
fn exchange(kit: &Kit, mut mode: CUstreamCaptureMode) -> CUstreamCaptureMode {
    kit.must(call!(kit, cuThreadExchangeStreamCaptureMode(&mut mode)));
    mode
}

fn relaxed<T>(kit: &Kit, act: impl FnOnce() -> T) -> T {
    let before = exchange(kit, CU_STREAM_CAPTURE_MODE_RELAXED);
    let outcome = act();
    exchange(kit, before);
    outcome
}

/// A row of the table: what is called, and the first code that is no success.
type Call = fn(&Kit, &Stage) -> Result<(), CUresult>;

fn ok(code: CUresult) -> Result<(), CUresult> {
    if code == CUDA_SUCCESS {
        Ok(())
    } else {
        Err(code)
    }
}

const EVENT_QUERY: (&str, Kind, Call) = ("cuEventQuery", Kind::Unsafe, |kit, stage| {
    ok(call!(kit, cuEventQuery(stage.event.raw())))
});
const STREAM_SYNCHRONIZE: (&str, Kind, Call) = (
    "cuStreamSynchronize of another stream",
    Kind::Unsafe,
    |kit, stage| ok(call!(kit, cuStreamSynchronize(stage.other.raw()))),
);

const CONTEXT_EVENT: (&str, Kind, Call) = ("cuCtxRecordEvent", Kind::WholeContext, |kit, stage| {
    ok(record(kit, stage.event))
});

fn calls() -> Vec<(&'static str, Kind, Call)> {
    vec![
        ("reserve and free", Kind::Harmless, |kit, _| {
            let mut address = 0;
            ok(call!(
                kit,
                cuMemAddressReserve(&mut address, kit.page, 0, 0, 0)
            ))?;
            ok(call!(kit, cuMemAddressFree(address, kit.page)))
        }),
        (
            "create, map, set access, unmap and release",
            Kind::Harmless,
            |kit, stage| {
                let mut handle = 0;
                let properties = crate::kit::properties(kit.device.raw());
                ok(call!(
                    kit,
                    cuMemCreate(&mut handle, kit.page, &properties, 0)
                ))?;
                ok(kit.try_map(stage.unmapped, kit.page, 0, handle))?;
                ok(kit.try_open(stage.unmapped, kit.page))?;
                ok(kit.unmap(stage.unmapped, kit.page))?;
                ok(call!(kit, cuMemRelease(handle)))
            },
        ),
        (
            "cuEventRecord on another stream",
            Kind::Harmless,
            |kit, stage| {
                let (event, stream) = (stage.event.raw(), stage.other.raw());
                ok(call!(kit, cuEventRecord(event, stream)))
            },
        ),
        (
            "cuMemsetD8Async on another stream",
            Kind::Harmless,
            |kit, stage| {
                let stream = stage.other.raw();
                ok(call!(kit, cuMemsetD8Async(stage.open, 0, kit.page, stream)))
            },
        ),
        ("cuMemsetD8", Kind::Harmless, |kit, stage| {
            ok(call!(kit, cuMemsetD8(stage.open, 0, kit.page)))
        }),
        (
            "cuMemcpyDtoDAsync on another stream",
            Kind::Harmless,
            |kit, stage| {
                let (half, stream) = (kit.page / 2, stage.other.raw());
                let middle = stage.open + half as u64;
                ok(call!(
                    kit,
                    cuMemcpyDtoDAsync(stage.open, middle, half, stream)
                ))
            },
        ),
        ("cuMemGetInfo", Kind::Harmless, |kit, _| {
            let (mut free, mut total) = (0, 0);
            ok(call!(kit, cuMemGetInfo(&mut free, &mut total)))
        }),
        EVENT_QUERY,
        ("cuEventSynchronize", Kind::Unsafe, |kit, stage| {
            ok(call!(kit, cuEventSynchronize(stage.event.raw())))
        }),
        STREAM_SYNCHRONIZE,
        (
            "cuStreamQuery of another stream",
            Kind::Unsafe,
            |kit, stage| ok(call!(kit, cuStreamQuery(stage.other.raw()))),
        ),
        ("cuMemAlloc and cuMemFree", Kind::Unsafe, |kit, _| {
            let mut address = 0;
            ok(call!(kit, cuMemAlloc(&mut address, kit.page)))?;
            ok(call!(kit, cuMemFree(address)))
        }),
        (
            "cuMemFreeAsync of mapped memory on another stream",
            Kind::UnsafeRefused,
            |kit, stage| {
                let stream = stage.other.raw();
                ok(call!(kit, cuMemFreeAsync(stage.freed, stream)))
            },
        ),
        (
            "cuMemFreeAsync of mapped memory on the legacy stream",
            Kind::UnsafeRefused,
            |kit, stage| {
                let stream = Object::LEGACY.raw();
                ok(call!(kit, cuMemFreeAsync(stage.freed, stream)))
            },
        ),
        ("cuCtxSynchronize", Kind::WholeContext, |kit, _| {
            ok(call!(kit, cuCtxSynchronize()))
        }),
    ]
}

/// One call by one caller while a stream is captured in one mode.
fn case(
    (mode_name, mode): (&str, CUstreamCaptureMode),
    caller: Caller,
    (name, kind, call): (&str, Kind, Call),
) -> Case {
    let expected = expected(kind, exposed(mode, caller));
    let name = format!("{name}: capture mode {mode_name}, by {}", caller.name());
    Case::new(name, &expected, move |kit| {
        let stage = Stage::new(kit);
        stage.begin(kit, mode);
        let here = || call(kit, &stage);
        let there = |relax: bool| {
            std::thread::scope(|scope| {
                let there = scope.spawn(|| {
                    set_current_context(&kit.device, kit.device.raw_context());
                    if relax { relaxed(kit, here) } else { here() }
                });
                there.join().expect("the other thread's call")
            })
        };
        let outcome = match caller {
            Caller::Capturing => here(),
            Caller::CapturingRelaxed => relaxed(kit, here),
            Caller::Another => there(false),
            Caller::AnotherRelaxed => there(true),
        };
        kit.answer(outcome.err().unwrap_or(CUDA_SUCCESS));
        let graph = stage.end(kit);
        destroy(kit, graph);
    })
}

pub fn cases(has_context_events: bool) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut calls = calls();
    if has_context_events {
        calls.push(CONTEXT_EVENT);
    }
    for mode in MODES {
        for caller in [Caller::Capturing, Caller::Another, Caller::AnotherRelaxed] {
            cases.extend(calls.iter().map(|&call| case(mode, caller, call)));
        }
    }
    for call in [EVENT_QUERY, STREAM_SYNCHRONIZE] {
        cases.push(case(MODES[0], Caller::CapturingRelaxed, call));
    }
    cases.extend(states());
    cases
}

fn states() -> Vec<Case> {
    vec![
        Case::new("end without a capture", &["ILLEGAL_STATE"], |kit| {
            let stage = Stage::new(kit);
            let graph = stage.end(kit);
            destroy(kit, graph);
        }),
        Case::new("begin twice", &["ILLEGAL_STATE"], |kit| {
            let stage = Stage::new(kit);
            stage.begin(kit, CU_STREAM_CAPTURE_MODE_GLOBAL);
            let (stream, mode) = (stage.captured.raw(), CU_STREAM_CAPTURE_MODE_GLOBAL);
            let code = call!(kit, cuStreamBeginCapture(stream, mode));
            kit.answer(code);
            // Whether the first capture lives on was not measured.
            let mut graph = core::ptr::null_mut();
            call!(kit, cuStreamEndCapture(stream, &mut graph));
            destroy(kit, (!graph.is_null()).then(|| Object::new(graph)));
        }),
        Case::new(
            "begin on the legacy stream",
            &["STREAM_CAPTURE_UNSUPPORTED"],
            |kit| {
                let (stream, mode) = (Object::LEGACY.raw(), CU_STREAM_CAPTURE_MODE_GLOBAL);
                let code = call!(kit, cuStreamBeginCapture(stream, mode));
                kit.answer(code);
            },
        ),
        Case::new(
            "cuMemFreeAsync of mapped memory on the captured stream",
            &["INVALID_VALUE", "SUCCESS", "SUCCESS"],
            |kit| {
                let stage = Stage::new(kit);
                stage.begin(kit, CU_STREAM_CAPTURE_MODE_GLOBAL);
                let stream = stage.captured.raw();
                let code = call!(kit, cuMemFreeAsync(stage.freed, stream));
                kit.answer(code);
                if let Some(graph) = stage.end(kit) {
                    let exec = instantiate(kit, graph);
                    kit.must(call!(kit, cuGraphExecDestroy(exec.raw())));
                    destroy(kit, Some(graph));
                }
            },
        ),
    ]
}
