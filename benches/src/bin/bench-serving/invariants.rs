//! What holds of every schedule, whatever the requests, in every pool.

use crate::pools::elastic::Elastic;
use crate::pools::page_at_a_time::PageAtATime;
use crate::time_model::TimeModel;
use anyhow::Result;
use cuda_vmm_benches::serving::*;
use cuda_vmm_sim::CostModel;
use proptest::prelude::*;
use std::collections::BTreeSet;

struct Checked {
    pool: Box<dyn Memory>,
    limit: usize,
    /// Blocks in use, of each model; names may be the same if a pool only counts.
    used: Vec<Vec<u32>>,
    has_names: bool,
}

impl Memory for Checked {
    fn most_blocks(&self, model: usize) -> usize {
        self.pool.most_blocks(model)
    }

    fn free_blocks(&self, model: usize) -> usize {
        self.pool.free_blocks(model)
    }

    fn take(&mut self, now_ns: &mut u64, model: usize, count: usize) -> Result<Option<Vec<u32>>> {
        let (began_ns, free) = (*now_ns, self.free_blocks(model));
        let taken = self.pool.take(now_ns, model, count)?;
        assert!(*now_ns >= began_ns, "time goes on");
        if let Some(blocks) = &taken {
            assert!(count <= free, "{count} of {free}");
            assert_eq!(blocks.len(), count, "all or none");
            self.used[model].extend(blocks);
        }
        assert!(self.used.iter().map(Vec::len).sum::<usize>() <= self.limit);
        if self.has_names {
            let names: BTreeSet<_> = self.used[model].iter().collect();
            assert_eq!(names.len(), self.used[model].len(), "no block twice");
        }
        Ok(taken)
    }

    fn give(&mut self, now_ns: &mut u64, model: usize, blocks: Vec<u32>) -> Result<()> {
        for block in &blocks {
            let at = self.used[model].iter().position(|used| used == block);
            self.used[model].swap_remove(at.expect("only what was taken is given"));
        }
        self.pool.give(now_ns, model, blocks)
    }

    fn work(&mut self, now_ns: u64) -> Result<()> {
        self.pool.work(now_ns)
    }

    fn held_bytes(&self, model: usize) -> u64 {
        let bytes = self.pool.held_bytes(model);
        assert!(bytes >= (self.used[model].len() * BLOCK_BYTES) as u64);
        bytes
    }
}

const POOLS: usize = 4;

/// The pools, with this many blocks for all models; the static one gives each the same share.
fn pool(which: usize, limit: usize, models: usize, costs: Option<CostModel>) -> Checked {
    // Nothing of it stands beyond a fraction of so small a pool.
    let settings = (limit * BLOCK_BYTES / 8, 4 * BLOCK_BYTES);
    let pool: Box<dyn Memory> = match which {
        0 => Box::new(Counted::split(limit / models, models)),
        1 => Box::new(PageAtATime::new(limit, models, costs).unwrap()),
        2 => Box::new(Elastic::new(limit, models, costs, settings).unwrap()),
        _ => Box::new(Counted::shared(limit, models)),
    };
    Checked {
        pool,
        limit,
        used: vec![Vec::new(); models],
        has_names: which == 1 || which == 2,
    }
}

fn requests() -> impl Strategy<Value = Vec<Request>> {
    let new = |(ms, prompt, generated)| Request::new(ms * 1_000_000, prompt, generated);
    let request = (0..2_000_u64, 1..400_u32, 1..80_u32).prop_map(new);
    prop::collection::vec(request, 0..25).prop_map(|mut requests| {
        requests.sort_by_key(|request| request.arrival_ns);
        requests
    })
}

fn run(models: &[Vec<Request>], memory: &mut Checked) -> Served {
    let limits = Limits {
        sequences_max: 8,
        prompt_tokens_max: 512,
        watermark_divisor: 50,
    };
    let time = |prompt, decodes| TimeModel::FITTED.step(prompt, decodes);
    let mut served = Served::default();
    let server = Server::new(models, memory, limits, &time, &mut served);
    server.run(u64::MAX).unwrap();
    served
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_request_ends_or_is_refused_and_no_token_is_lost(
        models in prop::collection::vec(requests(), 1..4), limit in 12..80_usize,
    ) {
        for which in 0..POOLS {
            let mut memory = pool(which, limit, models.len(), Some(CostModel::h100()));
            let outcome = run(&models, &mut memory);
            let most = memory.most_blocks(0);
            let all = models.iter().flatten();
            let (served, refused): (Vec<&Request>, Vec<&Request>) =
                all.partition(|request| blocks_of(request.tokens_max()) <= most);
            prop_assert_eq!((outcome.served, outcome.refused), (served.len(), refused.len()));
            let tokens: u32 = served.iter().map(|request| request.generated_tokens).sum();
            prop_assert_eq!(outcome.tokens, u64::from(tokens));
            prop_assert!(memory.used.iter().all(Vec::is_empty), "all blocks were given back");
            prop_assert!(outcome.held_bytes_max <= (limit * BLOCK_BYTES) as u64);
        }
    }

    #[test]
    fn pools_of_one_size_whose_calls_cost_nothing_give_the_same_schedule(
        requests in requests(), limit in 12..80_usize,
    ) {
        let models = [requests];
        let outcome = |which| {
            let outcome = run(&models, &mut pool(which, limit, 1, None));
            // All but what tells of the pool itself.
            Served { held_bytes_max: 0, over_time: Vec::new(), ..outcome }
        };
        let ideal = outcome(POOLS - 1);
        for which in 0..POOLS - 1 {
            prop_assert_eq!(&outcome(which), &ideal, "pool {}", which);
        }
    }

    #[test]
    fn a_run_is_the_same_again(models in prop::collection::vec(requests(), 2..4), limit in 12..80_usize) {
        for which in [1, 2] {
            let again = || run(&models, &mut pool(which, limit, models.len(), Some(CostModel::h100())));
            prop_assert_eq!(again(), again());
        }
    }
}

#[test]
fn memory_that_is_short_preempts_and_computes_again() {
    let models = [vec![Request::new(0, 64, 65); 3]];
    // Three prompts of four blocks fit, but not what they grow to.
    let outcome = run(&models, &mut pool(3, 14, 1, None));
    assert_eq!((outcome.served, outcome.refused), (3, 0));
    assert!(outcome.preemptions > 0);
    assert_eq!(outcome.tokens, 3 * 65);
}
