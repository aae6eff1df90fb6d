//! What a model's thread has for its clients, sent by a thread beside it.
//!
//! To send a token wakes the task that waits for it, which takes longer than to choose the token of
//! another sequence. So the model goes on with its next step while its tokens are sent.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use crate::request::Event;
use std::sync::mpsc as threads;
use std::thread::{self, JoinHandle};
use tokio::sync::mpsc;

/// An event, and whose it is.
type Addressed = (mpsc::Sender<Event>, Event);

/// Events that are sent together, in order. When it is dropped, all of them have been sent.
pub(super) struct Outbox {
    events: Vec<Addressed>,
    batches: Option<threads::Sender<Vec<Addressed>>>,
    thread: Option<JoinHandle<()>>,
}

impl Outbox {
    /// Starts the thread, with this name.
    pub(super) fn new(name: &str) -> std::io::Result<Self> {
        let (batches, received) = threads::channel::<Vec<Addressed>>();
        let send = move || {
            for (client, event) in received.iter().flatten() {
                // The client may have gone. There is room: the channel holds every event.
                _ = client.try_send(event);
            }
        };
        let thread = thread::Builder::new().name(format!("{name} out"));
        Ok(Self {
            events: Vec::new(),
            batches: Some(batches),
            thread: Some(thread.spawn(send)?),
        })
    }

    /// Takes an event, which is sent with the next [`send`](Self::send).
    pub(super) fn push(&mut self, client: &mpsc::Sender<Event>, event: Event) {
        self.events.push((client.clone(), event));
    }

    /// Has all events sent that were pushed.
    pub(super) fn send(&mut self) {
        if self.events.is_empty() {
            return;
        }
        let events = std::mem::take(&mut self.events);
        if let Some(batches) = &self.batches {
            // The thread ends when this end is dropped, and not before.
            _ = batches.send(events);
        }
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        self.send();
        self.batches = None;
        if let Some(thread) = self.thread.take() {
            // It cannot panic.
            _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_in_order_and_all_before_the_end() {
        let mut outbox = Outbox::new("model").expect("a thread");
        let clients: Vec<_> = (0..3).map(|_| mpsc::channel(8)).collect();
        let (gone, _) = mpsc::channel(1);
        for token in 0..7 {
            for (client, _) in &clients {
                outbox.push(client, Event::Token(token));
            }
            outbox.push(&gone, Event::Token(token));
            if token % 3 == 0 {
                outbox.send();
            }
        }
        drop(outbox);
        for (client, mut events) in clients {
            drop(client);
            for token in 0..7 {
                assert_eq!(events.try_recv(), Ok(Event::Token(token)));
            }
            assert_eq!(
                events.try_recv(),
                Err(mpsc::error::TryRecvError::Disconnected)
            );
        }
    }
}
