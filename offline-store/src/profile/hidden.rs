//! The columns of a dataset that readers do not see: what profiles need beside the features.

use std::sync::Arc;

use arrow::array::{ArrayRef, UInt8Array};
use arrow::datatypes::{DataType, Field};
use feature_defs::plan::{Assembled, ServicePlan, ViewAnswer};
use feature_defs::time::{Micros, STATIC, Status};

use super::blocks::{Answered, Blocks};
use super::flags::{flagged, flags};
use super::{BLOCK, FLAGS};

/// What is written behind the columns of a training set.
pub struct Hidden {
    blocks: Blocks,
    /// By output: whether it has a column of flags.
    flagged: Vec<bool>,
}

impl Hidden {
    pub fn of(service: &ServicePlan) -> Hidden {
        Hidden { blocks: Blocks::of(service), flagged: flagged(service) }
    }

    pub fn fields(&self, service: &ServicePlan) -> Vec<Field> {
        let field = |name: String| Field::new(name, DataType::UInt8, false);
        let blocks = self.blocks.names().map(|name| field(format!("{BLOCK}{name}")));
        let outputs = service.outputs.iter().zip(&self.flagged).filter(|(_, flagged)| **flagged);
        blocks.chain(outputs.map(|(output, _)| field(format!("{FLAGS}{}", output.name)))).collect()
    }

    /// The columns of [`Hidden::fields`].
    pub fn columns(
        &self,
        service: &ServicePlan,
        answers: &[ViewAnswer],
        assembled: &Assembled,
        requests: &[ArrayRef],
        at: &[Micros],
    ) -> Vec<ArrayRef> {
        let event_times: Vec<&[Option<Micros>]> = answers.iter().map(|answer| answer.event_times.as_slice()).collect();
        let answered = Answered { columns: requests, at, event_times: &event_times };
        let buckets = self.blocks.buckets(service, &answered, |_| true);
        let stale: Vec<Vec<bool>> = service
            .inputs
            .iter()
            .zip(answers)
            .map(|(input, answer)| input.view.freshness.map_or_else(Vec::new, |freshness| stale(answer, freshness, at)))
            .collect();
        let flags = flags(service, assembled, &stale);
        let flags = flags.into_iter().zip(&self.flagged).filter(|(_, flagged)| **flagged);
        let flags = flags.map(|(flags, _)| flags.unwrap_or_else(|| vec![0; at.len()]));
        let column = |bytes: Vec<u8>| Arc::new(UInt8Array::from(bytes)) as ArrayRef;
        buckets.into_iter().chain(flags).map(column).collect()
    }
}

/// Which rows of an as-of view are older than its freshness. Of windows the applied position is judged, and offline
/// everything is applied.
fn stale(answer: &ViewAnswer, freshness: Micros, at: &[Micros]) -> Vec<bool> {
    let rows = answer.event_times.iter().zip(&answer.statuses).zip(at);
    rows.map(|((event_time, status), at)| {
        *status == Status::Present
            && event_time.is_some_and(|time| time != STATIC && at.saturating_sub(time) > freshness)
    })
    .collect()
}
