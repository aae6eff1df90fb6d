//! Libraries to link against where CUDA's own are absent: the right names, the symbols that are
//! asked for, and nothing in them. The real ones take their place when the program is started.

use crate::files;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What `-l` calls a library, its name at run time in CUDA 13, and how its symbols begin.
const LIBRARIES: [(&str, &str, &[&str]); 6] = [
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
    let output = Command::new("nm")
        .args(["-u", "-P"])
        .args(archives)
        .output()
        .context("nm, of the binutils, could not be started")?;
    // nm complains of the members that are not object files, and goes on.
    let symbols = undefined(&String::from_utf8_lossy(&output.stdout));
    ensure!(
        symbols.iter().any(|symbol| owner(symbol) == Some("cuda")),
        "nm found no symbol of the CUDA driver in {} archives:\n{}",
        archives.len(),
        String::from_utf8_lossy(&output.stderr)
    );
    for (name, soname, _) in LIBRARIES {
        let text: String = symbols
            .iter()
            .filter(|symbol| owner(symbol) == Some(name))
            .map(|symbol| format!("void {symbol}(void) {{}}\n"))
            .collect();
        let source = folder.join(format!("{name}.c"));
        std::fs::write(&source, text).with_context(|| format!("writing {}", source.display()))?;
        let output = Command::new("cc")
            .args(["-shared", "-fPIC", "-fno-builtin", "-o"])
            .arg(folder.join(format!("lib{name}.so")))
            .arg(format!("-Wl,-soname,{soname}"))
            .arg(&source)
            .output()
            .context("the C compiler cc could not be started")?;
        ensure!(
            output.status.success(),
            "cc could not compile {}:\n{}",
            source.display(),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
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

/// The symbols of CUDA libraries in what `nm -u -P` prints.
fn undefined(text: &str) -> BTreeSet<String> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let symbol = words.next()?;
            (words.next() == Some("U") && owner(symbol).is_some()).then(|| symbol.to_owned())
        })
        .collect()
}

/// Which library a symbol belongs to, by how it begins.
fn owner(symbol: &str) -> Option<&'static str> {
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
    fn only_undefined_symbols_count() {
        let text = "libx.rlib[x.o]:\ncuInit U         \ncuLocal T 0 0\nmemcpy U\ncuInit U\n";
        assert_eq!(undefined(text), BTreeSet::from(["cuInit".to_owned()]));
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
