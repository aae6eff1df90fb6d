//! Compares grouped-query attention with the steps of Candle's models: repeat K and V, multiply,
//! softmax, multiply.

use crate::common::open;
use candle_core::{D, DType, Device, Error, Result, Shape, Tensor};
use candle_cuda_vmm::attention::{GqaOptions, Mask, gqa};
use candle_cuda_vmm::cuda_vmm::DriverKind;

/// The sizes of a case.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub batch: usize,
    pub query_heads: usize,
    pub kv_heads: usize,
    pub queries: usize,
    pub keys: usize,
    pub dim: usize,
}

pub const fn case(
    batch: usize,
    (query_heads, kv_heads): (usize, usize),
    (queries, keys): (usize, usize),
    dim: usize,
) -> Case {
    Case {
        batch,
        query_heads,
        kv_heads,
        queries,
        keys,
        dim,
    }
}

/// One query, a prompt, a prompt after other tokens; one sequence and several; one, some and all
/// heads shared.
const CASES: [Case; 11] = [
    case(1, (8, 2), (1, 33), 64),
    case(1, (8, 2), (1, 1), 64),
    case(1, (32, 8), (1, 65), 128),
    case(1, (8, 2), (17, 17), 64),
    case(1, (8, 2), (5, 40), 64),
    case(3, (8, 2), (1, 20), 32),
    case(2, (6, 3), (4, 9), 32),
    case(5, (4, 2), (1, 12), 16),
    case(3, (4, 1), (3, 11), 16),
    case(1, (4, 4), (6, 6), 48),
    // Few long rows, for which a GPU uses another softmax.
    case(1, (4, 2), (1, 4100), 8),
];

/// The layout of K and V.
#[derive(Clone, Copy, Debug)]
pub enum KvLayout {
    /// Contiguous `[batch, kv_heads, keys, dim]`.
    HeadMajor,
    /// The first keys of a longer head-major reservation, as Candle's `KvCache` returns them.
    HeadMajorPart,
    /// A view of `[batch, keys, kv_heads, dim]`.
    TokenMajor,
    /// Keys from the middle of a longer token-major reservation.
    TokenMajorPart,
}

impl KvLayout {
    pub const ALL: [Self; 4] = [
        Self::HeadMajor,
        Self::HeadMajorPart,
        Self::TokenMajor,
        Self::TokenMajorPart,
    ];

    /// Makes a view `[batch, kv_heads, keys, dim]` of random numbers with this layout.
    pub fn random(self, case: Case, dtype: DType, device: &Device) -> Result<Tensor> {
        let Case {
            batch,
            kv_heads,
            keys,
            dim,
            ..
        } = case;
        let random = |shape| Tensor::randn(0f32, 1., shape, device)?.to_dtype(dtype);
        match self {
            Self::HeadMajor => random((batch, kv_heads, keys, dim)),
            Self::HeadMajorPart => random((batch, kv_heads, keys + 7, dim))?.narrow(2, 0, keys),
            Self::TokenMajor => random((batch, keys, kv_heads, dim))?.transpose(1, 2),
            Self::TokenMajorPart => random((batch, keys + 7, kv_heads, dim))?
                .narrow(1, 3, keys)?
                .transpose(1, 2),
        }
    }
}

/// Attention as in Candle's models, in F32.
pub fn reference(q: &Tensor, k: &Tensor, v: &Tensor, options: &GqaOptions) -> Result<Tensor> {
    let (_, query_heads, queries, _) = q.dims4()?;
    let (batch, kv_heads, keys, _) = k.dims4()?;
    let repeated = |kv: &Tensor| {
        let dim = kv.dims()[3];
        let shape = (batch, kv_heads, query_heads / kv_heads, keys, dim);
        let kv = kv.to_dtype(DType::F32)?.contiguous()?.unsqueeze(2)?;
        kv.expand(shape)?.reshape((batch, query_heads, keys, dim))
    };
    let q = q.to_dtype(DType::F32)?.contiguous()?;
    let scores = q.matmul(&repeated(k)?.transpose(2, 3)?.contiguous()?)?;
    let mut scores = scores.affine(options.scale.into(), 0.)?;
    if let Some(cap) = options.soft_cap {
        scores = ((scores / f64::from(cap))?.tanh()? * f64::from(cap))?;
    }
    let is_hidden = |query: usize, key: usize| {
        // Without a mask there may be more queries than keys.
        let own = (keys + query).wrapping_sub(queries);
        match options.mask {
            Mask::Causal => key > own,
            Mask::Window(window) => key > own || key + window <= own,
            _ => false,
        }
    };
    let mask: Vec<f32> = (0..queries)
        .flat_map(|query| {
            (0..keys).map(move |key| match is_hidden(query, key) {
                true => f32::NEG_INFINITY,
                false => 0.,
            })
        })
        .collect();
    let mask = Tensor::from_vec(mask, (queries, keys), q.device())?;
    let weights = candle_nn::ops::softmax(&scores.broadcast_add(&mask)?, D::Minus1)?;
    weights.matmul(&repeated(v)?)
}

/// The options of a call of `gqa`.
fn plain(scale: f32, causal: bool) -> GqaOptions {
    let mask = if causal { Mask::Causal } else { Mask::None };
    GqaOptions::new(scale).mask(mask)
}

/// Returns the largest difference between two tensors.
pub fn difference(left: &Tensor, right: &Tensor) -> Result<f32> {
    let left = left.to_dtype(DType::F32)?;
    (left - right)?
        .abs()?
        .flatten_all()?
        .max(0)?
        .to_scalar::<f32>()
}

#[test]
fn every_shape_in_every_place_is_what_repeated_heads_give() {
    let test = open();
    // The allowed error of sums of a few hundred numbers around 1, with weights of that dtype.
    for (dtype, allowed) in [(DType::F32, 2e-5), (DType::F16, 4e-3), (DType::BF16, 3e-2)] {
        for case in CASES {
            for place in KvLayout::ALL {
                for causal in [true, false] {
                    let device = &test.device;
                    let shape = (case.batch, case.query_heads, case.queries, case.dim);
                    let q = Tensor::randn(0f32, 1., shape, device).unwrap();
                    let q = q.to_dtype(dtype).unwrap();
                    let k = place.random(case, dtype, device).unwrap();
                    let v = place.random(case, dtype, device).unwrap();
                    let scale = 1. / (case.dim as f32).sqrt();
                    let ours = gqa(&q, &k, &v, scale, causal).unwrap();
                    assert_eq!(ours.dims(), q.dims());
                    assert_eq!(ours.dtype(), dtype);
                    assert!(ours.is_contiguous());
                    let expected = reference(&q, &k, &v, &plain(scale, causal)).unwrap();
                    let off = difference(&ours, &expected).unwrap();
                    assert!(
                        off <= allowed,
                        "{off} off: {dtype:?} {case:?} {place:?}, causal: {causal}"
                    );
                }
            }
        }
    }
}

#[test]
fn queries_may_stand_anywhere_and_k_and_v_in_different_places() {
    let test = open();
    let case = case(2, (8, 2), (4, 19), 32);
    let q = Tensor::randn(0f32, 1., (2, 4, 8, 32), &test.device).unwrap();
    let q = q.transpose(1, 2).unwrap();
    let random = |place: KvLayout| place.random(case, DType::F32, &test.device).unwrap();
    let (k, v) = (
        random(KvLayout::TokenMajorPart),
        random(KvLayout::HeadMajorPart),
    );
    let ours = gqa(&q, &k, &v, 0.2, true).unwrap();
    let expected = reference(&q, &k, &v, &plain(0.2, true)).unwrap();
    assert!(difference(&ours, &expected).unwrap() <= 2e-5);
    // One sequence for both: a stride of 0.
    let (k, v) = (k.narrow(0, 0, 1).unwrap(), v.narrow(0, 0, 1).unwrap());
    let expand = |kv: &Tensor| kv.expand((2, 2, 19, 32)).unwrap();
    let (k, v) = (expand(&k), expand(&v));
    let ours = gqa(&q, &k, &v, 0.2, true).unwrap();
    let expected = reference(&q, &k, &v, &plain(0.2, true)).unwrap();
    assert!(difference(&ours, &expected).unwrap() <= 2e-5);
}

#[test]
fn large_scores_do_not_overflow() {
    let test = open();
    let case = case(1, (2, 1), (3, 6), 16);
    let kv = KvLayout::TokenMajor
        .random(case, DType::F16, &test.device)
        .unwrap();
    // Scores up to a hundred thousand. The largest F16 is 65,504.
    let q = Tensor::full(600f32, (1, 2, 3, 16), &test.device).unwrap();
    let q = q.to_dtype(DType::F16).unwrap();
    let k = kv.affine(20., 0.).unwrap();
    let ours = gqa(&q, &k, &kv, 1., true).unwrap();
    let expected = reference(&q, &k, &kv, &plain(1., true)).unwrap();
    assert!(difference(&ours, &expected).unwrap() <= 4e-3);
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let test = open();
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &test.device).unwrap();
    let f32 = |shape: &[usize]| zeros(shape, DType::F32);
    let q = f32(&[1, 4, 2, 8]);
    let kv = f32(&[1, 2, 3, 8]);
    let error = |q: &Tensor, k: &Tensor, v: &Tensor| gqa(q, k, v, 1., true).unwrap_err();

    for (k, v) in [
        (&zeros(&[1, 2, 3, 8], DType::F16), &kv),
        (&kv, &zeros(&[1, 2, 3, 8], DType::F16)),
    ] {
        assert!(matches!(
            error(&q, k, v),
            Error::DTypeMismatchBinaryOp {
                lhs: DType::F32,
                rhs: DType::F16,
                op: "gqa"
            }
        ));
    }
    let whole = |shape: &[usize]| zeros(shape, DType::F64);
    let (q64, kv64) = (whole(&[1, 4, 2, 8]), whole(&[1, 2, 3, 8]));
    assert!(matches!(
        error(&q64, &kv64, &kv64),
        Error::UnsupportedDTypeForOp(DType::F64, "gqa")
    ));
    for (q, k, v) in [
        (&f32(&[4, 2, 8]), &kv, &kv),
        (&q, &f32(&[2, 3, 8]), &kv),
        (&q, &kv, &f32(&[2, 3, 8])),
    ] {
        assert!(matches!(
            error(q, k, v),
            Error::UnexpectedNumberOfDims {
                expected: 4,
                got: 3,
                ..
            }
        ));
    }
    // Another batch or head dimension, heads that do not divide, and more queries than keys.
    for shape in [
        [2, 2, 3, 8],
        [1, 2, 3, 16],
        [1, 3, 3, 8],
        [1, 8, 3, 8],
        [1, 2, 1, 8],
    ] {
        let other = f32(&shape);
        match error(&q, &other, &other) {
            Error::ShapeMismatchBinaryOp { lhs, rhs, op: NAME } => {
                assert_eq!((&lhs, rhs), (q.shape(), Shape::from(&shape[..])));
            }
            other => panic!("{other}"),
        }
    }
    match error(&q, &kv, &f32(&[1, 2, 4, 8])) {
        Error::ShapeMismatchBinaryOp { lhs, rhs, op: NAME } => {
            assert_eq!(
                (lhs.dims(), rhs.dims()),
                (&[1, 2, 3, 8][..], &[1, 2, 4, 8][..])
            );
        }
        other => panic!("{other}"),
    }
    for shape in [[1, 2, 0, 8], [1, 0, 3, 8], [0, 2, 3, 8], [1, 2, 3, 0]] {
        let empty = f32(&shape);
        assert!(matches!(
            error(&q, &empty, &empty),
            Error::EmptyTensor { op: NAME }
        ));
    }
    // A head dimension with a stride other than 1.
    let across = f32(&[1, 2, 8, 3]).transpose(2, 3).unwrap();
    for (k, v) in [(&across, &kv), (&kv, &across)] {
        match error(&q, k, v) {
            Error::MatMulUnexpectedStriding(striding) => {
                assert_eq!(striding.rhs_l.stride(), across.stride());
            }
            other => panic!("{other}"),
        }
    }
    // Without a causal mask there may be more queries than keys.
    let one = f32(&[1, 2, 1, 8]);
    assert_eq!(gqa(&q, &one, &one, 1., false).unwrap().dims(), q.dims());

    if test.kind == DriverKind::Real {
        let on_cpu = kv.to_device(&Device::Cpu).unwrap();
        for (k, v) in [(&on_cpu, &kv), (&kv, &on_cpu)] {
            assert!(matches!(
                error(&q, k, v),
                Error::DeviceMismatchBinaryOp { op: NAME, .. }
            ));
        }
        // A key's stride below the head dimension: cuBLAS does not support such a matrix.
        let same = f32(&[1, 2, 1, 8]).expand((1, 2, 3, 8)).unwrap();
        assert!(matches!(
            error(&q, &same, &same),
            Error::MatMulUnexpectedStriding(_)
        ));
    }
}

/// The operation's name in errors.
const NAME: &str = "gqa";
