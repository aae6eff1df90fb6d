//! Primary contexts: how often each is retained, and whether it is poisoned.

use super::DriverResult;
use cuda_vmm_sys::*;

/// One device's primary context.
#[derive(Debug, Default)]
pub(crate) struct Context {
    pub(crate) retains: usize,
    /// The sticky error that every call in this context returns.
    poison: Option<CUresult>,
    /// How often the context was destroyed. Work from before stops.
    pub(crate) ended: u64,
}

/// The primary contexts of all devices.
#[derive(Debug)]
pub(crate) struct Contexts(pub(crate) Vec<Context>);

/// A context handle is this plus 256 times the device. It is never dereferenced.
const FIRST_HANDLE: usize = 0xC000_0000;

impl Contexts {
    pub(crate) fn new(devices: usize) -> Self {
        Self((0..devices).map(|_| Context::default()).collect())
    }

    pub(crate) fn retains(&self, device: usize) -> usize {
        self.0[device].retains
    }

    pub(crate) fn is_active(&self, device: usize) -> bool {
        self.0[device].retains > 0
    }

    /// Returns the handle of a device's context.
    pub(crate) fn handle(device: usize) -> CUcontext {
        std::ptr::without_provenance_mut(FIRST_HANDLE + 256 * device)
    }

    /// Returns the device of an active context.
    pub(crate) fn device(&self, handle: CUcontext) -> DriverResult<usize> {
        let offset = handle
            .addr()
            .checked_sub(FIRST_HANDLE)
            .filter(|offset| offset.is_multiple_of(256));
        offset
            .map(|offset| offset / 256)
            .filter(|&device| device < self.0.len() && self.is_active(device))
            .ok_or(CUDA_ERROR_INVALID_CONTEXT)
    }

    pub(crate) fn poison(&self, device: usize) -> Option<CUresult> {
        self.0[device].poison
    }

    /// Returns how often a context was destroyed.
    pub(crate) fn ended(&self, device: usize) -> u64 {
        self.0[device].ended
    }

    /// Poisons a context with `code`, unless it is already poisoned.
    pub(crate) fn set_poison(&mut self, device: usize, code: CUresult) {
        self.0[device].poison.get_or_insert(code);
    }

    /// Returns the context's error if it is poisoned.
    pub(crate) fn check(&self, device: usize) -> DriverResult {
        self.poison(device).map_or(Ok(()), Err)
    }
}
