//! Libraries that let the facade's CUDA programs be started where there is no GPU: the simulated driver as
//! `libcuda.so.1`, and stand-ins for the other CUDA libraries as far as opening a Candle device needs them.
//!
//! Programs are linked so that every symbol must be found when they are started. What the simulated driver does
//! not have, and what the stand-ins do not do, is there all the same and answers that it is not supported. The
//! driver's share of that is a library of its own, which the other stand-ins need, and which the dynamic loader
//! asks after `libcuda.so.1`.

use super::stubs::{self, LIBRARIES, Symbols};
use crate::files;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The driver's calls that are not simulated.
const NOT_SIMULATED: &str = "libcuda-not-simulated.so";

/// What a library does, if it does something, and the code by which it says that it does not support a call.
fn manner(library: &str) -> (&'static str, u32) {
    match library {
        "cublas" => (include_str!("stand_ins/cublas.c"), 15),
        "cublasLt" => ("", 15),
        // cuRAND and NVRTC have no such code, so theirs is that of an internal error.
        "curand" => (include_str!("stand_ins/curand.c"), 999),
        "nvrtc" => ("", 11),
        "cudart" => (include_str!("stand_ins/cudart.c"), 801),
        _ => ("", 801),
    }
}

/// Makes the libraries in `folder` for programs, over the shared library that is the simulated driver.
///
/// # Errors
///
/// If the compiler or a file fails, or the programs ask for nothing of a CUDA driver.
pub fn make(folder: &Path, programs: &BTreeSet<PathBuf>, simulator: &Path) -> Result<()> {
    files::remove_tree(folder)?;
    files::make(folder)?;
    let driver = folder.join("libcuda.so.1");
    fs::copy(simulator, &driver).with_context(|| format!("copying {}", simulator.display()))?;
    let simulated = stubs::symbols(Symbols::Exported, &BTreeSet::from([driver]))?;
    let asked = stubs::symbols(Symbols::Asked, programs)?;
    let of = |library: &str| -> Vec<&String> {
        let mine = asked
            .iter()
            .filter(|symbol| stubs::owner(symbol) == Some(library));
        mine.filter(|symbol| !simulated.contains(*symbol)).collect()
    };
    ensure!(
        asked.iter().any(|symbol| simulated.contains(symbol)),
        "the programs ask for nothing of a CUDA driver"
    );
    build(folder, "cuda", NOT_SIMULATED, &of("cuda"), &[])?;
    for (library, soname, _) in LIBRARIES {
        if library != "cuda" {
            let needs = [
                "-Wl,--no-as-needed",
                "-L",
                ".",
                "-l:libcuda-not-simulated.so",
            ];
            build(folder, library, soname, &of(library), &needs)?;
        }
    }
    Ok(())
}

/// Compiles the library `soname` in `folder`: the symbols that only answer are weak, so that those of the
/// library's own source come before them.
fn build(
    folder: &Path,
    library: &str,
    soname: &str,
    symbols: &[&String],
    link: &[&str],
) -> Result<()> {
    let (source, code) = manner(library);
    let answers: String = symbols.iter().map(|symbol| answer(symbol, code)).collect();
    let [does, refuses] = ["does", "refuses"].map(|what| format!("{library}-{what}.c"));
    for (name, text) in [(&does, source), (&refuses, &answers)] {
        fs::write(folder.join(name), text).with_context(|| format!("writing {name}"))?;
    }
    stubs::compile(folder, soname, soname, &[&does, &refuses], link)
}

/// A C function that does nothing but say so.
fn answer(symbol: &str, code: u32) -> String {
    // These answer with text; whoever prints it must not follow a code.
    let is_text = ["String", "GetErrorName", "StatusName"]
        .iter()
        .any(|end| symbol.ends_with(end));
    match is_text {
        true => format!(
            "__attribute__((weak)) const char *{symbol}(void) {{ return \"an error of a stand-in for CUDA\"; }}\n"
        ),
        false => format!("__attribute__((weak)) int {symbol}(void) {{ return {code}; }}\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// Compiles a program, or with `-shared` a library, in a folder.
    fn cc(folder: &Path, output: &str, source: &str, arguments: &[&str]) {
        fs::write(folder.join("source.c"), source).unwrap();
        let status = Command::new("cc")
            .current_dir(folder)
            .args(["-o", output, "source.c"])
            .args(arguments)
            .status()
            .unwrap();
        assert!(status.success(), "{output}");
    }

    #[test]
    fn what_is_simulated_is_the_simulators_and_all_else_answers() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let driver = "int cuInit(unsigned flags) { return flags == 7 ? 42 : 1; }";
        cc(
            folder,
            "simulator.so",
            driver,
            &["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"],
        );
        // A program that is linked against stubs, as the facade's are.
        let names = "cuInit cuMemPrefetch cublasCreate_v2 cublasDestroy_v2 cublasSgemm_v2 cublasGetStatusString";
        let asks = names.split(' ').map(|name| {
            format!("int {name}(void); int asks_{name}(void) {{ return {name}(); }}\n")
        });
        let asks: String = asks.collect();
        cc(folder, "asks.o", &asks, &["-c"]);
        stubs::make(
            &folder.join("stubs"),
            &BTreeSet::from([folder.join("asks.o")]),
        )
        .unwrap();
        let program = "int cuInit(unsigned); int cuMemPrefetch(void); int cublasCreate_v2(void **);\n\
            int cublasDestroy_v2(void *); int cublasSgemm_v2(void); const char *cublasGetStatusString(int);\n\
            int main(void) { void *handle = 0;\n\
            if (cuInit(7) != 42) return 1;\n\
            if (cuMemPrefetch() != 801) return 2;\n\
            if (cublasCreate_v2(&handle) || !handle || cublasDestroy_v2(handle)) return 3;\n\
            if (cublasSgemm_v2() != 15) return 4;\n\
            return cublasGetStatusString(1)[0] != 'a'; }";
        let link = ["-Lstubs", "-lcublas", "-lcuda", "-Wl,-z,now"];
        cc(folder, "program", program, &link);
        let (program, made) = (folder.join("program"), folder.join("made"));
        make(
            &made,
            &BTreeSet::from([program.clone()]),
            &folder.join("simulator.so"),
        )
        .unwrap();
        let status = Command::new(&program)
            .env("LD_LIBRARY_PATH", &made)
            .status()
            .unwrap();
        assert_eq!(status.code(), Some(0), "{status}");
    }
}
