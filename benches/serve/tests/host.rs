//! Models that share memory on the CPU, and clients of which many vanish.

use candle_core::DType;
use candle_cuda_vmm::Quota;
use cuda_vmm_serve::engine::Policy;
use cuda_vmm_serve::figures::{Figures, ModelFigures};
use cuda_vmm_serve::host::{Host, ModelSpec, Place, Shape, ShapeError, Sharing};
use cuda_vmm_serve::request::{Backend, Event, FinishReason, Generate, Refusal, Sampling};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::HashMap;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

const MODELS: [&str; 2] = ["one", "two"];
/// Two steps of memory for each model: a page of K and of V in each of two layers.
const LIMIT: usize = 32 << 20;

fn sharing(policy: Policy) -> Sharing {
    Sharing {
        limit_bytes: LIMIT,
        policy,
        sequences_max: 4,
        waiting_max: 1000,
        step_tokens_max: 64,
        sleeping: None,
    }
}

fn host(sharing: &Sharing) -> Host {
    host_of(
        sharing,
        &Shape::read("tiny", 3, DType::F32).expect("a shape"),
    )
}

fn host_of(sharing: &Sharing, shape: &Shape) -> Host {
    let specs = MODELS.map(|name| ModelSpec {
        name: name.to_owned(),
        shape: shape.clone(),
        quota: Quota::new(),
    });
    Host::new(Place::Cpu, sharing, specs.into()).expect("models")
}

/// The most tokens that a request of [`ask`] gets.
const TOKENS_MAX: usize = 40;

fn ask(random: &mut StdRng) -> Generate {
    let kind = random.random_range(0..4);
    let length = random.random_range(1..80);
    Generate {
        prompt: (0..length).map(|at| (at * 5 + kind) % 250).collect(),
        max_tokens: random.random_range(1..=TOKENS_MAX),
        sampling: Sampling {
            temperature: [0., 0.8][random.random_range(0..2)],
            top_p: 0.9,
            seed: Some(u64::from(length) << 40),
        },
        stop_ids: vec![256],
    }
}

/// What a request gave: its tokens, and how it ended.
type Reply = (Vec<u32>, FinishReason);

/// What requests give that are served alone.
#[derive(Default)]
struct Alone(HashMap<(Vec<u32>, bool), Reply>);

impl Alone {
    /// All on which the tokens depend, but for their number.
    fn key(ask: &Generate) -> (Vec<u32>, bool) {
        (ask.prompt.clone(), ask.sampling.temperature == 0.)
    }

    fn serve(&mut self, host: &Host, ask: &Generate) {
        let longest = Generate {
            max_tokens: TOKENS_MAX,
            ..ask.clone()
        };
        let reply = || reply(host, "one", longest);
        self.0.entry(Self::key(ask)).or_insert_with(reply);
    }

    fn reply(&self, ask: &Generate) -> Reply {
        let (tokens, reason) = &self.0[&Self::key(ask)];
        match ask.max_tokens <= tokens.len() {
            true => (tokens[..ask.max_tokens].to_vec(), FinishReason::Length),
            false => (tokens.clone(), *reason),
        }
    }
}

/// How many requests a test of many has.
fn requests() -> usize {
    let number = std::env::var("CUDA_VMM_SERVE_REQUESTS");
    number.map_or(96, |number| number.parse().expect("a number"))
}

fn reply(host: &Host, model: &str, ask: Generate) -> Reply {
    let mut events = host.submit(model, ask).expect("there is room");
    let mut tokens = Vec::new();
    loop {
        match events.blocking_recv().expect("an end comes") {
            Event::Token(token) => tokens.push(token),
            Event::End(reason) => return (tokens, reason),
            Event::Failed(why) => panic!("{why}"),
            Event::Refused(refusal) => panic!("{refusal}"),
        }
    }
}

#[track_caller]
fn await_until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The bytes of K and V that are in use.
fn live_bytes(host: &Host) -> usize {
    host.pool().snapshot().engine.parts.live_page_bytes
}

#[test]
fn every_request_has_its_tokens_and_what_vanishes_frees_its_memory() {
    let mut random = StdRng::seed_from_u64(9);
    let asks: Vec<_> = (0..requests()).map(|_| ask(&mut random)).collect();
    let mut expected = Alone::default();
    let alone = host(&sharing(Policy::Elastic));
    asks.iter().for_each(|ask| expected.serve(&alone, ask));
    drop(alone);
    for policy in [
        Policy::Elastic,
        Policy::PageAtATime,
        Policy::Static,
        Policy::Ideal,
    ] {
        let host = host(&sharing(policy));
        std::thread::scope(|scope| {
            for client in 0..8 {
                let (host, asks, expected) = (&host, &asks, &expected);
                scope.spawn(move || {
                    let mut random = StdRng::seed_from_u64(client as u64);
                    for ask in asks.iter().skip(client).step_by(8) {
                        let model = MODELS[random.random_range(0..2)];
                        if random.random_bool(0.4) {
                            // It goes away after a while.
                            let mut events = host.submit(model, ask.clone()).expect("room");
                            let some = random.random_range(0..ask.max_tokens);
                            for _ in 0..some {
                                _ = events.blocking_recv();
                            }
                            continue;
                        }
                        // Models have the same weights.
                        assert_eq!(reply(host, model, ask.clone()), expected.reply(ask));
                    }
                });
            }
        });
        assert!(host.is_healthy(), "{policy:?}");
        await_until("all have ended", || {
            let metrics = host.metrics();
            MODELS.iter().all(|model| {
                metrics.contains(&format!("cuda_vmm_serve_running{{model=\"{model}\"}} 0\n"))
            })
        });
        assert!(live_bytes(&host) > 0, "prefixes are kept: {policy:?}");
        host.clear_prefixes();
        if !policy.is_backed_at_start() {
            await_until("all memory is free", || live_bytes(&host) == 0);
        }
    }
}

/// K and V of a token take 16 KiB in each of two tensors, so a page has 128 tokens.
const WIDE: &str = r#"{ "vocab_size": 264, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256,
    "max_position_embeddings": 512 }"#;

/// Takes figures until they are as wanted. Whenever they are taken, all parts add up to the limit.
fn figures_once(host: &Host, is_wanted: impl Fn(&[ModelFigures]) -> bool) -> Figures {
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        let figures = host.figures();
        let parts = figures.models.iter().map(ModelFigures::committed_bytes);
        let held: usize = parts.sum::<usize>() + figures.unowned_bytes;
        assert_eq!(held + figures.free_bytes, LIMIT, "{figures:?}");
        if is_wanted(&figures.models) {
            return figures;
        }
        assert!(Instant::now() < deadline, "{figures:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn figures_say_what_memory_is_for_and_add_up_to_the_limit() {
    let shape = Shape::random(WIDE, 3, DType::F32).expect("a shape");
    for policy in [Policy::Elastic, Policy::PageAtATime, Policy::Static] {
        let host = host_of(&sharing(policy), &shape);
        let ask = Generate {
            prompt: (0..70).collect(),
            max_tokens: 200,
            sampling: Sampling {
                temperature: 0.,
                top_p: 1.,
                seed: None,
            },
            stop_ids: Vec::new(),
        };
        let mut running = host.submit("one", ask).expect("room");
        let figures = figures_once(&host, |models| models[0].live_bytes > 0);
        assert_eq!(figures.models.len(), 2, "{policy:?}");
        assert_eq!(figures.models[1].id, "two");
        assert_eq!(figures.models[1].live_bytes, 0, "{policy:?}");
        if policy == Policy::Elastic {
            figures_once(&host, |models| models[0].ahead_bytes > 0);
        }
        while running.blocking_recv().is_some() {}
        let figures = figures_once(&host, |models| models[0].live_bytes == 0);
        let one = &figures.models[0];
        assert_eq!((one.running, one.waiting), (0, 0), "{policy:?}");
        assert_eq!(one.generated_tokens, 200, "{policy:?}");
        // Of 269 tokens that were computed, 16 whole blocks are kept.
        assert!(one.prefix_bytes >= 16 * 16 * 2 * (16 << 10), "{one:?}");
        // Its prompt's step gave one token, and 199 steps followed.
        let steps = "cuda_vmm_serve_step_seconds_count{model=\"one\",sequences=\"1\"} 199\n";
        assert!(host.metrics().contains(steps), "{}", host.metrics());
        let sample = "cuda_vmm_serve_cached_prefix_bytes{model=\"one\"}";
        let sample = format!("{sample} {}\n", one.prefix_bytes);
        assert!(host.metrics().contains(&sample), "{policy:?}");
        host.clear_prefixes();
        let others = match policy {
            // All that the model has, which nothing uses.
            Policy::Static => LIMIT / 2,
            _ => 0,
        };
        figures_once(&host, |models| {
            models[0].prefix_bytes == 0 && models[0].other_bytes == others
        });
    }
}

/// Asks for the two likeliest tokens after a prompt of this length, which differs from that of other
/// numbers from its second token on.
fn greedy(number: u32, length: u32) -> Generate {
    Generate {
        prompt: (0..length).map(|at| (at * (number + 1)) % 250).collect(),
        max_tokens: 2,
        sampling: Sampling {
            temperature: 0.,
            top_p: 1.,
            seed: None,
        },
        stop_ids: vec![256],
    }
}

/// Both models want more than there is, at the same time and one after the other.
#[test]
fn models_that_are_short_get_what_others_do_not_need() {
    let shape = Shape::random(WIDE, 3, DType::F32).expect("a shape");
    // A sequence takes two pages in each tensor. There are three: enough for one sequence of either
    // model.
    let sharing = Sharing {
        limit_bytes: 3 * 2 * (2 << 20),
        ..sharing(Policy::Elastic)
    };
    let alone = host_of(
        &Sharing {
            limit_bytes: 1 << 30,
            ..sharing
        },
        &shape,
    );
    let asks: Vec<_> = (0..4).map(|at| greedy(at, 132)).collect();
    let expected: Vec<_> = asks
        .iter()
        .map(|ask| reply(&alone, "one", ask.clone()))
        .collect();
    drop(alone);
    let host = host_of(&sharing, &shape);
    // The first keeps the prefixes of what it served, until the second needs their memory.
    for round in 0..2 {
        for model in MODELS {
            for (ask, expected) in asks.iter().zip(&expected).skip(round * 2).take(2) {
                assert_eq!(
                    &reply(&host, model, ask.clone()),
                    expected,
                    "{model} in turn"
                );
            }
        }
    }
    // Both at once.
    std::thread::scope(|scope| {
        for (model, (ask, expected)) in MODELS.into_iter().cycle().zip(asks.iter().zip(&expected)) {
            let host = &host;
            scope.spawn(move || {
                assert_eq!(
                    &reply(host, model, ask.clone()),
                    expected,
                    "{model} at once"
                );
            });
        }
    });
    assert!(host.is_healthy());
    let engine = host.pool().snapshot().engine;
    assert_eq!(engine.limit_bytes, sharing.limit_bytes);
    assert!(engine.committed_bytes <= engine.limit_bytes);
}

/// Both have filled their half of the memory with prefixes. One is idle then, and the other needs
/// more than its half.
#[test]
fn an_idle_model_gives_up_prefixes_though_it_holds_no_more_than_the_busy_one() {
    for policy in [Policy::Elastic, Policy::PageAtATime] {
        gives_up_prefixes(policy);
    }
}

fn gives_up_prefixes(policy: Policy) {
    let shape = Shape::random(WIDE, 3, DType::F32).expect("a shape");
    // A page of each tensor holds 128 tokens: half of the memory is two of them.
    let sharing = Sharing {
        limit_bytes: 4 * 2 * (2 << 20),
        ..sharing(policy)
    };
    let host = host_of(&sharing, &shape);
    for model in MODELS {
        reply(&host, model, greedy(0, 200));
    }
    let held = || {
        let figures = host.figures();
        figures
            .models
            .iter()
            .map(ModelFigures::committed_bytes)
            .collect::<Vec<_>>()
    };
    // An elastic model keeps some of the memory free, for which the idle one has given up a page.
    let half_bytes = sharing.limit_bytes / 2;
    let idle_bytes = match policy {
        Policy::Elastic => half_bytes / 2,
        _ => half_bytes,
    };
    assert_eq!(held(), [idle_bytes, half_bytes]);
    // Three pages at once, without a sequence that is preempted.
    std::thread::scope(|scope| {
        for at in 1..4 {
            let ask = Generate {
                max_tokens: 20,
                ..greedy(at, 100)
            };
            let host = &host;
            scope.spawn(move || reply(host, "one", ask));
        }
    });
    assert!(held()[0] > half_bytes, "{policy:?}: {:?}", held());
    assert!(host.is_healthy());
}

/// K and V of a block of [`WIDE`].
const BLOCK_BYTES: usize = 16 * 2 * (16 << 10);

/// One sequence of either model fits into the limit, and not one of each.
#[test]
fn an_ideal_memory_is_shared_and_stays_within_the_limit() {
    let shape = Shape::random(WIDE, 3, DType::F32).expect("a shape");
    let limit_bytes = 12 * BLOCK_BYTES;
    let sharing = Sharing {
        limit_bytes,
        ..sharing(Policy::Ideal)
    };
    let host = host_of(&sharing, &shape);
    let (ended, is_ended) = std::sync::mpsc::channel();
    let test = std::thread::spawn(move || {
        share_ideally(&host, limit_bytes);
        ended.send(()).expect("the test waits");
    });
    let waited = is_ended.recv_timeout(Duration::from_secs(300));
    // A model that waits forever has no end; a failure of the thread is the test's.
    assert_ne!(waited, Err(RecvTimeoutError::Timeout), "models are stuck");
    test.join().expect("the models share");
}

fn share_ideally(host: &Host, limit_bytes: usize) {
    let ask = |first: u32, max_tokens| Generate {
        prompt: (0..132).map(|token| (token * 3 + first) % 250).collect(),
        max_tokens,
        sampling: Sampling {
            temperature: 0.,
            top_p: 1.,
            seed: None,
        },
        stop_ids: Vec::new(),
    };
    for round in 0..2 {
        let mut long = host.submit("one", ask(2 * round, 30)).expect("room");
        let first = long.blocking_recv();
        assert!(matches!(first, Some(Event::Token(_))), "{first:?}");
        // Nine blocks, while nine to eleven are in use: it waits for the other to end.
        let (tokens, _) = reply(host, "two", ask(2 * round + 1, 3));
        assert_eq!(tokens.len(), 3);
        let ended = std::iter::from_fn(|| long.try_recv().ok()).last();
        assert_eq!(ended, Some(Event::End(FinishReason::Length)));
    }
    // Many of both: they preempt, and none is lost.
    std::thread::scope(|scope| {
        for client in 0..4 {
            let ask = &ask;
            scope.spawn(move || {
                let model = MODELS[client as usize % 2];
                let (tokens, _) = reply(host, model, ask(100 + client, 8));
                assert_eq!(tokens.len(), 8);
            });
        }
    });
    assert!(host.is_healthy());
    let budget = host.budget().expect("a budget");
    let most_bytes = budget.most_bytes();
    assert!(most_bytes <= limit_bytes && most_bytes >= 9 * BLOCK_BYTES);
}

#[test]
fn what_cannot_be_served_is_refused() {
    let host = host(&Sharing {
        waiting_max: 0,
        sequences_max: 1,
        ..sharing(Policy::Elastic)
    });
    let mut random = StdRng::seed_from_u64(1);
    let unknown = host.submit("three", ask(&mut random)).map(drop);
    assert_eq!(unknown, Err(Refusal::UnknownModel));
    let long = Generate {
        max_tokens: 4000,
        ..ask(&mut random)
    };
    let too_long = host.submit("one", long).map(drop);
    assert!(
        matches!(too_long, Err(Refusal::TooLong { .. })),
        "{too_long:?}"
    );
    let first = Generate {
        max_tokens: 1500,
        ..ask(&mut random)
    };
    let running = host.submit("one", first.clone()).expect("room");
    let busy = host.submit("one", first.clone()).map(drop);
    assert!(matches!(busy, Err(Refusal::Busy { .. })), "{busy:?}");
    drop(running);
    let deadline = Instant::now() + Duration::from_secs(60);
    while host.submit("one", ask(&mut random)).is_err() {
        assert!(
            Instant::now() < deadline,
            "a client that goes away makes room"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    host.close();
    let closed = host.submit("one", ask(&mut random)).map(drop);
    assert_eq!(closed, Err(Refusal::Closing));
    let nowhere = Shape::read("/nowhere", 0, DType::F32);
    assert!(matches!(nowhere, Err(ShapeError::Unknown(_))));
}
