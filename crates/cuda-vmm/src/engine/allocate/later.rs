//! An allocation that does not wait in a thread: it keeps its place in the line between tries.

use super::ask::Ask;
use super::attempt::Attempt;
use crate::Result;
use crate::engine::books::pressure::Ticket;
use crate::engine::inner::Engine;
use crate::engine::listener::Listener;
use crate::engine::waiting::Patience;
use core::task::{Context, Poll};

/// What an allocation keeps between two tries. Dropping it leaves the line.
#[derive(Debug)]
pub(crate) struct Later {
    engine: Engine,
    /// Its place in the line, if it stands there.
    ticket: Option<Ticket>,
    /// Whether the driver was asked again for all that is quarantined. Each try would tell others
    /// of a change, and so this one, for ever.
    has_retried_all: bool,
    listener: Listener,
}

impl Later {
    /// One that was not tried yet.
    pub(crate) fn new(engine: &Engine) -> Self {
        Self {
            engine: engine.clone(),
            ticket: None,
            has_retried_all: false,
            listener: Listener::new(engine),
        }
    }

    /// Tries once. If the allocation would have to wait, the task is woken when something has
    /// changed.
    pub(crate) fn poll(&mut self, asks: &[Ask<'_>], context: &Context<'_>) -> Poll<Result<usize>> {
        let [first, ..] = asks else {
            return Poll::Ready(Ok(0));
        };
        if let Err(error) = first.handle.slot.check_process() {
            return Poll::Ready(Err(error));
        }
        // Before the try, so that no change after it is missed.
        self.listener.listen(context.waker());
        let mut attempt = Attempt::new(asks, &Patience::Poll);
        attempt.ticket = self.ticket.take();
        attempt.has_retried_all = self.has_retried_all;
        let outcome = attempt.climb();
        if attempt.would_wait && outcome.is_err() {
            self.ticket = attempt.ticket.take();
            self.has_retried_all = attempt.has_retried_all;
            return Poll::Pending;
        }
        attempt.leave_line();
        self.listener.stop();
        Poll::Ready(first.tell(outcome))
    }
}

impl Drop for Later {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take()
            && let Ok(engine) = self.engine.open()
        {
            // Those behind it may be served.
            engine.state.lock().ledger.leave_line(ticket);
        }
    }
}
