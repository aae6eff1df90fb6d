//! What a device reserves for the memory of graphs.

use super::{clean, executable, free, freeing, launch, leaving, trim, wait};
use crate::Case;
use crate::kit::{Kit, call};
use cuda_vmm::sys::*;

fn attribute(kit: &Kit, attribute: CUgraphMem_attribute) -> u64 {
    let (mut value, device) = (u64::MAX, kit.device.raw());
    let place = (&raw mut value).cast();
    kit.must(call!(
        kit,
        cuDeviceGetGraphMemAttribute(device, attribute, place)
    ));
    value
}

/// Notes whether the device has memory behind graphs, and whether it reserves some.
pub fn note_reserve(kit: &mut Kit) {
    let used = attribute(kit, CU_GRAPH_MEM_ATTR_USED_MEM_CURRENT);
    let reserved = attribute(kit, CU_GRAPH_MEM_ATTR_RESERVED_MEM_CURRENT);
    let used_high = attribute(kit, CU_GRAPH_MEM_ATTR_USED_MEM_HIGH);
    let reserved_high = attribute(kit, CU_GRAPH_MEM_ATTR_RESERVED_MEM_HIGH);
    if used > reserved || used > used_high || reserved > reserved_high {
        kit.note(&format!(
            "used {used} of {used_high}, reserved {reserved} of {reserved_high}"
        ));
    }
    kit.note(match (used, reserved) {
        (0, 0) => "none",
        (0, _) => "reserved",
        _ => "used",
    });
}

pub fn cases() -> Vec<Case> {
    vec![
        Case::new(
            "the device reserves what a launch needs until it is trimmed",
            &["none", "none", "used", "none", "used", "none"],
            |kit| {
                trim(kit);
                note_reserve(kit);
                let (stream, _, graph) = freeing(kit);
                let exec = executable(kit, graph, 0);
                // Nothing is reserved before the first launch.
                note_reserve(kit);
                for _ in 0..2 {
                    kit.must(launch(kit, exec, stream));
                    wait(kit, stream);
                    note_reserve(kit);
                    trim(kit);
                    note_reserve(kit);
                }
                clean(kit, stream, graph, exec);
            },
        ),
        Case::new(
            "trimming leaves what is allocated",
            &["used", "reads 42", "SUCCESS", "none"],
            |kit| {
                let (stream, address, graph) = leaving(kit);
                let exec = executable(kit, graph, 0);
                kit.must(launch(kit, exec, stream));
                wait(kit, stream);
                trim(kit);
                note_reserve(kit);
                kit.read(address);
                let code = free(kit, stream, address);
                kit.answer(code);
                wait(kit, stream);
                trim(kit);
                note_reserve(kit);
                clean(kit, stream, graph, exec);
            },
        ),
        Case::new(
            "an unknown attribute of the memory of graphs",
            &["INVALID_VALUE"],
            |kit| {
                let (mut value, device) = (0_u64, kit.device.raw());
                let place = (&raw mut value).cast();
                let code = call!(kit, cuDeviceGetGraphMemAttribute(device, 99, place));
                kit.answer(code);
            },
        ),
    ]
}
