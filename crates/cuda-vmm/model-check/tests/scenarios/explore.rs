//! How often a scenario is run, and in which orders.

use crate::books::{Books, books};
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::{Config, MaxSteps, Runner};

/// Executions of each scenario by each scheduler; `SHUTTLE_ITERATIONS` asks for more, as `cargo
/// xtask ci` does.
const ITERATIONS: usize = 200;
/// The same orders each time; `SHUTTLE_RANDOM_SEED` asks for others.
const SEED: u64 = 0x5eed;
/// Threads that change places out of turn, as PCT counts.
const DEPTH: usize = 3;

/// Runs a scenario in many orders: at random, and by priorities that change at a few places (PCT),
/// which finds what needs one thread to stand still for long.
pub fn explore(scenario: impl Fn() + Clone + Send + Sync + 'static) {
    let iterations = std::env::var("SHUTTLE_ITERATIONS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(ITERATIONS);
    run(
        RandomScheduler::new_from_seed(SEED, iterations),
        scenario.clone(),
    );
    run(
        PctScheduler::new_from_seed(SEED, DEPTH, iterations),
        scenario,
    );
}

fn run(scheduler: impl Scheduler + 'static, scenario: impl Fn() + Send + Sync + 'static) {
    let mut config = Config::new();
    config.stack_size = 0x20000;
    // A scenario takes some thousand; one that takes so many goes round in circles.
    config.max_steps = MaxSteps::FailAfter(100_000);
    // That statics end with an execution is what is wanted.
    config.silence_warnings = true;
    Runner::new(scheduler, config).run(move || {
        books(|books| *books = Books::default());
        scenario();
        books(|books| books.assert_legal());
    });
}
