//! How the tokens of a sequence are chosen.

/// How the tokens of a sequence are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// 0 takes the likeliest token; more is more even.
    pub temperature: f32,
    /// Only the likeliest tokens that have this probability together.
    pub top_p: f32,
    /// The same seed gives the same choices.
    pub seed: u64,
}

impl Choice {
    /// The likeliest token each time.
    pub const GREEDY: Self = Self {
        temperature: 0.,
        top_p: 1.,
        seed: 0,
    };

    /// The seed as two numbers, the lower half first.
    pub(super) fn seed_halves(&self) -> [u32; 2] {
        [self.seed as u32, (self.seed >> 32) as u32]
    }
}
