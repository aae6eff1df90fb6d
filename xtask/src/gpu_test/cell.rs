//! One cell of the matrix: what a row runs, and under which conditions.

/// A choice of named values, in order.
macro_rules! choice {
    ($(#[$doc:meta])* $name:ident { $($(#[$about:meta])* $value:ident = $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum $name { $($(#[$about])* $value),* }

        impl $name {
            pub const ALL: [Self; [$($word),*].len()] = [$(Self::$value),*];

            /// How reports and command lines name it.
            pub fn word(self) -> &'static str {
                match self { $(Self::$value => $word),* }
            }
        }
    };
}

choice! {
    /// The driver under the tests.
    Driver {
        /// NVIDIA's, with a GPU behind it.
        Real = "real",
        /// The one of `cuda-vmm-sim`, called from within the program.
        Simulated = "simulated",
        /// The same as a `libcuda.so.1`, which the program takes for NVIDIA's. Not of the matrix: `test --cuda` has the
        /// facade's CUDA programs run on it.
        SimulatedLibrary = "simulated-library",
    }
}

choice! {
    /// What came of a row.
    State {
        /// Each program succeeded, ran tests, and opened the driver that it should.
        Pass = "PASS",
        /// One of them did not.
        Fail = "FAIL",
        /// It was not run, as the machine lacks something.
        Skipped = "SKIPPED",
    }
}

choice! {
    /// A list of test programs that belong together.
    Suite {
        /// The driver's rules, and memory shared between processes.
        Core = "core",
        Pools = "pools",
        /// The Candle crate.
        Facade = "facade",
        /// Whether anything is left over.
        Leaks = "leaks",
        /// Random operations on many threads for some seconds.
        Stress = "stress",
    }
}

/// The package without Candle, and that of the facade.
pub const CORE: &str = "cuda-vmm";
pub const FACADE: &str = "candle-cuda-vmm";

/// The sizes of the pools' pages in MiB. With 0 they have the device's own granularity, whatever it is; that of NVIDIA's
/// present GPUs is 2 MiB.
const PAGES_MIB: [u64; 4] = [0, 2, 16, 32];

impl Driver {
    /// Whether its programs open a `libcuda.so.1`.
    pub fn is_library(self) -> bool {
        self != Self::Simulated
    }

    /// The kinds of Candle device that the facade's tests open on it: CUDA devices that work on the default stream or on one
    /// of their own, or Candle's CPU device.
    fn candle_devices(self) -> &'static [Option<&'static str>] {
        match self {
            Self::Real | Self::SimulatedLibrary => &[Some("default-stream"), Some("own-stream")],
            Self::Simulated => &[Some("cpu")],
        }
    }
}

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

impl Program {
    /// Its name in a bundle. The core's programs serve both drivers; the facade's are built twice, as the one for the real
    /// driver cannot even start without the CUDA libraries.
    pub fn file_name(&self) -> String {
        let name = format!("{}-{}", self.package, self.target);
        match self.package {
            FACADE => format!("{name}-{}", self.driver.word()),
            _ => name,
        }
    }
}

/// One cell of the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cell {
    pub driver: Driver,
    /// How many devices the tests use.
    pub devices: u32,
    /// The size of the pools' pages, of [`PAGES_MIB`].
    pub page_mib: u64,
    /// The kind of Candle device, for the facade only.
    pub candle_device: Option<&'static str>,
    pub suite: Suite,
    /// Whether it is run under NVIDIA's memory checker.
    pub sanitized: bool,
}

impl Cell {
    /// Every cell, in order; with `sanitized` those that the memory checker is for.
    pub fn all(sanitized: bool) -> Vec<Self> {
        let mut cells = Self::of(Driver::Real, sanitized);
        match sanitized {
            true => cells.retain(|cell| cell.suite == Suite::Core),
            false => cells.extend(Self::of(Driver::Simulated, false)),
        }
        cells
    }

    /// The cells of `test --cuda`: each kind of CUDA device that Candle has, with one device and with two.
    pub fn simulated_library() -> Vec<Self> {
        let mut cells = Self::of(Driver::SimulatedLibrary, false);
        cells.retain(|cell| cell.suite == Suite::Facade && cell.page_mib == 0);
        cells
    }

    fn of(driver: Driver, sanitized: bool) -> Vec<Self> {
        let mut cells = Vec::new();
        let pages = [1, 2].map(|devices| PAGES_MIB.map(|page_mib| (devices, page_mib)));
        for (devices, page_mib) in pages.concat() {
            for suite in Suite::ALL {
                let candle_devices = match (suite, driver, devices) {
                    // Candle has one CPU device.
                    (Suite::Facade, Driver::Simulated, 2) => &[],
                    (Suite::Facade, ..) => driver.candle_devices(),
                    _ => &[None],
                };
                cells.extend(candle_devices.iter().map(|&candle_device| Self {
                    driver,
                    devices,
                    page_mib,
                    candle_device,
                    suite,
                    sanitized,
                }));
            }
        }
        cells
    }

    /// The suite's name, which says whether it is sanitized.
    pub fn suite_name(&self) -> String {
        let suffix = if self.sanitized { "-sanitized" } else { "" };
        format!("{}{suffix}", self.suite.word())
    }

    /// The page's size, as reports and command lines name it.
    pub fn page(&self) -> String {
        match self.page_mib {
            0 => "granularity".to_owned(),
            mib => format!("{mib}MiB"),
        }
    }

    /// The row's name: its place on each axis.
    pub fn name(&self) -> String {
        let (driver, page, suite) = (self.driver.word(), self.page(), self.suite_name());
        let candle_device = self.candle_device.unwrap_or("-");
        format!("{driver}/{}/{page}/{candle_device}/{suite}", self.devices)
    }

    /// Whether a word of the command line is true of this cell.
    pub fn is(&self, word: &str) -> bool {
        let name = self.name();
        let is_on_axis = word != "-" && name.split('/').any(|place| place == word);
        is_on_axis || word == self.suite.word() || word == name
    }

    /// The test programs, in order.
    pub fn programs(&self) -> Vec<Program> {
        let driver = self.driver;
        let (package, targets): (_, &[_]) = match self.suite {
            Suite::Core => (CORE, &["conformance", "share"]),
            Suite::Pools => (CORE, &["device", "faults"]),
            Suite::Facade if driver.is_library() => (FACADE, &["device", "cuda"]),
            Suite::Facade => (FACADE, &["device"]),
            Suite::Leaks => (CORE, &["leaks"]),
            Suite::Stress => (CORE, &["stress"]),
        };
        let program = |&target| Program {
            driver,
            package,
            target,
        };
        targets.iter().map(program).collect()
    }

    /// For how many seconds the stress test goes on; 0 for other suites. One cell of each driver has
    /// the seconds that were asked for, the others have few.
    pub fn stress_seconds(&self, asked: u64) -> u64 {
        match (self.suite, self.devices, self.page_mib) {
            (Suite::Stress, 1, 2) => asked,
            (Suite::Stress, _, _) => 2,
            _ => 0,
        }
    }

    /// The variables by which the tests know their cell.
    pub fn variables(&self, stress_seconds: u64) -> Vec<(&'static str, String)> {
        let driver = match self.driver {
            Driver::Simulated => self.driver,
            // The programs take for real what they open as a library.
            Driver::Real | Driver::SimulatedLibrary => Driver::Real,
        };
        let mut variables = vec![
            ("CUDA_VMM_TEST_DRIVER", driver.word().to_owned()),
            ("CUDA_VMM_TEST_DEVICES", self.devices.to_string()),
        ];
        if self.driver == Driver::SimulatedLibrary {
            variables.push(("CUDA_VMM_SIM_DEVICES", self.devices.to_string()));
        }
        if self.page_mib > 0 {
            let bytes = self.page_mib << 20;
            variables.push(("CUDA_VMM_TEST_PAGE_BYTES", bytes.to_string()));
        } else if self.driver == Driver::Simulated && self.suite != Suite::Facade {
            // Small, so that a test which takes 2 MiB for granted fails.
            variables.push(("CUDA_VMM_TEST_GRANULARITY_BYTES", "65536".to_owned()));
        }
        if let (true, Some(kind)) = (self.driver.is_library(), self.candle_device) {
            variables.push(("CUDA_VMM_TEST_CANDLE_DEVICE", kind.to_owned()));
        }
        if self.suite == Suite::Stress {
            let seconds = self.stress_seconds(stress_seconds);
            variables.push(("CUDA_VMM_TEST_STRESS_SECONDS", seconds.to_string()));
        }
        variables
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_row_has_a_name_of_its_own_programs_and_variables() {
        let cells = [Cell::all(false), Cell::all(true), Cell::simulated_library()].concat();
        let names: BTreeSet<String> = cells.iter().map(Cell::name).collect();
        assert_eq!(names.len(), cells.len());
        let lines = cells.iter().map(|cell| {
            let programs = cell.programs();
            let programs: Vec<_> = programs.iter().map(Program::file_name).collect();
            let variables = cell.variables(60);
            let variables = variables
                .iter()
                .map(|(name, value)| format!(" {name}={value}"));
            let variables = variables.collect::<String>();
            format!("{}: {};{variables}\n", cell.name(), programs.join(" "))
        });
        // `UPDATE_EXPECT=1` writes the file anew.
        expect_test::expect_file!["rows.txt"].assert_eq(&lines.collect::<String>());
    }
}
