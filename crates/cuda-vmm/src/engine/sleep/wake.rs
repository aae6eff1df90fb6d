//! Waking ranges.

use super::arrival::{Arrival, Coming};
use super::change::Change;
use super::copies::{Copies, Pace};
use super::order::in_order;
use crate::engine::allocate::{Ask, allocate_all};
use crate::engine::handle::RangeHandle;
use crate::engine::inner::Inner;
use crate::engine::range::Place;
use crate::engine::range::rest::Rest;
use crate::engine::scope::Scope;
use crate::engine::waiting::Patience;
use crate::size::Extent;
use crate::sync::{self, Arc};
use crate::{Fence, HostBytes, Result, VmmError};
use core::ops::Range;

/// How ranges are woken.
#[derive(Debug)]
pub(crate) struct Waking<'a> {
    /// How long the call waits for memory.
    pub(crate) patience: Patience,
    /// Bytes of each range whose contents come first, in this order; all others follow.
    pub(crate) first: &'a [Range<usize>],
    /// How fast the contents come at most.
    pub(crate) bytes_per_second: Option<u64>,
    /// Whether the call waits until all contents have come. Otherwise the ranges are awake when
    /// all copies are queued.
    pub(crate) waits: bool,
}

/// A range that is being woken.
struct Waker<'a> {
    change: Change<'a>,
    places: Vec<(Place, usize)>,
}

/// Wakes ranges of one account, all or none; each of them once. Their contents come range by range.
pub(crate) fn wake_all(ranges: &[&RangeHandle], how: &Waking<'_>) -> Result<Arrival> {
    let Some(first) = ranges.first() else {
        return Ok(Arrival::default());
    };
    let (engine, began) = (first.engine().open()?, sync::now());
    let begun = ranges.iter().map(|handle| Waker::begin(handle, how.first));
    let wakers: Vec<_> = begun.collect::<Result<_>>()?;
    let pace = how.bytes_per_second.map(Pace::new).transpose()?;
    let copies = wakers.iter().any(|waker| waker.host().is_some());
    let copies = copies.then(|| Copies::new(&engine.device, pace));
    let mut copies = copies.transpose()?;
    let asks = wakers.iter().filter(|waker| !waker.places.is_empty());
    let asks: Vec<_> = asks.map(Waker::ask).collect();
    allocate_all(&asks, &how.patience)?;
    drop(asks);
    let mut parts = Vec::new();
    if let Some(copies) = &mut copies
        && let Err(error) = copy_in(&wakers, how, copies, &mut parts)
    {
        undo(engine, wakers, copies);
        return Err(error);
    }
    let end = parts.last().map(|part: &Coming| part.end.clone());
    let woken = wakers
        .into_iter()
        .filter_map(|waker| waker.wake(end.as_ref()));
    let hosts: Vec<_> = woken.collect();
    let took = sync::now().saturating_sub(began);
    let mut state = engine.state.lock();
    state.quietly().counters.count_wake(ranges.len(), took);
    drop(state);
    engine.worker.wake(engine, false);
    Ok(copies.map_or_else(Arrival::default, |copies| {
        Arrival::new(copies, parts, hosts)
    }))
}

/// Queues copies of all contents. Either waits for them, or notes the end of each part.
fn copy_in(
    wakers: &[Waker<'_>],
    how: &Waking<'_>,
    copies: &mut Copies,
    parts: &mut Vec<Coming>,
) -> Result<()> {
    for waker in wakers {
        waker.copy_in(how, copies, parts)?;
    }
    match how.waits {
        true => copies.finish(),
        false => Ok(()),
    }
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
    fn begin(handle: &'a RangeHandle, first: &[Range<usize>]) -> Result<Self> {
        let capacity_bytes = handle.slot.lock_open()?.capacity_bytes;
        for bytes in first {
            Extent::new(bytes.start, bytes.len(), capacity_bytes)?;
        }
        let change = Change::to_wake(handle)?;
        let live = change.asleep().map(|asleep| &asleep.live);
        let live = live.into_iter().flat_map(|live| live.iter());
        let places = live.map(|bytes| (Place::At(bytes.start), bytes.len()));
        Ok(Self {
            places: places.collect(),
            change,
        })
    }

    fn host(&self) -> Option<&Arc<HostBytes>> {
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
    fn copy_in(
        &self,
        how: &Waking<'_>,
        copies: &mut Copies,
        coming: &mut Vec<Coming>,
    ) -> Result<()> {
        let Some((asleep, host)) = self.change.asleep().zip(self.host()) else {
            return Ok(());
        };
        let handle = self.change.handle;
        let range = handle.slot.lock();
        let target = range.target();
        drop(range);
        let base = target.ok_or(VmmError::Closed)?.reservation.address();
        for part in in_order(&asleep.live, how.first, copies.part_bytes()) {
            copies.queue_in(base, &part, host)?;
            if !how.waits {
                coming.push(Coming {
                    range: handle.id(),
                    bytes: part.bytes,
                    end: copies.end()?,
                });
            }
        }
        Ok(())
    }

    /// Ends its wake. What is freed from now on waits for `end`. Returns the host bytes, of which
    /// the range may keep a clone; dropped without a lock.
    fn wake(mut self, end: Option<&Arc<Fence>>) -> Option<Arc<HostBytes>> {
        let asleep = self.change.take_asleep()?;
        let slot = &self.change.handle.slot;
        let mut range = slot.lock();
        let host = asleep.host;
        let copy = host.clone().filter(|_| asleep.is_constant);
        let copy = copy.map(|host| range.copy_of_now(host));
        range.rest = Rest::Awake(copy);
        range.look_ahead();
        let ends = end.and_then(|end| range.users.add_end(end));
        drop(range);
        if let Some(ends) = ends {
            drop(slot.take_past(&ends));
        }
        host
    }
}
