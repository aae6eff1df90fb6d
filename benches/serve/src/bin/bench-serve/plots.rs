//! Plots as SVG.

use crate::arrivals::PhaseName;
use crate::policy::Policy;
use crate::record::Ran;
use crate::summary::Section;
use crate::workload::Workload;
use anyhow::{Context, Result};
use cuda_vmm_benches::plot::{self, STROKES};
use cuda_vmm_benches::serving::Moment;
use std::path::Path;

/// Draws the curves of workload (a), and memory over time of each section, into a folder.
pub fn draw(folder: &Path, ran: &[Ran]) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    let file = |name: &str| folder.join(format!("{name}.svg"));
    let sections = Section::all(ran);
    let peaks = sections.iter();
    let peaks = peaks.filter(|it| it.workload == Workload::Ramps && it.peak.is_some());
    let peaks: Vec<_> = peaks.collect();
    if !peaks.is_empty() {
        draw_curves(ran, &peaks, &file("ramps")).context("cannot draw the curves")?;
    }
    for section in &sections {
        // All phases of a run are in one plot.
        if matches!(section.phase, PhaseName::Measured | PhaseName::Fill) {
            let name = name(section);
            draw_memory(ran, section, &file(&name))
                .with_context(|| format!("cannot draw {name}"))?;
        }
    }
    Ok(())
}

fn name(section: &Section) -> String {
    let name = match section.workload {
        Workload::Ramps => "ramps",
        Workload::Traces => "traces",
        Workload::Idle => "idle",
        Workload::HandOver => "hand-over",
        Workload::Closed => "closed",
    };
    let peak = section.peak.map(|peak| format!("-{peak}"));
    format!("{name}{}", peak.unwrap_or_default())
}

/// p99 time to first token by peak.
fn draw_curves(ran: &[Ran], sections: &[&Section], path: &Path) -> Result<()> {
    let lines = Policy::ALL.map(|policy| {
        let points = sections.iter().filter_map(|section| {
            let ms = section.summary(ran, policy)?.p99_ms();
            section.peak.map(|peak| (f64::from(peak), ms))
        });
        let points: Vec<_> = points.collect();
        (policy.name(), STROKES[policy as usize], points)
    });
    let points = || lines.iter().flat_map(|(_, _, points)| points);
    let ms = || points().map(|(_, ms)| *ms).filter(|ms| ms.is_finite());
    let least = ms().min_by(f64::total_cmp).unwrap_or(1.0);
    let most = ms().max_by(f64::total_cmp).unwrap_or(1.0);
    let peak = |section: &&Section| section.peak.map_or(0.0, f64::from);
    let ends = sections.first().map(peak).zip(sections.last().map(peak));
    let (first, last) = ends.context("no peaks")?;
    let title = "Models on one device: p99 time to first token";
    let ranges = (first..last.max(first + 1.0), least / 2.0..most * 2.0);
    plot::draw_peaks(title, ranges, &lines, &[], path)
}

/// What the device held for each model over time, in the first seed's run.
fn draw_memory(ran: &[Ran], section: &Section, path: &Path) -> Result<()> {
    let moments = |policy| {
        let run = *section.runs(ran, policy).first()?;
        let moments = run.memory.iter().map(|looked| Moment {
            at_ns: looked.at_us * 1000,
            held_bytes: looked.committed_bytes.clone(),
        });
        Some((policy.name(), moments.collect::<Vec<_>>()))
    };
    let all: Vec<_> = Policy::ALL.into_iter().filter_map(moments).collect();
    let pools: Vec<_> = all
        .iter()
        .map(|(name, moments)| (*name, moments.as_slice()))
        .collect();
    let of = match section.phase {
        PhaseName::Fill => section.workload.name().to_owned(),
        _ => section.title(),
    };
    let title = format!("{of}: memory held by each model, the first at the bottom");
    plot::draw_memory(&title, "seconds", &pools, path)
}
