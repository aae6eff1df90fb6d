//! Memory that other processes may import: a sealed file in memory, named for its device and size.

use super::DriverResult;
use crate::host_memory::{FileIdentity, HostFile};
use cuda_vmm_sys::*;
use std::os::raw::c_int;

const PREFIX: &str = "cuda-vmm-sim:export";

/// The memory behind a descriptor.
pub(crate) struct Imported {
    pub(crate) file: HostFile,
    pub(crate) identity: FileIdentity,
    pub(crate) device: usize,
    pub(crate) bytes: usize,
}

/// Makes a file for memory that may be exported.
pub(crate) fn shareable_file(
    device: usize,
    bytes: usize,
) -> DriverResult<(HostFile, FileIdentity)> {
    let name = format!("{PREFIX}:device={device}:bytes={bytes}");
    let file = HostFile::create(&name, bytes as u64, true).map_err(|_| CUDA_ERROR_OUT_OF_MEMORY)?;
    let identity = file.identity().map_err(|_| CUDA_ERROR_OPERATING_SYSTEM)?;
    Ok((file, identity))
}

/// Imports the memory behind a descriptor. The caller still closes the descriptor.
pub(crate) fn import(descriptor: c_int) -> DriverResult<Imported> {
    let (file, name) = HostFile::import(descriptor).map_err(|_| CUDA_ERROR_INVALID_VALUE)?;
    let (device, bytes) = parse(&name).ok_or(CUDA_ERROR_INVALID_VALUE)?;
    let size = file.bytes().map_err(|_| CUDA_ERROR_OPERATING_SYSTEM)?;
    if size != bytes as u64 || bytes == 0 {
        return Err(CUDA_ERROR_INVALID_VALUE);
    }
    let identity = file.identity().map_err(|_| CUDA_ERROR_OPERATING_SYSTEM)?;
    Ok(Imported {
        file,
        identity,
        device,
        bytes,
    })
}

/// Parses device and size from a file's name in `/proc`.
fn parse(name: &str) -> Option<(usize, usize)> {
    let fields = name.strip_prefix("/memfd:")?.strip_prefix(PREFIX)?;
    let fields = fields.strip_suffix(" (deleted)").unwrap_or(fields);
    let (device, bytes) = fields.strip_prefix(":device=")?.split_once(":bytes=")?;
    Some((device.parse().ok()?, bytes.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn only_our_own_names_are_read() {
        let name = "/memfd:cuda-vmm-sim:export:device=3:bytes=2097152 (deleted)";
        assert_eq!(parse(name), Some((3, 2_097_152)));
        for other in [
            "/memfd:other (deleted)",
            "/tmp/file",
            "",
            "/memfd:cuda-vmm-sim:export:device=x:bytes=1",
        ] {
            assert_eq!(parse(other), None, "{other}");
        }
    }
}
