//! Waking ranges.

use super::arrival::{Arrival, Coming};
use super::change::Change;
use super::copies::{Copies, Pace};
use super::order::{Part, in_order};
use crate::engine::allocate::{Ask, allocate_all};
use crate::engine::books::intervals::Intervals;
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
}

/// Divisor of all contents: how many of them come before the rest of the memory is mapped.
const EARLY_SHARE: usize = 16;

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
    let mut parts = Vec::new();
    if let Err(error) = bring_back(engine, &wakers, how, &mut copies, &mut parts) {
        if let Some(copies) = &mut copies {
            take_back(engine, &wakers, copies);
        }
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

/// Allocates the memory of all ranges, and queues copies of all contents. Either waits for them, or
/// notes the end of each part. After an error some memory may be there.
fn bring_back(
    engine: &Arc<Inner>,
    wakers: &[Waker<'_>],
    how: &Waking<'_>,
    copies: &mut Option<Copies>,
    coming: &mut Vec<Coming>,
) -> Result<()> {
    let Some(copies) = copies else {
        return allocate(wakers, |waker| waker.live(), &how.patience);
    };
    let mut orders: Vec<_> = wakers
        .iter()
        .map(|waker| waker.order(how, copies))
        .collect();
    // Contents of the first range that has some are under way while the rest is mapped.
    let early = wakers
        .iter()
        .zip(&mut orders)
        .find(|(_, order)| !order.is_empty());
    if let Some((waker, order)) = early
        && let Some(early) = waker.early(order)
    {
        match waker.go_ahead(wakers, early, order, (how, &mut *copies, &mut *coming)) {
            Ok(()) => {}
            Err(error) if error.is_out_of_memory() || error.is_retryable() => {
                // There is not room for all now. So nothing is kept while it waits.
                if !take_back(engine, wakers, copies) {
                    return Err(error);
                }
                coming.clear();
                *order = waker.order(how, copies);
                allocate(wakers, |waker| waker.live(), &how.patience)?;
            }
            Err(error) => return Err(error),
        }
    } else {
        allocate(wakers, |waker| waker.live(), &how.patience)?;
    }
    for (waker, order) in wakers.iter().zip(orders) {
        waker.copy_in(order, how, copies, coming)?;
    }
    match how.waits {
        true => copies.finish(),
        false => Ok(()),
    }
}

/// Allocates some bytes of each range, all or none.
fn allocate(
    wakers: &[Waker<'_>],
    bytes: impl Fn(&Waker<'_>) -> Intervals,
    patience: &Patience,
) -> Result<()> {
    let places = wakers.iter().map(|waker| {
        let bytes = bytes(waker);
        let places = bytes
            .iter()
            .map(|bytes| (Place::At(bytes.start), bytes.len()));
        (waker, places.collect::<Vec<_>>())
    });
    let places: Vec<_> = places.filter(|(_, places)| !places.is_empty()).collect();
    let asks = places.iter().map(|(waker, places)| Ask {
        handle: waker.change.handle,
        places,
        wakes: true,
    });
    allocate_all(&asks.collect::<Vec<_>>(), patience).map(drop)
}

/// Takes back the memory of all ranges, once no copy is under way; returns whether that is so.
fn take_back(engine: &Arc<Inner>, wakers: &[Waker<'_>], copies: &mut Copies) -> bool {
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
    is_over
}

impl<'a> Waker<'a> {
    fn begin(handle: &'a RangeHandle, first: &[Range<usize>]) -> Result<Self> {
        let capacity_bytes = handle.slot.lock_open()?.capacity_bytes;
        for bytes in first {
            Extent::new(bytes.start, bytes.len(), capacity_bytes)?;
        }
        let change = Change::to_wake(handle)?;
        Ok(Self { change })
    }

    fn host(&self) -> Option<&Arc<HostBytes>> {
        self.change.asleep()?.host.as_ref()
    }

    /// The bytes that were live.
    fn live(&self) -> Intervals {
        let asleep = self.change.asleep();
        asleep.map_or_else(Intervals::default, |asleep| asleep.live.clone())
    }

    /// All contents, in the order in which they come; none if there are no host bytes.
    fn order(&self, how: &Waking<'_>, copies: &Copies) -> Vec<Part> {
        match self.host() {
            Some(_) => in_order(&self.live(), how.first, copies.part_bytes()),
            None => Vec::new(),
        }
    }

    /// How many of the parts come first, and what was live in their pages; `None` if they are all.
    fn early(&self, order: &[Part]) -> Option<(usize, Intervals)> {
        let all: usize = order.iter().map(|part| part.bytes.len()).sum();
        let page_bytes = self.change.handle.slot.lock().page_bytes;
        let (mut pages, mut parts, mut bytes) = (Intervals::default(), 0, 0);
        for part in order {
            if bytes >= all / EARLY_SHARE {
                break;
            }
            let Range { start, end } = part.bytes;
            let start = start / page_bytes * page_bytes;
            let new: Vec<_> = pages
                .gaps(start..end.next_multiple_of(page_bytes))
                .collect();
            new.into_iter().for_each(|gap| pages.insert(gap));
            (parts, bytes) = (parts + 1, bytes + part.bytes.len());
        }
        let (live, mut early) = (self.live(), Intervals::default());
        let found = pages.iter().flat_map(|pages| live.parts(pages));
        found.for_each(|bytes| early.insert(bytes));
        (parts < order.len()).then_some((parts, early))
    }

    /// Allocates the memory of the contents that come first, and queues their copies. Then
    /// allocates the rest, of all ranges. It waits for no memory.
    fn go_ahead(
        &self,
        wakers: &[Waker<'_>],
        (parts, early): (usize, Intervals),
        order: &mut Vec<Part>,
        (how, copies, coming): (&Waking<'_>, &mut Copies, &mut Vec<Coming>),
    ) -> Result<()> {
        let is_first = |waker: &Waker<'_>| core::ptr::eq(waker, self);
        let first = |waker: &Waker<'_>| match is_first(waker) {
            true => early.clone(),
            false => Intervals::default(),
        };
        allocate(wakers, first, &Patience::None)?;
        self.copy_in(order.drain(..parts), how, copies, coming)?;
        let rest = |waker: &Waker<'_>| {
            let mut rest = waker.live();
            if is_first(waker) {
                early.iter().for_each(|bytes| rest.remove(&bytes));
            }
            rest
        };
        allocate(wakers, rest, &Patience::None)
    }

    /// Queues copies of these parts of the contents.
    fn copy_in(
        &self,
        parts: impl IntoIterator<Item = Part>,
        how: &Waking<'_>,
        copies: &mut Copies,
        coming: &mut Vec<Coming>,
    ) -> Result<()> {
        let Some(host) = self.host() else {
            return Ok(());
        };
        let handle = self.change.handle;
        let range = handle.slot.lock();
        let target = range.target();
        drop(range);
        let base = target.ok_or(VmmError::Closed)?.reservation.address();
        for part in parts {
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
