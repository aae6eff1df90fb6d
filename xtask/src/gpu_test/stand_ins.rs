//! Libraries that take the place of CUDA's own: to link against where those are absent, and to start the facade's CUDA
//! programs where there is no GPU.
//!
//! Programs are linked so that every symbol must be found when they are started. What the simulated driver does not have,
//! and what the stand-ins do not do, is there all the same and returns that it is not supported.

use anyhow::{Result, ensure};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use xshell::{Shell, cmd};

/// A library of CUDA's.
struct Library {
    /// What `-l` calls it.
    name: &'static str,
    /// Its name at run time in CUDA 13.
    soname: &'static str,
    /// How its symbols begin.
    beginnings: &'static [&'static str],
    /// The code by which it says that it does not support a call. cuRAND and NVRTC have none, so theirs is that of an
    /// internal error.
    code: u32,
}

const fn library(
    name: &'static str,
    soname: &'static str,
    beginnings: &'static [&'static str],
    code: u32,
) -> Library {
    Library {
        name,
        soname,
        beginnings,
        code,
    }
}

const LIBRARIES: [Library; 6] = [
    library("cublasLt", "libcublasLt.so.13", &["cublasLt"], 15),
    library("cublas", "libcublas.so.13", &["cublas"], 15),
    library("curand", "libcurand.so.10", &["curand"], 999),
    library("nvrtc", "libnvrtc.so.13", &["nvrtc"], 11),
    library("cudart", "libcudart.so.13", &["cuda", "__cuda"], 801),
    library("cuda", "libcuda.so.1", &["cu"], 801),
];

/// What stand-ins can do.
const SOURCE: &str = include_str!("stand_ins.c");

/// Makes libraries in `folder` to link against: the right names, the symbols that `archives` leave undefined, and nothing in
/// them. The real ones take their place when the program is started.
pub fn make_stubs(shell: &Shell, folder: &Path, archives: &BTreeSet<PathBuf>) -> Result<()> {
    let symbols = symbols(shell, Symbols::Undefined, archives)?;
    ensure!(
        names(&symbols).contains("cuda"),
        "nm found no symbol of the CUDA driver"
    );
    for Library { name, soname, .. } in LIBRARIES {
        let mine = symbols
            .iter()
            .filter(|symbol| owner(symbol).is_some_and(|it| it.name == name));
        let text: String = mine
            .map(|symbol| format!("void {symbol}(void) {{}}\n"))
            .collect();
        compile(shell, folder, &format!("lib{name}.so"), soname, &[&text])?;
    }
    Ok(())
}

/// Makes the libraries in `folder` with which programs are started over `simulator`, the shared library that is the simulated
/// driver. All but the driver are one library under several names, which also has those calls of the driver that are not
/// simulated.
///
/// # Errors
///
/// If the compiler or a file fails, or the programs ask for nothing of a CUDA driver.
pub fn make(
    shell: &Shell,
    folder: &Path,
    programs: &BTreeSet<PathBuf>,
    simulator: &Path,
) -> Result<()> {
    shell.remove_path(folder)?;
    shell.create_dir(folder)?;
    let driver = folder.join("libcuda.so.1");
    shell.copy_file(simulator, &driver)?;
    let simulated = symbols(shell, Symbols::Exported, &BTreeSet::from([driver]))?;
    let asked = symbols(shell, Symbols::Asked, programs)?;
    ensure!(
        !asked.is_disjoint(&simulated),
        "the programs ask for nothing of a CUDA driver"
    );
    let answers: String = asked
        .difference(&simulated)
        .map(|symbol| answer(symbol))
        .collect();
    let all = "stand-ins.so";
    compile(shell, folder, all, all, &[SOURCE, &answers])?;
    for Library { soname, .. } in LIBRARIES.into_iter().filter(|it| it.name != "cuda") {
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
    let name = format!("-Wl,-soname,{soname}");
    cmd!(
        shell,
        "cc -shared -fPIC -fno-builtin -o {library} {name} {sources...}"
    )
    .quiet()
    .run()?;
    Ok(())
}

/// A C function that does nothing but say so. It is weak, so that one of the stand-ins' own source comes before it.
fn answer(symbol: &str) -> String {
    let code = owner(symbol).map_or(1, |library| library.code);
    // These return text; a caller that prints it must not follow a code.
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
pub fn symbols(
    shell: &Shell,
    which: Symbols,
    files: &BTreeSet<PathBuf>,
) -> Result<BTreeSet<String>> {
    let (arguments, kind): (&[_], _) = match which {
        Symbols::Undefined => (&["-u"], "U"),
        Symbols::Asked => (&["-D", "-u"], "U"),
        Symbols::Exported => (&["-D", "--defined-only"], "T"),
    };
    // nm complains of the members that are not object files, and goes on.
    let nm = cmd!(shell, "nm -P {arguments...} {files...}").quiet();
    Ok(listed(&nm.ignore_status().ignore_stderr().read()?, kind))
}

/// The symbols of CUDA libraries in what `nm -P` prints, of one kind.
fn listed(text: &str, kind: &str) -> BTreeSet<String> {
    let lines = text.lines().map(|line| line.split_whitespace());
    let symbols = lines.filter_map(|mut words| words.next().zip(words.next()));
    let mine = symbols.filter(|(symbol, of)| *of == kind && owner(symbol).is_some());
    mine.map(|(symbol, _)| symbol.to_owned()).collect()
}

/// The run-time names of the CUDA libraries that a program needs which asks for these symbols, the driver's left out.
pub fn needed(symbols: &BTreeSet<String>) -> Vec<String> {
    let names = names(symbols);
    // cuBLAS itself loads cuBLASLt.
    let is_needed = |name| names.contains(name) || (name == "cublasLt" && names.contains("cublas"));
    let needed = LIBRARIES
        .iter()
        .filter(|it| it.name != "cuda" && is_needed(it.name));
    let needed: BTreeSet<String> = needed.map(|it| it.soname.to_owned()).collect();
    needed.into_iter().collect()
}

/// The libraries that have these symbols.
fn names(symbols: &BTreeSet<String>) -> BTreeSet<&'static str> {
    symbols
        .iter()
        .filter_map(|symbol| Some(owner(symbol)?.name))
        .collect()
}

/// Which library a symbol belongs to, by how it begins.
fn owner(symbol: &str) -> Option<&'static Library> {
    const ALL: &[Library] = &LIBRARIES;
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let begins = |beginning: &&str| {
        let rest = symbol.strip_prefix(*beginning);
        rest.is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_uppercase()))
    };
    let mut mine = ALL
        .iter()
        .filter(|library| library.beginnings.iter().any(begins));
    mine.next().filter(|_| symbol.bytes().all(is_name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::process::Command;

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
            assert_eq!(owner(symbol).map(|it| it.name), library, "{symbol}");
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
        let symbols = ["cuInit", "cublasSgemm_v2", "memcpy"].map(str::to_owned);
        let libraries = ["libcublas.so.13", "libcublasLt.so.13"];
        assert_eq!(needed(&BTreeSet::from(symbols)), libraries);
    }

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
        let shell = Shell::new().unwrap();
        let asks = BTreeSet::from([folder.join("asks.o")]);
        make_stubs(&shell, &folder.join("stubs"), &asks).unwrap();
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
        let programs = BTreeSet::from([program.clone()]);
        make(&shell, &made, &programs, &folder.join("simulator.so")).unwrap();
        let status = Command::new(&program)
            .env("LD_LIBRARY_PATH", &made)
            .status()
            .unwrap();
        assert_eq!(status.code(), Some(0), "{status}");
    }
}
