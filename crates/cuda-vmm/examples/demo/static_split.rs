//! The same memory split between the models once and for all, as bookkeeping.
//!
//! Favours the split: a request takes whole pages and nothing more, and no call costs time.

use anyhow::Result;

use crate::replay::{Answer, KvMemory, Place};
use crate::workload::Workload;

/// A fixed share for each model.
#[derive(Clone, Debug)]
pub struct StaticSplit {
    page_bytes: u64,
    shares: Vec<Share>,
}

#[derive(Clone, Copy, Debug)]
struct Share {
    bytes_per_token: u64,
    pages: u64,
    free_pages: u64,
}

impl StaticSplit {
    /// Splits `limit_bytes` into whole pages in proportion to `weights`, one for each model; their
    /// sum is positive.
    pub fn new(workload: &Workload, limit_bytes: u64, page_bytes: u64, weights: &[f64]) -> Self {
        let sum: f64 = weights.iter().sum();
        let limit_pages = limit_bytes / page_bytes;
        let shares = workload
            .services
            .iter()
            .zip(weights)
            .map(|(service, weight)| {
                let pages = (limit_pages as f64 * (weight / sum)) as u64;
                Share {
                    bytes_per_token: service.model.bytes_per_token,
                    pages,
                    free_pages: pages,
                }
            });
        Self {
            page_bytes,
            shares: shares.collect(),
        }
    }

    /// Each model's share, in bytes.
    pub fn shares_bytes(&self) -> Vec<u64> {
        self.shares
            .iter()
            .map(|share| share.pages * self.page_bytes)
            .collect()
    }

    fn pages(&self, model: usize, tokens: u32) -> u64 {
        let bytes = u64::from(tokens) * self.shares[model].bytes_per_token;
        bytes.div_ceil(self.page_bytes)
    }
}

impl KvMemory for StaticSplit {
    fn grow(&mut self, place: Place, held_tokens: u32, tokens: u32) -> Result<Answer> {
        let held_pages = self.pages(place.model, held_tokens);
        let more_pages = self.pages(place.model, held_tokens + tokens) - held_pages;
        let share = &mut self.shares[place.model];
        if more_pages > share.free_pages {
            return Ok(Answer::Refused);
        }
        share.free_pages -= more_pages;
        Ok(Answer::Granted)
    }

    fn give_back(&mut self, place: Place, tokens: u32) -> Result<()> {
        self.shares[place.model].free_pages += self.pages(place.model, tokens);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{BATCH, CHAT};
    use crate::workload::Service;

    const PAGE: u64 = 2 << 20;
    /// Tokens of the chat model in a page.
    const PAGE_TOKENS: u32 = (PAGE / CHAT.bytes_per_token) as u32;

    fn split(pages: u64, weights: [f64; 2]) -> StaticSplit {
        let service = |model| Service {
            model,
            requests: Vec::new(),
        };
        let workload = Workload {
            services: vec![service(CHAT), service(BATCH)],
        };
        StaticSplit::new(&workload, pages * PAGE, PAGE, &weights)
    }

    fn grow(split: &mut StaticSplit, model: usize, held: u32, tokens: u32) -> Answer {
        split
            .grow(Place { model, slot: 0 }, held, tokens)
            .expect("bookkeeping cannot fail")
    }

    #[test]
    fn shares_follow_the_weights_in_whole_pages() {
        assert_eq!(split(7, [1.0, 1.0]).shares_bytes(), [3 * PAGE, 3 * PAGE]);
        assert_eq!(split(8, [3.0, 1.0]).shares_bytes(), [6 * PAGE, 2 * PAGE]);
        assert_eq!(split(8, [0.0, 1.0]).shares_bytes(), [0, 8 * PAGE]);
    }

    #[test]
    fn a_model_cannot_use_the_others_share() {
        let mut split = split(4, [1.0, 1.0]);
        assert_eq!(grow(&mut split, 0, 0, 2 * PAGE_TOKENS), Answer::Granted);
        assert_eq!(grow(&mut split, 0, 2 * PAGE_TOKENS, 1), Answer::Refused);
        assert_eq!(grow(&mut split, 1, 0, 1), Answer::Granted);
        split
            .give_back(Place { model: 0, slot: 0 }, 2 * PAGE_TOKENS)
            .expect("bookkeeping");
        assert_eq!(grow(&mut split, 0, 0, 1), Answer::Granted);
    }

    #[test]
    fn tokens_within_a_page_cost_no_other_page() {
        let mut split = split(2, [1.0, 1.0]);
        assert_eq!(grow(&mut split, 0, 0, 1), Answer::Granted);
        for held in 1..PAGE_TOKENS {
            assert_eq!(grow(&mut split, 0, held, 1), Answer::Granted);
        }
        assert_eq!(grow(&mut split, 0, PAGE_TOKENS, 1), Answer::Refused);
        // A refusal changes nothing: giving back the held tokens frees exactly the share.
        split
            .give_back(Place { model: 0, slot: 0 }, PAGE_TOKENS)
            .expect("bookkeeping");
        assert_eq!(grow(&mut split, 0, 0, PAGE_TOKENS), Answer::Granted);
        assert_eq!(grow(&mut split, 0, 0, 1), Answer::Refused);
    }
}
