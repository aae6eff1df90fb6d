//! Plots as SVG.

use crate::contest::{Contest, Pool};
use crate::ramps::Ramps;
use anyhow::{Context, Result};
use cuda_vmm_benches::plot::{self, STROKES};
use std::path::Path;

/// Draws the curves of workload (a), and memory over time of each contest, into a folder.
pub fn draw(folder: &Path, ramps: &Ramps, contests: &[(String, &Contest)]) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    let file = |name: &str| folder.join(format!("{name}.svg"));
    draw_curves(ramps, &file("ramps")).context("cannot draw the curves")?;
    contests.iter().try_for_each(|(name, contest)| {
        draw_memory(contest, &file(name)).with_context(|| format!("cannot draw {name}"))
    })
}

/// p99 time to first token by peak, simulated and published.
fn draw_curves(ramps: &Ramps, path: &Path) -> Result<()> {
    let peaks = || ramps.iter().map(|(point, _)| f64::from(point.peak));
    let ends = peaks().next().zip(peaks().next_back());
    let (first, last) = ends.context("no peaks")?;
    let lines = Pool::ALL.map(|pool| {
        let p99_ms = ramps.iter().map(|(_, contest)| contest.p99_ms(pool));
        (
            pool.name(),
            STROKES[pool as usize],
            peaks().zip(p99_ms).collect(),
        )
    });
    let published = [
        ("static, published", Pool::StaticSplit),
        ("KVCached, published", Pool::PageAtATime),
    ];
    let published = published.map(|(label, pool)| {
        let ms = ramps.iter().map(|(point, _)| match pool {
            Pool::StaticSplit => point.static_ms,
            _ => point.elastic_ms,
        });
        let colour = STROKES[pool as usize].colour;
        (label, colour, peaks().zip(ms).collect())
    });
    let title = "Three models on one GPU: p99 time to first token";
    let ranges = (first..last, 50.0..100_000.0);
    plot::draw_peaks(title, ranges, &lines, &published, path)
}

/// What each model held over time, a chart for each pool.
fn draw_memory(contest: &Contest, path: &Path) -> Result<()> {
    let of = &contest.name;
    let title = format!("{of}: memory held by each model, the first at the bottom");
    let pools = Pool::ALL.map(|pool| (pool.name(), &*contest.of(pool).over_time));
    plot::draw_memory(&title, "simulated seconds", &pools, path)
}
