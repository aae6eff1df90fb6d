//! One chunk on its way to other memory, and all that is held for it meanwhile.
//!
//! # Safety
//! The one unsafe call queues copies on a private stream. A [`Relocation`] owns both ends: the
//! chunk's mapping, which the engine's books give to no other thread while it moves, and the
//! mappings at scratch addresses. It unmaps neither before it has seen that the stream is past the
//! copies ([`Relocation::copying`]).
#![allow(unsafe_code)]

use super::books::owner::Owner;
use super::target::Target;
use crate::mapping::MapFailure;
use crate::sync::Arc;
use crate::{Access, Mapping, PhysicalMemory, Reservation, Result, Stream, VmmError};
use core::ops::Range;

/// What a relocation needs to know of its range.
#[derive(Debug, Clone)]
pub(crate) struct Site {
    pub(crate) owner: Owner,
    pub(crate) target: Target,
}

/// One chunk on its way. The old memory has the contents until every piece of the new is accessible
/// in its place.
#[derive(Debug)]
pub(crate) struct Relocation {
    pub(crate) site: Site,
    /// The chunk's first page.
    pub(crate) first: usize,
    /// What is charged for new memory, in bytes.
    pub(crate) charged_bytes: usize,
    /// Pages of the chunk that are to have memory of their own.
    pieces: Vec<Range<usize>>,
    /// The memory that has the contents.
    old: Arc<PhysicalMemory>,
    /// It in its place.
    home: Option<Mapping>,
    /// Whether `home` is accessible, if it is there.
    accessible: bool,
    /// Pieces at scratch addresses.
    scratch: Vec<(Range<usize>, Mapping)>,
    /// Pieces at no address.
    loose: Vec<(Range<usize>, Arc<PhysicalMemory>)>,
    /// Pieces at their final addresses. The last may be inaccessible, if the move was broken off
    /// there.
    placed: Vec<(Range<usize>, Mapping)>,
    /// The stream, if copies may be under way.
    copying: Option<Stream>,
}

/// What a relocation that was broken off could not give back.
#[derive(Debug, Default)]
pub(crate) struct Leftovers {
    /// At scratch addresses.
    pub(crate) mapped: Vec<Mapping>,
    pub(crate) unreleased: Vec<PhysicalMemory>,
    /// Why the driver would not undo something.
    pub(crate) error: Option<VmmError>,
}

impl Leftovers {
    fn release(&mut self, memory: Arc<PhysicalMemory>) {
        if let Some(Err(failure)) = Arc::into_inner(memory).map(PhysicalMemory::close) {
            self.unreleased.push(failure.object);
            self.error = Some(failure.error);
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        let mapped: usize = self.mapped.iter().map(Mapping::bytes).sum();
        mapped
            + self
                .unreleased
                .iter()
                .map(PhysicalMemory::bytes)
                .sum::<usize>()
    }
}

impl Relocation {
    pub(crate) fn new(
        site: Site,
        first: usize,
        pieces: Vec<Range<usize>>,
        charged_bytes: usize,
        mapping: Mapping,
    ) -> Self {
        Self {
            site,
            first,
            charged_bytes,
            pieces,
            old: mapping.memory().clone(),
            home: Some(mapping),
            accessible: true,
            scratch: Vec::new(),
            loose: Vec::new(),
            placed: Vec::new(),
            copying: None,
        }
    }

    /// Moves. `create` makes memory of a size; `scratch` has room for all pieces. After an error
    /// the caller asks for [`back`](Self::back).
    pub(crate) fn forward(
        &mut self,
        create: impl Fn(usize) -> Result<PhysicalMemory>,
        scratch: &Arc<Reservation>,
        stream: &Stream,
    ) -> Result<()> {
        let mut offset = 0;
        for pages in &self.pieces {
            let memory = Arc::new(create(pages.len() * self.site.target.page_bytes)?);
            let access = [(scratch.device().clone(), Access::ReadWrite)];
            match Mapping::try_new(scratch, offset, &memory, &access) {
                Ok(mapping) => self.scratch.push((pages.clone(), mapping)),
                Err(MapFailure { error, stuck }) => {
                    match stuck {
                        Some(mapping) => self.scratch.push((pages.clone(), mapping)),
                        None => self.loose.push((pages.clone(), memory)),
                    }
                    return Err(error);
                }
            }
            offset += memory.bytes();
        }
        self.copy(stream)?;
        self.unmap_scratch()?;
        // From here on the contents are in two memories, the old and the new.
        self.unmap_old()?;
        while let Some((pages, memory)) = self.loose.pop() {
            match self.site.target.map(pages.start, &memory) {
                Ok(mapping) => self.placed.push((pages, mapping)),
                Err(MapFailure { error, stuck }) => {
                    match stuck {
                        Some(mapping) => self.placed.push((pages, mapping)),
                        None => self.loose.push((pages, memory)),
                    }
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Copies every piece to its scratch addresses and waits until that is done.
    fn copy(&mut self, stream: &Stream) -> Result<()> {
        self.copying = Some(stream.clone());
        let target = &self.site.target;
        for (pages, mapping) in &self.scratch {
            let offset = pages.start * target.page_bytes;
            let source = target.reservation.address() + offset as u64;
            // SAFETY: the source lies in the chunk's mapping and the target is a mapping of its
            // size; both are owned here and stay until the stream was waited for, as `copying`
            // says.
            unsafe { stream.copy(mapping.address(), source, mapping.bytes()) }?;
        }
        stream.synchronize()?;
        self.copying = None;
        Ok(())
    }

    fn unmap_scratch(&mut self) -> Result<()> {
        while let Some((pages, mapping)) = self.scratch.pop() {
            match mapping.unmap() {
                Ok(memory) => self.loose.push((pages, memory)),
                Err(failure) => {
                    self.scratch.push((pages, failure.object));
                    return Err(failure.error);
                }
            }
        }
        Ok(())
    }

    /// Unmaps the old memory, which stays and still has the contents.
    pub(crate) fn unmap_old(&mut self) -> Result<()> {
        let Some(Err(failure)) = self.home.take().map(Mapping::unmap) else {
            return Ok(());
        };
        self.home = Some(failure.object);
        Err(failure.error)
    }

    /// Where the old memory is, or was, mapped.
    pub(crate) fn addresses(&self) -> Range<u64> {
        let target = &self.site.target;
        let begin = target.reservation.address() + (self.first * target.page_bytes) as u64;
        begin..begin + self.old.bytes() as u64
    }

    /// Copies of the old memory may be under way on this stream, and could not be waited for.
    pub(crate) fn is_copied_on(&mut self, stream: &Stream) {
        self.copying = Some(stream.clone());
    }

    /// Undoes as much as the driver lets it: the old memory goes back to its place and the new is
    /// released. Returns what could not be given back and is in the way of nothing. May be called
    /// again.
    pub(crate) fn back(&mut self) -> Leftovers {
        let mut left = Leftovers::default();
        if let Some(stream) = &self.copying {
            // On a poisoned context nothing runs any more.
            if let Err(error) = stream.synchronize()
                && !error.is_poisoned()
            {
                left.error = Some(error);
                return left;
            }
            self.copying = None;
        }
        for (_, mapping) in self.scratch.drain(..) {
            match mapping.unmap() {
                Ok(memory) => left.release(memory),
                Err(failure) => {
                    left.mapped.push(failure.object);
                    left.error = Some(failure.error);
                }
            }
        }
        for (pages, mapping) in core::mem::take(&mut self.placed) {
            match mapping.unmap() {
                Ok(memory) => left.release(memory),
                Err(failure) => {
                    self.placed.push((pages, failure.object));
                    left.error = Some(failure.error);
                }
            }
        }
        if self.placed.is_empty()
            && let Err(error) = self.restore()
        {
            crate::events::debug!(%error, "live memory could not be mapped again and is kept");
            left.error = Some(error);
        }
        for (_, memory) in self.loose.drain(..) {
            left.release(memory);
        }
        left
    }

    /// Puts the old memory back in its place, where nothing else is.
    fn restore(&mut self) -> Result<()> {
        let target = &self.site.target;
        if let Some(mapping) = &self.home {
            if !self.accessible {
                mapping.set_access(&target.access)?;
            }
        } else {
            match target.map(self.first, &self.old) {
                Ok(mapping) => self.home = Some(mapping),
                Err(failure) => {
                    (self.home, self.accessible) = (failure.stuck, false);
                    return Err(failure.error);
                }
            }
        }
        self.accessible = true;
        Ok(())
    }

    /// What it still holds besides the old memory, in bytes.
    pub(crate) fn new_bytes(&self) -> usize {
        let mapped = self.scratch.iter().chain(&self.placed);
        let mapped: usize = mapped.map(|(_, mapping)| mapping.bytes()).sum();
        mapped
            + self
                .loose
                .iter()
                .map(|(_, memory)| memory.bytes())
                .sum::<usize>()
    }

    /// Hands out the chunk as it was, if [`back`](Self::back) has put it in its place again.
    pub(crate) fn take_home(&mut self) -> Option<Mapping> {
        let is_home = self.copying.is_none() && self.placed.is_empty() && self.accessible;
        self.home.take_if(|_| is_home)
    }

    /// The chunks that [`forward`](Self::forward) has put in their places, and the old memory.
    pub(crate) fn into_arrived(self) -> (Vec<(Range<usize>, Mapping)>, Arc<PhysicalMemory>) {
        (self.placed, self.old)
    }

    /// Mappings that may not be unmapped yet, at the end of an engine; all else is dropped.
    pub(crate) fn into_unfinished(self) -> Vec<Mapping> {
        let unfinished = self.scratch.into_iter().map(|(_, mapping)| mapping);
        match self.copying {
            Some(_) => unfinished.chain(self.home).collect(),
            None => Vec::new(),
        }
    }
}
