//! Libraries in place of CUDA's own: to link against, and to start CUDA programs without a GPU.
//!
//! Programs are linked so that every symbol must be found when they are started. What the simulated driver does not have,
//! and what the stand-ins do not do, is there all the same and returns that it is not supported.

use anyhow::{Result, ensure};
use itertools::Itertools;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use xshell::{Shell, cmd};

/// A library of CUDA's: what `-l` calls it; its name at run time in CUDA 13; how its symbols begin; and the code by which it
/// says that it does not support a call. cuRAND and NVRTC have no such code, so theirs is that of an internal error.
type Library = (&'static str, &'static str, &'static [&'static str], u32);

const LIBRARIES: &[Library] = &[
    ("cublasLt", "libcublasLt.so.13", &["cublasLt"], 15),
    ("cublas", "libcublas.so.13", &["cublas"], 15),
    ("curand", "libcurand.so.10", &["curand"], 999),
    ("nvrtc", "libnvrtc.so.13", &["nvrtc"], 11),
    ("cudart", "libcudart.so.13", &["cuda", "__cuda"], 801),
    (DRIVER, "libcuda.so.1", &["cu"], 801),
];
const DRIVER: &str = "cuda";

type Files = BTreeSet<PathBuf>;

/// Makes libraries in `folder` to link against: the right names, the symbols that `archives` leave undefined, and nothing in
/// them. The real ones take their place when the program is started.
pub fn make_stubs(shell: &Shell, folder: &Path, archives: &BTreeSet<PathBuf>) -> Result<()> {
    let symbols = symbols(shell, UNDEFINED, archives)?;
    let has_driver = symbols.iter().any(|symbol| owner(symbol) == DRIVER);
    ensure!(has_driver, "nm found no symbol of the CUDA driver");
    for (name, soname, ..) in LIBRARIES {
        let mine = symbols.iter().filter(|symbol| owner(symbol) == *name);
        let empty = mine.map(|symbol| format!("void {symbol}(void) {{}}\n"));
        let file = format!("lib{name}.so");
        compile(shell, folder, &file, soname, &[&empty.collect::<String>()])?;
    }
    Ok(())
}

/// Makes the libraries in `folder` with which programs are started over `simulator`, the driver.
/// The others are one library under several names, with the driver's calls that are not simulated.
pub fn make(shell: &Shell, folder: &Path, programs: &Files, simulator: &Path) -> Result<()> {
    shell.remove_path(folder)?;
    shell.create_dir(folder)?;
    let driver = folder.join("libcuda.so.1");
    shell.copy_file(simulator, &driver)?;
    let simulated = symbols(shell, EXPORTED, &BTreeSet::from([driver]))?;
    let asked = symbols(shell, ASKED, programs)?;
    let asks_driver = !asked.is_disjoint(&simulated);
    ensure!(asks_driver, "the programs ask for nothing of a CUDA driver");
    let answers: String = asked.difference(&simulated).map(answer).collect();
    let all = "stand-ins.so";
    let sources = [include_str!("stand_ins.c"), &answers];
    compile(shell, folder, all, all, &sources)?;
    for (_, soname, ..) in LIBRARIES.iter().filter(|library| library.0 != DRIVER) {
        shell.hard_link(folder.join(all), folder.join(soname))?;
    }
    Ok(())
}

/// Compiles sources in C to the library `file` in `folder`, which is called `soname` at run time.
fn compile(shell: &Shell, folder: &Path, file: &str, soname: &str, texts: &[&str]) -> Result<()> {
    let sources = (0..texts.len()).map(|index| folder.join(format!("{file}-{index}.c")));
    let (sources, library): (Vec<_>, _) = (sources.collect(), folder.join(file));
    for (source, text) in sources.iter().zip(texts) {
        shell.write_file(source, text)?;
    }
    let options = ["-shared", "-fPIC", "-fno-builtin"];
    let cc = cmd!(shell, "cc {options...} -Wl,-soname,{soname} -o {library}");
    Ok(cc.args(sources).quiet().run()?)
}

/// A C function that does nothing but say so. It is weak, so that one of the stand-ins' own source comes before it.
fn answer(symbol: &String) -> String {
    let code = library(symbol).map_or(1, |library| library.3);
    let mut texts = ["String", "GetErrorName", "StatusName"].iter();
    // These return text; a caller that prints it must not follow a code.
    let (kind, value) = match texts.any(|end| symbol.ends_with(end)) {
        true => ("const char *", "\"an error of a stand-in for CUDA\""),
        false => ("int ", &*code.to_string()),
    };
    format!("__attribute__((weak)) {kind}{symbol}(void) {{ return {value}; }}\n")
}

/// The options of `nm` for symbols that object files and archives leave to others; that programs ask
/// of libraries when they are started; and that libraries have for others.
const UNDEFINED: &[&str] = &["-u"];
const ASKED: &[&str] = &["-D", "-u"];
const EXPORTED: &[&str] = &["-D", "--defined-only"];

/// The symbols of CUDA libraries in these files.
fn symbols(shell: &Shell, of: &[&str], files: &BTreeSet<PathBuf>) -> Result<BTreeSet<String>> {
    // nm complains of the members that are not object files, and goes on.
    let nm = cmd!(shell, "nm -P {of...}").args(files).quiet();
    let text = nm.ignore_status().ignore_stderr().read()?;
    Ok(listed(&text, if of == EXPORTED { "T" } else { "U" }))
}

/// The symbols of CUDA libraries in what `nm -P` prints, of one kind.
fn listed(text: &str, kind: &str) -> BTreeSet<String> {
    let lines = text.lines().map(|line| line.split_whitespace());
    let symbols = lines.filter_map(|mut words| words.next().zip(words.next()));
    let mine = symbols.filter(|(symbol, of)| *of == kind && library(symbol).is_some());
    mine.map(|(symbol, _)| symbol.to_owned()).collect()
}

/// The run-time names of the CUDA libraries that programs need, the driver's left out.
pub fn needed(shell: &Shell, programs: &BTreeSet<PathBuf>) -> Result<Vec<String>> {
    // Without a file nm reads one of its own choice.
    let symbols = (!programs.is_empty()).then(|| symbols(shell, ASKED, programs));
    Ok(owners(&symbols.transpose()?.unwrap_or_default()))
}

/// The run-time names of the libraries that have these symbols, the driver's left out.
fn owners(symbols: &BTreeSet<String>) -> Vec<String> {
    let mut names: BTreeSet<_> = symbols.iter().map(|symbol| owner(symbol)).collect();
    // cuBLAS itself loads cuBLASLt.
    if names.contains("cublas") {
        names.insert("cublasLt");
    }
    names.remove(DRIVER);
    let needed = LIBRARIES.iter().filter(|library| names.contains(library.0));
    let needed = needed.map(|library| library.1.to_owned());
    needed.sorted().collect()
}

/// What `-l` calls the library to which a symbol belongs; nothing if that is none of CUDA's.
fn owner(symbol: &str) -> &'static str {
    library(symbol).map_or("", |library| library.0)
}

/// Which library a symbol belongs to, by how it begins.
fn library(symbol: &str) -> Option<&'static Library> {
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let begins = |beginning: &&str| {
        let rest = symbol.strip_prefix(*beginning);
        rest.is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_uppercase()))
    };
    let mut libraries = LIBRARIES.iter().filter(|it| it.2.iter().any(begins));
    libraries.next().filter(|_| symbol.bytes().all(is_name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn symbols_are_told_apart_by_library_and_kind() {
        let symbols = "cuda cuMemCreate; cublas cublasSgemm_v2; cublasLt cublasLtMatmul; \
            curand curandCreateGenerator; nvrtc nvrtcVersion; cudart cudaMalloc; \
            cudart __cudaRegisterFunction;  custom;  curl_easy_init;  memcpy";
        for pair in symbols.split("; ") {
            let (library, symbol) = pair.split_once(' ').unwrap();
            assert_eq!(owner(symbol), library, "{symbol}");
        }
        let text = "libx.rlib[x.o]:\ncuInit U         \ncuLocal T 0 0\nmemcpy U\ncuInit U\n";
        assert_eq!(listed(text, "U"), BTreeSet::from(["cuInit".to_owned()]));
        assert_eq!(listed(text, "T"), BTreeSet::from(["cuLocal".to_owned()]));
    }

    #[test]
    fn what_is_needed_leaves_out_the_driver_and_adds_what_cublas_loads() {
        let symbols = ["cuInit", "cublasSgemm_v2", "memcpy"].map(str::to_owned);
        let libraries = ["libcublas.so.13", "libcublasLt.so.13"];
        assert_eq!(owners(&BTreeSet::from(symbols)), libraries);
    }

    #[test]
    fn what_is_simulated_is_the_simulators_and_all_else_answers() {
        let folder = tempfile::tempdir().unwrap();
        let (folder, shell) = (folder.path(), Shell::new().unwrap());
        shell.change_dir(folder);
        let driver = "int cuInit(unsigned flags) { return flags == 7 ? 42 : 1; }";
        let simulator = folder.join("simulator.so");
        compile(&shell, folder, "simulator.so", "libcuda.so.1", &[driver]).unwrap();
        let asks = include_str!("stand_ins_asks.c");
        shell.write_file("asks.c", asks).unwrap();
        cmd!(shell, "cc -c -o program.o asks.c").run().unwrap();
        let objects = BTreeSet::from([folder.join("program.o")]);
        make_stubs(&shell, &folder.join("stubs"), &objects).unwrap();
        let libraries = ["-Lstubs", "-lcublas", "-lcuda", "-Wl,-z,now"];
        let link = cmd!(shell, "cc -o program program.o {libraries...}");
        link.run().unwrap();
        let (program, made) = (folder.join("program"), folder.join("made"));
        make(&shell, &made, &[program.clone()].into(), &simulator).unwrap();
        let program = shell.cmd(program).env("LD_LIBRARY_PATH", made);
        program.run().unwrap();
    }
}
