//! Random weights that follow from a seed and from the name of each tensor.

use candle::{DType, Device, Result, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

struct Random(u64);

impl SimpleBackend for Random {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let seed = name.bytes().fold(self.0, |seed, byte| {
            (seed ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        });
        let mut random = StdRng::seed_from_u64(seed);
        // Norms stay near 1, and outputs about as large as inputs.
        let (mean, spread) = match shape.dims() {
            [_] => (1., 0.2),
            // Small beside what layers add, so that a token does not follow itself for ever.
            [..] if name.ends_with("embed_tokens.weight") => (0., 0.1),
            [.., inputs] => (0., (3. / *inputs as f32).sqrt()),
            [] => (0., 1.),
        };
        let numbers = (0..shape.elem_count()).map(|_| mean + random.random_range(-spread..spread));
        Tensor::from_vec(numbers.collect::<Vec<f32>>(), shape, device)?.to_dtype(dtype)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        candle::bail!("{name} has no shape")
    }

    fn contains_tensor(&self, _: &str) -> bool {
        true
    }
}

pub fn random(seed: u64) -> VarBuilder<'static> {
    let random = Box::new(Random(seed ^ 0xcbf2_9ce4_8422_2325));
    VarBuilder::from_backend(random, DType::F32, Device::Cpu)
}
