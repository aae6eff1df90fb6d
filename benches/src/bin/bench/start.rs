//! The start of a measuring program: its arguments, and what becomes of errors.

use anyhow::Result;
use clap::Parser;
use std::process::ExitCode;

/// The exit code of a usage error.
const USAGE: u8 = 64;

/// Reads the arguments of the program of this name and runs it; answers its exit code.
pub fn start<A: Parser>(program: &str, run: impl FnOnce(&A) -> Result<ExitCode>) -> ExitCode {
    let arguments = match A::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Telling why can only fail if there is nobody left to tell.
            let _ = error.print();
            return match error.exit_code() {
                0 => ExitCode::SUCCESS,
                _ => ExitCode::from(USAGE),
            };
        }
    };
    match run(&arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{program}: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
