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
#[derive(Debug)]
pub(crate) struct Graph {
    pub(crate) device: usize,
    executable: bool,
    pub(crate) nodes: Arc<[Node]>,
}

/// All graphs of one simulator. A handle is a number and is never dereferenced.
#[derive(Debug, Default)]
pub(crate) struct Graphs {
    pub(crate) by_key: HashMap<usize, Graph>,
    made: usize,
    pub(crate) captures: u64,
}

pub(crate) const FIRST_KEY: usize = 0x6A00_0000;

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

    pub(crate) fn add(&mut self, device: usize, executable: bool, nodes: Arc<[Node]>) -> usize {
        let key = FIRST_KEY + 16 * self.made;
        self.made += 1;
        let graph = Graph {
            device,
            executable,
            nodes,
        };
        self.by_key.insert(key, graph);
        key
    }

    pub(crate) fn get(&self, key: usize, executable: bool) -> DriverResult<&Graph> {
        self.by_key
            .get(&key)
            .filter(|graph| graph.executable == executable)
            .ok_or(CUDA_ERROR_INVALID_HANDLE)
    }
}
