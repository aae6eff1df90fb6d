//! Stream capture: calls that invalidate it, calls that do not, and the work of a launched graph.
#![allow(
    clippy::macro_metavars_in_unsafe,
    reason = "every call of the table is unsafe"
)]

mod common;
use common::*;
use std::ptr::null_mut;

const GLOBAL: CUstreamCaptureMode = CU_STREAM_CAPTURE_MODE_GLOBAL;
const THREAD_LOCAL: CUstreamCaptureMode = CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
const RELAXED: CUstreamCaptureMode = CU_STREAM_CAPTURE_MODE_RELAXED;

/// The objects that the calls under test use.
#[derive(Clone)]
struct Scene {
    driver: Driver,
    context: Shared<CUcontext>,
    address: u64,
    /// Address of a page that is mapped with access.
    mapped: u64,
    plain: u64,
    other: Shared<CUstream>,
    event: Shared<CUevent>,
}

impl Scene {
    fn new() -> Self {
        let driver = Driver::small();
        let address = driver.reserve(8 * PAGE).unwrap();
        let mapped = address + 4 * PAGE as u64;
        driver.back(mapped, PAGE).unwrap();
        let mut plain = 0;
        call!(driver, cuMemAlloc(&mut plain, PAGE)).unwrap();
        let (other, event) = (driver.stream().unwrap(), driver.event().unwrap());
        call!(driver, cuEventRecord(event, other)).unwrap();
        Self {
            context: Shared(driver.retain(0).unwrap()),
            driver,
            address,
            mapped,
            plain,
            other: Shared(other),
            event: Shared(event),
        }
    }
}

fn end(driver: &Driver, stream: CUstream) -> Answer<CUgraph> {
    let mut graph = std::ptr::without_provenance_mut(1);
    let ended = call!(driver, cuStreamEndCapture(stream, &mut graph));
    assert_eq!(ended.is_err(), graph.is_null());
    ended.map(|()| graph)
}

fn begin(driver: &Driver, stream: CUstream, mode: CUstreamCaptureMode) {
    call!(driver, cuStreamBeginCapture(stream, mode)).unwrap();
}

/// Makes a call while a stream is captured. Returns the results of the call and of the capture.
fn during(
    scene: &Scene,
    mode: CUstreamCaptureMode,
    same_thread: bool,
    relaxed: bool,
    call: fn(&Scene) -> Answer,
) -> (Answer, Answer) {
    let driver = &scene.driver;
    let stream = driver.stream().unwrap();
    begin(driver, stream, mode);
    driver.memset_async(scene.plain, 1, 4, stream).unwrap();
    let run = || {
        call!(driver, cuCtxSetCurrent(scene.context.get())).unwrap();
        let mut mode = RELAXED;
        if relaxed {
            call!(driver, cuThreadExchangeStreamCaptureMode(&mut mode)).unwrap();
            assert_eq!(mode, GLOBAL, "the default");
        }
        let answer = call(scene);
        if relaxed {
            call!(driver, cuThreadExchangeStreamCaptureMode(&mut mode)).unwrap();
            assert_eq!(mode, RELAXED);
        }
        answer
    };
    let answer = if same_thread {
        run()
    } else {
        std::thread::scope(|scope| scope.spawn(run).join().unwrap())
    };
    let ended = end(driver, stream);
    if let Ok(graph) = ended {
        call!(driver, cuGraphDestroy(graph)).unwrap();
    }
    call!(driver, cuStreamDestroy(stream)).unwrap();
    call!(driver, cuStreamSynchronize(scene.other.get())).unwrap();
    (answer, ended.map(|_| ()))
}

type Call = (&'static str, fn(&Scene) -> Answer);

/// Calls that are allowed during any capture.
const FINE: &[Call] = &[
    ("create, map, set access, unmap, release", |scene| {
        scene.driver.back(scene.address, PAGE)?;
        scene.driver.unmap(scene.address, PAGE)
    }),
    ("reserve, address free", |scene| {
        let address = scene.driver.reserve(PAGE)?;
        scene.driver.address_free(address, PAGE)
    }),
    ("event record elsewhere", |scene| {
        call!(
            scene.driver,
            cuEventRecord(scene.event.get(), scene.other.get())
        )
    }),
    ("memset elsewhere", |scene| {
        scene
            .driver
            .memset_async(scene.plain, 0, PAGE, scene.other.get())
    }),
    ("memset on the legacy stream", |scene| {
        scene.driver.memset(scene.plain, 0, PAGE)
    }),
    ("copy elsewhere", |scene| {
        let half = PAGE / 2;
        call!(
            scene.driver,
            cuMemcpyDtoDAsync(
                scene.plain,
                scene.plain + half as u64,
                half,
                scene.other.get()
            )
        )
    }),
    ("memory info", |scene| {
        let (mut free, mut total) = (0, 0);
        call!(scene.driver, cuMemGetInfo(&mut free, &mut total))
    }),
];

/// Calls that invalidate a capture that is exposed to the calling thread.
const UNSAFE: &[Call] = &[
    ("event query", |scene| {
        call!(scene.driver, cuEventQuery(scene.event.get()))
    }),
    ("event synchronize", |scene| {
        call!(scene.driver, cuEventSynchronize(scene.event.get()))
    }),
    ("stream synchronize elsewhere", |scene| {
        call!(scene.driver, cuStreamSynchronize(scene.other.get()))
    }),
    ("stream query elsewhere", |scene| {
        call!(scene.driver, cuStreamQuery(scene.other.get()))
    }),
    ("plain alloc and free", |scene| {
        let mut address = 0;
        call!(scene.driver, cuMemAlloc(&mut address, PAGE))?;
        call!(scene.driver, cuMemFree(address))
    }),
];

/// Calls that always fail, and invalidate a capture that is exposed.
const REFUSED: &[Call] = &[
    ("free of a mapped address, legacy stream", |scene| {
        call!(scene.driver, cuMemFreeAsync(scene.mapped, null_mut()))
    }),
    ("free of a mapped address, elsewhere", |scene| {
        call!(
            scene.driver,
            cuMemFreeAsync(scene.mapped, scene.other.get())
        )
    }),
];

const INTACT: Answer = Ok(());
const KILLED: Answer = Err(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
const UNSUPPORTED: Answer = Err(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);

#[test]
fn the_capture_table_holds() {
    let scene = Scene::new();
    for mode in [GLOBAL, THREAD_LOCAL, RELAXED] {
        for (same_thread, relaxed) in [(true, false), (true, true), (false, false), (false, true)] {
            let exposed = !relaxed
                && match mode {
                    GLOBAL => true,
                    THREAD_LOCAL => same_thread,
                    _ => false,
                };
            let case = format!("mode {mode}, same thread {same_thread}, relaxed {relaxed}");
            for (name, call) in FINE {
                let answers = during(&scene, mode, same_thread, relaxed, *call);
                assert_eq!(answers, (Ok(()), INTACT), "{name}: {case}");
            }
            for (name, call) in UNSAFE {
                let answers = during(&scene, mode, same_thread, relaxed, *call);
                let expected = if exposed {
                    (UNSUPPORTED, KILLED)
                } else {
                    (Ok(()), INTACT)
                };
                assert_eq!(answers, expected, "{name}: {case}");
            }
            for (name, call) in REFUSED {
                let answers = during(&scene, mode, same_thread, relaxed, *call);
                let refused = (Err(CUDA_ERROR_INVALID_VALUE), INTACT);
                let expected = if exposed {
                    (UNSUPPORTED, KILLED)
                } else {
                    refused
                };
                assert_eq!(answers, expected, "{name}: {case}");
            }
            let synchronize = |scene: &Scene| call!(scene.driver, cuCtxSynchronize());
            let answers = during(&scene, mode, same_thread, relaxed, synchronize);
            assert_eq!(
                answers,
                (UNSUPPORTED, KILLED),
                "context synchronize: {case}"
            );
        }
    }
    assert_eq!(
        scene.driver.memset(scene.mapped, 1, PAGE),
        Ok(()),
        "the mapping is intact"
    );
    assert_eq!(scene.driver.books().graphs, 0);
}

#[test]
fn a_thread_local_caller_is_exposed_to_its_own_captures_alone() {
    let query: fn(&Scene) -> Answer = |scene| {
        let mut mode = THREAD_LOCAL;
        call!(scene.driver, cuThreadExchangeStreamCaptureMode(&mut mode))?;
        let answer = call!(scene.driver, cuEventQuery(scene.event.get()));
        call!(scene.driver, cuThreadExchangeStreamCaptureMode(&mut mode))?;
        assert_eq!(mode, THREAD_LOCAL);
        answer
    };
    let scene = Scene::new();
    for mode in [GLOBAL, THREAD_LOCAL] {
        assert_eq!(during(&scene, mode, false, false, query), (Ok(()), INTACT));
        assert_eq!(
            during(&scene, mode, true, false, query),
            (UNSUPPORTED, KILLED)
        );
    }
    let mut unknown = 3;
    assert_eq!(
        call!(
            scene.driver,
            cuThreadExchangeStreamCaptureMode(&mut unknown)
        ),
        Err(CUDA_ERROR_INVALID_VALUE)
    );
}

#[test]
fn a_free_of_a_mapped_address_on_the_captured_stream_is_refused_and_harmless() {
    let Scene { driver, mapped, .. } = Scene::new();
    let stream = driver.stream().unwrap();
    begin(&driver, stream, GLOBAL);
    assert_eq!(
        call!(driver, cuMemFreeAsync(mapped, stream)),
        Err(CUDA_ERROR_INVALID_VALUE)
    );
    let graph = end(&driver, stream).unwrap();
    let mut exec = null_mut();
    assert_eq!(
        call!(driver, cuGraphInstantiateWithFlags(&mut exec, graph, 0)),
        Ok(())
    );
    assert_eq!(driver.books().graphs, 2);
    call!(driver, cuGraphExecDestroy(exec)).unwrap();
    assert_eq!(
        call!(driver, cuGraphExecDestroy(exec)),
        Err(CUDA_ERROR_INVALID_HANDLE)
    );
    call!(driver, cuGraphDestroy(graph)).unwrap();
    assert_eq!(driver.books().graphs, 0);
}

#[test]
fn the_captured_stream_itself_cannot_be_asked() {
    let Scene { driver, plain, .. } = Scene::new();
    let stream = driver.stream().unwrap();
    let mut status = 9;
    for mode in [GLOBAL, RELAXED] {
        begin(&driver, stream, mode);
        call!(driver, cuStreamIsCapturing(stream, &mut status)).unwrap();
        assert_eq!(status, CU_STREAM_CAPTURE_STATUS_ACTIVE);
        assert_eq!(call!(driver, cuStreamQuery(stream)), UNSUPPORTED);
        call!(driver, cuStreamIsCapturing(stream, &mut status)).unwrap();
        assert_eq!(status, CU_STREAM_CAPTURE_STATUS_INVALIDATED);
        assert_eq!(driver.memset_async(plain, 0, 1, stream), KILLED);
        assert_eq!(end(&driver, stream).map(|_| ()), KILLED);
        call!(driver, cuStreamIsCapturing(stream, &mut status)).unwrap();
        assert_eq!(status, CU_STREAM_CAPTURE_STATUS_NONE);
    }
    assert_eq!(
        call!(driver, cuStreamBeginCapture(stream, 3)),
        Err(CUDA_ERROR_INVALID_VALUE)
    );
    assert_eq!(
        call!(driver, cuStreamBeginCapture(null_mut(), RELAXED)),
        UNSUPPORTED
    );
}

#[test]
fn a_capture_begins_and_ends_once() {
    let Scene { driver, plain, .. } = Scene::new();
    let stream = driver.stream().unwrap();
    let illegal = Err(CUDA_ERROR_ILLEGAL_STATE);
    assert_eq!(end(&driver, stream).map(|_| ()), illegal, "no capture");
    for mode in [GLOBAL, THREAD_LOCAL, RELAXED] {
        begin(&driver, stream, mode);
        assert_eq!(call!(driver, cuStreamBeginCapture(stream, mode)), illegal);
        let mut status = 9;
        call!(driver, cuStreamIsCapturing(stream, &mut status)).unwrap();
        assert_eq!(status, CU_STREAM_CAPTURE_STATUS_ACTIVE);
        driver.memset_async(plain, 1, 4, stream).unwrap();
        let graph = end(&driver, stream).expect("the first capture is intact");
        call!(driver, cuGraphDestroy(graph)).unwrap();
        assert_eq!(end(&driver, stream).map(|_| ()), illegal, "ended already");
    }
}

#[test]
fn the_legacy_stream_kills_the_capture_of_a_blocking_stream() {
    let Scene { driver, plain, .. } = Scene::new();
    let stream = driver.stream_with(CU_STREAM_DEFAULT).unwrap();
    begin(&driver, stream, RELAXED);
    let mut status = 9;
    assert_eq!(
        call!(driver, cuStreamIsCapturing(null_mut(), &mut status)),
        Err(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT)
    );
    call!(driver, cuStreamIsCapturing(stream, &mut status)).unwrap();
    assert_eq!(
        status, CU_STREAM_CAPTURE_STATUS_ACTIVE,
        "asking is harmless"
    );
    assert_eq!(
        driver.memset(plain, 0, 1),
        Err(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT)
    );
    assert_eq!(end(&driver, stream).map(|_| ()), KILLED);
}

#[test]
fn events_do_not_cross_the_border_of_a_capture() {
    let Scene {
        driver,
        other,
        event,
        ..
    } = Scene::new();
    let (stream, inside) = (driver.stream().unwrap(), driver.event().unwrap());
    begin(&driver, stream, RELAXED);
    call!(driver, cuEventRecord(inside, stream)).unwrap();
    call!(driver, cuStreamWaitEvent(stream, inside, 0)).unwrap();
    assert_eq!(
        call!(driver, cuStreamWaitEvent(stream, event.0, 0)),
        Err(CUDA_ERROR_STREAM_CAPTURE_ISOLATION)
    );
    assert_eq!(end(&driver, stream).map(|_| ()), KILLED);
    for call in [
        |driver: &Driver, event, _: CUstream| call!(driver, cuEventQuery(event)),
        |driver: &Driver, event, stream| call!(driver, cuStreamWaitEvent(stream, event, 0)),
    ] {
        begin(&driver, stream, RELAXED);
        call!(driver, cuEventRecord(inside, stream)).unwrap();
        assert_eq!(
            call(&driver, inside, other.0),
            Err(CUDA_ERROR_CAPTURED_EVENT)
        );
        assert_eq!(end(&driver, stream).map(|_| ()), KILLED);
    }
    call!(driver, cuEventRecord(inside, stream)).unwrap();
    assert_eq!(
        call!(driver, cuEventSynchronize(inside)),
        Ok(()),
        "recorded anew"
    );
}

#[test]
fn a_capture_ends_on_its_thread_unless_relaxed() {
    let scene = Scene::new();
    let end_there = |stream: CUstream| {
        let stream = Shared(stream);
        let ended = std::thread::scope(|scope| {
            let end_it = || {
                call!(scene.driver, cuCtxSetCurrent(scene.context.get())).unwrap();
                end(&scene.driver, stream.get()).map(|_| ())
            };
            scope.spawn(end_it).join().unwrap()
        });
        (ended, stream.get())
    };
    let driver = &scene.driver;
    let stream = driver.stream().unwrap();
    begin(driver, stream, THREAD_LOCAL);
    assert_eq!(
        end_there(stream).0,
        Err(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD)
    );
    assert!(end(driver, stream).is_ok(), "still capturing");
    begin(driver, stream, RELAXED);
    assert_eq!(end_there(stream).0, Ok(()));
}

#[test]
fn what_cannot_be_captured_kills_the_capture() {
    let Scene { driver, plain, .. } = Scene::new();
    let stream = driver.stream().unwrap();
    begin(&driver, stream, GLOBAL);
    assert_eq!(
        call!(driver, cuMemFreeAsync(plain, stream)),
        Err(CUDA_ERROR_INVALID_VALUE)
    );
    let graph = end(&driver, stream).unwrap();
    let mut exec = null_mut();
    call!(driver, cuGraphInstantiateWithFlags(&mut exec, graph, 0)).unwrap();
    begin(&driver, stream, GLOBAL);
    assert_eq!(call!(driver, cuGraphLaunch(exec, stream)), UNSUPPORTED);
    assert_eq!(end(&driver, stream).map(|_| ()), KILLED);
    begin(&driver, stream, GLOBAL);
    assert_eq!(call!(driver, cuGraphUpload(exec, stream)), UNSUPPORTED);
    assert_eq!(end(&driver, stream).map(|_| ()), KILLED);
}

/// Makes a graph that fills a page with 42, copies half of it onto itself, copies it to the host,
/// and counts launches.
#[test]
fn a_replay_works_on_what_is_mapped_now() {
    use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
    unsafe extern "C" fn count(data: *mut std::ffi::c_void) {
        // SAFETY: the counter outlives the graph's launches.
        unsafe { &*data.cast::<AtomicU32>() }.fetch_add(1, Ordering::SeqCst);
    }
    let Scene {
        driver,
        mapped,
        event,
        ..
    } = Scene::new();
    let stream = driver.stream().unwrap();
    let counter = AtomicU32::new(0);
    let source = [42; 8].map(AtomicU8::new);
    let mut seen = [0u8; 8];
    begin(&driver, stream, GLOBAL);
    call!(
        driver,
        cuMemcpyHtoDAsync(mapped, source.as_ptr().cast(), 8, stream)
    )
    .unwrap();
    driver.memset_async(mapped + 4, 7, 2, stream).unwrap();
    call!(driver, cuMemcpyDtoDAsync(mapped + 8, mapped, 8, stream)).unwrap();
    call!(driver, cuEventRecord(event.0, stream)).unwrap();
    call!(
        driver,
        cuLaunchHostFunc(stream, Some(count), (&raw const counter).cast_mut().cast())
    )
    .unwrap();
    call!(
        driver,
        cuMemcpyDtoHAsync(seen.as_mut_ptr().cast(), mapped + 8, 8, stream)
    )
    .unwrap();
    let graph = end(&driver, stream).unwrap();
    assert_eq!(
        driver.read(mapped, 2).unwrap(),
        [0, 0],
        "capturing does nothing"
    );
    let mut exec = null_mut();
    call!(driver, cuGraphInstantiateWithFlags(&mut exec, graph, 0)).unwrap();
    call!(driver, cuGraphDestroy(graph)).unwrap();
    assert_eq!(
        call!(driver, cuGraphLaunch(exec.cast(), null_mut())),
        Ok(())
    );
    call!(driver, cuStreamSynchronize(null_mut())).unwrap();
    assert_eq!(seen, [42, 42, 42, 42, 7, 7, 42, 42]);

    driver.unmap(mapped, PAGE).unwrap();
    driver.back(mapped, PAGE).unwrap();
    source[0].store(43, Ordering::SeqCst);
    call!(driver, cuGraphLaunch(exec, stream)).unwrap();
    call!(driver, cuStreamSynchronize(stream)).unwrap();
    assert_eq!(
        driver.read(mapped, 2).unwrap(),
        [43, 42],
        "other memory, and the host's bytes of now"
    );
    assert_eq!(counter.load(Ordering::SeqCst), 2);

    driver.unmap(mapped, PAGE).unwrap();
    assert_eq!(
        call!(driver, cuGraphLaunch(exec, stream)),
        Ok(()),
        "the launch succeeds"
    );
    assert_eq!(
        call!(driver, cuStreamSynchronize(stream)),
        Err(CUDA_ERROR_ILLEGAL_ADDRESS)
    );
    let mut plain = 0;
    assert_eq!(
        call!(driver, cuMemAlloc(&mut plain, PAGE)),
        Err(CUDA_ERROR_ILLEGAL_ADDRESS)
    );
    assert_eq!(
        counter.load(Ordering::SeqCst),
        2,
        "nothing runs after the illegal access"
    );
}
