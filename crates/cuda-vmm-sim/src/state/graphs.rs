//! Captures in progress, and the graphs that they make.

use super::DriverResult;
use cuda_vmm_sys::*;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Arc;
use std::thread::ThreadId;

/// One side of a copy, as the caller gave it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Endpoint {
    Device(u64),
    Host(usize),
}

/// A piece of work by addresses: the request of a call, or a node of a graph.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Node {
    /// A record or a wait, which has no effect in a graph except order.
    Nothing,
    Memset {
        address: u64,
        value: u8,
        bytes: usize,
    },
    Copy {
        to: Endpoint,
        from: Endpoint,
        bytes: usize,
    },
    HostFunction {
        function: unsafe extern "C" fn(*mut c_void),
        data: usize,
    },
    /// Allocates memory of the graph.
    Allocate { address: u64, bytes: usize },
    /// Frees memory of this graph or of another.
    Free { address: u64 },
}

impl Node {
    /// Returns the driver's kind of this node; `None` if it is only an order in the driver.
    fn kind(&self) -> Option<CUgraphNodeType> {
        Some(match self {
            Self::Nothing => return None,
            Self::Memset { .. } => CU_GRAPH_NODE_TYPE_MEMSET,
            Self::Copy { .. } => CU_GRAPH_NODE_TYPE_MEMCPY,
            Self::HostFunction { .. } => CU_GRAPH_NODE_TYPE_HOST,
            Self::Allocate { .. } => CU_GRAPH_NODE_TYPE_MEM_ALLOC,
            Self::Free { .. } => CU_GRAPH_NODE_TYPE_MEM_FREE,
        })
    }

    /// Returns whether this allocates or frees.
    pub(crate) fn is_of_memory(&self) -> bool {
        matches!(self, Self::Allocate { .. } | Self::Free { .. })
    }
}

/// A capture that has begun and not ended.
#[derive(Debug)]
pub(crate) struct Capture {
    pub(crate) id: u64,
    pub(crate) mode: CUstreamCaptureMode,
    pub(crate) thread: ThreadId,
    pub(crate) invalidated: bool,
    pub(crate) nodes: Vec<Node>,
}

impl Capture {
    /// Captures a piece of work.
    pub(crate) fn add(&mut self, node: Node) -> DriverResult {
        if self.invalidated {
            return Err(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        }
        self.nodes.push(node);
        Ok(())
    }

    /// Captures an event's record, and returns the number of the capture that the event then
    /// belongs to.
    pub(crate) fn mark(&mut self) -> DriverResult<u64> {
        self.add(Node::Nothing)?;
        Ok(self.id)
    }

    /// Captures a wait for an event that was recorded in this capture.
    pub(crate) fn wait(&mut self, recorded_in: Option<u64>) -> DriverResult {
        if recorded_in != Some(self.id) {
            self.invalidated = true;
            return Err(CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
        }
        self.add(Node::Nothing)
    }
}

/// A graph or an executable graph.
#[derive(Clone, Debug)]
pub(crate) struct Graph {
    pub(crate) device: usize,
    pub(crate) is_executable: bool,
    /// Whether a launch first frees what an earlier one left allocated.
    pub(crate) auto_free: bool,
    /// The number of the capture that made it.
    pub(crate) capture: u64,
    pub(crate) nodes: Arc<[Node]>,
    /// The handle of its first node.
    first_node: usize,
}

impl Graph {
    /// Returns an executable graph of this one.
    pub(crate) fn executable(&self, auto_free: bool) -> Self {
        Self {
            is_executable: true,
            auto_free,
            ..self.clone()
        }
    }

    /// Returns whether a node allocates or frees.
    pub(crate) fn has_memory(&self) -> bool {
        self.nodes.iter().any(Node::is_of_memory)
    }

    /// Returns the nodes that the driver lists, in the order of the capture: handle and kind.
    pub(crate) fn listed(&self) -> impl Iterator<Item = (usize, CUgraphNodeType)> {
        let kinds = self.nodes.iter().filter_map(Node::kind);
        let handle = |number| self.first_node + 16 * number;
        kinds
            .enumerate()
            .map(move |(number, kind)| (handle(number), kind))
    }
}

/// All graphs of one simulator. A handle is a number and is never dereferenced.
#[derive(Debug, Default)]
pub(crate) struct Graphs {
    pub(crate) by_key: HashMap<usize, Graph>,
    made: usize,
    nodes_made: usize,
    pub(crate) captures: u64,
}

pub(crate) const FIRST_KEY: usize = 0x6A00_0000;

/// The first handle of a node.
const FIRST_NODE: usize = 0x4E_0000_0000;

impl Graphs {
    pub(crate) fn count(&self, device: usize) -> usize {
        self.by_key
            .values()
            .filter(|graph| graph.device == device)
            .count()
    }

    pub(crate) fn destroy_all(&mut self, device: usize) {
        self.by_key.retain(|_, graph| graph.device != device);
    }

    /// Adds the graph of a capture.
    pub(crate) fn add_captured(&mut self, device: usize, capture: Capture) -> usize {
        let first_node = FIRST_NODE + 16 * self.nodes_made;
        self.nodes_made += capture.nodes.len();
        self.add(Graph {
            device,
            is_executable: false,
            auto_free: false,
            capture: capture.id,
            nodes: capture.nodes.into(),
            first_node,
        })
    }

    pub(crate) fn add(&mut self, graph: Graph) -> usize {
        let key = FIRST_KEY + 16 * self.made;
        self.made += 1;
        self.by_key.insert(key, graph);
        key
    }

    /// Returns all graphs and executable graphs of a capture.
    pub(crate) fn of_capture(&self, id: u64) -> impl Iterator<Item = &Graph> {
        self.by_key
            .values()
            .filter(move |graph| graph.capture == id)
    }

    /// Returns the kind of a node by its handle.
    pub(crate) fn node_kind(&self, node: usize) -> DriverResult<CUgraphNodeType> {
        let graphs = self.by_key.values().filter(|graph| !graph.is_executable);
        let mut nodes = graphs.flat_map(Graph::listed);
        let found = nodes.find(|(handle, _)| *handle == node);
        found.map(|(_, kind)| kind).ok_or(CUDA_ERROR_INVALID_VALUE)
    }

    pub(crate) fn get(&self, key: usize, executable: bool) -> DriverResult<&Graph> {
        self.by_key
            .get(&key)
            .filter(|graph| graph.is_executable == executable)
            .ok_or(CUDA_ERROR_INVALID_HANDLE)
    }
}
