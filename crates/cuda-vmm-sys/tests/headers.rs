//! The build script's search for CUDA's headers and for a C compiler, and its messages if it finds
//! none.

#[path = "../build/compiler.rs"]
#[allow(dead_code)]
mod compiler;
#[path = "../build/places.rs"]
mod places;

use places::{ENVIRONMENTS, Found, SearchFolder, VARIABLES};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Makes an empty folder for this test.
fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

/// Writes both headers with this `CUDA_VERSION`.
fn write_headers(include: &Path, version: &str) {
    std::fs::create_dir_all(include).unwrap();
    let text = format!("/* a comment */\n#define CUDA_VERSION {version}\n");
    std::fs::write(include.join("cuda.h"), text).unwrap();
    std::fs::write(include.join("cudaTypedefs.h"), "").unwrap();
}

/// Returns the folders to search if only these variables are set, without those that installers
/// use.
fn places_with(variables: &[(&str, &Path)], set_up: &[PathBuf]) -> Vec<SearchFolder> {
    let variable = |name: &str| -> Option<OsString> {
        let (_, value) = variables.iter().find(|(variable, _)| *variable == name)?;
        Some(value.as_os_str().to_owned())
    };
    places::places(variable, set_up)
        .into_iter()
        .filter(|place| !place.folder.starts_with("/usr") && !place.folder.starts_with("/opt"))
        .collect()
}

fn search_with(variables: &[(&str, &Path)]) -> Result<Found, String> {
    places::search(&places_with(variables, &[]))
}

#[test]
fn each_variable_names_a_cuda_folder_in_every_layout() {
    let base = folder("headers-layouts");
    for below in [
        "include",
        "targets/x86_64-linux/include",
        "targets/sbsa-linux/include",
        "targets/aarch64-linux/include",
        "cu13/include",
        "cuda_runtime/include",
        "nvidia/cu13/include",
        "nvidia/cuda_runtime/include",
        "",
    ] {
        let root = base.join(below.replace('/', "-")).join("root");
        write_headers(&root.join(below), "12040");
        for variable in [
            "CUDA_HOME",
            "CUDA_PATH",
            "CUDA_ROOT",
            "CUDA_TOOLKIT_ROOT_DIR",
            "CUDA_TOOLKIT_PATH",
        ] {
            assert!(VARIABLES.contains(&variable));
            let found = search_with(&[(variable, &root)]).unwrap();
            assert_eq!(found.include, root.join(below), "{variable} {below}");
            assert!(found.wrong.is_empty());
            assert_eq!(places::cuda_version(&found.include), Some(12040));
        }
    }
}

#[test]
fn an_activated_environment_is_searched_with_its_python_packages() {
    for variable in ["VIRTUAL_ENV", "CONDA_PREFIX"] {
        assert!(ENVIRONMENTS.contains(&variable));
        let root = folder(&format!("headers-{variable}"));
        let wheel = root.join("lib/python3.12/site-packages/nvidia/cu13/include");
        write_headers(&wheel, "13000");
        assert_eq!(search_with(&[(variable, &root)]).unwrap().include, wheel);
        // The layout of conda's own packages, which are searched before those of pip.
        for below in ["targets/aarch64-linux/include", "include"] {
            write_headers(&root.join(below), "12040");
            let found = search_with(&[(variable, &root)]).unwrap();
            assert_eq!(found.include, root.join(below));
        }
    }
}

#[test]
fn a_variable_comes_before_the_set_up_folder_and_that_before_environments() {
    let base = folder("headers-order");
    let [named, set_up, conda] = ["named", "set-up", "conda"].map(|name| base.join(name));
    write_headers(&named.join("include"), "12040");
    write_headers(&set_up.join("cuda/include"), "13000");
    write_headers(&conda.join("include"), "12090");
    let set_ups = [set_up.clone()];
    let all = places_with(&[("CUDA_PATH", &named), ("CONDA_PREFIX", &conda)], &set_ups);
    assert_eq!(places::search(&all).unwrap().include, named.join("include"));
    let unnamed = places_with(&[("CONDA_PREFIX", &conda)], &set_ups);
    assert_eq!(
        places::search(&unnamed).unwrap().include,
        set_up.join("cuda/include")
    );
    let empty = places_with(&[("CUDA_HOME", Path::new(""))], &[]);
    assert_eq!(empty, []);
}

#[test]
fn a_wrong_variable_is_told_of_also_if_another_place_has_headers() {
    let base = folder("headers-wrong");
    let [missing, without, old, good] =
        ["missing", "without", "old", "good"].map(|name| base.join(name));
    std::fs::create_dir_all(without.join("include")).unwrap();
    write_headers(&old.join("include"), "11030");
    write_headers(&good.join("include"), "12040");
    let found = search_with(&[
        ("CUDA_HOME", &missing),
        ("CUDA_PATH", &without),
        ("CUDA_ROOT", &old),
        ("CUDA_TOOLKIT_PATH", &good),
    ])
    .unwrap();
    assert_eq!(found.include, good.join("include"));
    assert_eq!(
        found.wrong,
        [
            format!("CUDA_HOME={} (no such folder)", missing.display()),
            format!("CUDA_PATH={} (no cuda.h in or below it)", without.display()),
            format!(
                "CUDA_ROOT={} ({}: CUDA_VERSION 11030, older than 11040)",
                old.display(),
                old.join("include").display()
            ),
        ]
    );
}

#[test]
fn without_headers_the_message_says_where_it_looked_and_what_to_do() {
    let base = folder("headers-none");
    let half = base.join("half");
    std::fs::create_dir_all(half.join("include")).unwrap();
    std::fs::write(half.join("include/cuda.h"), "#define CUDA_VERSION 12040\n").unwrap();
    let nameless = base.join("nameless");
    write_headers(&nameless.join("include"), "of another kind");
    let message = search_with(&[
        ("CUDA_HOME", &base.join("missing")),
        ("CUDA_PATH", &half),
        ("CONDA_PREFIX", &nameless),
    ])
    .unwrap_err();
    for part in [
        "needs the CUDA headers cuda.h and cudaTypedefs.h, of CUDA 11.4 or newer".to_owned(),
        format!(
            "  CUDA_HOME={} (no such folder)\n",
            base.join("missing").display()
        ),
        format!(
            "{}: cuda.h without cudaTypedefs.h",
            half.join("include").display()
        ),
        format!(
            "{}: no CUDA_VERSION in cuda.h",
            nameless.join("include").display()
        ),
        "`cargo xtask setup`".to_owned(),
        "set CUDA_HOME to its folder".to_owned(),
        "python3 -m pip install nvidia-cuda-runtime".to_owned(),
        "turn off the default features of cuda-vmm-sys".to_owned(),
    ] {
        assert!(message.contains(&part), "{part:?} is not in:\n{message}");
    }
}

#[test]
fn a_c_compiler_may_be_named_with_a_wrapper_and_one_that_is_not_there_is_passed_over() {
    let root = folder("headers-compiler");
    let words = format!("env echo {} #", root.display());
    let found = compiler::include_of(["no-such-compiler", "false", "", &words].into_iter());
    assert_eq!(found, None, "echo prints more than the folder");
    let script = root.join("compiler");
    let text = format!(
        "#!/bin/sh\n[ \"$2\" = -print-file-name=include ] && echo {}\n",
        root.display()
    );
    std::fs::write(&script, text).unwrap();
    let words = format!("sh {} -m64", script.display());
    let found = compiler::include_of(["no-such-compiler", &words].into_iter());
    assert_eq!(found, Some(root));
}

#[test]
fn without_a_c_compiler_the_message_says_what_to_do() {
    let message = compiler::missing();
    for part in [
        "No C compiler was found",
        "the variable CC",
        "apt-get install gcc",
        "turn off the default features of cuda-vmm-sys",
    ] {
        assert!(message.contains(part), "{part:?} is not in:\n{message}");
    }
}
