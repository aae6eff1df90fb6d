//! The work of an engine that is due now and then, by its worker or by callers.

use super::books::tally::Fact;
use super::inner::Inner;
use super::retry::Which;
use super::scope::Scope;
use super::stats::StepReport;
use super::worker::Steps;
use crate::sync::Arc;
use core::time::Duration;

impl Steps for Inner {
    fn step(self: &Arc<Self>, is_worker: bool) -> StepReport {
        let mut retired_bytes = self.poll();
        // What cannot be synchronised now is tried again at the next step.
        let synchronised = self.synchronise(Scope::All).unwrap_or_default();
        retired_bytes += synchronised.unwrap_or_default();
        // A step that a caller takes is a try; the worker takes many.
        let due = if is_worker { Which::Due } else { Which::All };
        let retried_bytes = self.retry(&due);
        let drained_bytes = self.give_back();
        let prefetched_bytes = self.prefetch(is_worker);
        self.finish_closing();
        let stats = self.state.lock().quietly().parts();
        let report = StepReport {
            retired_bytes,
            drained_bytes: retried_bytes + drained_bytes,
            prefetched_bytes,
            retiring_bytes: stats.retiring_bytes,
            quarantined_bytes: stats.quarantined_bytes,
        };
        crate::events::trace!(?report, is_worker, "took a step");
        report
    }

    fn next_work(&self) -> Option<Duration> {
        const WORK: [Fact; 6] = [
            Fact::Freed,
            Fact::WaitsForLeases,
            Fact::Ending,
            Fact::Hungry,
            Fact::StaleAhead,
            Fact::Leaving,
        ];
        let mut locked = self.state.lock();
        let state = locked.quietly();
        let tally = state.look_again();
        let has_work = WORK.iter().any(|fact| tally.any(*fact))
            || tally.spare_parked_bytes() > self.options.park_bytes_max
            || !state.queue.is_empty()
            || state.spare_when_over().is_some();
        match has_work {
            true => Some(Duration::ZERO),
            // In a context beyond use it is left alone.
            false => state.retry_in().filter(|_| !self.device.is_lost()),
        }
    }
}
