//! Two models at equal weight that always want more than half: each gets half, in memory and time.
//!
//! The time is one of steps, so each run is the same.

use crate::common::{ModelOptions, Models, PAGE, Simulated, manual};
use crate::pool;
use cuda_vmm::VirtualMemoryPool;
use cuda_vmm::sim::SimConfig;
use std::sync::Arc;

const LIMIT: usize = 64;
const CAPACITY: usize = 256;

/// How a model behaves.
#[derive(Debug, Clone, Copy)]
struct Way {
    /// Steps between two boundaries, at which it frees, gives back what it owes and asks for more.
    period: usize,
    /// Pages of a sequence.
    sequence: usize,
    /// The most that it ever wants, in pages.
    demand: usize,
    /// After how many boundaries its oldest sequence ends; 0 for never.
    life: usize,
}

struct Model {
    pool: Arc<VirtualMemoryPool>,
    way: Way,
    /// Where its sequences begin, the oldest first.
    sequences: Vec<usize>,
    boundaries: usize,
    page_steps: usize,
}

impl Model {
    fn new(pool: &Models, name: &str, way: Way) -> Self {
        let options = ModelOptions::new(CAPACITY * PAGE);
        pool.register_model_with(name, options).expect("addresses");
        Self {
            pool: pool.model(name).expect("registered"),
            way,
            sequences: Vec::new(),
            boundaries: 0,
            page_steps: 0,
        }
    }

    fn bytes(&self) -> usize {
        self.way.sequence * PAGE
    }

    fn held(&self) -> usize {
        self.sequences.len() * self.way.sequence
    }

    fn end(&mut self, at: usize) {
        let offset = self.sequences.remove(at);
        self.pool.deallocate(offset, self.bytes()).expect("live");
    }

    fn boundary(&mut self) {
        self.boundaries += 1;
        if self.way.life > 0
            && self.boundaries.is_multiple_of(self.way.life)
            && !self.sequences.is_empty()
        {
            self.end(0);
        }
        // Whole sequences, the youngest first, as a server preempts. A model that gives back asks
        // for more at its next boundary, or it would have the same memory again before the other
        // asks.
        let owes = self.pool.account().owed_bytes() > 0;
        while self.pool.account().owed_bytes() > 0 && !self.sequences.is_empty() {
            self.end(self.sequences.len() - 1);
        }
        while !owes && self.held() + self.way.sequence <= self.way.demand {
            let unused = (0..).map(|slot| slot * self.bytes());
            let mut unused = unused.filter(|offset| !self.sequences.contains(offset));
            let offset = unused.next().expect("endless");
            if self.pool.try_allocate(offset, self.bytes()).is_err() {
                break;
            }
            self.sequences.push(offset);
        }
    }
}

/// What two models hold in the long run: page-steps of each.
fn run(ways: [Way; 2]) -> [usize; 2] {
    const STEPS: usize = 400;
    let simulated = Simulated::new(SimConfig::new().unbacked());
    let pool = pool(
        &simulated.device,
        manual().limit_bytes(LIMIT * PAGE).chunk_bytes_max(0),
    );
    let [a, b] = ways;
    let mut models = [Model::new(&pool, "a", a), Model::new(&pool, "b", b)];
    for step in 0..STEPS {
        for model in &mut models {
            if step.is_multiple_of(model.way.period) {
                model.boundary();
            }
            // What was freed is free of the device at the next step.
            simulated.device.synchronize().expect("done");
            pool.engine().step();
        }
        if step >= STEPS / 2 {
            for model in &mut models {
                model.page_steps += model.held();
            }
        }
    }
    models.map(|model| model.page_steps)
}

fn ways() -> Vec<[Way; 2]> {
    let mut ways = Vec::new();
    for periods in [[1, 1], [1, 3], [3, 2]] {
        for sequences in [[2, 2], [1, 4], [8, 8]] {
            for demands in [[64, 64], [40, 64]] {
                for lives in [[0, 0], [3, 3], [0, 2]] {
                    ways.push([0, 1].map(|model| Way {
                        period: periods[model],
                        sequence: sequences[model],
                        demand: demands[model],
                        life: lives[model],
                    }));
                }
            }
        }
    }
    ways
}

#[test]
fn two_models_of_equal_weight_get_equal_shares() {
    let mut unfair = Vec::new();
    for ways in ways() {
        let [a, b] = run(ways);
        let apart = a.abs_diff(b) as f64 / (a + b) as f64 * 2.0;
        if apart > 0.1 {
            unfair.push((apart, ways));
        }
    }
    unfair.sort_by(|one, other| other.0.total_cmp(&one.0));
    let count = ways().len();
    assert!(
        unfair.is_empty(),
        "{} of {count}: {:#?}",
        unfair.len(),
        &unfair[..unfair.len().min(8)]
    );
}
