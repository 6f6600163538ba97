//! What became of a value on its way, beside the value.

use arrow::array::Array;
use drift::counts::Flag;
use feature_defs::plan::{Assembled, ServicePlan, Slot};
use feature_defs::time::Status;
use feature_defs::value::Value;

/// Which outputs can have flags in a training set, where every view answers: those with a default, and those of views
/// with a freshness.
pub fn flagged(service: &ServicePlan) -> Vec<bool> {
    let output = |slot: Slot| {
        let mut inputs = Vec::new();
        inputs_of(service, slot, &mut inputs);
        default_of(service, slot).is_some()
            || inputs.iter().any(|input| service.inputs[*input].view.freshness.is_some())
    };
    service.outputs.iter().map(|output_plan| output(output_plan.slot)).collect()
}

/// Bits of [`Flag`] for each row of each output; None where all values are plain. `stale` says, by input, which rows are
/// older than the view's freshness; empty where none is.
pub fn flags(service: &ServicePlan, assembled: &Assembled, stale: &[Vec<bool>]) -> Vec<Option<Vec<u8>>> {
    let outputs = service.outputs.iter().enumerate().map(|(index, output)| {
        let (column, statuses) = (&assembled.columns[index], &assembled.statuses[index]);
        let mut inputs = Vec::new();
        inputs_of(service, output.slot, &mut inputs);
        let stale: Vec<&Vec<bool>> = inputs.iter().filter_map(|input| stale.get(*input)).collect();
        let is_stale = |row: usize| stale.iter().any(|stale| stale.get(row).is_some_and(|stale| *stale));
        let default = default_of(service, output.slot);
        let any_stale = stale.iter().any(|stale| stale.contains(&true));
        if !any_stale && statuses.iter().all(|status| *status == Status::Present) {
            return None;
        }
        // A transform may have computed something of inputs that were not there: then it is no default.
        let is_computed = matches!(output.slot, Slot::Transform(_));
        let flags = statuses.iter().enumerate().map(|(row, status)| {
            let mut flags = 0;
            if is_stale(row) {
                flags |= Flag::STALE;
            }
            match (status, default) {
                (Status::Present, _) => {}
                (Status::Unavailable, _) => flags |= Flag::FALLBACK,
                (_, Some(default))
                    if column.is_valid(row)
                        && (!is_computed || Value::from_array(column, row, &output.feature_type) == *default) =>
                {
                    flags |= Flag::DEFAULTED;
                }
                _ => {}
            }
            flags
        });
        let flags: Vec<u8> = flags.collect();
        flags.iter().any(|flags| *flags != 0).then_some(flags)
    });
    outputs.collect()
}

fn default_of(service: &ServicePlan, slot: Slot) -> Option<&Value> {
    let default = match slot {
        Slot::Feature { input, feature } => service.inputs[input].view.feature(feature).1,
        Slot::Transform(index) => service.transforms[index].default.as_ref(),
        Slot::EventTime { .. } | Slot::At | Slot::Request(_) => None,
    };
    default.filter(|default| !default.is_null())
}

/// The views that a slot is made of, directly or through transforms, each once.
fn inputs_of(service: &ServicePlan, slot: Slot, inputs: &mut Vec<usize>) {
    match slot {
        Slot::Feature { input, .. } | Slot::EventTime { input } => {
            if !inputs.contains(&input) {
                inputs.push(input);
            }
        }
        Slot::Transform(index) => {
            service.transforms[index].reads.iter().for_each(|slot| inputs_of(service, *slot, inputs));
        }
        Slot::At | Slot::Request(_) => {}
    }
}
