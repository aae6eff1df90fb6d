//! A figure, in the form in which the measuring programs of the benches report their own.

use serde_json::{Value, json};

/// What is demanded of a figure.
#[derive(Clone, Copy, Debug)]
pub enum Reach {
    Open,
    /// At most this much; without a figure it is not reached.
    AtMost(f64),
    /// At most this many times what it is measured against.
    AtMostTimes(f64),
    /// At least this many times what it is measured against.
    AtLeastTimes(f64),
}

/// A finding: our figure of something that was done, what it is measured against, and whether it reaches what is demanded.
pub fn judge(name: &str, unit: &str, [ours, peer]: [Option<f64>; 2], reach: Reach) -> Value {
    let ratio = ours.zip(peer).map(|(ours, peer)| ours / peer);
    let (reach, pass) = match reach {
        Reach::Open => (None, None),
        Reach::AtMost(most) => {
            let pass = ours.is_some_and(|ours| ours <= most);
            (Some(format!("≤ {most} {unit}")), Some(pass))
        }
        Reach::AtMostTimes(most) => {
            let pass = ratio.is_some_and(|ratio| ratio <= most);
            (Some(format!("≤ {most} ×")), Some(pass))
        }
        Reach::AtLeastTimes(least) => {
            let pass = ratio.is_some_and(|ratio| ratio >= least);
            (Some(format!("≥ {least} ×")), Some(pass))
        }
    };
    let note = ours.is_none().then_some("it was not measured");
    json!({
        "name": name, "ours": ours, "peer": peer, "ratio": ratio, "reach": reach, "pass": pass,
        "unit": unit, "note": note,
    })
}

/// Whether something is demanded and not reached.
pub fn has_failed(finding: &Value) -> bool {
    finding["pass"] == false
}

/// The cells of a finding's line in a table.
pub fn cells(finding: &Value) -> [String; 6] {
    let text = |key: &str| finding[key].as_str().unwrap_or_default().to_owned();
    let amount = |key: &str| match finding[key].as_f64() {
        Some(value) if value.fract() == 0.0 => format!("{value} {}", text("unit")),
        Some(value) => format!("{value:.3} {}", text("unit")),
        None => String::new(),
    };
    let ratio = finding["ratio"].as_f64().map(|it| format!("{it:.3}"));
    let pass = finding["pass"].as_bool();
    let pass = pass.map_or("", |pass| if pass { "yes" } else { "NO" });
    let (ours, peer, ratio) = (amount("ours"), amount("peer"), ratio.unwrap_or_default());
    [
        text("name"),
        ours,
        peer,
        ratio,
        text("reach"),
        pass.to_owned(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_measured_does_not_pass_where_something_is_demanded() {
        for (ours, reach, pass) in [
            (Some(2.0), Reach::AtMost(2.0), Some(true)),
            (Some(2.1), Reach::AtMost(2.0), Some(false)),
            (None, Reach::AtMost(2.0), Some(false)),
            (Some(2.0), Reach::Open, None),
            (None, Reach::Open, None),
        ] {
            let finding = judge("work", "µs", [ours, None], reach);
            assert_eq!(finding["pass"].as_bool(), pass, "{ours:?} {reach:?}");
            assert_eq!(has_failed(&finding), pass == Some(false));
        }
    }

    #[test]
    fn it_is_written_as_the_measuring_program_writes_it() {
        let figures = [Some(1.0), Some(2.0)];
        let finding = judge("work", "bytes", figures, Reach::AtMostTimes(1.0));
        let expected = json!({
            "name": "work", "ours": 1.0, "peer": 2.0, "ratio": 0.5, "reach": "≤ 1 ×", "pass": true,
            "unit": "bytes", "note": null
        });
        assert_eq!(finding, expected);
        let cells = cells(&finding).join("|");
        assert_eq!(cells, "work|1 bytes|2 bytes|0.500|≤ 1 ×|yes");
    }
}
