//! Tensors that are no batch, and lengths and tables that a check refuses.

use super::{candle, index, ours, zeros};
use crate::common::open;
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::attention::KvBatch;
use candle_cuda_vmm::cuda_vmm::DriverKind;
use candle_cuda_vmm::{BlockError, TensorPool, VmmError, cuda_vmm};

#[test]
fn tensors_that_are_no_batch() {
    let test = open();
    let f32 = |shape: &[usize]| zeros(&test, shape, DType::F32);
    let kv = f32(&[2, 2, 8, 16]);
    let whole = zeros(&test, &[2, 2, 8, 16], DType::F64);
    candle(
        KvBatch::rows(&whole, &whole),
        "unsupported dtype F64 for op",
    );
    let half = zeros(&test, &[2, 2, 8, 16], DType::F16);
    candle(KvBatch::rows(&kv, &half), "dtype mismatch in");
    let flat = f32(&[2, 8, 16]);
    candle(KvBatch::rows(&flat, &kv), "unexpected rank, expected");
    candle(KvBatch::rows(&kv, &flat), "unexpected rank, expected");
    for other in [[1, 2, 8, 16], [2, 1, 8, 16], [2, 2, 7, 16]] {
        candle(KvBatch::rows(&kv, &f32(&other)), "shape mismatch in");
    }
    for shape in [[0, 2, 8, 16], [2, 0, 8, 16], [2, 2, 0, 16], [2, 2, 8, 0]] {
        let empty = f32(&shape);
        candle(KvBatch::rows(&empty, &empty), "empty tensor for");
    }
    let across = f32(&[2, 2, 16, 8]).transpose(2, 3).unwrap();
    candle(
        KvBatch::rows(&across, &kv),
        "kv_batch only supports contiguous",
    );
    candle(
        KvBatch::rows(&kv, &across),
        "kv_batch only supports contiguous",
    );
    if test.kind == DriverKind::Real {
        let on_cpu = kv.to_device(&Device::Cpu).unwrap();
        candle(KvBatch::rows(&kv, &on_cpu), "device mismatch in");
    }
}

#[test]
fn caches_that_do_not_go_together() {
    let test = open();
    let token_major = |capacity: usize, heads: usize, dim: usize| {
        let tensor = zeros(&test, &[1, capacity, heads, dim], DType::F32);
        tensor.transpose(1, 2).unwrap()
    };
    candle(KvBatch::sequences(&[]), "empty tensor for");
    let pair = |tensor: &Tensor| (tensor.clone(), tensor.clone());
    let first = pair(&token_major(8, 2, 16));
    for other in [token_major(8, 1, 16), token_major(8, 2, 32)] {
        let pairs = [first.clone(), pair(&other)];
        candle(KvBatch::sequences(&pairs), "shape mismatch in");
    }
    let other = (first.0.clone(), token_major(8, 2, 32));
    candle(
        KvBatch::sequences(&[first.clone(), other]),
        "shape mismatch in",
    );
    let two = pair(&zeros(&test, &[2, 2, 8, 16], DType::F32));
    candle(KvBatch::sequences(&[two.clone(), two]), "shape mismatch in");
    let half = pair(&zeros(&test, &[1, 2, 8, 16], DType::F16));
    candle(
        KvBatch::sequences(&[first.clone(), half]),
        "dtype mismatch in",
    );
    let head_major = pair(&zeros(&test, &[1, 2, 8, 16], DType::F32));
    ours(
        KvBatch::sequences(&[first.clone(), first.clone(), head_major]),
        &VmmError::DifferentStrides {
            sequence: 2,
            strides: vec![128, 16, 128, 16],
            expected: vec![16, 32, 16, 32],
        },
    );
    // A stride between things of which there is one may be any.
    let one_token = pair(&zeros(&test, &[1, 2, 1, 16], DType::F32));
    let kv = KvBatch::sequences(&[one_token, first]).unwrap();
    assert_eq!((kv.batch(), kv.capacity()), (2, 8));
}

#[test]
fn blocks_tables_lengths_and_scales_that_do_not_fit() {
    let test = open();
    let blocks = |size: usize| zeros(&test, &[4, size, 2, 16], DType::F32);
    let tables = zeros(&test, &[2, 3], DType::U32);
    for size in [1, 8, 15, 24, 100, 272] {
        let blocks = blocks(size);
        ours(
            KvBatch::blocks(&blocks, &blocks, &tables),
            &VmmError::UnsupportedBlockSize { size },
        );
    }
    let blocks = blocks(16);
    let with = |tables: &Tensor| KvBatch::blocks(&blocks, &blocks, tables);
    candle(
        with(&zeros(&test, &[2, 3], DType::I64)),
        "unsupported dtype I64 for op",
    );
    candle(
        with(&zeros(&test, &[3], DType::U32)),
        "unexpected rank, expected",
    );
    candle(
        with(&tables.t().unwrap()),
        "kv_batch only supports contiguous",
    );
    candle(with(&zeros(&test, &[0, 3], DType::U32)), "empty tensor for");
    candle(with(&zeros(&test, &[2, 0], DType::U32)), "empty tensor for");

    let kv = with(&tables).unwrap();
    let lengths = |lengths: &Tensor| kv.clone().lengths(lengths);
    candle(
        lengths(&zeros(&test, &[2], DType::I64)),
        "unsupported dtype I64 for op",
    );
    candle(lengths(&index(&test, &[1, 1, 1])), "shape mismatch in");
    candle(
        lengths(&zeros(&test, &[2, 1], DType::U32)),
        "unexpected rank, expected",
    );
    candle(kv.clone().scales(1., 1.), "unsupported dtype F32 for op");
    let stored = zeros(&test, &[4, 16, 2, 16], DType::F8E4M3);
    let stored = KvBatch::blocks(&stored, &stored, &tables).unwrap();
    for (k_scale, v_scale, option, value) in [
        (0., 1., "scale of K", 0.),
        (1., -1., "scale of V", -1.),
        (1., f32::INFINITY, "scale of V", f32::INFINITY),
        (f32::NAN, 1., "scale of K", f32::NAN),
    ] {
        ours(
            stored.clone().scales(k_scale, v_scale),
            &VmmError::InvalidAttention { option, value },
        );
    }
    assert_eq!(
        (kv.batch(), kv.kv_heads(), kv.dim(), kv.value_dim()),
        (2, 2, 16, 16)
    );
    assert_eq!((kv.capacity(), kv.dtype()), (48, DType::F32));
    assert_eq!(kv.device().location(), test.device.location());
}

#[test]
fn lengths_and_tables_that_a_check_finds() {
    let test = open();
    let rows = zeros(&test, &[3, 2, 8, 16], DType::F32);
    let rows = KvBatch::rows(&rows, &rows).unwrap();
    rows.check().unwrap();
    let check = |lengths: &[u32]| {
        let kv = rows.clone().lengths(&index(&test, lengths)).unwrap();
        kv.check()
    };
    check(&[1, 8, 5]).unwrap();
    check(&[0, 8, 0]).unwrap();
    let beyond = VmmError::LengthBeyondCapacity {
        sequence: 1,
        length: 9,
        capacity: 8,
    };
    ours(check(&[1, 9, 0]), &beyond);

    let pool = TensorPool::new(&test.device).unwrap();
    let entries = ["k", "v"].map(|name| (name, (16, 2, 16), DType::F32));
    let blocks = pool.blocks(8, entries).unwrap();
    blocks.back(0..4).unwrap();
    blocks.unback([2]).unwrap();
    // SAFETY: no operation reads the tensors.
    #[allow(unsafe_code)]
    let tensors = unsafe { blocks.reserved_tensors() }.unwrap();
    let check = |tables: [[u32; 2]; 2], lengths: &[u32]| {
        let tables = Tensor::new(&tables, &test.device).unwrap();
        let kv = KvBatch::blocks(&tensors[0], &tensors[1], &tables).unwrap();
        let kv = kv.lengths(&index(&test, lengths)).unwrap();
        kv.checked_by(&blocks).check()
    };
    check([[0, 1], [3, 99]], &[32, 16]).unwrap();
    let block = |error| VmmError::Vmm(cuda_vmm::VmmError::Block(error));
    let invalid = block(BlockError::Invalid {
        block: 99,
        blocks: 8,
    });
    ours(check([[0, 1], [3, 99]], &[32, 17]), &invalid);
    let bare = block(BlockError::NotBacked { block: 2 });
    ours(check([[0, 2], [3, 1]], &[17, 17]), &bare);
    check([[0, 2], [3, 1]], &[16, 17]).unwrap();
    let tables = Tensor::new(&[[0u32, 1], [3, 3]], &test.device).unwrap();
    let kv = KvBatch::blocks(&tensors[0], &tensors[1], &tables).unwrap();
    ours(kv.check(), &VmmError::MissingLengths);
    test.device.synchronize().unwrap();
}
