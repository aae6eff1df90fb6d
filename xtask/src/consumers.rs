//! Packing the library crates for a registry; and small programs that depend on the packages.
//!
//! Each is a folder in `xtask/consumers`. Its manifest says how it is run, what it must print, and
//! whether it is built on a bare machine: with Rust and a linker, but no header, libclang or C compiler.

use crate::workspace::Workspace;
use crate::{display, files, setup};
use anyhow::{Context, Result, ensure};
use cargo_metadata::{MetadataCommand, Package};
use fs_err as fs;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use xshell::{Cmd, cmd};

#[derive(Deserialize)]
struct Consumer {
    #[serde(default)]
    bare: bool,
    run: Vec<Run>,
}

#[derive(Deserialize)]
struct Run {
    /// An example of the version before, which is run in place of `main`.
    example: Option<String>,
    prints: Vec<String>,
}

/// Where the unpacked packages lie, each in a folder of its name.
fn packages(workspace: &Workspace) -> PathBuf {
    workspace.target.join("consumers/packages")
}

/// Packs every library, and unpacks it into a folder of its own.
///
/// Cargo's own verification is left out: it takes siblings from sources in cargo's home, stale once
/// a crate changes under the same version. The consumers build what was packed instead.
pub fn pack(workspace: &Workspace) -> Result<()> {
    let names = workspace.libraries().flat_map(|it| ["--package", &it.name]);
    let package = workspace.cargo("package --no-verify --allow-dirty");
    package.args(names).run()?;

    let (shell, folder) = (&workspace.shell, packages(workspace));
    shell.remove_path(&folder)?;
    shell.create_dir(&folder)?;
    for library in workspace.libraries() {
        let name = &library.name;
        let stem = format!("{name}-{}", library.version);
        let packed = workspace.target.join(format!("package/{stem}.crate"));
        cmd!(shell, "tar -xzf {packed} -C {folder}").quiet().run()?;
        let unpacked = folder.join(&stem);
        for file in ["README.md", "Cargo.toml", "src/lib.rs"] {
            let has = unpacked.join(file).is_file();
            ensure!(has, "the package of {name} has no {file}");
        }
        fs::rename(unpacked, folder.join(name.as_str()))?;
    }
    Ok(())
}

/// How many packages each user of ours gets, and on which system; other systems get others.
const RECORDED: &str = "xtask/consumers/packages.csv";
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Counts the packages that each user gets, with what only the build needs, and prints them beside
/// what is recorded. Fails if one differs: a change that adds one records the new number.
fn count_packages(workspace: &Workspace) -> Result<()> {
    let (mut rows, mut differing) = (Vec::new(), Vec::new());
    for row in csv::Reader::from_path(workspace.root.join(RECORDED))?.into_deserialize() {
        let (user, package, recorded): (String, String, usize) = row?;
        let arguments = format!("--format {{p}} --target {TARGET} --package {package}");
        let count = workspace.tree(&arguments)?.len();
        if count != recorded {
            differing.push(format!("{user}: {count}"));
        }
        rows.push([user, count.to_string(), recorded.to_string()]);
    }
    let head = ["user of", "packages", "recorded"];
    println!("{}", display::table(head, rows));
    let (is_as_recorded, differing) = (differing.is_empty(), differing.join(", "));
    let advice = format!("if this is meant, write it to {RECORDED}: {differing}");
    ensure!(is_as_recorded, advice);
    Ok(())
}

/// Variables by which a build could find CUDA or a C compiler.
const VARIABLES: &str = "CUDA_HOME CUDA_PATH CUDA_ROOT CUDA_TOOLKIT_ROOT_DIR CUDA_TOOLKIT_PATH \
    VIRTUAL_ENV CONDA_PREFIX LLVM_CONFIG_PATH CPATH DOCS_RS";

/// The variables by which a build, without [`VARIABLES`], sees a bare machine.
fn bare_machine(workspace: &Workspace, base: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let shell = &workspace.shell;
    let sysroot = cmd!(shell, "rustc --print sysroot").quiet().read()?;
    let host = cmd!(shell, "rustc --print host-tuple").quiet().read()?;
    let triple = host.to_uppercase().replace(['-', '.'], "_");

    // Rust links by way of a C compiler, which here has another name and no other program to find.
    let path = base.join("bare-path");
    shell.remove_path(&path)?;
    shell.create_dir(&path)?;
    for (program, name) in [("cc", "linker"), ("ld", "ld")] {
        fs::os::unix::fs::symlink(which::which(program)?, path.join(name))?;
    }
    let nowhere = |name: &str| (name.to_owned(), PathBuf::from("/nothing/is/here"));
    let mut variables = BTreeMap::from(["CC", "CXX", "LIBCLANG_PATH"].map(nowhere));
    variables.insert("RUSTC".to_owned(), Path::new(&sysroot).join("bin/rustc"));
    variables.insert(format!("CARGO_TARGET_{triple}_LINKER"), path.join("linker"));
    variables.insert("PATH".to_owned(), path);
    Ok(variables)
}

/// The oldest Candle that the facade takes.
const CANDLE: &str = "0.11.0";
/// The version before this workspace's first.
const BEFORE: &str = "0.1.1";
/// For each source of `candle-core`, what is there once, and what takes its place.
type Changes = BTreeMap<String, BTreeMap<String, String>>;

/// What cargo says of the packages in its own store.
struct Published(Vec<Package>);

impl Published {
    /// Has cargo bring them, by a manifest that names them.
    fn find(workspace: &Workspace, base: &Path) -> Result<Self> {
        let manifest = format!(
            "[package]\nname = \"published\"\nedition = \"2024\"\n\n[workspace]\n\n[dependencies]\n\
             candle-core = \"={CANDLE}\"\ncandle-nn = \"={CANDLE}\"\ncandle-cuda-vmm = \"={BEFORE}\"\n"
        );
        let path = base.join("published/Cargo.toml");
        let shell = &workspace.shell;
        shell.write_file(&path, manifest)?;
        shell.write_file(base.join("published/src/lib.rs"), "")?;
        let metadata = MetadataCommand::new().manifest_path(path).exec()?;
        Ok(Self(metadata.packages))
    }

    /// Copies Candle, with a constant by which a program can tell it from the registry's. Its
    /// `Device::new_cuda` returns the CPU device, so programs that want a GPU run without one.
    fn copy_candle_to(&self, packages: &Path) -> Result<()> {
        for name in ["candle-core", "candle-nn"] {
            let folder = packages.join(format!("{name}-{CANDLE}"));
            files::copy_tree(&self.folder(name, CANDLE)?, &folder)?;
        }
        let changes: Changes = toml::from_str(include_str!("../consumers/candle.toml"))?;
        for (file, changes) in changes {
            let file = packages.join(format!("candle-core-{CANDLE}/src/{file}.rs"));
            let mut text = fs::read_to_string(&file)?;
            for (from, to) in changes {
                let count = text.matches(&from).count();
                ensure!(count == 1, "{from:?} is {count} times in {file:?}");
                text = text.replace(&from, &to);
            }
            fs::write(&file, text)?;
        }
        Ok(())
    }

    fn folder(&self, name: &str, version: &str) -> Result<PathBuf> {
        let mut packages = self.0.iter();
        let package = packages.find(|it| it.name == name && it.version.to_string() == version);
        let package = package.with_context(|| format!("cargo brought no {name} {version}"))?;
        Ok(package.manifest_path.with_file_name("").into())
    }
}

/// Builds and runs each consumer against the packages that [`pack`] unpacked, and counts those.
///
/// Only one is built with bindgen, whose dependencies have features that build others twice.
pub fn run(workspace: &Workspace) -> Result<()> {
    count_packages(workspace)?;
    setup::ensure(workspace, false, false)?;
    let base = workspace.target.join("consumers");
    let packages = packages(workspace);
    let published = Published::find(workspace, &base)?;
    published.copy_candle_to(&packages)?;
    let bare_machine = bare_machine(workspace, &base)?;
    let library = workspace.package("cuda-vmm")?;
    let sources = workspace.root.join("xtask/consumers/*/");
    let sources: Vec<_> = files::matching(&sources.to_string_lossy()).collect();
    let folder = |source: &PathBuf| base.join(source.file_name().unwrap_or_default());
    // All first, as some have sources of others.
    for source in &sources {
        workspace.shell.remove_path(folder(source))?;
        files::copy_tree(source, &folder(source))?;
    }
    for folder in sources.iter().map(folder) {
        let name = workspace.short(&folder);
        let manifest = fs::read_to_string(folder.join("Cargo.toml.in"))?;
        let manifest = manifest.replace("@VERSION@", &library.version.to_string());
        let manifest = manifest.replace("@PACKAGES@", &packages.display().to_string());
        let path = folder.join("Cargo.toml");
        fs::write(&path, &manifest)?;
        // The versions of everything else are those that the workspace is tested with.
        fs::copy(workspace.root.join("Cargo.lock"), folder.join("Cargo.lock"))?;
        let manifest: toml::Table = manifest.parse()?;
        let consumer: Consumer = manifest["package"]["metadata"].clone().try_into()?;
        for run in consumer.run {
            let command = workspace.cargo("run --quiet --target-dir");
            let command = command.arg(base.join("target"));
            let mut command = command.arg("--manifest-path").arg(&path);
            // Nobody looks at these programs with a debugger.
            command = command.env("CARGO_PROFILE_DEV_DEBUG", "0");
            if let Some(example) = run.example {
                let before = published.folder("candle-cuda-vmm", BEFORE)?;
                files::copy_tree(&before.join("examples"), &folder.join("examples"))?;
                command = command.args(["--example", &example]);
            }
            if consumer.bare {
                command = VARIABLES.split(' ').fold(command, Cmd::env_remove);
                command = command.envs(&bare_machine);
            }
            eprintln!("xtask: {name}: {command}");
            let text = command.quiet().read()?;
            println!("{text}");
            for part in run.prints {
                let has = format!("{text}\n").contains(&part);
                ensure!(has, "the consumer {name} did not print {part:?}");
            }
        }
    }
    Ok(())
}
