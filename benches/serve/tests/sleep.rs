//! Models that sleep: more of them than their memory holds at once.

use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::Quota;
use cuda_vmm_serve::engine::Policy;
use cuda_vmm_serve::host::{Host, ModelSpec, Place, Shape, Sharing, Sleeping};
use cuda_vmm_serve::request::{Backend, Event, Generate, Refusal, Sampling};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::sync::mpsc::Receiver;

const MIB: usize = 1 << 20;
const NAMES: [&str; 6] = ["a", "b", "c", "d", "e", "f"];

/// Weights of 5 MiB, so of three pages, and K and V of a page as large as two.
const SHAPE: &str = r#"{ "vocab_size": 264, "hidden_size": 256, "intermediate_size": 1024,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512 }"#;
const WEIGHTS: usize = 6 * MIB;
const MODEL: usize = WEIGHTS + 4 * MIB;
/// Room for three models that have sequences.
const LIMIT: usize = 3 * MODEL + 2 * MIB;

const SLEEPING: Sleeping = Sleeping {
    after: None,
    host_bytes: 256 * MIB,
    patience: Duration::from_secs(60),
};

/// As many models as are asked for. Each has weights of its own.
fn host(count: usize, limit_bytes: usize, sleeping: Option<Sleeping>) -> Host {
    let sharing = Sharing {
        limit_bytes,
        policy: Policy::Elastic,
        sequences_max: 4,
        waiting_max: 100,
        step_tokens_max: 64,
        sleeping,
    };
    let specs = NAMES[..count]
        .iter()
        .enumerate()
        .map(|(at, name)| ModelSpec {
            name: (*name).to_owned(),
            shape: Shape::random(SHAPE, at as u64, DType::F32).expect("a shape"),
            quota: Quota::new(),
        });
    Host::new(Place::Cpu, &sharing, specs.collect()).expect("models")
}

/// A folder with the files of a small model.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let write = |name: &str, text: &str| {
        std::fs::write(folder.path().join(name), text).expect("room on the disk");
    };
    let config = r#"{ "vocab_size": 250, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256 }"#;
    write("config.json", config);
    let tokenizer = r#"{ "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [], "normalizer": null, "pre_tokenizer": null, "post_processor": null,
        "decoder": null,
        "model": { "type": "WordLevel", "vocab": { "a": 0, "b": 1 }, "unk_token": "b" } }"#;
    write("tokenizer.json", tokenizer);
    let shapes: [(&str, &[usize]); 12] = [
        ("embed_tokens", &[250, 32]),
        ("norm", &[32]),
        ("layers.0.input_layernorm", &[32]),
        ("layers.0.post_attention_layernorm", &[32]),
        ("layers.0.self_attn.q_proj", &[32, 32]),
        ("layers.0.self_attn.k_proj", &[16, 32]),
        ("layers.0.self_attn.v_proj", &[16, 32]),
        ("layers.0.self_attn.o_proj", &[32, 32]),
        ("layers.0.mlp.gate_proj", &[64, 32]),
        ("layers.0.mlp.up_proj", &[64, 32]),
        ("layers.0.mlp.down_proj", &[32, 64]),
        ("lm_head", &[250, 32]),
    ];
    let mut random = StdRng::seed_from_u64(7);
    let tensors = shapes.map(|(name, shape)| {
        let count: usize = shape.iter().product();
        let numbers: Vec<f32> = (0..count).map(|_| random.random_range(-0.5..0.5)).collect();
        let tensor = Tensor::from_vec(numbers, shape, &Device::Cpu).expect("a tensor");
        let prefix = if name == "lm_head" { "" } else { "model." };
        (format!("{prefix}{name}.weight"), tensor)
    });
    let file = folder.path().join("model.safetensors");
    candle_core::safetensors::save(&tensors.into(), file).expect("room on the disk");
    folder
}

fn ask(first: u32, length: u32, max_tokens: usize) -> Generate {
    Generate {
        prompt: (0..length).map(|at| (first + at * 7) % 250).collect(),
        max_tokens,
        sampling: Sampling {
            temperature: 0.,
            top_p: 1.,
            seed: None,
        },
        stop_ids: Vec::new(),
    }
}

fn rest(mut events: Receiver<Event>) -> Vec<u32> {
    let mut tokens = Vec::new();
    loop {
        match events.blocking_recv().expect("an end comes") {
            Event::Token(token) => tokens.push(token),
            Event::End(_) => return tokens,
            Event::Failed(why) => panic!("{why}"),
            Event::Refused(refusal) => panic!("{refusal}"),
        }
    }
}

/// Asks until there is room within the server's patience, which is short: until the other model has
/// gone to sleep. Returns the first token too.
fn begin(host: &Host, model: &str, ask: &Generate) -> (u32, Receiver<Event>) {
    loop {
        let mut events = host.submit(model, ask.clone()).expect("it is taken");
        match events.blocking_recv() {
            Some(Event::Token(token)) => return (token, events),
            Some(Event::Refused(Refusal::NoRoom { .. })) => {}
            other => panic!("{other:?}"),
        }
    }
}

fn reply(host: &Host, model: &str, ask: Generate) -> Vec<u32> {
    rest(host.submit(model, ask).expect("there is room"))
}

fn sleep(host: &Host, model: &str) -> Result<(), Refusal> {
    let ended = host.sleep(model)?;
    ended.blocking_recv().expect("the model answers")
}

fn wake(host: &Host, model: &str) -> Result<(), Refusal> {
    let ended = host.wake(model)?;
    ended.blocking_recv().expect("the model answers")
}

fn is_asleep(host: &Host, model: &str) -> bool {
    host.model(model).expect("a model").is_asleep
}

#[track_caller]
fn await_until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A number of a model in the metrics.
fn count(host: &Host, name: &str, model: &str) -> f64 {
    let metrics = host.metrics();
    let start = format!("cuda_vmm_serve_{name}{{model=\"{model}\"}} ");
    let mut lines = metrics.lines();
    let value = lines.find_map(|line| line.strip_prefix(&start));
    value.expect(name).parse().expect("a number")
}

/// Ends all models. Nothing is left of them on the device or the host.
fn end(host: &Host) {
    host.close();
    let snapshot = host.pool().snapshot();
    let engine = &snapshot.engine;
    assert_eq!((engine.asleep_bytes, engine.host_bytes), (0, 0));
    assert_eq!(engine.ranges, 0);
    for account in &snapshot.accounts {
        assert_eq!(account.stats.committed_bytes, 0, "{}", account.name);
    }
}

#[test]
fn six_models_on_a_card_for_three_answer_in_turn_as_with_room_for_all() {
    let ample = host(6, 1 << 30, None);
    let asks: Vec<_> = (0..2).map(|at| ask(at, 40, 6)).collect();
    let expected = NAMES.map(|name| {
        let replies = asks.iter().map(|ask| reply(&ample, name, ask.clone()));
        replies.collect::<Vec<_>>()
    });
    drop(ample);
    let host = host(6, LIMIT, Some(SLEEPING));
    assert!(
        NAMES.iter().any(|name| is_asleep(&host, name)),
        "at the start"
    );
    for (at, ask) in asks.iter().enumerate() {
        for (name, expected) in NAMES.iter().zip(&expected) {
            assert_eq!(reply(&host, name, ask.clone()), expected[at], "{name}");
            let engine = host.pool().snapshot().engine;
            assert!(engine.committed_bytes <= LIMIT, "{engine:?}");
        }
    }
    for name in NAMES {
        assert!(count(&host, "sleeps_total", name) > 0., "{name}");
        let is_asleep = f64::from(u8::from(is_asleep(&host, name)));
        assert_eq!(count(&host, "asleep", name), is_asleep);
    }
    // Asked the same again, no model computes a whole block again.
    for (name, expected) in NAMES.iter().zip(&expected) {
        assert_eq!(reply(&host, name, asks[1].clone()), expected[1], "{name}");
    }
    for name in NAMES {
        await_until("the last step is counted", || {
            count(&host, "cached_tokens_total", name) == 32.
        });
    }
    assert!(host.is_healthy());
    end(&host);
}

/// What a second request of the same conversation costs, with and without a sleep before it.
#[test]
fn a_conversation_that_slept_computes_no_token_again() {
    let turns = |sleeps: bool| {
        let host = host(1, LIMIT, Some(SLEEPING));
        let first = reply(&host, "a", ask(3, 200, 20));
        let ended = || count(&host, "running", "a") == 0.;
        await_until("the last step is counted", ended);
        if sleeps {
            await_until("it has nothing to do", || sleep(&host, "a") == Ok(()));
            let snapshot = host.pool().snapshot();
            assert_eq!(snapshot.engine.parts.live_page_bytes, 0);
            assert_eq!(snapshot.engine.asleep_bytes, MODEL);
            // On a CPU, contents would stay in Candle's tensors anyway.
            let host_bytes = snapshot.engine.host_bytes;
            assert!(host_bytes > WEIGHTS, "the host has K and V too");
        }
        let mut more = ask(3, 200, 20);
        more.prompt.extend(&first);
        more.prompt.extend(60..90);
        let before = count(&host, "computed_tokens_total", "a");
        let second = reply(&host, "a", more);
        await_until("the last step is counted", ended);
        let computed = count(&host, "computed_tokens_total", "a") - before;
        let cached = count(&host, "cached_tokens_total", "a");
        end(&host);
        (first, second, computed, cached)
    };
    let expected = turns(false);
    // Of 219 tokens in memory, 13 whole blocks are kept.
    assert_eq!(expected.3, 208.);
    assert_eq!(turns(true), expected);
}

#[test]
fn a_model_sleeps_and_wakes_when_it_is_told_and_twice_is_as_good_as_once() {
    let host = host(2, LIMIT, Some(SLEEPING));
    let expected = reply(&host, "a", ask(1, 30, 10));
    for _ in 0..2 {
        for _ in 0..2 {
            await_until("it has nothing to do", || sleep(&host, "a") == Ok(()));
            assert!(is_asleep(&host, "a") && !is_asleep(&host, "b"));
        }
        for _ in 0..2 {
            assert_eq!(wake(&host, "a"), Ok(()));
            assert!(!is_asleep(&host, "a"));
        }
        assert_eq!(reply(&host, "a", ask(1, 30, 10)), expected);
    }
    assert_eq!(count(&host, "wakes_total", "a"), 2.);
    assert_eq!(sleep(&host, "none"), Err(Refusal::UnknownModel));
    assert_eq!(wake(&host, "none"), Err(Refusal::UnknownModel));

    // With a request it does not sleep, and goes on.
    let mut running = host.submit("a", ask(2, 30, 200)).expect("room");
    assert!(matches!(running.blocking_recv(), Some(Event::Token(_))));
    assert_eq!(sleep(&host, "a"), Err(Refusal::Working));
    assert_eq!(rest(running).len(), 199);
    await_until("it has nothing to do", || sleep(&host, "a") == Ok(()));
    // What is forgotten while it sleeps is gone when it wakes.
    host.clear_prefixes();
    assert_eq!(wake(&host, "a"), Ok(()));
    await_until("no prefix is held", || {
        host.figures().models[0].prefix_bytes == 0
    });
    assert_eq!(reply(&host, "a", ask(1, 30, 10)), expected);
    await_until("it has nothing to do", || sleep(&host, "a") == Ok(()));
    end(&host);
}

#[test]
fn models_of_a_host_without_sleep_do_not_sleep() {
    let host = host(1, LIMIT, None);
    assert_eq!(sleep(&host, "a"), Err(Refusal::NeverSleeps));
    assert_eq!(wake(&host, "a"), Err(Refusal::NeverSleeps));
    assert!(!host.metrics().contains("cuda_vmm_serve_asleep"));
}

#[test]
fn an_idle_model_sleeps_after_its_time_and_a_request_wakes_it() {
    let sleeping = Sleeping {
        after: Some(Duration::from_millis(50)),
        ..SLEEPING
    };
    let host = host(2, LIMIT, Some(sleeping));
    let mut expected = None;
    for _ in 0..3 {
        await_until("both sleep", || {
            NAMES[..2].iter().all(|name| is_asleep(&host, name))
        });
        assert_eq!(host.pool().snapshot().engine.parts.live_page_bytes, 0);
        let tokens = reply(&host, "b", ask(5, 20, 8));
        assert_eq!(*expected.get_or_insert_with(|| tokens.clone()), tokens);
    }
    end(&host);
}

/// The store has no room for weights, nor for prefixes.
#[test]
fn what_the_host_has_no_room_for_is_made_or_computed_again() {
    let sleeping = Sleeping {
        host_bytes: 0,
        ..SLEEPING
    };
    let host = host(1, LIMIT, Some(sleeping));
    let expected = reply(&host, "a", ask(1, 100, 10));
    for _ in 0..2 {
        await_until("it needs no room", || sleep(&host, "a") == Ok(()));
        assert_eq!(host.pool().snapshot().engine.host_bytes, 0);
        assert_eq!(reply(&host, "a", ask(1, 100, 10)), expected);
    }
    assert_eq!(count(&host, "cached_tokens_total", "a"), 0.);
    end(&host);
}

#[test]
fn a_request_that_gets_no_room_is_refused_and_the_model_wakes_later() {
    let sleeping = Sleeping {
        patience: Duration::from_millis(100),
        ..SLEEPING
    };
    // Room for one, and half of another.
    let host = host(2, MODEL + MODEL / 2, Some(sleeping));
    let (first, events) = begin(&host, "b", &ask(1, 30, 10));
    let expected = (first, rest(events));
    let (_, running) = begin(&host, "a", &ask(2, 30, 450));
    assert!(is_asleep(&host, "b"));
    let refused = host.submit("b", ask(1, 30, 10)).expect("it is taken");
    let refused = { refused }.blocking_recv();
    assert!(
        // Its prefixes may have been given to the other.
        matches!(refused, Some(Event::Refused(Refusal::NoRoom { needed_bytes, .. })) if needed_bytes > MODEL / 2),
        "{refused:?}"
    );
    // One that goes away is forgotten.
    drop(host.submit("b", ask(1, 30, 10)));
    drop(host.wake("b"));
    assert!(matches!(wake(&host, "b"), Err(Refusal::NoRoom { .. })));
    assert!(is_asleep(&host, "b"));
    assert_eq!(rest(running).len(), 449, "it was not disturbed");
    assert_eq!(count(&host, "preemptions_total", "a"), 0.);
    let (first, events) = begin(&host, "b", &ask(1, 30, 10));
    assert_eq!((first, rest(events)), expected);
    end(&host);
}

#[test]
fn requests_to_all_models_at_random_times_all_end() {
    let ample = host(6, 1 << 30, None);
    let expected: Vec<_> = NAMES
        .iter()
        .map(|name| reply(&ample, name, ask(4, 50, 5)))
        .collect();
    drop(ample);
    let host = host(6, LIMIT, Some(SLEEPING));
    std::thread::scope(|scope| {
        for client in 0..8 {
            let (host, expected) = (&host, &expected);
            scope.spawn(move || {
                let mut random = StdRng::seed_from_u64(client);
                for _ in 0..8 {
                    let at = random.random_range(0..6);
                    let events = host.submit(NAMES[at], ask(4, 50, 5)).expect("room");
                    if random.random_bool(0.2) {
                        continue;
                    }
                    assert_eq!(rest(events), expected[at], "{}", NAMES[at]);
                    std::thread::sleep(Duration::from_millis(random.random_range(0..20)));
                }
            });
        }
    });
    assert!(host.is_healthy());
    let engine = host.pool().snapshot().engine;
    assert!(engine.committed_bytes <= LIMIT);
    end(&host);
}

#[test]
fn a_guarantee_of_a_model_that_sleeps_is_for_others() {
    let sharing = Sharing {
        limit_bytes: LIMIT,
        policy: Policy::Elastic,
        sequences_max: 4,
        waiting_max: 100,
        step_tokens_max: 64,
        sleeping: Some(SLEEPING),
    };
    let spec = |name: &str, quota| ModelSpec {
        name: name.to_owned(),
        shape: Shape::random(SHAPE, 1, DType::F32).expect("a shape"),
        quota,
    };
    let guaranteed = Quota::new().guarantee_bytes(2 * MODEL);
    let specs = vec![spec("a", guaranteed), spec("b", Quota::new())];
    let host = Host::new(Place::Cpu, &sharing, specs).expect("models");
    let guarantee = || host.pool().snapshot().accounts[0].quota.guarantee_bytes;
    assert_eq!(guarantee(), 2 * MODEL);
    sleep(&host, "a").expect("it has nothing to do");
    assert_eq!(guarantee(), 0);
    wake(&host, "a").expect("there is room");
    await_until("it has its guarantee", || guarantee() == 2 * MODEL);
    end(&host);
}

/// The store has no room, so a wake reads the files.
#[test]
fn weights_of_files_are_read_again_and_a_file_that_is_gone_leaves_the_model_asleep() {
    let folder = folder();
    let host = |sleeping| {
        let sharing = Sharing {
            limit_bytes: LIMIT,
            policy: Policy::Elastic,
            sequences_max: 4,
            waiting_max: 100,
            step_tokens_max: 64,
            sleeping,
        };
        let path = folder.path().to_str().expect("a name in UTF-8");
        let spec = ModelSpec {
            name: "a".to_owned(),
            shape: Shape::read(path, 0, DType::F32).expect("a model"),
            quota: Quota::new(),
        };
        Host::new(Place::Cpu, &sharing, vec![spec]).expect("a model")
    };
    let expected = reply(&host(None), "a", ask(1, 30, 10));
    let host = host(Some(Sleeping {
        host_bytes: 0,
        ..SLEEPING
    }));
    assert_eq!(reply(&host, "a", ask(1, 30, 10)), expected);
    await_until("it has nothing to do", || sleep(&host, "a") == Ok(()));
    let file = folder.path().join("model.safetensors");
    let aside = folder.path().join("aside");
    std::fs::rename(&file, &aside).expect("the file is there");
    let mut events = host.submit("a", ask(1, 30, 10)).expect("it is taken");
    let event = events.blocking_recv();
    assert!(matches!(event, Some(Event::Failed(_))), "{event:?}");
    assert_eq!(wake(&host, "a"), Err(Refusal::KeptAsleep));
    assert!(is_asleep(&host, "a") && host.is_healthy());
    std::fs::rename(&aside, &file).expect("the file is there");
    assert_eq!(reply(&host, "a", ask(1, 30, 10)), expected);
    end(&host);
}
