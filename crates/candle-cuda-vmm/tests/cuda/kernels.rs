//! What launches kernels, and so runs on GPUs only: `cargo xtask test --cuda` leaves this module out by its name.

mod relief;

use crate::token::{Page, Token};
use candle_core::Tensor;

#[test]
fn candle_computes_on_memory_of_a_pool() {
    let memory = Page::new();
    let numbers: Vec<f32> = (0..1024u16).map(f32::from).collect();
    let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_ne_bytes()).collect();
    memory.write(&bytes);
    let token = Token::new(&memory.candle);
    let tensor = memory.tensor::<f32>(&token, numbers.len());
    let computed = tensor.affine(2.0, 1.0).unwrap().to_vec1::<f32>().unwrap();
    let expected: Vec<f32> = numbers.iter().map(|number| 2.0 * number + 1.0).collect();
    assert_eq!(computed, expected);
    // Written in place, the memory of the pool has it.
    let halves = Tensor::new(&[0.5f32, 1.5], tensor.device()).unwrap();
    tensor.slice_set(&halves, 0, 10).unwrap();
    let written = tensor.to_vec1::<f32>().unwrap();
    assert_eq!(written[9..13], [9.0, 0.5, 1.5, 12.0]);
}
