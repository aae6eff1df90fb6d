//! Plots as SVG.

use crate::contest::{Contest, Pool};
use crate::ramps::Ramps;
use anyhow::{Context, Result};
use cuda_vmm_benches::serving::Served;
use plotters::prelude::*;
use std::path::Path;

const GIB: f64 = (1_u64 << 30) as f64;

fn colour(pool: Pool) -> RGBColor {
    match pool {
        Pool::StaticSplit => RGBColor(200, 30, 30),
        Pool::PageAtATime => RGBColor(200, 130, 20),
        Pool::Ours => RGBColor(40, 130, 60),
        Pool::Ideal => RGBColor(40, 40, 40),
    }
}

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
    for pool in Pool::ALL {
        let style = colour(pool).stroke_width(2);
        let points = peaks().zip(ramps.iter().map(|(_, contest)| contest.p99_ms(pool)));
        chart
            .draw_series(LineSeries::new(points, style))?
            .label(pool.name())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], style));
    }
    for (label, pool) in [
        ("static, published", Pool::StaticSplit),
        ("KVCached, published", Pool::PageAtATime),
    ] {
        let style = colour(pool).filled();
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
    let root = SVGBackend::new(path, (1_000, 1_100)).into_drawing_area();
    root.fill(&WHITE)?;
    let of = &contest.name;
    let title = format!("{of}: memory held by each model, the first at the bottom");
    let titled = root.titled(&title, ("sans-serif", 24))?;
    let charts = titled.split_evenly((Pool::ALL.len(), 1));
    let most = |of: fn(&Served) -> u64| {
        let values = Pool::ALL.map(|pool| of(contest.of(pool)));
        values.into_iter().max().unwrap_or_default() as f64
    };
    let end_ns = most(|served| served.over_time.last().map_or(0, |moment| moment.at_ns));
    let most_gib = most(|served| served.held_bytes_max) / GIB;
    for (pool, area) in Pool::ALL.into_iter().zip(&charts) {
        let mut chart = ChartBuilder::on(area)
            .caption(pool.name(), ("sans-serif", 18))
            .margin(8)
            .set_left_and_bottom_label_area_size(48)
            .build_cartesian_2d(0.0..(end_ns / 1e9).max(1.0), 0.0..most_gib * 1.05)?;
        chart
            .configure_mesh()
            .x_desc("simulated seconds")
            .y_desc("GiB")
            .light_line_style(WHITE.mix(0.0))
            .draw()?;
        let moments = &contest.of(pool).over_time;
        let models = moments.first().map_or(0, |moment| moment.held_bytes.len());
        // Stacked areas, the highest first, so that the lower ones cover it.
        for model in (0..models).rev() {
            let colour = Palette99::pick(model);
            let points = moments.iter().map(|moment| {
                let bytes: u64 = moment.held_bytes[..=model].iter().sum();
                (moment.at_ns as f64 / 1e9, bytes as f64 / GIB)
            });
            let area = AreaSeries::new(points, 0.0, colour.filled());
            chart.draw_series(area.border_style(&colour))?;
        }
    }
    Ok(root.present()?)
}
