//! Plots as SVG.

use crate::contest::{Contest, Pool};
use crate::ramps::Ramps;
use anyhow::{Context, Result};
use cuda_vmm_benches::plot::{self, STROKES};
use plotters::prelude::*;
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
    let root = SVGBackend::new(path, (1_000, 640)).into_drawing_area();
    root.fill(&WHITE)?;
    let peaks = || ramps.iter().map(|(point, _)| f64::from(point.peak));
    let ends = peaks().next().zip(peaks().next_back());
    let (first, last) = ends.context("no peaks")?;
    let title = "Three models on one GPU: p99 time to first token";
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 24))
        .margin(12)
        .set_left_and_bottom_label_area_size(64)
        .build_cartesian_2d(first..last, (50.0..100_000.0).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("peak of each ramp (requests a second)")
        .y_desc("milliseconds")
        .x_label_formatter(&|value| format!("{value:.0}"))
        .y_label_formatter(&|value| format!("{value:.0}"))
        .light_line_style(WHITE.mix(0.0))
        .draw()?;
    let lines = Pool::ALL.map(|pool| {
        let p99_ms = ramps.iter().map(|(_, contest)| contest.p99_ms(pool));
        (
            pool.name(),
            STROKES[pool as usize],
            peaks().zip(p99_ms).collect(),
        )
    });
    plot::draw_lines(&mut chart, &lines)?;
    for (label, pool) in [
        ("static, published", Pool::StaticSplit),
        ("KVCached, published", Pool::PageAtATime),
    ] {
        let style = STROKES[pool as usize].colour.filled();
        let published = ramps.iter().map(|(point, _)| match pool {
            Pool::StaticSplit => point.static_ms,
            _ => point.elastic_ms,
        });
        let points = peaks().zip(published);
        chart
            .draw_series(points.map(|point| Circle::new(point, 5, style)))?
            .label(label)
            .legend(move |(x, y)| Circle::new((x + 10, y), 5, style));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK)
        .draw()?;
    Ok(root.present()?)
}

/// What each model held over time, a chart for each pool.
fn draw_memory(contest: &Contest, path: &Path) -> Result<()> {
    let of = &contest.name;
    let title = format!("{of}: memory held by each model, the first at the bottom");
    let pools = Pool::ALL.map(|pool| (pool.name(), &*contest.of(pool).over_time));
    plot::draw_memory(&title, "simulated seconds", &pools, path)
}
