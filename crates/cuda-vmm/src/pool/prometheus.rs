//! Snapshots as Prometheus reads them.
//!
//! The text format, version 0.0.4: <https://prometheus.io/docs/instrumenting/exposition_formats/>.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::{AccountSnapshot, Snapshot};
use crate::MemoryParts;
use crate::memory_parts::Level;
use core::fmt::Write;

/// The `Content-Type` of a response with the text.
pub const PROMETHEUS_CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Writes snapshots in Prometheus's text format, version 0.0.4. Each comes with a name, which its
/// samples carry as the label `pool`.
///
/// Names of the engine's numbers begin with `cuda_vmm_engine_`. Numbers with the label `model` are
/// those of an account, by its name. All sizes are in bytes. Memory of no open account is
/// `cuda_vmm_other_bytes`, by parts. For each part, the accounts and the others add up to the
/// engine. The format demands that samples of one name stand together. So give all pools of a
/// process to one call, under different names.
///
/// ```
/// # #[cfg(feature = "simulator")] {
/// use cuda_vmm::{Driver, Quota, SharedMemoryPool, pool};
///
/// let device = Driver::detect()?.device(0)?;
/// let shared = SharedMemoryPool::new(&device, 1 << 30)?;
/// shared.register_model("chat", Quota::new())?;
/// let text = pool::prometheus([("gpu0", &shared.snapshot())]);
/// assert!(text.contains("cuda_vmm_live_bytes{pool=\"gpu0\",model=\"chat\"} 0\n"));
/// # }
/// # Ok::<(), cuda_vmm::VmmError>(())
/// ```
pub fn prometheus<'a>(pools: impl IntoIterator<Item = (&'a str, &'a Snapshot)>) -> String {
    let pools = pools.into_iter();
    let pools: Vec<_> = pools.map(|(name, pool)| (Some(name), pool)).collect();
    text(&pools)
}

impl Snapshot {
    /// Writes the snapshot in Prometheus's text format, version 0.0.4; see [`prometheus()`], which
    /// takes several.
    pub fn prometheus(&self) -> String {
        text(&[(None, self)])
    }
}

/// Does what [`prometheus`] does; a pool may be without a name.
fn text(pools: &[(Option<&str>, &Snapshot)]) -> String {
    let mut families = Vec::new();
    engine_families(pools, &mut families);
    account_families(pools, &mut families);
    families.concat()
}

/// The kind of a number.
#[derive(Clone, Copy)]
enum Kind {
    Gauge,
    Counter,
}

/// A number with the labels that it has besides its pool's.
type Sample<'a> = (Vec<(&'static str, &'a str)>, u64);

/// All samples of one name, with the meaning of the name; nothing if there are none.
fn family<'a>(
    name: &str,
    kind: Kind,
    help: &str,
    pools: &[(Option<&'a str>, &'a Snapshot)],
    samples: impl Fn(&'a Snapshot) -> Vec<Sample<'a>>,
) -> String {
    let kind = match kind {
        Kind::Gauge => "gauge",
        Kind::Counter => "counter",
    };
    let mut text = String::new();
    for (pool, snapshot) in pools {
        for (labels, value) in samples(snapshot) {
            let named = pool.map(|pool| ("pool", pool));
            let labels: Vec<_> = named.into_iter().chain(labels).collect();
            text += &format!("cuda_vmm_{name}{} {value}\n", Labels(&labels));
        }
    }
    match text.is_empty() {
        true => text,
        false => {
            format!("# HELP cuda_vmm_{name} {help}\n# TYPE cuda_vmm_{name} {kind}\n{text}")
        }
    }
}

/// What is written between a name and its number.
struct Labels<'a>(&'a [(&'a str, &'a str)]);

impl core::fmt::Display for Labels<'_> {
    fn fmt(&self, formatter: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        for (index, (name, value)) in self.0.iter().enumerate() {
            formatter.write_char(if index == 0 { '{' } else { ',' })?;
            write!(formatter, "{name}=\"")?;
            for character in value.chars() {
                match character {
                    '\\' => formatter.write_str("\\\\")?,
                    '"' => formatter.write_str("\\\"")?,
                    '\n' => formatter.write_str("\\n")?,
                    other => formatter.write_char(other)?,
                }
            }
            formatter.write_char('"')?;
        }
        match self.0.is_empty() {
            true => Ok(()),
            false => formatter.write_char('}'),
        }
    }
}

const ASLEEP: &str = "Memory that was given up to sleep, and is taken again to wake.";
const HOST: &str = "Memory of host stores with contents of ranges.";

fn engine_families(pools: &[(Option<&str>, &Snapshot)], families: &mut Vec<String>) {
    use Kind::{Counter, Gauge};
    type Number = fn(&Snapshot) -> u64;
    let gauges: [(&str, &str, Number); 6] = [
        ("limit_bytes", "The budget.", |of| {
            of.engine.limit_bytes as u64
        }),
        (
            "committed_bytes",
            "What the device holds: the sum of the parts.",
            |of| of.engine.committed_bytes as u64,
        ),
        ("ranges", "Ranges of addresses.", |of| {
            of.engine.ranges as u64
        }),
        ("mappings", "Mappings.", |of| of.engine.chunks as u64),
        ("asleep_bytes", ASLEEP, |of| of.engine.asleep_bytes as u64),
        ("host_bytes", HOST, |of| of.engine.host_bytes as u64),
    ];
    let counters: [(&str, &str, Number); 13] = [
        ("allocations", "Calls that made bytes live.", |of| {
            of.counters.ranges.allocations
        }),
        ("deallocations", "Calls that freed bytes.", |of| {
            of.counters.ranges.deallocations
        }),
        (
            "refusals",
            "Allocations refused for want of memory.",
            |of| of.counters.ranges.refusals,
        ),
        (
            "late_prefetches",
            "Allocations that had to call the driver although memory is made ahead.",
            |of| of.counters.ranges.late_prefetches,
        ),
        (
            "waits",
            "Waits for the device or for another thread.",
            |of| of.counters.waits,
        ),
        (
            "device_shortages",
            "Times the device had no memory although the budget had room.",
            |of| of.counters.device_shortages,
        ),
        (
            "retries",
            "Pieces of memory that the driver was asked again to take back.",
            |of| of.counters.retries,
        ),
        ("scrubbed_bytes", "Bytes overwritten with zeros.", |of| {
            of.counters.scrubbed_bytes
        }),
        ("sleeps", "Ranges put to sleep.", |of| of.counters.sleeps),
        (
            "sleep_microseconds",
            "How long the calls took that put ranges to sleep.",
            |of| of.counters.sleep_micros,
        ),
        ("wakes", "Ranges woken.", |of| of.counters.wakes),
        (
            "wake_microseconds",
            "How long the calls took that woke ranges.",
            |of| of.counters.wake_micros,
        ),
        (
            "device_calls",
            "Calls of the driver that manage memory, on the device, in this process.",
            |of| of.counters.device_calls,
        ),
    ];
    let mut add = |name: &str, kind, help, value: &dyn Fn(&Snapshot) -> u64| {
        families.push(family(name, kind, help, pools, |of| {
            vec![(Vec::new(), value(of))]
        }));
    };
    for (name, help, value) in gauges {
        add(&format!("engine_{name}"), Gauge, help, &value);
    }
    for part in &MemoryParts::LIST {
        let value = |of: &Snapshot| (part.bytes)(&of.engine.parts) as u64;
        let name = format!("engine_{}_bytes", part.name);
        add(&name, Gauge, part.meaning, &value);
    }
    for (name, help, value) in counters {
        add(&format!("engine_{name}_total"), Counter, help, &value);
    }
    let help = "What is no open account's: the cache, and what accounts that are closed have left.";
    families.push(family("other_bytes", Gauge, help, pools, |of| {
        let parts = MemoryParts::LIST.iter();
        parts
            .map(|part| {
                let bytes = (part.bytes)(&of.others);
                (vec![("part", part.name)], bytes as u64)
            })
            .collect()
    }));
}

fn account_families(pools: &[(Option<&str>, &Snapshot)], families: &mut Vec<String>) {
    use Kind::{Counter, Gauge};
    type Number = fn(&AccountSnapshot) -> Option<u64>;
    let gauges: [(&str, &str, Number); 10] = [
        ("capacity_bytes", "Addresses.", |of| {
            Some(of.stats.capacity_bytes as u64)
        }),
        (
            "guarantee_bytes",
            "Memory that is always to be had.",
            |of| Some(of.quota.guarantee_bytes as u64),
        ),
        (
            "ceiling_bytes",
            "The most memory that may be held, where there is a limit.",
            |of| of.quota.ceiling_bytes.map(|bytes| bytes as u64),
        ),
        (
            "committed_bytes",
            "What the device holds: the sum of the parts.",
            |of| Some(of.stats.committed_bytes as u64),
        ),
        (
            "requested_bytes",
            "Bytes that were asked for and not given back.",
            |of| Some(of.stats.live_bytes as u64),
        ),
        ("owed_bytes", "What others ask it to give back.", |of| {
            Some(of.owed_bytes as u64)
        }),
        ("ranges", "Ranges of addresses.", |of| {
            Some(of.stats.ranges as u64)
        }),
        ("mappings", "Mappings.", |of| Some(of.stats.chunks as u64)),
        ("asleep_bytes", ASLEEP, |of| {
            Some(of.stats.asleep_bytes as u64)
        }),
        ("host_bytes", HOST, |of| Some(of.stats.host_bytes as u64)),
    ];
    let counters: [(&str, &str, Number); 4] = [
        ("allocations", "Calls that made bytes live.", |of| {
            Some(of.counters.allocations)
        }),
        ("deallocations", "Calls that freed bytes.", |of| {
            Some(of.counters.deallocations)
        }),
        (
            "refusals",
            "Allocations refused for want of memory.",
            |of| Some(of.counters.refusals),
        ),
        (
            "late_prefetches",
            "Allocations that had to call the driver although memory is made ahead.",
            |of| Some(of.counters.late_prefetches),
        ),
    ];
    let mut add = |name: &str, kind, help, value: &dyn Fn(&AccountSnapshot) -> Option<u64>| {
        families.push(family(name, kind, help, pools, |of| {
            let accounts = of.accounts.iter();
            let samples = accounts.map(|account| {
                let labels = vec![("model", &*account.name)];
                (labels, value(account))
            });
            samples
                .filter_map(|(labels, value)| Some((labels, value?)))
                .collect()
        }));
    };
    for (name, help, value) in gauges {
        add(name, Gauge, help, &value);
    }
    let parts = MemoryParts::LIST.iter();
    for part in parts.filter(|part| part.level < Level::Engine) {
        let value = |of: &AccountSnapshot| Some((part.bytes)(&of.stats.parts) as u64);
        add(&format!("{}_bytes", part.name), Gauge, part.meaning, &value);
    }
    for (name, help, value) in counters {
        add(&format!("{name}_total"), Counter, help, &value);
    }
}
