//! The resources that a run needs, checked before anything is allocated.

use crate::config::Config;
use crate::token_bytes;
use candle_core::{DType, Device};

/// The resources that a run needs.
#[derive(Clone, Copy, Debug)]
pub struct Demand {
    pub prompt_tokens: usize,
    pub tokens: usize,
    /// The sequence length that the caches are made for.
    pub max_seq_len: usize,
    /// Whether the caches allocate memory for `max_seq_len` tokens at once.
    pub is_reserved: bool,
    pub dtype: DType,
}

/// Why a run is not possible.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DemandError {
    #[error(
        "{prompt_tokens} prompt tokens and {tokens} new tokens exceed the model's {positions} positions"
    )]
    BeyondPositions {
        prompt_tokens: usize,
        tokens: usize,
        positions: usize,
    },
    #[error("caches for {max_seq_len} tokens exceed the model's {positions} positions")]
    CachesBeyondPositions {
        max_seq_len: usize,
        positions: usize,
    },
    #[error("weights and caches need {needed_bytes} bytes, and the host has {memory_bytes}")]
    BeyondMemory {
        /// `usize::MAX` if the sum overflows.
        needed_bytes: usize,
        memory_bytes: usize,
    },
}

impl Demand {
    /// Checks that the model has enough positions, and that the host has memory for weights and
    /// caches.
    ///
    /// Memory is checked only if the model runs on the CPU. A GPU's driver checks it itself.
    pub fn check(&self, config: &Config, device: &Device) -> Result<(), DemandError> {
        let memory_bytes = device.is_cpu().then(host_bytes).flatten();
        self.check_with(config, memory_bytes)
    }

    fn check_with(&self, config: &Config, memory_bytes: Option<usize>) -> Result<(), DemandError> {
        let positions = config.max_position_embeddings;
        let (prompt_tokens, tokens) = (self.prompt_tokens, self.tokens);
        // The last generated token is not fed back.
        let needed = prompt_tokens.checked_add(tokens.saturating_sub(1));
        if needed.is_none_or(|needed| needed > positions) {
            return Err(DemandError::BeyondPositions {
                prompt_tokens,
                tokens,
                positions,
            });
        }
        let max_seq_len = self.max_seq_len;
        if max_seq_len > positions {
            return Err(DemandError::CachesBeyondPositions {
                max_seq_len,
                positions,
            });
        }
        let cached = match self.is_reserved {
            true => max_seq_len.max(prompt_tokens + tokens),
            false => prompt_tokens + tokens,
        };
        let weights = (config.elements())
            .and_then(|elements| elements.checked_mul(self.dtype.size_in_bytes()));
        let caches = token_bytes(config, self.dtype).checked_mul(cached);
        let needed_bytes = weights
            .zip(caches)
            .and_then(|(weights, caches)| weights.checked_add(caches))
            .unwrap_or(usize::MAX);
        match memory_bytes {
            Some(memory_bytes) if needed_bytes > memory_bytes => Err(DemandError::BeyondMemory {
                needed_bytes,
                memory_bytes,
            }),
            _ => Ok(()),
        }
    }
}

/// Returns the size of the host's memory, if the system reports it.
fn host_bytes() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let total = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: usize = total.split_whitespace().next()?.parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASKED: Demand = Demand {
        prompt_tokens: 32,
        tokens: 64,
        max_seq_len: 4096,
        is_reserved: true,
        dtype: DType::F32,
    };

    fn check(demand: Demand, memory_bytes: usize) -> Result<(), DemandError> {
        demand.check_with(&Config::small().unwrap(), Some(memory_bytes))
    }

    #[test]
    fn more_tokens_than_positions_are_refused() {
        let most = Demand {
            prompt_tokens: 4090,
            tokens: 7,
            ..ASKED
        };
        check(most, usize::MAX).unwrap();
        for (prompt_tokens, tokens) in [(4090, 8), (4097, 1), (usize::MAX, 1), (1, usize::MAX)] {
            let asked = Demand {
                prompt_tokens,
                tokens,
                ..ASKED
            };
            let refused = DemandError::BeyondPositions {
                prompt_tokens,
                tokens,
                positions: 4096,
            };
            assert_eq!(check(asked, usize::MAX), Err(refused));
        }
    }

    #[test]
    fn caches_for_more_than_all_positions_are_refused() {
        for max_seq_len in [4097, usize::MAX] {
            let asked = Demand {
                max_seq_len,
                ..ASKED
            };
            let refused = DemandError::CachesBeyondPositions {
                max_seq_len,
                positions: 4096,
            };
            assert_eq!(check(asked, usize::MAX), Err(refused));
        }
    }

    #[test]
    fn what_is_larger_than_memory_is_refused_with_both_sizes() {
        let elements = Config::small().unwrap().elements().unwrap();
        // Keys and values of 8 layers, 2 heads of 64, in 4096 tokens.
        let needed_bytes = 4 * elements + 2 * 8 * 2 * 64 * 4096 * 4;
        check(ASKED, needed_bytes).unwrap();
        let refused = DemandError::BeyondMemory {
            needed_bytes,
            memory_bytes: needed_bytes - 1,
        };
        assert_eq!(check(ASKED, needed_bytes - 1), Err(refused));
        let growing = Demand {
            is_reserved: false,
            ..ASKED
        };
        check(growing, needed_bytes - 1).unwrap();
    }

    #[test]
    fn the_system_tells_its_memory() {
        assert!(host_bytes().is_some_and(|bytes| bytes > 1 << 20));
    }
}
