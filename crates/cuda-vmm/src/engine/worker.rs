//! The thread that takes an engine's steps.

use super::{Inner, StepReport};
use crate::foreign;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::thread::{self, JoinHandle};
use crate::sync::{self, Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

/// Who takes an engine's steps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum WorkerMode {
    /// A thread of the engine's own, started when there is first something to do and silent when there
    /// is not.
    #[default]
    Thread,
    /// Nobody but [`Engine::step`](crate::Engine::step), and calls that need what a step would bring. For
    /// tests and simulations, which are deterministic so.
    Manual,
}

/// How long memory may wait after it was freed before the first look, so that a caller who takes it back
/// at once finds it.
const DELAY: Duration = Duration::from_millis(1);
/// A thread that the system refuses is asked for again after up to two to this power of wake-ups.
const REFUSALS_MAX: u32 = 10;
/// How long the worker rests after a step that panicked.
const AFTER_PANIC: Duration = Duration::from_secs(1);
/// How long between looks at most, while nothing comes of them.
const DELAY_MAX: Duration = Duration::from_millis(16);

#[derive(Debug, Default)]
struct Signal {
    work: bool,
    hurry: bool,
    stop: bool,
    /// An engine whose owners are gone and that has memory to give back.
    kept: Option<Arc<Inner>>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Whether `signal.work` is set, to be asked without the lock.
    awake: AtomicBool,
    signal: Mutex<Signal>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Signal> {
        self.signal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, signal: MutexGuard<'a, Signal>) -> MutexGuard<'a, Signal> {
        self.changed
            .wait(signal)
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_for<'a>(
        &'a self,
        signal: MutexGuard<'a, Signal>,
        delay: Duration,
        condition: impl Fn(&Signal) -> bool,
    ) -> MutexGuard<'a, Signal> {
        let condition = |signal: &mut Signal| condition(signal);
        sync::wait_timeout_while(&self.changed, &self.signal, signal, delay, condition)
    }
}

/// Starts, wakes and ends the thread.
#[derive(Debug)]
pub(super) struct Worker {
    shared: Arc<Shared>,
    place: Mutex<Place>,
    mode: WorkerMode,
}

/// Where the thread is, if the system gave one.
#[derive(Debug, Default)]
struct Place {
    thread: Option<JoinHandle<()>>,
    /// How often it was refused in a row.
    refusals: u32,
    /// How often it is not tried before the next time.
    rest: u32,
}

impl Worker {
    pub(super) fn new(mode: WorkerMode) -> Self {
        Self {
            shared: Arc::default(),
            place: Mutex::default(),
            mode,
        }
    }

    /// Says that there is work. Starts the thread if need be; false if there is none, and then steps
    /// happen on calls.
    pub(super) fn wake(&self, engine: &Arc<Inner>, hurry: bool) -> bool {
        if self.mode == WorkerMode::Manual {
            return false;
        }
        // The thread exists, and looks at the work before it sleeps again: it clears the flag first.
        if !hurry && self.shared.awake.load(Ordering::SeqCst) {
            return true;
        }
        if !self.start(engine) {
            return false;
        }
        let mut signal = self.shared.lock();
        let asleep = !signal.work || (hurry && !signal.hurry);
        signal.work = true;
        signal.hurry |= hurry;
        self.shared.awake.store(true, Ordering::SeqCst);
        drop(signal);
        if asleep {
            self.shared.changed.notify_one();
        }
        true
    }

    /// Whether the thread is there.
    pub(super) fn is_there(&self) -> bool {
        self.place().thread.is_some()
    }

    fn place(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sees to it that the thread is there; says whether it is. If the system refuses one, that is tried again later.
    fn start(&self, engine: &Arc<Inner>) -> bool {
        let mut place = self.place();
        if place.thread.is_some() {
            return true;
        }
        if place.rest > 0 {
            place.rest -= 1;
            return false;
        }
        let (shared, engine) = (self.shared.clone(), Arc::downgrade(engine));
        let started = thread::Builder::new()
            .name("cuda-vmm".into())
            .spawn(move || take_steps(&shared, &engine));
        let is_first = place.refusals == 0;
        let outcome = match started {
            Ok(thread) => {
                (place.thread, place.refusals) = (Some(thread), 0);
                Ok(())
            }
            Err(error) => {
                place.refusals = (place.refusals + 1).min(REFUSALS_MAX);
                place.rest = 1 << place.refusals;
                Err(error)
            }
        };
        drop(place);
        // Without the lock: a subscriber may free memory, which comes here again.
        match &outcome {
            Ok(()) => crate::events::debug!("the worker thread starts"),
            Err(error) if is_first => {
                crate::events::warn!(%error, "the worker thread could not start; calls do its work");
            }
            Err(_) => {}
        }
        outcome.is_ok()
    }

    /// Keeps the engine alive until it has no work left; in vain if there is no thread.
    pub(super) fn keep(&self, engine: &Arc<Inner>) {
        if self.wake(engine, true) {
            // With the work, so that the thread looks at both or at neither.
            let mut signal = self.shared.lock();
            signal.kept = Some(engine.clone());
            signal.work = true;
            self.shared.awake.store(true, Ordering::SeqCst);
            drop(signal);
            self.shared.changed.notify_one();
        }
    }

    fn take_thread(&mut self) -> Option<JoinHandle<()>> {
        let place = self.place.get_mut();
        let place = place.unwrap_or_else(PoisonError::into_inner);
        place.thread.take()
    }

    /// Forgets the thread, which a forked process does not have.
    pub(super) fn abandon(&mut self) {
        core::mem::forget(self.take_thread());
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let Some(thread) = self.take_thread() else {
            return;
        };
        self.shared.lock().stop = true;
        self.shared.changed.notify_one();
        // The last owner of an engine may be its own worker, which cannot wait for itself.
        if thread.thread().id() != thread::current().id() {
            let _ = thread.join();
        }
        // Not on that thread: who ends the engine waits for it, maybe with a lock that a subscriber takes.
        crate::events::debug!("the worker thread ends");
    }
}

fn take_steps(shared: &Shared, engine: &Weak<Inner>) {
    let mut delay = DELAY;
    // Until when to sleep although nothing was asked for: then memory that the driver refused is tried again.
    let mut pause = None;
    loop {
        let mut signal = shared.lock();
        if let Some(pause) = pause.take() {
            signal = shared.wait_for(signal, pause, |signal| !signal.work && !signal.stop);
            signal.work = true;
        }
        while !signal.work && !signal.stop {
            signal = shared.wait(signal);
        }
        signal = shared.wait_for(signal, delay, |signal| !signal.hurry && !signal.stop);
        if signal.stop {
            return;
        }
        (signal.hurry, signal.work) = (false, false);
        shared.awake.store(false, Ordering::SeqCst);
        let mut kept = signal.kept.take();
        drop(signal);
        // Held during a step only, so that an engine ends with its last owner. If that is this step, the
        // engine ends here, on its own thread.
        let Some(engine) = engine.upgrade() else {
            return;
        };
        // A step that panics is a fault of ours. The next may do what it left, and nobody else would.
        let stepped = foreign::call(|| (engine.step(true), engine.next_work()));
        let (report, next) = stepped.unwrap_or_else(|| {
            crate::events::warn!("a step of the worker panicked");
            (StepReport::default(), Some(AFTER_PANIC))
        });
        if let Some(left) = next {
            let mut signal = shared.lock();
            if left.is_zero() {
                signal.work = true;
                shared.awake.store(true, Ordering::SeqCst);
            } else {
                pause = Some(left);
            }
            if signal.kept.is_none() {
                signal.kept = kept.take();
            }
            drop(signal);
            delay = if report.retired_bytes + report.drained_bytes > 0 {
                DELAY
            } else {
                (delay * 2).min(DELAY_MAX)
            };
        } else {
            delay = DELAY;
        }
        // It may be the last owner; a panic as it ends must not take the thread along, which ends by itself.
        _ = foreign::call(|| drop((engine, kept)));
    }
}
