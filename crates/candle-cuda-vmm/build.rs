//! Compiles the kernels, if the feature `cuda` is on; otherwise does nothing.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    if let Err(problem) = kernels::compile() {
        eprintln!("\n{problem}\n");
        std::process::exit(1);
    }
}

#[cfg(feature = "cuda")]
mod kernels {
    use std::path::Path;
    use std::process::{Command, Stdio};

    /// Files of the folder `kernels`, without `.cu`.
    const KERNELS: &[&str] = &["append", "softmax"];

    /// Those of the feature `attention`. The slowest come first.
    const ATTENTION: &[&str] = &[
        "attention/decode_f8",
        "attention/decode_f32",
        "attention/decode_f16",
        "attention/decode_bf16",
        "attention/write",
        "attention/read",
        "fused",
        "linear",
        "sample",
    ];

    /// The oldest architecture that has the instructions of attention.
    const ATTENTION_CAPABILITY_MIN: usize = 80;

    /// What [`cudaforge`] reads for Candle's own kernels, and so for these.
    const VARIABLES: [&str; 5] = ["NVCC", "PATH", "CUDA_HOME", "CUDA_PATH", "CUDA_COMPUTE_CAP"];

    const REMEDY: &str = "\
        The feature `cuda` compiles kernels, as Candle's does, with nvcc of the CUDA toolkit.\n\
        Install it, and set NVCC to nvcc, or CUDA_HOME to its folder, or put nvcc on PATH.\n\
        If this machine has no GPU, set CUDA_COMPUTE_CAP to that of the target, for example 90.";

    /// Makes `OUT_DIR/NAME.fatbin` of each kernel: machine code for one architecture, and PTX for
    /// all newer ones.
    pub fn compile() -> Result<(), String> {
        for variable in VARIABLES {
            println!("cargo::rerun-if-env-changed={variable}");
        }
        println!("cargo::rerun-if-changed=kernels");
        let explain = |error: cudaforge::Error| format!("{error}\n{REMEDY}");
        let toolkit = cudaforge::CudaToolkit::detect().map_err(explain)?;
        let nvcc = toolkit.nvcc_path;
        // For tests that compile the kernels for the host.
        let headers = toolkit.include_dir.display();
        println!("cargo::rustc-env=CUDA_VMM_TOOLKIT_HEADERS={headers}");
        // Without the suffix of variants such as `90a`, whose PTX newer GPUs refuse.
        let capability = cudaforge::detect_compute_cap().map_err(explain)?.base();
        let folder = std::env::var("OUT_DIR").map_err(|error| format!("OUT_DIR: {error}"))?;
        // All at once: there are few, and the longest takes half of the time of all.
        let mut running = Vec::new();
        let mut start = |name: &str, capability: usize| {
            let output = Path::new(&folder).join(name).with_extension("fatbin");
            let mut command = Command::new(&nvcc);
            command
                .args(["--fatbin", "--std=c++17"])
                .arg("--generate-code")
                .arg(format!(
                    "arch=compute_{capability},code=[sm_{capability},compute_{capability}]"
                ))
                .arg("--output-file")
                .arg(&output)
                .arg(format!("kernels/{name}.cu"))
                .stderr(Stdio::piped());
            let child = command
                .spawn()
                .map_err(|error| format!("{}: {error}\n{REMEDY}", nvcc.display()))?;
            running.push((command, child));
            Ok::<_, String>(())
        };
        for name in KERNELS {
            start(name, capability)?;
        }
        if cfg!(feature = "attention") {
            let folder = Path::new(&folder).join("attention");
            std::fs::create_dir_all(&folder)
                .map_err(|error| format!("{}: {error}", folder.display()))?;
            for name in ATTENTION {
                // An older GPU does not load them.
                start(name, capability.max(ATTENTION_CAPABILITY_MIN))?;
            }
        }
        for (command, child) in running {
            let output = child
                .wait_with_output()
                .map_err(|error| format!("{command:?}: {error}"))?;
            if !output.status.success() {
                let text = String::from_utf8_lossy(&output.stderr);
                return Err(format!("{command:?}: {}\n{text}", output.status));
            }
        }
        Ok(())
    }
}
