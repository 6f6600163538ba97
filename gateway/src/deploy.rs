//! Deploys in two phases, and the changes that move traffic.
//!
//! The gateway that is asked appends that a version is to be prepared, waits for every live gateway, and appends how it ended.
//! It goes on when the caller goes away, because everybody else has begun by then; if it ends itself, the others give the deploy
//! up. Traffic moves by one entry, which every gateway follows within its next look at the log.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use proto::v1;
use registry::deployment::{Activate, DeploymentChange, DeploymentError, GiveUp, Prepare};
use registry::gateways::{Report, ReportedState, VersionReport};
use registry::id::{EntryNumber, Incarnation, ModelName, ModelVersion, NameError};
use registry::state::{Change, Refusal};
use registry::{Outcome, Receipt, RegistryError};

use crate::answer::Gateway;
use crate::follow::Retry;
use crate::roles::Role;
use crate::rollout;
use crate::status::{Failure, Kind};
use crate::versions::Key;

/// How long gateways may take to prepare a version, measuring and the turn of other versions included.
const PREPARE_MAX: Duration = Duration::from_secs(600);
/// Between looks at other gateways while they are waited for.
const LOOK_AGAIN: Duration = Duration::from_millis(150);
/// Texts of a record are names, digests and words, not files.
const TEXT_BYTES_MAX: usize = 64 << 10;

/// Who asks for a change, and why.
pub struct Asked<'a> {
    pub who: &'a str,
    pub why: Option<&'a str>,
}

pub fn asked<'a>(gateway: &Gateway, project: &str, who: &'a str, why: &'a str) -> Result<Asked<'a>, Failure> {
    gateway.check_project(project)?;
    if who.len() > TEXT_BYTES_MAX || why.len() > TEXT_BYTES_MAX {
        return Err(Failure::invalid(format!("`who` and `why` take at most {TEXT_BYTES_MAX} bytes")));
    }
    Ok(Asked { who, why: Some(why).filter(|why| !why.is_empty()) })
}

pub fn named(model: &str) -> Result<ModelName, Failure> {
    model.parse().map_err(|error: NameError| Failure::invalid(error.to_string()))
}

pub fn version_named(model: &str, version: u32) -> Result<Key, Failure> {
    if version == 0 {
        return Err(Failure::invalid("the request names no version; versions begin at 1"));
    }
    Ok((named(model)?, ModelVersion(version)))
}

async fn submit(gateway: &Gateway, change: DeploymentChange, asked: &Asked<'_>) -> Result<Receipt, Failure> {
    Ok(gateway.registry.submit(&gateway.project, &Change::Deployment(change), asked.who, asked.why).await?)
}

/// Refuses what the log would refuse, before anything is done for it. Says whether it is so already.
fn judge(gateway: &Gateway, change: &DeploymentChange) -> Result<bool, Failure> {
    let state = gateway.registry.state();
    let judged = state.judge(&gateway.project, &Change::Deployment(change.clone())).map_err(RegistryError::from)?;
    Ok(matches!(judged, registry::state::Judgement::AlreadySo { .. }))
}

/// The champion and what a rollback goes back to; 0 stands for none.
fn traffic(gateway: &Gateway, model: &ModelName) -> (u32, u32) {
    let state = gateway.registry.state();
    let deployment = state.project(gateway.project.as_str()).and_then(|project| project.deployments.get(model));
    let number = |version: Option<ModelVersion>| version.map_or(0, |version| version.0);
    let champion = number(deployment.and_then(|deployment| deployment.champion_version()));
    (champion, number(deployment.and_then(|deployment| deployment.previous_version())))
}

pub async fn deploy(
    gateway: Arc<Gateway>,
    request: v1::DeployModelRequest,
) -> Result<v1::DeployModelResponse, Failure> {
    let v1::DeployModelRequest { project, model, version, who, why } = &request;
    let asked = asked(&gateway, project, who, why)?;
    let key = version_named(model, *version)?;
    let (name, number) = key.clone();
    gateway.check_role(Role::Gateway, "models are not loaded, so not deployed, here")?;
    let _deploying = gateway.deploying.lock().await;
    gateway.follower.follow(Retry::Later).await;
    let by = gateway.presence.incarnation.clone();
    let prepare = DeploymentChange::Prepare(Prepare { model: name.clone(), version: number, by });
    let existed = judge(&gateway, &prepare)?;
    if !existed {
        can_run(&gateway, &key).await?;
        let receipt = submit(&gateway, prepare, &asked).await?;
        if receipt.outcome == Outcome::Appended {
            finish(&gateway, &asked, &key, receipt.entry).await?;
        }
    }
    gateway.follower.follow(Retry::Later).await;
    let reports = reports(&gateway, &gateway.presence.others(), &key);
    let mut notes: Vec<String> = reports.iter().flat_map(|report| report.notes.iter().cloned()).collect();
    notes.sort();
    notes.dedup();
    let (champion, _) = traffic(&gateway, &name);
    tracing::info!(model = %name, version = number.0, who, existed, "a version is active");
    Ok(v1::DeployModelResponse { version: number.0, champion, existed, notes, gateways: reports })
}

/// Refuses here what no gateway of this build could run, rather than let all of them try.
async fn can_run(gateway: &Gateway, (name, version): &Key) -> Result<(), Failure> {
    let state = gateway.registry.state();
    let record = state.project(gateway.project.as_str()).and_then(|project| project.model(name.as_str(), *version));
    let record = record.ok_or_else(|| Failure::invalid("the version is not registered"))?;
    let plan = gateway.follower.plan_for(record).await?;
    gateway.follower.versions.check(&plan).map(|_| ())
}

/// Waits for every gateway, and writes down how it ended.
async fn finish(gateway: &Gateway, asked: &Asked<'_>, key: &Key, prepare: EntryNumber) -> Result<(), Failure> {
    let (model, version) = key.clone();
    let gathered = tokio::select! {
        gathered = tokio::time::timeout(PREPARE_MAX, gather(gateway, key, prepare)) => gathered,
        () = gateway.drain.cancelled() => {
            let reason = "the gateway that began the deploy is shutting down".to_owned();
            Ok(Err(BTreeMap::from([(gateway.presence.incarnation.clone(), reason)])))
        }
    };
    let reasons = match gathered {
        Ok(Ok(())) => {
            let activate = DeploymentChange::Activate(Activate { model, version, prepare });
            return submit(gateway, activate, asked).await.map(|_| ());
        }
        Ok(Err(reasons)) => reasons,
        Err(_) => unready(gateway, key, prepare),
    };
    let listed = listed(gateway, &reasons);
    let give_up = GiveUp { model: model.clone(), version, prepare, reasons };
    submit(gateway, DeploymentChange::GiveUp(give_up), asked).await?;
    gateway.follower.follow(Retry::Later).await;
    let text = format!(
        "version {version} of model `{model}` is not deployed, and nothing that answers requests has changed: {listed}"
    );
    Err(Failure::new(Kind::Precondition, text))
}

/// One reason alone needs no gateway's name where there is only one gateway.
fn listed(gateway: &Gateway, reasons: &BTreeMap<Incarnation, String>) -> String {
    let own = &gateway.presence.incarnation;
    if reasons.len() == 1 && gateway.presence.others().is_empty() {
        return reasons.values().cloned().collect();
    }
    let others = gateway.presence.others();
    let named = |incarnation: &Incarnation| {
        let address = others.iter().find(|report| report.incarnation == *incarnation).map(|report| &report.address);
        match address {
            _ if incarnation == own => "this gateway".to_owned(),
            Some(address) => format!("gateway {incarnation} at {address}"),
            None => format!("gateway {incarnation}"),
        }
    };
    let reasons = reasons.iter().map(|(incarnation, reason)| format!("{}: {reason}", named(incarnation)));
    reasons.collect::<Vec<_>>().join("; ")
}

/// Returns when every live gateway has the version, or one of them cannot have it.
async fn gather(gateway: &Gateway, key: &Key, prepare: EntryNumber) -> Result<(), BTreeMap<Incarnation, String>> {
    let presence = &gateway.presence;
    gateway.follower.follow(Retry::Later).await;
    let mut served = gateway.follower.subscribe();
    loop {
        served.borrow_and_update();
        match answer(presence.own_version(key).as_ref(), prepare) {
            Answer::Ready => break,
            Answer::Failed(reason) => return Err(BTreeMap::from([(presence.incarnation.clone(), reason)])),
            Answer::Waiting => {}
        }
        // The state is put in place a moment after the version is there; neither is missed for long.
        let _ = tokio::time::timeout(LOOK_AGAIN, served.changed()).await;
    }
    loop {
        // A listing after the entry: whoever is not in it reads the entry when it starts.
        if presence.look().await.is_ok() {
            let others = presence.others();
            let answers = others.iter().map(|report| (report, answer(report.version(&key.0, key.1), prepare)));
            let answers: Vec<(&Report, Answer)> = answers.collect();
            let failed = answers.iter().filter_map(|(report, answer)| match answer {
                Answer::Failed(reason) => Some((report.incarnation.clone(), reason.clone())),
                _ => None,
            });
            let failed: BTreeMap<Incarnation, String> = failed.collect();
            if !failed.is_empty() {
                return Err(failed);
            }
            if answers.iter().all(|(_, answer)| matches!(answer, Answer::Ready)) {
                return Ok(());
            }
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

enum Answer {
    Waiting,
    Ready,
    Failed(String),
}

/// What a gateway says of this attempt. What it said of an earlier one does not count.
fn answer(report: Option<&VersionReport>, prepare: EntryNumber) -> Answer {
    match report.filter(|report| report.wanted_by == prepare) {
        Some(report) => match report.state {
            ReportedState::Ready => Answer::Ready,
            ReportedState::Failed => Answer::Failed(report.reason.clone()),
            ReportedState::Loading | ReportedState::Unknown => Answer::Waiting,
        },
        None => Answer::Waiting,
    }
}

/// Who has not said that it is ready, after all the time there was.
fn unready(gateway: &Gateway, key: &Key, prepare: EntryNumber) -> BTreeMap<Incarnation, String> {
    let presence = &gateway.presence;
    let others = presence.others();
    let others = others.iter().map(|report| (report.incarnation.clone(), report.version(&key.0, key.1).cloned()));
    let all = others.chain([(presence.incarnation.clone(), presence.own_version(key))]);
    let late = all.filter(|(_, report)| !matches!(answer(report.as_ref(), prepare), Answer::Ready));
    let reason = format!("it was not ready after {} s", PREPARE_MAX.as_secs());
    late.map(|(incarnation, _)| (incarnation, reason.clone())).collect()
}

/// What this gateway and the others last said of a version. One that has not heard of it is left out.
pub fn reports(gateway: &Gateway, others: &[Report], key: &Key) -> Vec<v1::GatewayVersion> {
    let presence = &gateway.presence;
    let own = presence.own_version(key).map(|report| shown(presence.incarnation.to_string(), String::new(), report));
    let others = others.iter().filter_map(|report| {
        Some(shown(report.incarnation.to_string(), report.address.clone(), report.version(&key.0, key.1)?.clone()))
    });
    own.into_iter().chain(others).collect()
}

fn shown(gateway: String, address: String, report: VersionReport) -> v1::GatewayVersion {
    v1::GatewayVersion {
        gateway,
        address,
        state: match report.state {
            ReportedState::Loading => "loading",
            ReportedState::Ready => "ready",
            ReportedState::Failed => "failed",
            ReportedState::Unknown => "unknown",
        }
        .to_owned(),
        reason: report.reason,
        notes: report.notes,
        memory_bytes: report.memory_bytes,
        max_rows: u32::try_from(report.max_rows).unwrap_or(u32::MAX),
    }
}

pub async fn promote(gateway: &Gateway, request: &v1::PromoteModelRequest) -> Result<v1::TrafficResponse, Failure> {
    let v1::PromoteModelRequest { project, model, version, who, why } = request;
    let asked = asked(gateway, project, who, why)?;
    gateway.check_role(Role::Gateway, "models are not loaded, so not promoted, here")?;
    let key = version_named(model, *version)?;
    let (name, number) = key.clone();
    gateway.follower.follow(Retry::Later).await;
    let (before, _) = traffic(gateway, &name);
    let from = Some(ModelVersion(before)).filter(|from| from.0 > 0);
    let change = DeploymentChange::Promote { model: name.clone(), version: number, from };
    if !judge(gateway, &change)? {
        all_have(gateway, &key).await?;
        submit(gateway, change, &asked).await?;
    }
    moved(gateway, &name, before, who).await
}

/// A version that is active may still be missing on a gateway that has started since, or be broken there.
pub async fn all_have(gateway: &Gateway, key: &Key) -> Result<(), Failure> {
    let presence = &gateway.presence;
    let looked = presence.look().await;
    looked.map_err(|error| Failure::unavailable("the other gateways cannot be asked", &error))?;
    let others = presence.others();
    let others = others.iter().map(|report| (&report.incarnation, report.version(&key.0, key.1).cloned()));
    let own = presence.own_version(key);
    for (incarnation, report) in std::iter::once((&presence.incarnation, own)).chain(others) {
        let why = match report {
            Some(report) if report.state == ReportedState::Ready => continue,
            Some(report) if report.state == ReportedState::Failed => report.reason,
            _ => "it is still being loaded".to_owned(),
        };
        let text = format!(
            "version {} of model `{}` is not ready on gateway {incarnation}, so the traffic stays where it is: {why}",
            key.1, key.0
        );
        return Err(Failure::new(Kind::Precondition, text));
    }
    Ok(())
}

pub async fn rollback(gateway: &Gateway, request: &v1::RollbackModelRequest) -> Result<v1::TrafficResponse, Failure> {
    let v1::RollbackModelRequest { project, model, who, why } = request;
    let asked = asked(gateway, project, who, why)?;
    let name = named(model)?;
    gateway.follower.follow(Retry::Later).await;
    let (before, previous) = traffic(gateway, &name);
    let state = gateway.registry.state();
    let project = state.project(gateway.project.as_str());
    let running = project.and_then(|project| project.deployments.get(&name)?.rollout.clone());
    if let Some(running) = running {
        // The traffic that the version has goes back to the champion; a second rollback would be to the one before.
        rollout::control::end(gateway, &name, &running, &asked).await?;
        let answer = moved(gateway, &name, before, who).await?;
        return Ok(v1::TrafficResponse { ended: running.version.0, ..answer });
    }
    if previous == 0 {
        let refusal = Refusal::from(DeploymentError::NoPrevious { model: name });
        return Err(RegistryError::from(refusal).into());
    }
    let (from, to) = (ModelVersion(before), ModelVersion(previous));
    submit(gateway, DeploymentChange::Rollback { model: name.clone(), from, to }, &asked).await?;
    moved(gateway, &name, before, who).await
}

async fn moved(gateway: &Gateway, model: &ModelName, before: u32, who: &str) -> Result<v1::TrafficResponse, Failure> {
    gateway.follower.follow(Retry::Later).await;
    let (champion, previous) = traffic(gateway, model);
    tracing::info!(%model, champion, before, who, "traffic is where it is to be");
    Ok(v1::TrafficResponse { champion, before, previous, ended: 0 })
}

pub async fn retire(gateway: &Gateway, request: &v1::RetireModelRequest) -> Result<v1::RetireModelResponse, Failure> {
    let v1::RetireModelRequest { project, model, version, force, who, why } = request;
    let asked = asked(gateway, project, who, why)?;
    let (model, version) = version_named(model, *version)?;
    let change = DeploymentChange::Retire { model, version, previous_too: *force };
    let receipt = submit(gateway, change, &asked).await?;
    gateway.follower.follow(Retry::Later).await;
    Ok(v1::RetireModelResponse { control_entry: receipt.entry.0 })
}

pub async fn approve(
    gateway: &Gateway,
    request: &v1::ApproveModelRequest,
) -> Result<v1::ApproveModelResponse, Failure> {
    let v1::ApproveModelRequest { project, model, version, who, why } = request;
    let asked = asked(gateway, project, who, why)?;
    let (model, version) = version_named(model, *version)?;
    let receipt = submit(gateway, DeploymentChange::Approve { model, version }, &asked).await?;
    Ok(v1::ApproveModelResponse { control_entry: receipt.entry.0 })
}
