//! What KVCached published of workload (a): p99 time to first token, in milliseconds.

/// One peak of the published curves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// Requests a second at the top of each ramp.
    pub peak: u32,
    /// With the static split.
    pub static_ms: f64,
    /// With KVCached.
    pub elastic_ms: f64,
}

const fn point(peak: u32, static_ms: f64, elastic_ms: f64) -> Point {
    Point {
        peak,
        static_ms,
        elastic_ms,
    }
}

/// Three 8B models on one 80 GB A100.
pub const CURVES: [Point; 7] = [
    point(12, 194.0, 211.0),
    point(14, 243.0, 260.0),
    point(15, 5_184.0, 297.0),
    point(16, 9_086.0, 322.0),
    point(17, 12_159.0, 1_555.0),
    point(18, 13_489.0, 4_548.0),
    point(20, 15_267.0, 12_310.0),
];
