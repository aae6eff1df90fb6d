//! Making ranges of an account share chunks of memory; see `sharing`.

use super::at_work::AtWork;
use super::books::pages::ChunkState;
use super::books::shared_chunks::Place;
use super::handle::RangeHandle;
use super::inner::Inner;
use super::queue::BITE;
use super::scope::Scope;
use super::state::State;
use super::target::Target;
use crate::mapping::MapFailure;
use crate::size::{Extent, push_run};
use crate::sync::{Arc, rest};
use crate::{Mapping, PhysicalMemory, Result, VmmError};
use core::ops::Range;

/// Bytes of one range that another one is to share, at the same offsets.
#[derive(Debug, Clone)]
pub(crate) struct Share<'a> {
    pub(crate) source: &'a RangeHandle,
    pub(crate) target: &'a RangeHandle,
    pub(crate) bytes: Range<usize>,
}

/// One chunk that is being shared.
struct Alias {
    /// Which of the parts it is of.
    part: usize,
    place: Place,
    pages: Range<usize>,
    memory: Option<Arc<PhysicalMemory>>,
    mapping: Option<Mapping>,
}

/// Makes the targets share whole chunks of the sources, of all parts or of none; returns the bytes
/// of each part that are shared now. They are live in the target.
pub(crate) fn share_all(parts: &[Share<'_>]) -> Result<Vec<Vec<Range<usize>>>> {
    let Some(first) = parts.first() else {
        return Ok(Vec::new());
    };
    let engine = first.target.engine().open()?;
    // Before anything is given up. What changes meanwhile is left to the caller as what cannot be
    // shared, or found closed in the end.
    let state = engine.state.lock();
    parts.iter().try_for_each(|part| part.check(&state))?;
    drop(state);
    parts.iter().for_each(|part| part.clear_the_way(engine));
    let sharing = Sharing {
        engine,
        parts,
        aliases: Vec::new(),
    };
    sharing.run()
}

impl Share<'_> {
    /// Gives up what is parked or made ahead in the target: nothing can be mapped there otherwise.
    fn clear_the_way(&self, engine: &Arc<Inner>) {
        let is_bare = self.target.slot.lock().pages.chunks() == 0;
        if !is_bare {
            // What the driver does not unmap now is in the way of its chunk alone.
            let _ = engine.give_up(Scope::Range(self.target.id()), |_| false);
        }
    }

    /// Checks that the part can be shared.
    fn check(&self, state: &State) -> Result<()> {
        let (offset, bytes) = (self.bytes.start, self.bytes.len());
        for handle in [self.target, self.source] {
            let range = state.ranges.get(handle.id()).ok_or(VmmError::Closed)?;
            if range.takes_no_more() {
                return Err(VmmError::Closed);
            }
            if range.options.single_handle {
                return Err(VmmError::SingleHandle);
            }
            Extent::new(offset, bytes, range.capacity_bytes)?;
            range.check_awake()?;
            if handle.id() == self.target.id() && range.pages.has_taken(&self.bytes) {
                return Err(match range.is_held_by_lease(&self.bytes) {
                    true => VmmError::Leased { offset, bytes },
                    false => VmmError::AlreadyMapped { offset, bytes },
                });
            }
            if handle.id() == self.source.id() {
                range.live_extent(offset, bytes)?;
            }
        }
        Ok(())
    }

    /// Takes the next chunks from a page on in the books, at most this many; returns them and the
    /// page to go on with, if any is left.
    fn begin(
        &self,
        state: &mut State,
        (part, page): (usize, usize),
        at_most: usize,
    ) -> Result<(Vec<Alias>, Option<usize>)> {
        let (source, target) = (self.source.id(), self.target.id());
        let State { ranges, shared, .. } = state;
        for id in [source, target] {
            // Another thread may have put it to sleep since the parts were checked.
            ranges.get(id).ok_or(VmmError::Closed)?.check_awake()?;
        }
        let range = ranges.get(source).ok_or(VmmError::Closed)?;
        let chunks = range.pages.whole_chunks(&self.bytes, page);
        let chunks: Vec<_> = chunks.take(at_most).collect();
        let next = (chunks.len() == at_most).then(|| chunks.last().map_or(page, |last| last.end));
        drop(range);
        let range = ranges.get(target).ok_or(VmmError::Closed)?;
        let bare = chunks
            .into_iter()
            .filter(|pages| range.pages.are_bare(pages));
        let bare: Vec<_> = bare.collect();
        drop(range);
        let mut aliases = Vec::with_capacity(bare.len());
        let mut range = ranges.get(source).ok_or(VmmError::Closed)?;
        for pages in bare {
            let first = pages.start;
            // Another thread has freed its bytes meanwhile, or moves it.
            let is_whole = range.pages.whole_chunks(&self.bytes, first).next();
            let memory = range.pages.memory(first).map(Mapping::memory).cloned();
            let (Some(memory), true) = (memory, is_whole == Some(pages.clone())) else {
                continue;
            };
            let id = match shared.at((source, first)) {
                Some(id) => id,
                None => {
                    range.set_shared(first, true);
                    let account = range.account;
                    shared.share(account, memory.bytes(), (source, first), memory.clone())
                }
            };
            shared.add(id, (target, first));
            aliases.push(Alias {
                part,
                place: (target, first),
                pages,
                memory: Some(memory),
                mapping: None,
            });
        }
        drop(range);
        let mut range = ranges.get(target).ok_or(VmmError::Closed)?;
        for alias in &aliases {
            range.pages.begin_sharing(alias.pages.clone());
        }
        Ok((aliases, next))
    }

    /// Where its chunks are mapped.
    fn destination(&self) -> Result<Target> {
        let range = self.target.slot.lock_open()?;
        range.target().ok_or(VmmError::Closed)
    }
}

/// A call that shares memory.
struct Sharing<'a> {
    engine: &'a Arc<Inner>,
    parts: &'a [Share<'a>],
    aliases: Vec<Alias>,
}

impl Sharing<'_> {
    fn run(mut self) -> Result<Vec<Vec<Range<usize>>>> {
        let work = AtWork::begin();
        let made = self.begin_all().and_then(|()| self.map_all());
        match made.and_then(|()| self.finish_all()) {
            Ok(()) => {
                drop(work);
                Ok(self.shared())
            }
            Err(error) => {
                self.undo();
                drop(work);
                Err(error)
            }
        }
    }

    /// Takes all chunks in the books, some under each hold of the lock.
    fn begin_all(&mut self) -> Result<()> {
        for (at, part) in self.parts.iter().enumerate() {
            let mut page = Some(0);
            while let Some(from) = page {
                let mut state = self.engine.state.lock();
                let (aliases, next) = part.begin(&mut state, (at, from), BITE)?;
                drop(state);
                self.aliases.extend(aliases);
                page = next;
                if page.is_some() {
                    rest();
                }
            }
        }
        Ok(())
    }

    fn map_all(&mut self) -> Result<()> {
        let _urgent = self.engine.device.begin_urgent_call();
        for of_part in self
            .aliases
            .chunk_by_mut(|one, other| one.part == other.part)
        {
            let target = self.parts[of_part[0].part].destination()?;
            for alias in of_part {
                let Some(memory) = &alias.memory else {
                    continue;
                };
                match target.map(alias.pages.start, memory) {
                    Ok(mapping) => alias.mapping = Some(mapping),
                    Err(MapFailure { error, stuck }) => {
                        alias.mapping = stuck;
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }

    /// Makes all bytes live in the targets.
    fn finish_all(&mut self) -> Result<()> {
        let mut is_hungry = false;
        let mut left = &mut self.aliases[..];
        while !left.is_empty() {
            let bite = left.len().min(BITE);
            let (now, later) = left.split_at_mut(bite);
            left = later;
            let mut state = self.engine.state.lock();
            for alias in now {
                let (id, first) = alias.place;
                let mut range = state.ranges.get(id).ok_or(VmmError::Closed)?;
                if range.takes_no_more() {
                    // A thread that closed it from within this work has not waited for it.
                    return Err(VmmError::Closed);
                }
                if let Some(mapping) = alias.mapping.take() {
                    // The mapping holds it: this calls no driver.
                    alias.memory = None;
                    let page_bytes = range.page_bytes;
                    range.pages.finish_sharing(first, mapping);
                    is_hungry |= range.advance(alias.pages.end * page_bytes);
                }
                drop(range);
                // All others may have let it go meanwhile.
                if let Some(shared) = state.shared.at(alias.place) {
                    state.settle_shared(shared);
                }
            }
            drop(state);
            if !left.is_empty() {
                rest();
            }
        }
        if is_hungry {
            self.engine.worker.wake(self.engine, false);
        }
        Ok(())
    }

    /// The bytes of each part that are shared now, in order and joined.
    fn shared(&self) -> Vec<Vec<Range<usize>>> {
        let mut shared: Vec<Vec<Range<usize>>> = vec![Vec::new(); self.parts.len()];
        for alias in &self.aliases {
            let page_bytes = self.parts[alias.part].target.page_bytes();
            let bytes = alias.pages.start * page_bytes..alias.pages.end * page_bytes;
            push_run(&mut shared[alias.part], bytes);
        }
        shared
    }

    /// Unmaps what was mapped, and has the books as before. What is live already is freed.
    fn undo(&mut self) {
        let engine = self.engine;
        let mut any_left = false;
        for mut alias in self.aliases.drain(..).rev() {
            let (id, first) = alias.place;
            let stuck = alias
                .mapping
                .take()
                .and_then(|mapping| mapping.unmap().err());
            drop(alias.memory);
            let mut state = engine.state.lock();
            let Some(mut range) = state.ranges.get(id) else {
                continue;
            };
            let mut unused = Vec::new();
            if range.pages.state_of(first) == Some(ChunkState::Filling) {
                any_left |= range.is_left();
                let stuck = stuck.map(|failure| failure.object);
                let is_stuck = stuck.is_some();
                range.pages.abort_sharing(first, stuck);
                drop(range);
                let released = state.undo_sharing(alias.place, is_stuck);
                engine.retire(state, id, unused);
                // What the driver refuses is tried again.
                let _ = engine.release_shared(released);
                continue;
            }
            // Live already: a later part failed.
            let page_bytes = range.page_bytes;
            let bytes = alias.pages.start * page_bytes..alias.pages.end * page_bytes;
            if range.is_live(&bytes) {
                range.free(&bytes, &mut unused);
            }
            drop(range);
            engine.retire(state, id, unused);
        }
        if any_left {
            engine.go_on_closing();
        }
        engine.worker.wake(engine, false);
    }
}
