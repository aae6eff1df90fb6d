//! The shared library in place of a `libcuda.so.1`.
#![allow(
    clippy::macro_metavars_in_unsafe,
    reason = "every call of the table is unsafe"
)]

use cuda_vmm_sys::{CUDA_ERROR_OUT_OF_MEMORY, CUDA_SUCCESS, DRIVER_PATH_VARIABLE, DriverTable};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The variable with the library's path, in the process that the test starts.
const LIBRARY: &str = "CUDA_VMM_SIM_TEST_LIBRARY";

/// Builds the library in the same target folder and profile as this test. Cargo does not build it
/// for the test, because Rust code cannot link it.
fn built() -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let release = !cfg!(debug_assertions);
    let mut cargo = Command::new(env!("CARGO"));
    cargo
        .args(["build", "--offline", "--quiet", "--lib"])
        .args(release.then_some("--release"))
        .arg("--target-dir")
        .arg(target)
        .current_dir(env!("CARGO_MANIFEST_DIR"));
    assert!(cargo.status().unwrap().success(), "{cargo:?}");
    let built = target.join(if release { "release" } else { "debug" });
    built.join("libcuda_vmm_sim_library.so")
}

#[test]
fn the_library_is_a_driver_for_other_programs() {
    if let Some(library) = std::env::var_os(LIBRARY) {
        return use_library(Path::new(&library));
    }
    let library = built();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_library_is_a_driver_for_other_programs"])
        .env(LIBRARY, &library)
        .env_remove(DRIVER_PATH_VARIABLE)
        .env("CUDA_VMM_SIM_DEVICES", "3")
        .env("CUDA_VMM_SIM_MEMORY_BYTES", "8388608")
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
}

fn use_library(library: &Path) {
    // SAFETY: the simulated driver keeps a driver's contracts.
    let driver = unsafe { cuda_vmm_sys::load_from(library) }.expect("every entry point is found");
    // The dynamic loader has now loaded a library of this name, and finds no other.
    let by_name: DriverTable = cuda_vmm_sys::load().expect("it is called libcuda.so.1");
    assert_eq!(by_name.cuInit as usize, driver.cuInit as usize);
    assert!(driver.cuCtxRecordEvent.is_some());
    macro_rules! call {
        ($name:ident($($argument:expr),*)) => {
            // SAFETY: the pointers are valid for the call; the other arguments are numbers.
            unsafe { (driver.$name)($($argument),*) }
        };
    }
    let (mut count, mut bytes, mut plain) = (0, 0, 0);
    let mut context = std::ptr::null_mut();
    assert_eq!(call!(cuInit(0)), CUDA_SUCCESS);
    assert_eq!(call!(cuDeviceGetCount(&mut count)), CUDA_SUCCESS);
    assert_eq!(call!(cuDeviceTotalMem(&mut bytes, 2)), CUDA_SUCCESS);
    assert_eq!((count, bytes), (3, 8 << 20));
    assert_eq!(
        call!(cuDevicePrimaryCtxRetain(&mut context, 2)),
        CUDA_SUCCESS
    );
    assert_eq!(call!(cuCtxSetCurrent(context)), CUDA_SUCCESS);
    assert_eq!(
        call!(cuMemAlloc(&mut plain, 9 << 20)),
        CUDA_ERROR_OUT_OF_MEMORY
    );
    assert_eq!(call!(cuMemAlloc(&mut plain, 1 << 20)), CUDA_SUCCESS);
    let mut data = [0u8; 3];
    assert_eq!(call!(cuMemsetD8(plain, 7, 1 << 20)), CUDA_SUCCESS);
    assert_eq!(
        call!(cuMemcpyDtoH(data.as_mut_ptr().cast(), plain, 3)),
        CUDA_SUCCESS
    );
    assert_eq!(data, [7; 3]);
    assert_eq!(call!(cuMemFree(plain)), CUDA_SUCCESS);
}
