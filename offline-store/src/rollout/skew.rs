//! Whether the rows of a rollout were served right: logged rows, replayed from what had been applied when they were answered.
//!
//! Every file of the log is looked at once, however late it comes, so what is found adds up ([`Known`]). Rows that were served from
//! events which history does not hold yet wait for a later look. A wrong row stops a rollout for good, so it is replayed
//! once more from history as it then is: where that says otherwise, history was changed meanwhile, and nothing is said.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use arrow::array::{Array, AsArray, BooleanArray, RecordBatch};
use arrow::compute::{concat_batches, filter_record_batch};
use arrow::datatypes::{TimestampMicrosecondType, UInt32Type};
use drift::sequential::evidence::FirstBad;
use feature_defs::plan::{ModelPlan, Plan, ServicePlan};
use feature_defs::time::{Micros, floor_to};
use feature_defs::value::hash;
use feature_defs::window::MINUTE;
use serde::{Deserialize, Serialize};

use super::files;
use crate::audit::logged::Logged;
use crate::audit::skew::RowSkew;
use crate::audit::{AuditError, AuditOptions, Auditor, NotAudited};
use crate::engine::{Engine, EngineError};
use crate::serving_log::{self, LogFile, LogRows, ServingLogError, columns};

/// Rows replayed at a time, and at least where memory is short: the memory is the server's.
const CHUNK_ROWS: usize = 5_000;
const CHUNK_ROWS_MIN: usize = 500;
/// Rows of one look: what is lost when it is dropped.
const ROWS_MAX: usize = 20_000;
/// Looks at which events may still be missing from history.
const LOOKS_MAX: u32 = 30;
/// Files that are remembered: 8 bytes each.
const FILES_MAX: usize = 1 << 20;
const NOTES_MAX: usize = 10;
/// In place of a feature's name, where features are right and what was made of them for the model is not.
pub const TENSORS: &str = "(tensors)";

#[derive(Debug, thiserror::Error)]
pub enum SkewError {
    #[error(transparent)]
    Audit(#[from] AuditError),
    #[error(
        "{rows} rows differed from history, and when they were replayed again {again} did: history was changed meanwhile; it is looked at again"
    )]
    Changed { rows: usize, again: usize },
    #[error("the log of the rollout has more than {FILES_MAX} files; audit it with `coeval audit consistency`")]
    TooMany,
}

/// Which rows.
#[derive(Debug, Clone)]
pub struct Asked {
    /// The challenger's. Whatever version of the model answered from it, in whatever arm, was served the same.
    pub service: Arc<ServicePlan>,
    pub model: String,
    /// By version, for what they were given.
    pub versions: BTreeMap<u32, Arc<ModelPlan>>,
    /// By the server's clock: rows that were logged before are not of the rollout.
    pub logged_from: Micros,
}

/// What is known so far.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Known {
    pub audited_rows: u64,
    pub skew_rows: u64,
    pub first_bad: Option<FirstBad>,
    pub left_out: BTreeMap<NotAudited, u64>,
    pub notes: Vec<String>,
    files: HashSet<u64>,
    /// How often files were put off whose rows history did not have.
    put_off: HashMap<u64, u32>,
}

/// What one look has found.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Found {
    pub audited_rows: u64,
    pub skew_rows: u64,
    /// The feature and the first minute, by the time that rows were answered for.
    pub first_bad: Option<FirstBad>,
    /// Rows that could not be replayed, and why.
    pub left_out: BTreeMap<NotAudited, u64>,
    /// There are more rows than one look takes.
    pub is_behind: bool,
    pub notes: Vec<String>,
    files: Vec<u64>,
    put_off: Vec<u64>,
}

impl Known {
    pub fn add(&mut self, found: Found) {
        let Found { audited_rows, skew_rows, first_bad, left_out, notes, files, put_off, is_behind: _ } = found;
        self.audited_rows += audited_rows;
        self.skew_rows += skew_rows;
        let first = [self.first_bad.take(), first_bad].into_iter().flatten();
        self.first_bad = first.min_by_key(|bad| bad.minute_us);
        left_out.into_iter().for_each(|(why, rows)| *self.left_out.entry(why).or_default() += rows);
        for note in notes {
            if self.notes.len() < NOTES_MAX && !self.notes.contains(&note) {
                self.notes.push(note);
            }
        }
        for file in files {
            self.put_off.remove(&file);
            self.files.insert(file);
        }
        put_off.into_iter().for_each(|file| *self.put_off.entry(file).or_default() += 1);
    }
}

/// Rows that can be replayed together.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    version: Option<u32>,
    hashed: Vec<String>,
    schema: String,
}

/// Looks at files of the log that are not known yet.
pub async fn look(engine: &Engine, plan: &Arc<Plan>, asked: &Asked, known: &Known) -> Result<Found, SkewError> {
    if known.files.len() >= FILES_MAX {
        return Err(SkewError::TooMany);
    }
    let (store, project) = (engine.store(), engine.project_path());
    let listed = files(store, &project, &asked.service.name, asked.logged_from).await.map_err(AuditError::from)?;
    let auditor = auditor(engine, plan, asked).await?;
    let mut found = Found::default();
    let mut kinds: BTreeMap<Kind, Vec<Logged>> = BTreeMap::new();
    let mut rows = 0;
    for file in listed {
        let number = hash(file.path.as_ref().as_bytes());
        if known.files.contains(&number) {
            continue;
        }
        if rows >= ROWS_MAX {
            found.is_behind = true;
            break;
        }
        let Some(logged) = of_rollout(engine, asked, &file, &mut found).await? else {
            found.files.push(number);
            continue;
        };
        let why = match auditor.left_out(&logged) {
            Ok(why) => why,
            Err(AuditError::Damaged { column }) => {
                *found.left_out.entry(NotAudited::Damaged).or_default() += logged.rows() as u64;
                found.notes.push(format!("{}: column `{column}` cannot be used", file.path));
                found.files.push(number);
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let is_early = why.contains(&Some(NotAudited::BeyondHistory));
        if is_early && known.put_off.get(&number).copied().unwrap_or(0) < LOOKS_MAX {
            found.put_off.push(number);
            continue;
        }
        found.files.push(number);
        rows += logged.rows();
        let version = logged.batch.column_by_name(columns::VERSION).and_then(|of| of.as_primitive_opt::<UInt32Type>());
        let version = version.filter(|of| !of.is_empty() && of.is_valid(0)).map(|of| of.value(0));
        let schema = logged.batch.schema();
        let schema = schema.fields().iter().map(|field| format!("{} {}\n", field.name(), field.data_type())).collect();
        let kind = Kind { version, hashed: logged.hashed.to_vec(), schema };
        kinds.entry(kind).or_default().push(logged);
    }
    for (kind, logged) in kinds {
        let model = kind.version.and_then(|version| asked.versions.get(&version)).map(AsRef::as_ref);
        replay(&auditor, engine, plan, asked, together(logged)?, model, &mut found).await?;
    }
    Ok(found)
}

async fn auditor<'e>(engine: &'e Engine, plan: &Arc<Plan>, asked: &Asked) -> Result<Auditor<'e>, AuditError> {
    let options = AuditOptions { explain: false, ..AuditOptions::new(Micros::MIN, Micros::MAX) };
    Auditor::new(engine, plan, &asked.service, options).await
}

/// The rows of a file that are of the rollout; None where there are none, and will be none.
async fn of_rollout(
    engine: &Engine,
    asked: &Asked,
    file: &LogFile,
    found: &mut Found,
) -> Result<Option<Logged>, AuditError> {
    let LogRows { header, batch } = match serving_log::read(engine.store(), file).await {
        Ok(Some(read)) => read,
        Ok(None) => return Ok(None),
        Err(error @ (ServingLogError::Damaged { .. } | ServingLogError::Newer { .. })) => {
            found.notes.push(error.to_string());
            return Ok(None);
        }
        Err(error) => return Err(error.into()),
    };
    let is_of_rollout = header.model.as_deref() == Some(asked.model.as_str())
        && header.semantic_digest == asked.service.semantic_digest.to_string()
        && header.last_time >= asked.logged_from;
    if !is_of_rollout {
        return Ok(None);
    }
    let damaged = || AuditError::Damaged { column: columns::TIME.to_owned() };
    let times = batch.column_by_name(columns::TIME).ok_or_else(damaged)?;
    let times = times.as_primitive_opt::<TimestampMicrosecondType>().ok_or_else(damaged)?;
    let inside: BooleanArray = times.values().iter().map(|time| Some(*time >= asked.logged_from)).collect();
    let batch = filter_record_batch(&batch, &inside)?;
    Ok((batch.num_rows() > 0).then(|| Logged { batch, hashed: header.hashed.into() }))
}

fn together(logged: Vec<Logged>) -> Result<Logged, AuditError> {
    let Some(first) = logged.first() else {
        let batch = RecordBatch::new_empty(Arc::new(arrow::datatypes::Schema::empty()));
        return Ok(Logged { batch, hashed: [].into() });
    };
    let (schema, hashed) = (first.batch.schema(), first.hashed.clone());
    let batches: Vec<&RecordBatch> = logged.iter().map(|logged| &logged.batch).collect();
    Ok(Logged { batch: concat_batches(&schema, batches)?, hashed })
}

async fn replay(
    auditor: &Auditor<'_>,
    engine: &Engine,
    plan: &Arc<Plan>,
    asked: &Asked,
    logged: Logged,
    model: Option<&ModelPlan>,
    found: &mut Found,
) -> Result<(), SkewError> {
    let (mut start, mut chunk) = (0, CHUNK_ROWS);
    while start < logged.rows() {
        let rows = chunk.min(logged.rows() - start);
        let part = logged.slice(start, rows);
        let skews = match auditor.skew(&part, model).await {
            Ok(skews) => skews,
            Err(AuditError::Engine(EngineError::Memory { .. })) if rows > CHUNK_ROWS_MIN => {
                chunk = rows / 2;
                continue;
            }
            Err(AuditError::Damaged { column }) => {
                *found.left_out.entry(NotAudited::Damaged).or_default() += rows as u64;
                found.notes.push(format!("rows of the log have no usable column `{column}`"));
                start += rows;
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        start += rows;
        let is_wrong = |skew: &RowSkew| matches!(skew, RowSkew::Feature(_) | RowSkew::Tensors);
        let wrong: Vec<u32> = (0..rows as u32).filter(|row| is_wrong(&skews[*row as usize])).collect();
        if !wrong.is_empty() {
            let anew = self::auditor(engine, plan, asked).await?;
            let again = anew.skew(&part.take(&wrong)?, model).await?;
            let same = wrong.iter().zip(&again).filter(|(row, again)| skews[**row as usize] == **again).count();
            if same < wrong.len() {
                return Err(SkewError::Changed { rows: wrong.len(), again: same });
            }
            let at = part.times(columns::AT)?;
            if let Some(row) = wrong.iter().map(|row| *row as usize).min_by_key(|row| at[*row]) {
                let feature = match &skews[row] {
                    RowSkew::Feature(feature) => asked.service.outputs[*feature].name.clone(),
                    _ => TENSORS.to_owned(),
                };
                let bad = FirstBad { feature, minute_us: floor_to(at[row], MINUTE) };
                if found.first_bad.as_ref().is_none_or(|known| bad.minute_us < known.minute_us) {
                    found.first_bad = Some(bad);
                }
            }
        }
        found.skew_rows += wrong.len() as u64;
        for skew in skews {
            match skew {
                RowSkew::NotAudited(why) => *found.left_out.entry(why).or_default() += 1,
                _ => found.audited_rows += 1,
            }
        }
    }
    Ok(())
}
