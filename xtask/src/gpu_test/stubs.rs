//! Libraries to link against where CUDA's own are absent: the right names, the symbols that are
//! asked for, and nothing in them. The real ones take their place when the program is started.

use crate::files;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What `-l` calls a library, its name at run time in CUDA 13, and how its symbols begin.
pub const LIBRARIES: [(&str, &str, &[&str]); 6] = [
    ("cublasLt", "libcublasLt.so.13", &["cublasLt"]),
    ("cublas", "libcublas.so.13", &["cublas"]),
    ("curand", "libcurand.so.10", &["curand"]),
    ("nvrtc", "libnvrtc.so.13", &["nvrtc"]),
    ("cudart", "libcudart.so.13", &["cuda", "__cuda"]),
    ("cuda", "libcuda.so.1", &["cu"]),
];

/// Makes the libraries in `folder` for the symbols that `archives` leave undefined.
pub fn make(folder: &Path, archives: &BTreeSet<PathBuf>) -> Result<()> {
    files::make(folder)?;
    let symbols = symbols(Symbols::Undefined, archives)?;
    ensure!(
        symbols.iter().any(|symbol| owner(symbol) == Some("cuda")),
        "nm found no symbol of the CUDA driver in {} archives",
        archives.len()
    );
    for (name, soname, _) in LIBRARIES {
        let text: String = symbols
            .iter()
            .filter(|symbol| owner(symbol) == Some(name))
            .map(|symbol| format!("void {symbol}(void) {{}}\n"))
            .collect();
        let source = format!("{name}.c");
        std::fs::write(folder.join(&source), text).with_context(|| format!("writing {source}"))?;
        compile(folder, &format!("lib{name}.so"), soname, &[&source], &[])?;
    }
    Ok(())
}

/// Compiles C sources in `folder` to a library that is called `soname` at run time.
pub fn compile(
    folder: &Path,
    library: &str,
    soname: &str,
    sources: &[&String],
    link: &[&str],
) -> Result<()> {
    let output = Command::new("cc")
        .current_dir(folder)
        .args(["-shared", "-fPIC", "-fno-builtin", "-o", library])
        .arg(format!("-Wl,-soname,{soname}"))
        .args(sources)
        .args(link)
        .output()
        .context("the C compiler cc could not be started")?;
    ensure!(
        output.status.success(),
        "cc could not compile {library} in {}:\n{}",
        folder.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// Which symbols are looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Symbols {
    /// Those that object files and archives leave to others.
    Undefined,
    /// Those that programs and shared libraries ask of others when they are started.
    Asked,
    /// Those that shared libraries have for others.
    Exported,
}

/// The symbols of CUDA libraries in these files.
pub fn symbols(which: Symbols, files: &BTreeSet<PathBuf>) -> Result<BTreeSet<String>> {
    let (arguments, kind): (&[&str], _) = match which {
        Symbols::Undefined => (&["-u"], "U"),
        Symbols::Asked => (&["-D", "-u"], "U"),
        Symbols::Exported => (&["-D", "--defined-only"], "T"),
    };
    let output = Command::new("nm")
        .arg("-P")
        .args(arguments)
        .args(files)
        .output()
        .context("nm, of the binutils, could not be started")?;
    // nm complains of the members that are not object files, and goes on.
    Ok(listed(&String::from_utf8_lossy(&output.stdout), kind))
}

/// The run-time names of the CUDA libraries that `executable` needs, the driver's left out.
pub fn needed(executable: &Path) -> Result<Vec<String>> {
    let output = Command::new("readelf")
        .args(["-d", "-W"])
        .arg(executable)
        .output()
        .context("readelf, of the binutils, could not be started")?;
    ensure!(
        output.status.success(),
        "readelf could not read {}",
        executable.display()
    );
    Ok(cuda_libraries(&String::from_utf8_lossy(&output.stdout)))
}

/// Picks out of readelf's lines what is needed; cuBLAS itself loads cuBLASLt.
fn cuda_libraries(text: &str) -> Vec<String> {
    let mut libraries: Vec<String> = text
        .lines()
        .filter(|line| line.contains("(NEEDED)"))
        .filter_map(|line| line.split_once('[')?.1.split(']').next())
        .filter(|soname| {
            *soname != "libcuda.so.1" && LIBRARIES.iter().any(|(_, known, _)| known == soname)
        })
        .map(str::to_owned)
        .collect();
    let (cublas, light) = ("libcublas.so.13", "libcublasLt.so.13");
    if libraries.iter().any(|name| name == cublas) && !libraries.iter().any(|name| name == light) {
        libraries.push(light.to_owned());
    }
    libraries.sort();
    libraries
}

/// The symbols of CUDA libraries in what `nm -P` prints, of one kind.
fn listed(text: &str, kind: &str) -> BTreeSet<String> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let symbol = words.next()?;
            (words.next() == Some(kind) && owner(symbol).is_some()).then(|| symbol.to_owned())
        })
        .collect()
}

/// Which library a symbol belongs to, by how it begins.
pub fn owner(symbol: &str) -> Option<&'static str> {
    if !symbol
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
    {
        return None;
    }
    LIBRARIES.iter().find_map(|(name, _, beginnings)| {
        beginnings
            .iter()
            .any(|beginning| {
                symbol
                    .strip_prefix(beginning)
                    .and_then(|rest| rest.bytes().next())
                    .is_some_and(|byte| byte.is_ascii_uppercase())
            })
            .then_some(*name)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn symbols_go_to_the_library_that_has_them() {
        for (symbol, library) in [
            ("cuMemCreate", Some("cuda")),
            ("cublasSgemm_v2", Some("cublas")),
            ("cublasLtMatmul", Some("cublasLt")),
            ("curandCreateGenerator", Some("curand")),
            ("nvrtcVersion", Some("nvrtc")),
            ("cudaMalloc", Some("cudart")),
            ("__cudaRegisterFunction", Some("cudart")),
            ("custom", None),
            ("curl_easy_init", None),
            ("memcpy", None),
        ] {
            assert_eq!(owner(symbol), library, "{symbol}");
        }
    }

    #[test]
    fn symbols_are_of_one_kind() {
        let text = "libx.rlib[x.o]:\ncuInit U         \ncuLocal T 0 0\nmemcpy U\ncuInit U\n";
        assert_eq!(listed(text, "U"), BTreeSet::from(["cuInit".to_owned()]));
        assert_eq!(listed(text, "T"), BTreeSet::from(["cuLocal".to_owned()]));
    }

    #[test]
    fn what_is_needed_leaves_out_the_driver_and_adds_what_cublas_loads() {
        let text = " 0x01 (NEEDED) Shared library: [libcuda.so.1]\n \
            0x01 (NEEDED) Shared library: [libcublas.so.13]\n \
            0x01 (NEEDED) Shared library: [libc.so.6]\n 0x0e (SONAME) Library soname: [libcudart.so.13]\n";
        assert_eq!(
            cuda_libraries(text),
            ["libcublas.so.13", "libcublasLt.so.13"]
        );
    }
}
