//! How long a step of a model takes on the GPU.
//!
//! A decode step costs a constant and an amount for each sequence, which `fit` finds. Prompt tokens
//! follow a roofline: operations at a share of the peak, or the time to read the weights once.

/// Parameters of the model, Llama 3.1 8B.
const PARAMETERS: f64 = 8.03e9;
/// The peak of an A100 in bf16 without sparsity, in floating-point operations a second.
const PEAK_FLOPS: f64 = 312e12;
/// The share of the peak that the products of a prompt reach.
const EFFICIENCY: f64 = 0.5;
/// The bandwidth of an 80 GB A100 (SXM), in bytes a second.
const BANDWIDTH: f64 = 2.039e12;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimeModel {
    /// A decode step without its sequences.
    pub step_ns: u64,
    /// What each sequence adds to it.
    pub sequence_ns: u64,
}

impl TimeModel {
    /// What `cargo xtask bench serving -- fit` finds for the published static curve as a whole.
    pub const FITTED: Self = Self {
        step_ns: 24_000_000,
        sequence_ns: 200_000,
    };

    /// A step of prompt tokens and sequences that decode; 0 for none of either.
    pub fn step(&self, prompt_tokens: u32, sequences: usize) -> u64 {
        let base_ns = if sequences > 0 { self.step_ns } else { 0 };
        base_ns + self.sequence_ns * sequences as u64 + prompt_ns(prompt_tokens)
    }
}

/// Prompt tokens by the roofline.
fn prompt_ns(tokens: u32) -> u64 {
    if tokens == 0 {
        return 0;
    }
    let compute = f64::from(tokens) * 2.0 * PARAMETERS / (PEAK_FLOPS * EFFICIENCY);
    let memory = 2.0 * PARAMETERS / BANDWIDTH;
    (compute.max(memory) * 1e9) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_prompt_tokens_take_as_long_as_the_weights_and_decode_steps_grow_with_sequences() {
        assert_eq!(prompt_ns(0), 0);
        assert_eq!(prompt_ns(1) / 1000, 7_876);
        assert_eq!(prompt_ns(76), prompt_ns(1));
        assert_eq!(prompt_ns(256) / 1000, 26_354);
        assert_eq!(prompt_ns(512) / 1000, 52_709);
        let model = TimeModel {
            step_ns: 1000,
            sequence_ns: 10,
        };
        assert_eq!(model.step(0, 0), 0);
        assert_eq!(model.step(0, 1), 1010);
        assert_eq!(model.step(256, 3), 1030 + prompt_ns(256));
    }
}
