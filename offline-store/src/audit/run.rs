//! An audit of what lies in the serving log.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::compute::concat_batches;
use arrow::datatypes::{SchemaRef, TimestampMicrosecondType};
use feature_defs::plan::{Plan, ServicePlan};
use feature_defs::time::Micros;

use super::logged::Logged;
use super::report::{Losses, Report};
use super::{AuditError, AuditOptions, Auditor, NotAudited, Rescore};
use crate::engine::Engine;
use crate::serving_log::{self, LogRows, Minute, ServingLogError, columns};

/// Kinds of rows that wait to be replayed together; more are replayed as they come.
const KINDS_MAX: usize = 16;
/// Files that could not be read are named up to here.
const NOTES_MAX: usize = 5;

/// Which rows.
pub struct AuditRequest {
    pub service: Arc<ServicePlan>,
    pub options: AuditOptions,
    /// About so many rows, chosen by the hash of their request; all of them without it.
    pub sample_rows: Option<u64>,
}

/// Told as rows are audited: how many so far.
pub type Progress<'p> = &'p (dyn Fn(u64) + Send + Sync);

/// Audits what was served from a service for times from `from` up to, and without, `to`.
pub async fn audit(
    engine: &Engine,
    plan: &Arc<Plan>,
    request: &AuditRequest,
    rescore: Option<&dyn Rescore>,
    progress: Progress<'_>,
) -> Result<Report, AuditError> {
    let AuditRequest { service, options, sample_rows } = request;
    let (store, project) = (engine.store(), engine.project_path());
    let (from, to) = (options.from, options.to);
    let files = serving_log::files(store, &project, &service.name, from, to).await?;
    let bytes: u64 = files.iter().map(|file| file.bytes).sum();
    let mut auditor = Auditor::new(engine, plan, service, options.clone()).await?;
    let mut waiting = Waiting { chunk_rows: options.chunk_rows.max(1), kinds: BTreeMap::new() };
    let (mut done, mut unread) = (0, 0);
    for file in &files {
        let LogRows { header, batch } = match serving_log::read(store, file).await {
            Ok(Some(rows)) => rows,
            Ok(None) => continue,
            Err(error @ (ServingLogError::Damaged { .. } | ServingLogError::Newer { .. })) => {
                unread += 1;
                if unread <= NOTES_MAX {
                    auditor.notes.push(error.to_string());
                }
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let quota = sample_rows.map(|rows| rows.saturating_mul(file.bytes).div_ceil(bytes.max(1)));
        let (wanted, passed_over) = choose(&batch, from, to, quota)?;
        auditor.pass_over(passed_over);
        if header.semantic_digest != service.semantic_digest.to_string() {
            auditor.leave_out(NotAudited::OtherDefinitions, wanted.len() as u64);
            continue;
        }
        let logged = Logged { batch, hashed: header.hashed.into() };
        let kind = Kind { model: header.model, hashed: logged.hashed.to_vec() };
        for (model, logged) in waiting.add(kind, logged.take(&wanted)?)? {
            auditor.add(&logged, model.as_deref()).await?;
            done += logged.rows() as u64;
            progress(done);
        }
    }
    for (model, logged) in waiting.rest()? {
        auditor.add(&logged, model.as_deref()).await?;
        done += logged.rows() as u64;
        progress(done);
    }
    if unread > NOTES_MAX {
        auditor.notes.push(format!("{} more files of the log could not be read", unread - NOTES_MAX));
    }
    auditor.losses = losses(engine, service, from, to).await?;
    if let Some(rescore) = rescore {
        auditor.rescore(rescore).await?;
    }
    auditor.finish().await
}

/// What gateways say of the minutes that were audited; None where they say nothing of them, as of replays of the past.
async fn losses(
    engine: &Engine,
    service: &ServicePlan,
    from: Micros,
    to: Micros,
) -> Result<Option<Losses>, AuditError> {
    let (first, last) = (serving_log::day(from), serving_log::day(to.saturating_sub(1)));
    let said = serving_log::losses(engine.store(), &engine.project_path(), &service.name, first, last).await?;
    let mut total = Minute::default();
    let mut any = false;
    for (minute, counts) in said.iter().flat_map(|said| &said.minutes) {
        if (Minute::of(from)..=Minute::of(to.saturating_sub(1))).contains(minute) {
            any = true;
            total.add(counts);
        }
    }
    Ok(any.then(|| Losses {
        offered: total.offered,
        chosen: total.chosen,
        written: total.written,
        fallbacks_over: total.fallbacks_over,
        lost: total.lost(),
    }))
}

/// The rows within the times, all or about so many of them, and how many of those within were not chosen.
fn choose(batch: &RecordBatch, from: Micros, to: Micros, quota: Option<u64>) -> Result<(Vec<u32>, u64), AuditError> {
    let damaged = |column: &str| AuditError::Damaged { column: column.to_owned() };
    let column = |name: &str| batch.column_by_name(name).ok_or_else(|| damaged(name));
    let times = column(columns::AT)?;
    let times = times.as_primitive_opt::<TimestampMicrosecondType>().ok_or_else(|| damaged(columns::AT))?;
    let inside = |row: &u32| times.is_valid(*row as usize) && (from..to).contains(&times.value(*row as usize));
    let mut rows: Vec<u32> = (0..batch.num_rows() as u32).filter(inside).collect();
    let quota = quota.map_or(usize::MAX, |quota| usize::try_from(quota).unwrap_or(usize::MAX));
    let passed_over = rows.len().saturating_sub(quota);
    if passed_over > 0 {
        let ids = column(columns::REQUEST_ID)?.as_string_opt::<i32>().ok_or_else(|| damaged(columns::REQUEST_ID))?;
        let numbers = column(columns::ROW)?.as_primitive_opt::<arrow::datatypes::UInt32Type>();
        let numbers = numbers.ok_or_else(|| damaged(columns::ROW))?;
        let hash = |row: &u32| {
            let mut text = ids.value(*row as usize).as_bytes().to_vec();
            text.extend_from_slice(&numbers.value(*row as usize).to_le_bytes());
            feature_defs::value::hash(&text)
        };
        rows.sort_by_cached_key(hash);
        rows.truncate(quota);
        rows.sort_unstable();
    }
    Ok((rows, passed_over as u64))
}

/// Rows that can be replayed together.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    model: Option<String>,
    hashed: Vec<String>,
}

/// Files of the log are small where little is asked, and every replay reads history: rows wait until there are enough.
struct Waiting {
    chunk_rows: usize,
    kinds: BTreeMap<Kind, Vec<Logged>>,
}

type Ready = Vec<(Option<String>, Logged)>;

impl Waiting {
    fn add(&mut self, kind: Kind, logged: Logged) -> Result<Ready, AuditError> {
        if logged.rows() == 0 {
            return Ok(Vec::new());
        }
        let mut ready = Vec::new();
        let same_schema = |one: &SchemaRef, other: &SchemaRef| one.fields() == other.fields();
        let fits = self.kinds.get(&kind).and_then(|waiting| waiting.first());
        let fits = fits.is_none_or(|first| same_schema(&first.batch.schema(), &logged.batch.schema()));
        if !fits || (self.kinds.len() >= KINDS_MAX && !self.kinds.contains_key(&kind)) {
            ready.extend(self.rest()?);
        }
        let waiting = self.kinds.entry(kind.clone()).or_default();
        waiting.push(logged);
        if waiting.iter().map(Logged::rows).sum::<usize>() >= self.chunk_rows
            && let Some(waiting) = self.kinds.remove(&kind)
        {
            ready.push((kind.model, together(waiting)?));
        }
        // Of many kinds each may be small, and together they are not.
        if self.kinds.values().flatten().map(Logged::rows).sum::<usize>() >= 2 * self.chunk_rows {
            ready.extend(self.rest()?);
        }
        Ok(ready)
    }

    fn rest(&mut self) -> Result<Ready, AuditError> {
        let kinds = std::mem::take(&mut self.kinds);
        kinds.into_iter().map(|(kind, waiting)| Ok((kind.model, together(waiting)?))).collect()
    }
}

fn together(waiting: Vec<Logged>) -> Result<Logged, AuditError> {
    let Some(first) = waiting.first() else {
        return Ok(Logged {
            batch: RecordBatch::new_empty(Arc::new(arrow::datatypes::Schema::empty())),
            hashed: [].into(),
        });
    };
    let (schema, hashed) = (first.batch.schema(), first.hashed.clone());
    let batches: Vec<RecordBatch> = waiting.into_iter().map(|logged| logged.batch).collect();
    Ok(Logged { batch: concat_batches(&schema, &batches)?, hashed })
}
