//! How large everything is.

/// Sizes of all work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Layers, each with keys and values.
    pub layers: usize,
    /// Tokens that are decoded one by one in the measurement of the mean.
    pub decoded: [usize; 2],
    /// How many of them make a sample.
    pub stretch: usize,
    /// Tokens whose memory is measured.
    pub held: [usize; 3],
    /// Steps among which the worst is looked for.
    pub steps: usize,
    /// Rows and columns of the matrix in such a step.
    pub matrix: usize,
    /// Keys that a query meets.
    pub keys: [usize; 4],
    /// Tokens in the decoder's caches before anything is timed.
    pub context: usize,
    /// Tokens that the decoder generates for a sample.
    pub generated: usize,
    /// Rounds of the decoder.
    pub decoder_rounds: usize,
    /// Layers of the paged cache.
    pub paged_layers: usize,
    /// Sequences in the paged cache.
    pub sequences: usize,
    /// Blocks of the shortest sequence in the paged cache. The longest are three times as long.
    pub blocks: usize,
}

impl Sizes {
    /// Those of the figures.
    pub const FULL: Self = Self {
        layers: 32,
        decoded: [4096, 16_384],
        stretch: 64,
        held: [1000, 10_000, 100_000],
        steps: 16_384,
        matrix: 1024,
        keys: [1024, 8192, 32_768, 131_072],
        context: 8192,
        generated: 16,
        decoder_rounds: 25,
        paged_layers: 32,
        sequences: 64,
        blocks: 64,
    };

    /// Those that show on a CPU, in seconds, that everything runs. The paged cache keeps its
    /// blocks, as its figure is a count.
    pub const SMALL: Self = Self {
        layers: 2,
        decoded: [32, 64],
        stretch: 8,
        held: [20, 40, 80],
        steps: 32,
        matrix: 16,
        keys: [16, 32, 64, 128],
        context: 24,
        generated: 3,
        decoder_rounds: 2,
        paged_layers: 1,
        sequences: 48,
        ..Self::FULL
    };
}
