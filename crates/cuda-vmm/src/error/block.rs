//! What can go wrong with blocks, with the values that went wrong.

/// A request about blocks that cannot be granted. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BlockError {
    /// There is no block of this number.
    #[error("no block {block}: there are {blocks}")]
    Invalid {
        /// The number asked for.
        block: usize,
        /// How many blocks there are.
        blocks: usize,
    },
    /// No tensor has this index.
    #[error("no tensor {tensor}: there are {tensors}")]
    InvalidTensor {
        /// The index asked for.
        tensor: usize,
        /// How many tensors there are.
        tensors: usize,
    },
    /// No tensor has this name.
    #[error("no tensor is named {tensor:?}")]
    UnknownTensor {
        /// The name asked for.
        tensor: String,
    },
    /// The block has no memory behind it.
    #[error("block {block} is not backed")]
    NotBacked {
        /// The block.
        block: usize,
    },
    /// A pin, or a call that is under way, keeps the block where it is.
    #[error("block {block} is pinned")]
    Pinned {
        /// The block.
        block: usize,
    },
    /// The block was backed, pinned or given up after the plan was made.
    #[error("the plan is stale: block {block} was used since it was made")]
    StalePlan {
        /// The block; it is one of the plan's, or shares a page that the plan would empty.
        block: usize,
    },
    /// The plan was made by another backing.
    #[error("the plan is another backing's")]
    ForeignPlan,
    /// Blocks cannot be moved on a stream that is being captured: the copies would run when the
    /// graph does.
    #[error("the stream is being captured, and the plan moves {moves} blocks")]
    Capturing {
        /// How many blocks the plan moves.
        moves: usize,
    },
    /// Blocks cannot be zeroed on a stream that is being captured: the zeros would run when the
    /// graph does.
    #[error("the stream is being captured, and {blocks} blocks are to be zeroed on it")]
    CapturingZeros {
        /// How many blocks would be backed anew.
        blocks: usize,
    },
    /// Fewer blocks are unused than were asked for.
    #[error("out of blocks: {asked} asked, {free} of {blocks} unused")]
    OutOfBlocks {
        /// How many were asked for.
        asked: usize,
        /// How many are unused.
        free: usize,
        /// How many there are.
        blocks: usize,
    },
    /// The allocator has not handed the block out, or it is being given up.
    #[error("block {block} is not allocated")]
    NotAllocated {
        /// The block.
        block: usize,
    },
    /// Two tensors of one specification have this name.
    #[error("two tensors are named {tensor:?}")]
    DuplicateTensor {
        /// The name.
        tensor: String,
    },
    /// The host has no memory for a record of this many blocks.
    #[error("{blocks} blocks are too many: the host has no memory for {each_bytes} bytes for each")]
    TooMany {
        /// How many blocks were asked for.
        blocks: usize,
        /// What each takes in bytes.
        each_bytes: usize,
    },
    /// A product of sizes does not fit in an address.
    #[error("{what}: {count} times {each_bytes} bytes overflows")]
    Overflow {
        /// What was to be measured.
        what: &'static str,
        /// How many.
        count: usize,
        /// The size of each in bytes.
        each_bytes: usize,
    },
}

impl BlockError {
    /// Whether the same call fails for good, whatever else happens meanwhile.
    pub(crate) fn is_permanent(&self) -> bool {
        match self {
            Self::Invalid { .. }
            | Self::InvalidTensor { .. }
            | Self::UnknownTensor { .. }
            | Self::StalePlan { .. }
            | Self::ForeignPlan
            | Self::DuplicateTensor { .. }
            | Self::Overflow { .. } => true,
            Self::OutOfBlocks { asked, blocks, .. } => asked > blocks,
            Self::NotBacked { .. }
            | Self::Pinned { .. }
            | Self::Capturing { .. }
            | Self::CapturingZeros { .. }
            | Self::TooMany { .. }
            | Self::NotAllocated { .. } => false,
        }
    }
}
