//! What the test binaries share.
// Each binary uses its own part of this.
#![allow(dead_code, unused_imports, unused_macros)]

mod kernel;
mod models;
pub mod told;
mod under_test;

pub use kernel::{Gather, Rows};
pub use models::{ModelOptions, Models};
pub use under_test::{PATIENCE, UnderTest, number, turn, under_test, under_test_without_contents};

use cuda_vmm::sim::{Books, SimConfig, Simulator};
use cuda_vmm::{Device, Driver, DriverKind, EngineOptions, WorkerMode};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

/// The granularity of simulated devices, and the page of most pools here, in bytes.
pub const PAGE: usize = 2 << 20;

/// The variable that tells a test that it runs in a process of its own, and what to do there.
const ROLE_VARIABLE: &str = "CUDA_VMM_TEST_ROLE";

/// A simulated driver with its first device open.
pub struct Simulated {
    pub driver: Driver,
    pub simulator: Simulator,
    pub device: Device,
}

impl Simulated {
    pub fn new(config: SimConfig) -> Self {
        let driver = Driver::simulated(config).expect("a simulator");
        assert_eq!(driver.kind(), DriverKind::Simulated);
        let simulator = driver.simulator().expect("of a simulated driver").clone();
        let device = driver.device(0).expect("the first device");
        Self {
            driver,
            simulator,
            device,
        }
    }

    /// What the driver holds for the first device.
    pub fn books(&self) -> Books {
        self.simulator.books(0)
    }

    /// Lets no work start until it is let go, or the result is dropped, so that a test that fails
    /// does not hang.
    pub fn hold_work(&self) -> Held<'_> {
        self.simulator.hold_work();
        Held(&self.simulator)
    }

    /// Does something that must leave the driver's books as they were, and hands on what came of
    /// it.
    #[track_caller]
    pub fn unchanged<T>(&self, act: impl FnOnce() -> T) -> T {
        let before = self.books();
        let outcome = act();
        assert_eq!(self.books(), before, "the driver's books changed");
        outcome
    }
}

/// Work is held while this lives.
pub struct Held<'a>(&'a Simulator);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.release_work();
    }
}

impl Default for Simulated {
    fn default() -> Self {
        Self::new(SimConfig::new())
    }
}

/// Options for an engine that does nothing by itself.
pub fn manual() -> EngineOptions {
    EngineOptions::new().worker(WorkerMode::Manual)
}

/// The error of a driver call that failed with this code.
macro_rules! failure {
    ($call:ident, $code:ident) => {
        cuda_vmm::VmmError::Driver(cuda_vmm::DriverError {
            call: cuda_vmm::sys::DriverFunction::$call,
            code: cuda_vmm::sys::$code,
            name: stringify!($code).to_owned(),
        })
    };
}
pub(crate) use failure;

/// What this process was started for by [`run_alone`], if it was.
pub fn role() -> Option<String> {
    std::env::var(ROLE_VARIABLE).ok()
}

/// A command that runs one test of this binary alone, in a process of its own.
pub fn alone(test: &str, role: &str) -> Command {
    let binary: PathBuf = std::env::current_exe().expect("the path of this binary");
    let mut command = Command::new(binary);
    command
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(ROLE_VARIABLE, role);
    command
}

/// Runs the command made by [`alone`] and fails unless exactly that test ran and passed.
#[track_caller]
pub fn run_alone(command: &mut Command) {
    let output = command.output().expect("a child process");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{}\n{text}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Work on a stream that does not end before it is let through.
///
/// It is let through when dropped, so that a test that fails does not hang.
pub struct Gate(std::sync::Arc<GateState>);

#[derive(Default)]
struct GateState {
    reached: AtomicBool,
    open: AtomicBool,
}

impl Gate {
    /// Queues a host function (`cuLaunchHostFunc`) on the stream that waits until the gate is
    /// opened.
    pub fn close(device: &Device, stream: cuda_vmm::sys::CUstream) -> Self {
        unsafe extern "C" fn wait(state: *mut core::ffi::c_void) {
            // SAFETY: the pointer is the one reference that `close` gave to this call.
            let state = unsafe { std::sync::Arc::from_raw(state.cast::<GateState>()) };
            state.reached.store(true, Ordering::SeqCst);
            while !state.open.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
        }
        let gate = Self(std::sync::Arc::default());
        let state = std::sync::Arc::into_raw(gate.0.clone());
        with_context(device, || {
            // SAFETY: the stream is the caller's and alive; the function takes the reference it is
            // given.
            let code = unsafe {
                (device.driver().table().cuLaunchHostFunc)(
                    stream,
                    Some(wait),
                    state.cast_mut().cast(),
                )
            };
            assert_eq!(code, cuda_vmm::sys::CUDA_SUCCESS, "cuLaunchHostFunc");
        });
        gate
    }

    /// Returns once the device waits at the gate.
    pub fn wait_until_reached(&self) {
        while !self.0.reached.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
    }

    /// Whether no thread has opened it yet.
    pub fn is_closed(&self) -> bool {
        !self.0.open.load(Ordering::SeqCst)
    }

    /// Lets the work through.
    pub fn open(&self) {
        self.0.open.store(true, Ordering::SeqCst);
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.open();
    }
}

/// Calls with the device's context current on this thread, and puts back what was.
pub fn with_context<T>(device: &Device, act: impl FnOnce() -> T) -> T {
    let before = current_context(device);
    set_current_context(device, device.raw_context());
    let outcome = act();
    set_current_context(device, before);
    outcome
}

/// What is current on this thread.
pub fn current_context(device: &Device) -> cuda_vmm::sys::CUcontext {
    let mut context = core::ptr::null_mut();
    // SAFETY: `context` is a valid place for the answer.
    let code = unsafe { (device.driver().table().cuCtxGetCurrent)(&mut context) };
    assert_eq!(code, cuda_vmm::sys::CUDA_SUCCESS, "cuCtxGetCurrent");
    context
}

/// Makes a context, or none, current on this thread.
pub fn set_current_context(device: &Device, context: cuda_vmm::sys::CUcontext) {
    // SAFETY: the contexts that tests pass are null or retained by a device that lives.
    let code = unsafe { (device.driver().table().cuCtxSetCurrent)(context) };
    assert_eq!(code, cuda_vmm::sys::CUDA_SUCCESS, "cuCtxSetCurrent");
}

/// Runs this in a forked process, which has this thread alone, and returns its status. A child that
/// hangs is ended, and then this fails.
///
/// # Safety
/// Allocation must work in the child, as it does with the C library's allocator, and nothing that
/// the child does may count on other threads.
#[track_caller]
pub unsafe fn in_a_child(act: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the child leaves by `_exit`; the rest is the caller's promise.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: the default action of the signal ends the process.
        unsafe { libc::alarm(20) };
        let status = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act)).unwrap_or(99);
        // SAFETY: ends the child without running what belongs to the parent.
        unsafe { libc::_exit(status) };
    }
    assert!(child > 0, "fork");
    let mut status = 0;
    // SAFETY: `status` is a valid place, and the child is ours.
    let ended = unsafe { libc::waitpid(child, &mut status, 0) };
    assert_eq!(ended, child);
    assert!(
        libc::WIFEXITED(status),
        "the child hung: ended by signal {}",
        libc::WTERMSIG(status)
    );
    libc::WEXITSTATUS(status)
}
