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
    use std::process::Command;

    /// Files of the folder `kernels`, without `.cu`.
    const KERNELS: &[&str] = &["append", "softmax"];

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
        let nvcc = cudaforge::CudaToolkit::detect().map_err(explain)?.nvcc_path;
        // Without the suffix of variants such as `90a`, whose PTX newer GPUs refuse.
        let capability = cudaforge::detect_compute_cap().map_err(explain)?.base();
        let folder = std::env::var("OUT_DIR").map_err(|error| format!("OUT_DIR: {error}"))?;
        for name in KERNELS {
            let mut command = Command::new(&nvcc);
            command
                .args([
                    "--fatbin",
                    "--std=c++17",
                    "--no-compress",
                    "--generate-code",
                ])
                .arg(format!(
                    "arch=compute_{capability},code=[sm_{capability},compute_{capability}]"
                ))
                .arg("--output-file")
                .arg(Path::new(&folder).join(name).with_extension("fatbin"))
                .arg(format!("kernels/{name}.cu"));
            let output = command
                .output()
                .map_err(|error| format!("{}: {error}\n{REMEDY}", nvcc.display()))?;
            if !output.status.success() {
                let text = String::from_utf8_lossy(&output.stderr);
                return Err(format!("{command:?}: {}\n{text}", output.status));
            }
        }
        Ok(())
    }
}
