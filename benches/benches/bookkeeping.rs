//! What the pools cost beside the driver: every driver call is a function that does nothing.

// criterion's macro makes a public function that cannot be documented.
#![allow(missing_docs)]

use criterion::{Criterion, criterion_group, criterion_main};
use cuda_vmm::{Engine, EngineOptions, SharedMemoryPool, Stream, VirtualMemoryPool};
use cuda_vmm_benches::{GRANULARITY, no_op_driver};
use std::hint::black_box;

const CAPACITY: usize = 128 << 30;

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
