//! The wheels that may be brought, by exact version and hash.

use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;

/// The file that holds every pin, in pip's requirements format.
const PINS: &str = include_str!("../pins.txt");

/// One wheel: its pip requirement, and what a person calls it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    /// `name==version`.
    pub key: String,
    /// The requirement with its hashes, one line.
    pub requirement: String,
}

/// The pins of `keys` (`name==version`), in that order.
pub fn select(keys: &[&str]) -> Result<Vec<Pin>> {
    let all = parse(PINS).context("xtask/pins.txt is malformed")?;
    keys.iter()
        .map(|&key| {
            all.get(key)
                .cloned()
                .with_context(|| format!("xtask/pins.txt has no pin for {key}"))
        })
        .collect()
}

/// What a folder made from `pins` is stamped with.
pub fn stamp(pins: &[Pin]) -> String {
    pins.iter()
        .map(|pin| format!("{}\n", pin.requirement))
        .collect()
}

fn parse(text: &str) -> Result<BTreeMap<String, Pin>> {
    let mut pins = BTreeMap::new();
    for line in text.replace("\\\n", " ").lines() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let mut words = line.split_whitespace();
        let key = words.next().unwrap_or_default();
        ensure!(
            key.split_once("==")
                .is_some_and(|(name, version)| !name.is_empty() && !version.is_empty()),
            "{key:?} is not name==version"
        );
        let hashes: Vec<&str> = words.collect();
        ensure!(!hashes.is_empty(), "{key} has no hash");
        for hash in &hashes {
            let digits = hash.strip_prefix("--hash=sha256:").unwrap_or_default();
            ensure!(
                digits.len() == 64 && digits.bytes().all(|digit| digit.is_ascii_hexdigit()),
                "{key} has {hash:?}, which is not --hash=sha256: and 64 hexadecimal digits"
            );
        }
        let pin = Pin {
            key: key.to_owned(),
            requirement: format!("{key} {}", hashes.join(" ")),
        };
        if pins.insert(key.to_owned(), pin).is_some() {
            bail!("{key} is pinned twice");
        }
    }
    Ok(pins)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_of_pins_parses_and_holds_every_set() {
        assert!(parse(PINS).is_ok());
        assert!(select(crate::setup::LIBCLANG).is_ok());
        assert!(select(crate::setup::TOOLKIT).is_ok());
        for (_, key) in crate::headers::VERSIONS {
            assert!(select(&[key]).is_ok(), "{key}");
        }
    }

    #[test]
    fn continued_lines_are_joined_and_comments_left_out() {
        let hash = "a".repeat(64);
        let text =
            format!("# why\n\nx==1 \\\n    --hash=sha256:{hash} \\\n    --hash=sha256:{hash}\n");
        let pins = parse(&text).unwrap();
        assert_eq!(pins.len(), 1);
        assert_eq!(
            pins["x==1"].requirement,
            format!("x==1 --hash=sha256:{hash} --hash=sha256:{hash}")
        );
    }

    #[test]
    fn a_pin_without_version_or_good_hash_or_twice_is_refused() {
        let hash = "a".repeat(64);
        for bad in [
            format!("x --hash=sha256:{hash}"),
            "x==1".to_owned(),
            "x==1 --hash=sha256:abc".to_owned(),
            format!("x==1 --hash=md5:{hash}"),
            format!("x==1 --hash=sha256:{hash}\nx==1 --hash=sha256:{hash}"),
        ] {
            assert!(parse(&bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_unknown_pin_is_an_error_that_names_it() {
        let error = select(&["nothing==0"]).unwrap_err().to_string();
        assert!(error.contains("nothing==0"), "{error}");
    }
}
