//! The thread that takes an engine's steps.

use super::options::WorkerMode;
use super::stats::StepReport;
use crate::foreign;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::thread::{self, JoinHandle};
use crate::sync::{self, Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

/// What the thread does for its owner, the engine.
pub(crate) trait Steps: Send + Sync + 'static {
    /// Does the work that is due. The worker's thread says that it is that.
    fn step(self: &Arc<Self>, is_worker: bool) -> StepReport;

    /// In how long a step would find something to do: at once, or when refused memory is to be
    /// tried again; `None` if nothing is to be done.
    fn next_work(&self) -> Option<Duration>;
}

/// How long memory may wait after it was freed before the first look, so that a caller that takes
/// it back at once finds it.
const DELAY: Duration = Duration::from_millis(1);
/// A thread that the system refuses is asked for again after up to two to this power of wake-ups.
const REFUSALS_MAX: u32 = 10;
/// How long the worker rests after a step that panicked.
const AFTER_PANIC: Duration = Duration::from_secs(1);
/// How long between looks at most, while nothing comes of them and they are quick.
const DELAY_MAX: Duration = Duration::from_millis(16);
/// After a step of which nothing came, and if nothing retires, the thread rests until it is woken, or
/// for this many times as long as the step took, so that many leases do not keep a core busy; but
/// for no longer than that, and not at all if it would look as late anyway.
const REST: u32 = 256;
const REST_MAX: Duration = Duration::from_millis(500);

#[derive(Debug)]
struct Signal<E> {
    work: bool,
    hurry: bool,
    stop: bool,
    /// An engine whose owners are gone and that has memory to give back.
    kept: Option<Arc<E>>,
}

#[derive(Debug)]
struct Shared<E> {
    /// Whether `signal.work` is set, to be asked without the lock.
    awake: AtomicBool,
    signal: Mutex<Signal<E>>,
    changed: Condvar,
}

impl<E> Shared<E> {
    fn new() -> Self {
        Self {
            awake: AtomicBool::new(false),
            signal: Mutex::new(Signal {
                work: false,
                hurry: false,
                stop: false,
                kept: None,
            }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Signal<E>> {
        self.signal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, signal: MutexGuard<'a, Signal<E>>) -> MutexGuard<'a, Signal<E>> {
        self.changed
            .wait(signal)
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_for<'a>(
        &'a self,
        signal: MutexGuard<'a, Signal<E>>,
        delay: Duration,
        condition: impl Fn(&Signal<E>) -> bool,
    ) -> MutexGuard<'a, Signal<E>> {
        let condition = |signal: &mut Signal<E>| condition(signal);
        sync::wait_timeout_while(&self.changed, &self.signal, signal, delay, condition)
    }
}

impl<E> Shared<E> {
    /// Sleeps until there is work, or for `pause` at most if there is one, and then for `delay`,
    /// unless there is a hurry. Returns the engine that is kept for this step; `None` if the thread
    /// is to end.
    fn await_work(&self, pause: Option<Duration>, delay: Duration) -> Option<Option<Arc<E>>> {
        let mut signal = self.lock();
        if let Some(pause) = pause {
            signal = self.wait_for(signal, pause, |signal| !signal.work && !signal.stop);
            signal.work = true;
        }
        while !signal.work && !signal.stop {
            signal = self.wait(signal);
        }
        signal = self.wait_for(signal, delay, |signal| !signal.hurry && !signal.stop);
        if signal.stop {
            return None;
        }
        (signal.hurry, signal.work) = (false, false);
        self.awake.store(false, Ordering::SeqCst);
        Some(signal.kept.take())
    }

    /// Notes that there is more work in `left`, and keeps the engine for it.
    fn go_on(&self, left: Duration, kept: &mut Option<Arc<E>>) {
        let mut signal = self.lock();
        if left.is_zero() {
            signal.work = true;
            self.awake.store(true, Ordering::SeqCst);
        }
        if signal.kept.is_none() {
            signal.kept = kept.take();
        }
    }
}

/// Starts, wakes and ends the thread.
#[derive(Debug)]
pub(crate) struct Worker<E> {
    shared: Arc<Shared<E>>,
    held: Mutex<HeldThread>,
    mode: WorkerMode,
}

/// The thread, if the system gave one.
#[derive(Debug, Default)]
struct HeldThread {
    thread: Option<JoinHandle<()>>,
    /// How often it was refused in a row.
    refusals: u32,
    /// How many wake-ups pass before the next try.
    rest: u32,
}

impl<E> Worker<E> {
    pub(crate) fn new(mode: WorkerMode) -> Self {
        Self {
            shared: Arc::new(Shared::new()),
            held: Mutex::default(),
            mode,
        }
    }

    /// Whether the thread is there.
    pub(crate) fn is_there(&self) -> bool {
        self.held().thread.is_some()
    }

    fn held(&self) -> MutexGuard<'_, HeldThread> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_thread(&mut self) -> Option<JoinHandle<()>> {
        let held = self.held.get_mut();
        let held = held.unwrap_or_else(PoisonError::into_inner);
        held.thread.take()
    }

    /// Forgets the thread, which does not exist in a forked process.
    pub(crate) fn abandon(&mut self) {
        core::mem::forget(self.take_thread());
    }
}

impl<E: Steps> Worker<E> {
    /// Says that there is work. Starts the thread if need be; false if there is none, and then
    /// steps happen on calls.
    pub(crate) fn wake(&self, engine: &Arc<E>, hurry: bool) -> bool {
        if self.mode == WorkerMode::Manual {
            return false;
        }
        // The thread exists, and looks at the work before it sleeps again: it clears the flag
        // first.
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

    /// Starts the thread if it is not there; returns whether it is. If the system refuses one, that
    /// is tried again later.
    fn start(&self, engine: &Arc<E>) -> bool {
        let mut held = self.held();
        if held.thread.is_some() {
            return true;
        }
        if held.rest > 0 {
            held.rest -= 1;
            return false;
        }
        let (shared, engine) = (self.shared.clone(), Arc::downgrade(engine));
        let started = thread::Builder::new()
            .name("cuda-vmm".into())
            .spawn(move || take_steps(&shared, &engine));
        let is_first = held.refusals == 0;
        let outcome = match started {
            Ok(thread) => {
                (held.thread, held.refusals) = (Some(thread), 0);
                Ok(())
            }
            Err(error) => {
                held.refusals = (held.refusals + 1).min(REFUSALS_MAX);
                held.rest = 1 << held.refusals;
                Err(error)
            }
        };
        drop(held);
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
    pub(crate) fn keep(&self, engine: &Arc<E>) {
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
}

impl<E> Drop for Worker<E> {
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
        // Not on that thread: the caller that ends the engine waits for it, maybe with a lock that
        // a subscriber takes.
        crate::events::debug!("the worker thread ends");
    }
}

fn take_steps<E: Steps>(shared: &Shared<E>, engine: &Weak<E>) {
    let mut delay = DELAY;
    // How long to sleep although nothing was asked for: then memory that the driver refused is
    // tried again.
    let mut pause = None;
    loop {
        let Some(mut kept) = shared.await_work(pause.take(), delay) else {
            return;
        };
        // Held during a step only, so that an engine ends with its last owner. If that is this
        // step, the engine ends here, on its own thread.
        let Some(engine) = engine.upgrade() else {
            return;
        };
        // A step that panics is a fault of ours. Only the next step may do what it left.
        let started = sync::now();
        let stepped = foreign::call(|| (engine.step(true), engine.next_work()));
        let rest = (sync::now() - started).saturating_mul(REST).min(REST_MAX);
        let (report, next) = stepped.unwrap_or_else(|| {
            crate::events::warn!("a step of the worker panicked");
            (StepReport::default(), Some(AFTER_PANIC))
        });
        if let Some(left) = next {
            let is_idle =
                report.retired_bytes + report.drained_bytes + report.prefetched_bytes == 0;
            let rests = is_idle && report.retiring_bytes == 0 && rest > DELAY_MAX;
            delay = match is_idle && !rests {
                true => (delay * 2).min(DELAY_MAX),
                false => DELAY,
            };
            let left = if rests { left.max(rest) } else { left };
            shared.go_on(left, &mut kept);
            pause = Some(left).filter(|left| !left.is_zero());
        } else {
            delay = DELAY;
        }
        // It may be the last owner; a panic as it ends must not take the thread along, which ends
        // by itself.
        _ = foreign::call(|| drop((engine, kept)));
    }
}

#[cfg(all(test, not(model_check)))]
mod tests {
    use super::*;
    use crate::sync::atomic::AtomicUsize;
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::time::Instant;

    /// Longer than any wait here is; a test that fails ends all the same.
    const FOREVER: Duration = Duration::from_secs(60);

    /// An engine that tells of the end of each step.
    struct Scripted {
        told: Sender<Instant>,
        /// After how many steps nothing is left to be done.
        left: AtomicUsize,
        /// How long a step takes.
        takes: Duration,
        retiring_bytes: usize,
    }

    impl Scripted {
        fn new(
            left: usize,
            takes: Duration,
            retiring_bytes: usize,
        ) -> (Arc<Self>, Receiver<Instant>) {
            let (told, hear) = channel();
            let left = AtomicUsize::new(left);
            let engine = Arc::new(Self {
                told,
                left,
                takes,
                retiring_bytes,
            });
            (engine, hear)
        }
    }

    impl Steps for Scripted {
        fn step(self: &Arc<Self>, is_worker: bool) -> StepReport {
            assert!(is_worker);
            thread::sleep(self.takes);
            self.left.fetch_sub(1, Ordering::SeqCst);
            self.told.send(Instant::now()).expect("the test listens");
            StepReport {
                retiring_bytes: self.retiring_bytes,
                ..StepReport::default()
            }
        }

        fn next_work(&self) -> Option<Duration> {
            (self.left.load(Ordering::SeqCst) > 0).then_some(Duration::ZERO)
        }
    }

    #[test]
    fn steps_are_taken_until_nothing_is_left_and_an_engine_is_kept_so_long() {
        let worker = Worker::new(WorkerMode::Thread);
        let (engine, hear) = Scripted::new(3, Duration::ZERO, 0);
        worker.keep(&engine);
        drop(engine);
        // It ends with the engine.
        assert_eq!(hear.iter().count(), 3);
    }

    #[test]
    fn while_memory_retires_slow_steps_are_taken_as_often_as_quick_ones() {
        let worker = Worker::new(WorkerMode::Thread);
        // With rests of half a second this would take five seconds.
        let (engine, hear) = Scripted::new(11, Duration::from_millis(4), 1);
        worker.wake(&engine, true);
        let steps = [(); 11].map(|()| hear.recv_timeout(FOREVER).expect("a step"));
        let took = steps[10] - steps[0];
        assert!(took < 9 * REST_MAX, "{took:?}");
    }

    #[test]
    fn after_a_slow_step_of_which_nothing_came_the_thread_rests() {
        let worker = Worker::new(WorkerMode::Thread);
        let (engine, hear) = Scripted::new(2, Duration::from_millis(4), 0);
        worker.wake(&engine, true);
        let [first, second] = [(); 2].map(|()| hear.recv_timeout(FOREVER).expect("a step"));
        let took = second - first;
        assert!(took >= REST_MAX, "{took:?}");
    }
}
