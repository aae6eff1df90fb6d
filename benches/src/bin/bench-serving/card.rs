//! The simulated card, and the clocks of the two threads that call its driver.

use anyhow::{Context, Result};
use cuda_vmm::{Device, Driver};
use cuda_vmm_sim::{CostModel, SimConfig, Simulator};
use std::thread;

/// A device of 80 GiB that only keeps books.
pub struct Card {
    pub device: Device,
    simulator: Simulator,
    /// What the stepping thread's clock showed when simulated time began.
    begin_ns: u64,
    /// When the background is done with all that it was given, in simulated time.
    background_done_ns: u64,
}

impl Card {
    /// A card of its own, on which calls take time if their costs are given.
    pub fn new(costs: Option<CostModel>) -> Result<Self> {
        let config = SimConfig::new().unbacked();
        let config = costs.into_iter().fold(config, SimConfig::cost_model);
        let driver = Driver::simulated(config)?;
        let simulator = driver.simulator().context("no simulator")?.clone();
        Ok(Self {
            device: driver.device(0)?,
            simulator,
            begin_ns: 0,
            background_done_ns: 0,
        })
    }

    /// Lets simulated time begin: calls before cost nothing.
    pub fn begin(&mut self) {
        self.begin_ns = self.simulator.thread_clock_ns();
    }

    /// Makes calls of the driver on the stepping thread, and moves the moment by what they cost.
    ///
    /// What the background does may still be under way then, while the books have it already. So
    /// the stepping thread waits for all of it, which is more than it would have to.
    pub fn call<T>(&mut self, now_ns: &mut u64, calls: impl FnOnce() -> T) -> T {
        *now_ns = self.background_done_ns.max(*now_ns);
        let clock_ns = self.simulator.thread_clock_ns();
        let late_ns = (self.begin_ns + *now_ns).saturating_sub(clock_ns);
        self.simulator.advance_thread_clock_ns(late_ns);
        let outcome = calls();
        let clock_ns = self.simulator.thread_clock_ns();
        *now_ns = clock_ns.saturating_sub(self.begin_ns).max(*now_ns);
        outcome
    }

    /// Does a job in the background, which has a clock of its own. It begins when it is due and the
    /// background is free. The caller waits for it, so that every run is the same.
    pub fn behind<T: Send>(&mut self, now_ns: u64, job: impl FnOnce() -> T + Send) -> T {
        let from_ns = self.begin_ns + now_ns.max(self.background_done_ns);
        // The clock is the thread's, and that of a new one stands at zero.
        let run = || {
            self.simulator.advance_thread_clock_ns(from_ns);
            (job(), self.simulator.thread_clock_ns())
        };
        let ran = thread::scope(|scope| scope.spawn(run).join());
        let (outcome, clock_ns) = ran.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        self.background_done_ns = clock_ns.saturating_sub(self.begin_ns);
        outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cuda_vmm::PhysicalMemory;
    use cuda_vmm::sys::DriverFunction;

    const PAGE: usize = 2 << 20;

    #[test]
    fn calls_move_the_moment_and_the_background_has_its_own_time() {
        let mut card = Card::new(Some(CostModel::h100())).unwrap();
        card.begin();
        let device = card.device.clone();
        let mut now_ns = 1_000_000;
        let memory = card.call(&mut now_ns, || PhysicalMemory::new(&device, PAGE).unwrap());
        assert_eq!(now_ns, 1_007_600);
        let other = card.behind(now_ns, || PhysicalMemory::new(&device, PAGE).unwrap());
        // Later the driver is free again, and the moment moves by the call alone.
        let mut later_ns = 2_000_000;
        card.call(&mut later_ns, || drop(memory));
        assert_eq!(later_ns, 2_009_700);
        // At once, the call waits for the background.
        card.behind(later_ns, || drop(other));
        card.call(&mut later_ns, || ());
        assert_eq!(later_ns, 2_019_400);
        use DriverFunction::*;
        let calls = |function| card.simulator.calls(function);
        assert_eq!([cuMemCreate, cuMemRelease].map(calls), [2; 2]);
        assert_eq!([cuMemMap, cuMemSetAccess, cuMemUnmap].map(calls), [0; 3]);
    }

    #[test]
    fn without_costs_time_stands() {
        let mut card = Card::new(None).unwrap();
        card.begin();
        let device = card.device.clone();
        let mut now_ns = 5;
        let memory = card.call(&mut now_ns, || PhysicalMemory::new(&device, PAGE).unwrap());
        card.behind(now_ns, || drop(memory));
        card.call(&mut now_ns, || ());
        assert_eq!(now_ns, 5);
    }
}
