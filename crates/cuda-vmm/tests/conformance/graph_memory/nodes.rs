//! The nodes of a graph.

use super::{allocate, begin, end, fill, free};
use crate::Case;
use crate::capture::destroy;
use crate::kit::call;
use cuda_vmm::sys::*;
use std::ffi::c_void;

/// The kinds of nodes, without what all names begin with.
const KINDS: [(CUgraphNodeType, &str); 9] = [
    (CU_GRAPH_NODE_TYPE_KERNEL, "KERNEL"),
    (CU_GRAPH_NODE_TYPE_MEMCPY, "MEMCPY"),
    (CU_GRAPH_NODE_TYPE_MEMSET, "MEMSET"),
    (CU_GRAPH_NODE_TYPE_HOST, "HOST"),
    (CU_GRAPH_NODE_TYPE_EMPTY, "EMPTY"),
    (CU_GRAPH_NODE_TYPE_WAIT_EVENT, "WAIT_EVENT"),
    (CU_GRAPH_NODE_TYPE_EVENT_RECORD, "EVENT_RECORD"),
    (CU_GRAPH_NODE_TYPE_MEM_ALLOC, "MEM_ALLOC"),
    (CU_GRAPH_NODE_TYPE_MEM_FREE, "MEM_FREE"),
];

/// A host function that does nothing.
unsafe extern "C" fn nothing(_: *mut c_void) {}

pub fn cases() -> Vec<Case> {
    vec![Case::new(
        "the nodes of a graph, in the order of the capture",
        &[
            "5 nodes",
            "5 of 7: MEM_ALLOC, MEMSET, MEMCPY, HOST, MEM_FREE",
            "2 of 2: MEM_ALLOC, MEMSET",
        ],
        |kit| {
            let outside = kit.addresses(1);
            kit.back(outside, 1);
            let event = kit.event();
            let stream = begin(kit);
            let (page, raw) = (kit.page, stream.raw());
            let address = allocate(kit, stream, page);
            // A record and a wait are an order and no nodes.
            kit.must(call!(kit, cuEventRecord(event.raw(), raw)));
            kit.must(call!(kit, cuStreamWaitEvent(raw, event.raw(), 0)));
            fill(kit, stream, address, 1);
            kit.must(call!(kit, cuMemcpyDtoDAsync(outside, address, page, raw)));
            let data = core::ptr::null_mut();
            kit.must(call!(kit, cuLaunchHostFunc(raw, Some(nothing), data)));
            kit.must(free(kit, stream, address));
            let graph = end(kit, stream);
            let mut count = 0;
            let nowhere = core::ptr::null_mut();
            kit.must(call!(
                kit,
                cuGraphGetNodes(graph.raw(), nowhere, &mut count)
            ));
            kit.note(&format!("{count} nodes"));
            for room in [7, 2] {
                let mut nodes = [core::ptr::null_mut(); 7];
                let mut count = room;
                let place = nodes.as_mut_ptr();
                kit.must(call!(kit, cuGraphGetNodes(graph.raw(), place, &mut count)));
                let listed = nodes.iter().take_while(|node| !node.is_null());
                let kinds: Vec<_> = listed
                    .map(|&node| {
                        let mut kind = CUgraphNodeType::MAX;
                        kit.must(call!(kit, cuGraphNodeGetType(node, &mut kind)));
                        let known = KINDS.iter().find(|(known, _)| *known == kind);
                        known.map_or("another kind", |(_, name)| name)
                    })
                    .collect();
                kit.note(&format!("{count} of {room}: {}", kinds.join(", ")));
            }
            destroy(kit, Some(graph));
        },
    )]
}
