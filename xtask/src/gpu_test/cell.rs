//! The cells of the matrix: what a row runs, and under which conditions.
//!
//! `rows.csv` has a line for each: its name, its tests (package and target), and their variables.

use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;
use strum::{Display, EnumIter, EnumString};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
#[derive(Display, EnumIter, EnumString)]
#[strum(serialize_all = "kebab-case")]
pub enum Driver {
    /// NVIDIA's, with a GPU behind it.
    Real,
    /// The one of `cuda-vmm-sim`, called from within the program.
    Simulated,
    /// The same as a `libcuda.so.1`, on which `test --cuda` has the facade's CUDA programs run.
    SimulatedLibrary,
}

#[derive(Clone, Copy, Debug, Display, EnumIter, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
#[strum(serialize_all = "UPPERCASE")]
pub enum State {
    /// Each program succeeded, ran tests, and opened the driver that it should.
    Pass,
    /// One of them did not.
    Fail,
    /// It was not run, as the machine lacks something.
    Skipped,
}

/// The package without Candle, that of the facade, that of the benches, and the server.
pub const CORE: &str = "cuda-vmm";
pub const FACADE: &str = "candle-cuda-vmm";
pub const BENCHES: &str = "cuda-vmm-benches";
pub const SERVER: &str = "cuda-vmm-serve";
/// The feature with which Candle has CUDA devices, and the facade all of its kernels.
pub const CUDA: &str = "attention";

/// The test that runs kernels on the host, and opens no driver.
pub const HOST_KERNELS: &str = "host_kernels";

/// A target of a package, built for one driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Program {
    pub driver: Driver,
    pub package: &'static str,
    /// What cargo calls it: a `test`, an `example` or a `bin`.
    pub kind: &'static str,
    pub name: &'static str,
}

/// The programs of a bundle that are no tests, this one among them.
pub const DEMO: Program = other(CORE, "example", "demo");
pub const GENERATE: Program = other(FACADE, "example", "generate");
pub const SOAK: Program = other(FACADE, "example", "soak");
pub const TWO_MODELS: Program = other(FACADE, "example", "two_models");
pub const BENCH: Program = other(BENCHES, "bin", "bench");
pub const BENCH_CANDLE: Program = other(BENCHES, "bin", "bench-candle");
pub const SERVE: Program = other(SERVER, "bin", "cuda-vmm-serve");
pub const BENCH_SERVE: Program = other(SERVER, "bin", "bench-serve");
pub const XTASK: Program = other("xtask", "bin", "xtask");

pub const fn other(package: &'static str, kind: &'static str, name: &'static str) -> Program {
    Program {
        driver: Driver::Real,
        package,
        kind,
        name,
    }
}

impl Program {
    /// The features of its package with which it is built.
    pub fn features(&self) -> &'static str {
        match self.package {
            CORE => "simulator",
            // The tests for CPU devices start on any machine.
            FACADE if self.driver != Driver::Simulated => CUDA,
            SERVER => CUDA,
            _ if *self == BENCH_CANDLE => CUDA,
            _ => "",
        }
    }

    /// Its file in a bundle. The core's tests serve both drivers; the facade's are built twice, as the
    /// ones for the real driver cannot even start without the CUDA libraries.
    pub fn place(&self) -> String {
        let (name, driver) = (self.name, self.driver);
        match (self.kind, self.package) {
            ("test", FACADE) => format!("tests/{FACADE}-{name}-{driver}"),
            ("test", package) => format!("tests/{package}-{name}"),
            _ if *self == XTASK => "bin/xtask".to_owned(),
            _ => format!("programs/{name}"),
        }
    }
}

pub type Programs = BTreeMap<Program, PathBuf>;

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Cell {
    pub name: &'static str,
    pub driver: Driver,
    pub devices: u32,
    /// The size of the pools' pages, or the device's own granularity, whatever it is.
    pub page: &'static str,
    /// For the facade: the CPU device, or a CUDA device on the default stream or on one of its own.
    pub candle_device: Option<&'static str>,
    pub suite: &'static str,
    #[serde(skip)]
    pub programs: Vec<Program>,
    #[serde(skip)]
    variables: Vec<(&'static str, &'static str)>,
}

impl Cell {
    /// Every cell, in order; with `sanitized` those that the memory checker is for.
    pub fn all(sanitized: bool) -> Vec<Self> {
        let is_mine = |cell: &Self| {
            cell.driver != Driver::SimulatedLibrary && cell.is_sanitized() == sanitized
        };
        Self::listed().filter(is_mine).collect()
    }

    /// All of them, those of `test --cuda` too.
    pub fn listed() -> impl Iterator<Item = Self> {
        // The first line is a heading.
        let rows = include_str!("rows.csv").lines().skip(1);
        rows.map(|row| Self::parse(row).expect("rows.csv is damaged"))
    }

    fn parse(line: &'static str) -> Option<Self> {
        let (name, rest) = line.split_once(',')?;
        let (tests, variables) = rest.split_once(',')?;
        let axes: [&str; 5] = name.split('/').collect::<Vec<_>>().try_into().ok()?;
        let [driver, devices, page, candle_device, suite] = axes;
        let driver = driver.parse().ok()?;
        let tests = tests.split(' ').map(|test| test.split_once('/'));
        let test = |(package, name)| Program {
            driver,
            ..other(package, "test", name)
        };
        let variables = variables.split(' ').map(|it| it.split_once('='));
        Some(Self {
            name,
            driver,
            devices: devices.parse().ok()?,
            page,
            candle_device: Some(candle_device).filter(|kind| *kind != "-"),
            suite,
            programs: tests.map(|it| it.map(test)).collect::<Option<_>>()?,
            variables: variables.collect::<Option<_>>()?,
        })
    }

    /// Whether its programs open a `libcuda.so.1`.
    pub fn opens_library(&self) -> bool {
        self.driver != Driver::Simulated
    }

    pub fn is_sanitized(&self) -> bool {
        self.suite == "core-sanitized"
    }

    /// Whether a word of the command line is true of this cell.
    pub fn is(&self, word: &str) -> bool {
        let is_on_axis = word != "-" && self.name.split('/').any(|place| place == word);
        is_on_axis || word == self.name || (word == "core" && self.is_sanitized())
    }

    /// The variables by which the tests know their cell.
    pub fn variables(&self, stress_seconds: u64) -> impl Iterator<Item = (&str, String)> {
        let variables = self.variables.iter();
        let seconds = stress_seconds.to_string();
        variables.map(move |(name, value)| (*name, value.replace("asked", &seconds)))
    }

    /// For how many seconds the stress test goes on; 0 for other suites.
    pub fn stress_seconds(&self, asked: u64) -> u64 {
        let mut variables = self.variables(asked);
        let seconds = variables.find(|(name, _)| *name == "CUDA_VMM_TEST_STRESS_SECONDS");
        seconds.map_or(0, |(_, seconds)| seconds.parse().unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use itertools::Itertools;

    #[test]
    fn every_row_has_a_name_of_its_own_and_the_variables_that_it_says() {
        assert!(Cell::listed().map(|cell| cell.name).all_unique());
        for cell in Cell::listed() {
            let variables: BTreeMap<_, _> = cell.variables(60).collect();
            let says = |variable: &str, expected: Option<String>| {
                let name = format!("CUDA_VMM_TEST_{variable}");
                assert_eq!(variables.get(&*name), expected.as_ref(), "{}", cell.name);
            };
            let driver = ["simulated", "real"][usize::from(cell.opens_library())];
            says("DRIVER", Some(driver.to_owned()));
            says("DEVICES", Some(cell.devices.to_string()));
            let mib = cell.page.strip_suffix("MiB");
            let bytes = mib.map(|mib| mib.parse::<u64>().unwrap() << 20);
            says("PAGE_BYTES", bytes.map(|bytes| bytes.to_string()));
            let cuda = cell.candle_device.filter(|kind| *kind != "cpu");
            says("CANDLE_DEVICE", cuda.map(str::to_owned));
            assert_eq!(cell.stress_seconds(60) > 0, cell.suite == "stress");
        }
    }
}
