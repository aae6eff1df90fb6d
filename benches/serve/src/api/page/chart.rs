//! Stacked areas over the last minutes, as SVG.
//!
//! The text has the colour of the page, by its style sheet. Areas of less strength let more of the
//! background through. So a chart is legible on any background.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use plotters::drawing::DrawingAreaErrorKind;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Why a chart cannot be drawn.
pub type DrawError = DrawingAreaErrorKind<std::io::Error>;

/// Eight colours that colour-blind people can tell apart: those of Okabe and Ito (2008), with grey
/// for black. A ninth model has the first again.
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(213, 94, 0),
    RGBColor(86, 180, 233),
    RGBColor(240, 228, 66),
    RGBColor(136, 136, 136),
];
/// For axes, and for what belongs to no model.
pub const NEUTRAL: RGBColor = RGBColor(128, 128, 128);

/// The colour of a model, by its place in the list.
pub fn colour(model: usize) -> RGBColor {
    COLOURS[model % COLOURS.len()]
}

const FONT_PIXELS: f64 = 13.;
/// What plotters divides a size by when it writes SVG.
const FONT: f64 = FONT_PIXELS * 1.24;
const LABELS_WIDTH: u32 = 120;
const LABEL_HEIGHT: i32 = 16;
const SWATCH: i32 = 10;
/// A point that is alone is drawn this wide, in minutes.
const ALONE: f64 = 0.03;

/// Areas of one colour that have a name together.
pub struct Group<'a> {
    pub name: &'a str,
    pub colour: RGBColor,
    /// From the lowest on: the strength of the colour, up to 1, and the height at each time.
    pub bands: Vec<(f64, Vec<f64>)>,
}

/// What is drawn, from the lowest group on.
pub struct Chart<'a> {
    /// Width and height in pixels.
    pub size: (u32, u32),
    /// When each point is, in minutes; not above 0.
    pub times: Vec<f64>,
    pub minutes_max: f64,
    /// The top of the vertical axis; above 0.
    pub height_max: f64,
    /// Where a line goes through the whole chart.
    pub limit: Option<f64>,
    pub groups: Vec<Group<'a>>,
}

impl Chart<'_> {
    /// Draws it.
    ///
    /// # Errors
    ///
    /// None is known: what it writes to is a string.
    pub fn draw(&self) -> Result<String, DrawError> {
        let mut svg = String::new();
        let root = SVGBackend::with_string(&mut svg, self.size).into_drawing_area();
        let mut chart = ChartBuilder::on(&root)
            .margin_top(8)
            .margin_right(LABELS_WIDTH)
            .x_label_area_size(22)
            .y_label_area_size(44)
            .build_cartesian_2d(-self.minutes_max..0., 0.0..self.height_max)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(NEUTRAL.mix(0.3))
            .axis_style(NEUTRAL)
            .label_style(("sans-serif", FONT))
            .x_labels(6)
            .y_labels(6)
            .x_label_formatter(&|minutes| minutes_text(*minutes))
            .y_label_formatter(&|value| number_text(*value))
            .draw()?;
        let times = match self.times.as_slice() {
            [alone] => vec![alone - ALONE, *alone],
            times => times.to_vec(),
        };
        let mut floor = vec![0.; times.len()];
        let mut labels = Vec::new();
        for group in &self.groups {
            let from = floor.last().copied().unwrap_or_default();
            for (strength, heights) in &group.bands {
                // A point that is alone has its height at both ends.
                let heights = heights.iter().chain(heights.last());
                let ceiling = floor.iter().zip(heights).map(|(low, height)| low + height);
                let ceiling: Vec<_> = ceiling.collect();
                if ceiling != floor {
                    let upper = corners(&times, &ceiling);
                    let lower = corners(&times, &floor).rev();
                    let outline: Vec<_> = upper.chain(lower).collect();
                    let area = Polygon::new(outline, group.colour.mix(*strength));
                    chart.draw_series([area])?;
                }
                floor = ceiling;
            }
            let middle = (from + floor.last().copied().unwrap_or_default()) / 2.;
            let (_, y) = chart.plotting_area().map_coordinate(&(0., middle));
            labels.push(y);
        }
        if let Some(limit) = self.limit {
            let ends = [(-self.minutes_max, limit), (0., limit)];
            chart.draw_series([PathElement::new(ends, NEUTRAL.stroke_width(2))])?;
        }
        let (_, bottom) = chart.plotting_area().map_coordinate(&(0., 0.));
        spread(&mut labels, bottom - LABEL_HEIGHT / 2);
        let left = (self.size.0 - LABELS_WIDTH) as i32 + 6;
        let style = TextStyle::from(("sans-serif", FONT).into_font());
        let style = style.pos(Pos::new(HPos::Left, VPos::Center));
        for (group, y) in self.groups.iter().zip(labels) {
            let strength = group.bands.first().map_or(1., |(strength, _)| *strength);
            let corner = (left, y - SWATCH / 2);
            let corners = [corner, (corner.0 + SWATCH, corner.1 + SWATCH)];
            root.draw(&Rectangle::new(
                corners,
                group.colour.mix(strength).filled(),
            ))?;
            root.draw(&Rectangle::new(corners, group.colour))?;
            let at = (left + SWATCH + 4, y);
            let width = LABELS_WIDTH as i32 - SWATCH - 10;
            let name = fitted(group.name, f64::from(width) / FONT_PIXELS);
            root.draw(&Text::new(name, at, style.clone()))?;
        }
        root.present()?;
        drop((chart, root));
        Ok(svg)
    }
}

/// The points of a line, without those between two of the same height.
fn corners(times: &[f64], heights: &[f64]) -> impl DoubleEndedIterator<Item = (f64, f64)> {
    let is_corner = |at: &usize| {
        let height = heights.get(*at);
        let before = at.checked_sub(1).and_then(|before| heights.get(before));
        before != height || heights.get(at + 1) != height
    };
    let points = (0..heights.len()).filter(is_corner);
    points.map(|at| (times[at], heights[at]))
}

/// Moves labels, which are ordered from the lowest on the page to the highest, apart, and none
/// below `bottom`.
fn spread(labels: &mut [i32], bottom: i32) {
    let mut lowest = bottom;
    for label in labels.iter_mut() {
        *label = (*label).min(lowest);
        lowest = *label - LABEL_HEIGHT;
    }
    let mut highest = LABEL_HEIGHT / 2;
    for label in labels.iter_mut().rev() {
        *label = (*label).max(highest);
        highest = *label + LABEL_HEIGHT;
    }
}

/// A text of at most this width, in sizes of its font, with an ellipsis if something is left out.
fn fitted(text: &str, width_max: f64) -> String {
    // Rather too wide than too narrow: which font it will be is not known.
    let width = |character: char| match character {
        'i' | 'j' | 'l' | '.' | ',' | ':' | '-' | '/' => 0.38,
        'm' | 'w' | 'M' | 'W' | '@' | '%' => 0.98,
        'A'..='Z' => 0.74,
        ' '..='~' => 0.62,
        _ => 1.,
    };
    let text: String = text.replace(char::is_control, " ");
    let total: f64 = text.chars().map(width).sum();
    if total <= width_max {
        return text;
    }
    let mut left = width_max - 1.;
    let kept = text.chars().take_while(|character| {
        left -= width(*character);
        left >= 0.
    });
    kept.chain(['…']).collect()
}

fn minutes_text(minutes: f64) -> String {
    let seconds = (minutes * 60.).round();
    match seconds % 60. {
        _ if seconds == 0. => "now".to_owned(),
        0. => format!("{} min", seconds / 60.),
        _ => format!("{seconds} s"),
    }
}

/// A number at an axis, without idle digits.
fn number_text(value: f64) -> String {
    let text = format!("{value:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart<'a>(names: &[&'a str], points: usize) -> Chart<'a> {
        let groups = names.iter().enumerate().map(|(at, name)| Group {
            name,
            colour: colour(at),
            bands: vec![
                (1., vec![1.; points]),
                (0.5, vec![2.; points]),
                (0.2, vec![0.; points]),
            ],
        });
        Chart {
            size: (480, 210),
            times: (0..points).rev().map(|at| -(at as f64) / 30.).collect(),
            minutes_max: 5.,
            height_max: 24.,
            limit: Some(20.),
            groups: groups.collect(),
        }
    }

    #[test]
    fn every_area_with_something_in_it_is_drawn_and_named() {
        let names = ["a", "b", "c", "d", "e", "f", "g", "h"];
        for points in [1, 2, 150] {
            let svg = chart(&names, points).draw().expect("drawn");
            assert_eq!(svg.matches("<polygon").count(), 2 * names.len(), "{points}");
            for name in names {
                assert!(
                    svg.contains(&format!(">\n{name}\n</text>")),
                    "{name}: {svg}"
                );
            }
        }
        // With no point there are the axes and the names.
        let svg = chart(&names, 0).draw().expect("drawn");
        assert_eq!(svg.matches("<polygon").count(), 0);
        assert!(svg.contains("now") && svg.contains("-5 min") && svg.contains(">\nh\n"));
        assert!(svg.trim_end().ends_with("</svg>"));
    }

    #[test]
    fn a_point_that_is_alone_has_a_width() {
        let svg = chart(&["a"], 1).draw().expect("drawn");
        let (_, area) = svg.split_once("<polygon").expect("an area");
        let (_, points) = area.split_once("points=\"").expect("its outline");
        let (points, _) = points.split_once('"').expect("its end");
        let x: Vec<i32> = points
            .split_whitespace()
            .map(|point| {
                point
                    .split(',')
                    .next()
                    .expect("x")
                    .parse()
                    .expect("a number")
            })
            .collect();
        assert_eq!(x.len(), 4);
        assert!(x[0] < x[1], "{x:?}");
    }

    #[test]
    fn a_line_is_its_corners() {
        let times = [0., 1., 2., 3., 4., 5., 6.];
        let corners = corners(&times, &[1., 1., 1., 2., 3., 3., 3.]);
        let expected = [(0., 1.), (2., 1.), (3., 2.), (4., 3.), (6., 3.)];
        assert_eq!(corners.collect::<Vec<_>>(), expected);
    }

    #[test]
    fn a_name_is_no_markup() {
        let svg = chart(&["<b>&'\"", "x\n<i"], 2).draw().expect("drawn");
        assert!(svg.contains("&lt;b&gt;&amp;&apos;&quot;"), "{svg}");
        assert!(!svg.contains("<b>") && !svg.contains("<i"), "{svg}");
    }

    #[test]
    fn labels_do_not_overlap() {
        let mut labels = [195, 190, 188, 60, 5, 2];
        spread(&mut labels, 180);
        assert_eq!(labels, [180, 164, 148, 60, 24, 8]);
        // There is no room for so many: the last are where they should be, the first below.
        let mut labels = [10; 4];
        spread(&mut labels, 20);
        assert_eq!(labels, [56, 40, 24, 8]);
    }

    #[test]
    fn long_names_are_cut() {
        assert_eq!(fitted("tiny-2", 8.), "tiny-2");
        assert_eq!(fitted("WWWWWWWW", 4.), "WWW…");
        assert_eq!(fitted("a\tb", 8.), "a b");
        let long = fitted("a-model-with-a-long-name", 7.);
        assert!(
            long.starts_with("a-model-w") && long.ends_with('…'),
            "{long}"
        );
    }

    #[test]
    fn ticks_have_no_idle_digits() {
        let ticks = [0., 10., 2.5, 0.1 + 0.2, 100.].map(number_text);
        assert_eq!(ticks, ["0", "10", "2.5", "0.3", "100"]);
        let times = [-5., -1.5, -0.2, -0.001, 0.].map(minutes_text);
        assert_eq!(times, ["-5 min", "-90 s", "-12 s", "now", "now"]);
    }
}
