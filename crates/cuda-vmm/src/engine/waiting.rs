//! How long an allocation waits for memory, and what it does meanwhile.

use super::books::backoff::Backoff;
use super::books::tally::Fact;
use super::changes::Locked;
use super::inner::Inner;
use super::scope::Scope;
use super::worker::Steps;
use crate::sync::{self, Arc, Deadline};
use crate::{Result, VmmError};
use core::time::Duration;

/// How long a thread sleeps at most before it looks for itself what the device has finished with:
/// long if a worker looks anyway.
const LOOK_BESIDE_WORKER: Duration = Duration::from_millis(16);
const LOOK_ALONE: Duration = Duration::from_millis(1);

/// How long a thread waits at first, and at most, before it asks the driver again for memory that
/// the device did not have: another process does not say when it gives some back.
const ASK: Duration = Duration::from_millis(1);
const ASK_MAX: Duration = Duration::from_millis(64);

pub(crate) const fn device_backoff() -> Backoff {
    Backoff::new(ASK, ASK_MAX)
}

/// How long an allocation waits.
#[derive(Debug)]
pub(crate) enum Patience {
    /// Not at all.
    None,
    /// For memory that retires, if that is enough.
    Retiring,
    /// For any memory, until then.
    Until(Deadline),
    /// Not here: the call is repeated later, and keeps its place in the line until then.
    Poll,
}

impl Patience {
    /// Waits for so long at most.
    pub(crate) fn for_at_most(timeout: Duration) -> Self {
        Self::Until(Deadline::after(timeout))
    }

    /// Waits until something has changed; `None` if there is no patience left.
    pub(crate) fn await_change<'a>(
        &self,
        engine: &'a Inner,
        state: Locked<'a>,
    ) -> Option<Locked<'a>> {
        match self {
            Self::None | Self::Poll => None,
            Self::Retiring => Some(engine.state.wait(state)),
            Self::Until(deadline) => {
                let left = deadline.left()?;
                Some(engine.state.wait_for(state, left))
            }
        }
    }

    /// Waits for what may bring memory, to the ranges in scope; `None` if there is no patience
    /// left, or nothing that can be waited for.
    pub(crate) fn await_memory<'a>(
        &self,
        engine: &'a Arc<Inner>,
        state: Locked<'a>,
        scope: Scope,
    ) -> Result<Option<Locked<'a>>> {
        match self {
            Self::None | Self::Poll => Ok(None),
            Self::Retiring => engine.await_progress(state, scope),
            Self::Until(deadline) => Ok(await_look(engine, state, deadline)),
        }
    }

    /// The budget had room, and the device had no memory: waits until some of the device's comes
    /// free in this process, or until the next try is due. The caller holds no lock and no pages.
    ///
    /// # Errors
    /// `error`, if there is no patience left.
    pub(crate) fn await_device(
        &self,
        engine: &Inner,
        error: VmmError,
        seen: u64,
        backoff: &mut Backoff,
    ) -> Result<()> {
        let Self::Until(deadline) = self else {
            return Err(error);
        };
        let left = deadline.left().ok_or(error)?;
        engine.state.lock().quietly().counters.waits += 1;
        let now = sync::now();
        backoff.fail(now);
        let device = &engine.device;
        device.await_memory(seen, left.min(backoff.left(now)));
        Ok(())
    }
}

/// Waits for a change or for the moment to look what the device has finished with, and looks.
fn await_look<'a>(
    engine: &'a Arc<Inner>,
    mut state: Locked<'a>,
    deadline: &Deadline,
) -> Option<Locked<'a>> {
    let left = deadline.left()?;
    state.quietly().collect_freed();
    let is_coming = !state.queue.is_empty()
        || (state.quietly().look_again()).any(Fact::WaitsForLeases)
        || state.quietly().is_any_refused();
    if !is_coming {
        // A thread that frees something says so.
        return Some(engine.state.wait_for(state, left));
    }
    let look = match engine.worker.is_there() {
        true => LOOK_BESIDE_WORKER,
        false => LOOK_ALONE,
    };
    drop(engine.state.wait_for(state, left.min(look)));
    // The worker may have died since. What it does not do, this thread does.
    match engine.worker.is_there() {
        true => _ = engine.poll(),
        false => _ = engine.step(true),
    }
    Some(engine.state.lock())
}
