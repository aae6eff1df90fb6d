//! One cell of the matrix: what a row runs, and under which conditions.

/// A choice of named values, which are listed in order.
macro_rules! choice {
    ($(#[$doc:meta])* $name:ident { $($(#[$about:meta])* $value:ident = $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum $name { $($(#[$about])* $value),* }

        impl $name {
            /// All values, in order.
            #[allow(dead_code)]
            pub const ALL: &[Self] = &[$(Self::$value),*];

            /// How reports and command lines name it.
            pub fn word(self) -> &'static str {
                match self { $(Self::$value => $word),* }
            }
        }
    };
}
pub(crate) use choice;

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
    /// The size of the pools' pages.
    Page {
        /// The device's own granularity, whatever it is.
        Granularity = "granularity",
        /// 2 MiB, the granularity of NVIDIA's present GPUs.
        Mib2 = "2MiB",
        /// 16 MiB.
        Mib16 = "16MiB",
        /// 32 MiB.
        Mib32 = "32MiB",
    }
}

choice! {
    /// The kind of Candle device that the facade's tests open.
    CandleDevice {
        /// A CUDA device that works on the default stream.
        DefaultStream = "default-stream",
        /// A CUDA device that works on a stream of its own.
        OwnStream = "own-stream",
        /// Candle's CPU device, over the simulated driver.
        Cpu = "cpu",
    }
}

choice! {
    /// A list of test programs that belong together.
    Suite {
        /// The driver's rules, and memory shared between processes.
        Core = "core",
        /// The pools.
        Pools = "pools",
        /// The Candle crate.
        Facade = "facade",
        /// Whether anything is left over.
        Leaks = "leaks",
        /// Random operations on many threads for some seconds.
        Stress = "stress",
    }
}

/// The package without Candle.
pub const CORE: &str = "cuda-vmm";
/// The package of the facade.
pub const FACADE: &str = "candle-cuda-vmm";

impl Driver {
    /// Those of the matrix, in order.
    pub const OF_MATRIX: [Self; 2] = [Self::Real, Self::Simulated];

    /// Whether its programs open a `libcuda.so.1`.
    pub fn is_library(self) -> bool {
        self != Self::Simulated
    }

    /// The kinds of Candle device that there are on it.
    fn candle_devices(self) -> &'static [CandleDevice] {
        match self {
            Self::Real | Self::SimulatedLibrary => {
                &[CandleDevice::DefaultStream, CandleDevice::OwnStream]
            }
            Self::Simulated => &[CandleDevice::Cpu],
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
        let drivers = Driver::OF_MATRIX.into_iter();
        let mut cells: Vec<_> = drivers
            .flat_map(|driver| Self::of(driver, sanitized))
            .collect();
        cells.retain(|cell| {
            !sanitized || (cell.driver == Driver::Real && cell.suite == Suite::Core)
        });
        cells
    }

    /// The cells of `test --cuda`: each kind of CUDA device that Candle has, with one device and with two.
    pub fn simulated_library() -> Vec<Self> {
        let mut cells = Self::of(Driver::SimulatedLibrary, false);
        cells.retain(|cell| cell.suite == Suite::Facade && cell.page == Page::Granularity);
        cells
    }

    fn of(driver: Driver, sanitized: bool) -> Vec<Self> {
        let mut cells = Vec::new();
        for devices in [1, 2] {
            for &page in Page::ALL {
                for &suite in Suite::ALL {
                    let facade = driver.candle_devices().iter().copied().map(Some).collect();
                    let candle_devices: Vec<_> = match suite {
                        Suite::Facade => facade,
                        _ => vec![None],
                    };
                    for candle_device in candle_devices {
                        // Candle has one CPU device.
                        if devices == 1 || candle_device != Some(CandleDevice::Cpu) {
                            cells.push(Self {
                                driver,
                                devices,
                                page,
                                candle_device,
                                suite,
                                sanitized,
                            });
                        }
                    }
                }
            }
        }
        cells
    }

    /// The suite's name, which says whether it is sanitized.
    pub fn suite_name(&self) -> String {
        let suffix = if self.sanitized { "-sanitized" } else { "" };
        format!("{}{suffix}", self.suite.word())
    }

    /// Its place on each axis.
    pub fn axes(&self) -> [String; 5] {
        [
            self.driver.word().to_owned(),
            self.devices.to_string(),
            self.page.word().to_owned(),
            self.candle_device
                .map_or("-", CandleDevice::word)
                .to_owned(),
            self.suite_name(),
        ]
    }

    /// The row's name.
    pub fn name(&self) -> String {
        self.axes().join("/")
    }

    /// Whether a word of the command line is true of this cell.
    pub fn is(&self, word: &str) -> bool {
        let is_on_axis = word != "-" && self.axes().iter().any(|place| place == word);
        is_on_axis || word == self.suite.word() || word == self.name()
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
        match (self.suite, self.devices, self.page) {
            (Suite::Stress, 1, Page::Mib2) => asked,
            (Suite::Stress, _, _) => 2,
            _ => 0,
        }
    }

    /// The variables by which the tests know their cell.
    pub fn variables(&self, stress_seconds: u64) -> Vec<(&'static str, String)> {
        // The programs take for real what they open as a library.
        let driver = if self.driver.is_library() {
            Driver::Real
        } else {
            self.driver
        };
        let mut variables = vec![
            ("CUDA_VMM_TEST_DRIVER", driver.word().to_owned()),
            ("CUDA_VMM_TEST_DEVICES", self.devices.to_string()),
        ];
        if self.driver == Driver::SimulatedLibrary {
            variables.push(("CUDA_VMM_SIM_DEVICES", self.devices.to_string()));
        }
        let bytes: Option<u64> = match self.page {
            Page::Granularity => None,
            Page::Mib2 => Some(2 << 20),
            Page::Mib16 => Some(16 << 20),
            Page::Mib32 => Some(32 << 20),
        };
        if let Some(bytes) = bytes {
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
