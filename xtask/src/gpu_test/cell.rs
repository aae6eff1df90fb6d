//! One cell of the matrix: what a row runs, and under which conditions.

use super::program::Program;

/// The driver under the tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Driver {
    /// NVIDIA's, with a GPU behind it.
    Real,
    /// The one of `cuda-vmm-sim`, called from within the program.
    Simulated,
    /// The same as a `libcuda.so.1`, which the program takes for NVIDIA's. Not of the matrix: `test --cuda` has
    /// the facade's CUDA programs run on it.
    SimulatedLibrary,
}

impl Driver {
    /// Those of the matrix, in order.
    pub const ALL: [Self; 2] = [Self::Real, Self::Simulated];

    /// How the row names it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Real => "real",
            Self::Simulated => "simulated",
            Self::SimulatedLibrary => "simulated-library",
        }
    }

    /// Whether its programs open a `libcuda.so.1`.
    pub fn is_library(self) -> bool {
        matches!(self, Self::Real | Self::SimulatedLibrary)
    }
}

/// The size of the pools' pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Page {
    /// The device's own granularity, whatever it is.
    Granularity,
    /// 2 MiB, the granularity of NVIDIA's present GPUs.
    Mib2,
    /// 16 MiB.
    Mib16,
    /// 32 MiB.
    Mib32,
}

impl Page {
    /// All, in order.
    pub const ALL: [Self; 4] = [Self::Granularity, Self::Mib2, Self::Mib16, Self::Mib32];

    /// How the row names it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Granularity => "granularity",
            Self::Mib2 => "2MiB",
            Self::Mib16 => "16MiB",
            Self::Mib32 => "32MiB",
        }
    }

    /// Its size where the row fixes it.
    fn bytes(self) -> Option<u64> {
        match self {
            Self::Granularity => None,
            Self::Mib2 => Some(2 << 20),
            Self::Mib16 => Some(16 << 20),
            Self::Mib32 => Some(32 << 20),
        }
    }
}

/// The kind of Candle device that the facade's tests open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CandleDevice {
    /// A CUDA device that works on the default stream.
    DefaultStream,
    /// A CUDA device that works on a stream of its own.
    OwnStream,
    /// Candle's CPU device, over the simulated driver.
    Cpu,
}

impl CandleDevice {
    /// The kinds that there are on a driver.
    fn of(driver: Driver) -> &'static [Self] {
        match driver {
            Driver::Real | Driver::SimulatedLibrary => &[Self::DefaultStream, Self::OwnStream],
            Driver::Simulated => &[Self::Cpu],
        }
    }

    /// How the row names it, and the tests' variable too.
    pub fn word(self) -> &'static str {
        match self {
            Self::DefaultStream => "default-stream",
            Self::OwnStream => "own-stream",
            Self::Cpu => "cpu",
        }
    }
}

/// A list of test programs that belong together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suite {
    /// The driver's rules, and memory shared between processes.
    Core,
    /// The pools.
    Pools,
    /// The Candle crate.
    Facade,
    /// Whether anything is left over.
    Leaks,
    /// Random operations on many threads for some seconds.
    Stress,
}

impl Suite {
    /// All, in order.
    pub const ALL: [Self; 5] = [
        Self::Core,
        Self::Pools,
        Self::Facade,
        Self::Leaks,
        Self::Stress,
    ];

    /// How the row names it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Core => "core",
            Self::Pools => "pools",
            Self::Facade => "facade",
            Self::Leaks => "leaks",
            Self::Stress => "stress",
        }
    }

    /// The package and the test targets in it that there are for a driver.
    fn targets(self, driver: Driver) -> (&'static str, &'static [&'static str]) {
        match self {
            Self::Core => (Program::CORE, &["conformance", "share"]),
            Self::Pools => (Program::CORE, &["device", "faults"]),
            Self::Facade if driver.is_library() => (Program::FACADE, &["device", "cuda"]),
            Self::Facade => (Program::FACADE, &["device"]),
            Self::Leaks => (Program::CORE, &["leaks"]),
            Self::Stress => (Program::CORE, &["stress"]),
        }
    }
}

/// One cell of the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cell {
    /// The driver under the tests.
    pub driver: Driver,
    /// How many devices the tests use.
    pub devices: u32,
    /// The size of the pools' pages.
    pub page: Page,
    /// The kind of Candle device, for the facade only.
    pub candle_device: Option<CandleDevice>,
    /// What is run.
    pub suite: Suite,
    /// Whether it is run under NVIDIA's memory checker.
    pub sanitized: bool,
}

impl Cell {
    /// Every cell, in order; with `sanitized` those that the memory checker is for.
    pub fn all(sanitized: bool) -> Vec<Self> {
        let mut cells = Vec::new();
        for driver in Driver::ALL {
            for devices in [1, 2] {
                for page in Page::ALL {
                    for suite in Suite::ALL {
                        let candle_devices: Vec<_> = match suite {
                            Suite::Facade => {
                                CandleDevice::of(driver).iter().copied().map(Some).collect()
                            }
                            _ => vec![None],
                        };
                        cells.extend(candle_devices.into_iter().map(|candle_device| Self {
                            driver,
                            devices,
                            page,
                            candle_device,
                            suite,
                            sanitized,
                        }));
                    }
                }
            }
        }
        cells.retain(|cell| cell.exists());
        cells
    }

    /// The cells of `test --cuda`: each kind of CUDA device that Candle has, with one device and with two.
    pub fn simulated_library() -> Vec<Self> {
        let mut cells = Vec::new();
        for devices in [1, 2] {
            for &kind in CandleDevice::of(Driver::SimulatedLibrary) {
                cells.push(Self {
                    driver: Driver::SimulatedLibrary,
                    devices,
                    page: Page::Granularity,
                    candle_device: Some(kind),
                    suite: Suite::Facade,
                    sanitized: false,
                });
            }
        }
        cells
    }

    fn exists(&self) -> bool {
        // Candle has one CPU device.
        let one_too_many = self.candle_device == Some(CandleDevice::Cpu) && self.devices > 1;
        let not_for_sanitizer =
            self.sanitized && (self.driver != Driver::Real || self.suite != Suite::Core);
        !one_too_many && !not_for_sanitizer
    }

    /// The suite's name, which says whether it is sanitized.
    pub fn suite_name(&self) -> String {
        let suffix = if self.sanitized { "-sanitized" } else { "" };
        format!("{}{suffix}", self.suite.word())
    }

    /// The row's name: its place on each axis.
    pub fn name(&self) -> String {
        format!(
            "{}/{}/{}/{}/{}",
            self.driver.word(),
            self.devices,
            self.page.word(),
            self.candle_device.map_or("-", CandleDevice::word),
            self.suite_name()
        )
    }

    /// Whether a word of the command line is true of this cell.
    pub fn is(&self, word: &str) -> bool {
        word == self.driver.word()
            || word == self.devices.to_string()
            || word == self.page.word()
            || self.candle_device.is_some_and(|kind| word == kind.word())
            || word == self.suite.word()
            || word == self.suite_name()
            || word == self.name()
    }

    /// The test programs, in order.
    pub fn programs(&self) -> Vec<Program> {
        let (package, targets) = self.suite.targets(self.driver);
        targets
            .iter()
            .map(|&target| Program {
                driver: self.driver,
                package,
                target,
            })
            .collect()
    }

    /// For how many seconds the stress test goes on; 0 for other suites. One cell of each driver has
    /// the seconds that were asked for, the others have few.
    pub fn stress_seconds(&self, asked: u64) -> u64 {
        match (self.suite, self.devices, self.page) {
            (Suite::Stress, 1, Page::Mib2) => asked,
            (Suite::Stress, _, _) => 2,
            _ => 0,
        }
    }

    /// The variables by which the tests know their cell.
    pub fn variables(&self, stress_seconds: u64) -> Vec<(&'static str, String)> {
        // The programs take for real what they open as a library.
        let driver = match self.driver.is_library() {
            true => Driver::Real,
            false => self.driver,
        };
        let mut variables = vec![
            ("CUDA_VMM_TEST_DRIVER", driver.word().to_owned()),
            ("CUDA_VMM_TEST_DEVICES", self.devices.to_string()),
        ];
        if self.driver == Driver::SimulatedLibrary {
            variables.push(("CUDA_VMM_SIM_DEVICES", self.devices.to_string()));
        }
        if let Some(bytes) = self.page.bytes() {
            variables.push(("CUDA_VMM_TEST_PAGE_BYTES", bytes.to_string()));
        } else if self.driver == Driver::Simulated && self.suite != Suite::Facade {
            // Small, so that a test which takes 2 MiB for granted fails.
            variables.push(("CUDA_VMM_TEST_GRANULARITY_BYTES", "65536".to_owned()));
        }
        if let (true, Some(kind)) = (self.driver.is_library(), self.candle_device) {
            variables.push(("CUDA_VMM_TEST_CANDLE_DEVICE", kind.word().to_owned()));
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

    fn cell(name: &str) -> Cell {
        Cell::all(false)
            .into_iter()
            .find(|cell| cell.name() == name)
            .unwrap()
    }

    #[test]
    fn the_matrix_is_as_large_as_its_axes_say_and_no_name_is_there_twice() {
        let cells = Cell::all(false);
        let of = |driver| cells.iter().filter(|cell| cell.driver == driver).count();
        // Four suites without and one with two kinds of Candle device.
        assert_eq!(of(Driver::Real), 2 * 4 * (4 + 2));
        // The facade with one kind, on one device.
        assert_eq!(of(Driver::Simulated), 2 * 4 * 4 + 4);
        assert_eq!(Cell::all(true).len(), 2 * 4);
        let names: BTreeSet<String> = cells.iter().map(Cell::name).collect();
        assert_eq!(names.len(), cells.len());
    }

    #[test]
    fn the_simulated_library_is_not_of_the_matrix_and_its_programs_take_it_for_real() {
        let cells = Cell::simulated_library();
        let names: Vec<String> = cells.iter().map(Cell::name).collect();
        assert_eq!(
            names,
            [
                "simulated-library/1/granularity/default-stream/facade",
                "simulated-library/1/granularity/own-stream/facade",
                "simulated-library/2/granularity/default-stream/facade",
                "simulated-library/2/granularity/own-stream/facade",
            ]
        );
        let all = Cell::all(false);
        assert!(!all.iter().any(|cell| names.contains(&cell.name())));
        let variables = cells[3].variables(0);
        for expected in [
            ("CUDA_VMM_TEST_DRIVER", "real"),
            ("CUDA_VMM_TEST_CANDLE_DEVICE", "own-stream"),
            ("CUDA_VMM_SIM_DEVICES", "2"),
        ] {
            let (name, value) = expected;
            assert!(
                variables.contains(&(name, value.to_owned())),
                "{variables:?}"
            );
        }
        let targets = |cell: &Cell| -> Vec<_> {
            let programs = cell.programs().into_iter();
            programs.map(|program| program.target).collect()
        };
        assert_eq!(targets(&cells[0]), ["device", "cuda"]);
        assert_eq!(
            targets(&cell("real/1/2MiB/own-stream/facade")),
            ["device", "cuda"]
        );
        assert_eq!(targets(&cell("simulated/1/2MiB/cpu/facade")), ["device"]);
    }

    #[test]
    fn variables_follow_the_cell() {
        let variables = |name: &str| {
            let text: Vec<String> = cell(name)
                .variables(60)
                .into_iter()
                .map(|(name, value)| {
                    format!("{}={value}", name.strip_prefix("CUDA_VMM_TEST_").unwrap())
                })
                .collect();
            text.join(" ")
        };
        assert_eq!(
            variables("real/1/granularity/-/core"),
            "DRIVER=real DEVICES=1"
        );
        assert_eq!(
            variables("real/2/16MiB/own-stream/facade"),
            "DRIVER=real DEVICES=2 PAGE_BYTES=16777216 CANDLE_DEVICE=own-stream"
        );
        assert_eq!(
            variables("simulated/2/granularity/-/pools"),
            "DRIVER=simulated DEVICES=2 GRANULARITY_BYTES=65536"
        );
        assert_eq!(
            variables("simulated/1/granularity/cpu/facade"),
            "DRIVER=simulated DEVICES=1"
        );
        assert_eq!(
            variables("simulated/1/2MiB/-/stress"),
            "DRIVER=simulated DEVICES=1 PAGE_BYTES=2097152 STRESS_SECONDS=60"
        );
        assert_eq!(
            variables("real/2/2MiB/-/stress"),
            "DRIVER=real DEVICES=2 PAGE_BYTES=2097152 STRESS_SECONDS=2"
        );
    }
}
