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
    /// but out of reach; retried.
    Stranded,
    /// The same, and a thread tries to map it again.
    Restoring,
}

/// What is in a chunk that has no live byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Contents {
    /// What its last users left.
    Unknown,
    /// No owner's bytes: it was overwritten, or will be when it is parked, or never had live bytes.
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
    /// Whether it was parked, and has had no live byte since.
    pub(super) untouched: bool,
    pub(super) contents: Contents,
    /// Whether it was made before any allocation needed it, and has never had a live byte.
    pub(super) ahead: bool,
    /// Whether other ranges map its memory too. Then it is in none of this range's parts, and when
    /// it is parked, it is only to be unmapped.
    pub(super) shared: bool,
    /// Absent while Filling, Draining, Relocating, Stranded or Restoring, when the thread that does
    /// that work has it.
    pub(super) memory: Option<M>,
}

impl<M> Chunk<M> {
    pub(super) fn pages(&self) -> usize {
        self.pages as usize
    }

    /// Whether it is parked to be taken back, and had live bytes before, so that it was not made
    /// ahead.
    pub(super) fn is_parked(&self) -> bool {
        self.state == ChunkState::Parked && !self.ahead && !self.shared
    }

    /// It has live bytes now.
    pub(super) fn taken(&mut self) {
        self.untouched = false;
        self.contents = Contents::Unknown;
        self.ahead = false;
    }
}
