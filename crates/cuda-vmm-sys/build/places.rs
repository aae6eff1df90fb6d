//! Searches for CUDA's headers and checks their version. Used by the build script, by the tests,
//! and by the project's set-up task. It only reads the file system.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Variables with a CUDA folder or its include folder, in the order of the search.
pub const VARIABLES: [&str; 5] = [
    "CUDA_HOME",
    "CUDA_PATH",
    "CUDA_ROOT",
    "CUDA_TOOLKIT_ROOT_DIR",
    "CUDA_TOOLKIT_PATH",
];

/// Variables with the folder of an activated Python or conda environment.
pub const ENVIRONMENTS: [&str; 2] = ["VIRTUAL_ENV", "CONDA_PREFIX"];

/// Folders that installers use.
const USUAL: [&str; 4] = ["/usr/local/cuda", "/opt/cuda", "/usr/lib/cuda", "/usr"];

/// Where headers are below a CUDA folder: a toolkit's layouts, then those of the wheels, then the
/// folder itself.
const BELOW: [&str; 9] = [
    "include",
    "targets/x86_64-linux/include",
    "targets/sbsa-linux/include",
    "targets/aarch64-linux/include",
    "cu13/include",
    "cuda_runtime/include",
    "nvidia/cu13/include",
    "nvidia/cuda_runtime/include",
    "",
];

/// The oldest header that declares all calls in use (`cuGetProcAddress`,
/// `cuGraphInstantiateWithFlags`).
const OLDEST: u32 = 11040;

/// A folder in and below which headers may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SearchFolder {
    /// The variable of [`VARIABLES`] with this folder.
    pub variable: Option<&'static str>,
    /// The folder.
    pub folder: PathBuf,
}

/// An include folder with usable headers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// It holds `cuda.h` and `cudaTypedefs.h`.
    pub include: PathBuf,
    /// A message for each earlier variable whose folder has no usable headers.
    pub wrong: Vec<String>,
}

/// Returns all folders to search, in order: those of variables, the project's set-up folders,
/// environments, and the folders that installers use.
pub fn places(
    variable: impl Fn(&str) -> Option<OsString>,
    set_up: &[PathBuf],
) -> Vec<SearchFolder> {
    let value = |name: &str| {
        variable(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let mut places = Vec::new();
    for name in VARIABLES {
        places.extend(value(name).map(|folder| SearchFolder {
            variable: Some(name),
            folder,
        }));
    }
    let mut other = |folder| {
        places.push(SearchFolder {
            variable: None,
            folder,
        });
    };
    for folder in set_up {
        other(folder.join("cuda"));
    }
    for environment in ENVIRONMENTS.iter().filter_map(|name| value(name)) {
        let libraries = environment.join("lib");
        other(environment);
        let mut pythons: Vec<PathBuf> = libraries
            .read_dir()
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path().join("site-packages"))
            .filter(|folder| folder.is_dir())
            .collect();
        pythons.sort();
        pythons.into_iter().for_each(&mut other);
    }
    USUAL.map(PathBuf::from).into_iter().for_each(&mut other);
    places
}

/// Returns the first include folder with usable headers, or a message for the user.
pub fn search(places: &[SearchFolder]) -> Result<Found, String> {
    let mut wrong = Vec::new();
    let mut looked = String::new();
    for SearchFolder { variable, folder } in places {
        let mut unusable = Vec::new();
        for include in BELOW.map(|below| folder.join(below)) {
            if !include.join("cuda.h").is_file() {
                continue;
            }
            match usable(&include) {
                Ok(()) => return Ok(Found { include, wrong }),
                Err(reason) => unusable.push(format!("{}: {reason}", include.display())),
            }
        }
        if unusable.is_empty() {
            unusable.push(match folder.is_dir() {
                true => "no cuda.h in or below it".to_owned(),
                false => "no such folder".to_owned(),
            });
        }
        let name = match variable {
            Some(variable) => format!("{variable}={}", folder.display()),
            None => folder.display().to_string(),
        };
        let line = format!("{name} ({})", unusable.join("; "));
        looked += &format!("  {line}\n");
        if variable.is_some() {
            wrong.push(line);
        }
    }
    Err(missing(&looked))
}

/// How to build without CUDA's headers.
pub const WITHOUT: &str = "turn off the default features of cuda-vmm-sys (and of cuda-vmm or candle-cuda-vmm, if you depend \
    on them): then the build needs no headers, no libclang and no C compiler.";

/// Returns the message for a machine without usable headers.
fn missing(looked: &str) -> String {
    format!(
        "cuda-vmm-sys needs the CUDA headers cuda.h and cudaTypedefs.h, of CUDA 11.4 or newer.\n\
         Looked in and below:\n{looked}\
         To mend it, either\n  \
         - in a checkout of this project run `cargo xtask setup`, which brings them into its target folder and prints what \
         a program outside the checkout needs, or\n  \
         - install the CUDA toolkit and set CUDA_HOME to its folder, or\n  \
         - run `python3 -m pip install nvidia-cuda-runtime` and set CUDA_HOME to the `nvidia/cu13` folder it made, or\n  \
         - {WITHOUT}"
    )
}

/// Checks that `cudaTypedefs.h` is beside `cuda.h` and that both are new enough.
fn usable(include: &Path) -> Result<(), String> {
    if !include.join("cudaTypedefs.h").is_file() {
        return Err("cuda.h without cudaTypedefs.h".into());
    }
    match cuda_version(include) {
        Some(version) if version >= OLDEST => Ok(()),
        Some(version) => Err(format!("CUDA_VERSION {version}, older than {OLDEST}")),
        None => Err("no CUDA_VERSION in cuda.h".into()),
    }
}

/// Returns `CUDA_VERSION` of the `cuda.h` in `include`, such as 13000 for CUDA 13.0.
pub fn cuda_version(include: &Path) -> Option<u32> {
    let text = std::fs::read(include.join("cuda.h")).ok()?;
    String::from_utf8_lossy(&text)
        .lines()
        .find_map(|line| line.trim().strip_prefix("#define CUDA_VERSION "))
        .and_then(|version| version.trim().parse().ok())
}
