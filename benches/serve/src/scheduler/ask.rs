//! What is asked of the scheduler, and why it refuses.

use core::fmt;

/// The name of a sequence: no two that run or wait have the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id(pub u64);

/// A prompt, and how many tokens may follow it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ask {
    /// The sequence's name.
    pub id: Id,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// The most tokens that are generated.
    pub generated_max: usize,
}

impl Ask {
    /// The most tokens that the sequence can come to have.
    pub fn tokens(&self) -> usize {
        self.prompt_tokens.saturating_add(self.generated_max)
    }
}

/// What a step and the queue may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The most sequences that run at a time, and so in a step.
    pub sequences_max: usize,
    /// The most tokens of chunks in a step, beside one token of each sequence that decodes.
    pub step_tokens_max: usize,
    /// The most tokens of a sequence, those of its prompt and those generated.
    pub context_max: usize,
    /// With so many waiting sequences, no other is accepted. Preempted ones count too.
    pub waiting_max: usize,
}

/// Why a sequence was not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// It has no prompt, or nothing is to be generated.
    Empty,
    /// It could never have its tokens: neither now nor with all memory for itself.
    TooLong {
        /// Tokens of the prompt and those that may follow.
        tokens: usize,
        /// The most that there can be.
        tokens_max: usize,
    },
    /// A sequence of this name runs or waits.
    Duplicate,
    /// Too many sequences wait.
    Full {
        /// How many.
        waiting: usize,
    },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => write!(f, "there is no prompt, or nothing is to be generated"),
            Self::TooLong { tokens, tokens_max } => {
                write!(
                    f,
                    "{tokens} tokens are asked for, and at most {tokens_max} can be had"
                )
            }
            Self::Duplicate => write!(f, "a sequence of this name runs or waits"),
            Self::Full { waiting } => write!(f, "{waiting} sequences wait already"),
        }
    }
}

impl core::error::Error for Refusal {}
