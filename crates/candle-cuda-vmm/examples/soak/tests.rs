//! A short soak, in which everything happens.

use crate::tally::Tally;
use crate::{Arguments, never_happened, soak};

#[test]
fn a_short_soak_does_everything_and_loses_nothing() {
    let mut tally = Tally::default();
    // A slow machine may take another round until everything has happened.
    for seed in 0..20 {
        let arguments = Arguments {
            minutes: 0.05,
            threads: 4,
            seed,
        };
        tally += soak(&arguments).unwrap();
        if never_happened(&tally).is_empty() {
            return;
        }
    }
    panic!("{:?} never happened\n{tally}", never_happened(&tally));
}
