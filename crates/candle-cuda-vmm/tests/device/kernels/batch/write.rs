//! Writing new tokens, compared with Candle's rotary embeddings and with copies of rows.

use super::layouts::{Layout, Stored};
use super::numbers;
use super::random::Case;
use crate::common::open;
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::attention::{DecodePlan, GqaOptions, KvBatch, Rotary, Slots, decode, write};
use candle_cuda_vmm::{ElasticBlocks, TensorPool};
use candle_nn::rotary_emb::{rope, rope_i};

/// Positions in the rotary table.
const POSITIONS: usize = 64;

/// One of the rotary embeddings of Candle.
type Rope = fn(&Tensor, &Tensor, &Tensor) -> candle_core::Result<Tensor>;

/// How much of each head is rotated, and how.
#[derive(Clone, Copy, Debug)]
enum Rotation {
    None,
    Halves(usize),
    Interleaved(usize),
}

impl Rotation {
    const ALL: [Self; 5] = [
        Self::None,
        Self::Halves(32),
        Self::Interleaved(32),
        Self::Halves(16),
        Self::Interleaved(8),
    ];

    fn table(self, device: &Device) -> Option<Rotary> {
        let (dim, is_interleaved) = match self {
            Self::None => return None,
            Self::Halves(dim) => (dim, false),
            Self::Interleaved(dim) => (dim, true),
        };
        let angles = (0..POSITIONS * dim / 2).map(|at| (at as f32 * 0.37).sin() * 3.);
        let angles = Tensor::from_iter(angles, device).unwrap();
        let angles = angles.reshape((POSITIONS, dim / 2)).unwrap();
        let rotary = Rotary::new(&angles.cos().unwrap(), &angles.sin().unwrap()).unwrap();
        assert_eq!((rotary.positions_max(), rotary.dim()), (POSITIONS, dim));
        Some(match is_interleaved {
            true => rotary.interleaved(),
            false => rotary,
        })
    }

    /// Rotates tokens `[tokens, heads, dim]` on the CPU, one by one, and returns them in F32.
    fn rotated(self, tokens: &Tensor, positions: &[u32]) -> Tensor {
        let tokens = tokens
            .to_device(&Device::Cpu)
            .unwrap()
            .to_dtype(DType::F32)
            .unwrap();
        let angles = |dim: usize, position: u32| {
            let first = position as usize * dim / 2;
            let angles = (first..first + dim / 2).map(|at| (at as f32 * 0.37).sin() * 3.);
            let angles = Tensor::from_iter(angles, &Device::Cpu).unwrap();
            let angles = angles.unsqueeze(0).unwrap();
            (angles.cos().unwrap(), angles.sin().unwrap())
        };
        let all = positions.iter().enumerate().map(|(at, position)| {
            // [1, heads, 1, dim]
            let token = tokens.narrow(0, at, 1).unwrap().unsqueeze(2).unwrap();
            let (dim, rope) = match self {
                Self::None => return token,
                Self::Halves(dim) => (dim, rope as Rope),
                Self::Interleaved(dim) => (dim, rope_i as Rope),
            };
            let (cos, sin) = angles(dim, *position);
            let head = token.narrow(3, 0, dim).unwrap().contiguous().unwrap();
            let head = rope(&head, &cos, &sin).unwrap();
            let rest = token.dims()[3] - dim;
            Tensor::cat(&[&head, &token.narrow(3, dim, rest).unwrap()], 3).unwrap()
        });
        let all: Vec<_> = all.collect();
        Tensor::cat(&all, 0).unwrap().squeeze(2).unwrap()
    }
}

/// New tokens for a batch.
struct Tokens {
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

impl Tokens {
    fn random(case: &Case, count: usize, device: &Device) -> Self {
        let random = |heads: usize, dim: usize| {
            let tensor = Tensor::randn(0f32, 1., (count, heads, dim), device).unwrap();
            tensor.to_dtype(case.dtype).unwrap()
        };
        Self {
            q: random(case.query_heads, case.dim),
            k: random(case.kv_heads, case.dim),
            v: random(case.kv_heads, case.value_dim),
        }
    }
}

/// Returns row `row` of K or V of a sequence, `[kv_heads, dim]`, from the batch's memory.
fn stored_row(stored: &Stored, case: &Case, side: usize, sequence: usize, row: usize) -> Vec<f32> {
    let memory = &stored.memory;
    let at = |tensor: &Tensor, indices: &[usize]| {
        let tensor = tensor.to_device(&Device::Cpu).unwrap();
        let tensor = indices
            .iter()
            .fold(tensor, |tensor, at| tensor.get(*at).unwrap());
        numbers(&tensor.force_contiguous().unwrap())
    };
    match case.layout {
        Layout::HeadMajor => {
            let heads = 0..case.kv_heads;
            heads
                .flat_map(|head| at(&memory[side], &[sequence, head, row]))
                .collect()
        }
        Layout::TokenMajor => at(&memory[side], &[sequence, row]),
        Layout::Sequences => at(&memory[side * case.lengths.len() + sequence], &[0, row]),
        Layout::Blocks(size) | Layout::JoinedBlocks(size) => {
            let (block, row) = (stored.tables[sequence][row / size], row % size);
            match memory.len() {
                1 => at(&memory[0], &[block, side, row]),
                _ => at(&memory[side], &[block, row]),
            }
        }
    }
}

/// The allowed error of what is stored: none on the CPU, and a rounding step on a GPU, which may
/// rotate with other instructions.
fn allowed(dtype: DType, device: &Device) -> f32 {
    match (device, dtype) {
        (Device::Cpu, _) => 0.,
        (_, DType::F32) => 1e-5,
        (_, DType::F16) => 2e-3,
        (_, DType::BF16) => 1.6e-2,
        _ => 0.13,
    }
}

#[track_caller]
fn assert_near(ours: &[f32], expected: &[f32], allowed: f32, case: &str) {
    assert_eq!(ours.len(), expected.len(), "{case}");
    for (ours, expected) in ours.iter().zip(expected) {
        let is_near = (ours - expected).abs() <= allowed * expected.abs().max(0.1);
        assert!(is_near, "{ours} instead of {expected}: {case}");
    }
}

/// Writes tokens to rows of a batch, and compares the result and all memory.
fn check(case: &Case, rotation: Rotation, rows: &[(usize, usize)], is_last: bool, seed: u64) {
    let test = open();
    if !super::has_attention(&test) {
        return;
    }
    let device = &test.device;
    let name = format!("{case:?}, {rotation:?}, {rows:?}");
    let stored = case.random(seed).store(seed, device);
    let tokens = Tokens::random(case, rows.len(), device);
    let positions: Vec<u32> = rows.iter().map(|(_, row)| *row as u32 % 64).collect();
    let rotary = rotation.table(device);
    let position = Tensor::new(positions.clone(), device).unwrap();
    let rotary = rotary.as_ref().map(|rotary| (rotary, &position));
    let index = |numbers: Vec<u32>| Tensor::new(numbers, device).unwrap();
    let sequences = index(rows.iter().map(|(sequence, _)| *sequence as u32).collect());
    let slots = index(rows.iter().map(|(_, row)| *row as u32).collect());
    let slots = match is_last {
        true => Slots::Last,
        false => Slots::At {
            sequences: &sequences,
            rows: &slots,
        },
    };
    let before: Vec<_> = stored.memory.iter().map(numbers).collect();
    let Tokens { q, k, v } = &tokens;
    let rotated = write(q, k, v, rotary, &stored.kv, slots).unwrap();

    assert_eq!((rotated.dims(), rotated.dtype()), (q.dims(), q.dtype()));
    assert!(rotated.is_contiguous());
    let expected = rotation
        .rotated(q, &positions)
        .to_dtype(case.dtype)
        .unwrap();
    let near = allowed(case.dtype, device);
    assert_near(&numbers(&rotated), &numbers(&expected), near, &name);

    let keys = rotation.rotated(k, &positions);
    let values = Rotation::None.rotated(v, &positions);
    for (side, new) in [keys, values].iter().enumerate() {
        let new = (new / f64::from(case.scales[side])).unwrap();
        let new = new.to_dtype(case.stored).unwrap();
        for (token, (sequence, row)) in rows.iter().enumerate() {
            let ours = stored_row(&stored, case, side, *sequence, *row);
            let expected = numbers(&new.narrow(0, token, 1).unwrap());
            let near = allowed(case.stored, device);
            assert_near(&ours, &expected, near, &name);
        }
    }
    // Nothing else was written.
    let written = rows.len() * case.kv_heads * (case.dim + case.value_dim);
    let after = stored.memory.iter().map(numbers);
    let changed = before.iter().zip(after).map(|(before, after)| {
        let pairs = before.iter().zip(&after);
        pairs
            .filter(|(before, after)| before.to_bits() != after.to_bits())
            .count()
    });
    assert!(changed.sum::<usize>() <= written, "{name}");
}

fn cases() -> impl Iterator<Item = (usize, Case)> {
    let dtypes = [
        (DType::F32, DType::F32),
        (DType::F16, DType::F16),
        (DType::BF16, DType::BF16),
        (DType::F16, DType::F8E4M3),
        (DType::BF16, DType::F8E4M3),
    ];
    let layouts = Layout::ALL.into_iter().enumerate();
    layouts.flat_map(move |(at, layout)| {
        dtypes
            .into_iter()
            .enumerate()
            .map(move |(turn, (dtype, stored))| {
                let case = Case {
                    dtype,
                    stored,
                    dim: 32,
                    value_dim: [32, 16][turn % 2],
                    scales: match stored {
                        DType::F8E4M3 => [0.25, 0.125],
                        _ => [1.; 2],
                    },
                    ..Case::new(layout, &[33, 1, 64, 16])
                };
                (at + turn, case)
            })
    })
}

#[test]
fn the_last_token_of_each_sequence_is_rotated_and_stored() {
    for (turn, case) in cases() {
        let rotation = Rotation::ALL[turn % Rotation::ALL.len()];
        check(
            &case,
            rotation,
            &[(0, 32), (1, 0), (2, 63), (3, 15)],
            true,
            turn as u64,
        );
    }
}

#[test]
fn tokens_of_prompts_are_stored_in_any_rows() {
    let rows = [(2, 0), (2, 1), (2, 17), (0, 32), (2, 16), (3, 9), (1, 0)];
    for (turn, case) in cases() {
        let rotation = Rotation::ALL[(turn + 1) % Rotation::ALL.len()];
        check(&case, rotation, &rows, false, turn as u64);
    }
}

#[test]
fn every_rotation_is_candles() {
    for rotation in Rotation::ALL {
        let case = Case {
            dim: 32,
            ..Case::new(Layout::TokenMajor, &[60, 7])
        };
        check(&case, rotation, &[(0, 59), (1, 6)], true, 1);
    }
}

#[test]
fn no_tokens_change_nothing() {
    let test = open();
    if !super::has_attention(&test) {
        return;
    }
    let case = Case::new(Layout::Blocks(16), &[5]);
    let stored = case.random(1).store(1, &test.device);
    let Tokens { q, k, v } = Tokens::random(&case, 0, &test.device);
    let none = Tensor::zeros(0, DType::U32, &test.device).unwrap();
    let slots = Slots::At {
        sequences: &none,
        rows: &none,
    };
    let rotated = write(&q, &k, &v, None, &stored.kv, slots).unwrap();
    assert_eq!(rotated.dims(), [0, case.query_heads, case.dim]);
}

#[test]
fn parts_of_one_tensor_are_written_as_copies_of_them() {
    let test = open();
    if !super::has_attention(&test) {
        return;
    }
    for (turn, (_, case)) in cases().enumerate() {
        let case = Case {
            value_dim: case.dim,
            ..case
        };
        let heads = case.query_heads + 2 * case.kv_heads;
        let shape = (case.lengths.len(), heads, case.dim);
        let all = Tensor::randn(0f32, 1., shape, &test.device).unwrap();
        let all = all.to_dtype(case.dtype).unwrap();
        let part = |first, count| all.narrow(1, first, count).unwrap();
        let q = part(0, case.query_heads);
        let k = part(case.query_heads, case.kv_heads);
        let v = part(case.query_heads + case.kv_heads, case.kv_heads);
        let rotary = Rotation::ALL[turn % Rotation::ALL.len()].table(&test.device);
        let positions = Tensor::new(&[32u32, 0, 63, 15], &test.device).unwrap();
        let rotary = rotary.as_ref().map(|rotary| (rotary, &positions));
        let run = |[q, k, v]: [&Tensor; 3]| {
            let stored = case.random(7).store(7, &test.device);
            let rotated = write(q, k, v, rotary, &stored.kv, Slots::Last).unwrap();
            let memory = stored.memory.iter().flat_map(numbers);
            let bits = |number: f32| number.to_bits();
            let rotated = numbers(&rotated).into_iter().chain(memory).map(bits);
            rotated.collect::<Vec<_>>()
        };
        let copies = [&q, &k, &v].map(|part| part.force_contiguous().unwrap());
        assert_eq!(run([&q, &k, &v]), run(copies.each_ref()), "{case:?}");
    }
}

/// Makes blocks of 16 tokens with two heads of 8 elements, some of them backed.
fn elastic(pool: &TensorPool) -> ElasticBlocks {
    let entries = ["k", "v"].map(|name| (name, (16, 2, 8), DType::F32));
    let blocks = pool.blocks(8, entries).unwrap();
    blocks.back(0..4).unwrap();
    blocks
}

/// Writes a token to block 3 and finds it by a decode step.
fn write_and_decode(k: &Tensor, v: &Tensor, blocks: &ElasticBlocks, device: &Device) {
    let tables = Tensor::new(&[[3u32, u32::MAX]], device).unwrap();
    let lengths = Tensor::new(&[1u32], device).unwrap();
    let kv = KvBatch::blocks(k, v, &tables).unwrap();
    let kv = kv.lengths(&lengths).unwrap().checked_by(blocks);
    kv.check().unwrap();
    let q = Tensor::ones((1, 4, 8), DType::F32, device).unwrap();
    let token = Tensor::from_iter((0..16).map(|number| number as f32), device).unwrap();
    let token = token.reshape((1, 2, 8)).unwrap();
    let q = write(&q, &token, &token, None, &kv, Slots::Last).unwrap();
    let plan = DecodePlan::new(device, 1, 4).unwrap();
    let out = decode(&q, &kv, &GqaOptions::new(1.), &plan).unwrap();
    // One key: its value, for both query heads of each head.
    let head = |from: usize| (from..from + 8).map(|number| number as f32);
    let expected: Vec<f32> = [0, 0, 8, 8].into_iter().flat_map(head).collect();
    assert_eq!(numbers(&out), expected);
}

#[test]
fn blocks_of_a_pool_are_written_through_prefix_and_reserved_tensors() {
    let test = open();
    if !super::has_attention(&test) {
        return;
    }
    let pool = TensorPool::new(&test.device).unwrap();
    {
        let blocks = elastic(&pool);
        let [k, v] = ["k", "v"].map(|name| blocks.prefix(name).unwrap());
        write_and_decode(&k, &v, &blocks, &test.device);
        // A later view shows what was written.
        let row = blocks.prefix("v").unwrap().narrow(0, 3, 1).unwrap();
        let row = row.narrow(1, 0, 1).unwrap().force_contiguous().unwrap();
        assert_eq!(
            numbers(&row),
            (0..16).map(|number| number as f32).collect::<Vec<_>>()
        );
    }
    let blocks = elastic(&pool);
    // SAFETY: the table names a backed block, which stays backed, and no operation reads a whole
    // tensor. The tensors are dropped before the blocks.
    #[allow(unsafe_code)]
    let tensors = unsafe { blocks.reserved_tensors() }.unwrap();
    write_and_decode(&tensors[0], &tensors[1], &blocks, &test.device);
    test.device.synchronize().unwrap();
    let row = blocks.prefix("v").unwrap().narrow(0, 3, 1).unwrap();
    let row = row.narrow(1, 0, 1).unwrap().force_contiguous().unwrap();
    assert_eq!(
        numbers(&row),
        (0..16).map(|number| number as f32).collect::<Vec<_>>()
    );
}

#[test]
fn an_elastic_cache_is_decoded_in_place() {
    let test = open();
    if !super::has_attention(&test) {
        return;
    }
    let pool = TensorPool::new(&test.device).unwrap();
    let tokens = |count| {
        let shape = (1, 2, count, 8);
        Tensor::randn(0f32, 1., shape, &test.device).unwrap()
    };
    let pairs: Vec<_> = [5, 19]
        .into_iter()
        .map(|count| {
            let mut cache = pool.kv_cache(2, 64);
            cache.append(&tokens(count), &tokens(count)).unwrap()
        })
        .collect();
    let kv = KvBatch::sequences(&pairs).unwrap();
    assert_eq!((kv.batch(), kv.capacity()), (2, 19));
    let q = Tensor::randn(0f32, 1., (2, 4, 8), &test.device).unwrap();
    let plan = DecodePlan::new(&test.device, 2, 4).unwrap();
    let out = decode(&q, &kv, &GqaOptions::new(0.3), &plan).unwrap();
    for (sequence, (k, v)) in pairs.iter().enumerate() {
        let q = q.narrow(0, sequence, 1).unwrap().unsqueeze(2).unwrap();
        let alone = candle_cuda_vmm::attention::gqa(&q, k, v, 0.3, true).unwrap();
        let expected: Vec<_> = numbers(&alone).into_iter().map(f64::from).collect();
        let ours = numbers(&out.narrow(0, sequence, 1).unwrap());
        super::assert_close(&ours, &expected, 2e-5, "elastic");
    }
}
