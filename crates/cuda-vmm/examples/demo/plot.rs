//! Memory and refusals over time as an SVG.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::figures::{Figures, Moment};
use crate::table::{count, gib};

const SIZE: (u32, u32) = (1_200, 860);
const REFUSALS_HEIGHT: u32 = 290;
/// Height of the memory chart in limits, so that the legend stands above the limit.
const LEGEND_ROOM: f64 = 1.32;
const MODEL_COLOURS: [RGBColor; 3] = [
    RGBColor(78, 121, 167),
    RGBColor(242, 142, 43),
    RGBColor(118, 183, 178),
];
const COMMITTED_COLOUR: RGBColor = RGBColor(40, 40, 40);
const LIMIT_COLOUR: RGBColor = RGBColor(200, 30, 30);
const ELASTIC_COLOUR: RGBColor = RGBColor(40, 130, 60);

/// Requests refused so far, of one of the two.
type Refused = fn(&Moment) -> u64;
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws the figures into `path`.
pub fn draw(figures: &Figures, path: &Path) -> Result<()> {
    let failed = |error: &dyn std::fmt::Display| anyhow!("cannot draw {}: {error}", path.display());
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    draw_all(figures, &root).map_err(|error| failed(&error))?;
    root.present().map_err(|error| failed(&error))
}

fn draw_all(figures: &Figures, root: &Area<'_>) -> Result<(), Box<dyn std::error::Error>> {
    root.fill(&WHITE)?;
    let title = format!(
        "KV caches of {} requests in one pool of {}, {} driver",
        count(figures.requests),
        gib(figures.limit_bytes),
        figures.gpu.driver
    );
    let root = root.titled(&title, ("sans-serif", 24))?;
    let (_, height) = root.dim_in_pixel();
    let (upper, lower) = root.split_vertically(height.saturating_sub(REFUSALS_HEIGHT));
    draw_memory(figures, &upper)?;
    draw_refusals(figures, &lower)
}

fn draw_memory(figures: &Figures, area: &Area<'_>) -> Result<(), Box<dyn std::error::Error>> {
    let end = end_minutes(figures);
    let limit = in_gib(figures.limit_bytes);
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..end, 0.0..limit * LEGEND_ROOM)?;
    chart
        .configure_mesh()
        .x_desc("simulated time (minutes)")
        .x_label_formatter(&tick)
        .y_desc("memory (GiB)")
        .y_label_formatter(&tick)
        .label_style(("sans-serif", 15))
        .axis_desc_style(("sans-serif", 17))
        .light_line_style(WHITE.mix(0.0))
        .draw()?;

    // Stacked areas, the highest first, so that the lower ones cover it.
    for index in (0..figures.models.len()).rev() {
        let colour = MODEL_COLOURS[index % MODEL_COLOURS.len()];
        let points = figures.over_time.iter().map(|moment| {
            (
                minutes(moment),
                in_gib(moment.live_bytes[..=index].iter().sum()),
            )
        });
        chart
            .draw_series(AreaSeries::new(points, 0.0, colour.filled()).border_style(colour))?
            .label(format!("{}, live", figures.models[index].model))
            .legend(move |(x, y)| Rectangle::new([(x, y - 6), (x + 20, y + 6)], colour.filled()));
    }
    let committed = figures
        .over_time
        .iter()
        .map(|moment| (minutes(moment), in_gib(moment.committed_bytes)));
    chart
        .draw_series(LineSeries::new(committed, COMMITTED_COLOUR))?
        .label("committed")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 20, y)], COMMITTED_COLOUR));
    let thick = LIMIT_COLOUR.stroke_width(2);
    chart
        .draw_series(LineSeries::new([(0.0, limit), (end, limit)], thick))?
        .label("limit")
        .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], thick));
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK)
        .label_font(("sans-serif", 15))
        .draw()?;
    Ok(())
}

fn draw_refusals(figures: &Figures, area: &Area<'_>) -> Result<(), Box<dyn std::error::Error>> {
    let most = figures.elastic_refused.max(figures.static_refused).max(1);
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..end_minutes(figures), 0.0..most as f64 * 1.1)?;
    chart
        .configure_mesh()
        .x_desc("simulated time (minutes)")
        .x_label_formatter(&tick)
        .y_desc("requests refused so far")
        .y_label_formatter(&|value| count(value.round() as u64))
        .y_labels(5)
        .label_style(("sans-serif", 15))
        .axis_desc_style(("sans-serif", 17))
        .light_line_style(WHITE.mix(0.0))
        .draw()?;
    let series: [(_, _, Refused); 2] = [
        ("static split", LIMIT_COLOUR, |moment| moment.static_refused),
        ("elastic pool", ELASTIC_COLOUR, |moment| {
            moment.elastic_refused
        }),
    ];
    for (label, colour, refused) in series {
        let style = colour.stroke_width(2);
        let points = figures
            .over_time
            .iter()
            .map(|moment| (minutes(moment), refused(moment) as f64));
        chart
            .draw_series(LineSeries::new(points, style))?
            .label(label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], style));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK)
        .label_font(("sans-serif", 15))
        .draw()?;
    Ok(())
}

fn end_minutes(figures: &Figures) -> f64 {
    figures
        .over_time
        .last()
        .map_or(0.0, minutes)
        .max(f64::MIN_POSITIVE)
}

/// A number at an axis, without a fraction of zero.
fn tick(value: &f64) -> String {
    let text = format!("{value:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn minutes(moment: &Moment) -> f64 {
    moment.seconds / 60.0
}

fn in_gib(bytes: u64) -> f64 {
    bytes as f64 / (1_u64 << 30) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_have_no_idle_digits() {
        let ticks = [0.0, 10.0, 2.5, 0.1 + 0.2, 100.0].map(|value| tick(&value));
        assert_eq!(ticks, ["0", "10", "2.5", "0.3", "100"]);
    }
}
