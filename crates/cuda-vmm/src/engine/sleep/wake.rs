//! Waking ranges.

use super::change::Change;
use super::copies::Copies;
use super::order::{Part, in_order};
use crate::engine::allocate::{Ask, allocate_all};
use crate::engine::handle::RangeHandle;
use crate::engine::inner::Inner;
use crate::engine::range::Place;
use crate::engine::range::rest::Rest;
use crate::engine::scope::Scope;
use crate::engine::waiting::Patience;
use crate::size::Extent;
use crate::sync::Arc;
use crate::{HostBytes, Result, VmmError};
use core::ops::Range;

/// How a range is woken.
pub(crate) struct Waking<'a> {
    pub(crate) handle: &'a RangeHandle,
    /// Bytes whose contents come first, in this order; all others follow.
    pub(crate) first: &'a [Range<usize>],
}

/// A range that is being woken.
struct Waker<'a> {
    change: Change<'a>,
    first: &'a [Range<usize>],
    places: Vec<(Place, usize)>,
}

/// Wakes ranges of one account, all or none; each of them once.
pub(crate) fn wake_all(parts: &[Waking<'_>], patience: &Patience) -> Result<()> {
    let Some(first) = parts.first() else {
        return Ok(());
    };
    let engine = first.handle.engine().open()?;
    let begun = parts.iter().map(Waker::begin);
    let wakers: Vec<_> = begun.collect::<Result<_>>()?;
    let copies = wakers.iter().any(|waker| waker.host().is_some());
    let mut copies = copies.then(|| Copies::new(&engine.device)).transpose()?;
    let asks = wakers.iter().filter(|waker| !waker.places.is_empty());
    let asks: Vec<_> = asks.map(Waker::ask).collect();
    allocate_all(&asks, patience)?;
    drop(asks);
    if let Some(copies) = &mut copies {
        let copied = wakers.iter().try_for_each(|waker| waker.copy_in(copies));
        if let Err(error) = copied.and_then(|()| copies.finish()) {
            undo(engine, wakers, copies);
            return Err(error);
        }
    }
    let woken = wakers.into_iter().map(Waker::wake);
    let dropped: Vec<_> = woken.collect();
    engine.worker.wake(engine, false);
    drop(dropped);
    Ok(())
}

/// Ends a wake that was broken off: the memory goes again, and every range is asleep.
fn undo(engine: &Arc<Inner>, wakers: Vec<Waker<'_>>, copies: &mut Copies) {
    let is_over = copies.give_up();
    for waker in wakers {
        let handle = waker.change.handle;
        let state = engine.state.lock();
        let mut unused = Vec::new();
        if let Some(mut range) = state.ranges.get(handle.id()) {
            unused = range.free_all();
            if is_over {
                // Nobody else knew that the memory was there.
                unused.drain(..).for_each(|first| range.pages.park(first));
            } else {
                // A copy may still read the host bytes, which the range keeps.
                range.users.open_to_all();
            }
        }
        engine.retire(state, handle.id(), unused);
        // What the driver refuses is tried again.
        let _ = engine.give_up(Scope::Range(handle.id()), |_| false);
    }
}

impl<'a> Waker<'a> {
    fn begin(waking: &Waking<'a>) -> Result<Self> {
        let capacity_bytes = waking.handle.slot.lock_open()?.capacity_bytes;
        for bytes in waking.first {
            Extent::new(bytes.start, bytes.len(), capacity_bytes)?;
        }
        let change = Change::to_wake(waking.handle)?;
        let live = change.asleep().map(|asleep| &asleep.live);
        let live = live.into_iter().flat_map(|live| live.iter());
        let places = live.map(|bytes| (Place::At(bytes.start), bytes.len()));
        Ok(Self {
            places: places.collect(),
            first: waking.first,
            change,
        })
    }

    fn host(&self) -> Option<&HostBytes> {
        self.change.asleep()?.host.as_ref()
    }

    fn ask(&self) -> Ask<'_> {
        Ask {
            handle: self.change.handle,
            places: &self.places,
            wakes: true,
        }
    }

    /// Queues copies of the contents, those first that are wanted first.
    fn copy_in(&self, copies: &mut Copies) -> Result<()> {
        let Some((asleep, host)) = self.change.asleep().zip(self.host()) else {
            return Ok(());
        };
        let range = self.change.handle.slot.lock();
        let target = range.target();
        drop(range);
        let base = target.ok_or(VmmError::Closed)?.reservation.address();
        let parts = in_order(&asleep.live, self.first);
        let mut parts = parts.into_iter();
        parts.try_for_each(|Part { bytes, at }| copies.queue_in(base, bytes, (at, host)))
    }

    /// Ends its wake. Returns what is to be dropped without a lock.
    fn wake(mut self) -> Option<HostBytes> {
        let asleep = self.change.take_asleep()?;
        let mut range = self.change.handle.slot.lock();
        let (copy, dropped) = match asleep.host {
            Some(host) if asleep.is_constant => (Some(range.copy_of_now(host)), None),
            host => (None, host),
        };
        range.rest = Rest::Awake(copy);
        range.look_ahead();
        dropped
    }
}
