//! One range behind its lock, and what is asked of others' code and of the driver before that lock
//! is taken.

use super::at_work::AtWork;
use super::books::account::AccountId;
use super::books::range_id::RangeId;
use super::range::Range;
use super::range::leases::{Asked, Asker};
use super::users::Users;
use crate::foreign;
use crate::process::Process;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{self, Apart, Arc, Condvar, Mutex, MutexGuard, PoisonError};
use crate::sys::CUDA_ERROR_CAPTURED_EVENT;
use crate::{Fence, Result, VmmError};
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
    range: Mutex<Range>,
    /// Whether a step has something to do for the range. Changed under the range's lock, and read
    /// without it, as there may be many ranges.
    has_work: AtomicBool,
    /// Signalled when the tokens of the range's leases were asked.
    answered: Condvar,
}

impl Slot {
    pub(crate) fn new(id: RangeId, process: Process, range: Range) -> Self {
        let account = range.account;
        let shared = Arc::new(Apart(Shared {
            range: Mutex::new(range),
            has_work: AtomicBool::new(false),
            answered: Condvar::new(),
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
    pub(crate) fn lock(&self) -> MutexGuard<'_, Range> {
        let range = self.shared.range.lock();
        range.unwrap_or_else(PoisonError::into_inner)
    }

    /// Locks the range if it is open.
    ///
    /// # Errors
    /// [`VmmError::Forked`], [`VmmError::Closed`].
    pub(crate) fn lock_open(&self) -> Result<MutexGuard<'_, Range>> {
        self.check_process()?;
        let range = self.lock();
        match range.closed {
            false => Ok(range),
            true => Err(VmmError::Closed),
        }
    }

    /// Notes whether a step has something to do for the range, which the caller has locked and may
    /// have changed.
    pub(crate) fn note(&self, range: &Range) {
        let has_work = range.has_work();
        if self.has_work() != has_work {
            self.shared.has_work.store(has_work, Ordering::SeqCst);
        }
    }

    pub(crate) fn has_work(&self) -> bool {
        self.shared.has_work.load(Ordering::SeqCst)
    }

    /// Asks the tokens of the range's leases, and ends the leases of those that are released.
    ///
    /// The caller holds no lock: the tokens are out of the range while they are asked, and the
    /// leases stay until they have answered.
    pub(crate) fn ask_tokens(&self, asker: Asker) {
        let mut range = self.lock();
        if range.leases.is_empty() {
            return;
        }
        if asker == Asker::Waiting && !AtWork::any() {
            range = self.await_answers(range);
        }
        let asked = range.leases.take_tokens();
        drop(range);
        if asked.is_empty() {
            return;
        }
        let ask = |(number, mut token): Asked| {
            let is_released = foreign::call(|| token.is_released());
            if is_released.is_none() {
                crate::events::debug!("a lease's token panicked, and counts as not released");
            }
            ((number, token), is_released.unwrap_or_default())
        };
        let answers = asked.into_iter().map(ask).collect();
        let released = self.lock().leases.answer(answers);
        self.shared.answered.notify_all();
        drop(released);
    }

    /// Waits while another thread asks the tokens, but not for long: what they do is not the
    /// engine's.
    fn await_answers<'a>(&'a self, range: MutexGuard<'a, Range>) -> MutexGuard<'a, Range> {
        let (shared, limit) = (&self.shared, Duration::from_millis(100));
        let is_asked = |range: &mut Range| range.leases.is_asked_elsewhere();
        sync::wait_timeout_while(&shared.answered, &shared.range, range, limit, is_asked)
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
