//! The exact text that Prometheus reads.

use super::{NAME, pool};
use crate::common::{ModelOptions, PAGE, Simulated, manual};
use cuda_vmm::Snapshot;

/// Two models of a small pool: one with live bytes and a ceiling, one without anything.
fn snapshot() -> Snapshot {
    let simulated = Simulated::default();
    let pool = pool(&simulated.device, manual().limit_bytes(8 * PAGE));
    let mut options = ModelOptions::new(16 * PAGE);
    options.guarantee_bytes = PAGE;
    options.ceiling_bytes = Some(4 * PAGE);
    pool.register_model_with("chat", options)
        .expect("a new name");
    pool.register_model("code", 8 * PAGE).expect("a new name");
    pool.allocate_for_model_at("chat", 0, PAGE + 1)
        .expect("room");
    pool.deallocate_for_model("chat", PAGE, 1).expect("live");
    // So that any thread that looks finds the page parked.
    simulated.device.synchronize().expect("nothing runs");
    assert_eq!(pool.relieve(0), 0);
    pool.allocate_for_model_at("code", 0, 9 * PAGE)
        .expect_err("beyond its addresses");
    pool.allocate_for_model_at("chat", 0, 8 * PAGE)
        .expect_err("live already");
    pool.allocate_for_model_at("chat", PAGE, 8 * PAGE)
        .expect_err("beyond the ceiling");
    pool.snapshot()
}

#[test]
fn a_small_pool_is_written_so() {
    let text = snapshot().prometheus();
    assert_eq!(text, include_str!("small_pool.txt"), "{text}");
}

/// Each sample's name and labels, without its number.
fn names(text: &str) -> Vec<&str> {
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    samples
        .map(|line| line.rsplit_once(' ').expect("a number").0)
        .collect()
}

#[test]
fn several_pools_stand_together_under_each_name() {
    let one = snapshot();
    let text = cuda_vmm::pool::prometheus([("gpu0", &one), ("gpu1", &one)]);
    let names = names(&text);
    assert!(names.contains(&"cuda_vmm_engine_live_bytes{pool=\"gpu1\"}"));
    assert!(names.contains(&"cuda_vmm_live_bytes{pool=\"gpu0\",model=\"chat\"}"));
    let families: Vec<_> = (text.lines())
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next())
        .collect();
    // A type comes before the samples of its name, which follow at once and nowhere else.
    let mut samples = text.lines().peekable();
    for family in &families {
        let head = [samples.next(), samples.next()].map(|line| line.expect("a line"));
        assert!(
            head[0].starts_with(&format!("# HELP {family} ")),
            "{head:?}"
        );
        assert!(
            head[1].starts_with(&format!("# TYPE {family} ")),
            "{head:?}"
        );
        let mut count = 0;
        while let Some(line) = samples.next_if(|line| !line.starts_with('#')) {
            assert!(line.starts_with(&format!("{family}{{")), "{line}");
            count += 1;
        }
        assert!(count >= 2 && count % 2 == 0, "{family}: {count}");
    }
    assert_eq!(samples.next(), None);
    let mut once = names.clone();
    once.sort_unstable();
    once.dedup();
    assert_eq!(once.len(), names.len());
    assert_eq!(cuda_vmm::pool::prometheus([]), "");
}

#[test]
fn names_are_escaped() {
    let simulated = Simulated::default();
    let pool = pool(&simulated.device, manual());
    pool.register_model(NAME, PAGE).expect("a new name");
    let text = pool.snapshot().prometheus();
    let escaped = "cuda_vmm_live_bytes{model=\"a \\\"b\\\"\\\\c\\nd\"} 0";
    assert!(text.lines().any(|line| line == escaped), "{text}");
}

#[test]
fn an_engine_alone_has_no_models() {
    let simulated = Simulated::default();
    let pool = pool(&simulated.device, manual());
    let text = pool.engine().snapshot().prometheus();
    assert!(text.contains("\ncuda_vmm_engine_live_bytes 0\n"), "{text}");
    assert!(!text.contains("model="), "{text}");
}
