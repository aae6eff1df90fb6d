//! Copies between a range's memory and host bytes.
//!
//! # Safety
//! The unsafe calls queue copies on a private stream. Both ends stay until the stream is past them:
//! the chunks, because the range is marked as changing and the thread that copies has them or waits
//! before it frees them; the host bytes, because their owner is borrowed, and kept by the device if
//! the stream cannot be waited for.
#![allow(unsafe_code)]

use crate::engine::books::intervals::Intervals;
use crate::{Device, HostBytes, Result, Stream};
use core::ops::Range;

/// A private stream with copies that may be under way.
#[derive(Debug)]
pub(super) struct Copies {
    stream: Stream,
    is_under_way: bool,
}

impl Copies {
    pub(super) fn new(device: &Device) -> Result<Self> {
        Ok(Self {
            stream: Stream::new(device)?,
            is_under_way: false,
        })
    }

    pub(super) fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Queues copies of the live bytes of a range at `base` to the host, one after the other.
    pub(super) fn queue_out(
        &mut self,
        base: u64,
        live: &Intervals,
        host: &mut HostBytes,
    ) -> Result<()> {
        let mut at = 0;
        for bytes in live.iter() {
            let mut source = base + bytes.start as u64;
            for (target, part_bytes) in host.parts(at, bytes.len())? {
                self.is_under_way = true;
                // SAFETY: as the module says; the bytes are live, so they are mapped.
                unsafe { self.stream.copy_out(target, source, part_bytes) }?;
                source += part_bytes as u64;
            }
            at += bytes.len();
        }
        Ok(())
    }

    /// Queues copies of these bytes of a range at `base` from the host, where they begin at `at`.
    pub(super) fn queue_in(
        &mut self,
        base: u64,
        bytes: Range<usize>,
        (at, host): (usize, &HostBytes),
    ) -> Result<()> {
        let mut target = base + bytes.start as u64;
        for (source, part_bytes) in host.parts(at, bytes.len())? {
            self.is_under_way = true;
            // SAFETY: as the module says; the bytes were made live by this thread, so they are
            // mapped.
            unsafe { self.stream.copy_in(target, source, part_bytes) }?;
            target += part_bytes as u64;
        }
        Ok(())
    }

    /// Waits for all copies.
    pub(super) fn finish(&mut self) -> Result<()> {
        if self.is_under_way {
            self.stream.synchronize()?;
            self.is_under_way = false;
        }
        Ok(())
    }

    /// Waits for all copies, after a call has failed. Returns whether none is under way any more.
    pub(super) fn give_up(&mut self) -> bool {
        match self.finish() {
            Ok(()) => true,
            // Nothing runs any more.
            Err(error) => error.is_poisoned(),
        }
    }
}
