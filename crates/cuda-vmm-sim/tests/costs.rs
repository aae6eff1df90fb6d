//! The cost model on virtual clocks.
#![allow(
    clippy::macro_metavars_in_unsafe,
    reason = "every call of the table is unsafe"
)]

mod common;
use common::*;

fn costly() -> Driver {
    Driver::new(
        SimConfig::new()
            .devices(2)
            .unbacked()
            .cost_model(CostModel::h100()),
    )
}

/// Returns how far the calling thread's clock advances, in microseconds.
fn us(driver: &Driver, work: impl FnOnce()) -> f64 {
    let before = driver.simulator.thread_clock_ns();
    work();
    (driver.simulator.thread_clock_ns() - before) as f64 / 1e3
}

#[test]
fn without_a_model_nothing_costs() {
    let driver = Driver::small();
    let address = driver.reserve(PAGE).unwrap();
    driver.back(address, PAGE).unwrap();
    driver.memset(address, 1, PAGE).unwrap();
    driver.simulator.advance_thread_clock_ns(5);
    assert_eq!(driver.simulator.thread_clock_ns(), 0);
}

#[test]
fn calls_cost_what_was_measured_for_each_mapping() {
    let driver = costly();
    let address = driver.reserve(4 << 30).unwrap();
    for (mib, create, map, set_access, unmap, release) in [
        (2, 7.6, 0.6, 19.7, 14.0, 9.7),
        (64, 8.2, 0.6, 34.4, 21.7, 27.6),
        (1024, 39.3, 0.8, 59.1, 30.4, 290.8),
    ] {
        let bytes = mib << 20;
        let mut handle = 0;
        assert_eq!(
            us(&driver, || handle = driver.create(bytes).unwrap()),
            create
        );
        assert_eq!(
            us(&driver, || driver.map(address, bytes, handle).unwrap()),
            map
        );
        assert_eq!(
            us(&driver, || driver.open(address, bytes).unwrap()),
            set_access
        );
        assert_eq!(us(&driver, || driver.unmap(address, bytes).unwrap()), unmap);
        assert_eq!(us(&driver, || driver.release(handle).unwrap()), release);
    }
    for page in 0..512 {
        let handle = driver.create(PAGE).unwrap();
        driver
            .map(address + page * PAGE as u64, PAGE, handle)
            .unwrap();
    }
    assert_eq!(
        us(&driver, || driver.open(address, 512 * PAGE).unwrap()),
        512.0 * 19.7,
        "batching saves nothing"
    );
    let both = [descriptor(0, 3), descriptor(1, 3)];
    assert_eq!(
        us(&driver, || driver.set_access(address, PAGE, &both).unwrap()),
        949.9,
        "a peer is dear"
    );
    assert_eq!(us(&driver, || driver.unmap(address, PAGE).unwrap()), 58.3);
    assert_eq!(
        us(&driver, || driver.unmap(address, 512 * PAGE).unwrap()),
        511.0 * 14.0
    );
}

#[test]
fn threads_share_one_driver_lock() {
    let driver = costly();
    let clocks: Vec<u64> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    for _ in 0..100 {
                        let handle = driver.create(PAGE).unwrap();
                        driver.release(handle).unwrap();
                    }
                    driver.simulator.thread_clock_ns()
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    let all = 400 * (7_600 + 9_700);
    assert_eq!(
        clocks.iter().max(),
        Some(&all),
        "the last thread ends when all calls are done"
    );
    assert!(clocks.iter().all(|&clock| clock >= 100 * (7_600 + 9_700)));
}

#[test]
fn work_moves_the_streams_clock_and_waiting_the_threads() {
    let driver = costly();
    let address = driver.reserve(2 << 30).unwrap();
    driver.back(address, 2 << 30).unwrap();
    let (stream, start, end) = (
        driver.stream().unwrap(),
        driver.event().unwrap(),
        driver.event().unwrap(),
    );
    call!(driver, cuEventRecord(start, stream)).unwrap();
    let launched = us(&driver, || {
        driver.memset_async(address, 1, 2 << 30, stream).unwrap()
    });
    assert!(launched < 10.0, "{launched}");
    call!(driver, cuEventRecord(end, stream)).unwrap();
    let waited = us(&driver, || call!(driver, cuEventSynchronize(end)).unwrap());
    assert!(
        (690.0..730.0).contains(&waited),
        "2 GiB at 3 TB/s, not {waited} us"
    );
    let mut milliseconds = 0.0;
    call!(driver, cuEventElapsedTime(&mut milliseconds, start, end)).unwrap();
    assert!((0.69..0.74).contains(&milliseconds), "{milliseconds}");
    driver.memset_async(address, 1, 2 << 30, stream).unwrap();
    driver.simulator.advance_thread_clock_ns(10_000_000);
    assert_eq!(
        us(&driver, || call!(driver, cuStreamSynchronize(stream))
            .unwrap()),
        0.0,
        "it is long over"
    );
    let copied = us(&driver, || {
        let mut data = vec![0u8; 64 << 20];
        call!(
            driver,
            cuMemcpyDtoH(data.as_mut_ptr().cast(), address, data.len())
        )
        .unwrap();
    });
    assert!(
        (1_200.0..1_300.0).contains(&copied),
        "64 MiB at 55 GB/s, not {copied} us"
    );
}

#[test]
fn waits_carry_virtual_time_from_stream_to_stream() {
    let driver = costly();
    let address = driver.reserve(4 << 30).unwrap();
    driver.back(address, 4 << 30).unwrap();
    let (first, second, event) = (
        driver.stream().unwrap(),
        driver.stream().unwrap(),
        driver.event().unwrap(),
    );
    driver.memset_async(address, 1, 2 << 30, first).unwrap();
    call!(driver, cuEventRecord(event, first)).unwrap();
    // The second stream does not wait for later work of the first.
    driver.memset_async(address, 1, 2 << 30, first).unwrap();
    call!(driver, cuStreamWaitEvent(second, event, 0)).unwrap();
    driver.memset_async(address, 2, 1 << 20, second).unwrap();
    let synchronize = |stream| call!(driver, cuStreamSynchronize(stream)).unwrap();
    let second_us = us(&driver, || synchronize(second));
    assert!((680.0..730.0).contains(&second_us), "{second_us}");
    let first_us = us(&driver, || synchronize(first));
    assert!((680.0..730.0).contains(&first_us), "{first_us}");

    // The legacy stream starts when the blocking one becomes free, even if that is in the past.
    let blocking = driver.stream_with(CU_STREAM_DEFAULT).unwrap();
    driver.memset_async(address, 1, 2 << 30, blocking).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    let legacy_us = us(&driver, || driver.memset(address, 1, 1 << 20).unwrap());
    assert!((690.0..730.0).contains(&legacy_us), "{legacy_us}");
}
