//! The matrix as a bundle runs it, with shell scripts in place of the programs; no GPU is needed.
#![cfg(unix)]

mod fake;
mod rows;
mod script;
mod usage;
