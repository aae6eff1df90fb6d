//! The HTML of the page.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::chart::{Chart, DrawError, Group, NEUTRAL, colour};
use super::history::KEPT;
use super::points::{ModelPoint, PARTS, Point};
use crate::figures::Figures;
use plotters::style::RGBColor;
use std::fmt::{self, Display, Formatter, Write};
use std::time::Duration;

const STYLE: &str = include_str!("style.css");
const LARGE: (u32, u32) = (520, 396);
const SMALL: (u32, u32) = (460, 206);
/// The strength of the colour of each of the [`PARTS`].
const STRENGTHS: [f64; PARTS.len()] = [1., 0.6, 0.35, 0.18];
/// Of sequences that run and that wait.
const WORK_STRENGTHS: [f64; 2] = [1., 0.35];
/// What is not committed is nearly the background.
const FREE_STRENGTH: f64 = 0.06;
/// No chart of requests or tokens ends below this, so that their ticks are whole numbers.
const HEIGHT_MIN: f64 = 5.;
/// Room above the highest point, or the limit.
const ROOM: f64 = 1.05;

/// Makes the page of the present figures and of what was before.
///
/// # Errors
///
/// A chart that cannot be drawn.
pub fn page(now: &Figures, points: &[Point], refresh: Duration) -> Result<String, DrawError> {
    let unit = Unit::of(now.limit_bytes);
    let mut html = String::from("<!doctype html>\n<html lang=\"en\">\n<head>\n");
    let seconds = refresh.as_secs();
    html += "<meta charset=\"utf-8\">\n<title>cuda-vmm-serve</title>\n";
    html += "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n";
    html += &format!("<meta http-equiv=\"refresh\" content=\"{seconds}\">\n");
    html += "<link rel=\"icon\" href=\"data:,\">\n";
    html += &format!("<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n");
    html += "<h1>cuda-vmm-serve</h1>\n";
    let (limit, free) = (unit.text(now.limit_bytes), unit.text(now.free_bytes));
    let count = now.models.len();
    let models = if count == 1 { "model" } else { "models" };
    html += &format!("<p>{count} {models} in {limit} {unit}, of which {free} {unit} are free. ");
    html += "More: <a href=\"/metrics\">metrics</a>, <a href=\"/v1/models\">models</a>, ";
    html += "<a href=\"/health\">health</a>.</p>\n";
    html += "<div class=\"charts\">\n";
    let keys = PARTS.map(|(name, _)| name).into_iter().zip(STRENGTHS);
    let title = format!("{unit}, the line is the limit");
    html += &figure("Memory", &title, keys, &memory(now, points, &unit)?);
    let keys = ["running", "waiting"].into_iter().zip(WORK_STRENGTHS);
    let requests = work(now, points, WORK_STRENGTHS, |it| [it.running, it.waiting]);
    html += &figure("Requests", "mean of 2 s", keys, &requests?);
    let tokens = work(now, points, [1.], |it| [it.token_rate]);
    html += &figure("Generated tokens", "a second", [], &tokens?);
    html += "</div>\n";
    html += &table(now, points, &unit);
    html += "</main>\n</body>\n</html>\n";
    Ok(html)
}

/// A chart below its title, its unit, and what each strength of a colour means.
fn figure(
    title: &str,
    unit: &str,
    keys: impl IntoIterator<Item = (&'static str, f64)>,
    svg: &str,
) -> String {
    let mut html = format!("<figure>\n<figcaption><b>{title}</b><span>{unit}</span>");
    for (name, strength) in keys {
        html += &format!("\n<span>{}{name}</span>", Swatch(NEUTRAL, strength));
    }
    // The table has the numbers.
    html + &format!(
        "</figcaption>\n<div role=\"img\" aria-label=\"{title}\">\n{svg}</div>\n</figure>\n"
    )
}

fn memory(now: &Figures, points: &[Point], unit: &Unit) -> Result<String, DrawError> {
    let all = |bytes: &dyn Fn(&Point) -> f64| -> Vec<f64> {
        points
            .iter()
            .map(|point| bytes(point) / unit.bytes)
            .collect()
    };
    let models = now.models.iter().enumerate().map(|(at, model)| {
        let band = |part: usize| all(&|point| of_model(point, at, |it| it.parts_bytes[part]));
        Group {
            name: &model.id,
            colour: colour(at),
            bands: (0..PARTS.len())
                .map(|part| (STRENGTHS[part], band(part)))
                .collect(),
        }
    });
    let mut groups: Vec<_> = models.collect();
    if points.iter().any(|point| point.unowned_bytes > 0.) {
        groups.push(Group {
            name: "of no model",
            colour: NEUTRAL,
            bands: vec![(STRENGTHS[1], all(&|point| point.unowned_bytes))],
        });
    }
    groups.push(Group {
        name: "free",
        colour: NEUTRAL,
        bands: vec![(FREE_STRENGTH, all(&|point| point.free_bytes))],
    });
    let limit = now.limit_bytes as f64 / unit.bytes;
    draw(LARGE, points, limit * ROOM, Some(limit), groups)
}

/// A chart of numbers that are no memory.
fn work<const N: usize>(
    now: &Figures,
    points: &[Point],
    strengths: [f64; N],
    numbers: impl Fn(&ModelPoint) -> [f64; N],
) -> Result<String, DrawError> {
    let sum = |point: &Point| -> f64 { point.models.iter().flat_map(&numbers).sum() };
    let highest = points.iter().map(sum).fold(HEIGHT_MIN, f64::max);
    let groups = now.models.iter().enumerate().map(|(at, model)| {
        let band = |which: usize| {
            let points = points.iter();
            let heights = points.map(|point| of_model(point, at, |it| numbers(it)[which]));
            (strengths[which], heights.collect())
        };
        Group {
            name: &model.id,
            colour: colour(at),
            bands: (0..N).map(band).collect(),
        }
    });
    draw(SMALL, points, highest * ROOM, None, groups.collect())
}

/// A number of the model at this place.
fn of_model(point: &Point, at: usize, number: impl Fn(&ModelPoint) -> f64) -> f64 {
    point.models.get(at).map_or(0., number)
}

fn draw(
    size: (u32, u32),
    points: &[Point],
    height_max: f64,
    limit: Option<f64>,
    groups: Vec<Group<'_>>,
) -> Result<String, DrawError> {
    // Whole minutes, so that the axis changes seldom.
    let age = points.first().map_or(0., |point| -point.minutes);
    let chart = Chart {
        size,
        times: points.iter().map(|point| point.minutes).collect(),
        minutes_max: age.ceil().clamp(1., KEPT.as_secs_f64() / 60.),
        // An axis has a length.
        height_max: height_max.max(f64::MIN_POSITIVE),
        limit,
        groups,
    };
    chart.draw()
}

/// The present numbers of each model, and the sum of each column.
fn table(now: &Figures, points: &[Point], unit: &Unit) -> String {
    let mut html =
        String::from("<div class=\"table\">\n<table>\n<thead>\n<tr><th scope=\"col\">model");
    let parts = PARTS.map(|(name, _)| format!("{name}, {unit}"));
    let work = ["running", "waiting", "tokens a second", "generated tokens"];
    for name in parts.iter().map(String::as_str).chain(work) {
        html += &format!("</th><th scope=\"col\">{name}");
    }
    html += "</th></tr>\n</thead>\n<tbody>\n";
    for (at, model) in now.models.iter().enumerate() {
        let state = if model.is_asleep { " (asleep)" } else { "" };
        html += &format!("<tr><th scope=\"row\">{}{state}</th>", Escaped(&model.id));
        for ((_, bytes), strength) in PARTS.iter().zip(STRENGTHS) {
            let swatch = Swatch(colour(at), strength);
            html += &format!("<td>{swatch}{}</td>", unit.text(bytes(model)));
        }
        let last = points.last();
        let rate = last.map_or(0., |point| of_model(point, at, |it| it.token_rate));
        let (running, waiting) = (model.running, model.waiting);
        let generated = model.generated_tokens;
        html += &format!("<td>{running}</td><td>{waiting}</td><td>{rate:.0}</td>");
        html += &format!("<td>{generated}</td></tr>\n");
    }
    html += "</tbody>\n</table>\n</div>\n";
    html
}

/// The unit of all memory on a page.
struct Unit {
    name: &'static str,
    bytes: f64,
}

impl Unit {
    /// The largest of which the limit has at least four.
    fn of(limit_bytes: usize) -> Self {
        let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
        let found = units.into_iter().find(|(_, bits)| limit_bytes >= 4 << bits);
        let (name, bits) = found.unwrap_or(("bytes", 0));
        let bytes = f64::from(1u32 << bits);
        Self { name, bytes }
    }

    fn text(&self, bytes: usize) -> String {
        let value = bytes as f64 / self.bytes;
        match self.bytes {
            1. => format!("{value}"),
            _ => format!("{value:.1}"),
        }
    }
}

impl Display for Unit {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name)
    }
}

/// A small square of a colour.
struct Swatch(RGBColor, f64);

impl Display for Swatch {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        let Self(RGBColor(red, green, blue), strength) = self;
        write!(
            formatter,
            "<i style=\"background:rgb({red} {green} {blue}/{strength});\
             outline:1px solid rgb({red} {green} {blue})\"></i>"
        )
    }
}

/// Text that is no markup.
struct Escaped<'a>(&'a str);

impl Display for Escaped<'_> {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|character| match character {
            '<' => formatter.write_str("&lt;"),
            '>' => formatter.write_str("&gt;"),
            '&' => formatter.write_str("&amp;"),
            '"' => formatter.write_str("&quot;"),
            '\'' => formatter.write_str("&#39;"),
            other => formatter.write_char(other),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::history::History;
    use super::super::points::points;
    use super::*;
    use crate::figures::ModelFigures;

    const REFRESH: Duration = Duration::from_secs(2);
    const MIB: usize = 1 << 20;

    /// The model at this place has other numbers than the others.
    fn figures(names: &[&str], generated_tokens: u64) -> Figures {
        let models = names.iter().enumerate().map(|(at, name)| ModelFigures {
            id: (*name).to_owned(),
            live_bytes: (10 + at) * MIB,
            prefix_bytes: (20 + at) * MIB,
            ahead_bytes: (30 + at) * MIB,
            other_bytes: (40 + at) * MIB,
            running: 50 + at,
            waiting: 60 + at,
            generated_tokens,
            is_asleep: false,
        });
        let models: Vec<_> = models.collect();
        let held: usize = models.iter().map(ModelFigures::committed_bytes).sum();
        Figures {
            limit_bytes: 2048 * MIB,
            unowned_bytes: 3 * MIB,
            free_bytes: 2045 * MIB - held,
            models,
        }
    }

    /// The page after some samples, half a second apart.
    fn made(names: &[&str], samples: u64) -> String {
        let mut history = History::default();
        for at in 0..samples {
            history.push(Duration::from_millis(500 * at), figures(names, 100 * at));
        }
        page(&figures(names, 100), &points(&history), REFRESH).expect("a page")
    }

    #[test]
    fn every_model_is_in_each_chart_and_every_part_in_the_table() {
        for names in [&["one"][..], &["a", "b", "c", "d", "e", "f", "g", "h"]] {
            let html = made(names, 600);
            assert_eq!(html.matches("<svg").count(), 3);
            for (at, name) in names.iter().enumerate() {
                assert_eq!(html.matches(&format!(">\n{name}\n</text>")).count(), 3);
                let row = format!("<th scope=\"row\">{name}</th>");
                let (_, row) = html.split_once(&row).expect("a row");
                let (row, _) = row.split_once("</tr>").expect("its end");
                let cells: Vec<_> = row.split("<td>").skip(1).collect();
                let number = |cell: &&str| {
                    let text = cell.rsplit('>').find(|text| !text.is_empty());
                    let text = cell
                        .strip_suffix("</td>")
                        .map_or(text, |it| it.rsplit('>').next());
                    text.expect("a number").to_owned()
                };
                let numbers: Vec<_> = cells.iter().map(number).collect();
                let mut expected: Vec<_> =
                    [10, 20, 30, 40].map(|it| format!("{}.0", it + at)).into();
                expected.extend([50 + at, 60 + at, 200, 100].map(|it| it.to_string()));
                assert_eq!(numbers, expected, "{name}: {row}");
            }
            // In the chart of memory each model has four areas; there are two more. In that of
            // requests each has two, in that of tokens one.
            assert_eq!(html.matches("<polygon").count(), 7 * names.len() + 2);
            for part in [
                "live",
                "cached prefix",
                "ahead",
                "other",
                "running",
                "waiting",
            ] {
                assert!(html.contains(&format!("</i>{part}</span>")), "{part}");
            }
            let free = 2045 - names.len() * 100 - 4 * (0..names.len()).sum::<usize>();
            assert!(html.contains(&format!("in 2048.0 MiB, of which {free}.0 MiB are free")));
            assert!(html.contains("<meta http-equiv=\"refresh\" content=\"2\">"));
            assert!(!html.contains("<script"));
        }
    }

    #[test]
    fn there_is_a_page_with_no_sample_and_with_one() {
        let none = made(&["one", "two"], 0);
        assert_eq!(none.matches("<polygon").count(), 0);
        assert_eq!(none.matches(">\ntwo\n</text>").count(), 3);
        assert!(none.contains("<th scope=\"row\">two</th>"));
        let one = made(&["one", "two"], 1);
        // No rate is known, so there are no areas in that chart.
        assert_eq!(one.matches("<polygon").count(), 6 * 2 + 2);
        for html in [none, one] {
            assert!(html.ends_with("</html>\n") && !html.contains("NaN") && !html.contains("inf"));
        }
    }

    #[test]
    fn a_name_is_no_markup() {
        let html = made(&["<script>alert('1')</script>", "\"&<b>"], 3);
        assert!(!html.contains("<script") && !html.contains("<b>&") && !html.contains("&<b>"));
        let row = "<th scope=\"row\">&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt;</th>";
        assert!(html.contains(row));
        assert!(html.contains("<th scope=\"row\">&quot;&amp;&lt;b&gt;</th>"));
        // In the charts, where it is cut.
        assert_eq!(html.matches(">\n&lt;script&gt;").count(), 3);
        assert_eq!(html.matches(">\n&quot;&amp;&lt;b&gt;\n</text>").count(), 3);
    }

    #[test]
    fn the_unit_follows_the_limit() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (4095, "4095 bytes"),
            (4 << 10, "4.0 KiB"),
            (256 << 20, "256.0 MiB"),
            (141 << 30, "141.0 GiB"),
        ] {
            let unit = Unit::of(bytes);
            assert_eq!(format!("{} {unit}", unit.text(bytes)), text);
        }
    }

    #[test]
    fn a_page_is_small() {
        for (names, kib_max) in [(&["one"; 2][..], 64), (&["one"; 8], 192)] {
            // All numbers change all the time.
            let mut history = History::default();
            for at in 0..=600 {
                let mut figures = figures(names, (at * at) as u64);
                for model in &mut figures.models {
                    model.live_bytes += at * MIB / 8;
                    model.running += at;
                }
                history.push(Duration::from_millis(500 * at as u64), figures);
            }
            let html = page(&figures(names, 0), &points(&history), REFRESH).expect("a page");
            assert!(html.len() < kib_max << 10, "{names:?}: {}", html.len());
            // Far fewer if nothing changes.
            assert!(made(names, 601).len() < html.len() / 2);
        }
    }
}
