//! A small model on the CPU, whose tokens are those of one sequence alone.

use super::*;
use crate::batch::BatchDecoder;
use crate::config::Config;
use crate::scheduler::{Id, Limits, Refusal};
use crate::weights::{Source, Weights};
use candle_core::{DType, Device};
use candle_cuda_vmm::{Account, SharedMemoryPool, TensorPool, TensorPoolOptions};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::HashMap;
use std::time::{Duration, Instant};

const MODEL: &str = r#"{ "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256 }"#;
const LIMITS: Limits = Limits {
    sequences_max: 4,
    step_tokens_max: 24,
    context_max: 160,
    waiting_max: 64,
};
/// Blocks of which one sequence of full length has ten, and few others fit beside it.
const FEW: usize = 16;
/// Blocks for all.
const PLENTY: usize = 64;

fn options(model: &str) -> TensorPoolOptions {
    pool_options(&Config::parse(model).expect("a model"), PAGE)
}

fn pool_of(model: &str) -> TensorPool {
    TensorPool::with_options(&Device::Cpu, options(model)).expect("a pool")
}

fn runner(policy: Policy, blocks: usize) -> (Runner, TensorPool) {
    let pool = pool_of(MODEL);
    (runner_of(MODEL, policy, blocks, &pool, Vec::new()), pool)
}

fn runner_of(
    model: &str,
    policy: Policy,
    blocks: usize,
    pool: &TensorPool,
    others: Vec<Account>,
) -> Runner {
    let config = Config::parse(model).expect("a model");
    let weights = Weights::new(Source::Random(5), DType::F32, &Device::Cpu);
    let decoder = BatchDecoder::new(&config, weights, LIMITS.sequences_max, &Device::Cpu);
    let num_blocks = match policy {
        Policy::Ideal => PLENTY,
        _ => blocks,
    };
    let kv = Kv::new(
        pool,
        &config,
        DType::F32,
        num_blocks,
        4 * LIMITS.sequences_max,
        policy,
    );
    // No test is to depend on how long something takes.
    let kv = kv.map(|kv| kv.beside(others, Duration::from_secs(3600)));
    let kv = match policy {
        Policy::Ideal => kv.map(|kv| kv.within(Budget::new(blocks), 0, 1)),
        _ => kv,
    };
    let kv = kv.expect("blocks");
    let runner = Runner::new(decoder.expect("a decoder"), kv, &Device::Cpu, LIMITS);
    runner.expect("a runner")
}

fn prompt(random: &mut StdRng) -> Vec<u32> {
    // Few different beginnings, so that prefixes are found again.
    let kind = random.random_range(0..3u32);
    let length = random.random_range(1..90);
    (0..length).map(|at| (at * 7 + kind * 11) % 64).collect()
}

/// Every second sequence takes the likeliest tokens, the others choose by a seed of their own.
fn choice(at: usize) -> Choice {
    match at % 2 {
        0 => Choice::GREEDY,
        _ => Choice {
            temperature: 0.9,
            top_p: 0.8,
            seed: (at as u64) << 31,
        },
    }
}

/// Longer than anything here takes; a test that fails ends all the same.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs until nothing is left, and returns the tokens of each sequence.
fn drain(runner: &mut Runner, tokens: &mut HashMap<Id, Vec<u32>>) {
    let mut stepped_at = Instant::now();
    while !runner.is_idle() {
        let stepped = runner.step(|made| {
            tokens.entry(made.id).or_default().push(made.token);
            false
        });
        if stepped.expect("a step").is_some() {
            stepped_at = Instant::now();
        }
        assert!(stepped_at.elapsed() < PATIENCE, "it is stuck");
    }
}

#[test]
fn a_model_that_is_warm_has_nothing_and_gives_the_same_tokens() {
    for policy in [Policy::Elastic, Policy::Static, Policy::Ideal] {
        for blocks in [FEW, PLENTY] {
            let mut tokens = [false, true].map(|is_warm| {
                let (mut runner, pool) = runner(policy, blocks);
                if is_warm {
                    runner.warm_up().expect("memory that suffices");
                    assert_eq!((runner.counts(), runner.held()), Default::default());
                    let held = pool.engine().stats().parts.live_page_bytes;
                    assert!(held == 0 || policy.is_backed_at_start(), "{held} bytes");
                }
                let mut tokens = HashMap::new();
                let prompt = (0..50).collect();
                runner
                    .submit(Id(0), prompt, 20, choice(1))
                    .expect("it fits");
                drain(&mut runner, &mut tokens);
                tokens
            });
            let warm = tokens[1].drain().next();
            assert_eq!(warm, tokens[0].drain().next(), "{policy:?}, {blocks}");
        }
    }
}

#[test]
fn tokens_are_those_of_each_sequence_alone_whatever_else_runs() {
    let mut random = StdRng::seed_from_u64(3);
    let asks: Vec<_> = (0..24)
        .map(|_| (prompt(&mut random), random.random_range(1..60)))
        .collect();
    let mut expected = HashMap::new();
    for (at, (prompt, count)) in asks.iter().enumerate() {
        let (mut alone, _pool) = runner(Policy::Elastic, PLENTY);
        alone
            .submit(Id(at as u64), prompt.clone(), *count, choice(at))
            .expect("it fits");
        drain(&mut alone, &mut expected);
    }
    for (policy, blocks) in [
        (Policy::Elastic, FEW),
        (Policy::PageAtATime, FEW),
        (Policy::Ideal, FEW),
        (Policy::Static, PLENTY),
    ] {
        let (mut runner, _pool) = runner(policy, blocks);
        runner.capture().expect("captured");
        let mut tokens = HashMap::new();
        for (at, (prompt, count)) in asks.iter().enumerate() {
            let id = Id(at as u64);
            runner
                .submit(id, prompt.clone(), *count, choice(at))
                .expect("it fits");
            if at % 3 == 0 {
                runner
                    .step(|made| {
                        tokens
                            .entry(made.id)
                            .or_insert_with(Vec::new)
                            .push(made.token);
                        false
                    })
                    .expect("a step");
            }
        }
        drain(&mut runner, &mut tokens);
        assert_eq!(tokens, expected, "{policy:?}");
        let counts = runner.counts();
        assert!(counts.cached_tokens > 0, "{policy:?}");
        assert_eq!(
            counts.preemptions > 0,
            blocks == FEW,
            "{policy:?}: {counts:?}"
        );
        assert_eq!(runner.kv().in_use(), (0, 0), "{policy:?}");
        runner.kv().clear_prefixes().expect("cleared");
        assert_eq!(runner.kv().unused_prefixes(), 0);
        assert_eq!(runner.kv().allocated(), 0, "{policy:?}");
    }
}

#[test]
fn a_sequence_that_goes_away_frees_its_memory_and_what_never_fits_is_refused() {
    let (mut runner, _pool) = runner(Policy::Elastic, FEW);
    runner
        .submit(Id(1), vec![1; 40], 100, Choice::GREEDY)
        .expect("it fits");
    for _ in 0..5 {
        runner.step(|_| false).expect("a step");
    }
    assert!(runner.kv().in_use().1 >= 3);
    assert!(runner.cancel(Id(1)));
    assert!(!runner.cancel(Id(1)));
    assert_eq!(runner.kv().in_use(), (0, 0));
    assert!(runner.is_idle());
    let refused = runner.submit(Id(2), vec![1; 100], 100, Choice::GREEDY);
    assert!(matches!(refused, Err(Refusal::TooLong { tokens: 200, .. })));
}

const PAGE: usize = 2 << 20;
/// A page of K or V has 8 blocks.
const WIDE: &str = r#"{ "vocab_size": 264, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256,
    "max_position_embeddings": 512 }"#;

/// Runs a prompt of 8 whole blocks and a token more.
fn run_long(runner: &mut Runner, kind: u32) {
    run(runner, kind, 129);
}

fn run(runner: &mut Runner, kind: u32, tokens: u32) {
    let prompt = (0..tokens)
        .map(|token| (token * (kind + 1)) % 250)
        .collect();
    let submitted = runner.submit(Id(u64::from(kind)), prompt, 2, Choice::GREEDY);
    submitted.expect("it fits");
    drain(runner, &mut HashMap::new());
}

/// Three pages of each tensor for two models, which give back empty pages at once.
fn two_models() -> (SharedMemoryPool, [(Runner, Account); 2]) {
    let mut shared = SharedMemoryPool::new(3 * 2 * PAGE, Device::Cpu).expect("a pool");
    let pools = ["one", "two"].map(|name| {
        let capacity = PLENTY * BLOCK_TOKENS * 2 * (16 << 10);
        shared.register_model(name, capacity).expect("registered");
        shared.tensor_pool(name, options(WIDE)).expect("a pool")
    });
    let models = [0, 1].map(|at| {
        let others = vec![pools[1 - at].account().clone()];
        let runner = runner_of(WIDE, Policy::PageAtATime, PLENTY, &pools[at], others);
        (runner, pools[at].account().clone())
    });
    (shared, models)
}

#[test]
fn what_a_model_finds_among_its_own_prefixes_others_do_not_owe() {
    let (shared, mut models) = two_models();
    // The first has the prefixes of two pages, the second those of one.
    (0..2).for_each(|kind| run_long(&mut models[0].0, kind));
    run(&mut models[1].0, 0, 113);
    assert_eq!(shared.detailed_stats().committed_bytes, 3 * 2 * PAGE);
    // Now it needs a page more than there is.
    run(&mut models[1].0, 1, 113);
    assert_eq!(models[1].0.kv().unused_prefixes(), 7, "some were given up");
    assert_eq!(models[0].1.owed_bytes(), 0);
    assert_eq!(models[0].0.kv().unused_prefixes(), 2 * 8);
}

#[test]
fn a_decode_keeps_what_it_has_until_another_model_gives_back_what_it_owes() {
    let (shared, mut models) = two_models();
    (0..2).for_each(|kind| run_long(&mut models[0].0, kind));
    let [(one, account), (two, own)] = &mut models;
    let prompt = (0..120).collect();
    let submitted = two.submit(Id(0), prompt, 40, Choice::GREEDY);
    submitted.expect("it fits");
    let mut tokens = 0;
    while account.owed_bytes() == 0 {
        let stepped = two.step(|_| {
            tokens += 1;
            false
        });
        stepped.expect("a step or none");
        assert!(tokens < 40, "a page is not enough");
    }
    // It has the blocks of a page, and needs one more.
    assert_eq!(tokens, 9);
    for _ in 0..3 {
        assert_eq!(two.step(|_| false).expect("none"), None);
        assert_eq!(two.kv().in_use(), (1, 8));
    }
    one.give_back(account.owed_bytes()).expect("given back");
    account.give_back().expect("given back");
    // The engine's own thread may have it in its hands.
    let until = Instant::now() + PATIENCE;
    while own.available_bytes() < 2 * PAGE {
        assert!(Instant::now() < until, "it does not come");
        shared.core().engine().step();
    }
    drain(two, &mut HashMap::new());
    let counts = two.counts();
    assert_eq!((counts.preemptions, counts.generated_tokens), (0, 40));
}

#[test]
fn giving_back_a_page_costs_the_prefixes_of_a_page() {
    let pool = pool_of(WIDE);
    let mut runner = runner_of(WIDE, Policy::Elastic, PLENTY, &pool, Vec::new());
    (0..4).for_each(|kind| run_long(&mut runner, kind));
    assert_eq!(runner.kv().unused_prefixes(), 4 * 8);
    let page = 2 * PAGE;
    for pages in 1..3 {
        let freed = runner.kv().give_back(page).expect("given back");
        assert!(freed >= page, "{freed}");
        // What was in the page, and what is behind it in others.
        let kept = runner.kv().unused_prefixes();
        assert!(kept >= 4 * 8 - pages * 2 * 8, "{kept} after {pages}");
        assert_eq!(runner.kv().allocated(), kept);
    }
    // The newest is still there.
    let cached = runner.counts().cached_tokens;
    run_long(&mut runner, 3);
    assert_eq!(runner.counts().cached_tokens - cached, 128);
}
