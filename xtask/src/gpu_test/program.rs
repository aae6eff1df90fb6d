//! A test program: which one it is, and how it is run on its own.

use super::cell::Driver;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// A test target of a package, built for one driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Program {
    /// The driver that its rows are for.
    pub driver: Driver,
    /// The package.
    pub package: &'static str,
    /// The test target.
    pub target: &'static str,
}

/// Where the executables of programs are.
pub type Programs = BTreeMap<Program, PathBuf>;

impl Program {
    /// The package without Candle.
    pub const CORE: &'static str = "cuda-vmm";
    /// The package of the facade.
    pub const FACADE: &'static str = "candle-cuda-vmm";

    /// Its name in a bundle. The core's programs serve both drivers; the facade's are built twice, as the
    /// one for the real driver cannot even start without the CUDA libraries.
    pub fn file_name(&self) -> String {
        let Self {
            driver,
            package,
            target,
        } = self;
        match *package {
            Self::FACADE => format!("{package}-{target}-{}", driver.word()),
            _ => format!("{package}-{target}"),
        }
    }
}
