//! Copies between plain tensors, the host, and memory of a pool.

use crate::bytes::pattern;
use crate::common::open;
use crate::token::{Page, Token};
use candle_core::{DType, Device, Tensor};

#[test]
fn a_tensor_goes_to_the_device_and_comes_back() {
    let test = open();
    assert!(test.device.is_cuda());
    let there_and_back = |tensor: &Tensor| {
        let there = tensor.to_device(&test.device).unwrap();
        assert_eq!(there.device().location(), test.device.location());
        there.to_device(&Device::Cpu).unwrap()
    };
    let floats: Vec<f32> = (0..1 << 20).map(|number| number as f32 / 3.0).collect();
    let tensor = Tensor::from_vec(floats.clone(), 1 << 20, &Device::Cpu).unwrap();
    assert!(there_and_back(&tensor).to_vec1::<f32>().unwrap() == floats);
    let rows = Tensor::new(&[[1u32, 2, 3], [4, 5, 6]], &Device::Cpu).unwrap();
    assert_eq!(
        there_and_back(&rows).to_vec2::<u32>().unwrap(),
        [[1, 2, 3], [4, 5, 6]]
    );
}

#[test]
fn zeros_are_zeros() {
    let test = open();
    let zeros = Tensor::zeros((2, 3), DType::I64, &test.device).unwrap();
    assert_eq!(zeros.to_vec2::<i64>().unwrap(), [[0; 3]; 2]);
}

#[test]
fn candle_copies_memory_of_a_pool_on_its_own_stream() {
    let memory = Page::new();
    memory.write(&pattern(1, 4096));
    let mut token = Token::new(&memory.candle);
    let tensor = memory.tensor::<u8>(&token, 4096);
    let copies = [0, 2048].map(|start| {
        let part = tensor.narrow(0, start, 1024).unwrap();
        part.force_contiguous().unwrap()
    });
    drop(tensor);
    // Their memory is Candle's, on Candle's stream object.
    assert!(token.is_free());
    memory.write(&[0; 4096]);
    let written = pattern(1, 4096);
    for (copy, start) in copies.iter().zip([0, 2048]) {
        assert_eq!(copy.to_vec1::<u8>().unwrap(), written[start..][..1024]);
    }
}
