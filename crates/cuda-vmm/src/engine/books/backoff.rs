//! When something that failed is tried again: soon, then ever later, up to a limit. Pure: the
//! caller says what time it is.

use core::time::Duration;

/// Delays that double from `first` to `longest`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Backoff {
    first: Duration,
    longest: Duration,
    /// The delay after the latest failure; zero if nothing has failed.
    delay: Duration,
    /// When the next try is due, on the caller's clock.
    due: Duration,
}

impl Backoff {
    pub(crate) const fn new(first: Duration, longest: Duration) -> Self {
        Self {
            first,
            longest,
            delay: Duration::ZERO,
            due: Duration::ZERO,
        }
    }

    /// A try has failed. The next one is due after a delay, twice the last one.
    pub(crate) fn fail(&mut self, now: Duration) {
        self.delay = (self.delay.saturating_mul(2)).clamp(self.first, self.longest);
        self.due = now.saturating_add(self.delay);
    }

    /// How long until the next try is due; zero if it is.
    pub(crate) fn left(&self, now: Duration) -> Duration {
        self.due.saturating_sub(now)
    }

    pub(crate) fn is_due(&self, now: Duration) -> bool {
        self.left(now).is_zero()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn delays_double_up_to_the_longest() {
        let mut backoff = Backoff::new(MS, 6 * MS);
        assert!(backoff.is_due(Duration::ZERO));
        let mut delays = Vec::new();
        for _ in 0..5 {
            backoff.fail(100 * MS);
            delays.push(backoff.left(100 * MS).as_millis());
        }
        assert_eq!(delays, [1, 2, 4, 6, 6]);
        assert!(!backoff.is_due(105 * MS) && backoff.is_due(106 * MS));
    }

    proptest! {
        #[test]
        fn tries_are_few_however_long_something_fails(first in 1..50u32, times in 1..1000u32, look in 1..20u32, minutes in 1..5u32) {
            let (first, look) = (first * MS, look * MS);
            let longest = first * times;
            let mut backoff = Backoff::new(first, longest);
            let (mut now, end, mut tries) = (Duration::ZERO, Duration::from_secs(60) * minutes, 0);
            while now < end {
                if backoff.is_due(now) {
                    tries += 1;
                    backoff.fail(now);
                }
                now += look;
            }
            let most = 2 + times.ilog2() + 1 + (end.as_millis() / longest.as_millis()) as u32;
            prop_assert!(tries <= most, "{tries} tries of {most}");
        }

        #[test]
        fn no_time_is_too_long(first in any::<u64>(), longest in any::<u64>(), now in any::<u64>()) {
            let first = Duration::from_secs(first);
            let mut backoff = Backoff::new(first, first.max(Duration::from_secs(longest)));
            let now = Duration::from_secs(now);
            for _ in 0..3 {
                backoff.fail(now);
            }
            prop_assert!(backoff.left(now) <= Duration::MAX - now);
        }
    }
}
