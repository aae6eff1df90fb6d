//! Which streams may have work on a range's memory: their work must be past before freed memory
//! goes.
//!
//! ```text
//! use_stream          named ──────────────┐ a fence of its own at each free
//! forget_stream,                          │
//! the last clone gone    └─► its end ─────┤ one fence, recorded when it stops being named
//! commit's copies            their end ───┘
//! leased, or an end that cannot be told:  all work, of every stream (`all`)
//! ```
//!
//! A named stream that a caller holds may get work at any time, of which the pool does not hear. So
//! each free asks it. If several are named, those that are idle then need no fence: all that was
//! queued before the free is done. A stream that only pools still hold can get no more work. Its
//! *end* is the fence behind the last of its work: the pool waits for the end and names the stream
//! no more.

use crate::stream::{self, Named};
use crate::sync::Arc;
use crate::{Fence, Stream, VmmError};

/// Which streams may have work on a range's memory; a cheap clone. Clones are dropped without a
/// lock: they may be the last to hold streams and fences, which calls the driver.
#[derive(Debug, Clone)]
pub(crate) struct Users {
    /// Streams that are named, each with the number of its naming; the numbers rise.
    streams: Arc<[(u64, Named)]>,
    /// The number of the next naming.
    next: u64,
    /// Whether any stream was named and not all were forgotten: then only those that are named use
    /// the range.
    names: bool,
    /// The ends of streams that are no longer named, and of copies on streams that never were.
    ends: Vec<Arc<Fence>>,
    /// Whether the range was leased, or a stream had no end to give. Then any stream of any device
    /// may have work on the range.
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
    /// The streams whose fences together end all work on the range; `None` if only a fence of the
    /// context, or of all contexts, does. The per-thread default stream is another one for each
    /// thread.
    pub(crate) fn streams(&self) -> Option<&[(u64, Named)]> {
        let can_tell = !self.all && self.has_followers();
        can_tell.then_some(&self.streams)
    }

    /// Whether the streams that are named, which get all later work, can be made to wait for
    /// fences.
    fn has_followers(&self) -> bool {
        let is_per_thread = |(_, named): &(u64, Named)| named.handle().is_per_thread();
        self.names && !self.streams.iter().any(is_per_thread)
    }

    /// The streams that get all later work, if they can be made to wait for fences.
    pub(crate) fn followers(&self) -> Option<&[(u64, Named)]> {
        self.has_followers().then_some(&self.streams)
    }

    /// All streams that are named.
    pub(crate) fn named(&self) -> impl Iterator<Item = &Arc<stream::Handle>> {
        self.streams.iter().map(|(_, named)| named.handle())
    }

    /// Whether both are the same streams and ends.
    pub(crate) fn are(&self, other: &Self) -> bool {
        let same_ends = self.ends.len() == other.ends.len()
            && (self.ends.iter().zip(&other.ends)).all(|(one, other)| Arc::ptr_eq(one, other));
        let named = self.named().map(Arc::as_ptr);
        same_ends
            && (self.names, self.all) == (other.names, other.all)
            && named.eq(other.named().map(Arc::as_ptr))
    }

    /// The number of the next naming: those of all streams that are named are smaller.
    pub(crate) fn next(&self) -> u64 {
        self.next
    }

    pub(crate) fn ends(&self) -> &[Arc<Fence>] {
        &self.ends
    }

    /// Whether work on any stream of any device counts.
    pub(crate) fn are_all(&self) -> bool {
        self.all
    }

    /// From now on any stream of any device may have work on the range.
    pub(crate) fn open_to_all(&mut self) {
        self.all = true;
    }

    pub(crate) fn is_named(&self, stream: &stream::Handle) -> bool {
        // Both are alive, so equal handles of the driver's are one stream.
        self.named().any(|named| named.raw() == stream.raw())
    }

    /// Names another stream. Returns what is to be dropped without the lock.
    #[must_use]
    pub(crate) fn name(&mut self, stream: &Stream) -> Arc<[(u64, Named)]> {
        let more = (self.next, stream.named());
        (self.next, self.names) = (self.next + 1, true);
        let all = self.streams.iter().cloned().chain([more]).collect();
        core::mem::replace(&mut self.streams, all)
    }

    /// Stops naming a stream, whose work ends at `end`. Returns what is to be dropped without the
    /// lock.
    #[must_use]
    pub(crate) fn forget(&mut self, stream: &stream::Handle, end: End) -> Arc<[(u64, Named)]> {
        let dropped = self.un_name(|named| named.handle().raw() == stream.raw());
        // If no stream is named any more, other streams may use the range unnamed.
        self.names = !self.streams.is_empty();
        match end {
            End::Past => {}
            End::At(end) => self.ends.push(end),
            End::Unknown => self.all = true,
        }
        dropped
    }

    /// Stops naming streams that no caller can use any more, and waits for their ends instead,
    /// unless another thread has done it. Returns what is to be dropped without the lock.
    #[must_use]
    pub(crate) fn let_go(&mut self, gone: &[(Named, End)]) -> Arc<[(u64, Named)]> {
        let before = self.streams.len();
        let is_gone = |named: &Named| {
            let mut gone = gone.iter();
            gone.any(|(gone, _)| Arc::ptr_eq(gone.handle(), named.handle()))
        };
        let dropped = self.un_name(is_gone);
        if self.streams.len() < before {
            let ends = gone.iter().filter_map(|(_, end)| match end {
                End::At(end) => Some(end.clone()),
                End::Past | End::Unknown => None,
            });
            self.ends.extend(ends);
        }
        dropped
    }

    /// Streams that no caller can use any more, with the ends of their work. One that is being
    /// captured has no end yet: the next free asks again.
    pub(crate) fn abandoned(&self) -> Vec<(Named, End)> {
        let abandoned = self.streams.iter().filter(|(_, named)| named.is_let_go());
        let ended = abandoned.map(|(_, named)| (named.clone(), End::of(named.handle())));
        ended
            .filter(|(_, end)| !matches!(end, End::Unknown))
            .collect()
    }

    /// Whether no named stream was abandoned and no end is kept, so that a look changes nothing.
    pub(crate) fn are_lasting(&self) -> bool {
        let mut streams = self.streams.iter();
        self.ends.is_empty() && !streams.any(|(_, named)| named.is_let_go())
    }

    /// Adds the end of a stream that is not named. Returns all ends if the caller is to look which
    /// are past. That is now and then, so that many at once do not cost the square of their number.
    pub(crate) fn add_end(&mut self, end: &Arc<Fence>) -> Option<Vec<Arc<Fence>>> {
        self.ends.push(end.clone());
        let is_look = self.ends.len() >= 8 && self.ends.len().is_power_of_two();
        is_look.then(|| self.ends.clone())
    }

    /// Takes out ends that are past. The caller drops them without the lock.
    #[must_use]
    pub(crate) fn take_ends(&mut self, past: &[&Arc<Fence>]) -> Vec<Arc<Fence>> {
        let is_past = |end: &Arc<Fence>| past.iter().any(|past| Arc::ptr_eq(past, end));
        self.ends.extract_if(.., |end| is_past(end)).collect()
    }

    /// Stops naming streams. Returns what is to be dropped without the lock.
    #[must_use]
    fn un_name(&mut self, gone: impl Fn(&Named) -> bool) -> Arc<[(u64, Named)]> {
        let left = self.streams.iter().filter(|(_, named)| !gone(named));
        let left = left.cloned().collect();
        core::mem::replace(&mut self.streams, left)
    }
}

/// What is known of the end of a stream: the fence behind its last work.
pub(crate) enum End {
    /// The device has finished with the work.
    Past,
    /// This fence is behind it.
    At(Arc<Fence>),
    /// The stream gives no fence: only a fence of the context is behind its work.
    Unknown,
}

impl End {
    /// The end of the work queued so far on a stream. The per-thread default stream stands for
    /// those of all threads, so its end is unknown.
    ///
    /// The end of a stream that is being captured is unknown: an event recorded there belongs to
    /// the capture.
    pub(crate) fn of(stream: &Arc<stream::Handle>) -> Self {
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

#[cfg(all(test, feature = "simulator", not(model_check)))]
mod tests {
    use super::*;
    use crate::Driver;
    use crate::sim::SimConfig;

    /// Ranges whose users are not the same share no fences.
    #[test]
    fn users_with_other_streams_or_other_ends_are_others() {
        let driver = Driver::simulated(SimConfig::new()).expect("a simulator");
        let device = driver.device(0).expect("a device");
        let [first, second] = [(); 2].map(|()| Stream::new(&device).expect("a stream"));
        let end = || Arc::new(first.record().expect("recorded"));
        let [one, other] = [(); 2].map(|()| end());
        let users = |streams: &[&Stream], ends: &[&Arc<Fence>]| {
            let mut users = Users::default();
            streams.iter().for_each(|stream| drop(users.name(stream)));
            ends.iter().for_each(|end| _ = users.add_end(end));
            users
        };
        let all = [
            users(&[], &[]),
            users(&[&first], &[]),
            users(&[&second], &[]),
            users(&[&first, &second], &[]),
            users(&[&first], &[&one]),
            users(&[&first], &[&other]),
            users(&[&first], &[&one, &other]),
        ];
        for (at, users) in all.iter().enumerate() {
            for (other_at, other) in all.iter().enumerate() {
                assert_eq!(users.are(other), at == other_at, "{at}, {other_at}");
            }
        }
    }
}
