//! What does not fit is refused by name.

use super::{draw, row};
use crate::common::{UnderTest, open};
use crate::kernels::batch::has_attention;
use crate::kernels::batch::refusals::refused_by_candle;
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::cuda_vmm::DriverKind;
use candle_cuda_vmm::sampling::{SampleParameters, sample};

#[test]
fn inputs_that_do_not_fit_are_refused() {
    let test = open();
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &test.device).unwrap();
    let (temperature, position) = (zeros(&[2], DType::F32), zeros(&[2], DType::U32));
    let seed = zeros(&[2, 2], DType::U32);
    let new = |temperature: &Tensor, top_p: &Tensor, seed: &Tensor, position: &Tensor| {
        SampleParameters::new(temperature, top_p, seed, position)
    };
    let two = new(&temperature, &temperature, &seed, &position).unwrap();
    assert_eq!((two.batch(), two.first(1).unwrap().batch()), (2, 1));
    assert!(two.first(3).is_err());
    refused_by_candle(
        new(&position, &temperature, &seed, &position),
        "temperature, expected: F32, got: U32",
    );
    refused_by_candle(
        new(&temperature, &seed, &seed, &position),
        "top_p, expected: F32, got: U32",
    );
    refused_by_candle(
        new(
            &temperature,
            &temperature,
            &zeros(&[2, 2], DType::I64),
            &position,
        ),
        "seed, expected: U32, got: I64",
    );
    refused_by_candle(
        new(&temperature, &temperature, &seed, &temperature),
        "position, expected: U32, got: F32",
    );
    refused_by_candle(
        new(&seed, &temperature, &seed, &position),
        "unexpected rank, expected: 1",
    );
    let three = zeros(&[3], DType::F32);
    refused_by_candle(
        new(&temperature, &three, &seed, &position),
        "top_p, expected: [2], got: [3]",
    );
    refused_by_candle(
        new(&temperature, &temperature, &position, &position),
        "seed, expected: [2, 2], got: [2]",
    );
    refused_by_candle(
        new(
            &temperature,
            &temperature,
            &seed,
            &zeros(&[2, 1], DType::U32),
        ),
        "position, expected: [2], got: [2, 1]",
    );
    refused_by_candle(
        new(&temperature, &temperature, &seed.t().unwrap(), &position),
        "sample only supports contiguous tensors",
    );

    let refused_logits = |logits: &Tensor, expected: &str| {
        refused_by_candle(sample(logits, &two), expected);
    };
    refused_logits(
        &zeros(&[2, 8], DType::F64),
        "unsupported dtype F64 for op sample",
    );
    refused_logits(&zeros(&[8], DType::F32), "unexpected rank, expected: 2");
    refused_logits(
        &zeros(&[3, 8], DType::F32),
        "shape mismatch in sample, lhs: [3, 8], rhs: [2]",
    );
    refused_logits(&zeros(&[2, 0], DType::F32), "empty tensor for sample");
    let most = 1 << 18;
    refused_logits(
        &zeros(&[2, most + 1], DType::F16),
        "sample takes at most 262144 tokens, expected: [2, 262144], got: [2, 262145]",
    );
    refused_logits(
        &zeros(&[8, 2], DType::F32).t().unwrap(),
        "sample only supports contiguous tensors",
    );
    if !has_attention(&test) {
        return;
    }
    assert_eq!(draw(&zeros(&[1, most], DType::F16), &[row(0., 1., 0)]), [0]);
    let none = two.first(0).unwrap();
    let tokens = sample(&zeros(&[0, 8], DType::F32), &none).unwrap();
    assert_eq!((tokens.dims(), tokens.dtype()), (&[0][..], DType::U32));
    refused_on_another_device(&test, &two);
}

fn refused_on_another_device(test: &UnderTest, parameters: &SampleParameters) {
    if test.kind == DriverKind::Real {
        let on_cpu = Tensor::zeros((2, 8), DType::F32, &Device::Cpu).unwrap();
        refused_by_candle(sample(&on_cpu, parameters), "device mismatch in sample");
        let [f32, u32] =
            [DType::F32, DType::U32].map(|dtype| Tensor::zeros(2, dtype, &Device::Cpu).unwrap());
        let seed = Tensor::zeros((2, 2), DType::U32, &test.device).unwrap();
        refused_by_candle(
            SampleParameters::new(&f32, &f32, &seed, &u32),
            "device mismatch in sample",
        );
    }
}
