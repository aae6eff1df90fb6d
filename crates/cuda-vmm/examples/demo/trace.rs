//! Traces in the Azure LLM inference format: TIMESTAMP, ContextTokens, GeneratedTokens.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::workload::Request;

/// More tokens than any request of a model in use today has.
const REQUEST_TOKENS_MAX: u64 = 1 << 20;
/// Longest time between the first and the last request of a trace.
const SPAN_DAYS_MAX: u64 = 31;
const COLUMNS: [&str; 3] = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"];
const SECOND_NS: u64 = 1_000_000_000;
const DAY_SECONDS: u64 = 86_400;

/// Reads the requests of a trace file, in the order of arrival, the first of them at time 0.
pub fn read(path: &Path) -> Result<Vec<Request>> {
    let file =
        File::open(path).with_context(|| format!("cannot open the trace {}", path.display()))?;
    parse(file, &path.display().to_string())
}

/// Parses a trace; `name` stands in the errors before the line number.
fn parse(input: impl Read, name: &str) -> Result<Vec<Request>> {
    let mut reader = csv::ReaderBuilder::new().flexible(true).from_reader(input);
    let header = reader
        .headers()
        .map_err(|error| unreadable(name, &error))?
        .clone();
    let columns = find_columns(&header).with_context(|| format!("{name}:1"))?;

    let mut requests = Vec::new();
    for record in reader.records() {
        let record = record.map_err(|error| unreadable(name, &error))?;
        let line = record.position().map_or(0, csv::Position::line);
        let request = parse_record(&record, columns).with_context(|| format!("{name}:{line}"))?;
        requests.push(request);
    }

    requests.sort_by_key(|request| request.arrival_ns);
    let (Some(first), Some(last)) = (requests.first(), requests.last()) else {
        bail!("{name}: the trace holds no requests");
    };
    let start_ns = first.arrival_ns;
    let span_days = (last.arrival_ns - start_ns) / (DAY_SECONDS * SECOND_NS);
    ensure!(
        span_days < SPAN_DAYS_MAX,
        "{name}: the trace spans {span_days} days; at most {SPAN_DAYS_MAX} can be replayed"
    );
    for request in &mut requests {
        request.arrival_ns -= start_ns;
    }
    Ok(requests)
}

fn unreadable(name: &str, error: &csv::Error) -> anyhow::Error {
    match error.position() {
        Some(position) => anyhow!("{name}:{}: {error}", position.line()),
        None => anyhow!("{name}: {error}"),
    }
}

fn find_columns(header: &csv::StringRecord) -> Result<[usize; 3]> {
    let mut columns = [0; 3];
    for (column, name) in columns.iter_mut().zip(COLUMNS) {
        *column = header
            .iter()
            .position(|found| found.trim() == name)
            .ok_or_else(|| {
                let found = header.iter().collect::<Vec<_>>().join(",");
                anyhow!(
                    "no column {name} in the header {found:?}; expected {}",
                    COLUMNS.join(",")
                )
            })?;
    }
    Ok(columns)
}

fn parse_record(record: &csv::StringRecord, columns: [usize; 3]) -> Result<Request> {
    let field = |index: usize| -> Result<&str> {
        let text = record.get(columns[index]).map(str::trim);
        text.ok_or_else(|| {
            anyhow!(
                "{} fields, so that {} is missing",
                record.len(),
                COLUMNS[index]
            )
        })
    };
    let arrival_ns = parse_timestamp(field(0)?)?;
    let prompt_tokens = parse_tokens(field(1)?, COLUMNS[1])?;
    let generated_tokens = parse_tokens(field(2)?, COLUMNS[2])?;
    let sum = u64::from(prompt_tokens) + u64::from(generated_tokens);
    ensure!(
        sum <= REQUEST_TOKENS_MAX,
        "a request of {sum} tokens; at most {REQUEST_TOKENS_MAX} can be replayed"
    );
    Ok(Request {
        arrival_ns,
        prompt_tokens,
        generated_tokens,
    })
}

fn parse_tokens(text: &str, column: &str) -> Result<u32> {
    text.parse()
        .map_err(|_| anyhow!("{column} {text:?} is not a number of tokens"))
}

/// Nanoseconds since 1970 of `2023-11-16 18:15:46.6805900`, with up to nine digits of fraction and,
/// optionally, `T` for the blank and an offset from UTC (`Z`, `+00:00`).
fn parse_timestamp(text: &str) -> Result<u64> {
    timestamp_ns(text)
        .ok_or_else(|| anyhow!("TIMESTAMP {text:?} is not of the form 2023-11-16 18:15:46.6805900"))
}

fn timestamp_ns(text: &str) -> Option<u64> {
    let (date, time) = text.split_once([' ', 'T'])?;
    let mut date = date.split('-');
    let year = digits(date.next()?, 4, 1970..=2261)?;
    let month = digits(date.next()?, 2, 1..=12)?;
    let day = digits(date.next()?, 2, 1..=days_in_month(year, month))?;
    if date.next().is_some() {
        return None;
    }

    let (clock, offset_seconds) = split_offset(time)?;
    let (clock, fraction_ns) = match clock.split_once('.') {
        Some((clock, fraction)) => (clock, parse_fraction(fraction)?),
        None => (clock, 0),
    };
    let mut clock = clock.split(':');
    let hour = digits(clock.next()?, 2, 0..=23)?;
    let minute = digits(clock.next()?, 2, 0..=59)?;
    let second = digits(clock.next()?, 2, 0..=60)?;
    if clock.next().is_some() {
        return None;
    }

    let seconds =
        days_since_1970(year, month, day) * DAY_SECONDS + hour * 3600 + minute * 60 + second;
    let utc_seconds = seconds.checked_add_signed(-offset_seconds)?;
    Some(utc_seconds * SECOND_NS + fraction_ns)
}

/// Splits `Z` or `+01:00` off a time; the offset is in seconds.
fn split_offset(time: &str) -> Option<(&str, i64)> {
    if let Some(clock) = time.strip_suffix('Z') {
        return Some((clock, 0));
    }
    let Some(start) = time.find(['+', '-']) else {
        return Some((time, 0));
    };
    let (clock, offset) = time.split_at(start);
    let (hours, minutes) = offset[1..].split_once(':')?;
    let seconds = digits(hours, 2, 0..=14)? * 3600 + digits(minutes, 2, 0..=59)? * 60;
    let seconds = i64::try_from(seconds).ok()?;
    Some((
        clock,
        if offset.starts_with('-') {
            -seconds
        } else {
            seconds
        },
    ))
}

fn parse_fraction(text: &str) -> Option<u64> {
    if text.is_empty() || text.len() > 9 || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    format!("{text:0<9}").parse().ok()
}

fn digits(text: &str, count: usize, range: std::ops::RangeInclusive<u64>) -> Option<u64> {
    if text.len() != count || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    text.parse().ok().filter(|value| range.contains(value))
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn days_in_month(year: u64, month: u64) -> u64 {
    match month {
        2 => 28 + u64::from(is_leap(year)),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

fn days_since_1970(year: u64, month: u64, day: u64) -> u64 {
    let years: u64 = (1970..year)
        .map(|year| 365 + u64::from(is_leap(year)))
        .sum();
    let months: u64 = (1..month).map(|month| days_in_month(year, month)).sum();
    years + months + day - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = "TIMESTAMP,ContextTokens,GeneratedTokens\n";

    fn parse_text(text: &str) -> Result<Vec<Request>> {
        parse(text.as_bytes(), "trace.csv")
    }

    fn error_of(text: &str) -> String {
        format!("{:#}", parse_text(text).expect_err("must not parse"))
    }

    #[test]
    fn reads_rows_relative_to_the_first_arrival() {
        let text = format!(
            "{HEADER}2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:50.9951690,396,109"
        );
        let requests = parse_text(&text).expect("a valid trace");
        let first = Request {
            arrival_ns: 0,
            prompt_tokens: 374,
            generated_tokens: 44,
        };
        let second = Request {
            arrival_ns: 4_314_579_000,
            prompt_tokens: 396,
            generated_tokens: 109,
        };
        assert_eq!(requests, [first, second]);
    }

    #[test]
    fn sorts_rows_and_finds_columns_by_name() {
        let text = "GeneratedTokens,TIMESTAMP,Other,ContextTokens\n\
                    2,2024-03-01 00:00:01,x,20\n1,2024-02-29 23:59:59.5,y,10\n";
        let requests = parse_text(text).expect("a valid trace");
        assert_eq!(
            requests[0],
            Request {
                arrival_ns: 0,
                prompt_tokens: 10,
                generated_tokens: 1
            }
        );
        assert_eq!(requests[1].arrival_ns, 1_500_000_000);
    }

    #[test]
    fn timestamps_are_counted_from_1970() {
        assert_eq!(timestamp_ns("1970-01-01 00:00:00"), Some(0));
        assert_eq!(
            timestamp_ns("2023-11-16 18:15:46"),
            Some(1_700_158_546 * SECOND_NS)
        );
        assert_eq!(
            timestamp_ns("2024-05-10T00:00:00.009930+00:00"),
            timestamp_ns("2024-05-10 00:00:00.00993Z")
        );
        assert_eq!(
            timestamp_ns("2024-05-10 02:00:00+02:00"),
            timestamp_ns("2024-05-10 00:00:00")
        );
        assert_eq!(
            timestamp_ns("2024-05-09 22:00:00-02:00"),
            timestamp_ns("2024-05-10 00:00:00")
        );
    }

    #[test]
    fn rejects_bad_timestamps() {
        for text in [
            "",
            "yesterday",
            "2023-11-16",
            "2023-13-16 18:15:46",
            "2023-02-29 18:15:46",
            "2023-11-16 24:15:46",
            "2023-11-16 18:15",
            "2023-11-16 18:15:46.",
            "1970-01-01 00:00:00+01:00",
            "2023-11-16 18:15:46.0123456789",
            "2023-11-16 18:15:+6",
            "2023-11-16 18:15:46+é1:00",
        ] {
            assert_eq!(timestamp_ns(text), None, "{text:?}");
        }
    }

    #[test]
    fn errors_name_file_and_line() {
        let row = "2023-11-16 18:15:46.6805900,374,44\n";
        assert_eq!(
            error_of(&format!("{HEADER}{row}2023-11-16 18:15:47,many,4\n")),
            "trace.csv:3: ContextTokens \"many\" is not a number of tokens"
        );
        assert_eq!(
            error_of(&format!("{HEADER}{row}2023-11-16 18:15:47,5,-4\n")),
            "trace.csv:3: GeneratedTokens \"-4\" is not a number of tokens"
        );
        assert_eq!(
            error_of(&format!("{HEADER}{row}{row}2023-11-16 18:15:47,5\n")),
            "trace.csv:4: 2 fields, so that GeneratedTokens is missing"
        );
        assert!(
            error_of(&format!("{HEADER}noon,5,5\n")).starts_with("trace.csv:2: TIMESTAMP \"noon\"")
        );
        assert!(
            error_of(&format!("{HEADER}2023-11-16 18:15:46,1048576,1\n"))
                .contains(":2: a request of 1048577 tokens")
        );
    }

    #[test]
    fn rejects_wrong_columns_empty_traces_and_long_spans() {
        let error = error_of("time,prompt,answer\n1,2,3\n");
        assert!(
            error.starts_with("trace.csv:1: no column TIMESTAMP"),
            "{error}"
        );
        assert_eq!(error_of(HEADER), "trace.csv: the trace holds no requests");
        assert!(error_of("").contains("no column TIMESTAMP"));
        let error = error_of(&format!(
            "{HEADER}2023-01-01 00:00:00,1,1\n2024-01-01 00:00:00,1,1\n"
        ));
        assert_eq!(
            error,
            "trace.csv: the trace spans 365 days; at most 31 can be replayed"
        );
    }

    #[test]
    fn rejects_bytes_that_are_no_text() {
        let mut bytes = HEADER.as_bytes().to_vec();
        bytes.extend(b"2023-11-16 18:15:46,\xff,1\n");
        let error = format!(
            "{:#}",
            parse(&bytes[..], "trace.csv").expect_err("must not parse")
        );
        assert!(error.starts_with("trace.csv:2: "), "{error}");
    }
}
