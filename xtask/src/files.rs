//! Copying and marking files.

use anyhow::Result;
use fs_err as fs;
use std::path::{Path, PathBuf};

pub fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for path in entries(from)? {
        let target = to.join(path.file_name().unwrap_or_default());
        match path.is_dir() {
            true => copy_tree(&path, &target)?,
            false => drop(fs::copy(&path, &target)?),
        }
    }
    Ok(())
}

/// Gives each file in `new` that equals its namesake in `old` that one's time of modification, so that nothing is built
/// again for an unchanged file.
pub fn keep_times(old: &Path, new: &Path) -> Result<()> {
    for path in entries(new)? {
        let before = old.join(path.file_name().unwrap_or_default());
        if path.is_dir() {
            keep_times(&before, &path)?;
        } else if before.is_file() && fs::read(&before)? == fs::read(&path)? {
            let time = fs::metadata(&before)?.modified()?;
            let file = fs::OpenOptions::new().write(true).open(&path)?;
            file.file().set_modified(time)?;
        }
    }
    Ok(())
}

pub fn executable(path: &Path) -> Result<()> {
    #[cfg(unix)]
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    #[cfg(not(unix))]
    let _ = path;
    Ok(())
}

/// What lies in `folder`, in order of name.
pub fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder)?.map(|entry| Ok(entry?.path()));
    let mut entries = entries.collect::<Result<Vec<_>>>()?;
    entries.sort();
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, SystemTime};

    #[test]
    fn copies_are_whole_and_unchanged_files_keep_their_times() {
        let base = tempfile::tempdir().unwrap();
        let base = base.path();
        fs::create_dir_all(base.join("c/bin")).unwrap();
        fs::create_dir_all(base.join("c/include")).unwrap();
        let past = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        for file in ["c/include/one.h", "c/bin/tool"] {
            let file = std::fs::File::create(base.join(file)).unwrap();
            file.set_modified(past).unwrap();
        }
        copy_tree(&base.join("c"), &base.join("d")).unwrap();
        fs::write(base.join("d/bin/tool"), "changed").unwrap();
        keep_times(&base.join("c"), &base.join("d")).unwrap();
        let time = |file: &str| fs::metadata(base.join(file)).unwrap().modified().unwrap();
        assert_eq!(time("d/include/one.h"), past);
        assert_ne!(time("d/bin/tool"), past);
        keep_times(&base.join("absent"), &base.join("d")).unwrap();
    }
}
