//! One model, on its thread.

use super::figures::Work;
use super::outbox::Outbox;
use super::peers::Peers;
use super::told::{Command, Peer, Times, Told};
use super::{ModelSpec, Place, Sharing, no_thread};
use crate::batch::BatchDecoder;
use crate::engine::{BLOCK_TOKENS, Budget, Choice, Kv, Policy, Runner, Stepped};
use crate::request::{Event, FinishReason, Generate, ModelInfo, Refusal};
use crate::scheduler::{Id, Limits};
use candle_cuda_vmm::{Account, Quota, Result, TensorPool, TensorPoolOptions, VmmError};
use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Wake, Waker};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::mpsc;

/// How long a model that has no memory waits before it looks again, if nothing tells it.
const LOOK: Duration = Duration::from_millis(5);
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
        };
        let (tell, started) = channel();
        let (sharing, common) = (common.sharing, common.clone());
        let account = common.accounts[own].clone();
        let (look, thread_told) = (sender.clone(), told.clone());
        let builder = thread::Builder::new().name(spec.name.clone());
        let serve = move || {
            let _unwinds = Unwinds(thread_told.clone());
            let made = make(&common, own, &spec);
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
            let serving = Serving {
                runner,
                account: account.clone(),
                requests: HashMap::new(),
                outbox,
                told: thread_told,
                peers: Peers::new(common.peers, own),
                quota: spec.quota,
                ranks_idle: None,
                is_closing: false,
            };
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
        if self.told.open.fetch_add(1, Ordering::Relaxed) >= self.open_max {
            self.told.open.fetch_sub(1, Ordering::Relaxed);
            return Err(Refusal::Busy {
                retry_after: RETRY_AFTER,
            });
        }
        let id = Id(self.told.next.fetch_add(1, Ordering::Relaxed));
        let (events, receiver) = ask.channel();
        match self.commands.send(Command::Begin(id, ask, events)) {
            Ok(()) => Ok(receiver),
            Err(_) => {
                self.told.open.fetch_sub(1, Ordering::Relaxed);
                Err(Refusal::Closing)
            }
        }
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
fn make(common: &Common, own: usize, spec: &ModelSpec) -> Result<Runner> {
    let account = &common.accounts[own];
    let (device, config) = (common.place.open()?, &spec.shape.config);
    let sharing = &common.sharing;
    let pool = TensorPool::on_account(&device, account, TensorPoolOptions::new())?;
    let weights = spec.shape.weights(&device)?;
    let decoder = BatchDecoder::new(config, weights, sharing.sequences_max, &device)?;
    let token = 2 * config.num_hidden_layers * config.kv_heads() * config.head_dim();
    let block_bytes = BLOCK_TOKENS * token * spec.shape.dtype.size_in_bytes();
    let share_bytes = match sharing.policy {
        Policy::Static => sharing.limit_bytes / common.accounts.len(),
        Policy::Elastic | Policy::PageAtATime | Policy::Ideal => sharing.limit_bytes,
    };
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
        &pool,
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
    if device.is_cuda() {
        runner.capture()?;
        runner.warm_up()?;
    }
    Ok(runner)
}

/// A request that was taken.
struct Request {
    ask: Generate,
    events: mpsc::Sender<Event>,
    sent: usize,
}

/// The state of a model's thread.
struct Serving {
    runner: Runner,
    account: Account,
    requests: HashMap<Id, Request>,
    outbox: Outbox,
    told: Arc<Told>,
    peers: Peers,
    /// What was asked for.
    quota: Quota,
    /// Whether it last ranked as a model that has nothing to do.
    ranks_idle: Option<bool>,
    is_closing: bool,
}

impl Serving {
    fn run(mut self, commands: &Receiver<Command>) {
        let mut has_stepped = true;
        loop {
            self.rank();
            let begun = self.listen(commands, has_stepped);
            self.rank();
            if self.is_closing && self.requests.is_empty() {
                return;
            }
            self.drop_gone();
            let stepped = self.give_back().and_then(|()| self.step());
            if !self.runner.is_idle() {
                match self.runner.kv().missing_bytes() {
                    0 => {}
                    bytes => self.peers.ask(bytes),
                }
            }
            if let Ok(Some(step)) = &stepped {
                self.told.count_time(*step, begun.elapsed());
            }
            self.publish();
            match stepped {
                Ok(stepped) => has_stepped = stepped.is_some(),
                Err(error) => return self.fail(&error),
            }
        }
    }

    /// Tells what there is, and what was done.
    fn publish(&self) {
        let mut work = self
            .told
            .work
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *work = Work {
            counts: self.runner.counts(),
            held: self.runner.held(),
        };
    }

    /// Ranks a model that has nothing to do behind those of its priority that have, and before those
    /// of lower ones. Of equals, only the one that holds more gives back, so the prefixes of an idle
    /// model would stand against what a busy one is short of.
    fn rank(&mut self) {
        let is_idle = self.runner.is_idle();
        if self.ranks_idle == Some(is_idle) {
            return;
        }
        let priority = self.quota.priority.saturating_mul(2);
        let quota = self.quota.priority(priority.saturating_sub(is_idle.into()));
        match self.account.set_quota(quota) {
            Ok(()) => self.ranks_idle = Some(is_idle),
            Err(error) => tracing::warn!(%error, "the model keeps its rank"),
        }
    }

    /// Takes in what it is told. Waits for it if there is nothing to do, and for a while if there
    /// is no memory. Returns when it had waited: from then on it works.
    fn listen(&mut self, commands: &Receiver<Command>, has_stepped: bool) -> Instant {
        let first = match (self.runner.is_idle(), has_stepped) {
            (true, _) if self.is_closing => None,
            (true, _) => commands.recv().ok(),
            (false, true) => None,
            (false, false) => commands.recv_timeout(LOOK).ok(),
        };
        let begun = Instant::now();
        for command in first.into_iter().chain(commands.try_iter()) {
            match command {
                Command::Begin(id, ask, events) => self.begin(id, ask, events),
                Command::Look => {}
                Command::GiveBack(bytes) => {
                    match self.runner.kv().give_back(bytes) {
                        Ok(given) => tracing::debug!(bytes, given, "was asked for prefixes"),
                        Err(error) => tracing::warn!(%error, "prefixes could not be given back"),
                    }
                    self.publish();
                }
                Command::ClearPrefixes(done) => {
                    if let Err(error) = self.runner.kv().clear_prefixes() {
                        tracing::warn!(%error, "prefixes could not be given back");
                    }
                    // Who asked may have gone.
                    _ = done.send(());
                }
                Command::Close => self.is_closing = true,
            }
        }
        begun
    }

    fn begin(&mut self, id: Id, ask: Generate, events: mpsc::Sender<Event>) {
        let choice = Choice {
            temperature: ask.sampling.temperature,
            top_p: ask.sampling.top_p,
            seed: ask.sampling.seed.unwrap_or_else(rand::random),
        };
        let (prompt, max_tokens) = (ask.prompt.clone(), ask.max_tokens);
        match self.runner.submit(id, prompt, max_tokens, choice) {
            Ok(()) => {
                let request = Request {
                    ask,
                    events,
                    sent: 0,
                };
                self.requests.insert(id, request);
            }
            Err(refusal) => {
                self.told.open.fetch_sub(1, Ordering::Relaxed);
                // The client may have gone.
                _ = events.try_send(Event::Failed(refusal.to_string()));
            }
        }
    }

    /// Ends the requests whose clients have gone.
    fn drop_gone(&mut self) {
        let gone = self.requests.iter().filter(|(_, it)| it.events.is_closed());
        let gone: Vec<_> = gone.map(|(id, _)| *id).collect();
        for id in gone {
            self.runner.cancel(id);
            self.requests.remove(&id);
            self.told.open.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn give_back(&mut self) -> Result<()> {
        match self.account.owed_bytes() {
            0 => Ok(()),
            owed => {
                self.runner.give_back(owed)?;
                self.account.give_back()?;
                Ok(())
            }
        }
    }

    fn step(&mut self) -> Result<Option<Stepped>> {
        let Self {
            runner,
            requests,
            told,
            outbox,
            ..
        } = self;
        let mut over = Vec::new();
        let stepped = runner.step(|made| {
            let Some(request) = requests.get_mut(&made.id) else {
                return true;
            };
            let is_last = request.take(made.token, outbox);
            if is_last {
                over.push(made.id);
            }
            is_last
        });
        outbox.send();
        for id in over {
            requests.remove(&id);
            told.open.fetch_sub(1, Ordering::Relaxed);
        }
        stepped
    }

    /// Ends all requests after a failure that no request caused.
    fn fail(mut self, error: &VmmError) {
        self.told.has_failed.store(true, Ordering::Relaxed);
        tracing::error!(%error, "the model has failed");
        self.account.withdraw();
        for (_, request) in self.requests.drain() {
            let failed = Event::Failed(error.to_string());
            self.outbox.push(&request.events, failed);
        }
    }
}

impl Request {
    /// Takes a token for the client. Returns whether it is the last, or nobody wants it.
    fn take(&mut self, token: u32, outbox: &mut Outbox) -> bool {
        if self.ask.stop_ids.contains(&token) {
            outbox.push(&self.events, Event::End(FinishReason::Stop));
            return true;
        }
        self.sent += 1;
        outbox.push(&self.events, Event::Token(token));
        let is_last = self.sent >= self.ask.max_tokens;
        if is_last {
            outbox.push(&self.events, Event::End(FinishReason::Length));
        }
        is_last || self.events.is_closed()
    }
}
