//! Compares the output of an append with Candle's concatenation on the CPU: for shapes, strides and
//! offsets that one launch supports and for others, in all dtypes that Candle copies with any
//! strides.

use crate::common::open;
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::{TensorPool, TensorPoolOptions};

/// Makes numbers from `first` on, of which neighbors differ in every dtype.
fn numbers(first: usize, dims: &[usize], dtype: DType) -> Tensor {
    let count = dims.iter().product();
    let numbers = (first..).map(|number| (number % 13) as f32).take(count);
    let numbers = Tensor::from_vec(numbers.collect(), dims, &Device::Cpu).unwrap();
    numbers.to_dtype(dtype).unwrap()
}

/// The layout of tokens before they are appended.
#[derive(Clone, Copy, Debug)]
enum Lie {
    /// Contiguous.
    Contiguous,
    /// Token-major, as the projections return them.
    TokenMajor,
    /// A part of a larger tensor, along the sequence.
    BehindTokens,
    /// A part of a larger tensor, along the last dimension.
    BehindElements,
}

/// Returns the same tokens in another layout on this device.
fn laid(tokens: &Tensor, lie: Lie, device: &Device) -> Tensor {
    let there = |tokens: &Tensor| tokens.to_device(device).unwrap();
    match lie {
        Lie::Contiguous => there(tokens),
        Lie::TokenMajor => {
            let token_major = tokens.transpose(1, 2).unwrap().contiguous().unwrap();
            there(&token_major).transpose(1, 2).unwrap()
        }
        Lie::BehindTokens | Lie::BehindElements => {
            let dim = if matches!(lie, Lie::BehindTokens) {
                2
            } else {
                3
            };
            let more = Tensor::cat(&[tokens, tokens], dim).unwrap();
            let len = tokens.dim(dim).unwrap();
            there(&more).narrow(dim, len, len).unwrap()
        }
    }
}

#[track_caller]
fn expect(answer: &Tensor, expected: &Tensor, what: &str) {
    assert_eq!(answer.dims(), expected.dims(), "{what}");
    let flat = |tensor: &Tensor| {
        let host = tensor
            .contiguous()
            .unwrap()
            .to_device(&Device::Cpu)
            .unwrap();
        let floats = host.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
        floats.to_vec1::<f32>().unwrap()
    };
    assert!(flat(answer) == flat(expected), "{what}");
}

#[test]
fn answers_are_what_candle_concatenates() {
    let test = open();
    let dtypes = [DType::F32, DType::F16, DType::BF16, DType::F64, DType::U8];
    // The last is no multiple of 16 bytes in any of the dtypes.
    let shapes = [(1, 8, 128), (2, 3, 16), (1, 1, 64), (2, 2, 5)];
    for contiguous in [false, true] {
        let options = TensorPoolOptions::new().contiguous_output(contiguous);
        let pool = TensorPool::with_options(&test.device, options).unwrap();
        for (dtype, (batch, heads, dim)) in dtypes
            .iter()
            .flat_map(|dtype| shapes.iter().map(|shape| (*dtype, *shape)))
        {
            let mut cache = pool.kv_cache(2, 64);
            let mut expected: Option<(Tensor, Tensor)> = None;
            for (step, (count, lie)) in [
                (5, Lie::Contiguous),
                (1, Lie::TokenMajor),
                (1, Lie::Contiguous),
                (3, Lie::BehindTokens),
                (1, Lie::BehindElements),
                (4, Lie::TokenMajor),
            ]
            .into_iter()
            .enumerate()
            {
                let what = format!("{dtype:?}, {heads} heads of {dim}, step {step}, {lie:?}");
                let dims = [batch, heads, count, dim];
                let (k, v) = (numbers(step, &dims, dtype), numbers(step + 7, &dims, dtype));
                let answers = cache
                    .append(&laid(&k, lie, &test.device), &laid(&v, lie, &test.device))
                    .unwrap();
                let all = match &expected {
                    None => (k, v),
                    Some((old_k, old_v)) => (
                        Tensor::cat(&[old_k, &k], 2).unwrap(),
                        Tensor::cat(&[old_v, &v], 2).unwrap(),
                    ),
                };
                expect(&answers.0, &all.0, &what);
                expect(&answers.1, &all.1, &what);
                if contiguous {
                    assert!(
                        answers.0.is_contiguous() && answers.1.is_contiguous(),
                        "{what}"
                    );
                }
                expected = Some(all);
            }
        }
    }
}

#[test]
fn contiguous_output_is_copied() {
    let test = open();
    let options = TensorPoolOptions::new().contiguous_output(true);
    let pool = TensorPool::with_options(&test.device, options).unwrap();
    let mut cache = pool.kv_cache(2, 64);
    let token = |number| {
        let token = numbers(number, &[1, 2, 1, 8], DType::F32);
        token.to_device(&test.device).unwrap()
    };
    cache.append(&token(1), &token(2)).unwrap();
    let (k, v) = cache.append(&token(3), &token(4)).unwrap();
    cache.truncate(1).unwrap();
    cache.append(&token(5), &token(6)).unwrap();
    drop(cache);
    let expected = |first, second| Tensor::cat(&[token(first), token(second)], 2).unwrap();
    expect(&k, &expected(1, 3), "keys");
    expect(&v, &expected(2, 4), "values");
}
