//! Plots as SVG: lines that are seen even if they coincide, and memory over time.

use crate::serving::Moment;
use anyhow::{Context, Result};
use plotters::coord::ranged1d::Ranged;
use plotters::prelude::*;
use std::ops::Range;
use std::path::Path;

const GIB: f64 = (1_u64 << 30) as f64;

type Chart<'a, 'b, X, Y> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<X, Y>>;

/// A line's look. A wide line shows on both sides of a narrower one that is drawn over it.
#[derive(Clone, Copy, Debug)]
pub struct Stroke {
    pub colour: RGBColor,
    pub width: u32,
    pub is_dashed: bool,
    pub marker: Marker,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Marker {
    Circle,
    Cross,
    Dot,
    Triangle,
}

/// The looks of the four pools, in the order of the tables: static split, page at a time, elastic,
/// ideal. No two have the same colour, width or marker.
pub const STROKES: [Stroke; 4] = {
    const fn stroke(rgb: (u8, u8, u8), width: u32, is_dashed: bool, marker: Marker) -> Stroke {
        Stroke {
            colour: RGBColor(rgb.0, rgb.1, rgb.2),
            width,
            is_dashed,
            marker,
        }
    }
    [
        stroke((200, 30, 30), 2, false, Marker::Triangle),
        stroke((225, 150, 40), 5, false, Marker::Cross),
        stroke((120, 200, 140), 9, false, Marker::Dot),
        stroke((30, 30, 30), 1, true, Marker::Circle),
    ]
};

/// A line's name, look and points.
pub type Line<'a> = (&'a str, Stroke, Vec<(f64, f64)>);

/// Points with a name.
pub type Points<'a> = (&'a str, RGBColor, Vec<(f64, f64)>);

/// Draws p99 times to first token by the peak of each ramp, with points of others beside the lines.
pub fn draw_peaks(
    title: &str,
    (peaks, ms): (Range<f64>, Range<f64>),
    lines: &[Line],
    points: &[Points],
    path: &Path,
) -> Result<()> {
    let root = SVGBackend::new(path, (1_000, 640)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 24))
        .margin(12)
        .set_left_and_bottom_label_area_size(64)
        .build_cartesian_2d(peaks, ms.log_scale())?;
    chart
        .configure_mesh()
        .x_desc("peak of each ramp (requests a second)")
        .y_desc("milliseconds")
        .x_label_formatter(&|value| format!("{value:.0}"))
        .y_label_formatter(&|value| format!("{value:.0}"))
        .light_line_style(WHITE.mix(0.0))
        .draw()?;
    draw_lines(&mut chart, lines)?;
    for (name, colour, points) in points {
        let style = colour.filled();
        let points = points.iter().copied();
        chart
            .draw_series(points.map(|point| Circle::new(point, 5, style)))?
            .label(*name)
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

/// Draws lines with their names, the widest first. Points that are no numbers are left out.
fn draw_lines<X, Y>(chart: &mut Chart<'_, '_, X, Y>, lines: &[Line]) -> Result<()>
where
    X: Ranged<ValueType = f64>,
    Y: Ranged<ValueType = f64>,
{
    let mut lines: Vec<_> = lines.iter().collect();
    lines.sort_by_key(|(_, stroke, _)| std::cmp::Reverse(stroke.width));
    for (name, stroke, points) in lines {
        let points = points.iter().copied();
        let points: Vec<_> = points.filter(|(x, y)| (x + y).is_finite()).collect();
        let style = stroke.colour.stroke_width(stroke.width);
        if stroke.is_dashed {
            let series = DashedLineSeries::new(points.clone(), 8, 6, style);
            chart.draw_series(series)?
        } else {
            chart.draw_series(LineSeries::new(points.clone(), style))?
        }
        .label(*name)
        .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], style));
        let (points, filled) = (points.into_iter(), stroke.colour.filled());
        match stroke.marker {
            Marker::Circle => {
                let style = stroke.colour.stroke_width(1);
                chart.draw_series(points.map(|at| Circle::new(at, 6, style)))?;
            }
            Marker::Cross => {
                let style = stroke.colour.stroke_width(2);
                chart.draw_series(points.map(|at| Cross::new(at, 6, style)))?;
            }
            Marker::Dot => {
                chart.draw_series(points.map(|at| Circle::new(at, 8, filled)))?;
            }
            Marker::Triangle => {
                chart.draw_series(points.map(|at| TriangleMarker::new(at, 6, filled)))?;
            }
        }
    }
    Ok(())
}

/// Draws what each model held over time, a chart for each pool, to a file. `time` says which time.
pub fn draw_memory(
    title: &str,
    time: &str,
    pools: &[(&str, &[Moment])],
    path: &Path,
) -> Result<()> {
    let root = SVGBackend::new(path, (1_000, 1_100)).into_drawing_area();
    root.fill(&WHITE)?;
    let titled = root.titled(title, ("sans-serif", 24))?;
    let charts = titled.split_evenly((pools.len(), 1));
    let moments = || pools.iter().flat_map(|(_, moments)| *moments);
    let end_ns = moments().map(|moment| moment.at_ns).max();
    let end_ns = end_ns.context("no memory over time")?;
    let held = moments().map(|moment| moment.held_bytes.iter().sum());
    let most_gib = held.max().unwrap_or(0_u64) as f64 / GIB;
    for ((pool, moments), area) in pools.iter().zip(&charts) {
        let mut chart = ChartBuilder::on(area)
            .caption(pool, ("sans-serif", 18))
            .margin(8)
            .set_left_and_bottom_label_area_size(48)
            .build_cartesian_2d(0.0..(end_ns as f64 / 1e9).max(1.0), 0.0..most_gib * 1.05)?;
        chart
            .configure_mesh()
            .x_desc(time)
            .y_desc("GiB")
            .light_line_style(WHITE.mix(0.0))
            .draw()?;
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
