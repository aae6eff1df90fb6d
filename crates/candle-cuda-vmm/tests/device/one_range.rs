//! Layers of a sequence in one range: what moves, and what memory follows. Tokens come one by one,
//! so that plain copies append them without a kernel.

use crate::common::layouts::Layout;
use crate::common::{UnderTest, open, page};
use crate::refused;
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::cuda_vmm::{EngineOptions, VmmError as Core};
use candle_cuda_vmm::kv_cache::{KvCache, KvCacheFactory, Sequence, SequenceCache};
use candle_cuda_vmm::{TensorPool, TensorPoolOptions, VmmError};
use std::time::{Duration, Instant};

const LAYERS: usize = 2;

/// A sequence of which one token of all layers fills a page.
struct Made {
    pool: TensorPool,
    sequence: Sequence,
    layers: Vec<SequenceCache>,
}

impl Made {
    fn new(test: &UnderTest, limit_pages: usize, max_seq_len: usize) -> Self {
        let limit = EngineOptions::new()
            .limit_bytes(limit_pages * page())
            .chunk_bytes_max(0);
        let options = TensorPoolOptions::new().page_bytes(page()).engine(limit);
        let pool = TensorPool::with_options(&test.device, options).unwrap();
        let token = (1, 2, page() / 32);
        let sequence = Layout::OneRange.sequence(&pool, LAYERS, [token; 2], DType::F32);
        let sequence = sequence.unwrap();
        let layers = (0..LAYERS).map(|layer| sequence.layer(layer, 2, max_seq_len).unwrap());
        Self {
            layers: layers.collect(),
            sequence,
            pool,
        }
    }

    fn append(&mut self, layer: usize, number: usize) -> candle_cuda_vmm::Result<[Tensor; 2]> {
        let [k, v] = [number, number + 1000].map(|number| {
            let token = Tensor::full(number as f32, (1, 2, 1, page() / 32), &Device::Cpu);
            let token = token.unwrap().force_contiguous().unwrap();
            token.to_device(self.pool.device()).unwrap()
        });
        Ok(self.layers[layer].append(&k, &v)?.into())
    }

    fn step(&mut self, number: usize) -> Vec<[Tensor; 2]> {
        (0..LAYERS)
            .map(|layer| self.append(layer, 100 * layer + number).unwrap())
            .collect()
    }

    /// Returns the keys and values of a layer.
    fn seen(&self, layer: usize) -> [Tensor; 2] {
        let cache = self.layers[layer].lock().unwrap();
        [cache.k().unwrap().unwrap(), cache.v().unwrap().unwrap()]
    }

    fn pages(&self) -> usize {
        self.sequence.bytes() / page()
    }

    /// Fails unless this many ranges are left once the device has finished with all that was
    /// dropped.
    #[track_caller]
    fn expect_ranges(&self, expected: usize) {
        let until = Instant::now() + Duration::from_secs(10);
        let engine = self.pool.engine();
        while engine.stats().ranges != expected {
            assert!(
                Instant::now() < until,
                "{expected} ranges: {}",
                engine.stats()
            );
            self.pool.device().synchronize().unwrap();
            engine.step();
        }
    }
}

/// Fails unless these are the keys and values of these numbers.
#[track_caller]
fn expect(both: &[Tensor; 2], numbers: &[usize]) {
    for (tensor, more) in both.iter().zip([0, 1000]) {
        assert_eq!(tensor.dims(), [1, 2, numbers.len(), page() / 32]);
        let there = tensor.to_device(&Device::Cpu).unwrap();
        for element in [0, page() / 32 - 1] {
            let head = there.narrow(1, 1, 1).unwrap();
            let found = head.narrow(3, element, 1).unwrap().flatten_all().unwrap();
            let expected: Vec<_> = numbers
                .iter()
                .map(|number| (number + more) as f32)
                .collect();
            assert_eq!(found.to_vec1::<f32>().unwrap(), expected);
        }
    }
}

#[test]
fn layers_append_one_after_the_other_and_never_move() {
    let test = open();
    let mut made = Made::new(&test, 100, 64);
    let mut views = Vec::new();
    for number in 0..6 {
        views.push(made.step(number));
    }
    let check = |views: &[Vec<[Tensor; 2]>], numbers: &[usize]| {
        for (layer, both) in views[views.len() - 1].iter().enumerate() {
            let numbers: Vec<_> = numbers.iter().map(|number| 100 * layer + number).collect();
            expect(both, &numbers);
        }
    };
    for step in 1..=views.len() {
        check(&views[..step], &[0, 1, 2, 3, 4, 5][..step]);
    }
    made.expect_ranges(1);
    // No view is left, and the views of the first layer do not keep the next from writing.
    views.clear();
    made.sequence.truncate(2).unwrap();
    for number in 10..13 {
        views.push(made.step(number));
    }
    check(&views, &[0, 1, 10, 11, 12]);
    made.expect_ranges(1);
    // A reset is a truncation of all tokens.
    views.clear();
    made.layers.iter_mut().for_each(KvCache::reset);
    views.push(made.step(20));
    check(&views, &[20]);
    made.expect_ranges(1);
    assert_eq!(made.pages(), 1);
}

#[test]
fn what_a_view_shows_is_not_written_over_and_all_layers_move_once() {
    let test = open();
    for viewed in 0..LAYERS {
        let mut made = Made::new(&test, 100, 64);
        (0..5).for_each(|number| drop(made.step(number)));
        let view = made.seen(viewed);
        made.sequence.truncate(3).unwrap();
        for number in 10..14 {
            drop(made.step(number));
        }
        // On a CPU device no view holds memory.
        made.expect_ranges(if test.device.is_cuda() { 2 } else { 1 });
        let of = |layer, numbers: &[usize]| -> Vec<usize> {
            numbers.iter().map(|number| 100 * layer + number).collect()
        };
        expect(&view, &of(viewed, &[0, 1, 2, 3, 4]));
        for layer in 0..LAYERS {
            expect(&made.seen(layer), &of(layer, &[0, 1, 2, 10, 11, 12, 13]));
        }
        drop(view);
        made.expect_ranges(1);
    }
}

#[test]
fn a_layer_that_goes_back_alone_does_not_write_over_its_views() {
    let test = open();
    for layer in 0..LAYERS {
        let mut made = Made::new(&test, 100, 64);
        (0..5).for_each(|number| drop(made.step(number)));
        let of = |numbers: &[usize]| -> Vec<usize> {
            numbers.iter().map(|number| 100 * layer + number).collect()
        };
        let before = made.seen(layer);
        made.layers[layer].truncate(2).unwrap();
        drop(made.append(layer, 100 * layer + 10).unwrap());
        expect(&before, &of(&[0, 1, 2, 3, 4]));
        expect(&made.seen(layer), &of(&[0, 1, 10]));
        let other = 1 - layer;
        let numbers = [0, 1, 2, 3, 4].map(|number| 100 * other + number);
        expect(&made.seen(other), &numbers);
    }
}

#[test]
fn memory_follows_the_longest_layer() {
    let test = open();
    let mut made = Made::new(&test, 100, 64);
    (0..3).for_each(|number| drop(made.step(number)));
    assert_eq!(made.pages(), 3);
    for number in 3..7 {
        made.append(0, number).unwrap();
    }
    assert_eq!((made.pages(), made.sequence.len()), (7, 3));
    made.layers[1].truncate(1).unwrap();
    assert_eq!(made.pages(), 7, "the other layer needs them");
    made.layers[0].truncate(2).unwrap();
    assert_eq!(made.pages(), 3, "and one more stays");
    made.layers[0].reset();
    assert_eq!(made.pages(), 2);
    // An empty layer begins where the others do.
    made.append(1, 200).unwrap();
    made.append(0, 300).unwrap();
    expect(&made.seen(0), &[300]);
    expect(&made.seen(1), &[100, 200]);
    let release = |made: &Made, layer: usize| {
        let mut cache = made.layers[layer].lock().unwrap();
        cache.release_front(1).unwrap();
    };
    release(&made, 1);
    assert_eq!(made.pages(), 2, "the other layer has the first row");
    release(&made, 0);
    assert_eq!(made.pages(), 1);
    made.append(0, 301).unwrap();
    expect(&made.seen(0), &[301]);
    expect(&made.seen(1), &[200]);
    assert_eq!(made.pages(), 1);
    made.sequence.reset();
    assert_eq!(made.pages(), 0);
}

#[test]
fn a_step_that_is_refused_in_the_middle_of_the_model_is_made_good() {
    let test = open();
    let mut made = Made::new(&test, 3, 64);
    (0..3).for_each(|number| drop(made.step(number)));
    // The first layer takes the memory of all, or is refused.
    let refused = made.append(0, 3);
    refused!(refused, VmmError::Vmm(Core::OutOfPhysicalMemory { .. }));
    assert_eq!((made.sequence.len(), made.pages()), (3, 3));
    made.pool.engine().set_limit_bytes(4 * page()).unwrap();
    drop(made.append(0, 3).unwrap());
    // The model fails here. The layer that was ahead goes back, or the next one follows.
    assert_eq!((made.sequence.len(), made.pages()), (3, 4));
    made.sequence.truncate(3).unwrap();
    for layer in 0..LAYERS {
        expect(
            &made.seen(layer),
            &[0, 1, 2].map(|number| 100 * layer + number),
        );
    }
    drop(made.step(4));
    assert_eq!((made.sequence.len(), made.pages()), (4, 4));
    for layer in 0..LAYERS {
        expect(
            &made.seen(layer),
            &[0, 1, 2, 4].map(|number| 100 * layer + number),
        );
    }
}

#[test]
fn more_tokens_than_expected_move_all_layers() {
    let test = open();
    let mut made = Made::new(&test, 100, 2);
    let mut first = Vec::new();
    for number in 0..12 {
        let views = made.step(number);
        if number == 1 {
            first = views;
        }
    }
    let numbers: Vec<_> = (0..12).collect();
    expect(&made.seen(0), &numbers);
    expect(&first[1], &[100, 101]);
    drop(first);
    made.expect_ranges(1);
    assert_eq!(made.pages(), 12);
    // A window moves too.
    for number in 12..40 {
        for layer in &made.layers {
            layer.lock().unwrap().release_front(1).unwrap();
        }
        drop(made.step(number));
    }
    expect(&made.seen(1), &(128..140).collect::<Vec<_>>());
    made.expect_ranges(1);
    assert_eq!(made.pages(), 12);
    made.sequence.reserve(3).unwrap();
    assert_eq!(made.pages(), 15);
}

#[test]
fn layers_outlive_one_another_and_the_sequence() {
    let test = open();
    let mut made = Made::new(&test, 100, 64);
    drop(made.step(0));
    let view = made.seen(0);
    let clone = made.layers[1].lock().unwrap().try_clone().unwrap();
    assert_eq!(
        clone.allocated_bytes(),
        2 * page(),
        "it has ranges of its own"
    );
    let Made {
        sequence,
        mut layers,
        pool,
    } = made;
    drop(sequence);
    let last = layers.pop().unwrap();
    drop(layers);
    assert_eq!(last.lock().unwrap().allocated_bytes(), page());
    drop(last);
    expect(&view, &[0]);
    let both = [clone.k().unwrap().unwrap(), clone.v().unwrap().unwrap()];
    expect(&both, &[100]);
    drop((view, both, clone, pool));
}
