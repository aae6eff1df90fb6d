//! The command line of the matrix, the same in place and for a bundle's `run`.

use super::cell::{Cell, Driver};
use std::ffi::OsString;
use std::path::PathBuf;

/// The oldest GPU for which Candle's kernels are built unless told otherwise: 90 is 9.0.
pub const COMPUTE_CAP: u32 = 90;

/// What can be asked of the matrix.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    /// The drivers whose rows are asked for
    #[arg(long, value_enum, default_value_t = Drivers::Real)]
    pub driver: Drivers,
    /// Ask for the rows with one device, or for those with two devices too [default: as many as this
    /// machine has]
    #[arg(long, value_name = "1|2", value_parser = clap::value_parser!(u32).range(1..=2))]
    pub devices: Option<u32>,
    /// Only rows of which every word is true: a value of an axis, or a row's name; can be given again
    /// for more rows
    #[arg(long, value_name = "WORD[,WORD...]", value_parser = known_words)]
    pub only: Vec<Words>,
    /// Print the names of the rows, and do nothing else; asks for two devices unless told otherwise
    #[arg(long)]
    pub list: bool,
    /// Write the results to this file too, as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// For how many seconds the longest row of the suite stress runs on each driver
    #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub stress_seconds: u64,
    /// Run the suite core on the real driver under NVIDIA's compute-sanitizer, with one device and pages
    /// of 2 MiB unless told otherwise
    #[arg(long)]
    pub sanitize: bool,
    /// After how many seconds a program is stopped, the seconds of a stress test not counted
    #[arg(long, value_name = "N", default_value_t = 300, hide = true)]
    pub limit_seconds: u64,
}

/// Which drivers' rows are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Drivers {
    /// NVIDIA's
    Real,
    /// The simulator
    Simulated,
    /// Both
    All,
}

impl Drivers {
    /// Whether this one's rows are asked for.
    pub fn include(self, driver: Driver) -> bool {
        match self {
            Self::Real => driver == Driver::Real,
            Self::Simulated => driver == Driver::Simulated,
            Self::All => Driver::ALL.contains(&driver),
        }
    }
}

/// The words of one `--only`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Words(pub Vec<String>);

fn known_words(text: &str) -> Result<Words, String> {
    let words = Words(text.split(',').map(str::to_owned).collect());
    let mut cells = Cell::all(false);
    cells.extend(Cell::all(true));
    match words
        .0
        .iter()
        .find(|word| !cells.iter().any(|cell| cell.is(word)))
    {
        None => Ok(words),
        Some(word) => Err(format!(
            "{word:?} is neither a value of an axis nor the name of a row, which --list prints"
        )),
    }
}

/// What a bundle's `run` passes on, and what it was told.
#[derive(Clone, Debug, clap::Args)]
#[command(disable_help_subcommand = true)]
pub struct BundleArguments {
    /// Where the bundle was unpacked
    #[arg(long, hide = true)]
    pub folder: PathBuf,
    /// The folder of `run`
    #[arg(long, hide = true)]
    pub beside: PathBuf,
    /// What is asked of the matrix.
    #[command(flatten)]
    pub matrix: Arguments,
    /// Something else than the matrix.
    #[command(subcommand)]
    pub other: Option<Other>,
}

/// What a bundle's `run` can do but run the matrix.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Other {
    /// Run a program of the bundle that is no test; what follows its name goes to it
    #[command(disable_help_flag = true)]
    Program {
        /// The program's name
        name: String,
        /// Its arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
}

/// A command line that cannot be followed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);
