//! What chunks cost the work that runs on them.

use super::{Outcome, Work};
use crate::bare::{Plain, Range};
use crate::demand::{Demand, Reach};
use crate::machine::{self, Machine, time};
use crate::sides::Sides;
use anyhow::Result;
use std::time::Duration;

const AT_ONCE: Demand = Demand::time(
    "copy within 8 GiB of pool memory asked at once: cuMemAlloc",
    "GB/s",
    Reach::AtLeastTimes(0.99),
);
const GROWN: Demand = Demand::time(
    "copy within 8 GiB of pool memory grown page by page: cuMemAlloc",
    "GB/s",
    Reach::AtLeastTimes(0.98),
);
const BY_PAGES: Demand = Demand::time(
    "copy within 8 GiB of pool memory asked at once: page at a time by bare calls",
    "GB/s",
    Reach::Open,
);

/// Against memory of `cuMemAlloc`, and against a chunk for each page.
pub const WORK: Work = Work {
    name: "copy within 8 GiB",
    demands: &[AT_ONCE, GROWN, BY_PAGES],
    measure,
};

/// Copies in a sample.
const COPIES: u32 = 4;

/// The time of one copy of the second half of some memory over the first.
fn copy(machine: &Machine, address: u64, bytes: usize) -> Result<Duration> {
    let half = bytes / 2;
    let ((), elapsed) = time(|| {
        for _ in 0..COPIES {
            // SAFETY: all of the memory is mapped until the stream was synchronised, below.
            unsafe { machine.stream.copy(address, address + half as u64, half) }?;
        }
        machine.stream.synchronize()
    })?;
    Ok(elapsed / COPIES)
}

fn measure(machine: &Machine) -> Result<Outcome> {
    let wanted_bytes = match machine.is_real() {
        true => 8 << 30,
        // Every byte takes memory of the host.
        false => 64 << 20,
    };
    let page_bytes = machine.page_bytes;
    // There are four of them.
    let bytes = machine.fitting(wanted_bytes, 0.2, 2 * page_bytes)?;
    let plain = Plain::new(&machine.device, bytes)?;
    let at_once = machine.pool(machine::options(), bytes)?;
    at_once.allocate(0, bytes)?;
    let grown = machine.pool(machine::options(), bytes)?;
    for offset in (0..bytes).step_by(page_bytes) {
        grown.allocate(offset, page_bytes)?;
    }
    let mut pages = Range::reserve(&machine.device, bytes)?;
    pages.back(&vec![page_bytes; bytes / page_bytes])?;
    let mut sides = Sides::new();
    for (name, address) in [
        ("cuMemAlloc", plain.address()),
        ("ours, asked at once", at_once.base_address()),
        ("ours, grown page by page", grown.base_address()),
        ("page at a time by bare calls", pages.address()),
    ] {
        sides.add(name, move || copy(machine, address, bytes));
    }
    let mut outcome = Outcome::new(sides.measure(&machine.settings, machine.settings.rounds)?);
    let peer = "page at a time by bare calls";
    for (demand, ours, peer) in [
        (&AT_ONCE, "ours, asked at once", "cuMemAlloc"),
        (&GROWN, "ours, grown page by page", "cuMemAlloc"),
        (&BY_PAGES, "ours, asked at once", peer),
    ] {
        // A copy reads one half and writes the other.
        let rate = |side| anyhow::Ok(bytes as f64 / outcome.measured.samples(side)?.median_ns());
        let (ours, peer) = (rate(ours)?, rate(peer)?);
        let note = format!("{} bytes", bytes);
        outcome.add_noted(demand, ours, Some(peer), note);
    }
    Ok(outcome)
}
