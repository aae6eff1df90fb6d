//! Where this machine has the CUDA libraries that Candle links.

use anyhow::{Context, Result};
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Prints the folders of the CUDA libraries that came as Python packages.
const WHEELS: &str = r#"
import glob, os, site, sys
folders = list(sys.path) + site.getsitepackages() + [site.getusersitepackages()]
for folder in dict.fromkeys(folders):
    for library in sorted(glob.glob(os.path.join(folder, "nvidia", "*", "lib"))):
        print(library)
"#;

/// What was found of the libraries that were looked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Libraries {
    /// The folders that hold them, where the dynamic loader must be told.
    pub folders: Vec<PathBuf>,
    /// Those that are nowhere.
    pub missing: Vec<String>,
}

impl Libraries {
    /// Looks for `names` in `LD_LIBRARY_PATH`, below `/usr/local`, among the Python packages, and where
    /// the dynamic loader looks by itself.
    pub fn find(names: &[String]) -> Self {
        if names.is_empty() {
            return Self::default();
        }
        Self::find_in(names, &folders(), &known_to_the_loader())
    }

    fn find_in(names: &[String], folders: &[PathBuf], loader: &BTreeSet<String>) -> Self {
        let mut found = Self::default();
        for name in names {
            match folders.iter().find(|folder| folder.join(name).exists()) {
                Some(folder) if found.folders.contains(folder) => {}
                Some(folder) => found.folders.push(folder.clone()),
                None if loader.contains(name) => {}
                None => found.missing.push(name.clone()),
            }
        }
        found
    }

    /// `LD_LIBRARY_PATH` for a program that links them: their folders, and after them what it says already.
    pub fn path(&self) -> Result<OsString> {
        let given = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
        let mut folders = self.folders.clone();
        folders.extend(std::env::split_paths(&given).filter(|path| path.is_absolute()));
        std::env::join_paths(folders).context("the folders of CUDA libraries")
    }

    /// One line for the report.
    pub fn describe(&self) -> String {
        let folders: Vec<String> = self
            .folders
            .iter()
            .map(|folder| folder.display().to_string())
            .collect();
        let mut text = if folders.is_empty() {
            "those of the dynamic loader".to_owned()
        } else {
            folders.join(":")
        };
        if !self.missing.is_empty() {
            text += &format!("; missing: {}", self.missing.join(", "));
        }
        text
    }
}

/// The folders of CUDA toolkits below `/usr/local`.
pub fn toolkits() -> Vec<PathBuf> {
    let mut toolkits: Vec<PathBuf> = entries(Path::new("/usr/local"))
        .into_iter()
        .filter(|path| {
            path.file_name()
                .and_then(|name| name.to_str())
                .is_some_and(|name| name == "cuda" || name.starts_with("cuda-"))
        })
        .collect();
    toolkits.sort();
    toolkits
}

/// The folders in which to look, in order.
fn folders() -> Vec<PathBuf> {
    let given = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&given)
        .filter(|folder| !folder.as_os_str().is_empty())
        .collect();
    for toolkit in toolkits() {
        folders.push(toolkit.join("lib64"));
        let mut targets = entries(&toolkit.join("targets"));
        targets.sort();
        folders.extend(targets.into_iter().map(|target| target.join("lib")));
    }
    if let Some(text) = output(Command::new("python3").args(["-c", WHEELS])) {
        folders.extend(text.lines().map(PathBuf::from));
    }
    folders
}

/// The libraries that the dynamic loader finds by itself.
fn known_to_the_loader() -> BTreeSet<String> {
    let text = ["ldconfig", "/sbin/ldconfig"]
        .into_iter()
        .find_map(|program| output(Command::new(program).arg("-p")))
        .unwrap_or_default();
    text.lines()
        .filter(|line| line.starts_with(char::is_whitespace))
        .filter_map(|line| line.split_whitespace().next())
        .map(str::to_owned)
        .collect()
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = folder.read_dir().into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

/// What `command` prints, if it can be started and succeeds.
fn output(command: &mut Command) -> Option<String> {
    let output = command.output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    output.status.success().then_some(text)
}

/// The first line that `command` prints, if it can be started and succeeds.
pub fn first_line(command: &mut Command) -> Option<String> {
    output(command)?.lines().next().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_is_in_a_folder_or_known_to_the_loader_or_missing() {
        let folder = tempfile::tempdir().unwrap();
        let folders = ["one", "two"].map(|name| folder.path().join(name));
        for (folder, names) in folders
            .iter()
            .zip([&["a.so"] as &[&str], &["a.so", "b.so"]])
        {
            std::fs::create_dir(folder).unwrap();
            for name in names {
                std::fs::write(folder.join(name), "").unwrap();
            }
        }
        let names = ["a.so", "b.so", "c.so", "d.so"].map(str::to_owned);
        let found = Libraries::find_in(&names, &folders, &BTreeSet::from(["c.so".to_owned()]));
        assert_eq!(
            found,
            Libraries {
                folders: folders.to_vec(),
                missing: vec!["d.so".to_owned()],
            }
        );
        assert!(found.describe().ends_with("two; missing: d.so"));
    }
}
