//! What memory models hold, by what it is, and what work they have.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

/// The memory of all models, and the work of each, at about one moment.
///
/// The parts of all models, [`unowned_bytes`](Self::unowned_bytes) and
/// [`free_bytes`](Self::free_bytes) add up to [`limit_bytes`](Self::limit_bytes), unless more is
/// committed than the limit allows, which a limit that was lowered makes possible. Then nothing is
/// free.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// What all models may hold, in bytes.
    pub limit_bytes: usize,
    /// What is committed and belongs to no model, in bytes.
    pub unowned_bytes: usize,
    /// What is not committed, in bytes.
    pub free_bytes: usize,
    /// Each model, in the order in which the server lists them.
    pub models: Vec<ModelFigures>,
}

/// The memory and the work of one model.
///
/// Memory is committed in pages, and a page can hold blocks of several sequences and of the prefix
/// cache. So what the pages hold is divided in proportion to the blocks that keep them:
/// [`live_bytes`](Self::live_bytes) gets the part of the blocks that sequences use,
/// [`prefix_bytes`](Self::prefix_bytes) that of the blocks that only the prefix cache holds, and
/// [`other_bytes`](Self::other_bytes) that of the blocks that nothing uses but that keep their
/// memory. With the static policy these are most of the blocks. The blocks are counted after a
/// model's step and the pages when they are asked for, so the division is a step late at most.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelFigures {
    /// The name that requests give.
    pub id: String,
    /// Pages that sequences use, in bytes.
    pub live_bytes: usize,
    /// Pages that only the prefix cache holds, in bytes.
    pub prefix_bytes: usize,
    /// Memory made before it is needed, in bytes.
    pub ahead_bytes: usize,
    /// What else is committed for the model, in bytes: blocks that nothing uses, parked and
    /// retiring memory, slack; also its weights, if it can sleep.
    pub other_bytes: usize,
    /// Sequences that have memory.
    pub running: usize,
    /// Sequences that have none.
    pub waiting: usize,
    /// Tokens that were generated since the model was made.
    pub generated_tokens: u64,
    /// Whether the model sleeps.
    pub is_asleep: bool,
}

impl ModelFigures {
    /// What is committed for the model, in bytes: the sum of the parts.
    pub fn committed_bytes(&self) -> usize {
        self.live_bytes + self.prefix_bytes + self.ahead_bytes + self.other_bytes
    }
}
