//! One model, on its thread.

use super::figures::Work;
use super::outbox::Outbox;
use super::peers::Peers;
use super::serving::Serving;
use super::told::{Answer, Command, Peer, Times, Told};
use super::{ModelSpec, Place, Sharing, no_thread};
use crate::batch::BatchDecoder;
use crate::engine::{BLOCK_TOKENS, Budget, Kv, Policy, Runner, Sleeper, pool_options};
use crate::request::{Ended, Event, Generate, ModelInfo, Refusal};
use crate::scheduler::{Id, Limits};
use candle_cuda_vmm::{Account, HostStore, Result, TensorPool, TensorPoolOptions};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Wake, Waker};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{mpsc, oneshot};

/// When a client that was refused may ask again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// How long other models may take to give back what they owe before a sequence is preempted.
const GIVEN: Duration = Duration::from_millis(50);
/// Divisor of the limit: for what all models have ahead.
const AHEAD_SHARE: usize = 16;

/// Divisor of the limit: what is to be free for sequences that begin, as far as prefixes that
/// nothing uses can make room for it.
const FREE_SHARE: usize = 8;

/// What all models have.
#[derive(Clone)]
pub(super) struct Common {
    pub(super) place: Place,
    pub(super) sharing: Sharing,
    pub(super) accounts: Vec<Account>,
    pub(super) budget: Option<Budget>,
    /// What models have while they sleep, and what files are read through.
    pub(super) stores: Option<[HostStore; 2]>,
    /// All models, in the order of the accounts.
    pub(super) peers: Arc<[Peer]>,
}

/// A model that serves.
pub(super) struct Hosted {
    info: ModelInfo,
    commands: Sender<Command>,
    told: Arc<Told>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// Requests that may be open, those that run among them.
    open_max: usize,
}

impl Hosted {
    /// Starts the thread that makes the model of this place among all. The receiver tells whether
    /// it is made.
    pub(super) fn start(
        common: &Common,
        own: usize,
        commands: Receiver<Command>,
        spec: ModelSpec,
    ) -> Result<(Self, Receiver<Result<()>>)> {
        let Peer {
            commands: sender,
            told,
        } = &common.peers[own];
        let (sender, told) = (sender.clone(), told.clone());
        let context = spec.shape.config.max_position_embeddings;
        let created = SystemTime::now().duration_since(UNIX_EPOCH);
        let info = ModelInfo {
            id: spec.name.clone(),
            created: created.map_or(0, |since| since.as_secs()),
            context_tokens_max: context,
            stop_ids: spec.shape.stop_ids.clone(),
            tokenizer: spec.shape.tokenizer.clone(),
            template: spec.shape.template.clone(),
            is_asleep: false,
        };
        let (tell, started) = channel();
        let (sharing, common) = (common.sharing, common.clone());
        let account = common.accounts[own].clone();
        let (look, thread_told) = (sender.clone(), told.clone());
        let builder = thread::Builder::new().name(spec.name.clone());
        let serve = move || {
            let _unwinds = Unwinds(thread_told.clone());
            let mut peers = Peers::new(common.peers.clone(), own);
            let made = make(&common, own, &spec, &mut peers);
            let outbox = || Outbox::new(&spec.name).map_err(no_thread);
            let (runner, outbox) = match made.and_then(|made| Ok((made, outbox()?))) {
                Ok(made) => {
                    _ = tell.send(Ok(()));
                    made
                }
                Err(error) => {
                    thread_told.has_failed.store(true, Ordering::Relaxed);
                    _ = tell.send(Err(error));
                    return;
                }
            };
            let waker = Waker::from(Arc::new(Looks(Mutex::new(look))));
            if let Some(budget) = common.budget {
                budget.wake(waker.clone());
            }
            account.set_owed_waker(Some(waker.clone()));
            account.set_memory_waker(Some(waker));
            let serving = Serving::new(
                runner,
                (account.clone(), spec.quota),
                outbox,
                thread_told,
                peers,
                common.sharing.sleeping,
            );
            serving.run(&commands);
            account.set_owed_waker(None);
            account.set_memory_waker(None);
        };
        let thread = builder.spawn(serve).map_err(no_thread)?;
        let hosted = Self {
            info,
            commands: sender,
            told,
            thread: Mutex::new(Some(thread)),
            open_max: sharing.sequences_max + sharing.waiting_max,
        };
        Ok((hosted, started))
    }

    pub(super) fn info(&self) -> &ModelInfo {
        &self.info
    }

    pub(super) fn is_healthy(&self) -> bool {
        !self.told.has_failed.load(Ordering::Relaxed)
    }

    /// What the thread has published last.
    pub(super) fn work(&self) -> Work {
        self.told.work()
    }

    /// How long steps took.
    pub(super) fn times(&self) -> MutexGuard<'_, Times> {
        self.told
            .times
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands a request to the thread. Waits for nothing.
    pub(super) fn submit(
        &self,
        ask: Generate,
    ) -> core::result::Result<mpsc::Receiver<Event>, Refusal> {
        let (tokens, tokens_max) = (ask.prompt.len(), self.info.context_tokens_max);
        let tokens = tokens.saturating_add(ask.max_tokens);
        if tokens > tokens_max {
            return Err(Refusal::TooLong { tokens, tokens_max });
        }
        if self.told.is_closing.load(Ordering::Relaxed) || !self.is_healthy() {
            return Err(Refusal::Closing);
        }
        self.open()?;
        let id = Id(self.told.next.fetch_add(1, Ordering::Relaxed));
        let (events, receiver) = ask.channel();
        match self.commands.send(Command::Begin(id, ask, events)) {
            Ok(()) => Ok(receiver),
            Err(_) => {
                self.told.closed(1);
                Err(Refusal::Closing)
            }
        }
    }

    /// Has the thread put the model to sleep, or wake it. Waits for nothing.
    pub(super) fn tell(
        &self,
        command: impl FnOnce(Answer) -> Command,
    ) -> core::result::Result<Ended, Refusal> {
        if self.told.is_closing.load(Ordering::Relaxed) || !self.is_healthy() {
            return Err(Refusal::Closing);
        }
        self.open()?;
        let (answer, ended) = oneshot::channel();
        match self.commands.send(command(answer)) {
            Ok(()) => Ok(ended),
            Err(_) => {
                self.told.closed(1);
                Err(Refusal::Closing)
            }
        }
    }

    /// Counts a request, unless too many are open.
    fn open(&self) -> core::result::Result<(), Refusal> {
        if self.told.open.fetch_add(1, Ordering::Relaxed) >= self.open_max {
            self.told.closed(1);
            return Err(Refusal::Busy {
                retry_after: RETRY_AFTER,
            });
        }
        Ok(())
    }

    pub(super) fn clear_prefixes(&self) {
        let (done, wait) = channel();
        if self.commands.send(Command::ClearPrefixes(done)).is_ok() {
            // An error says that the thread has ended.
            _ = wait.recv();
        }
    }

    /// Ends the thread when nothing is left to do, and waits for it.
    pub(super) fn close(&self) {
        self.told.is_closing.store(true, Ordering::Relaxed);
        // An error says that it has ended.
        _ = self.commands.send(Command::Close);
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(Err(_)) = thread.map(JoinHandle::join) {
            tracing::error!(model = self.info.id, "the thread panicked");
        }
    }
}

/// Notes that the thread has failed if it panics.
struct Unwinds(Arc<Told>);

impl Drop for Unwinds {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.has_failed.store(true, Ordering::Relaxed);
        }
    }
}

/// Tells the thread to look at its memory.
struct Looks(Mutex<Sender<Command>>);

impl Wake for Looks {
    fn wake(self: Arc<Self>) {
        let look = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // An error says that the thread has ended.
        _ = look.send(Command::Look);
    }
}

/// Makes a model on its thread.
fn make(common: &Common, own: usize, spec: &ModelSpec, peers: &mut Peers) -> Result<Runner> {
    let account = &common.accounts[own];
    let (device, config) = (common.place.open()?, &spec.shape.config);
    let sharing = &common.sharing;
    let pool = TensorPool::on_account(&device, account, TensorPoolOptions::new())?;
    let sleeper = sleeper(common, account, spec, &pool, peers)?;
    let granularity_bytes = account.engine().device().granularity_bytes();
    let kv_pool = pool_options(config, granularity_bytes);
    let kv_pool = TensorPool::on_account(&device, account, kv_pool)?;
    let weights = match &sleeper {
        Some(sleeper) => sleeper.weights()?,
        None => spec.shape.weights(&device)?,
    };
    let decoder = BatchDecoder::new(config, weights, sharing.sequences_max, &device)?;
    let token = 2 * config.num_hidden_layers * config.kv_heads() * config.head_dim();
    let block_bytes = BLOCK_TOKENS * token * spec.shape.dtype.size_in_bytes();
    let share_bytes = match sharing.policy {
        Policy::Static => sharing.limit_bytes / common.accounts.len(),
        Policy::Elastic | Policy::PageAtATime | Policy::Ideal => sharing.limit_bytes,
    };
    // While others sleep, a model has all but its own weights.
    let weights_bytes = sleeper.as_ref().map_or(0, |_| account.committed_bytes());
    let share_bytes = share_bytes.saturating_sub(weights_bytes);
    let limits = Limits {
        sequences_max: sharing.sequences_max,
        step_tokens_max: sharing.step_tokens_max,
        context_max: config.max_position_embeddings,
        waiting_max: sharing.sequences_max + sharing.waiting_max,
    };
    // No more than all sequences of full length can use.
    let most = limits.sequences_max * limits.context_max.div_ceil(BLOCK_TOKENS);
    let num_blocks = (share_bytes / block_bytes).clamp(1, most);
    // What nobody uses yet is a small part of the limit, for all models together.
    let ahead_max = num_blocks / (AHEAD_SHARE * common.accounts.len());
    let kv = Kv::new(
        &kv_pool,
        config,
        spec.shape.dtype,
        num_blocks,
        ahead_max.min(4 * limits.sequences_max),
        sharing.policy,
    )?;
    let mut others = common.accounts.clone();
    others.remove(own);
    let kv = kv.beside(others, GIVEN);
    let kv = match &common.budget {
        Some(budget) => kv.within(budget.clone(), own, block_bytes),
        None => kv,
    };
    let kv = match sharing.policy {
        Policy::Elastic => kv.keep_free(sharing.limit_bytes, sharing.limit_bytes / FREE_SHARE),
        Policy::Static | Policy::PageAtATime | Policy::Ideal => kv,
    };
    let mut runner = Runner::new(decoder, kv, &device, limits)?;
    if let Some(sleeper) = sleeper {
        runner = runner.sleeping(sleeper);
    }
    if device.is_cuda() {
        runner.capture()?;
        runner.warm_up()?;
    }
    Ok(runner)
}

/// Loads weights that can sleep, if models are to. If there is no room for them, models that have
/// nothing to do sleep.
fn sleeper(
    common: &Common,
    account: &Account,
    spec: &ModelSpec,
    pool: &TensorPool,
    peers: &mut Peers,
) -> Result<Option<Sleeper>> {
    let (Some(sleeping), Some([store, reading])) = (common.sharing.sleeping, &common.stores) else {
        return Ok(None);
    };
    let load = || spec.shape.elastic_weights(pool, reading);
    let weights = peers.with_room(account, sleeping.patience, load)?;
    let (config, dtype) = (&spec.shape.config, spec.shape.dtype);
    Ok(Some(Sleeper::new(weights, config, dtype, store.clone())))
}
