//! Putting ranges to sleep.

use super::Keep;
use super::change::Change;
use super::copies::{Copies, Going, wait_for};
use super::idle::kept;
use crate::engine::at_work::AtWork;
use crate::engine::books::pages::relocation::PartlyLive;
use crate::engine::handle::RangeHandle;
use crate::engine::inner::Inner;
use crate::engine::queue::BITE;
use crate::engine::range::Range;
use crate::engine::range::rest::{Asleep, Rest};
use crate::engine::relocation::Relocation;
use crate::engine::retry::Which;
use crate::engine::scope::Scope;
use crate::sync::{self, Arc, rest};
use crate::{CaptureGuard, HostBytes, Result, VmmError};

/// What a sleep did, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Slept {
    /// Memory that went back to the driver.
    pub given_bytes: usize,
    /// Contents that were copied to the host. Those of which there was a copy are not among them.
    pub copied_bytes: usize,
    /// Memory that the driver refused to take back. It stays charged, and is tried again.
    pub quarantined_bytes: usize,
}

/// A range that is being put to sleep.
struct Sleeper<'a> {
    change: Change<'a>,
    keep: Keep<'a>,
    /// Where the contents go; `None` if they are not kept, or there is a copy already.
    host: Option<HostBytes>,
    /// Whether the copy that an earlier sleep has left is still true, and is used.
    has_copy: bool,
}

/// Puts ranges of one engine to sleep, all or none; each of them once.
pub(crate) fn sleep_all(parts: &[(&RangeHandle, Keep<'_>)]) -> Result<Slept> {
    let Some((first, _)) = parts.first() else {
        return Ok(Slept::default());
    };
    let (engine, began) = (first.engine().open()?, sync::now());
    // Held while others' work is looked at and waited for. Copies and the end of memory harm no
    // capture, so one may begin meanwhile.
    let no_capture = CaptureGuard::try_none();
    let begun = parts
        .iter()
        .map(|(handle, keep)| Sleeper::begin(handle, *keep));
    let mut sleepers: Vec<_> = begun.collect::<Result<_>>()?;
    engine.retry(&Which::All);
    for sleeper in &sleepers {
        sleeper.handle().check_idle(engine, no_capture.as_ref())?;
    }
    drop(no_capture);
    for sleeper in &mut sleepers {
        sleeper.reserve()?;
    }
    let copies = sleepers.iter().any(|sleeper| sleeper.host.is_some());
    let mut copies = copies
        .then(|| Copies::new(&engine.device, None))
        .transpose()?;
    for sleeper in &sleepers {
        sleeper.give_up_spare(engine)?;
    }
    let work = AtWork::begin();
    let mut leaving = Vec::new();
    let taken = take_out(engine, &mut sleepers, &mut copies, &mut leaving);
    let slept = match taken {
        Ok(copied_bytes) => Ok(end(engine, sleepers, leaving, copied_bytes)),
        Err(error) => {
            undo(engine, sleepers, leaving, copies);
            Err(error)
        }
    };
    let mut state = engine.state.lock();
    if slept.is_ok() {
        let took = sync::now().saturating_sub(began);
        state.quietly().counters.count_sleep(parts.len(), took);
    }
    let is_left = |(handle, _): &(&RangeHandle, _)| {
        let range = state.ranges.get(handle.id());
        range.is_some_and(|range| range.is_left())
    };
    let any_left = parts.iter().any(is_left);
    drop(state);
    if any_left {
        engine.go_on_closing();
    }
    drop(work);
    slept
}

/// Takes the chunks out of the books, copies what is to be kept, and unmaps them. Returns the bytes
/// that were copied.
fn take_out(
    engine: &Arc<Inner>,
    sleepers: &mut [Sleeper<'_>],
    copies: &mut Option<Copies>,
    leaving: &mut Vec<Relocation>,
) -> Result<usize> {
    for sleeper in &*sleepers {
        sleeper.depart(engine, leaving)?;
    }
    let (mut copied_bytes, mut going) = (0, Vec::new());
    if let Some(copies) = copies {
        for sleeper in sleepers {
            copied_bytes += sleeper.copy_out(copies, &mut going)?;
        }
    }
    // A chunk is unmapped while those behind it are still copied.
    for relocation in leaving {
        wait_for(&mut going, &relocation.addresses())?;
        relocation.unmap_old()?;
        rest();
    }
    if let Some(copies) = copies {
        copies.finish()?;
    }
    Ok(copied_bytes)
}

/// Ends a sleep that was broken off: every chunk is in its place again, and every range awake.
fn undo(
    engine: &Arc<Inner>,
    sleepers: Vec<Sleeper<'_>>,
    mut leaving: Vec<Relocation>,
    copies: Option<Copies>,
) {
    let unfinished = copies.and_then(|mut copies| (!copies.give_up()).then_some(copies));
    if let Some(copies) = &unfinished {
        leaving
            .iter_mut()
            .for_each(|relocation| relocation.is_copied_on(copies.stream()));
    }
    for relocation in leaving {
        // What cannot be put back is tried again.
        let _ = relocation.put_back(engine);
    }
    let hosts = sleepers.into_iter().filter_map(|sleeper| sleeper.host);
    // The chunks may have been waited for meanwhile.
    if unfinished.is_some_and(|mut copies| !copies.give_up()) {
        engine.device.keep_unfinished(hosts.collect());
    }
}

/// Ends a sleep in the books, and gives the memory to the driver.
fn end(
    engine: &Arc<Inner>,
    sleepers: Vec<Sleeper<'_>>,
    leaving: Vec<Relocation>,
    copied_bytes: usize,
) -> Slept {
    let mut slept = Slept {
        copied_bytes,
        ..Slept::default()
    };
    let mut dropped = Vec::new();
    let mut memory = Vec::new();
    let mut state = engine.state.lock();
    for relocation in leaving {
        let owner = relocation.site.owner;
        state.relocations.end(owner, relocation.charged_bytes);
        let (_, old) = relocation.into_arrived();
        state.begin_releasing(Some(owner), old.bytes());
        memory.push((owner, old));
    }
    for sleeper in sleepers {
        // The range cannot have gone: its chunks were out of the books.
        if let Some(mut range) = state.ranges.get(sleeper.change.handle.id()) {
            dropped.push(sleeper.fall_asleep(&mut range));
        }
    }
    drop(state);
    // Without the lock: it may unpin memory.
    drop(dropped);
    for (owner, memory) in memory {
        let bytes = memory.bytes();
        let released = Arc::into_inner(memory).map(|memory| engine.release(Some(owner), memory));
        match released {
            Some(Ok(_)) => slept.given_bytes += bytes,
            Some(Err(_)) | None => slept.quarantined_bytes += bytes,
        }
        rest();
    }
    slept
}

impl<'a> Sleeper<'a> {
    fn begin(handle: &'a RangeHandle, keep: Keep<'a>) -> Result<Self> {
        Ok(Self {
            change: Change::to_sleep(handle)?,
            keep,
            host: None,
            has_copy: false,
        })
    }

    fn handle(&self) -> &'a RangeHandle {
        self.change.handle
    }

    /// Reserves host bytes for the contents, unless there is a copy that is still true.
    fn reserve(&mut self) -> Result<()> {
        let range = self.handle().slot.lock();
        let bytes = range.pages.live().total();
        let is_true = self.change.copy().is_some_and(|copy| range.is_copied(copy));
        drop(range);
        let store = match self.keep {
            Keep::Nothing => return Ok(()),
            Keep::Constant(_) if is_true => {
                self.has_copy = true;
                return Ok(());
            }
            Keep::Host(store) | Keep::Constant(store) => store,
        };
        // Its room is for the new one.
        drop(self.change.take_copy());
        if bytes > 0 {
            self.host = Some(store.reserve(bytes)?);
        }
        Ok(())
    }

    /// Gives back what is parked or made ahead.
    fn give_up_spare(&self, engine: &Arc<Inner>) -> Result<()> {
        let scope = Scope::Range(self.handle().id());
        engine.give_up(scope, |_| false).1
    }

    /// Takes all chunks of the range out of the books.
    fn depart(&self, engine: &Inner, leaving: &mut Vec<Relocation>) -> Result<()> {
        let id = self.handle().id();
        let range = self.handle().slot.lock();
        range.check_ready()?;
        let firsts = range.pages.firsts();
        drop(range);
        for firsts in firsts.chunks(BITE) {
            let mut state = engine.state.lock();
            for first in firsts {
                let whole = PartlyLive {
                    first: *first,
                    live_page_bytes: 0,
                    slack_bytes: 0,
                    pieces: Vec::new(),
                };
                let relocation = state.begin_move(id, whole);
                leaving.push(relocation.ok_or_else(|| kept(0..0, "another call"))?);
            }
            drop(state);
            rest();
        }
        Ok(())
    }

    /// Queues copies of the contents; returns their bytes.
    fn copy_out(&mut self, copies: &mut Copies, going: &mut Vec<Going>) -> Result<usize> {
        let Some(host) = &mut self.host else {
            return Ok(0);
        };
        let range = self.change.handle.slot.lock();
        let (target, live) = (range.target(), range.pages.live().clone());
        drop(range);
        let base = target.ok_or(VmmError::Closed)?.reservation.address();
        copies.queue_out(base, &live, host, going)?;
        Ok(live.total())
    }

    /// Ends its sleep in the books. Returns what is to be dropped without the lock.
    fn fall_asleep(mut self, range: &mut Range) -> Option<Rest> {
        let copy = match self.has_copy {
            true => self.change.take_copy().map(|copy| copy.host),
            false => None,
        };
        let page_bytes = range.pages.live_pages() * range.page_bytes;
        range.rest = Rest::Asleep(Asleep {
            live: range.pages.fall_asleep(),
            page_bytes,
            host: self.host.take().map(Arc::new).or(copy),
            is_constant: matches!(self.keep, Keep::Constant(_)),
        });
        self.change.end()
    }
}
