//! The state of a model's thread, and what it does.

use super::Sleeping;
use super::figures::{Rest, Work};
use super::outbox::Outbox;
use super::peers::{LOOK, Peers};
use super::told::{Command, Told};
use super::waiting::Waiting;
use crate::engine::{Choice, Runner, Stepped};
use crate::request::{Event, FinishReason, Generate, Refusal};
use crate::scheduler::Id;
use candle_cuda_vmm::{Account, Quota, Result, VmmError};
use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, PoisonError};
use std::time::Instant;
use tokio::sync::mpsc;

/// A request that was taken.
pub(super) struct Request {
    ask: Generate,
    events: mpsc::Sender<Event>,
    sent: usize,
}

/// The state of a model's thread.
pub(super) struct Serving {
    pub(super) runner: Runner,
    pub(super) account: Account,
    pub(super) requests: HashMap<Id, Request>,
    outbox: Outbox,
    pub(super) told: Arc<Told>,
    pub(super) peers: Peers,
    /// What was asked for.
    quota: Quota,
    /// Whether it last ranked as a model that has nothing to do, and as one that sleeps.
    ranks: Option<(bool, bool)>,
    /// How it sleeps, if it does.
    pub(super) sleeping: Option<Sleeping>,
    pub(super) rest: Rest,
    pub(super) waiting: Waiting,
    is_closing: bool,
}

impl Serving {
    pub(super) fn new(
        runner: Runner,
        (account, quota): (Account, Quota),
        outbox: Outbox,
        told: Arc<Told>,
        peers: Peers,
        sleeping: Option<Sleeping>,
    ) -> Self {
        Self {
            runner,
            account,
            requests: HashMap::new(),
            outbox,
            told,
            peers,
            quota,
            ranks: None,
            sleeping,
            rest: Rest::default(),
            waiting: Waiting::default(),
            is_closing: false,
        }
    }

    pub(super) fn run(mut self, commands: &Receiver<Command>) {
        let mut has_stepped = true;
        self.sleep_or_wake();
        self.publish();
        loop {
            self.rank();
            let begun = self.listen(commands, has_stepped);
            self.rank();
            if self.is_closing && self.requests.is_empty() && self.waiting.is_empty() {
                return;
            }
            self.drop_gone();
            self.sleep_or_wake();
            if self.runner.is_asleep() {
                self.publish();
                continue;
            }
            let stepped = self.give_back().and_then(|()| self.step());
            if !self.runner.is_idle() {
                match self.runner.kv().missing_bytes() {
                    0 => {}
                    bytes => self.peers.ask(bytes),
                }
                // Prefixes of others were not enough.
                if self.sleeping.is_some() && matches!(stepped, Ok(None)) {
                    self.peers.make_room(0);
                }
            }
            if let Ok(Some(step)) = &stepped {
                self.told.count_time(*step, begun.elapsed());
            }
            self.note_idle();
            self.publish();
            match stepped {
                Ok(stepped) => has_stepped = stepped.is_some(),
                Err(error) => return self.fail(&error),
            }
        }
    }

    /// Tells what there is, and what was done.
    pub(super) fn publish(&self) {
        let mut work = self
            .told
            .work
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *work = Work {
            counts: self.runner.counts(),
            held: self.runner.held(),
            rest: self.rest,
        };
    }

    /// Ranks a model that has nothing to do behind those of its priority that have, and before those
    /// of lower ones. Of equals, only the one that holds more gives back, so the prefixes of an idle
    /// model would stand against what a busy one is short of. A model that sleeps leaves what it is
    /// guaranteed to others, until it is to wake.
    pub(super) fn rank(&mut self) {
        let is_idle = self.runner.is_idle() && self.waiting.is_empty();
        let ranks = (is_idle, is_idle && self.runner.is_asleep());
        if self.ranks == Some(ranks) {
            return;
        }
        let priority = self.quota.priority.saturating_mul(2);
        let quota = self.quota.priority(priority.saturating_sub(is_idle.into()));
        let quota = match ranks.1 {
            true => quota.guarantee_bytes(0),
            false => quota,
        };
        match self.account.set_quota(quota) {
            Ok(()) => self.ranks = Some(ranks),
            Err(error) => tracing::warn!(%error, "the model keeps its rank"),
        }
    }

    /// Takes in what it is told. Waits for it if there is nothing to do, and for a while if there
    /// is no memory. Returns when it had waited: from then on it works.
    fn listen(&mut self, commands: &Receiver<Command>, has_stepped: bool) -> Instant {
        let first = match (self.runner.is_idle(), has_stepped) {
            (true, _) if self.is_closing && self.waiting.is_empty() => None,
            (true, _) => match self.idle_wait() {
                Some(wait) => commands.recv_timeout(wait).ok(),
                None => commands.recv().ok(),
            },
            (false, true) => None,
            (false, false) => commands.recv_timeout(LOOK).ok(),
        };
        let begun = Instant::now();
        for command in first.into_iter().chain(commands.try_iter()) {
            match command {
                Command::Begin(id, ask, events) => match self.runner.is_asleep() {
                    true => self.waiting.hold(id, ask, events),
                    false => self.begin(id, ask, events),
                },
                Command::Look => {}
                // All that it has sleeps.
                Command::GiveBack(_) if self.runner.is_asleep() => {}
                // A model that sleeps keeps its prefixes.
                Command::GiveBack(_) if self.sleeps_instead() => {}
                Command::GiveBack(bytes) => {
                    match self.runner.kv().give_back(bytes) {
                        Ok(given) => tracing::debug!(bytes, given, "was asked for prefixes"),
                        Err(error) => tracing::warn!(%error, "prefixes could not be given back"),
                    }
                    self.publish();
                }
                Command::ClearPrefixes(done) => {
                    match self.runner.is_asleep() {
                        true => self.waiting.clears = true,
                        false => self.clear_prefixes(),
                    }
                    // Who asked may have gone.
                    _ = done.send(());
                }
                Command::MakeRoom => {
                    if let Err(refusal) = self.try_sleep() {
                        tracing::debug!(%refusal, "the model does not sleep for another");
                    }
                }
                Command::Sleep(answer) => {
                    let slept = self.try_sleep();
                    self.told.closed(1);
                    // Who asked may have gone.
                    _ = answer.send(slept);
                }
                Command::Wake(answer) => match (self.sleeping, self.runner.is_asleep()) {
                    (Some(_), true) => self.waiting.call(answer),
                    (sleeping, _) => {
                        self.told.closed(1);
                        let awake = sleeping.map(|_| ()).ok_or(Refusal::NeverSleeps);
                        _ = answer.send(awake);
                    }
                },
                Command::Close => self.is_closing = true,
            }
        }
        begun
    }

    pub(super) fn clear_prefixes(&mut self) {
        if let Err(error) = self.runner.kv().clear_prefixes() {
            tracing::warn!(%error, "prefixes could not be given back");
        }
    }

    pub(super) fn begin(&mut self, id: Id, ask: Generate, events: mpsc::Sender<Event>) {
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
                self.told.closed(1);
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
            self.told.closed(1);
        }
    }

    fn give_back(&mut self) -> Result<()> {
        match self.account.owed_bytes() {
            0 => Ok(()),
            _ if self.sleeps_instead() => Ok(()),
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
            told.closed(1);
        }
        stepped
    }

    /// Ends all requests after a failure that no request caused.
    fn fail(mut self, error: &VmmError) {
        self.told.has_failed.store(true, Ordering::Relaxed);
        tracing::error!(%error, "the model has failed");
        self.account.withdraw();
        let failed = Event::Failed(error.to_string());
        self.refuse(&failed, Refusal::Closing);
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
