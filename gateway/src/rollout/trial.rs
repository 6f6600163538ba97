//! A rollout that runs, as one gateway serves it: who stands where, and who answers.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::datatypes::Int64Type;
use drift::sequential::exposure::Arm;
use drift::sequential::hard::Broken;
use feature_defs::plan::{RequestColumn, ServicePlan};
use feature_defs::time::Micros;
use feature_defs::value::Type;
use proto::v1::Column;
use registry::assignment::{Holdout, KeyPart, Placed, Ramp, Standing};
use registry::deployment::Deployment;
use registry::id::EntryNumber;
use registry::rollout::{Rollout, Stage};

use super::policy::Pinned;
use crate::convert;
use crate::request::Rows;
use crate::status::Failure;
use crate::versions::ServedModel;

/// Why rows were answered by whom, in answers and in what is logged.
pub const CHAMPION: &str = "champion";
pub const CHALLENGER: &str = "challenger";
pub const SHADOW: &str = "shadow";
pub const NAMED: &str = "named";
pub const OFF: &str = "off";

/// What does not change while a rollout runs, worked out once.
#[derive(Clone)]
pub struct Prepared {
    pub pinned: Arc<Pinned>,
    pub unit: Arc<Vec<(String, Type)>>,
    pub ramp: Arc<Ramp>,
    pub local: Arc<Local>,
}

/// What this gateway has found out by itself, and does at once.
#[derive(Default)]
pub struct Local {
    stopped: AtomicBool,
    broken: Mutex<Vec<Broken>>,
}

/// Rules that were broken, of which more are of no use.
const BROKEN_MAX: usize = 8;

impl Local {
    /// Takes the version out of the traffic here, before the log says so.
    pub fn stop(&self, broken: Broken) {
        let mut all = self.broken.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() < BROKEN_MAX && !all.iter().any(|known| known.rule == broken.rule) {
            all.push(broken);
        }
        self.stopped.store(true, Ordering::Release);
    }

    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    pub fn broken(&self) -> Vec<Broken> {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A rollout at one of its stages. Never changed, only replaced.
pub struct Trial {
    pub model: Arc<str>,
    /// The entry that began it.
    pub rollout: EntryNumber,
    /// The entry that began the present stage, under which units are counted.
    pub staged: EntryNumber,
    pub stage: Stage,
    /// All stages so far: what, the entry, and the clock of whoever wrote it.
    pub stages: Vec<(Stage, EntryNumber, Micros)>,
    pub champion: u32,
    pub version: u32,
    /// None while it is not loaded here.
    pub challenger: Option<Arc<ServedModel>>,
    pub prepared: Prepared,
}

impl fmt::Debug for Trial {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Trial { model, rollout, version, stage, .. } = self;
        write!(formatter, "rollout {rollout} of version {version} of {model} at {stage}")
    }
}

/// Where a row stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Assigned {
    pub standing: Standing,
    pub placed: Placed,
}

impl Assigned {
    /// The arm of a row that is in the experiment.
    pub fn arm(&self) -> Option<Arm> {
        match self.standing {
            Standing::Champion => Some(Arm::Champion),
            Standing::Challenger => Some(Arm::Challenger),
            Standing::HeldOut | Standing::Elsewhere => None,
        }
    }
}

impl Prepared {
    /// None where this build cannot read the policy, with the reason.
    pub fn of(rollout: &Rollout, holdout: Option<&Holdout>) -> Result<Prepared, String> {
        let pinned: Pinned = serde_json::from_str(&rollout.policy)
            .map_err(|error| format!("its policy cannot be read by this build: {error}"))?;
        let unit = pinned.unit.iter().map(|key| {
            let key_type = Type::parse(&key.key_type).map_err(|error| format!("its unit cannot be read: {error}"))?;
            Ok((key.name.clone(), key_type))
        });
        let unit: Vec<(String, Type)> = unit.collect::<Result<_, String>>()?;
        let ramp = Arc::new(Ramp::new(&rollout.traffic, holdout));
        Ok(Prepared { pinned: Arc::new(pinned), unit: Arc::new(unit), ramp, local: Arc::default() })
    }
}

impl Trial {
    pub fn of(
        model: &str,
        deployment: &Deployment,
        prepared: Prepared,
        challenger: Option<Arc<ServedModel>>,
    ) -> Option<Trial> {
        let rollout = deployment.rollout.as_deref()?;
        let stage = |(stage, fact): &(Stage, registry::state::Fact)| (*stage, fact.entry, fact.at.timestamp_micros());
        Some(Trial {
            model: model.into(),
            rollout: rollout.begun.entry,
            staged: rollout.staged(),
            stage: rollout.stage,
            stages: rollout.stages.iter().map(stage).collect(),
            champion: rollout.champion.0,
            version: rollout.version.0,
            challenger,
            prepared,
        })
    }

    pub fn pinned(&self) -> &Pinned {
        &self.prepared.pinned
    }

    pub fn is_shadow(&self) -> bool {
        matches!(self.stage, Stage::Shadow)
    }

    fn share(&self) -> u16 {
        match self.stage {
            Stage::Shadow => 0,
            Stage::Canary { share, .. } => share,
        }
    }

    /// Columns that requests may carry beside what the champion's service takes.
    pub fn columns(&self) -> Vec<(String, Type)> {
        let of_challenger = self.challenger.iter().flat_map(|model| &model.plan.service.columns);
        let of_challenger = of_challenger.map(|column| (column.name.clone(), column.column_type.clone()));
        self.prepared.unit.iter().cloned().chain(of_challenger).collect()
    }

    /// Whether requests may carry a column beside what the champion's service takes.
    pub fn takes(&self, column: &str) -> bool {
        self.columns().iter().any(|(known, _)| known == column)
    }

    /// Where each row stands; none for rows that do not name the unit.
    pub fn assign(
        &self,
        service: &ServicePlan,
        sent: &[Column],
        rows: &Rows,
    ) -> Result<Vec<Option<Assigned>>, Failure> {
        let units = units(&self.prepared.unit, service, sent, rows)?;
        let Some(units) = units else { return Ok(vec![None; rows.count]) };
        let share = self.share();
        let assigned = (0..rows.count).map(|row| {
            let key = key(&units, row)?;
            let (standing, placed) = self.prepared.ramp.assign(&key, share);
            Some(Assigned { standing, placed })
        });
        Ok(assigned.collect())
    }

    /// Which arm has a bucket at one of its stages; none where neither has.
    pub fn arm_of(&self, bucket: u16, stage: Stage) -> Option<Arm> {
        let share = if let Stage::Canary { share, .. } = stage { share } else { 0 };
        match self.prepared.ramp.standing_of_bucket(bucket, share) {
            Standing::Champion => Some(Arm::Champion),
            Standing::Challenger => Some(Arm::Challenger),
            Standing::HeldOut | Standing::Elsewhere => None,
        }
    }
}

/// The columns of a unit's key; none where a request lacks one of them.
fn units(
    unit: &[(String, Type)],
    service: &ServicePlan,
    sent: &[Column],
    rows: &Rows,
) -> Result<Option<Vec<(ArrayRef, Type)>>, Failure> {
    let mut columns = Vec::with_capacity(unit.len());
    for (name, key_type) in unit {
        let declared = |column: &&RequestColumn| column.name == *name && column.column_type == *key_type;
        let array = match service.columns.iter().position(|column| declared(&column)) {
            Some(column) => rows.columns[column].clone(),
            None => match sent.iter().find(|column| column.name == *name) {
                Some(column) => convert::to_array(column, key_type, rows.count)
                    .map_err(|error| Failure::invalid(error.to_string()))?,
                None => return Ok(None),
            },
        };
        columns.push((array, key_type.clone()));
    }
    Ok((!columns.is_empty()).then_some(columns))
}

/// The key of a row's unit; none where a part of it is null.
fn key(units: &[(ArrayRef, Type)], row: usize) -> Option<Vec<KeyPart<'_>>> {
    units.iter().map(|(array, key_type)| part(array, key_type, row)).collect()
}

fn part<'a>(array: &'a ArrayRef, key_type: &Type, row: usize) -> Option<KeyPart<'a>> {
    if array.is_null(row) {
        return None;
    }
    Some(match key_type {
        Type::String => KeyPart::Text(array.as_string_opt::<i32>()?.value(row)),
        Type::Int64 => KeyPart::Integer(array.as_primitive_opt::<Int64Type>()?.value(row)),
        Type::Bool => KeyPart::Boolean(array.as_boolean_opt()?.value(row)),
        Type::Binary => KeyPart::Binary(array.as_binary_opt::<i32>()?.value(row)),
        _ => return None,
    })
}

/// Rollouts that a gateway has made ready, by the entry that began them.
#[derive(Default)]
pub struct Trials {
    prepared: BTreeMap<EntryNumber, Result<Prepared, String>>,
    holdout: Option<Holdout>,
}

impl Trials {
    /// A rollout made ready, or why it cannot be served here.
    pub fn prepare(&mut self, rollout: &Rollout, holdout: Option<&Holdout>) -> Result<Prepared, String> {
        if self.holdout.as_ref() != holdout {
            // Who is held out is asked with every row, so it must be the same on all gateways, whenever they began.
            self.holdout = holdout.cloned();
            for prepared in self.prepared.values_mut().flatten() {
                prepared.ramp = Arc::new(prepared.ramp.with_holdout(holdout));
            }
        }
        self.prepared.entry(rollout.begun.entry).or_insert_with(|| Prepared::of(rollout, holdout)).clone()
    }

    pub fn retain(&mut self, running: &[EntryNumber]) {
        self.prepared.retain(|entry, _| running.contains(entry));
    }
}
