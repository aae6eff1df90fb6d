//! What the crate tells `tracing`, kept by a subscriber of the tests' own.

use std::fmt::Debug;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::NoSubscriber;
use tracing::{Dispatch, Event, Level, Metadata, Subscriber};

/// What was told: the level, and the message with its fields.
#[derive(Debug, Clone, Default)]
pub struct Told(pub Arc<Mutex<Vec<(Level, String)>>>);

/// Keeps the events, and the names of the spans, of the crate.
#[derive(Default)]
pub struct Keeper {
    pub told: Told,
    spans: AtomicU64,
}

struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0 += &match field.name() {
            "message" => format!("{value:?};"),
            name => format!(" {name}={value:?}"),
        };
    }
}

impl Subscriber for Keeper {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // The driver's calls are told one by one, and are not what the pools say.
        let target = metadata.target();
        target.starts_with("cuda_vmm") && target != "cuda_vmm::driver"
    }

    fn new_span(&self, attributes: &Attributes<'_>) -> Id {
        let mut text = Text(format!("span {};", attributes.metadata().name()));
        attributes.record(&mut text);
        let level = *attributes.metadata().level();
        self.told.0.lock().expect("no panic").push((level, text.0));
        Id::from_u64(self.spans.fetch_add(1, Ordering::Relaxed) + 1)
    }

    fn event(&self, event: &Event<'_>) {
        let mut text = Text(String::new());
        event.record(&mut text);
        let level = *event.metadata().level();
        self.told.0.lock().expect("no panic").push((level, text.0));
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

/// A second subscriber, which wants nothing, to be kept while another is of use. With one alone,
/// `tracing` asks the subscriber of the thread that comes first to an event whether any is wanted:
/// that of no test, if another test comes first, and then none is told of it.
#[must_use]
pub fn second_subscriber() -> Dispatch {
    Dispatch::new(NoSubscriber::default())
}

/// What this thread is told meanwhile.
pub fn told(act: impl FnOnce()) -> Vec<(Level, String)> {
    let _second = second_subscriber();
    let keeper = Keeper::default();
    let told = keeper.told.clone();
    tracing::subscriber::with_default(keeper, act);
    let told = told.0.lock().expect("no panic");
    told.clone()
}
