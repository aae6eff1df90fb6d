//! How many nodes of each kind a graph has.
//!
//! # Safety
//! The driver writes as many handles as there is room for. The graph is alive.
#![allow(unsafe_code)]

use crate::driver::call;
use crate::sys::{
    CU_GRAPH_NODE_TYPE_HOST, CU_GRAPH_NODE_TYPE_KERNEL, CU_GRAPH_NODE_TYPE_MEM_ALLOC,
    CU_GRAPH_NODE_TYPE_MEM_FREE, CU_GRAPH_NODE_TYPE_MEMCPY, CU_GRAPH_NODE_TYPE_MEMSET, CUgraph,
};
use crate::{Device, Result};
use core::ptr::null_mut;

/// How many pieces of work of each kind a [`Graph`](super::Graph) has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct GraphNodes {
    /// Kernels.
    pub kernels: usize,
    /// Copies.
    pub copies: usize,
    /// Fills with one value.
    pub memsets: usize,
    /// Functions on the host.
    pub host_functions: usize,
    /// Allocations of memory of the graph.
    pub allocations: usize,
    /// Frees of such memory.
    pub frees: usize,
    /// All others.
    pub others: usize,
}

impl GraphNodes {
    pub(super) fn of(device: &Device, graph: CUgraph) -> Result<Self> {
        let driver = device.driver();
        let mut count = 0;
        // SAFETY: without a place for handles the driver writes their number.
        unsafe { call!(driver, cuGraphGetNodes(graph, null_mut(), &mut count)) }?;
        let mut handles = vec![null_mut(); count];
        // SAFETY: there is room for this many handles.
        unsafe {
            call!(
                driver,
                cuGraphGetNodes(graph, handles.as_mut_ptr(), &mut count)
            )
        }?;
        let mut nodes = Self::default();
        for handle in handles.into_iter().take(count) {
            let mut kind = 0;
            // SAFETY: the node is of a graph that is alive, and `kind` is a valid place.
            unsafe { call!(driver, cuGraphNodeGetType(handle, &mut kind)) }?;
            *nodes.of_kind(kind) += 1;
        }
        Ok(nodes)
    }

    fn of_kind(&mut self, kind: crate::sys::CUgraphNodeType) -> &mut usize {
        match kind {
            CU_GRAPH_NODE_TYPE_KERNEL => &mut self.kernels,
            CU_GRAPH_NODE_TYPE_MEMCPY => &mut self.copies,
            CU_GRAPH_NODE_TYPE_MEMSET => &mut self.memsets,
            CU_GRAPH_NODE_TYPE_HOST => &mut self.host_functions,
            CU_GRAPH_NODE_TYPE_MEM_ALLOC => &mut self.allocations,
            CU_GRAPH_NODE_TYPE_MEM_FREE => &mut self.frees,
            _ => &mut self.others,
        }
    }

    /// All of them.
    pub fn total(&self) -> usize {
        let own = self.kernels + self.copies + self.memsets + self.host_functions;
        own + self.allocations + self.frees + self.others
    }
}
