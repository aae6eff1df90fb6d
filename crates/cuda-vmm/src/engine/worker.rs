//! The thread that takes an engine's steps.

use super::Inner;
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
    thread: Mutex<Option<JoinHandle<()>>>,
    mode: WorkerMode,
}

impl Worker {
    pub(super) fn new(mode: WorkerMode) -> Self {
        Self {
            shared: Arc::default(),
            thread: Mutex::default(),
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
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if thread.is_none() {
            let (shared, engine) = (self.shared.clone(), Arc::downgrade(engine));
            *thread = thread::Builder::new()
                .name("cuda-vmm".into())
                .spawn(move || run(&shared, &engine))
                .inspect_err(|error| tracing::warn!(%error, "the worker thread could not start"))
                .ok();
        }
        if thread.is_none() {
            return false;
        }
        drop(thread);
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
        let thread = self.thread.get_mut();
        thread.unwrap_or_else(PoisonError::into_inner).take()
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
    }
}

fn run(shared: &Shared, engine: &Weak<Inner>) {
    tracing::debug!("the worker thread starts");
    take_steps(shared, engine);
    tracing::debug!("the worker thread ends");
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
        let kept = signal.kept.take();
        drop(signal);
        // Held during a step only, so that an engine ends with its last owner. If that is this step, the
        // engine ends here, on its own thread.
        let Some(engine) = engine.upgrade() else {
            return;
        };
        let report = engine.step(true);
        if let Some(left) = engine.next_work() {
            let mut signal = shared.lock();
            if left.is_zero() {
                signal.work = true;
                shared.awake.store(true, Ordering::SeqCst);
            } else {
                pause = Some(left);
            }
            if signal.kept.is_none() {
                signal.kept = kept;
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
    }
}
