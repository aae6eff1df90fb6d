//! Streams that go while they have work, and work of leases on streams that are not named.

use crate::common::{Gate, under_test};
use crate::{case, page, pool};
use cuda_vmm::Stream;
use std::sync::Arc;

#[test]
fn the_last_work_of_a_stream_that_goes_is_waited_for() {
    for forgets in [false, true] {
        case(|device| {
            let page = page();
            let (engine, pool) = pool(device, 2);
            let [stream, _other] = [(); 2].map(|()| {
                let stream = Stream::new(device).expect("a stream");
                pool.use_stream(&stream).expect("of this device");
                stream
            });
            let address = pool.allocate(0, page).expect("room");
            let gate = Gate::close(device, stream.raw());
            // SAFETY: the pool keeps the memory mapped until the stream is past this.
            unsafe { stream.memset(address, 91, page) }.expect("queued");
            gate.wait_until_reached();
            if forgets {
                pool.forget_stream(&stream).expect("named");
            }
            drop(stream);
            pool.deallocate(0, page).expect("live");
            for _ in 0..3 {
                let report = engine.step();
                assert_eq!((report.drained_bytes, report.retiring_bytes), (0, page));
            }
            assert!(gate.is_closed(), "no call waited");
            gate.open();
            device.synchronize().expect("the memset met mapped memory");
            assert_eq!(engine.step().drained_bytes, page);
            pool.close().expect("closed");
        });
    }
}

#[test]
fn work_of_a_lease_is_waited_for_on_whichever_device_it_is() {
    for at in 0..under_test().devices.len() {
        case(|device| {
            let page = page();
            let worker = &under_test().devices[at];
            let (engine, pool) = pool(device, 2);
            let stream = Stream::new(device).expect("a stream");
            let unnamed = Stream::new(worker).expect("a stream");
            pool.use_stream(&stream).expect("of this device");
            pool.allocate(0, page).expect("room");
            let token = Arc::new(());
            pool.lease(0, page, token.clone()).expect("live");
            let gate = Gate::close(worker, unnamed.raw());
            gate.wait_until_reached();
            drop(token);
            pool.deallocate(0, page).expect("live");
            // A driver without events of contexts would have a step wait for the gate.
            let has_event = device.driver().table().cuCtxRecordEvent.is_some();
            for _ in 0..if has_event { 3 } else { 0 } {
                let report = engine.step();
                assert_eq!((report.drained_bytes, report.retiring_bytes), (0, page));
            }
            assert!(gate.is_closed(), "no call waited");
            gate.open();
            worker.synchronize().expect("done");
            assert_eq!(engine.step().drained_bytes, page);
            pool.close().expect("closed");
        });
    }
}
