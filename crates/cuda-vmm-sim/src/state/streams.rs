//! Streams: queues of work, each with a thread that runs it in order.
//!
//! The legacy stream of a device runs after the earlier work of the device's blocking streams, and
//! their later work runs after it. Blocking streams are those created without
//! `CU_STREAM_NON_BLOCKING`, and the per-thread ones. A per-thread stream exists for each calling
//! thread that uses one.

use super::DriverResult;
use super::graphs::Capture;
use super::work::Work;
use cuda_vmm_sys::*;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::thread::{JoinHandle, ThreadId};

/// Identifies a stream. It is unique, is the value of the stream's handle, and is never
/// dereferenced.
pub(crate) type Key = u64;

/// A point in a stream: the work with this number.
pub(crate) type Point = (Key, u64);

/// Queued work.
#[derive(Debug)]
pub(crate) struct Item {
    pub(crate) sequence: u64,
    /// Work of other streams that must complete before it starts.
    pub(crate) after: Vec<Point>,
    pub(crate) work: Work,
}

/// One stream.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) device: usize,
    /// Whether it is ordered with the legacy stream.
    blocking: bool,
    /// Whether `cuStreamCreate` made it.
    pub(crate) created: bool,
    /// Whether its handle was destroyed. It is removed when its queue is empty.
    pub(crate) destroyed: bool,
    pub(crate) queue: VecDeque<Item>,
    /// Number of work items that were enqueued.
    pub(crate) enqueued: u64,
    /// Number of work items that have completed.
    pub(crate) completed: u64,
    /// Whether work is running.
    pub(crate) busy: bool,
    pub(crate) has_worker: bool,
    /// When the enqueued work completes, in virtual nanoseconds.
    pub(crate) clock_ns: u64,
    pub(crate) capture: Option<Capture>,
}

impl Stream {
    pub(crate) fn is_idle(&self) -> bool {
        self.queue.is_empty() && !self.busy
    }
}

/// All streams of one simulator.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    pub(crate) by_key: BTreeMap<Key, Stream>,
    legacy: Vec<Key>,
    pub(crate) per_thread: HashMap<(usize, ThreadId), Key>,
    pub(crate) workers: Vec<JoinHandle<()>>,
    made: u64,
}

/// The first key. Small numbers are the handles of the default streams.
pub(crate) const FIRST_KEY: Key = 0x57_0000;

impl Streams {
    pub(crate) fn add_legacy(&mut self, devices: usize) {
        self.legacy = (0..devices)
            .map(|device| self.add(device, false, false))
            .collect();
    }

    pub(crate) fn add(&mut self, device: usize, blocking: bool, created: bool) -> Key {
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

    pub(crate) fn get(&self, key: Key) -> DriverResult<&Stream> {
        self.by_key.get(&key).ok_or(CUDA_ERROR_INVALID_HANDLE)
    }

    pub(crate) fn get_mut(&mut self, key: Key) -> DriverResult<&mut Stream> {
        self.by_key.get_mut(&key).ok_or(CUDA_ERROR_INVALID_HANDLE)
    }

    /// Returns whether work has completed. The work of a removed stream has.
    pub(crate) fn is_done(&self, (key, sequence): Point) -> bool {
        let stream = self.by_key.get(&key);
        stream.is_none_or(|stream| stream.completed >= sequence)
    }

    /// Returns whether all this work has completed.
    pub(crate) fn are_done(&self, points: &[Point]) -> bool {
        points.iter().all(|&point| self.is_done(point))
    }

    /// Returns the last point of every stream of a device that has pending work.
    pub(crate) fn pending(&self, device: usize) -> Vec<Point> {
        let mine = self
            .by_key
            .iter()
            .filter(|(_, stream)| stream.device == device);
        mine.filter(|(_, stream)| stream.completed < stream.enqueued)
            .map(|(&key, stream)| (key, stream.enqueued))
            .collect()
    }

    /// Returns the number of streams on a device that were created and not destroyed.
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

    /// Returns when the work of a device completes, in virtual nanoseconds.
    pub(crate) fn device_clock_ns(&self, device: usize) -> u64 {
        let mine = self
            .by_key
            .values()
            .filter(|stream| stream.device == device);
        mine.map(|stream| stream.clock_ns).max().unwrap_or(0)
    }

    /// Returns the active captures with their streams.
    pub(crate) fn captures(&mut self) -> impl Iterator<Item = (&mut Capture, usize, bool)> {
        self.by_key
            .values_mut()
            .filter_map(|stream| Some((stream.capture.as_mut()?, stream.device, stream.blocking)))
    }

    /// Returns whether the capture with this number is under way.
    pub(crate) fn is_captured(&self, id: u64) -> bool {
        let mut captures = self
            .by_key
            .values()
            .filter_map(|stream| stream.capture.as_ref());
        captures.any(|capture| capture.id == id)
    }

    pub(crate) fn is_legacy(&self, key: Key) -> bool {
        self.legacy.contains(&key)
    }

    /// Returns the work that must complete before new work of a stream starts, because of the
    /// legacy stream's order.
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

    /// Returns when the streams before new work of this stream become free, in virtual nanoseconds.
    /// Unlike [`implicit_order`](Self::implicit_order) it does not depend on completed work.
    pub(crate) fn implicit_clock_ns(&self, key: Key) -> u64 {
        let Some(stream) = self.by_key.get(&key) else {
            return 0;
        };
        let legacy = self.legacy[stream.device];
        if key != legacy {
            let before = self.by_key.get(&legacy).filter(|_| stream.blocking);
            return before.map_or(0, |legacy| legacy.clock_ns);
        }
        let others = self.by_key.values();
        let before = others.filter(|other| other.device == stream.device && other.blocking);
        before.map(|other| other.clock_ns).max().unwrap_or(0)
    }

    /// Removes a stream that is destroyed and has no work.
    pub(crate) fn reap(&mut self, key: Key) {
        let gone = |stream: &Stream| stream.destroyed && stream.is_idle() && !stream.has_worker;
        if self.by_key.get(&key).is_some_and(gone) {
            self.by_key.remove(&key);
        }
    }

    /// Destroys the streams of a device and drops their work. The legacy stream stays, empty.
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
