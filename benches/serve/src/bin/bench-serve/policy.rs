//! The policies of memory that are compared.

use clap::ValueEnum;
use serde::Serialize;

/// How the server's blocks get their memory, in the order of the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// A part of the limit for each model
    Static,
    /// Pages as they are needed, and back at once
    PageAtATime,
    /// As needed, made ahead, and back when others want it
    Elastic,
    /// All models have all of the limit; what is in use is counted
    Ideal,
}

impl Policy {
    pub const ALL: [Self; 4] = [Self::Static, Self::PageAtATime, Self::Elastic, Self::Ideal];

    pub fn name(self) -> &'static str {
        ["static split", "page at a time", "elastic", "ideal"][self as usize]
    }

    /// What the server's `--policy` calls it.
    pub fn flag(self) -> &'static str {
        ["static", "page-at-a-time", "elastic", "ideal"][self as usize]
    }
}
