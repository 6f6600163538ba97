//! One request, several versions: rows that a rollout assigns to another version are answered by it, and the answers are put
//! together again in the order asked.
//!
//! Each arm is a request of its own, with its own features by its own plan, so that what is measured of an arm is what its
//! rows have met. A request whose rows are all of one arm is not taken apart.

use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::ArrayRef;
use arrow::compute::interleave;
use drift::sequential::exposure::Arm;
use feature_defs::time::Micros;
use feature_defs::value::Type;
use proto::v1;

use crate::answer::micros;
use crate::convert;
use crate::features::Features;
use crate::predict::{Ask, Predicted, RowStatus};
use crate::request::Rows;
use crate::rollout::trial::{Assigned, CHALLENGER, Trial};
use crate::status::Failure;
use crate::versions::ServedModel;

/// Rows of a request that one version answered.
pub struct Part {
    pub model: Arc<ServedModel>,
    pub arm: &'static str,
    /// Their places in the request; none for all of it.
    pub of: Option<Vec<usize>>,
    pub rows: Rows,
    pub features: Features,
    pub predicted: Predicted,
    /// Where they stand in the rollout.
    pub assigned: Vec<Option<Assigned>>,
    pub total: Duration,
}

/// Rows that are to be answered by one version.
pub struct Share {
    pub model: Arc<ServedModel>,
    pub arm: &'static str,
    pub of: Option<Vec<usize>>,
}

/// Who answers which rows of a canary.
pub fn shares(trial: &Trial, champion: &Arc<ServedModel>, assigned: &[Option<Assigned>]) -> Vec<Share> {
    let is_challenger = |row: &usize| assigned[*row].and_then(|assigned| assigned.arm()) == Some(Arm::Challenger);
    let (theirs, ours): (Vec<usize>, Vec<usize>) = (0..assigned.len()).partition(is_challenger);
    // Where the version is not loaded, the champion answers in its place, and the arm has failed.
    let challenger = trial.challenger.as_ref().unwrap_or(champion);
    let share = |model: &Arc<ServedModel>, arm, of: Vec<usize>| Share {
        model: model.clone(),
        arm,
        of: (of.len() < assigned.len()).then_some(of),
    };
    let mut shares = Vec::with_capacity(2);
    if !ours.is_empty() || theirs.is_empty() {
        shares.push(share(champion, crate::rollout::trial::CHAMPION, ours));
    }
    if !theirs.is_empty() {
        shares.push(share(challenger, CHALLENGER, theirs));
    }
    shares
}

/// What every part of a request has in common.
pub struct Asked<'a> {
    pub ask: Ask<'a>,
    pub champion: &'a Arc<ServedModel>,
    pub assigned: &'a [Option<Assigned>],
}

impl Asked<'_> {
    /// Answers one share. A version that is tried must not fail rows that the champion could answer.
    pub async fn part(&self, share: Share) -> Result<Part, Failure> {
        let Share { model, arm, of } = share;
        let is_tried = model.version != self.champion.version;
        match self.answered(&model, arm, of.clone()).await {
            Err(failure) if is_tried => {
                tracing::debug!(model = %model.name, version = model.version, error = failure.message, "the champion answers");
                self.answered(self.champion, arm, of).await
            }
            answered => answered,
        }
    }

    async fn answered(
        &self,
        model: &Arc<ServedModel>,
        arm: &'static str,
        of: Option<Vec<usize>>,
    ) -> Result<Part, Failure> {
        let started = Instant::now();
        let ask = &self.ask;
        let same = model.plan.service.semantic_digest == self.champion.plan.service.semantic_digest;
        let rows = match (&of, same) {
            (None, true) => ask.rows.picked_all(),
            (Some(of), true) => ask.rows.picked(of)?,
            (_, false) => Ask { of: of.as_deref(), ..*ask }.rows_of(&model.plan.service)?,
        };
        let at: Vec<Micros> = match &of {
            Some(of) if !ask.at.is_empty() => of.iter().filter_map(|row| ask.at.get(*row)).copied().collect(),
            _ => ask.at.to_vec(),
        };
        let stand_in = (model.version != self.champion.version).then_some(&**self.champion);
        let part = Ask { model, of: of.as_deref(), rows: &rows, at: &at, stand_in, ..*ask };
        let (features, predicted) = part.answer().await?;
        let assigned = match &of {
            Some(of) => of.iter().map(|row| self.assigned.get(*row).copied().flatten()).collect(),
            None => self.assigned.to_vec(),
        };
        Ok(Part { model: model.clone(), arm, of, rows, features, predicted, assigned, total: started.elapsed() })
    }
}

/// Where each row of the request is: the part, and its place in it.
struct Places(Vec<(usize, usize)>);

impl Places {
    fn of(parts: &[Part], count: usize) -> Places {
        let mut places = vec![(0, 0); count];
        for (index, part) in parts.iter().enumerate() {
            match &part.of {
                None => places = (0..count).map(|row| (index, row)).collect(),
                Some(of) => of.iter().enumerate().for_each(|(place, row)| places[*row] = (index, place)),
            }
        }
        Places(places)
    }

    fn rows<T: Clone>(&self, of: &[&[T]]) -> Vec<T> {
        self.0.iter().filter_map(|(part, place)| of.get(*part)?.get(*place).cloned()).collect()
    }

    fn arrays(&self, arrays: &[&ArrayRef]) -> Result<ArrayRef, Failure> {
        let arrays: Vec<&dyn arrow::array::Array> = arrays.iter().map(|array| array.as_ref()).collect();
        interleave(&arrays, &self.0)
            .map_err(|error| Failure::internal("the answers of two versions could not be put together", &error))
    }
}

/// The answer of a request whose rows went to several versions.
pub struct Whole<'a> {
    parts: &'a [Part],
    places: Places,
}

impl<'a> Whole<'a> {
    pub fn of(parts: &'a [Part], count: usize) -> Whole<'a> {
        Whole { parts, places: Places::of(parts, count) }
    }

    pub fn outputs(&self) -> Result<Vec<v1::Column>, Failure> {
        if let [only] = self.parts {
            return Ok(only.predicted.columns());
        }
        let Some(first) = self.parts.first() else { return Ok(Vec::new()) };
        let column = |(index, (name, array, value_type)): (usize, &(String, ArrayRef, Type))| {
            let mut arrays = vec![array];
            for other in &self.parts[1..] {
                match other.predicted.outputs.get(index) {
                    Some((known, array, other_type)) if known == name && other_type == value_type => arrays.push(array),
                    _ => {
                        let text = format!("version {} gives another `{name}` than the champion", other.model.version);
                        return Err(Failure::new(crate::status::Kind::Precondition, text));
                    }
                }
            }
            Ok(convert::from_array(name, &self.places.arrays(&arrays)?, value_type))
        };
        first.predicted.outputs.iter().enumerate().map(column).collect()
    }

    pub fn outcomes(&self) -> Vec<v1::RowOutcome> {
        let of = |part: &Part| -> Vec<v1::RowOutcome> {
            part.predicted.rows.iter().map(|row| row.to_proto(part.model.version, part.arm)).collect()
        };
        let outcomes: Vec<Vec<v1::RowOutcome>> = self.parts.iter().map(of).collect();
        self.places.rows(&outcomes.iter().map(Vec::as_slice).collect::<Vec<_>>())
    }

    pub fn at(&self) -> Vec<Micros> {
        self.places.rows(&self.parts.iter().map(|part| part.features.fetched.at.as_slice()).collect::<Vec<_>>())
    }

    /// The features of the first part's service; rows of a version that takes others have those of the same names, and null for
    /// the rest.
    pub fn features(&self) -> Result<Vec<v1::FeatureColumn>, Failure> {
        let Some(first) = self.parts.first() else { return Ok(Vec::new()) };
        let columns: Vec<Vec<v1::FeatureColumn>> =
            self.parts.iter().map(|part| part.features.columns(&part.model.plan.service)).collect();
        if self.parts.len() == 1 {
            return Ok(columns.into_iter().next().unwrap_or_default());
        }
        let service = &first.model.plan.service;
        let merged = service.outputs.iter().enumerate().map(|(index, output)| {
            let mut arrays = Vec::new();
            let mut statuses: Vec<Vec<i32>> = Vec::new();
            let mut reasons: Vec<Vec<i32>> = Vec::new();
            for (part, columns) in self.parts.iter().zip(&columns) {
                let theirs = &part.model.plan.service;
                let place = theirs
                    .outputs
                    .iter()
                    .position(|known| known.name == output.name && known.feature_type == output.feature_type);
                let (array, column) = match place {
                    Some(place) => (part.features.assembled.columns[place].clone(), Some(&columns[place])),
                    None => (arrow::array::new_null_array(&output.feature_type.arrow(), part.rows.count), None),
                };
                arrays.push(array);
                let unknown = vec![v1::FieldStatus::Unspecified as i32; part.rows.count];
                statuses.push(column.map_or(unknown, |column| column.statuses.clone()));
                let reason = column.map(|column| column.reasons.clone()).filter(|reasons| !reasons.is_empty());
                reasons.push(reason.unwrap_or_else(|| vec![0; part.rows.count]));
            }
            let array = self.places.arrays(&arrays.iter().collect::<Vec<_>>())?;
            let reasons = self.places.rows(&reasons.iter().map(Vec::as_slice).collect::<Vec<_>>());
            Ok(v1::FeatureColumn {
                name: columns[0][index].name.clone(),
                values: Some(convert::from_array(&output.name, &array, &output.feature_type)),
                statuses: self.places.rows(&statuses.iter().map(Vec::as_slice).collect::<Vec<_>>()),
                reasons: if reasons.iter().all(|reason| *reason == 0) { Vec::new() } else { reasons },
            })
        });
        merged.collect()
    }

    /// As [`Whole::features`], for what each view answered from.
    pub fn provenance(&self) -> Vec<v1::ViewProvenance> {
        let all: Vec<Vec<v1::ViewProvenance>> =
            self.parts.iter().map(|part| part.features.provenance(&part.model.plan.service)).collect();
        let Some((first, others)) = all.split_first() else { return Vec::new() };
        if others.is_empty() {
            return first.clone();
        }
        let merged = first.iter().map(|view| {
            let same = |views: &'_ Vec<v1::ViewProvenance>| {
                views
                    .iter()
                    .find(|other| other.alias == view.alias && other.storage_digest == view.storage_digest)
                    .cloned()
            };
            let none = |rows: usize| v1::ViewProvenance {
                event_times: vec![i64::MIN; rows],
                positions: vec![v1::Position { time: i64::MIN, sequence: 0 }; rows],
                ..view.clone()
            };
            let views =
                all.iter().zip(self.parts).map(|(views, part)| same(views).unwrap_or_else(|| none(part.rows.count)));
            let views: Vec<v1::ViewProvenance> = views.collect();
            v1::ViewProvenance {
                event_times: self
                    .places
                    .rows(&views.iter().map(|view| view.event_times.as_slice()).collect::<Vec<_>>()),
                positions: self.places.rows(&views.iter().map(|view| view.positions.as_slice()).collect::<Vec<_>>()),
                ..view.clone()
            }
        });
        merged.collect()
    }

    pub fn is_stale(&self) -> bool {
        self.parts.iter().any(|part| part.features.fetched.stale)
    }

    /// Of the slower part, stage by stage.
    pub fn timings(&self, total: Duration) -> v1::Timings {
        let most = |of: fn(&Part) -> Duration| micros(self.parts.iter().map(of).max().unwrap_or_default());
        v1::Timings {
            features_us: most(|part| part.features.fetch_time),
            transforms_us: most(|part| part.features.transform_time),
            queue_us: most(|part| part.predicted.queue_time),
            forward_us: most(|part| part.predicted.forward_time),
            total_us: micros(total),
        }
    }
}

/// Whether the version that was tried answered a row itself.
pub fn answered_itself(version: u32, of: u32, status: RowStatus) -> bool {
    version == of && status == RowStatus::Answered
}
