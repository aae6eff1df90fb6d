//! The calls for events: create, destroy, record, query and wait.

use crate::state::events::{Event, FIRST_KEY};
use crate::state::streams::Point;
use crate::state::work::Work;
use crate::state::{DriverResult, Inner, State};
use cuda_vmm_sys::*;
use std::sync::Arc;

impl State {
    pub(crate) fn event_create(&self, flags: u32) -> DriverResult<CUevent> {
        const BLOCKING_SYNC: u32 = 1;
        if flags & !(BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING) != 0 {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        let mut inner = self.lock();
        let device = inner.enter()?;
        let events = &mut inner.events;
        let key = FIRST_KEY + 16 * events.made;
        events.made += 1;
        let event = Event {
            device,
            timed: flags & CU_EVENT_DISABLE_TIMING == 0,
            records: 0,
            points: Vec::new(),
            done_at: None,
            clock_ns: 0,
            capture: None,
        };
        events.by_key.insert(key, event);
        Ok(std::ptr::without_provenance_mut(key as usize))
    }

    /// Destroys an event. In a poisoned context it does so too, but returns the context's error.
    pub(crate) fn event_destroy(&self, handle: CUevent) -> DriverResult {
        let mut inner = self.lock();
        inner.current_device()?;
        let event = inner.events.by_key.remove(&(handle.addr() as u64));
        let device = event.ok_or(CUDA_ERROR_INVALID_HANDLE)?.device;
        inner.contexts.check(device)
    }

    pub(crate) fn event_record(
        self: &Arc<Self>,
        handle: CUevent,
        stream: CUstream,
    ) -> DriverResult {
        let mut inner = self.lock();
        let key = inner.enter_stream(stream)?;
        let device = inner.streams.get(key)?.device;
        let event = inner.events.get(handle)?;
        if event.device != device {
            return Err(CUDA_ERROR_INVALID_HANDLE);
        }
        if let Some(capture) = &mut inner.streams.get_mut(key)?.capture {
            let capture = capture.mark()?;
            inner.events.get(handle)?.capture = Some(capture);
            return Ok(());
        }
        inner.check_implicit(key)?;
        let marker = inner.begin_record(handle)?;
        let sequence = self.enqueue(&mut inner, key, marker)?;
        let clock_ns = inner.streams.get(key)?.clock_ns;
        inner.end_record(handle, vec![(key, sequence)], clock_ns)
    }

    /// `cuCtxRecordEvent`: records an event behind all work that the context has now.
    pub(crate) fn context_record_event(
        self: &Arc<Self>,
        context: CUcontext,
        handle: CUevent,
    ) -> DriverResult {
        let mut inner = self.lock();
        let device = inner.contexts.device(context)?;
        inner.contexts.check(device)?;
        if inner.events.get(handle)?.device != device {
            return Err(CUDA_ERROR_INVALID_HANDLE);
        }
        inner.invalidate_captures_of(device)?;
        let mut keys: Vec<_> = inner
            .streams
            .pending(device)
            .iter()
            .map(|(key, _)| *key)
            .collect();
        if keys.is_empty() {
            keys.push(inner.streams.legacy(device));
        }
        let marker = inner.begin_record(handle)?;
        let mut points = Vec::with_capacity(keys.len());
        for key in keys {
            let sequence =
                self.enqueue_after(&mut inner, key, Vec::new(), marker.clone_marker())?;
            points.push((key, sequence));
        }
        let clock_ns = inner.streams.device_clock_ns(device);
        inner.end_record(handle, points, clock_ns)
    }

    pub(crate) fn event_query(&self, handle: CUevent) -> DriverResult {
        let mut inner = self.lock();
        let points = inner.event_points(handle)?;
        if inner.streams.are_done(&points) {
            Ok(())
        } else {
            Err(CUDA_ERROR_NOT_READY)
        }
    }

    pub(crate) fn event_synchronize(&self, handle: CUevent) -> DriverResult {
        let mut inner = self.lock();
        let points = inner.event_points(handle)?;
        let event = inner.events.get(handle)?;
        let (device, clock_ns) = (event.device, event.clock_ns);
        let inner = self.wait_for(inner, device, &points)?;
        inner.advance_thread_to(clock_ns);
        Ok(())
    }

    /// `cuStreamWaitEvent`: later work of the stream starts after the event's last record.
    pub(crate) fn stream_wait_event(
        self: &Arc<Self>,
        stream: CUstream,
        handle: CUevent,
    ) -> DriverResult {
        let mut inner = self.lock();
        let key = inner.enter_stream(stream)?;
        let event = inner.events.get(handle)?;
        let (points, clock_ns, recorded_in) = (event.points.clone(), event.clock_ns, event.capture);
        if let Some(capture) = &mut inner.streams.get_mut(key)?.capture {
            return capture.wait(recorded_in);
        }
        if let Some(capture) = recorded_in {
            // The simulator cannot add another stream to a capture.
            inner.invalidate(capture);
            return Err(CUDA_ERROR_CAPTURED_EVENT);
        }
        inner.check_implicit(key)?;
        let mut after = points;
        after.retain(|&(other, _)| other != key);
        after.extend(inner.streams.implicit_order(key));
        self.enqueue_after(&mut inner, key, after, Work::Wait { clock_ns })?;
        Ok(())
    }

    /// Returns the milliseconds between two events: on the virtual clocks with a cost model,
    /// otherwise on the host's.
    pub(crate) fn event_elapsed(&self, start: CUevent, end: CUevent) -> DriverResult<f32> {
        let mut inner = self.lock();
        inner.enter()?;
        let mut times = [(None, 0); 2];
        for (time, handle) in times.iter_mut().zip([start, end]) {
            let event = inner.events.get(handle)?;
            if !event.timed || event.records == 0 {
                return Err(CUDA_ERROR_INVALID_HANDLE);
            }
            let points = event.points.clone();
            *time = (event.done_at, event.clock_ns);
            if !inner.streams.are_done(&points) {
                return Err(CUDA_ERROR_NOT_READY);
            }
        }
        let [(started, start_ns), (ended, end_ns)] = times;
        if inner.cost.is_some() {
            return Ok(((end_ns as f64 - start_ns as f64) / 1e6) as f32);
        }
        let (Some(started), Some(ended)) = (started, ended) else {
            return Err(CUDA_ERROR_NOT_READY);
        };
        let sign = if ended < started { -1.0 } else { 1.0 };
        let between = ended.max(started) - started.min(ended);
        Ok(sign * between.as_secs_f32() * 1e3)
    }
}

impl Inner {
    /// Returns the work that an event waits for, for a call that is unsafe during capture.
    fn event_points(&mut self, handle: CUevent) -> DriverResult<Vec<Point>> {
        self.enter()?;
        let event = self.events.get(handle)?;
        let (device, capture, points) = (event.device, event.capture, event.points.clone());
        self.contexts.check(device)?;
        if let Some(capture) = capture {
            self.invalidate(capture);
            return Err(CUDA_ERROR_CAPTURED_EVENT);
        }
        self.unsafe_call()?;
        Ok(points)
    }

    fn begin_record(&mut self, handle: CUevent) -> DriverResult<Work> {
        let event = self.events.get(handle)?;
        event.records += 1;
        event.done_at = None;
        Ok(Work::Record {
            event: handle.addr() as u64,
            record: event.records,
        })
    }

    fn end_record(&mut self, handle: CUevent, points: Vec<Point>, clock_ns: u64) -> DriverResult {
        let event = self.events.get(handle)?;
        event.points = points;
        event.clock_ns = clock_ns;
        event.capture = None;
        Ok(())
    }
}
