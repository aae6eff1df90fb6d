//! The options of an attention.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use crate::error::VmmError;
use candle_core::Result;

/// The keys that a query sees.
///
/// The last query's own key is the last key, that of the query before it the key before, and so on.
/// That is right for a prompt, with or without earlier keys, and for a decode step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Mask {
    /// All keys.
    None,
    /// Its own key and all before it.
    Causal,
    /// Its own key and those before it, this many in all: a sliding window.
    Window(usize),
}

/// Options of [`gqa_with`](crate::attention::gqa_with).
///
/// ```
/// use candle_cuda_vmm::attention::{GqaOptions, Mask};
///
/// // A layer of Gemma 2.
/// let options = GqaOptions::new(1. / 16.)
///     .mask(Mask::Window(4096))
///     .soft_cap(50.);
/// assert_eq!(options.soft_cap, Some(50.));
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct GqaOptions {
    /// The factor of the products of queries and keys.
    pub scale: f32,
    /// The keys that a query sees.
    pub mask: Mask,
    /// The bound of scores; see [`soft_cap`](Self::soft_cap).
    pub soft_cap: Option<f32>,
}

impl GqaOptions {
    /// Makes options with this scale, without a mask and without a bound.
    pub const fn new(scale: f32) -> Self {
        Self {
            scale,
            mask: Mask::None,
            soft_cap: None,
        }
    }

    /// Sets the keys that a query sees.
    pub const fn mask(mut self, mask: Mask) -> Self {
        self.mask = mask;
        self
    }

    /// Bounds scores to between `-cap` and `cap`: a score `s` becomes `cap · tanh(s / cap)`. It
    /// must be more than 0 and finite.
    pub const fn soft_cap(mut self, cap: f32) -> Self {
        self.soft_cap = Some(cap);
        self
    }

    /// Fails if a window or a cap is not valid.
    pub(super) fn check(&self) -> Result<()> {
        let invalid = |option, value| Err(VmmError::InvalidAttention { option, value }.into());
        match (self.mask, self.soft_cap) {
            (Mask::Window(0), _) => invalid("window", 0.),
            (_, Some(cap)) if !(cap > 0. && cap.is_finite()) => invalid("soft cap", cap),
            _ => Ok(()),
        }
    }
}
