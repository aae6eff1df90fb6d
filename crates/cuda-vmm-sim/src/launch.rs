//! Calls that queue work on device memory.
//!
//! A memset or a copy checks its addresses at the call, as the driver does, and refuses addresses
//! that are not mapped with access. If the mapping has changed when the work runs, that is an
//! illegal access.
//!
//! Host memory that is not registered is pageable. A copy from there reads the bytes at the call,
//! and a copy to there returns when it is complete. A copy from or to registered memory returns at
//! once, and touches that memory when it runs. So do the driver's (CUDA Driver API, "API
//! synchronization behavior").

use crate::state::address_space::AddressSpace;
use crate::state::graphs::{Endpoint, Node};
use crate::state::streams::Key;
use crate::state::{DriverResult, Inner, State};
use cuda_vmm_sys::*;
use std::sync::Arc;

impl State {
    /// Enqueues work on a stream, or adds it to the stream's capture.
    pub(crate) fn launch(self: &Arc<Self>, stream: CUstream, node: Node) -> DriverResult {
        let mut inner = self.lock();
        let key = inner.enter_stream(stream)?;
        if inner.streams.get(key)?.capture.is_some() {
            inner.check(&node, |space, address, _, _| space.is_known(address))?;
        } else {
            inner.check_open(&node, key)?;
        }
        if let Some(capture) = &mut inner.streams.get_mut(key)?.capture {
            return capture.add(node);
        }
        inner.check_implicit(key)?;
        let work = inner.resolve(&node, true, self.config.backed);
        let sequence = self.enqueue(&mut inner, key, work)?;
        let waits = match node {
            Node::Copy {
                to: Endpoint::Host(address),
                bytes: bytes @ 1..,
                ..
            } => !inner.registrations.contains(address, bytes),
            _ => false,
        };
        if waits {
            let stream = inner.streams.get(key)?;
            let (device, clock_ns) = (stream.device, stream.clock_ns);
            let inner = self.wait_for(inner, device, &[(key, sequence)])?;
            inner.advance_thread_to(clock_ns);
        }
        Ok(())
    }

    /// Runs work in the legacy stream's order and waits for it.
    pub(crate) fn launch_and_wait(self: &Arc<Self>, node: Node) -> DriverResult {
        let mut inner = self.lock();
        let key = inner.enter_stream(std::ptr::null_mut())?;
        inner.check_open(&node, key)?;
        inner.check_implicit(key)?;
        let work = inner.resolve(&node, false, self.config.backed);
        self.run_in_order(inner, key, work)
    }
}

impl Inner {
    /// Fails unless all memory that the work touches is mapped now, with access for the stream's
    /// device.
    fn check_open(&self, node: &Node, key: Key) -> DriverResult {
        let device = self.streams.get(key)?.device;
        self.check(node, |space, address, bytes, write| {
            space.is_open(address, bytes, device, write)
        })
    }

    /// Fails if host memory is null or if `is_valid` returns `false` for a range of device
    /// addresses. Its arguments are the first address, the size in bytes, and whether the range is
    /// written.
    fn check(
        &self,
        node: &Node,
        is_valid: impl Fn(&AddressSpace, u64, usize, bool) -> bool,
    ) -> DriverResult {
        let endpoint = |endpoint: Endpoint, bytes, write| match endpoint {
            Endpoint::Device(address) => is_valid(&self.space, address, bytes, write),
            Endpoint::Host(address) => address != 0,
        };
        let fine = match *node {
            Node::Nothing
            | Node::HostFunction { .. }
            | Node::Allocate { .. }
            | Node::Free { .. } => true,
            Node::Memset { bytes: 0, .. } | Node::Copy { bytes: 0, .. } => true,
            Node::Memset { address, bytes, .. } => is_valid(&self.space, address, bytes, true),
            Node::Copy { to, from, bytes } => {
                endpoint(to, bytes, true) && endpoint(from, bytes, false)
            }
        };
        if fine {
            Ok(())
        } else {
            Err(CUDA_ERROR_INVALID_VALUE)
        }
    }
}
