//! An account: a share of an engine's budget, to which ranges are charged.

use super::accounts::AccountEntry;
use super::books::account::{AccountId, Quota};
use super::inner::{Engine, Inner};
use super::owed::Owed;
use super::scope::Scope;
use super::stats::{AccountStats, Givable};
use crate::process::Here;
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{Arc, Mutex, PoisonError, Weak};
use crate::{Result, VmmError};
use core::fmt;
use core::task::Waker;

/// A share of an engine's budget: a guarantee, a ceiling, a priority, and what it holds. A cheap
/// clone.
///
/// Any number of ranges can be charged to it: pools by
/// [`VirtualMemoryPool::on_account`](crate::VirtualMemoryPool::on_account), block tables by
/// [`BlockBacking::on_account`](crate::pool::blocks::BlockBacking::on_account). A model of a
/// [`SharedMemoryPool`](crate::SharedMemoryPool) is an account, and a pool that is made alone has
/// one of its own.
///
/// An account ends when it is [closed](Self::close), or when the last clone of it and the last pool
/// on it are dropped. Its guarantee is given up then.
///
/// ```
/// # #[cfg(feature = "simulator")] {
/// use cuda_vmm::{Driver, Engine, EngineOptions, PoolOptions, Quota, VirtualMemoryPool};
///
/// let device = Driver::detect()?.device(0)?;
/// let engine = Engine::new(&device, EngineOptions::new().limit_bytes(8 << 30))?;
/// let chat = engine.account("chat", Quota::new().guarantee_bytes(2 << 30))?;
/// let code = engine.account("code", Quota::new())?;
/// assert_eq!(code.available_bytes(), 6 << 30); // the rest is kept for `chat`
///
/// let page_bytes = device.granularity_bytes();
/// let range = VirtualMemoryPool::on_account(&code, 64 << 30, page_bytes, PoolOptions::new())?;
/// range.allocate(0, 6 << 30)?;
/// assert_eq!(code.available_bytes(), 0);
/// assert_eq!(chat.available_bytes(), 2 << 30);
/// # }
/// # Ok::<(), cuda_vmm::VmmError>(())
/// ```
#[derive(Clone)]
pub struct Account(Arc<Shared>);

struct Shared {
    engine: Engine,
    id: AccountId,
    name: Arc<str>,
    owed: Here<Arc<Owed>>,
    /// What holds memory on it that could be given up.
    reclaimers: Mutex<Vec<Weak<dyn Reclaimer>>>,
    /// How many [`Demand`] guards there are.
    demands: AtomicUsize,
}

/// Something that holds memory on an account and can say how much of it could be given up.
pub(crate) trait Reclaimer: Send + Sync {
    /// Bytes of whole pages that could be given up without losing what is in use.
    fn reclaimable_bytes(&self) -> usize;
}

/// Keeps what an account asks for in mind for as long as it lives; see [`Account::demand`].
#[derive(Debug)]
#[must_use = "dropping it withdraws what the account was refused"]
pub struct Demand(Account);

impl Engine {
    /// Opens an account.
    ///
    /// # Errors
    /// [`VmmError::ModelAlreadyRegistered`] if an open account of the engine has this name;
    /// [`VmmError::QuotaUnsatisfiable`] if the guarantee is above the ceiling, or cannot hold
    /// beside what others hold and are guaranteed; [`VmmError::Forked`].
    pub fn account(&self, name: &str, quota: Quota) -> Result<Account> {
        self.open_account(Some(name), quota)
    }

    /// Opens an account that is called by its number, without a guarantee or a ceiling.
    ///
    /// # Errors
    /// [`VmmError::Forked`].
    pub fn own_account(&self) -> Result<Account> {
        self.open_account(None, Quota::new())
    }

    fn open_account(&self, name: Option<&str>, quota: Quota) -> Result<Account> {
        let inner = self.open()?;
        let (id, entry) = inner.make_room_for(|state| {
            if let Some(name) = name.filter(|name| state.accounts.has_name(name)) {
                let model = name.to_owned();
                return Err(VmmError::ModelAlreadyRegistered { model });
            }
            let id = state.ledger.open(quota)?;
            Ok((id, state.accounts.insert(id, name)))
        })?;
        Ok(Account(Arc::new(Shared {
            engine: self.clone(),
            id,
            name: entry.name,
            owed: Here::new(inner.device.driver().process(), entry.owed),
            reclaimers: Mutex::default(),
            demands: AtomicUsize::new(0),
        })))
    }
}

impl Account {
    /// Its name; `#` and a number if it was made with a pool.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The engine that it is on.
    pub fn engine(&self) -> &Engine {
        &self.0.engine
    }

    pub(crate) fn id(&self) -> AccountId {
        self.0.id
    }

    /// What it owes.
    pub(crate) fn owed(&self) -> Result<&Arc<Owed>> {
        self.0.owed.get()
    }

    /// Has [`givable`](Self::givable) ask this as well, for as long as it lives.
    pub(crate) fn add_reclaimer(&self, reclaimer: Weak<dyn Reclaimer>) {
        let mut reclaimers = self.0.reclaimers();
        reclaimers.retain(|reclaimer| reclaimer.strong_count() > 0);
        reclaimers.push(reclaimer);
    }

    /// What it may hold now.
    ///
    /// # Errors
    /// [`VmmError::Closed`], [`VmmError::Forked`].
    pub fn quota(&self) -> Result<Quota> {
        let state = self.engine().open()?.state.lock();
        let quota = state.ledger.quota(self.id());
        quota.ok_or(VmmError::Closed)
    }

    /// What it holds now, on all its ranges; all zero if it is closed, and in a forked process.
    pub fn stats(&self) -> AccountStats {
        let engine = self.engine().open();
        engine.map_or_else(
            |_| AccountStats::default(),
            |engine| engine.state.lock().quietly().account_stats(self.id()),
        )
    }

    /// What the device really holds for it, in bytes; 0 in a forked process. Unlike
    /// [`stats`](Self::stats) it looks at no range.
    pub fn committed_bytes(&self) -> usize {
        let engine = self.engine().open();
        engine.map_or(0, |engine| {
            engine.state.lock().ledger.account_bytes(self.id())
        })
    }

    /// Changes what it may hold, and its priority, while it runs: all three, up or down.
    ///
    /// The ceiling may be below what it holds. Then it gets no more, it owes what is above
    /// ([`owed_bytes`](Self::owed_bytes)), and what of that is parked or made ahead goes with the
    /// next step.
    ///
    /// # Errors
    /// [`VmmError::QuotaUnsatisfiable`] if the guarantee is above the ceiling, or rises to more than
    /// what the account holds and what others neither hold nor are guaranteed;
    /// [`VmmError::Closed`], [`VmmError::Forked`]. Then nothing has changed.
    pub fn set_quota(&self, quota: Quota) -> Result<()> {
        let engine = self.engine().open()?;
        engine.make_room_for(|state| state.ledger.set_quota(self.id(), quota))?;
        // What it has to spare above its ceiling goes with the next step.
        engine.worker.wake(engine, false);
        Ok(())
    }

    /// How many bytes it is asked to give back; one atomic read. What it frees counts at once,
    /// though the device may still use it. 0 in a forked process.
    ///
    /// It owes
    /// - what it holds above a ceiling that was lowered;
    /// - its share of what all accounts hold above a limit that was lowered
    ///   ([`Engine::set_limit_bytes`]);
    /// - its share of what another account waits for, or was refused and has neither got since nor
    ///   [withdrawn](Self::withdraw), as far as that does not come back by itself.
    ///
    /// Accounts that hold more than their guarantee owe: those of the lowest priority first, none
    /// of a higher priority than the one that asks, and of one priority the one furthest above its
    /// guarantee first. Nothing is taken by force: an account that does not give back keeps what it
    /// has, and gets no more meanwhile.
    ///
    /// Read it where giving back is easy, for instance between two steps of a model.
    pub fn owed_bytes(&self) -> usize {
        self.0.owed.get().map_or(0, |owed| owed.bytes())
    }

    /// Sets what is woken each time [`owed_bytes`](Self::owed_bytes) has risen; `None` removes it.
    ///
    /// It is woken on any thread, with no lock held; a panic in it is caught. That thread may be
    /// one that allocates, so the waker should do no more than wake. Read `owed_bytes` after this
    /// call: a rise before it woke nothing. In a forked process this does nothing.
    ///
    /// The account keeps the waker. A waker that owns the account keeps it for good: let it hold a
    /// `Weak`.
    pub fn set_owed_waker(&self, waker: Option<Waker>) {
        if let Ok(owed) = self.0.owed.get() {
            owed.more.set(waker);
        }
    }

    /// Sets the waker for memory that the account was refused and has not asked for again; `None`
    /// removes it. It is woken when there may be such memory, as
    /// [`set_owed_waker`](Self::set_owed_waker) says. That counts what it is refused from now on.
    /// It may be woken more than once, and in vain
    /// if another thread is faster.
    ///
    /// For a single allocation there is
    /// [`VirtualMemoryPool::allocate_async`](crate::VirtualMemoryPool::allocate_async).
    pub fn set_memory_waker(&self, waker: Option<Waker>) {
        if let Ok(owed) = self.0.owed.get() {
            owed.memory.set(waker);
        }
    }

    /// Gives back to the driver what the account holds and does not use, parked or made ahead;
    /// returns the bytes. What is owed is worked out anew.
    ///
    /// It frees nothing that is live. Waits for nothing: what still retires goes to those that wait
    /// for it when the device has finished with it.
    ///
    /// # Errors
    /// The driver's, if it refused; what it refused is in quarantine. [`VmmError::Forked`].
    pub fn give_back(&self) -> Result<usize> {
        let engine = self.engine().open()?;
        engine.poll();
        let (bytes, outcome) = engine.give_up(Scope::Account(self.id()), |_| false);
        let mut state = engine.state.lock();
        // Also if nothing went: what is owed is worked out anew.
        state.note_change();
        let has_room = state.starved.has_room(state.ledger.committed_bytes());
        drop(state);
        if has_room {
            engine.worker.wake(engine, false);
        }
        outcome.map(|()| bytes)
    }

    /// What the account could give back now, by how that is done. 0 in a forked process.
    ///
    /// Makes no driver calls. It plans the reclaiming of all blocks of the account's block tables,
    /// which takes time with their number.
    pub fn givable(&self) -> Givable {
        let Ok(engine) = self.engine().open() else {
            return Givable::default();
        };
        let mut givable = engine.state.lock().quietly().givable(self.id());
        // Asked without the lock.
        let reclaimers = self.0.reclaimers().clone();
        let reclaimers = reclaimers.iter().filter_map(Weak::upgrade);
        givable.reclaimable_bytes = reclaimers
            .map(|reclaimer| reclaimer.reclaimable_bytes())
            .sum();
        givable
    }

    /// How much memory an allocation could get now without waiting, in bytes: what the limit, the
    /// account's ceiling, the guarantees of others and those that stand in line leave to it. What
    /// any account has parked or made ahead counts, since it is given up for an allocation; so does
    /// the cache. Memory that retires does not.
    ///
    /// Asking takes nothing. Another thread may take it before the caller does. The device itself
    /// may have less. 0 if the account is closed, and in a forked process. Makes no driver calls.
    pub fn available_bytes(&self) -> usize {
        let engine = self.engine().open();
        engine.map_or(0, |engine| {
            let mut state = engine.state.lock();
            state.quietly().available_bytes(self.id(), None)
        })
    }

    /// Forgets what the account was refused and does not wait for, so that others no longer owe it;
    /// returns the bytes, 0 if there was none.
    ///
    /// A refusal is remembered until its range is served, asks again, or had room for it some times;
    /// meanwhile others are asked to give back. If the range is closed, any range of the account
    /// that is served or asks ends it. If the memory is no longer wanted, because a client has gone
    /// for instance, withdraw it. A [`Demand`] does so when it is dropped.
    pub fn withdraw(&self) -> usize {
        let engine = self.engine().open();
        engine.map_or(0, |engine| engine.state.lock().ledger.withdraw(self.id()))
    }

    /// A guard for what the account is about to ask for: when the last one of the account is
    /// dropped, what it was refused meanwhile is [withdrawn](Self::withdraw). So a client that
    /// leaves cannot forget to.
    pub fn demand(&self) -> Demand {
        self.0.demands.fetch_add(1, Ordering::SeqCst);
        Demand(self.clone())
    }

    /// Ends the account: its guarantee is given up, and its name can be used again.
    ///
    /// Its pools, tensors and block tables get no memory any more: they return
    /// [`VmmError::Closed`]. What is live in them stays until their owners free it, and is charged
    /// to no open account. Closing twice does nothing, and so does a forked process.
    pub fn close(&self) {
        self.0.close();
    }
}

impl Shared {
    fn reclaimers(&self) -> crate::sync::MutexGuard<'_, Vec<Weak<dyn Reclaimer>>> {
        let reclaimers = self.reclaimers.lock();
        reclaimers.unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) {
        let Ok(engine) = self.engine.open() else {
            return;
        };
        let (entry, is_empty) = engine.close_account(self.id);
        drop(entry);
        // Nothing is owed or comes any more. A range that is kept may be the last to hold what is
        // owed, and ends with the engine locked: so the wakers, which are code of others, go now.
        if let Ok(owed) = self.owed.get() {
            owed.more.set(None);
            owed.memory.set(None);
        }
        if !is_empty {
            // What it has parked goes with the next step.
            engine.worker.wake(engine, false);
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.close();
    }
}

/// Whether both are handles of the same account.
impl PartialEq for Account {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Account {}

impl fmt::Debug for Account {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = formatter.debug_struct("Account");
        debug.field("name", &self.name()).finish_non_exhaustive()
    }
}

impl Drop for Demand {
    fn drop(&mut self) {
        if self.0.0.demands.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.withdraw();
        }
    }
}

impl Inner {
    /// Closes an account in the books. Hands out what it leaves, to be dropped without the lock,
    /// and whether nothing is charged to it.
    fn close_account(&self, id: AccountId) -> (Option<AccountEntry>, bool) {
        let mut state = self.state.lock();
        let entry = state.accounts.remove(id);
        if let Some(entry) = &entry {
            // What it owes is not worked out any more.
            entry.owed.set(0);
            state.ledger.close(id);
            state.starved.note_other_room();
            state.look_again();
            for slot in state.ranges.of_account(id) {
                slot.lock().is_account_closed = true;
            }
        }
        (entry, state.ledger.account_bytes(id) == 0)
    }
}
