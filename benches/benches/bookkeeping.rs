//! What the pools cost beside the driver: every driver call is a function that does nothing.

// criterion's macro makes a public function that cannot be documented.
#![allow(missing_docs)]

use criterion::{Criterion, criterion_group, criterion_main};
use cuda_vmm::{Engine, EngineOptions, SharedMemoryPool, Stream, VirtualMemoryPool};
use cuda_vmm_benches::{GRANULARITY, ParkedModels, no_op_driver};
use std::hint::black_box;
use std::time::{Duration, Instant};

const CAPACITY: usize = 128 << 30;

/// Pages that are parked at a time.
const PARKED: usize = 64;

/// The time of taking back parked pages of a model, in whole rounds, without that of parking them.
fn take_back_parked(model: &ParkedModels, pages: u64) -> Duration {
    in_rounds(pages, PARKED, || {
        model.park(0).expect("room");
        let started = Instant::now();
        model.take_back(0).expect("parked");
        started.elapsed()
    })
}

/// The time of this many pages, of rounds of some pages each.
fn in_rounds(pages: u64, of_round: usize, round: impl FnMut() -> Duration) -> Duration {
    let rounds = pages.div_ceil(of_round as u64);
    let elapsed: Duration = std::iter::repeat_with(round).take(rounds as usize).sum();
    elapsed.mul_f64(pages as f64 / (rounds * of_round as u64) as f64)
}

/// Pages that each of several models has parked at a time. To take them takes long beside starting
/// a thread.
const PARKED_OF_EACH: usize = 4096;

/// The time of growing by tokens whose pages are live already.
fn grow_in_live_pages(pool: &VirtualMemoryPool, tokens: u64) -> Duration {
    const TOKEN: usize = 4096;
    let mut elapsed = Duration::ZERO;
    let mut left = tokens as usize;
    while left > 0 {
        // The first token brings the page.
        let round = left.min(GRANULARITY / TOKEN - 1);
        pool.allocate(0, TOKEN).expect("room");
        let started = Instant::now();
        for token in 1..=round {
            black_box(pool.allocate(token * TOKEN, TOKEN).expect("room"));
        }
        elapsed += started.elapsed();
        pool.deallocate(0, (round + 1) * TOKEN).expect("live");
        left -= round;
    }
    elapsed
}

fn bookkeeping(criterion: &mut Criterion) {
    let device = no_op_driver().device(0).expect("device");
    let mut group = criterion.benchmark_group("bookkeeping");

    let pool = VirtualMemoryPool::new(&device, CAPACITY, GRANULARITY).expect("pool");
    let named = VirtualMemoryPool::new(&device, CAPACITY, GRANULARITY).expect("pool");
    let stream = Stream::new(&device).expect("stream");
    named.use_stream(&stream).expect("same device");
    for (name, pool) in [
        ("allocate and deallocate one page, no stream named", pool),
        ("allocate and deallocate one page, one stream named", named),
    ] {
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                black_box(pool.allocate(0, GRANULARITY).expect("room"));
                pool.deallocate(0, GRANULARITY).expect("live");
            });
        });
    }

    let model = ParkedModels::new(&device, &stream, 1, PARKED).expect("room");
    group.bench_function("take back a parked page", |bencher| {
        bencher.iter_custom(|pages| take_back_parked(&model, pages));
    });
    drop(model);

    // The time of one page stays as it is with one thread if threads do not disturb each other.
    let models = ParkedModels::new(&device, &stream, 2, PARKED_OF_EACH).expect("room");
    for (threads, name) in [
        (1, "take back a parked page of a model, one thread"),
        (2, "take back a parked page of a model, each of two threads"),
    ] {
        let take = || models.take(threads).expect("parked");
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|pages| in_rounds(pages, PARKED_OF_EACH, take));
        });
    }
    drop(models);

    let engine = Engine::new(&device, EngineOptions::new()).expect("engine");
    let tokens = VirtualMemoryPool::on_engine(&engine, CAPACITY, GRANULARITY).expect("pool");
    tokens.allocate(0, 1).expect("room");
    group.bench_function(
        "allocate and deallocate a token in a live page",
        |bencher| {
            bencher.iter(|| {
                black_box(tokens.allocate(4096, 4096).expect("room"));
                tokens.deallocate(4096, 4096).expect("live");
            });
        },
    );

    let growing = VirtualMemoryPool::on_engine(&engine, CAPACITY, GRANULARITY).expect("pool");
    group.bench_function("allocate a token in a live page", |bencher| {
        bencher.iter_custom(|tokens| grow_in_live_pages(&growing, tokens));
    });

    let shared = SharedMemoryPool::new(&device, 1 << 40).expect("pool");
    for model in 0..64 {
        shared
            .register_model(&format!("model {model}"), CAPACITY)
            .expect("a new name");
    }
    group.bench_function(
        "allocate and deallocate one page of one model in 64",
        |bencher| {
            bencher.iter(|| {
                let address = shared
                    .allocate_for_model("model 7", GRANULARITY)
                    .expect("room");
                shared
                    .deallocate_for_model_address("model 7", black_box(address), GRANULARITY)
                    .expect("live");
            });
        },
    );
    group.finish();
}

criterion_group!(benches, bookkeeping);
criterion_main!(benches);
