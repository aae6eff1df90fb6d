//! Finding, copying and marking files.

use anyhow::Result;
use fs_err as fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use walkdir::WalkDir;
use xshell::{Shell, cmd};

/// The paths of a pattern, in order.
pub fn matching(pattern: &str) -> impl Iterator<Item = PathBuf> + use<> {
    glob::glob(pattern).into_iter().flatten().flatten()
}

pub fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    let shell = Shell::new()?;
    Ok(cmd!(shell, "cp -R {from}/. {to}").quiet().run()?)
}

/// Keeps the modification times of unchanged files, so that nothing is built again for them.
pub fn keep_times(old: &Path, new: &Path) -> Result<()> {
    for entry in WalkDir::new(new) {
        let path = entry?.into_path();
        let before = old.join(path.strip_prefix(new)?);
        if before.is_file() && fs::read(&before)? == fs::read(&path)? {
            let time = fs::metadata(&before)?.modified()?;
            let file = fs::OpenOptions::new().write(true).open(&path)?;
            file.file().set_modified(time)?;
        }
    }
    Ok(())
}

pub fn executable(path: &Path) -> Result<()> {
    Ok(fs::set_permissions(path, PermissionsExt::from_mode(0o755))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, SystemTime};

    #[test]
    fn copies_are_whole_and_unchanged_files_keep_their_times() {
        let base = tempfile::tempdir().unwrap();
        let [c, d] = ["c", "d"].map(|name| base.path().join(name));
        let past = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        for file in ["include/one.h", "bin/tool"] {
            let file = c.join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            let file = std::fs::File::create(file).unwrap();
            file.set_modified(past).unwrap();
        }
        copy_tree(&c, &d).unwrap();
        fs::write(d.join("bin/tool"), "changed").unwrap();
        keep_times(&c, &d).unwrap();
        let time = |file: &str| fs::metadata(d.join(file)).unwrap().modified().unwrap();
        assert_eq!(time("include/one.h"), past);
        assert_ne!(time("bin/tool"), past);
        keep_times(&base.path().join("absent"), &d).unwrap();
    }
}
