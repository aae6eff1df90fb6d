//! The cost of calls and work on the virtual clocks.

/// A cost in nanoseconds by size in bytes. It interpolates linearly between measured points, is
/// constant below the first, and extrapolates beyond the last.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Curve(&'static [(u64, u64)]);

impl Curve {
    /// Returns the cost of a call on `bytes`, in nanoseconds.
    pub(crate) fn at(self, bytes: usize) -> u64 {
        let bytes = bytes as u64;
        let points = self.0;
        let Some(&(first_bytes, first_ns)) = points.first() else {
            return 0;
        };
        if bytes <= first_bytes || points.len() == 1 {
            return first_ns;
        }
        let upper = points
            .iter()
            .position(|&(size, _)| size >= bytes)
            .unwrap_or(points.len() - 1);
        let (low_bytes, low_ns) = points[upper - 1];
        let (high_bytes, high_ns) = points[upper];
        let slope = (high_ns as f64 - low_ns as f64) / (high_bytes - low_bytes) as f64;
        (low_ns as f64 + slope * (bytes - low_bytes) as f64).max(0.0) as u64
    }
}

/// Latencies of driver calls and speeds of device work.
///
/// Every thread has a virtual clock, every stream has one, and the driver has one virtual lock:
/// - A call that changes memory starts when its thread and the lock are free, and moves both to its
///   end.
/// - Work on a stream starts when the stream is free and the work was enqueued, and moves the
///   stream's clock.
/// - Synchronization moves the thread's clock to the stream's.
///
/// Nothing sleeps, and no query waits for virtual time.
#[derive(Clone, Debug)]
pub struct CostModel {
    pub(crate) reserve: Curve,
    pub(crate) address_free: Curve,
    pub(crate) create: Curve,
    pub(crate) release: Curve,
    pub(crate) map: Curve,
    pub(crate) unmap: Curve,
    pub(crate) unmap_peer: Curve,
    pub(crate) set_access: Curve,
    pub(crate) set_access_peer: Curve,
    pub(crate) export: Curve,
    pub(crate) import: Curve,
    pub(crate) plain_alloc: Curve,
    pub(crate) plain_free: Curve,
    pub(crate) async_alloc: Curve,
    pub(crate) async_free: Curve,
    /// The calling thread's cost of enqueueing work.
    pub(crate) launch_ns: u64,
    /// Bytes that a device writes or copies per nanosecond.
    pub(crate) device_bytes_per_ns: f64,
    /// Bytes that are copied between host and device per nanosecond.
    pub(crate) host_bytes_per_ns: f64,
}

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

impl CostModel {
    /// Returns medians measured on one H100 80GB HBM3 with driver 580 (CUDA 13.0); peer costs on
    /// two.
    pub fn h100() -> Self {
        Self {
            reserve: Curve(&[(0, 2_000)]),
            address_free: Curve(&[(0, 5_000)]),
            create: Curve(&[
                (2 * MIB, 7_600),
                (16 * MIB, 7_600),
                (32 * MIB, 14_100),
                (64 * MIB, 8_200),
                (128 * MIB, 9_600),
                (256 * MIB, 22_900),
                (512 * MIB, 27_400),
                (GIB, 39_300),
                (4 * GIB, 419_400),
            ]),
            release: Curve(&[
                (2 * MIB, 9_700),
                (16 * MIB, 16_400),
                (32 * MIB, 17_800),
                (64 * MIB, 27_600),
                (128 * MIB, 54_200),
                (GIB, 290_800),
                (4 * GIB, 1_419_100),
            ]),
            map: Curve(&[
                (2 * MIB, 600),
                (64 * MIB, 600),
                (GIB, 800),
                (4 * GIB, 6_300),
            ]),
            unmap: Curve(&[
                (2 * MIB, 14_000),
                (16 * MIB, 14_200),
                (32 * MIB, 21_800),
                (64 * MIB, 21_700),
                (GIB, 30_400),
                (4 * GIB, 77_600),
            ]),
            unmap_peer: Curve(&[(2 * MIB, 58_300), (32 * MIB, 75_100), (GIB, 72_400)]),
            set_access: Curve(&[
                (2 * MIB, 19_700),
                (16 * MIB, 19_900),
                (32 * MIB, 34_400),
                (64 * MIB, 34_400),
                (256 * MIB, 36_300),
                (GIB, 59_100),
                (4 * GIB, 207_400),
            ]),
            set_access_peer: Curve(&[(2 * MIB, 949_900), (32 * MIB, 989_400), (GIB, 9_401_800)]),
            export: Curve(&[(32 * MIB, 283_200), (64 * MIB, 780_900)]),
            import: Curve(&[(0, 20_300)]),
            plain_alloc: Curve(&[(2 * MIB, 35_800), (64 * MIB, 53_100), (GIB, 87_300)]),
            plain_free: Curve(&[(2 * MIB, 30_300), (64 * MIB, 67_400), (GIB, 330_000)]),
            async_alloc: Curve(&[(2 * MIB, 1_200), (64 * MIB, 54_600), (GIB, 968_600)]),
            async_free: Curve(&[(2 * MIB, 1_100), (64 * MIB, 71_800), (GIB, 1_247_300)]),
            launch_ns: 3_210,
            device_bytes_per_ns: 3_026.0,
            host_bytes_per_ns: 55.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_meet_their_points_and_run_straight_between_them() {
        let curve = Curve(&[(100, 10), (200, 30), (300, 20)]);
        assert_eq!(
            [0, 100, 200, 300].map(|bytes| curve.at(bytes)),
            [10, 10, 30, 20]
        );
        assert_eq!([150, 250].map(|bytes| curve.at(bytes)), [20, 25]);
        assert_eq!(curve.at(400), 10, "continued with the last slope");
        assert_eq!(curve.at(4000), 0, "a cost is never negative");
        assert_eq!(Curve(&[(7, 5)]).at(1 << 40), 5);
    }
}
