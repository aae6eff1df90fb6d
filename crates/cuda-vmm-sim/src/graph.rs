//! The calls for graphs: instantiate, upload, launch, list nodes and destroy.

use crate::state::graphs::Graph;
use crate::state::work::Work;
use crate::state::{DriverResult, State};
use cuda_vmm_sys::*;
use std::sync::Arc;

impl State {
    /// Makes an executable graph. A graph whose nodes allocate or free has at most one at a time.
    pub(crate) fn graph_instantiate(
        &self,
        graph: CUgraph,
        auto_free: bool,
    ) -> DriverResult<CUgraphExec> {
        let mut inner = self.lock();
        inner.enter()?;
        let graph = inner.graphs.get(graph.addr(), false)?;
        let is_executable = |other: &Graph| other.is_executable;
        if graph.has_memory() && inner.graphs.of_capture(graph.capture).any(is_executable) {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        let executable = graph.executable(auto_free);
        let key = inner.graphs.add(executable);
        Ok(std::ptr::without_provenance_mut(key))
    }

    /// Checks the arguments alone: what a launch needs is prepared by the launch.
    pub(crate) fn graph_upload(&self, graph: CUgraphExec, stream: CUstream) -> DriverResult {
        let mut inner = self.lock();
        let key = inner.enter_stream(stream)?;
        inner.graphs.get(graph.addr(), true)?;
        inner.check_not_captured(key)?;
        inner.check_implicit(key)
    }

    /// Enqueues a graph's work on what is mapped at its addresses now. If nothing is, the launch
    /// succeeds and the work poisons the context when it runs.
    pub(crate) fn graph_launch(
        self: &Arc<Self>,
        graph: CUgraphExec,
        stream: CUstream,
    ) -> DriverResult {
        let mut inner = self.lock();
        let key = inner.enter_stream(stream)?;
        let graph = inner.graphs.get(graph.addr(), true)?.clone();
        inner.check_not_captured(key)?;
        inner.check_implicit(key)?;
        if graph.has_memory() {
            let freed = inner.begin_graph_memory(&graph)?;
            let mut after = inner.streams.implicit_order(key);
            after.extend(inner.graph_memory.points(graph.capture));
            after.retain(|&(other, _)| other != key);
            self.enqueue_after(&mut inner, key, after, Work::Nothing)?;
            for address in freed {
                let work = Work::Open {
                    address,
                    open: false,
                };
                self.enqueue(&mut inner, key, work)?;
            }
        }
        for node in graph.nodes.iter() {
            let work = inner.resolve(node, true, self.config.backed);
            self.enqueue(&mut inner, key, work)?;
        }
        let last = (key, inner.streams.get(key)?.enqueued);
        inner.graph_memory.set_point(graph.capture, last);
        Ok(())
    }

    /// Returns the handles of a graph's nodes.
    pub(crate) fn graph_nodes(&self, graph: CUgraph) -> DriverResult<Vec<CUgraphNode>> {
        let inner = self.lock();
        let graph = inner.graphs.get(graph.addr(), false)?;
        let handles = graph.listed().map(|(handle, _)| handle);
        Ok(handles.map(std::ptr::without_provenance_mut).collect())
    }

    /// Destroys a graph or an executable graph. What it left allocated stays so.
    pub(crate) fn graph_destroy(&self, key: usize, executable: bool) -> DriverResult {
        let mut inner = self.lock();
        inner.graphs.get(key, executable)?;
        inner.graphs.by_key.remove(&key);
        inner.forget_graph_memory();
        Ok(())
    }
}
