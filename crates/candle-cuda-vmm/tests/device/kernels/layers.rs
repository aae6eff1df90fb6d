//! Random operations on the layers of sequences, in ranges of their own and in one range, beside
//! plain lists of tokens. Layers get out of step, and views are kept: each shows for good what it
//! showed at first.

use crate::common::layouts::Layout;
use crate::common::{GRANULE, open, page};
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::kv_cache::{KvCache, KvCacheFactory, Sequence, SequenceCache};
use candle_cuda_vmm::{TensorPool, TensorPoolOptions};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::ops::Range;

const LAYERS: usize = 3;
const HEADS: usize = 2;

/// The sizes of heads of keys and of values.
#[derive(Clone, Copy)]
struct Dims([usize; 2]);

/// Makes tokens `[1, HEADS, count, dim]`. Elements of a token differ by head and side.
fn tokens(numbers: &[usize], dim: usize, side: usize, device: &Device) -> Tensor {
    let mut elements = Vec::new();
    for head in 0..HEADS {
        for number in numbers {
            let element = 4 * number + 2 * side + head;
            elements.extend(std::iter::repeat_n(element as f32, dim));
        }
    }
    let shape = (1, HEADS, numbers.len(), dim);
    let tokens = Tensor::from_vec(elements, shape, &Device::Cpu).unwrap();
    tokens.to_device(device).unwrap()
}

/// Keys and values that a layer has returned, and the tokens that they show.
struct Seen {
    both: [Tensor; 2],
    numbers: Vec<usize>,
}

impl Seen {
    #[track_caller]
    fn check(&self, dims: Dims, what: &str) {
        for (side, (found, dim)) in self.both.iter().zip(dims.0).enumerate() {
            let expected = tokens(&self.numbers, dim, side, &Device::Cpu);
            assert_eq!(found.dims(), expected.dims(), "{what}");
            let found = found.contiguous().unwrap().to_device(&Device::Cpu).unwrap();
            let flat = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert!(flat(&found) == flat(&expected), "{what}");
        }
    }
}

struct Played {
    device: Device,
    dims: Dims,
    sequence: Sequence,
    layers: Vec<SequenceCache>,
    lists: Vec<Vec<usize>>,
    views: Vec<Seen>,
    next: usize,
}

impl Played {
    fn new(layout: Layout, pool: &TensorPool, dims: Dims, max_seq_len: usize) -> Self {
        let shapes = dims.0.map(|dim| (1, HEADS, dim));
        let sequence = layout.sequence(pool, LAYERS, shapes, DType::F32).unwrap();
        let layers = (0..LAYERS).map(|layer| sequence.layer(layer, 2, max_seq_len).unwrap());
        Self {
            device: pool.device().clone(),
            dims,
            layers: layers.collect(),
            sequence,
            lists: vec![Vec::new(); LAYERS],
            views: Vec::new(),
            next: 0,
        }
    }

    /// Appends tokens to some layers, and keeps what one of them returns.
    fn append(&mut self, layers: Range<usize>, count: usize, kept: usize, what: &str) {
        for layer in layers {
            let numbers: Vec<_> = (self.next..self.next + count).collect();
            self.next += count;
            let [k, v] = [0, 1].map(|side| tokens(&numbers, self.dims.0[side], side, &self.device));
            let both = self.layers[layer].append(&k, &v).unwrap();
            self.lists[layer].extend(numbers);
            let seen = Seen {
                both: both.into(),
                numbers: self.lists[layer].clone(),
            };
            seen.check(self.dims, what);
            if layer == kept {
                self.views.push(seen);
            }
        }
    }

    fn play(&mut self, random: &mut StdRng, what: &str) {
        let layer = random.random_range(0..LAYERS);
        let one = layer..layer + 1;
        let len = self.lists[layer].len();
        // Twice as many layers as there are: often none is kept.
        let kept = random.random_range(0..2 * LAYERS);
        match random.random_range(0..16) {
            0..6 => self.append(0..LAYERS, random.random_range(1..4), kept, what),
            6 => self.append(0..LAYERS, random.random_range(9..20), kept, what),
            7 => self.append(one, random.random_range(1..12), kept, what),
            8 => {
                let len = random.random_range(len / 2..=len);
                self.layers[layer].truncate(len).unwrap();
                self.lists[layer].truncate(len);
            }
            9 | 10 => {
                let least = self.lists.iter().map(Vec::len).min().unwrap();
                let len = random.random_range(least / 2..=least);
                self.sequence.truncate(len).unwrap();
                self.lists.iter_mut().for_each(|list| list.truncate(len));
            }
            11 => {
                let gone = random.random_range(0..=len / 2);
                self.layers[layer]
                    .lock()
                    .unwrap()
                    .release_front(gone)
                    .unwrap();
                self.lists[layer].drain(..gone);
            }
            12 => {
                let gone = self.lists.iter().map(Vec::len).min().unwrap() / 2;
                for (layer, list) in self.layers.iter().zip(&mut self.lists) {
                    layer.lock().unwrap().release_front(gone).unwrap();
                    list.drain(..gone);
                }
            }
            13 => self.sequence.reserve(random.random_range(0..12)).unwrap(),
            14 if random.random() => {
                self.layers[layer].reset();
                self.lists[layer].clear();
            }
            14 if random.random_range(0..4) == 0 => {
                self.sequence.reset();
                self.lists.iter_mut().for_each(Vec::clear);
            }
            _ => {
                let kept = self.views.len().min(4);
                self.views.drain(..self.views.len() - kept);
                if random.random() {
                    self.views.clear();
                }
            }
        }
    }

    fn check(&self, what: &str) {
        for (layer, list) in self.layers.iter().zip(&self.lists) {
            assert_eq!(layer.current_seq_len(), list.len(), "{what}");
            let cache = layer.lock().unwrap();
            if let (Some(k), Some(v)) = (cache.k().unwrap(), cache.v().unwrap()) {
                let (both, numbers) = ([k, v], list.clone());
                Seen { both, numbers }.check(self.dims, what);
            }
        }
        let least = self.lists.iter().map(Vec::len).min();
        assert_eq!(self.sequence.len(), least.unwrap(), "{what}");
        let views = self.views.iter();
        views.for_each(|seen| seen.check(self.dims, &format!("a view, {what}")));
    }
}

/// Plays one game with each layout.
fn play(dims: Dims, seeds: Range<u64>, steps: usize, contiguous: bool) {
    let test = open();
    for layout in Layout::BOTH {
        for seed in seeds.clone() {
            // Fewer than there will be, and more.
            let max_seq_len = [0, 40, 100_000][seed as usize % 3];
            let options = TensorPoolOptions::new()
                .page_bytes(page())
                .contiguous_output(contiguous);
            let pool = TensorPool::with_options(&test.device, options).unwrap();
            let mut random = StdRng::seed_from_u64(seed);
            let mut played = Played::new(layout, &pool, dims, max_seq_len);
            for step in 0..steps {
                let what = format!("{layout:?}, seed {seed}, step {step}");
                played.play(&mut random, &what);
                if step % 8 == 0 {
                    played.check(&what);
                }
            }
            played.check("the end");
            played.sequence.reset();
            assert_eq!(played.sequence.bytes(), 0);
            played
                .views
                .drain(..)
                .for_each(|seen| seen.check(dims, "all reset"));
        }
    }
}

#[test]
fn layers_of_small_tokens_are_lists() {
    play(Dims([4, 4]), 0..3, 400, false);
}

#[test]
fn layers_whose_keys_and_values_differ_in_size_are_lists() {
    play(Dims([5, 8]), 0..3, 200, false);
}

#[test]
fn layers_of_tokens_that_cross_pages_are_lists() {
    // The smallest page has fewer than nine keys of one layer.
    play(Dims([GRANULE / 64 - 4; 2]), 0..1, 40, false);
}

#[test]
fn contiguous_layers_are_lists() {
    play(Dims([8, 8]), 1..2, 100, true);
}
