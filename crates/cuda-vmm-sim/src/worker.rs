//! Runs queued work: the streams' threads, and the calls that wait for them.

use crate::state::streams::{Item, Key, Point};
use crate::state::work::Work;
use crate::state::{DriverResult, Guard, Inner, State};
use cuda_vmm_sys::*;
use std::sync::Arc;

impl State {
    /// Queues work behind a stream's earlier work, and behind other streams' work if the order of
    /// the legacy stream requires it. A marker with no work before it completes at once.
    pub(crate) fn enqueue(
        self: &Arc<Self>,
        inner: &mut Inner,
        key: Key,
        work: Work,
    ) -> DriverResult<u64> {
        let after = inner.streams.implicit_order(key);
        self.enqueue_after(inner, key, after, work)
    }

    /// As [`enqueue`](Self::enqueue), and behind the given points of other streams.
    pub(crate) fn enqueue_after(
        self: &Arc<Self>,
        inner: &mut Inner,
        key: Key,
        after: Vec<Point>,
        work: Work,
    ) -> DriverResult<u64> {
        let at_once = work.is_marker() && inner.can_start(key, &after)?;
        if !at_once {
            self.ensure_worker(inner, key)?;
        }
        let sequence = inner.admit(key, &work)?;
        if at_once {
            inner.complete_marker(&work);
            inner.streams.get_mut(key)?.completed = sequence;
        } else {
            let item = Item {
                sequence,
                after,
                work,
            };
            inner.streams.get_mut(key)?.queue.push_back(item);
        }
        self.notify();
        Ok(sequence)
    }

    /// Queues work and waits until it completes. If no work is before it, the calling thread runs
    /// it.
    pub(crate) fn run_in_order(
        self: &Arc<Self>,
        mut inner: Guard<'_>,
        key: Key,
        work: Work,
    ) -> DriverResult {
        let after = inner.streams.implicit_order(key);
        let device = inner.streams.get(key)?.device;
        let (inner, sequence, clock_ns) = if inner.can_start(key, &after)? {
            let sequence = inner.admit(key, &work)?;
            let stream = inner.streams.get_mut(key)?;
            stream.busy = true;
            let clock_ns = stream.clock_ns;
            let item = Item {
                sequence,
                after,
                work,
            };
            (self.run(inner, key, item), sequence, clock_ns)
        } else {
            let sequence = self.enqueue_after(&mut inner, key, after, work)?;
            let clock_ns = inner.streams.get(key)?.clock_ns;
            (inner, sequence, clock_ns)
        };
        let inner = self.wait_for(inner, device, &[(key, sequence)])?;
        inner.advance_thread_to(clock_ns);
        Ok(())
    }

    fn ensure_worker(self: &Arc<Self>, inner: &mut Inner, key: Key) -> DriverResult {
        let stream = inner.streams.get_mut(key)?;
        if stream.has_worker {
            return Ok(());
        }
        let state = Arc::clone(self);
        let worker = std::thread::Builder::new()
            .name(format!("simulated stream {key:x}"))
            .spawn(move || state.work(key))
            .map_err(|_| CUDA_ERROR_OPERATING_SYSTEM)?;
        stream.has_worker = true;
        inner.streams.workers.retain(|worker| !worker.is_finished());
        inner.streams.workers.push(worker);
        Ok(())
    }

    /// The loop of a stream's thread.
    fn work(&self, key: Key) {
        let mut inner = self.lock();
        while !inner.closing {
            if let Some(item) = inner.next_item(key) {
                inner = self.run(inner, key, item);
                continue;
            }
            match inner.streams.get_mut(key) {
                Ok(stream) if !(stream.destroyed && stream.is_idle()) => inner = self.wait(inner),
                Ok(stream) => {
                    stream.has_worker = false;
                    inner.streams.reap(key);
                    break;
                }
                Err(_) => break,
            }
        }
    }

    /// Runs work that was taken from the queue.
    fn run<'a>(&'a self, inner: Guard<'a>, key: Key, item: Item) -> Guard<'a> {
        let mut inner = match inner.streams.get(key).map(|stream| stream.device) {
            Ok(device) => self.perform(inner, device, item.work),
            Err(_) => inner,
        };
        if let Ok(stream) = inner.streams.get_mut(key) {
            stream.busy = false;
            stream.completed = stream.completed.max(item.sequence);
        }
        inner.streams.reap(key);
        self.notify();
        inner
    }

    /// Waits until this work completes. Fails if the context is then poisoned.
    pub(crate) fn wait_for<'a>(
        &'a self,
        mut inner: Guard<'a>,
        device: usize,
        points: &[Point],
    ) -> DriverResult<Guard<'a>> {
        loop {
            inner.contexts.check(device)?;
            if inner.streams.are_done(points) {
                return Ok(inner);
            }
            if inner.closing {
                return Err(CUDA_ERROR_DEINITIALIZED);
            }
            inner = self.wait(inner);
        }
    }

    /// Waits until a device has completed all work that it has now.
    pub(crate) fn wait_for_device<'a>(
        &'a self,
        inner: Guard<'a>,
        device: usize,
    ) -> DriverResult<Guard<'a>> {
        let points = inner.streams.pending(device);
        let clock_ns = inner.streams.device_clock_ns(device);
        let inner = self.wait_for(inner, device, &points)?;
        inner.advance_thread_to(clock_ns);
        Ok(inner)
    }
}

impl Inner {
    /// Returns whether new work behind these points could start now.
    fn can_start(&self, key: Key, after: &[Point]) -> DriverResult<bool> {
        let idle = self.streams.get(key)?.is_idle();
        Ok(idle && !self.held && self.streams.are_done(after))
    }

    /// Takes the next work of a stream from the queue, if it may start.
    fn next_item(&mut self, key: Key) -> Option<Item> {
        let stream = self.streams.by_key.get(&key)?;
        let next = stream.queue.front()?;
        if self.held || stream.busy || !self.streams.are_done(&next.after) {
            return None;
        }
        let stream = self.streams.by_key.get_mut(&key)?;
        stream.busy = true;
        stream.queue.pop_front()
    }

    /// Numbers work and charges it to the virtual clocks.
    fn admit(&mut self, key: Key, work: &Work) -> DriverResult<u64> {
        let thread = self.threads;
        let others_ns = match work {
            Work::Wait { clock_ns } => *clock_ns,
            _ => self.streams.implicit_clock_ns(key),
        };
        let cost = self
            .cost
            .as_ref()
            .map(|cost| (work.launch_ns(cost), work.duration_ns(cost)));
        let stream = self.streams.get_mut(key)?;
        stream.enqueued += 1;
        if let Some((launch_ns, duration_ns)) = cost {
            thread.update(|thread| thread.clock_ns += launch_ns);
            let start_ns = stream.clock_ns.max(thread.get().clock_ns).max(others_ns);
            stream.clock_ns = start_ns + duration_ns;
        }
        Ok(stream.enqueued)
    }
}
