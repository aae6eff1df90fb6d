//! One physical allocation behind one or many pages.

/// What is happening to a chunk: one physical allocation behind one or many pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ChunkState {
    /// Being made; the pages are the reservation of that work.
    Filling,
    /// Mapped and accessible. Its pages without live bytes are slack.
    Backed,
    /// No byte is live, but the device may still use it.
    Retiring,
    /// No byte is live and the device has finished, but it is still mapped.
    Parked,
    /// Being unmapped; the pages are the reservation of that work.
    Draining,
    /// The driver refused to unmap it. Never handed out; retried.
    Quarantined,
    /// Its live pages are being moved to other memory; the pages are the reservation of that work.
    Relocating,
    /// A move was broken off and the driver would not map it again. Its bytes are live and safe,
    /// and nobody reaches them; retried.
    Stranded,
}

/// What is in a chunk in which nobody has a byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Contents {
    /// What its last users left.
    Unknown,
    /// Nobody's: it was overwritten, or will be when it is parked, or nobody ever had it.
    Clean,
    /// What its last users left, and it could not be overwritten.
    Stuck,
}

#[derive(Debug)]
pub(super) struct Chunk<M> {
    /// Counts of pages, kept small: there can be a chunk for every page.
    pub(super) pages: u32,
    pub(super) live_pages: u32,
    pub(super) state: ChunkState,
    /// Whether it was parked, and nobody has had a byte in it since.
    pub(super) untouched: bool,
    pub(super) contents: Contents,
    /// Whether it was made before anyone asked for it, and nobody has had a byte in it.
    pub(super) ahead: bool,
    /// Absent while Filling, Draining, Relocating or Stranded, when the thread that does that work
    /// has it.
    pub(super) memory: Option<M>,
}

impl<M> Chunk<M> {
    pub(super) fn pages(&self) -> usize {
        self.pages as usize
    }

    /// Whether it is parked and someone had bytes in it before, so that it was not made ahead.
    pub(super) fn is_parked(&self) -> bool {
        self.state == ChunkState::Parked && !self.ahead
    }

    /// Someone has bytes in it now.
    pub(super) fn taken(&mut self) {
        self.untouched = false;
        self.contents = Contents::Unknown;
        self.ahead = false;
    }
}
