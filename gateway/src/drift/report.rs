//! The verdict over a window of a version: what every gateway counted, held against what the version was trained on.

use std::collections::BTreeMap;
use std::sync::Arc;

use chrono::{DateTime, SecondsFormat};
use drift::counts::Counts;
use drift::verdict::{Policy, Report, Verdict};
use feature_defs::time::{Micros, ceil_to, floor_to};
use feature_defs::window::{DAY, HOUR};
use offline_store::profile::{FeatureProfile, Histogram, Pair, histograms, judged};
use proto::v1;
use registry::id::ModelVersion;
use serde::Serialize;
use tokio::sync::Semaphore;

use super::metrics::Told;
use super::profiles::{self, VersionProfiles};
use super::snapshot::{self, Arm, HOURS_MAX, Window};
use super::{Drift, Version};
use crate::answer::Gateway;
use crate::status::{Failure, Kind, not_known};

/// The window of metrics; they never overlap.
const WINDOW: Micros = DAY;
/// Counts of a window that is over come in for so long: then its verdict stands.
const LATE: Micros = HOUR;
/// Judging takes a core for a second or so: one at a time.
static JUDGING: Semaphore = Semaphore::const_new(1);

const CHAMPION: &str = "champion";

/// What is asked of drift.
#[derive(Debug, Clone)]
pub struct Asked {
    pub version: (Arc<str>, u32),
    pub arm: String,
    pub from: Micros,
    pub to: Micros,
    /// Only these features and outputs; all where there are none.
    pub features: Vec<String>,
    pub histograms: bool,
}

/// What is answered, as JSON.
#[derive(Debug, Clone, Serialize)]
pub struct Answer {
    pub of: String,
    pub against: String,
    pub version: u32,
    pub arm: String,
    pub from: String,
    pub to: String,
    pub rows: u64,
    /// Rows that were answered and not counted, by cause.
    pub uncounted: BTreeMap<String, u64>,
    pub verdict: Verdict,
    /// Features whose drift somebody has accepted in the version's rollout.
    pub acknowledged: BTreeMap<String, Acknowledged>,
    pub notes: Vec<String>,
    pub report: Report,
    pub histograms: Vec<Histogram>,
    #[serde(skip)]
    pub window: (Micros, Micros),
}

#[derive(Debug, Clone, Serialize)]
pub struct Acknowledged {
    pub who: String,
    pub at: String,
    pub why: Option<String>,
}

/// Answers the call.
pub async fn get(gateway: &Arc<Gateway>, request: v1::GetDriftRequest) -> Result<v1::GetDriftResponse, Failure> {
    gateway.check_project(&request.project)?;
    let served = gateway.served();
    let state = gateway.registry.state();
    let project = state.project(gateway.project.as_str());
    let versions = project.and_then(|project| project.models.iter().find(|(name, _)| name.as_str() == request.model));
    let Some((_, versions)) = versions else {
        let known = project.into_iter().flat_map(|project| project.models.keys()).map(|name| name.as_str());
        return Err(Failure::unknown("model with a version", &request.model, known));
    };
    let version = match request.version {
        0 => served.models.get(&request.model).map(|model| model.version).ok_or_else(|| {
            let text = format!("model `{}` has no champion; name a version", request.model);
            Failure::new(Kind::Precondition, text)
        })?,
        version if versions.keys().any(|known| known.0 == version) => version,
        version => {
            let known: Vec<String> = versions.keys().map(ToString::to_string).collect();
            let text = format!("model `{}` has no version {version}; it has {}", request.model, known.join(", "));
            return Err(Failure::new(Kind::Unknown, text));
        }
    };
    let now = (gateway.clock)();
    let (from, to) = match (request.from, request.to) {
        (0, 0) => (now.saturating_sub(DAY), now),
        (from, 0) => (from, now),
        given => given,
    };
    let asked = Asked {
        version: (request.model.as_str().into(), version),
        arm: if request.arm.is_empty() { CHAMPION.to_owned() } else { request.arm },
        from,
        to,
        features: request.features,
        histograms: request.histograms,
    };
    let answer = judge(gateway, asked).await?;
    let features = answer.report.features.iter().map(|feature| v1::FeatureDrift {
        name: feature.name.clone(),
        verdict: feature.verdict.to_string(),
        effect: feature.effect(),
        reasons: feature.reasons.clone(),
    });
    let report = serde_json::to_string(&answer);
    Ok(v1::GetDriftResponse {
        version,
        arm: answer.arm.clone(),
        verdict: answer.verdict.to_string(),
        from: answer.window.0,
        to: answer.window.1,
        rows: answer.rows,
        uncounted_rows: answer.uncounted.values().sum(),
        features: features.collect(),
        report: report.map_err(|error| Failure::internal("the report could not be written", &error))?,
    })
}

/// Judges the whole hours of a window.
pub async fn judge(gateway: &Arc<Gateway>, asked: Asked) -> Result<Answer, Failure> {
    let Some(drift) = &gateway.drift else {
        return Err(Failure::new(Kind::Unsupported, "this server counts nothing for drift"));
    };
    let (from, to) = (floor_to(asked.from, HOUR), ceil_to(asked.to, HOUR));
    if from >= to || (to - from) / HOUR > HOURS_MAX {
        let text = format!("the window must begin before it ends and have at most {HOURS_MAX} hours");
        return Err(Failure::invalid(text));
    }
    let (model, number) = (asked.version.0.clone(), asked.version.1);
    let Some(profiles) = profiles::of_version(gateway, drift, &asked.version).await else {
        let why = profiles::why(drift.lock().known.get(&asked.version));
        let text = format!("drift of version {number} of model `{model}` cannot be judged: {why}");
        return Err(Failure::new(Kind::Precondition, text));
    };
    let mut notes = Vec::new();
    // What this gateway has counted just now is counted.
    if let Err(why) = drift.flush((gateway.clock)()).await {
        notes.push(format!("the newest counts of this gateway are missing: {why}"));
    }
    let window = snapshot::read(&drift.store, &drift.root, &asked.version, from, to).await;
    let mut window = window.map_err(|error| Failure::unavailable("the counts cannot be read", &error))?;
    if !window.damaged.is_empty() {
        notes.push(format!("some counts cannot be read and are left out: {}", window.damaged.join("; ")));
    }
    let arm = match window.arms.remove(&asked.arm) {
        Some(arm) => arm,
        None if window.arms.is_empty() => Arm::default(),
        None => {
            let known = window.arms.keys().map(String::as_str);
            return Err(Failure::invalid(not_known("arm in this window:", &asked.arm, known)));
        }
    };
    check_features(&asked.features, &profiles)?;
    let state = gateway.registry.state();
    let project = state.project(gateway.project.as_str());
    let record = project.and_then(|project| project.model(&model, ModelVersion(number)));
    let importances = record.map(|record| record.model.importances.clone()).unwrap_or_default();
    let mut answer = answer(&asked, profiles, importances, arm, (from, to), notes).await?;
    let deployments = project.into_iter().flat_map(|project| &project.deployments);
    let mut rollouts = deployments.filter(|(name, _)| name.as_str() == &*model);
    let rollout = rollouts.find_map(|(_, deployment)| deployment.rollout.as_ref());
    if let Some(rollout) = rollout.filter(|rollout| rollout.version.0 == number) {
        let acknowledged = rollout.acknowledged.iter().map(|(feature, fact)| {
            let (who, at, why) = (fact.who.clone(), fact.at.to_rfc3339(), fact.why.clone());
            (feature.clone(), Acknowledged { who, at, why })
        });
        answer.acknowledged = acknowledged.collect();
    }
    Ok(answer)
}

fn check_features(features: &[String], profiles: &VersionProfiles) -> Result<(), Failure> {
    let names = || all(profiles).map(|feature| feature.name.as_str());
    match features.iter().find(|name| !names().any(|known| known == name.as_str())) {
        Some(unknown) => Err(Failure::unknown("feature or output", unknown, names())),
        None => Ok(()),
    }
}

fn all(profiles: &VersionProfiles) -> impl Iterator<Item = &FeatureProfile> {
    profiles.features.features.iter().chain(profiles.outputs.iter().flat_map(|outputs| &outputs.features))
}

async fn answer(
    asked: &Asked,
    profiles: Arc<VersionProfiles>,
    importances: BTreeMap<String, f64>,
    arm: Arm,
    window: (Micros, Micros),
    mut notes: Vec<String>,
) -> Result<Answer, Failure> {
    if let Some(why) = &profiles.outputs_why {
        notes.push(format!("outputs are not judged: {why}"));
    }
    if !profiles.features.exact {
        notes.push("the training set was too large to be counted whole: bins hold a sample of it".to_owned());
    }
    let uncounted: u64 = arm.uncounted.values().sum();
    if uncounted > 0 {
        let causes = arm.uncounted.iter().map(|(cause, rows)| format!("{rows} {cause}"));
        notes
            .push(format!("{uncounted} rows were answered and not counted: {}", causes.collect::<Vec<_>>().join(", ")));
    }
    let Arm { rows, uncounted, features, outputs } = arm;
    let (wanted, with) = (asked.features.clone(), asked.histograms);
    let against = format!("dataset {}", profiles.dataset);
    let work = move || {
        let nothing: Vec<Counts> = all(&profiles).map(|feature| Counts::new(feature.profile.layout())).collect();
        let of_features = profiles.features.features.iter().map(|feature| (feature, features.get(&feature.name)));
        let of_outputs = profiles.outputs.iter().flat_map(|known| &known.features);
        let of_outputs = of_outputs.map(|output| (output, outputs.get(&output.name)));
        let pairs = of_features.chain(of_outputs).zip(&nothing).map(|((feature, counts), nothing)| {
            // Nothing was served: that is not enough, and no mistake.
            (feature, Some(counts.unwrap_or(nothing)))
        });
        let pairs: Vec<Pair<'_>> =
            pairs.filter(|(feature, _)| wanted.is_empty() || wanted.contains(&feature.name)).collect();
        let (report, left_out) = judged(&Policy::default(), &pairs, &importances)?;
        let drawn = match with {
            true => pairs
                .iter()
                .flat_map(|(feature, counts)| counts.map(|counts| histograms(feature, counts)))
                .flatten()
                .collect(),
            false => Vec::new(),
        };
        Ok((report, left_out, drawn))
    };
    let _turn = JUDGING.acquire().await.map_err(|_| Failure::new(Kind::Unavailable, "the server is shutting down"))?;
    let worked = tokio::task::spawn_blocking(work).await;
    let worked: Result<(Report, Vec<String>, Vec<Histogram>), drift::DriftError> =
        worked.map_err(|error| Failure::internal("judging ended early", &error))?;
    let (report, left_out, drawn) =
        worked.map_err(|error| Failure::internal("the window could not be judged", &error))?;
    if !left_out.is_empty() {
        notes.push(format!("counted over bins of an earlier profile, and not judged: {}", left_out.join(", ")));
    }
    let shown = |time: Micros| {
        DateTime::from_timestamp_micros(time).unwrap_or_default().to_rfc3339_opts(SecondsFormat::Secs, true)
    };
    let (model, version) = &asked.version;
    Ok(Answer {
        of: format!("{model} version {version}, arm {}", asked.arm),
        against,
        version: *version,
        arm: asked.arm.clone(),
        from: shown(window.0),
        to: shown(window.1),
        rows,
        uncounted,
        verdict: report.verdict,
        acknowledged: BTreeMap::new(),
        notes,
        report,
        histograms: drawn,
        window,
    })
}

/// The verdicts of the last whole window, as far as they were judged.
#[derive(Default)]
pub(super) struct Judged {
    from: Micros,
    /// Nothing more comes in.
    is_final: bool,
}

/// Judges the last whole window of every version and arm, and tells metrics.
pub(super) async fn judge_window(gateway: &Arc<Gateway>, drift: &Arc<Drift>, judged: &mut Judged) {
    let now = (gateway.clock)();
    let to = floor_to(now, WINDOW);
    let from = to.saturating_sub(WINDOW);
    if judged.from == from && judged.is_final {
        return;
    }
    let served = gateway.served();
    let versions = served.versions.iter().flat_map(|(name, versions)| {
        let ready = versions.iter().filter(|(_, version)| version.state.ready.is_some());
        ready.map(move |(number, _)| (Arc::<str>::from(name.as_str()), *number))
    });
    let mut told = Vec::new();
    let mut whole = true;
    for version in versions.collect::<Vec<Version>>() {
        let Some(profiles) = profiles::of_version(gateway, drift, &version).await else { continue };
        let window: Window = match snapshot::read(&drift.store, &drift.root, &version, from, to).await {
            Ok(window) => window,
            Err(error) => {
                tracing::warn!(%error, model = &*version.0, version = version.1, "drift could not be judged");
                whole = false;
                continue;
            }
        };
        for (arm, counts) in window.arms {
            let asked = Asked { version: version.clone(), arm, from, to, features: Vec::new(), histograms: false };
            match answer(&asked, profiles.clone(), BTreeMap::new(), counts, (from, to), Vec::new()).await {
                Ok(answer) => told.extend(tell(&answer, &version)),
                Err(failure) => {
                    tracing::warn!(error = failure.message, model = &*version.0, "drift could not be judged");
                    whole = false;
                }
            }
        }
    }
    drift.metrics.judged(told);
    *judged = Judged { from, is_final: whole && now > to + LATE };
}

fn tell(answer: &Answer, version: &Version) -> Vec<Told> {
    let drifted: Vec<&str> = answer
        .report
        .features
        .iter()
        .filter(|feature| feature.verdict == Verdict::Drift)
        .map(|feature| feature.name.as_str())
        .collect();
    if !drifted.is_empty() {
        tracing::warn!(
            model = &*version.0,
            version = version.1,
            arm = answer.arm,
            from = answer.from,
            features = drifted.join(", "),
            "what is served has drifted from what was trained on; see `coeval drift show`"
        );
    }
    let features = answer.report.features.iter().map(|feature| {
        let beyond =
            feature.distances.iter().filter_map(|distance| distance.gate()).any(|gate| gate.value >= gate.floor);
        Told {
            model: version.0.to_string(),
            version: version.1,
            arm: answer.arm.clone(),
            feature: feature.name.clone(),
            verdict: match feature.verdict {
                Verdict::Stable => 0,
                Verdict::InsufficientData => 1,
                Verdict::Drift => 2,
            },
            effect: if beyond { feature.effect() } else { 0.0 },
        }
    });
    features.collect()
}
