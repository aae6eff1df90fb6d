//! What the pools cost beside the driver: every driver call is a function that does nothing.

// criterion's macro makes a public function that cannot be documented.
#![allow(missing_docs)]

use criterion::{Criterion, criterion_group, criterion_main};
use cuda_vmm::{
    Device, Engine, EngineOptions, SharedMemoryPool, Stream, VirtualMemoryPool, WorkerMode,
};
use cuda_vmm_benches::{GRANULARITY, ParkedModels, no_op_driver};
use std::hint::black_box;
use std::time::{Duration, Instant};

const CAPACITY: usize = 128 << 30;

/// Pages that are parked at a time.
const PARKED: usize = 64;

/// The time of taking back so many parked pages, without that of parking them.
fn take_back_parked(device: &Device, pages: u64) -> Duration {
    let options = EngineOptions::new()
        .park_bytes_max(CAPACITY)
        .worker(WorkerMode::Manual);
    let engine = Engine::new(device, options).expect("engine");
    let pool = VirtualMemoryPool::on_engine(&engine, CAPACITY, GRANULARITY).expect("pool");
    pool.use_stream(&Stream::new(device).expect("stream"))
        .expect("same device");
    // Each apart from the others, so that it is a chunk of its own.
    let offset = |page| 2 * page * GRANULARITY;
    let mut elapsed = Duration::ZERO;
    let mut left = pages as usize;
    while left > 0 {
        let round = left.min(PARKED);
        for page in 0..round {
            pool.allocate(offset(page), GRANULARITY).expect("room");
        }
        for page in 0..round {
            pool.deallocate(offset(page), GRANULARITY).expect("live");
        }
        engine.step();
        let started = Instant::now();
        for page in 0..round {
            black_box(pool.allocate(offset(page), GRANULARITY).expect("parked"));
        }
        elapsed += started.elapsed();
        for page in 0..round {
            pool.deallocate(offset(page), GRANULARITY).expect("live");
        }
        left -= round;
    }
    elapsed
}

/// Pages that each of several models has parked at a time. To take them takes long beside starting a thread.
const PARKED_OF_EACH: usize = 4096;

/// The time in which each of so many threads takes back so many pages of its own model, in whole rounds; the time of one
/// page stays as it is with one thread if threads do not disturb each other.
fn take_back_at_a_time(models: &ParkedModels, threads: usize, pages: u64) -> Duration {
    let rounds = pages.div_ceil(PARKED_OF_EACH as u64);
    let elapsed: Duration = (0..rounds)
        .map(|_| models.take(threads).expect("parked"))
        .sum();
    elapsed.mul_f64(pages as f64 / (rounds * PARKED_OF_EACH as u64) as f64)
}

/// The time of growing by so many tokens whose pages are live already.
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
    group.bench_function(
        "allocate and deallocate one page, no stream named",
        |bencher| {
            bencher.iter(|| {
                black_box(pool.allocate(0, GRANULARITY).expect("room"));
                pool.deallocate(0, GRANULARITY).expect("live");
            });
        },
    );

    let named = VirtualMemoryPool::new(&device, CAPACITY, GRANULARITY).expect("pool");
    named
        .use_stream(&Stream::new(&device).expect("stream"))
        .expect("same device");
    group.bench_function(
        "allocate and deallocate one page, one stream named",
        |bencher| {
            bencher.iter(|| {
                black_box(named.allocate(0, GRANULARITY).expect("room"));
                named.deallocate(0, GRANULARITY).expect("live");
            });
        },
    );

    group.bench_function("take back a parked page", |bencher| {
        bencher.iter_custom(|pages| take_back_parked(&device, pages));
    });

    let stream = Stream::new(&device).expect("stream");
    let models = ParkedModels::new(&device, &stream, 2, PARKED_OF_EACH).expect("room");
    for (threads, name) in [
        (1, "take back a parked page of a model, one thread"),
        (2, "take back a parked page of a model, each of two threads"),
    ] {
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|pages| take_back_at_a_time(&models, threads, pages));
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
