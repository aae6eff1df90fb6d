//! What was changed in the models.

/// The most lines of a ported model that its stock model has not.
const LINES_MAX: usize = 15;

/// Applies a unified diff to a text.
fn patched(stock: &str, diff: &str) -> String {
    let (mut left, mut result) = (stock.split_inclusive('\n'), String::new());
    let mut line_number = 0;
    for line in diff.split_inclusive('\n').skip(2) {
        let (sign, rest) = line.split_at(1);
        match sign {
            "@" => {
                let first = rest.split(['-', ',']).nth(1).expect("a hunk has its place");
                let first: usize = first.parse().expect("a line number");
                while line_number + 1 < first {
                    result += left.next().expect("lines before the hunk");
                    line_number += 1;
                }
            }
            "+" => result += rest,
            _ => {
                assert_eq!(left.next(), Some(rest), "line {}", line_number + 1);
                line_number += 1;
                if sign == " " {
                    result += rest;
                }
            }
        }
    }
    left.for_each(|line| result += line);
    result
}

macro_rules! expect_small {
    ($name:literal) => {
        let stock = include_str!(concat!("stock/", $name, ".rs"));
        let ported = include_str!(concat!("ported/", $name, ".rs"));
        let diff = include_str!(concat!($name, ".diff"));
        assert!(
            patched(stock, diff) == ported,
            "{}.diff is out of date",
            $name
        );
        let new = diff
            .lines()
            .skip(2)
            .filter(|line| line.starts_with('+'))
            .count();
        assert!((1..=LINES_MAX).contains(&new), "{}: {new} lines", $name);
    };
}

#[test]
fn a_ported_model_differs_by_the_few_lines_of_its_diff() {
    expect_small!("qwen3");
    expect_small!("mistral");
    expect_small!("gemma3");
}
