//! Moving, copying and marking files.

use anyhow::{Context, Result};
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

/// Moves everything in `from` into `to`, folder by folder, so that several trees become one.
pub fn merge_into(from: &Path, to: &Path) -> Result<()> {
    make(to)?;
    for (name, path) in entries(from)? {
        let target = to.join(name);
        if path.is_dir() {
            merge_into(&path, &target)?;
        } else {
            fs::rename(&path, &target)
                .with_context(|| format!("moving {} to {}", path.display(), target.display()))?;
        }
    }
    Ok(())
}

/// Copies the tree at `from` to `to`.
pub fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    make(to)?;
    for (name, path) in entries(from)? {
        let target = to.join(name);
        if path.is_dir() {
            copy_tree(&path, &target)?;
        } else {
            fs::copy(&path, &target)
                .with_context(|| format!("copying {} to {}", path.display(), target.display()))?;
        }
    }
    Ok(())
}

/// Gives each file in `new` that equals its namesake in `old` that one's time of modification, so
/// that nothing is built again for an unchanged file.
pub fn keep_times(old: &Path, new: &Path) -> Result<()> {
    if !old.is_dir() {
        return Ok(());
    }
    for (name, path) in entries(new)? {
        let before = old.join(name);
        if path.is_dir() {
            keep_times(&before, &path)?;
        } else if before.is_file() && fs::read(&before)? == fs::read(&path)? {
            let time = fs::metadata(&before)?.modified()?;
            fs::File::options()
                .write(true)
                .open(&path)?
                .set_modified(time)?;
        }
    }
    Ok(())
}

/// Lets every file directly in `folder` be run; a folder that is not there is none of our concern.
pub fn make_executable(folder: &Path) -> Result<()> {
    if !folder.is_dir() {
        return Ok(());
    }
    for (_, path) in entries(folder)? {
        if path.is_file() {
            executable(&path)?;
        }
    }
    Ok(())
}

/// Lets the file at `path` be run.
pub fn executable(path: &Path) -> Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(path, fs::Permissions::from_mode(0o755))
            .with_context(|| format!("making {} executable", path.display()))?;
    }
    #[cfg(not(unix))]
    let _ = path;
    Ok(())
}

/// Makes `folder` and its parents.
pub fn make(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("making the folder {}", folder.display()))
}

/// Removes the tree at `path` if it is there.
pub fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Names and paths of what lies in `folder`, in order of name.
pub fn entries(folder: &Path) -> Result<Vec<(std::ffi::OsString, std::path::PathBuf)>> {
    let reading = || format!("reading the folder {}", folder.display());
    let mut entries = Vec::new();
    for entry in fs::read_dir(folder).with_context(reading)? {
        let entry = entry.with_context(reading)?;
        entries.push((entry.file_name(), entry.path()));
    }
    entries.sort();
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merging_keeps_what_both_trees_have_and_unchanged_files_keep_their_times() {
        let base = std::env::temp_dir().join(format!("xtask-files-{}", std::process::id()));
        remove_tree(&base).unwrap();
        let write = |path: &str, text: &str| {
            let path = base.join(path);
            make(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("a/include/one.h", "1");
        write("b/include/two.h", "2");
        write("b/bin/tool", "t");
        merge_into(&base.join("a"), &base.join("c")).unwrap();
        merge_into(&base.join("b"), &base.join("c")).unwrap();
        for file in ["include/one.h", "include/two.h", "bin/tool"] {
            assert!(base.join("c").join(file).is_file(), "{file}");
        }

        copy_tree(&base.join("c"), &base.join("d")).unwrap();
        fs::write(base.join("d/bin/tool"), "changed").unwrap();
        let past = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
        for file in ["c/include/one.h", "c/bin/tool"] {
            fs::File::options()
                .write(true)
                .open(base.join(file))
                .unwrap()
                .set_modified(past)
                .unwrap();
        }
        keep_times(&base.join("c"), &base.join("d")).unwrap();
        let time = |file: &str| fs::metadata(base.join(file)).unwrap().modified().unwrap();
        assert_eq!(time("d/include/one.h"), past);
        assert_ne!(time("d/bin/tool"), past);
        remove_tree(&base).unwrap();
    }
}
