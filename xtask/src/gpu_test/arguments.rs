//! The command line of the matrix, the same in place and for a bundle's `run`, and the rows that it asks for.

use super::cell::{Cell, Driver};
use std::ffi::OsString;
use std::path::PathBuf;

/// The oldest GPU for which Candle's kernels are built unless told otherwise: 90 is 9.0.
pub const COMPUTE_CAP: u32 = 90;

#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    /// The drivers whose rows are asked for
    #[arg(long, value_enum, default_value_t = Drivers::Real)]
    pub driver: Drivers,
    /// Ask for the rows with one device, or for those with two devices too [default: as many as this
    /// machine has]
    #[arg(long, value_name = "1|2", value_parser = clap::value_parser!(u32).range(1..=2))]
    pub devices: Option<u32>,
    /// Only rows of which every word is true: an axis's value, or a row's name; more if given again
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

#[derive(Debug, clap::Args)]
pub struct InPlace {
    #[command(flatten)]
    pub matrix: Arguments,
    /// Run nothing, but pack all programs into this folder, for a machine that has a GPU and no toolchain
    #[arg(long, value_name = "FOLDER", conflicts_with_all = ["driver", "devices", "only", "list", "json", "stress_seconds", "sanitize"])]
    pub bundle: Option<PathBuf>,
    #[command(flatten)]
    pub oldest: OldestGpu,
}

#[derive(Debug, clap::Args)]
pub struct OldestGpu {
    /// The oldest GPU for which Candle's kernels are compiled, as NVIDIA numbers them without the dot
    #[arg(long, default_value_t = COMPUTE_CAP, value_parser = clap::value_parser!(u32).range(53..1000))]
    pub compute_cap: u32,
}

/// What goes to a program.
#[derive(Clone, Debug, clap::Args)]
pub struct Passed {
    /// Arguments of the program (`--help` lists them)
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub arguments: Vec<OsString>,
}

/// What a bundle's `run` passes on, and what it was told.
#[derive(Debug, clap::Args)]
#[command(disable_help_subcommand = true)]
pub struct InBundle {
    /// Where the bundle was unpacked
    #[arg(long, hide = true)]
    pub folder: PathBuf,
    /// The folder of `run`
    #[arg(long, hide = true)]
    pub beside: PathBuf,
    #[command(flatten)]
    pub matrix: Arguments,
    #[command(subcommand)]
    pub other: Option<Other>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Drivers {
    /// NVIDIA's
    Real,
    /// The simulator
    Simulated,
    /// Both
    All,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Words(pub Vec<String>);

fn known_words(text: &str) -> Result<Words, String> {
    let words: Vec<String> = text.split(',').map(str::to_owned).collect();
    let cells = [Cell::all(false), Cell::all(true)].concat();
    let is_known = |word: &&String| cells.iter().any(|cell| cell.is(word));
    let wrong = words.iter().find(|word| !is_known(word));
    let what = "neither a value of an axis nor the name of a row, which --list prints";
    let wrong = wrong.map(|word| format!("{word:?} is {what}"));
    wrong.map_or(Ok(Words(words)), Err)
}

impl Arguments {
    /// The rows for this many GPUs, `None` if none answers; an error if there are none.
    pub fn select(&self, gpus: Option<u32>) -> Result<Vec<Cell>, Usage> {
        let devices = self.devices.unwrap_or(if gpus == Some(1) { 1 } else { 2 });
        let cells = self.cells(devices);
        let cells = match self.left_out(gpus) {
            _ if !cells.is_empty() => Ok(cells),
            0 => Err("--driver, --devices, --sanitize and --only together ask for no row".into()),
            count => Err(format!(
                "the {count} rows asked for need two GPUs and this machine has one; --devices 2 demands them"
            )),
        };
        cells.map_err(Usage)
    }

    /// How many rows were not asked for only because this machine has one GPU.
    pub fn left_out(&self, gpus: Option<u32>) -> usize {
        match (self.devices, gpus) {
            (None, Some(1)) => self.cells(2).len() - self.cells(1).len(),
            _ => 0,
        }
    }

    /// The rows, if the real ones may have so many devices.
    fn cells(&self, devices: u32) -> Vec<Cell> {
        let mut cells = Cell::all(self.sanitize);
        cells.retain(|cell| {
            let (most, is_asked) = match cell.driver {
                Driver::Real => (devices, self.driver != Drivers::Simulated),
                _ => (self.devices.unwrap_or(2), self.driver != Drivers::Real),
            };
            let is_meant = |Words(words): &Words| {
                words.iter().all(|word| cell.is(word)) && self.is_due(cell, words)
            };
            // Without words every row is meant.
            let no_words = self.only.is_empty().then(|| Words(Vec::new()));
            let words_are_true = self.only.iter().chain(&no_words).any(is_meant);
            is_asked && cell.devices <= most && words_are_true
        });
        cells
    }

    /// Whether `words` ask for this cell. To save time, sanitizing is done for one value of an axis
    /// of which nothing is said.
    fn is_due(&self, cell: &Cell, words: &[String]) -> bool {
        let said = |value: &str| words.iter().any(|word| word == value || word == cell.name);
        let is_device = self.devices.is_some() || said(&cell.devices.to_string());
        let is_page = cell.page == "2MiB" || said(cell.page);
        !self.sanitize || ((cell.devices == 1 || is_device) && is_page)
    }
}

/// What a bundle's `run` can do but run the matrix.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Other {
    /// Run a program of the bundle that is no test; what follows its name goes to it
    #[command(disable_help_flag = true)]
    Program {
        /// The program's name
        name: String,
        #[command(flatten)]
        passed: Passed,
    },
}

/// A command line that cannot be followed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);
