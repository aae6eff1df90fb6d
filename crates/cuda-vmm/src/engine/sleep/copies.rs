//! Copies between a range's memory and host bytes.
//!
//! # Safety
//! The unsafe calls queue copies on a private stream. Both ends stay until the stream is past them:
//! the chunks, because the range is marked as changing and the thread that copies has them, or
//! because frees of the range wait for the end of the copies; the host bytes, because their owner
//! waits before it drops them, and the device keeps them if the stream cannot be waited for.
//!
//! The other call queues a function of this module that only sleeps.
#![allow(unsafe_code)]

use super::order::{Part, in_order};
use crate::engine::books::intervals::Intervals;
use crate::sync::{self, Arc, thread};
use crate::{Device, Fence, HostBytes, Result, Stream, VmmError};
use core::ffi::c_void;
use core::ops::Range;
use core::time::Duration;

/// The bytes of a copy at most. Its end is a moment at which a stream may go on.
const PART_BYTES: usize = 64 << 20;
/// The same if copies are slowed down: the link is another's between them.
const SLOW_PART_BYTES: usize = 8 << 20;

/// How fast contents come back.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    bytes_per_second: u64,
    begin: Duration,
    /// What is queued so far.
    bytes: u64,
}

impl Pace {
    pub(super) fn new(bytes_per_second: u64) -> Result<Self> {
        if bytes_per_second == 0 {
            return Err(VmmError::ZeroSize { what: "bandwidth" });
        }
        Ok(Self {
            bytes_per_second,
            begin: sync::now(),
            bytes: 0,
        })
    }

    /// When the next copy may begin.
    fn next(&mut self, bytes: usize) -> Duration {
        let nanos = u128::from(self.bytes) * 1_000_000_000 / u128::from(self.bytes_per_second);
        self.bytes += bytes as u64;
        let nanos = u64::try_from(nanos).unwrap_or(u64::MAX);
        self.begin.saturating_add(Duration::from_nanos(nanos))
    }
}

/// A part of the contents of a range on its way to the host, and the end of its copy.
#[derive(Debug)]
pub(super) struct Going {
    addresses: Range<u64>,
    end: Arc<Fence>,
}

/// Waits until none of these addresses is copied any more, of which copies were queued in this
/// order.
pub(super) fn wait_for(going: &mut Vec<Going>, addresses: &Range<u64>) -> Result<()> {
    let overlaps =
        |part: &Going| part.addresses.start < addresses.end && addresses.start < part.addresses.end;
    // One stream copies them in order, so those before the last are over too.
    if let Some(last) = going.iter().rposition(overlaps) {
        going[last].end.wait()?;
        going.drain(..=last);
    }
    Ok(())
}

/// A private stream with copies that may be under way.
#[derive(Debug)]
pub(super) struct Copies {
    stream: Stream,
    pace: Option<Pace>,
    is_under_way: bool,
}

/// Sleeps until a moment, in microseconds of `sync::now`.
unsafe extern "C" fn sleep_until(micros: *mut c_void) {
    let until = Duration::from_micros(micros.addr() as u64);
    if let Some(left) = until.checked_sub(sync::now()) {
        thread::sleep(left);
    }
}

impl Copies {
    pub(super) fn new(device: &Device, pace: Option<Pace>) -> Result<Self> {
        Ok(Self {
            stream: Stream::new(device)?,
            pace,
            is_under_way: false,
        })
    }

    pub(super) fn stream(&self) -> &Stream {
        &self.stream
    }

    /// The bytes of one copy at most.
    pub(super) fn part_bytes(&self) -> usize {
        match self.pace {
            Some(_) => SLOW_PART_BYTES,
            None => PART_BYTES,
        }
    }

    /// Queues copies of the live bytes of a range at `base` to the host, one after the other. Notes
    /// the end of each.
    pub(super) fn queue_out(
        &mut self,
        base: u64,
        live: &Intervals,
        host: &mut HostBytes,
        going: &mut Vec<Going>,
    ) -> Result<()> {
        for Part { bytes, at } in in_order(live, &[], self.part_bytes()) {
            let begin = base + bytes.start as u64;
            let mut source = begin;
            for (target, part_bytes) in host.parts(at, bytes.len())? {
                self.is_under_way = true;
                // SAFETY: as the module says; the bytes are live, so they are mapped.
                unsafe { self.stream.copy_out(target, source, part_bytes) }?;
                source += part_bytes as u64;
            }
            going.push(Going {
                addresses: begin..source,
                end: self.end()?,
            });
        }
        Ok(())
    }

    /// Queues copies of a part of the contents of a range at `base` from the host.
    pub(super) fn queue_in(&mut self, base: u64, part: &Part, host: &HostBytes) -> Result<()> {
        let Part { bytes, at } = part;
        if let Some(pace) = &mut self.pace {
            let begin = pace.next(bytes.len());
            self.is_under_way = true;
            let micros = usize::try_from(begin.as_micros()).unwrap_or(usize::MAX);
            let micros = core::ptr::without_provenance_mut(micros);
            // SAFETY: the function takes any number, sleeps, and calls no driver.
            unsafe { self.stream.call_host(sleep_until, micros) }?;
        }
        let mut target = base + bytes.start as u64;
        for (source, part_bytes) in host.parts(*at, bytes.len())? {
            self.is_under_way = true;
            // SAFETY: as the module says; the bytes were made live by this thread, so they are
            // mapped.
            unsafe { self.stream.copy_in(target, source, part_bytes) }?;
            target += part_bytes as u64;
        }
        Ok(())
    }

    /// The end of what is queued so far.
    pub(super) fn end(&self) -> Result<Arc<Fence>> {
        self.stream.record().map(Arc::new)
    }

    /// Waits for all copies.
    pub(super) fn finish(&mut self) -> Result<()> {
        if self.is_under_way {
            self.stream.synchronize()?;
            self.is_under_way = false;
        }
        Ok(())
    }

    /// Waits for all copies, after a call has failed or their owner has gone. Returns whether none
    /// is under way any more.
    pub(super) fn give_up(&mut self) -> bool {
        match self.finish() {
            Ok(()) => true,
            // Nothing runs any more.
            Err(error) => error.is_poisoned(),
        }
    }
}
