//! The consistency audit: what was served, against the same requests replayed offline.
//!
//! Every row of the serving log is answered twice by the engine, from history. *As known*: from exactly the events that had
//! been applied when the row was answered, which the log names by their positions. What was served must be that, to the last
//! bit, whatever the clocks said; anything else is a BUG. And *by event time*, as training sets are made: where that differs
//! from as known, events came late, and the model was served something that it is not trained on. That is LATENESS, and no
//! bug of the code.
//!
//! Rows pass through in chunks, so the memory that an audit takes does not depend on how long it looks back. Kept beside the
//! counts are a few of the worst rows and a sample of the wrong and the late ones, for which reasons are looked for at the
//! end: which source was late, and which of a fixed set of faults reproduces the wrong bits ([`cause`]).

pub mod cause;
pub mod compare;
mod events;
mod lateness;
pub mod logged;
pub mod rank;
pub mod report;
mod rescore;
mod run;
mod scale;
pub mod skew;
mod tally;
mod tensors;
mod variant;

use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch};
use arrow::compute::concat_batches;
use feature_defs::plan::{AssembleError, ModelPlan, Plan, RowsError, ServicePlan};
use feature_defs::time::{Micros, Status};
use feature_defs::value::Value;
use futures::TryStreamExt;

use crate::engine::{Engine, EngineError, TrainingSetRequest};
use crate::explain::{ExplainError, ExplainRequest, Moment, to_json};
use crate::history::{History, HistoryError};
use crate::point_in_time::Order;
use crate::serving_log::{ServingLogError, columns as names};

use cause::{Wrong, causes};
use compare::{Column, Verdict, badness, judge, statuses};
use events::Events;
use lateness::{Late, reasons};
use logged::{Held, Logged};
use report::{Example, FeatureReport, Losses, Outcome, Report, Rescored, Rows, TensorReport};
use rescore::Versions;
use tally::{Counting, upper_bound};

pub use rescore::Rescore;
pub use run::{AuditRequest, Progress, audit};
pub use tally::{CONFIDENCE, Counts, NotAudited};

/// Rows that are replayed at a time.
pub const CHUNK_ROWS: usize = 20_000;
/// A chunk is halved where the engine has no memory for it, down to this.
const CHUNK_ROWS_MIN: usize = 500;
/// Wrong rows of a feature for which causes are looked for, and wrong rows in all.
const WRONG_OF_FEATURE: usize = 50;
const WRONG_MAX: usize = 400;
/// The same of late ones.
const LATE_OF_FEATURE: usize = 20;
const LATE_MAX: usize = 400;
/// Examples of each feature; of all those the worst are explained, each of which reads the sources once more.
const EXAMPLES: usize = 3;
const EXPLAINED_MAX: usize = 8;
/// Rows with wrong values that are named.
const WRONG_ROWS: usize = 1_000;
/// Source rows shown of each kind.
const EXPLAINED_ROWS: usize = 3;

#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    #[error(
        "the serving log's column `{column}` is missing or of another type than the definitions say; its rows cannot be replayed"
    )]
    Damaged { column: String },
    #[error("the history of source `{source_name}` could not be read: {what}")]
    History { source_name: String, what: String },
    #[error(transparent)]
    Log(#[from] ServingLogError),
    #[error(transparent)]
    Store(#[from] HistoryError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Explain(#[from] ExplainError),
    #[error(transparent)]
    Rows(#[from] RowsError),
    #[error(transparent)]
    Assemble(#[from] AssembleError),
    #[error("rows of the serving log could not be handled")]
    Arrow(#[from] arrow::error::ArrowError),
}

#[derive(Debug, Clone)]
pub struct AuditOptions {
    pub from: Micros,
    pub to: Micros,
    /// The share of wrong values above which an audit fails.
    pub max_bug_rate: f64,
    pub chunk_rows: usize,
    /// Examples are explained with rows of the sources.
    pub explain: bool,
    /// Rows with wrong values that the report names.
    pub wrong_rows_max: usize,
}

impl AuditOptions {
    pub fn new(from: Micros, to: Micros) -> AuditOptions {
        AuditOptions { from, to, max_bug_rate: 0.0, chunk_rows: CHUNK_ROWS, explain: true, wrong_rows_max: WRONG_ROWS }
    }
}

/// One feature while it is counted.
#[derive(Default)]
struct Tally {
    counts: Counts,
    bugs: Counting,
    wrong: usize,
    late: usize,
    examples: Vec<(f64, usize, Example, Logged)>,
}

/// A row that reasons are looked for in.
struct Sampled {
    row: Logged,
    changed: Vec<usize>,
}

/// An audit while rows pass through it.
pub struct Auditor<'e> {
    engine: &'e Engine,
    plan: Arc<Plan>,
    service: Arc<ServicePlan>,
    options: AuditOptions,
    held: Held,
    rows: Rows,
    tallies: Vec<Tally>,
    bugs: Counting,
    wrong: Vec<Sampled>,
    wrong_rows: Vec<(String, u32)>,
    late: Vec<Sampled>,
    tensors: TensorReport,
    versions: Versions,
    pub losses: Option<Losses>,
    pub rescored: Option<Rescored>,
    pub notes: Vec<String>,
}

impl<'e> Auditor<'e> {
    pub async fn new(
        engine: &'e Engine,
        plan: &Arc<Plan>,
        service: &Arc<ServicePlan>,
        options: AuditOptions,
    ) -> Result<Auditor<'e>, AuditError> {
        let mut held = Held::new();
        for input in &service.inputs {
            let source = &input.view.source;
            if source.is_stream() && !held.contains_key(&source.name) {
                let history = History::open(engine.store().clone(), engine.project_path(), &source.name).await?;
                held.insert(source.name.clone(), history.manifest().applied);
            }
        }
        Ok(Auditor {
            engine,
            plan: plan.clone(),
            service: service.clone(),
            options,
            held,
            rows: Rows::default(),
            tallies: service.outputs.iter().map(|_| Tally::default()).collect(),
            bugs: Counting::default(),
            wrong: Vec::new(),
            wrong_rows: Vec::new(),
            late: Vec::new(),
            tensors: TensorReport::default(),
            versions: Versions::new(),
            losses: None,
            rescored: None,
            notes: Vec::new(),
        })
    }

    /// Rows that were not chosen.
    pub fn pass_over(&mut self, rows: u64) {
        self.rows.logged += rows;
        self.rows.passed_over += rows;
    }

    /// Rows that cannot be replayed, and why.
    pub fn leave_out(&mut self, why: NotAudited, rows: u64) {
        if rows > 0 {
            self.rows.logged += rows;
            *self.rows.not_audited.entry(why).or_default() += rows;
            self.tallies.iter_mut().for_each(|tally| tally.counts.leave_out(why, rows));
        }
    }

    /// Audits rows that the service's own definitions served. What is damaged is counted, and no reason to stop.
    pub async fn add(&mut self, logged: &Logged, model: Option<&str>) -> Result<(), AuditError> {
        let model = model.and_then(|name| self.plan.model(name)).cloned();
        let model = model.filter(|model| model.service.semantic_digest == self.service.semantic_digest);
        let mut start = 0;
        let mut chunk = self.options.chunk_rows.max(1);
        while start < logged.rows() {
            let rows = chunk.min(logged.rows() - start);
            match self.chunk(&logged.slice(start, rows), model.as_deref()).await {
                Ok(()) => start += rows,
                Err(AuditError::Engine(EngineError::Memory { .. })) if rows > CHUNK_ROWS_MIN => chunk = rows / 2,
                Err(AuditError::Damaged { column }) => {
                    self.leave_out(NotAudited::Damaged, rows as u64);
                    let note = format!("rows of the log have no usable column `{column}`");
                    if !self.notes.contains(&note) {
                        self.notes.push(note);
                    }
                    start += rows;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn chunk(&mut self, logged: &Logged, model: Option<&ModelPlan>) -> Result<(), AuditError> {
        let service = self.service.clone();
        let why = logged.left_out(&service, &self.held)?;
        let kept: Vec<u32> = (0..logged.rows() as u32).filter(|row| why[*row as usize].is_none()).collect();
        let audited = if kept.len() == logged.rows() { logged.clone() } else { logged.take(&kept)? };
        let hidden = audited.features_left_out(&service);
        let (as_known, by_event_time) = if kept.is_empty() {
            (Vec::new(), Vec::new())
        } else {
            (self.replay(&audited, true).await?, self.replay(&audited, false).await?)
        };
        let served = (0..service.outputs.len()).map(|output| audited.served(&service, output));
        let served: Vec<Option<Column>> = served.collect::<Result<_, _>>()?;
        let times = audited.times(names::TIME)?;
        // Nothing is counted before everything that can fail has not.
        for why in why.into_iter().flatten() {
            self.leave_out(why, 1);
        }
        if kept.is_empty() {
            return Ok(());
        }
        self.rows.logged += kept.len() as u64;
        self.rows.audited += kept.len() as u64;
        let mut wrong: Vec<Vec<usize>> = vec![Vec::new(); kept.len()];
        let mut late: Vec<Vec<usize>> = vec![Vec::new(); kept.len()];
        for output in 0..service.outputs.len() {
            let tally = &mut self.tallies[output];
            let Some(served) = served[output].as_ref().filter(|_| !hidden[output]) else {
                tally.counts.leave_out(NotAudited::Hashed, kept.len() as u64);
                continue;
            };
            let verdicts = judge(served, &as_known[output], &by_event_time[output]);
            for (row, verdict) in verdicts.into_iter().enumerate() {
                tally.counts.add(verdict);
                match verdict {
                    Verdict::Bug => {
                        wrong[row].push(output);
                        tally.bugs.add(times[row]);
                        self.bugs.add(times[row]);
                    }
                    Verdict::Lateness => late[row].push(output),
                    Verdict::Equal | Verdict::Fallback => continue,
                }
                let bad = verdict == Verdict::Bug;
                let badness = if bad {
                    badness(served, &as_known[output], row, &service.outputs[output].feature_type)
                } else {
                    -1.0
                };
                if tally.wants(badness) {
                    let columns = [served, &as_known[output], &by_event_time[output]];
                    let kind = if bad { "bug" } else { "lateness" };
                    let example = example(&service, &audited, output, row, kind, columns)?;
                    tally.keep(badness, output, example, audited.take(&[row as u32])?);
                }
            }
        }
        self.rows.with_bugs += wrong.iter().filter(|wrong| !wrong.is_empty()).count() as u64;
        if let Some(model) = model {
            let clean: Vec<bool> = wrong.iter().map(Vec::is_empty).collect();
            tensors::compare(&mut self.tensors, model, &audited, &as_known, &hidden, &clean)?;
            rescore::keep(&mut self.versions, model, &audited, &clean)?;
        }
        for row in (0..kept.len()).filter(|row| !wrong[*row].is_empty()) {
            if self.wrong_rows.len() < self.options.wrong_rows_max {
                self.wrong_rows.push(audited.request(row));
            }
        }
        for row in 0..kept.len() {
            let of_feature = |output: &usize, tallies: &[Tally]| tallies[*output].wrong < WRONG_OF_FEATURE;
            if self.wrong.len() < WRONG_MAX && wrong[row].iter().any(|output| of_feature(output, &self.tallies)) {
                wrong[row].iter().for_each(|output| self.tallies[*output].wrong += 1);
                let changed = std::mem::take(&mut wrong[row]);
                self.wrong.push(Sampled { row: audited.take(&[row as u32])?, changed });
            }
            let of_feature = |output: &usize, tallies: &[Tally]| tallies[*output].late < LATE_OF_FEATURE;
            if self.late.len() < LATE_MAX && late[row].iter().any(|output| of_feature(output, &self.tallies)) {
                late[row].iter().for_each(|output| self.tallies[*output].late += 1);
                let changed = std::mem::take(&mut late[row]);
                self.late.push(Sampled { row: audited.take(&[row as u32])?, changed });
            }
        }
        Ok(())
    }

    /// All features of some rows, by the engine.
    async fn replay(&self, logged: &Logged, as_known: bool) -> Result<Vec<Column>, AuditError> {
        let spine = logged.spine(&self.service, as_known)?;
        let request = TrainingSetRequest {
            service: self.service.clone(),
            spine_schema: spine.schema(),
            spine: vec![spine],
            statuses: true,
            visibility: None,
            order: Order::Spine,
        };
        let set = self.engine.training_set(request).await?;
        let batches: Vec<RecordBatch> = set.stream.try_collect().await.map_err(|error| match error.find_root() {
            datafusion::error::DataFusionError::External(source) => match source.downcast_ref::<EngineError>() {
                Some(EngineError::Memory { limit_mib, what }) => {
                    EngineError::Memory { limit_mib: *limit_mib, what: what.clone() }
                }
                _ => EngineError::Run(error.strip_backtrace()),
            },
            _ => EngineError::Run(error.strip_backtrace()),
        })?;
        let all = concat_batches(&set.schema, &batches)?;
        if all.num_rows() != logged.rows() {
            let text = format!("{} rows were replayed and {} came back; this is a bug", logged.rows(), all.num_rows());
            return Err(EngineError::Run(text).into());
        }
        let columns = self.service.outputs.iter().map(|output| {
            let missing = || EngineError::Run(format!("the replay has no column `{}`; this is a bug", output.name));
            let values = all.column_by_name(&output.name).ok_or_else(missing)?.clone();
            let status = all.column_by_name(&format!("{}__status", output.name)).ok_or_else(missing)?;
            Ok(Column { values, statuses: statuses(status).ok_or_else(missing)? })
        });
        columns.collect()
    }

    /// Looks for reasons and causes, and says what was found.
    pub async fn finish(mut self) -> Result<Report, AuditError> {
        let service = self.service.clone();
        let late = match self.lateness().await {
            Ok(found) => found,
            Err(error) => {
                self.notes.push(format!("why values are late could not be looked for: {error}"));
                Vec::new()
            }
        };
        let (mut of_features, cause) = match self.causes().await {
            Ok(found) => found,
            // The verdict stands without them.
            Err(error) => {
                self.notes.push(format!("causes could not be looked for: {error}"));
                (Vec::new(), None)
            }
        };
        if self.options.explain {
            self.explain().await;
        }
        let mut values = Counts::default();
        self.tallies.iter().for_each(|tally| values.merge(&tally.counts));
        let rate = |found: u64, of: u64| if of == 0 { 0.0 } else { found as f64 / of as f64 };
        let features = service.outputs.iter().zip(std::mem::take(&mut self.tallies)).enumerate();
        let features: Vec<FeatureReport> = features
            .map(|(number, (output, tally))| {
                let Tally { counts, bugs, examples, .. } = tally;
                let compared = counts.compared();
                let cause = of_features.iter().position(|(feature, _)| *feature == number);
                FeatureReport {
                    feature: output.name.clone(),
                    bug_rate: rate(counts.bug, compared),
                    bug_rate_upper: upper_bound(counts.bug, compared),
                    lateness_rate: rate(counts.lateness, compared),
                    lateness_rate_upper: upper_bound(counts.lateness, compared),
                    counts,
                    first_bad_minute: bugs.finish().first,
                    cause: cause.map(|place| of_features.swap_remove(place).1),
                    examples: examples.into_iter().map(|(_, _, example, _)| example).collect(),
                }
            })
            .collect();
        let bug_rate = rate(values.bug, values.compared());
        let has_other_bug =
            self.tensors.different > 0 || self.rescored.as_ref().is_some_and(|rescored| rescored.different > 0);
        let outcome = match values.compared() {
            0 => Outcome::NothingCompared,
            _ if bug_rate > self.options.max_bug_rate || has_other_bug => Outcome::Failed,
            _ => Outcome::Passed,
        };
        let tensors = Some(self.tensors).filter(|tensors| tensors.compared + tensors.passed_over > 0);
        let lateness_sampled = self.late.iter().map(|row| row.changed.len() as u64).sum();
        Ok(Report {
            service: service.name.to_string(),
            semantic_digest: service.semantic_digest.to_string(),
            from: Moment(self.options.from),
            to: Moment(self.options.to),
            outcome,
            max_bug_rate: self.options.max_bug_rate,
            rows: self.rows,
            bug_rate,
            bug_rate_upper: upper_bound(values.bug, values.compared()),
            values,
            cause,
            bugs: self.bugs.finish(),
            wrong_rows: self.wrong_rows,
            features,
            lateness: late,
            lateness_sampled,
            tensors,
            rescored: self.rescored,
            losses: self.losses,
            notes: self.notes,
        })
    }

    async fn events_of(&self, rows: &[Sampled]) -> Result<(Events, Vec<Logged>), AuditError> {
        let logged: Vec<Logged> = rows.iter().map(|row| row.row.clone()).collect();
        let mut given: Vec<Vec<ArrayRef>> = vec![Vec::new(); self.service.columns.len()];
        let mut at = Vec::with_capacity(rows.len());
        for row in &logged {
            for (all, one) in given.iter_mut().zip(row.given(&self.service)?) {
                all.push(one);
            }
            at.extend(row.times(names::AT)?);
        }
        let given = given.iter().map(|column| {
            let column: Vec<&dyn arrow::array::Array> = column.iter().map(AsRef::as_ref).collect();
            arrow::compute::concat(&column)
        });
        let given: Vec<ArrayRef> = given.collect::<Result<_, _>>()?;
        Ok((Events::read(self.engine, &self.service, &given, &at).await?, logged))
    }

    async fn lateness(&self) -> Result<Vec<report::LateSource>, AuditError> {
        if self.late.is_empty() {
            return Ok(Vec::new());
        }
        let (events, logged) = self.events_of(&self.late).await?;
        let mut rows = Vec::with_capacity(logged.len());
        for (sampled, row) in self.late.iter().zip(&logged) {
            rows.push(Late {
                changed: sampled.changed.clone(),
                at: row.times(names::AT)?[0],
                time: row.times(names::TIME)?[0],
                applied: self.applied(row)?,
            });
        }
        Ok(reasons(&self.service, &events, &rows))
    }

    fn applied(&self, row: &Logged) -> Result<Vec<crate::point_in_time::by_row::Applied>, AuditError> {
        self.service.inputs.iter().map(|input| Ok(row.applied(&input.alias)?[0])).collect()
    }

    async fn causes(&mut self) -> Result<(Vec<(usize, rank::Cause)>, Option<rank::Cause>), AuditError> {
        if self.wrong.is_empty() {
            return Ok((Vec::new(), None));
        }
        let (events, logged) = self.events_of(&self.wrong).await?;
        let mut rows = Vec::with_capacity(logged.len());
        for (sampled, row) in self.wrong.iter().zip(&logged) {
            let hidden = row.features_left_out(&self.service);
            let served = (0..self.service.outputs.len())
                .map(|output| Ok(row.served(&self.service, output)?.filter(|_| !hidden[output])));
            rows.push(Wrong {
                changed: sampled.changed.clone(),
                served: served.collect::<Result<_, AuditError>>()?,
                given: row.given(&self.service)?,
                at: row.times(names::AT)?[0],
                applied: self.applied(row)?,
            });
        }
        let found = causes(&self.service, &events, &rows)?;
        if found.is_cut {
            self.notes.push("some entities have more events than are looked at for causes".to_owned());
        }
        Ok((found.features, Some(found.all)))
    }

    /// Names the rows of the sources behind the worst examples.
    async fn explain(&mut self) {
        let mut worst: Vec<(f64, usize, usize)> = Vec::new();
        for (feature, tally) in self.tallies.iter().enumerate() {
            let examples = tally.examples.iter().enumerate();
            worst.extend(examples.map(|(place, (badness, ..))| (*badness, feature, place)));
        }
        worst.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        worst.truncate(EXPLAINED_MAX);
        for (_, feature, place) in worst {
            let row = self.tallies[feature].examples[place].3.clone();
            let explained = match row.spine(&self.service, true) {
                Ok(spine) => {
                    let request = ExplainRequest {
                        service: self.service.clone(),
                        spine,
                        feature: self.service.outputs[feature].name.clone(),
                        visibility: None,
                        limit: EXPLAINED_ROWS,
                    };
                    self.engine.explain(&request).await.map_err(|error| error.to_string())
                }
                Err(error) => Err(error.to_string()),
            };
            let example = &mut self.tallies[feature].examples[place].2;
            match explained {
                Ok(explained) => example.explained = Some(Box::new(explained)),
                Err(error) => example.unexplained = Some(error),
            }
        }
    }
}

impl Tally {
    fn wants(&self, badness: f64) -> bool {
        self.examples.len() < EXAMPLES || self.examples.last().is_some_and(|(least, ..)| badness > *least)
    }

    /// The worst first, and of equals those that came first.
    fn keep(&mut self, badness: f64, feature: usize, example: Example, row: Logged) {
        let place = self.examples.partition_point(|(other, ..)| *other >= badness);
        self.examples.insert(place, (badness, feature, example, row));
        self.examples.truncate(EXAMPLES);
    }
}

fn example(
    service: &ServicePlan,
    logged: &Logged,
    output: usize,
    row: usize,
    kind: &'static str,
    [served, as_known, by_event_time]: [&Column; 3],
) -> Result<Example, AuditError> {
    let of = &service.outputs[output].feature_type;
    let value = |column: &Column| to_json(&Value::from_array(&column.values, row, of), of);
    let status = |column: &Column| match Status::from_number(column.statuses[row]) {
        Some(status) => status.to_string(),
        None => column.statuses[row].to_string(),
    };
    let given = service.columns.iter().zip(logged.given(service)?);
    let given = given.map(|(column, values)| {
        (column.name.clone(), to_json(&Value::from_array(&values, row, &column.column_type), &column.column_type))
    });
    let (request_id, number) = logged.request(row);
    Ok(Example {
        kind,
        request_id,
        row: number,
        time: Moment(logged.times(names::TIME)?[row]),
        at: Moment(logged.times(names::AT)?[row]),
        given: given.collect(),
        served: value(served),
        served_status: status(served),
        as_known: value(as_known),
        as_known_status: status(as_known),
        by_event_time: value(by_event_time),
        by_event_time_status: status(by_event_time),
        explained: None,
        unexplained: None,
    })
}

#[cfg(test)]
mod tests;
