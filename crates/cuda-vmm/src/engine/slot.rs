//! One range behind its lock, and what is asked of others' code and of the driver before that lock
//! is taken.

use super::at_work::AtWork;
use super::books::account::AccountId;
use super::books::range_id::RangeId;
use super::books::tally::RangeLook;
use super::range::Range;
use super::range::leases::{Asked, Asker};
use super::users::Users;
use crate::foreign;
use crate::process::Process;
use crate::sync::{self, Apart, Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use crate::sys::CUDA_ERROR_CAPTURED_EVENT;
use crate::{Fence, Result, VmmError};
use core::ops::{Deref, DerefMut};
use core::time::Duration;

/// A range by its name and by its lock; a cheap clone.
#[derive(Debug, Clone)]
pub(crate) struct Slot {
    id: RangeId,
    account: AccountId,
    process: Process,
    shared: Arc<Apart<Shared>>,
}

#[derive(Debug)]
struct Shared {
    held: Mutex<Held>,
    /// Signalled when the tokens of the range's leases were asked.
    answered: Condvar,
    changed: Arc<Changed>,
}

/// A range, and whether it is among those that the engine is to look at again.
#[derive(Debug)]
struct Held {
    range: Range,
    is_listed: bool,
}

/// The ranges that were changed since the engine looked at them.
///
/// A range is listed under its own lock. So a thread that works on one range only, and whose engine
/// does not look, writes to no cache line in common with others.
#[derive(Debug, Default)]
pub(crate) struct Changed(Mutex<Vec<RangeId>>);

impl Changed {
    fn list(&self) -> MutexGuard<'_, Vec<RangeId>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes all of them out. Each is to be looked at.
    pub(crate) fn take(&self) -> Vec<RangeId> {
        core::mem::take(&mut *self.list())
    }
}

/// A range that is locked. Dropping it has the engine look at the range again, if it was changed.
#[derive(Debug)]
pub(crate) struct RangeLock<'a> {
    slot: &'a Slot,
    held: MutexGuard<'a, Held>,
    is_changed: bool,
}

impl Deref for RangeLock<'_> {
    type Target = Range;

    fn deref(&self) -> &Range {
        &self.held.range
    }
}

impl DerefMut for RangeLock<'_> {
    fn deref_mut(&mut self) -> &mut Range {
        self.is_changed = true;
        &mut self.held.range
    }
}

impl Drop for RangeLock<'_> {
    fn drop(&mut self) {
        if self.is_changed && !self.held.is_listed {
            self.held.is_listed = true;
            self.slot.shared.changed.list().push(self.slot.id);
        }
    }
}

impl Slot {
    /// A range that is listed among those that were changed.
    pub(crate) fn new(id: RangeId, process: Process, range: Range, changed: &Arc<Changed>) -> Self {
        let account = range.account;
        changed.list().push(id);
        let is_listed = true;
        let shared = Arc::new(Apart(Shared {
            held: Mutex::new(Held { range, is_listed }),
            answered: Condvar::new(),
            changed: changed.clone(),
        }));
        Self {
            id,
            account,
            process,
            shared,
        }
    }

    pub(crate) fn id(&self) -> RangeId {
        self.id
    }

    /// The account that it is charged to.
    pub(crate) fn account(&self) -> AccountId {
        self.account
    }

    /// Fails in a forked process, where the lock may be held for good.
    pub(crate) fn check_process(&self) -> Result<()> {
        self.process.check()
    }

    /// Locks the range without the engine, or beside it. The caller tells of a change by hand
    /// (`changes`).
    pub(crate) fn lock(&self) -> RangeLock<'_> {
        let held = self.shared.held.lock();
        self.locked(held.unwrap_or_else(PoisonError::into_inner))
    }

    /// Locks the range, unless another thread has it.
    pub(crate) fn try_lock(&self) -> Option<RangeLock<'_>> {
        match self.shared.held.try_lock() {
            Ok(held) => Some(self.locked(held)),
            Err(TryLockError::Poisoned(held)) => Some(self.locked(held.into_inner())),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    fn locked<'a>(&'a self, held: MutexGuard<'a, Held>) -> RangeLock<'a> {
        RangeLock {
            slot: self,
            held,
            is_changed: false,
        }
    }

    /// Looks at the range, which was taken out of the list of those that were changed.
    pub(crate) fn look(&self) -> RangeLook {
        let mut lock = self.lock();
        lock.held.is_listed = false;
        lock.look()
    }

    /// Locks the range if it is open.
    ///
    /// # Errors
    /// [`VmmError::Forked`], [`VmmError::Closed`].
    pub(crate) fn lock_open(&self) -> Result<RangeLock<'_>> {
        self.check_process()?;
        let range = self.lock();
        match range.closed {
            false => Ok(range),
            true => Err(VmmError::Closed),
        }
    }

    /// Asks the tokens of the range's leases, or of those over some parts, and ends the leases of
    /// those that are released.
    ///
    /// The caller holds no lock: the tokens are out of the range while they are asked, and the
    /// leases stay until they have answered.
    pub(crate) fn ask_tokens(&self, asker: Asker, over: Option<&[(usize, usize)]>) {
        let mut range = self.lock();
        if range.leases.is_empty() {
            return;
        }
        if asker == Asker::Waiting && !AtWork::any() {
            drop(range);
            range = self.await_answers();
        }
        let mut asked = range.leases.begin_asking(over);
        drop(range);
        let ask = |(number, mut token): Asked| {
            let is_released = foreign::call(|| token.is_released());
            if is_released.is_none() {
                crate::events::debug!("a lease's token panicked, and counts as not released");
            }
            ((number, token), is_released.unwrap_or_default())
        };
        while !asked.is_empty() {
            let answers = asked.into_iter().map(ask).collect();
            let mut range = self.lock();
            let released = range.leases.answer(answers);
            asked = range.leases.next_tokens();
            drop(range);
            if asked.is_empty() {
                self.shared.answered.notify_all();
            }
            drop(released);
        }
    }

    /// Waits while another thread asks the tokens, but not for long: what they do is not the
    /// engine's.
    fn await_answers(&self) -> RangeLock<'_> {
        let (shared, limit) = (&self.shared, Duration::from_millis(100));
        let held = shared.held.lock().unwrap_or_else(PoisonError::into_inner);
        let is_asked = |held: &mut Held| held.range.leases.is_asked_elsewhere();
        let held = sync::wait_timeout_while(&shared.answered, &shared.held, held, limit, is_asked);
        self.locked(held)
    }

    /// What a free of the range has to wait for: `users` without streams that no caller can use any
    /// more, and without ends that are past. The caller holds no lock.
    pub(crate) fn settle_users(&self, users: Users) -> Users {
        if users.are_lasting() {
            return users;
        }
        self.let_go(&users);
        let past = self.take_past(users.ends());
        drop((past, users));
        self.lock().users.clone()
    }

    /// Stops naming streams that no caller can use any more. What is still queued on them is waited
    /// for once.
    fn let_go(&self, users: &Users) {
        let abandoned = users.abandoned();
        if !abandoned.is_empty() {
            let dropped = self.lock().users.let_go(&abandoned);
            // Streams go without the lock.
            drop(dropped);
        }
    }

    /// Takes out the ends that are past, to be dropped without the lock.
    pub(crate) fn take_past(&self, ends: &[Arc<Fence>]) -> Vec<Arc<Fence>> {
        let (mut past, mut captured) = (Vec::new(), false);
        for end in ends {
            match end.is_complete() {
                Ok(true) => past.push(end),
                Ok(false) => {}
                Err(error) if error.is_poisoned() => past.push(end),
                // A capture began between the question whether there is one and the record.
                Err(error) if error.driver_code() == Some(CUDA_ERROR_CAPTURED_EVENT) => {
                    captured = true;
                    past.push(end);
                }
                Err(_) => {}
            }
        }
        if past.is_empty() {
            return Vec::new();
        }
        let mut range = self.lock();
        if captured {
            range.users.open_to_all();
        }
        range.users.take_ends(&past)
    }
}
