//! Whose work may be on a range's memory: what has to be past before memory that is freed may go.
//!
//! ```text
//! use_stream          named ──────────────┐ a fence of its own at each free
//! forget_stream,                          │
//! the last clone gone    └─► its end ─────┤ one fence, recorded when it stops being named, until that is past
//! commit's copies            their end ───┘
//! leased, or an end that cannot be told:  all work, of every stream (`all`)
//! ```
//!
//! A named stream that somebody holds may get work at any time, of which we hear nothing; so it is asked at each free. If
//! several are named, those that are idle then need no fence: all that was queued before the free is done. A stream of
//! which only pools are left can get no more work: its end is final, and it is not named any more.

use super::retire::Until;
use super::{Handle, Inner, RangeId};
use crate::stream::{self, Named};
use crate::sync::Arc;
use crate::sys::CUDA_ERROR_CAPTURED_EVENT;
use crate::{CaptureGuard, Fence, Result, Stream, VmmError};

/// Whose work may be on a range's memory; a cheap clone. Clones are dropped without a lock: they may be the last to hold
/// streams and fences, which calls the driver.
#[derive(Debug, Clone)]
pub(super) struct Users {
    /// Streams that are named, each with the number of its naming; the numbers rise.
    streams: Arc<[(u64, Named)]>,
    /// The number of the next naming.
    next: u64,
    /// Whether any stream was named and not all were forgotten: then only those that are named use the range.
    names: bool,
    /// The ends of work of streams that are not named.
    ends: Vec<Arc<Fence>>,
    /// Whether the range was leased, or an end could not be told: then any stream of any device may have work on it.
    all: bool,
}

impl Default for Users {
    fn default() -> Self {
        Self {
            streams: [].into(),
            next: 0,
            names: false,
            ends: Vec::new(),
            all: false,
        }
    }
}

impl Users {
    /// The streams whose fences together end all work on the range; `None` if the context, or all of them, must answer. The
    /// per-thread default stream is another one for each thread.
    pub(super) fn streams(&self) -> Option<&[(u64, Named)]> {
        let can_tell = !self.all && self.has_followers();
        can_tell.then_some(&self.streams)
    }

    /// Whether the streams that are named, which get all later work, can be made to wait for fences.
    fn has_followers(&self) -> bool {
        let is_per_thread = |(_, named): &(u64, Named)| named.handle().is_per_thread();
        self.names && !self.streams.iter().any(is_per_thread)
    }

    /// The streams that get all later work, if they can be made to wait for fences.
    pub(super) fn followers(&self) -> Option<&[(u64, Named)]> {
        self.has_followers().then_some(&self.streams)
    }

    /// All streams that are named.
    pub(super) fn named(&self) -> impl Iterator<Item = &Arc<stream::Handle>> {
        self.streams.iter().map(|(_, named)| named.handle())
    }

    /// The number of the next naming: those of all streams that are named are smaller.
    pub(super) fn next(&self) -> u64 {
        self.next
    }

    pub(super) fn ends(&self) -> &[Arc<Fence>] {
        &self.ends
    }

    /// Whether work on any stream of any device counts.
    pub(super) fn are_all(&self) -> bool {
        self.all
    }

    /// From now on any stream of any device may have work on the range.
    pub(super) fn open_to_all(&mut self) {
        self.all = true;
    }

    pub(super) fn is_named(&self, stream: &stream::Handle) -> bool {
        // Both are alive, so equal handles of the driver's are one stream.
        self.named().any(|named| named.raw() == stream.raw())
    }

    /// Names another stream. Returns what is to be dropped without the lock.
    #[must_use]
    pub(super) fn name(&mut self, stream: &Stream) -> Arc<[(u64, Named)]> {
        let more = (self.next, stream.named());
        (self.next, self.names) = (self.next + 1, true);
        let all = self.streams.iter().cloned().chain([more]).collect();
        core::mem::replace(&mut self.streams, all)
    }

    /// Names streams no more. Returns what is to be dropped without the lock.
    #[must_use]
    fn un_name(&mut self, gone: impl Fn(&Named) -> bool) -> Arc<[(u64, Named)]> {
        let left = self.streams.iter().filter(|(_, named)| !gone(named));
        let left = left.cloned().collect();
        core::mem::replace(&mut self.streams, left)
    }
}

/// What is known of the end of a stream's work.
enum End {
    /// It is past.
    Past,
    At(Arc<Fence>),
    /// There is no telling: only the context can say.
    Unknown,
}

impl End {
    /// The end of what was queued so far on a stream, or, of the per-thread default stream, on those of all threads.
    ///
    /// A stream that is being captured has none: an event recorded there belongs to the capture.
    fn of(stream: &Arc<stream::Handle>) -> Self {
        let told = || {
            if stream.is_per_thread() || stream.is_capturing()? {
                return Ok(Self::Unknown);
            }
            match stream.is_idle()? {
                true => Ok(Self::Past),
                false => Fence::on_stream(stream).map(|fence| Self::At(Arc::new(fence))),
            }
        };
        told().unwrap_or_else(|error: VmmError| match error.is_poisoned() {
            true => Self::Past,
            false => Self::Unknown,
        })
    }
}

impl Inner {
    /// Names a stream for a range no more: frees wait for what is queued on it now, and not for what comes.
    pub(crate) fn forget_stream(&self, handle: &Handle, stream: &Stream) -> Result<()> {
        self.device.expect_same(stream.device())?;
        let stream = stream.handle();
        if self.with_range(handle, |range| !range.users.is_named(stream))? {
            return Ok(());
        }
        let end = End::of(stream);
        let is_it = |named: &Named| named.handle().raw() == stream.raw();
        let dropped = self.with_range(handle, |range| {
            let dropped = range.users.un_name(is_it);
            // No stream is named any more, so there may be others of which nobody was told.
            range.users.names = !range.users.streams.is_empty();
            match end {
                End::Past => {}
                End::At(end) => range.users.ends.push(end),
                End::Unknown => range.users.all = true,
            }
            dropped
        });
        // Its streams go without the lock.
        dropped.map(drop)
    }

    /// Has a stream come after all work that was queued under leases of a range. False if there is no telling.
    pub(crate) fn order_after_leases(&self, handle: &Handle, stream: &Stream) -> Result<bool> {
        self.device.expect_same(stream.device())?;
        if !self.with_range(handle, |range| range.users.all)? {
            return Ok(true);
        }
        let Some(none) = CaptureGuard::try_none() else {
            return Ok(false);
        };
        if !stream.handle().is_per_thread() && stream.is_capturing()? {
            return Ok(false);
        }
        let Some(fences) = Until::of_contexts(&self.device, true, &none)? else {
            return self.device.finish_work(true).map(|()| true);
        };
        for fence in fences {
            if !fence.is_complete()? {
                stream.wait_for(&fence)?;
            }
        }
        Ok(true)
    }

    /// Has frees of a range wait for an end of work on a stream that is not named.
    pub(crate) fn add_end(&self, handle: &Handle, end: &Arc<Fence>) -> Result<()> {
        let ends = self.with_range(handle, |range| {
            range.users.ends.push(end.clone());
            // Looked through now and then, so that many at once do not cost the square of their number.
            let ends = &range.users.ends;
            let is_look = ends.len() >= 8 && ends.len().is_power_of_two();
            is_look.then(|| ends.clone())
        })?;
        if let Some(ends) = ends {
            drop(self.past_ends(handle, &ends));
        }
        Ok(())
    }

    /// What a free of a range has to wait for: without streams that nobody can use any more, and without ends that are
    /// past.
    pub(super) fn users(&self, handle: &Handle, users: Users) -> Users {
        let are_lasting = !users.streams.iter().any(|(_, named)| named.is_let_go());
        if are_lasting && users.ends.is_empty() {
            return users;
        }
        self.let_go(handle, &users);
        let past = self.past_ends(handle, &users.ends);
        drop((past, users));
        handle.lock().users.clone()
    }

    /// Stops naming streams that nobody can use any more. What is still queued on them is waited for once.
    pub(super) fn let_go(&self, handle: &Handle, users: &Users) {
        let mut ends: Vec<(&Named, End)> = Vec::new();
        for (_, named) in users.streams.iter().filter(|(_, named)| named.is_let_go()) {
            match End::of(named.handle()) {
                // It is captured: asked again at the next free.
                End::Unknown => {}
                end => ends.push((named, end)),
            }
        }
        if ends.is_empty() {
            return;
        }
        let is_gone = |named: &Named| {
            let mut gone = ends.iter();
            gone.any(|(gone, _)| Arc::ptr_eq(gone.handle(), named.handle()))
        };
        let mut range = handle.lock();
        let before = range.users.streams.len();
        let dropped = range.users.un_name(is_gone);
        // Unless another thread has done it meanwhile.
        if range.users.streams.len() < before {
            let ends = ends.iter().filter_map(|(_, end)| match end {
                End::At(end) => Some(end.clone()),
                End::Past | End::Unknown => None,
            });
            range.users.ends.extend(ends);
        }
        drop(range);
        // Streams go without the lock.
        drop(dropped);
    }

    /// Takes out ends that are past, to be dropped without the lock.
    fn past_ends(&self, handle: &Handle, ends: &[Arc<Fence>]) -> Vec<Arc<Fence>> {
        let (mut past, mut useless) = (Vec::new(), false);
        for end in ends {
            match end.is_complete() {
                Ok(true) => past.push(end),
                Ok(false) => {}
                Err(error) if error.is_poisoned() => past.push(end),
                // A capture began between the question whether there is one and the record.
                Err(error) if error.driver_code() == Some(CUDA_ERROR_CAPTURED_EVENT) => {
                    useless = true;
                    past.push(end);
                }
                Err(_) => {}
            }
        }
        if past.is_empty() {
            return Vec::new();
        }
        let mut range = handle.lock();
        range.users.all |= useless;
        let is_past = |end: &Arc<Fence>| past.iter().any(|past| Arc::ptr_eq(past, end));
        range
            .users
            .ends
            .extract_if(.., |end| is_past(end))
            .collect()
    }

    /// Lets go of a range's streams that nobody can use any more, without a free.
    pub(super) fn let_go_of(&self, id: RangeId) {
        let handle = self.lock().ranges.handle(id).cloned();
        if let Some(handle) = handle {
            let users = handle.lock().users.clone();
            drop(self.users(&handle, users));
        }
    }
}
