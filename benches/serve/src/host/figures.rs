//! The figures of the models, from the pool's snapshot and from what their threads publish.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use crate::engine::HeldBytes;
use crate::figures::{Figures, ModelFigures};
use crate::scheduler::Counts;
use candle_cuda_vmm::cuda_vmm::{AccountStats, Snapshot};
use std::fmt::{self, Display, Formatter, Write};
use std::time::{Duration, Instant};

/// What a model's thread publishes after each step.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Work {
    pub(super) counts: Counts,
    pub(super) held: HeldBytes,
    pub(super) rest: Rest,
}

/// What a thread publishes of its sleep.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Rest {
    pub(super) is_asleep: bool,
    /// Since when the model is awake and has nothing to do.
    pub(super) idle_since: Option<Instant>,
    pub(super) sleeps: u64,
    pub(super) wakes: u64,
    /// Of all calls that put it to sleep.
    pub(super) sleep_time: Duration,
    /// Of all wakes, from the first request on.
    pub(super) wake_time: Duration,
}

/// Puts together the figures of models, each with its name and what its thread has published.
pub(super) fn figures<'a>(
    snapshot: &Snapshot,
    models: impl IntoIterator<Item = (&'a str, Work)>,
) -> Figures {
    let engine = &snapshot.engine;
    let models = models.into_iter().map(|(id, work)| {
        let Work { counts, held, rest } = work;
        let account = snapshot.accounts.iter().find(|it| it.name == id);
        let memory = account.map_or_else(ModelFigures::default, |it| memory(&it.stats, held));
        ModelFigures {
            id: id.to_owned(),
            running: counts.running,
            waiting: counts.waiting,
            generated_tokens: counts.generated_tokens,
            is_asleep: rest.is_asleep,
            ..memory
        }
    });
    let models: Vec<_> = models.collect();
    let owned_bytes: usize = models.iter().map(ModelFigures::committed_bytes).sum();
    Figures {
        limit_bytes: engine.limit_bytes,
        unowned_bytes: engine.committed_bytes.saturating_sub(owned_bytes),
        free_bytes: engine.limit_bytes.saturating_sub(engine.committed_bytes),
        models,
    }
}

/// Divides the memory of an account.
fn memory(stats: &AccountStats, held: HeldBytes) -> ModelFigures {
    let pages = stats.parts.live_page_bytes;
    // Every block with memory counts, whether or not something uses it. What is held can be newer
    // or older than the statistics, so it can be more.
    let backed = stats.live_bytes;
    let sequences = held.sequence_bytes.min(backed);
    let prefixes = held.prefix_bytes.min(backed - sequences);
    let part = |bytes: usize| match backed {
        0 => 0,
        // In 128 bits, in which the product of two sizes fits.
        _ => (pages as u128 * bytes as u128 / backed as u128) as usize,
    };
    let (live_bytes, prefix_bytes) = (part(sequences), part(prefixes));
    let ahead_bytes = stats.parts.ahead_bytes;
    let told_bytes = live_bytes + prefix_bytes + ahead_bytes;
    ModelFigures {
        live_bytes,
        prefix_bytes,
        ahead_bytes,
        other_bytes: stats.parts.total_bytes().saturating_sub(told_bytes),
        ..ModelFigures::default()
    }
}

/// A name with its meaning, and the number that it stands for.
type Gauge<T> = (&'static str, &'static str, fn(&T) -> usize);

/// Writes the memory in Prometheus's text format.
pub(super) fn write_metrics(figures: &Figures, text: &mut String) {
    let of_all: [Gauge<Figures>; 2] = [
        ("unowned_bytes", "Committed, and of no model.", |it| {
            it.unowned_bytes
        }),
        ("free_bytes", "What is not committed.", |it| it.free_bytes),
    ];
    let of_models: [Gauge<ModelFigures>; 4] = [
        ("live_bytes", "Pages that sequences use.", |it| {
            it.live_bytes
        }),
        (
            "cached_prefix_bytes",
            "Pages that only the prefix cache holds.",
            |it| it.prefix_bytes,
        ),
        ("ahead_bytes", "Made before it is needed.", |it| {
            it.ahead_bytes
        }),
        ("other_bytes", "What else is committed.", |it| {
            it.other_bytes
        }),
    ];
    // Writing to a string cannot fail.
    for (name, help, bytes) in of_all {
        _ = writeln!(text, "# HELP cuda_vmm_serve_{name} {help}");
        _ = writeln!(text, "# TYPE cuda_vmm_serve_{name} gauge");
        _ = writeln!(text, "cuda_vmm_serve_{name} {}", bytes(figures));
    }
    for (name, help, bytes) in of_models {
        _ = writeln!(text, "# HELP cuda_vmm_serve_{name} {help}");
        _ = writeln!(text, "# TYPE cuda_vmm_serve_{name} gauge");
        for model in &figures.models {
            let (id, bytes) = (Label(&model.id), bytes(model));
            _ = writeln!(text, "cuda_vmm_serve_{name}{{model=\"{id}\"}} {bytes}");
        }
    }
}

/// The value of a label, as it stands between the quotes.
pub(super) struct Label<'a>(pub(super) &'a str);

impl Display for Label<'_> {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|character| match character {
            '\\' => formatter.write_str("\\\\"),
            '"' => formatter.write_str("\\\""),
            '\n' => formatter.write_str("\\n"),
            other => formatter.write_char(other),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_cuda_vmm::cuda_vmm::AccountSnapshot;

    const PAGE: usize = 2 << 20;

    /// A model with seven pages of blocks, two that were made ahead and one that is parked.
    fn snapshot(backed_bytes: usize) -> Snapshot {
        let mut account = AccountSnapshot::default();
        account.name = "one".to_owned();
        account.stats.live_bytes = backed_bytes;
        account.stats.parts.live_page_bytes = 7 * PAGE;
        account.stats.parts.ahead_bytes = 2 * PAGE;
        account.stats.parts.parked_bytes = PAGE;
        let mut snapshot = Snapshot::default();
        snapshot.engine.limit_bytes = 20 * PAGE;
        // Three pages of the engine's cache.
        snapshot.engine.committed_bytes = 13 * PAGE;
        snapshot.accounts.push(account);
        snapshot
    }

    fn of(snapshot: &Snapshot, sequence_bytes: usize, prefix_bytes: usize) -> Figures {
        let held = HeldBytes {
            sequence_bytes,
            prefix_bytes,
        };
        let work = Work {
            held,
            ..Work::default()
        };
        let figures = figures(snapshot, [("one", work)]);
        let parts: usize = figures.models.iter().map(|it| it.committed_bytes()).sum();
        assert_eq!(
            parts + figures.unowned_bytes + figures.free_bytes,
            figures.limit_bytes
        );
        figures
    }

    #[test]
    fn pages_are_divided_by_the_blocks_that_keep_them() {
        // 14 blocks have memory, in 7 pages; sequences use 6, the cache 4, and nothing uses 4.
        let block = 1000;
        let figures = of(&snapshot(14 * block), 6 * block, 4 * block);
        let model = &figures.models[0];
        assert_eq!((model.live_bytes, model.prefix_bytes), (3 * PAGE, 2 * PAGE));
        assert_eq!((model.ahead_bytes, model.other_bytes), (2 * PAGE, 3 * PAGE));
        assert_eq!(
            (figures.unowned_bytes, figures.free_bytes),
            (3 * PAGE, 7 * PAGE)
        );
    }

    #[test]
    fn the_sum_is_the_limit_if_the_numbers_are_of_different_moments() {
        // Fewer blocks have memory than are held, or none has.
        let figures = of(&snapshot(1000), 900, 900);
        assert_eq!(figures.models[0].other_bytes, PAGE + 1);
        let figures = of(&snapshot(0), 900, 900);
        assert_eq!(figures.models[0].other_bytes, 8 * PAGE);
        // Sizes whose product is more than a size can be.
        let figures = of(&snapshot(usize::MAX), usize::MAX, 0);
        assert_eq!(figures.models[0].live_bytes, 7 * PAGE);
    }

    #[test]
    fn a_model_without_account_and_a_lowered_limit_are_no_failure() {
        let mut snapshot = snapshot(1000);
        snapshot.engine.limit_bytes = PAGE;
        let figures = figures(&snapshot, [("two", Work::default())]);
        assert_eq!(figures.models[0].committed_bytes(), 0);
        assert_eq!((figures.unowned_bytes, figures.free_bytes), (13 * PAGE, 0));
    }

    #[test]
    fn every_number_is_written_and_names_are_escaped() {
        let model = |id: &str, first| ModelFigures {
            id: id.to_owned(),
            live_bytes: first,
            prefix_bytes: first + 1,
            ahead_bytes: first + 2,
            other_bytes: first + 3,
            ..ModelFigures::default()
        };
        let figures = Figures {
            limit_bytes: 1000,
            unowned_bytes: 7,
            free_bytes: 8,
            models: vec![model("one", 10), model("a\"b\\c\nd", 20)],
        };
        let mut text = String::new();
        write_metrics(&figures, &mut text);
        let samples: Vec<_> = text.lines().filter(|line| !line.starts_with('#')).collect();
        let strange = r#"a\"b\\c\nd"#;
        let mut expected = vec![
            "cuda_vmm_serve_unowned_bytes 7".to_owned(),
            "cuda_vmm_serve_free_bytes 8".to_owned(),
        ];
        for (at, name) in ["live", "cached_prefix", "ahead", "other"]
            .iter()
            .enumerate()
        {
            for (id, first) in [("one", 10), (strange, 20)] {
                let bytes = first + at;
                expected.push(format!(
                    "cuda_vmm_serve_{name}_bytes{{model=\"{id}\"}} {bytes}"
                ));
            }
        }
        assert_eq!(samples, expected);
        assert_eq!(text.matches("# TYPE").count(), 6);
    }
}
