//! When memory that the driver refused to take back is tried again, and with which piece.

use super::backoff::Backoff;
use core::time::Duration;

/// The delays between two tries of the worker.
const DELAY: Duration = Duration::from_millis(16);
const DELAY_MAX: Duration = Duration::from_secs(4);

/// What an engine knows of the driver's refusals.
#[derive(Debug)]
pub(crate) struct Refusals {
    backoff: Backoff,
    /// Whether a message has said that the driver refuses memory.
    is_told: bool,
    /// The piece with which the next try begins.
    turn: usize,
}

impl Default for Refusals {
    fn default() -> Self {
        Self {
            backoff: Backoff::new(DELAY, DELAY_MAX),
            is_told: false,
            turn: 0,
        }
    }
}

impl Refusals {
    /// How long until the worker tries again.
    pub(crate) fn left(&self, now: Duration) -> Duration {
        self.backoff.left(now)
    }

    /// Whether the worker's next try is due.
    pub(crate) fn is_due(&self, now: Duration) -> bool {
        self.backoff.is_due(now)
    }

    /// Whether a message has said that the driver refuses memory.
    pub(crate) fn is_told(&self) -> bool {
        self.is_told
    }

    /// Notes that the first refusal is told. The first try is due after the shortest delay.
    pub(crate) fn tell(&mut self, now: Duration) {
        self.is_told = true;
        self.backoff.fail(now);
    }

    /// Orders the pieces so that the next try begins with another one.
    pub(crate) fn rotate<T>(&self, pieces: &mut [T]) {
        if !pieces.is_empty() {
            pieces.rotate_left(self.turn % pieces.len());
        }
    }

    /// Has the next try begin with the piece after this one.
    pub(crate) fn take_turn(&mut self) {
        self.turn = self.turn.wrapping_add(1);
    }

    /// Puts off the worker's next try.
    pub(crate) fn fail(&mut self, now: Duration) {
        self.backoff.fail(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worker_tries_again_after_ever_longer_delays() {
        let mut refusals = Refusals::default();
        let now = Duration::from_secs(1);
        assert!(!refusals.is_told() && refusals.is_due(now));
        refusals.tell(now);
        assert!(refusals.is_told() && !refusals.is_due(now));
        assert_eq!(refusals.left(now), DELAY);
        assert!(refusals.is_due(now + DELAY));
        refusals.fail(now + DELAY);
        assert_eq!(refusals.left(now + DELAY), 2 * DELAY);
    }

    #[test]
    fn each_try_begins_with_the_next_piece() {
        let mut refusals = Refusals::default();
        refusals.rotate::<u8>(&mut []);
        let mut firsts = Vec::new();
        for _ in 0..5 {
            let mut pieces = [0, 1, 2];
            refusals.rotate(&mut pieces);
            firsts.push(pieces);
            refusals.take_turn();
        }
        let turns = [[0, 1, 2], [1, 2, 0], [2, 0, 1]];
        assert_eq!(firsts, [turns[0], turns[1], turns[2], turns[0], turns[1]]);
    }
}
