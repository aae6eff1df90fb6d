//! Streams: queues of work, each run in order by a thread of its own.
//!
//! The legacy stream of a device runs after the earlier work of the device's blocking streams (those
//! created without `CU_STREAM_NON_BLOCKING`, and the per-thread ones), and their later work runs after
//! it. A per-thread stream exists for each calling thread that uses one.

use crate::capture::Capture;
use crate::state::{Answer, Guard, Inner, State};
use crate::work::Work;
use cuda_vmm_sys::*;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::thread::{JoinHandle, ThreadId};

/// Which stream; never used twice. Also the value of its handle, which is never followed.
pub(crate) type Key = u64;

/// A place in a stream: the piece of work with this number.
pub(crate) type Point = (Key, u64);

/// A queued piece of work.
#[derive(Debug)]
pub(crate) struct Item {
    pub(crate) sequence: u64,
    /// What has to be done before it starts, in other streams.
    pub(crate) after: Vec<Point>,
    pub(crate) work: Work,
}

/// One stream.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) device: usize,
    /// Ordered with the legacy stream.
    blocking: bool,
    /// Made by `cuStreamCreate`.
    created: bool,
    /// Its handle is no longer valid; it goes when its queue is empty.
    destroyed: bool,
    queue: VecDeque<Item>,
    /// How many pieces of work there have been.
    pub(crate) enqueued: u64,
    /// How many of them are done.
    completed: u64,
    /// A piece of work is running.
    busy: bool,
    has_worker: bool,
    /// When the work enqueued so far ends, in virtual nanoseconds.
    pub(crate) clock_ns: u64,
    pub(crate) capture: Option<Capture>,
}

impl Stream {
    fn is_idle(&self) -> bool {
        self.queue.is_empty() && !self.busy
    }
}

/// All streams of one simulator.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    by_key: BTreeMap<Key, Stream>,
    legacy: Vec<Key>,
    per_thread: HashMap<(usize, ThreadId), Key>,
    workers: Vec<JoinHandle<()>>,
    made: u64,
}

/// The first key; the small numbers are the handles of the default streams.
const FIRST_KEY: Key = 0x57_0000;

impl Streams {
    pub(crate) fn add_legacy(&mut self, devices: usize) {
        self.legacy = (0..devices)
            .map(|device| self.add(device, false, false))
            .collect();
    }

    fn add(&mut self, device: usize, blocking: bool, created: bool) -> Key {
        let key = FIRST_KEY + 16 * self.made;
        self.made += 1;
        let stream = Stream {
            device,
            blocking,
            created,
            destroyed: false,
            queue: VecDeque::new(),
            enqueued: 0,
            completed: 0,
            busy: false,
            has_worker: false,
            clock_ns: 0,
            capture: None,
        };
        self.by_key.insert(key, stream);
        key
    }

    pub(crate) fn get(&self, key: Key) -> Answer<&Stream> {
        self.by_key.get(&key).ok_or(CUDA_ERROR_INVALID_HANDLE)
    }

    pub(crate) fn get_mut(&mut self, key: Key) -> Answer<&mut Stream> {
        self.by_key.get_mut(&key).ok_or(CUDA_ERROR_INVALID_HANDLE)
    }

    /// Whether a piece of work is done; the work of streams that are gone is.
    pub(crate) fn is_done(&self, (key, sequence): Point) -> bool {
        let stream = self.by_key.get(&key);
        stream.is_none_or(|stream| stream.completed >= sequence)
    }

    /// Whether all these pieces of work are done.
    pub(crate) fn are_done(&self, points: &[Point]) -> bool {
        points.iter().all(|&point| self.is_done(point))
    }

    /// The last piece of work of every stream of a device that has not done all its work.
    pub(crate) fn pending(&self, device: usize) -> Vec<Point> {
        let mine = self
            .by_key
            .iter()
            .filter(|(_, stream)| stream.device == device);
        mine.filter(|(_, stream)| stream.completed < stream.enqueued)
            .map(|(&key, stream)| (key, stream.enqueued))
            .collect()
    }

    /// How many streams `cuStreamCreate` made on a device that were not destroyed.
    pub(crate) fn created(&self, device: usize) -> usize {
        let mine = self
            .by_key
            .values()
            .filter(|stream| stream.device == device);
        mine.filter(|stream| stream.created && !stream.destroyed)
            .count()
    }

    pub(crate) fn legacy(&self, device: usize) -> Key {
        self.legacy[device]
    }

    /// When the work of a device ends, in virtual nanoseconds.
    pub(crate) fn device_clock_ns(&self, device: usize) -> u64 {
        let mine = self
            .by_key
            .values()
            .filter(|stream| stream.device == device);
        mine.map(|stream| stream.clock_ns).max().unwrap_or(0)
    }

    /// The captures under way, each with its stream.
    pub(crate) fn captures(&mut self) -> impl Iterator<Item = (&mut Capture, usize, bool)> {
        self.by_key
            .values_mut()
            .filter_map(|stream| Some((stream.capture.as_mut()?, stream.device, stream.blocking)))
    }

    pub(crate) fn is_legacy(&self, key: Key) -> bool {
        self.legacy.contains(&key)
    }

    /// What has to be done before new work of a stream starts, because one of them is the legacy stream.
    pub(crate) fn implicit_order(&self, key: Key) -> Vec<Point> {
        let Some(stream) = self.by_key.get(&key) else {
            return Vec::new();
        };
        let legacy = self.legacy[stream.device];
        let mut points = self.pending(stream.device);
        points.retain(|&(other, _)| {
            other != key
                && match (key == legacy, other == legacy) {
                    (true, _) => self.by_key[&other].blocking,
                    (false, true) => stream.blocking,
                    (false, false) => false,
                }
        });
        points
    }

    /// Takes a stream out if nobody can use it and nothing of it runs.
    fn reap(&mut self, key: Key) {
        let gone = |stream: &Stream| stream.destroyed && stream.is_idle() && !stream.has_worker;
        if self.by_key.get(&key).is_some_and(gone) {
            self.by_key.remove(&key);
        }
    }

    /// Destroys the streams of a device and drops their work; the legacy one stays, empty.
    pub(crate) fn destroy_all(&mut self, device: usize) {
        self.per_thread.retain(|(owner, _), _| *owner != device);
        let keys: Vec<Key> = self.by_key.keys().copied().collect();
        for key in keys {
            let legacy = self.legacy[device] == key;
            if let Some(stream) = self
                .by_key
                .get_mut(&key)
                .filter(|stream| stream.device == device)
            {
                stream.queue.clear();
                stream.completed = stream.enqueued;
                stream.capture = None;
                stream.destroyed = !legacy;
                self.reap(key);
            }
        }
    }

    pub(crate) fn take_workers(&mut self) -> Vec<JoinHandle<()>> {
        std::mem::take(&mut self.workers)
    }
}

impl Inner {
    /// The stream of a handle, for a call in the current context.
    pub(crate) fn enter_stream(&mut self, handle: CUstream) -> Answer<Key> {
        let device = self.enter()?;
        match handle.addr() {
            0 | 1 => Ok(self.streams.legacy(device)),
            2 => {
                let thread = (device, std::thread::current().id());
                if let Some(&key) = self.streams.per_thread.get(&thread) {
                    return Ok(key);
                }
                let key = self.streams.add(device, true, false);
                self.streams.per_thread.insert(thread, key);
                Ok(key)
            }
            address => {
                let key = address as Key;
                let stream = self.streams.get(key)?;
                if !stream.created || stream.destroyed {
                    return Err(CUDA_ERROR_INVALID_HANDLE);
                }
                self.contexts.check(stream.device)?;
                Ok(key)
            }
        }
    }

    /// Moves the calling thread's virtual clock to the end of work that it has waited for.
    pub(crate) fn thread_reaches(&self, clock_ns: u64) {
        if self.cost.is_some() {
            self.threads
                .update(|thread| thread.clock_ns = thread.clock_ns.max(clock_ns));
        }
    }

    /// Numbers a piece of work and puts it on the virtual clocks.
    fn admit(&mut self, key: Key, after: &[Point], work: &Work) -> Answer<u64> {
        let thread = self.threads;
        let others = after
            .iter()
            .filter_map(|(other, _)| self.streams.get(*other).ok());
        let others_ns = others.map(|stream| stream.clock_ns).max().unwrap_or(0);
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

impl State {
    /// Queues work behind a stream's earlier work and, where the legacy stream is concerned, behind that
    /// of other streams. What only marks a place is done at once if nothing is before it.
    pub(crate) fn enqueue(
        self: &Arc<Self>,
        inner: &mut Inner,
        key: Key,
        work: Work,
    ) -> Answer<u64> {
        let after = inner.streams.implicit_order(key);
        self.enqueue_after(inner, key, after, work)
    }

    /// As [`enqueue`](Self::enqueue), behind the places named in other streams.
    pub(crate) fn enqueue_after(
        self: &Arc<Self>,
        inner: &mut Inner,
        key: Key,
        after: Vec<Point>,
        work: Work,
    ) -> Answer<u64> {
        let at_once = work.is_marker() && inner.can_start(key, &after)?;
        if !at_once {
            self.ensure_worker(inner, key)?;
        }
        let sequence = inner.admit(key, &after, &work)?;
        if at_once {
            inner.pass(&work);
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

    /// Queues work and waits until it is done. If nothing is before it the calling thread runs it.
    pub(crate) fn run_in_order(
        self: &Arc<Self>,
        mut inner: Guard<'_>,
        key: Key,
        work: Work,
    ) -> Answer {
        let after = inner.streams.implicit_order(key);
        let device = inner.streams.get(key)?.device;
        let (inner, sequence) = if inner.can_start(key, &after)? {
            let sequence = inner.admit(key, &after, &work)?;
            inner.streams.get_mut(key)?.busy = true;
            let item = Item {
                sequence,
                after,
                work,
            };
            (self.run(inner, key, item), sequence)
        } else {
            let sequence = self.enqueue_after(&mut inner, key, after, work)?;
            (inner, sequence)
        };
        let inner = self.wait_for(inner, device, &[(key, sequence)])?;
        if let Ok(stream) = inner.streams.get(key) {
            inner.thread_reaches(stream.clock_ns);
        }
        Ok(())
    }

    fn ensure_worker(self: &Arc<Self>, inner: &mut Inner, key: Key) -> Answer {
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

    /// A stream's thread.
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

    /// Runs a piece of work that is no longer in the queue.
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

    /// Waits until these pieces of work are done; an error if the context is poisoned by then.
    pub(crate) fn wait_for<'a>(
        &'a self,
        mut inner: Guard<'a>,
        device: usize,
        points: &[Point],
    ) -> Answer<Guard<'a>> {
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

    /// Waits until a device has done all the work it has now.
    pub(crate) fn wait_for_device<'a>(
        &'a self,
        inner: Guard<'a>,
        device: usize,
    ) -> Answer<Guard<'a>> {
        let points = inner.streams.pending(device);
        let clock_ns = inner.streams.device_clock_ns(device);
        let inner = self.wait_for(inner, device, &points)?;
        inner.thread_reaches(clock_ns);
        Ok(inner)
    }

    pub(crate) fn stream_create(&self, flags: u32) -> Answer<CUstream> {
        if flags & !CU_STREAM_NON_BLOCKING != 0 {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        let mut inner = self.lock();
        let device = inner.enter()?;
        let key = inner
            .streams
            .add(device, flags & CU_STREAM_NON_BLOCKING == 0, true);
        Ok(std::ptr::without_provenance_mut(key as usize))
    }

    /// Makes the handle invalid; work that is queued still runs. In a poisoned context the stream goes
    /// too, but the answer is the context's error.
    pub(crate) fn stream_destroy(&self, handle: CUstream) -> Answer {
        let mut inner = self.lock();
        inner.current_device()?;
        let key = handle.addr() as Key;
        let stream = inner.streams.get_mut(key)?;
        if !stream.created || stream.destroyed {
            return Err(CUDA_ERROR_INVALID_HANDLE);
        }
        stream.destroyed = true;
        stream.capture = None;
        let device = stream.device;
        inner.streams.reap(key);
        self.notify();
        inner.contexts.check(device)
    }

    pub(crate) fn stream_query(&self, handle: CUstream) -> Answer {
        let mut inner = self.lock();
        let key = inner.enter_stream(handle)?;
        inner.refuse_in_capture(key)?;
        inner.check_implicit(key)?;
        inner.unsafe_call()?;
        let stream = inner.streams.get(key)?;
        if stream.completed >= stream.enqueued {
            Ok(())
        } else {
            Err(CUDA_ERROR_NOT_READY)
        }
    }

    pub(crate) fn stream_synchronize(&self, handle: CUstream) -> Answer {
        let mut inner = self.lock();
        let key = inner.enter_stream(handle)?;
        inner.refuse_in_capture(key)?;
        inner.check_implicit(key)?;
        inner.unsafe_call()?;
        let stream = inner.streams.get(key)?;
        let (device, sequence, clock_ns) = (stream.device, stream.enqueued, stream.clock_ns);
        let inner = self.wait_for(inner, device, &[(key, sequence)])?;
        inner.thread_reaches(clock_ns);
        Ok(())
    }

    /// `cuCtxSynchronize`.
    pub(crate) fn synchronize(&self) -> Answer {
        let mut inner = self.lock();
        let device = inner.enter()?;
        inner.kill_captures_of(device)?;
        self.wait_for_device(inner, device).map(drop)
    }
}

impl Inner {
    /// Whether new work behind these places could start now.
    fn can_start(&self, key: Key, after: &[Point]) -> Answer<bool> {
        let idle = self.streams.get(key)?.is_idle();
        Ok(idle && !self.held && self.streams.are_done(after))
    }

    /// Takes the next piece of work of a stream if it may start.
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
}
