//! Where CUDA's headers are looked for, and how old they may be: for the build script, and for the project's own set-up
//! task, which asks whether the machine has them.

/// Variables that name a CUDA folder, in the order in which they are tried.
pub const VARIABLES: [&str; 4] = [
    "CUDA_HOME",
    "CUDA_PATH",
    "CUDA_ROOT",
    "CUDA_TOOLKIT_ROOT_DIR",
];

/// Folders that installers use.
pub const USUAL: [&str; 4] = ["/usr/local/cuda", "/opt/cuda", "/usr/lib/cuda", "/usr"];

/// Where headers lie below a CUDA folder: a toolkit's own layouts, then those of the wheels.
pub const BELOW: [&str; 7] = [
    "include",
    "targets/x86_64-linux/include",
    "targets/sbsa-linux/include",
    "cu13/include",
    "cuda_runtime/include",
    "nvidia/cu13/include",
    "nvidia/cuda_runtime/include",
];

/// The oldest header that declares all we use (`cuGetProcAddress`, `cuGraphInstantiateWithFlags`).
pub const OLDEST: u32 = 11040;
