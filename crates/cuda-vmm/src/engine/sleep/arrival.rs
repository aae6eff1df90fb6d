//! Contents of ranges that are awake, and that are still on their way.

use super::copies::Copies;
use crate::engine::books::range_id::RangeId;
use crate::sync::Arc;
use crate::{Fence, HostBytes, Result, Stream};
use core::ops::Range;

/// Contents that are on their way, in the order in which they come. Dropping it waits for all of
/// them, and gives the host bytes back.
#[derive(Debug, Default)]
pub(crate) struct Arrival {
    copies: Option<Copies>,
    parts: Vec<Coming>,
    hosts: Vec<Arc<HostBytes>>,
}

/// A part of the contents of a range, and the end of its copy.
#[derive(Debug)]
pub(super) struct Coming {
    pub(super) range: RangeId,
    pub(super) bytes: Range<usize>,
    pub(super) end: Arc<Fence>,
}

impl Arrival {
    pub(super) fn new(copies: Copies, parts: Vec<Coming>, hosts: Vec<Arc<HostBytes>>) -> Self {
        Self {
            copies: Some(copies),
            parts,
            hosts,
        }
    }

    /// Behind which fence all of these bytes have come; `None` if none of them is on its way.
    pub(crate) fn end_of(&self, range: RangeId, bytes: &Range<usize>) -> Option<&Arc<Fence>> {
        // One stream copies them in order, so the last one is enough.
        let mut parts = self.parts.iter().rev();
        let part = parts.find(|part| {
            part.range == range && part.bytes.start < bytes.end && bytes.start < part.bytes.end
        });
        part.map(|part| &part.end)
    }

    /// Makes a stream wait until these bytes have come.
    pub(crate) fn order_stream(
        &self,
        stream: &Stream,
        range: RangeId,
        bytes: &Range<usize>,
    ) -> Result<()> {
        match self.end_of(range, bytes) {
            Some(end) => stream.wait_for(end),
            None => Ok(()),
        }
    }

    /// Waits until all has come.
    pub(crate) fn finish(mut self) -> Result<()> {
        self.copies.as_mut().map_or(Ok(()), Copies::finish)
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        let Some(copies) = &mut self.copies else {
            return;
        };
        // Twice: a wait that failed once often works then, and what the device keeps is in use until
        // a context synchronise.
        if !(copies.give_up() || copies.give_up()) {
            // The device may still read them.
            let device = copies.stream().device().clone();
            device.keep_unfinished(core::mem::take(&mut self.hosts));
        }
    }
}
