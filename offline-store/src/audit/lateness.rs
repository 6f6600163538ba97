//! Why what had been applied is not what is known by now: which source was late, by how much, and where the time went.

use std::collections::BTreeMap;
use std::sync::Arc;

use feature_defs::as_of::{Times, Visibility};
use feature_defs::plan::{ServicePlan, Slot, ViewPlanKind};
use feature_defs::time::{Micros, Position};
use serde::Serialize;

use super::events::Events;
use super::variant::Look;
use crate::explain::{Length, Needed};
use crate::point_in_time::Used;
use crate::point_in_time::by_row::Applied;
use crate::point_in_time::index::NO_GROUP;

/// What was late in one source, of a sample of the late values.
#[derive(Debug, Clone, Serialize)]
pub struct LateSource {
    pub source: String,
    /// Views of it that answered otherwise.
    pub views: Vec<String>,
    /// Values whose missing events had not arrived when the request was answered, and the longest that one of them took
    /// from when it was known.
    pub arrived_after: u64,
    pub arrived_after_max: Option<Length>,
    /// Values whose missing events could have been seen, but had not been applied to the online store, and the longest
    /// that one of them had waited.
    pub not_applied: u64,
    pub not_applied_max: Option<Length>,
}

/// A row with late values.
pub struct Late {
    pub changed: Vec<usize>,
    pub at: Micros,
    /// When it was answered.
    pub time: Micros,
    pub applied: Vec<Applied>,
}

#[derive(Default)]
struct Found {
    views: Vec<String>,
    arrived_after: u64,
    arrived_after_max: Option<Micros>,
    not_applied: u64,
    not_applied_max: Option<Micros>,
}

/// The reasons, by source. Rows are in the order in which `events` were read.
pub fn reasons(service: &ServicePlan, events: &Events, rows: &[Late]) -> Vec<LateSource> {
    let used = Used::by(service);
    let mut found: BTreeMap<Arc<str>, Found> = BTreeMap::new();
    for (number, row) in rows.iter().enumerate() {
        for output in &row.changed {
            let slots = Needed::of(service, service.outputs[*output].slot).slots;
            let mut inputs: Vec<usize> = slots
                .iter()
                .filter_map(|slot| match slot {
                    Slot::Feature { input, .. } | Slot::EventTime { input } => Some(*input),
                    _ => None,
                })
                .collect();
            inputs.sort_unstable();
            inputs.dedup();
            for input in inputs {
                let plan = &service.inputs[input];
                let group = events.groups[input][number];
                if group == NO_GROUP {
                    continue;
                }
                let of_input = &events.inputs[input];
                let look = Look {
                    view: &plan.view,
                    rows: &of_input.rows[group as usize],
                    windows: &of_input.windows[group as usize],
                    needed: &used[input].features,
                    rule: plan.view.source.visibility,
                    applied: row.applied[input],
                    at: row.at,
                    bound: None,
                    without: None,
                    twice: None,
                };
                let whole = Look { applied: Applied::UpTo(Position::END), ..look };
                if look.part() == whole.part() {
                    continue;
                }
                let Some(times) = newest_hidden(&look) else { continue };
                let is_stream = plan.view.source.is_stream();
                let found = found.entry(plan.view.source.name.clone()).or_default();
                if !found.views.contains(&plan.alias) {
                    found.views.push(plan.alias.clone());
                }
                // Rows of files come when they are known; only a stream's can arrive later than that.
                let answered = if is_stream { row.time } else { row.at };
                let visible = times.position.time;
                if is_stream && visible > answered {
                    found.arrived_after += 1;
                    let took = visible.saturating_sub(times.known_time);
                    found.arrived_after_max = found.arrived_after_max.max(Some(took));
                } else {
                    found.not_applied += 1;
                    let waited = answered.saturating_sub(visible);
                    found.not_applied_max = found.not_applied_max.max(Some(waited));
                }
            }
        }
    }
    let named = found.into_iter().map(|(source, found)| LateSource {
        source: source.to_string(),
        views: found.views,
        arrived_after: found.arrived_after,
        arrived_after_max: found.arrived_after_max.map(Length),
        not_applied: found.not_applied,
        not_applied_max: found.not_applied_max.map(Length),
    });
    named.collect()
}

/// The last event to become visible among those that count by event time and had not been applied.
fn newest_hidden(look: &Look<'_>) -> Option<Times> {
    let all = Visibility::AsKnown(Position::END, look.rule);
    let hidden = |times: &Times| {
        let had = match look.applied {
            Applied::UpTo(position) => Visibility::AsKnown(position, look.rule).admits(times, look.at),
            Applied::Nothing | Applied::NotAnswered => false,
        };
        all.admits(times, look.at) && !had
    };
    match &look.view.kind {
        ViewPlanKind::AsOf { .. } => {
            let end = look.rows.partition_point(|row| row.times.event_time <= look.at);
            look.rows[..end].iter().map(|row| row.times).rev().find(hidden)
        }
        ViewPlanKind::Windowed { windows, .. } => {
            let inside = |times: &Times| windows.iter().any(|window| window.contains(times.event_time, look.at));
            let times = look.windows.iter().map(|event| event.times);
            times.filter(|times| inside(times) && hidden(times)).max_by_key(|times| times.position)
        }
    }
}
