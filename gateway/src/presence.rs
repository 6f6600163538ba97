//! This gateway among the others: what it says of itself on the object store, and whom it sees there.
//!
//! The first report is written before the control log is first read. So whoever appends an entry and then looks has seen
//! every gateway that might have read the log without it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use registry::Registry;
use registry::deployment::{DeploymentChange, GiveUp};
use registry::gateways::{REPORT_EVERY, Report, ReportedState, VersionReport, Watch};
use registry::id::{EntryNumber, Incarnation};
use registry::log::LogError;
use registry::state::Change;
use tokio::sync::Mutex as AsyncMutex;
use tokio_util::sync::CancellationToken;

use crate::answer::Gateway;
use crate::follow::Follower;
use crate::status::chain;
use crate::versions::{Key, VersionState};

/// How often the others are looked at while nobody waits for them.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How long a deploy goes on after the gateway that began it was last seen.
const ORPHAN_FOR: Duration = Duration::from_secs(10);
/// Who the log names for what a gateway did by itself.
const SERVER: &str = "server";

pub struct Presence {
    pub incarnation: Incarnation,
    registry: Arc<Registry>,
    follower: Arc<Follower>,
    address: String,
    epoch: Instant,
    watch: Mutex<Watch>,
    /// One report is written at a time, and none after the end.
    writing: AsyncMutex<Writing>,
}

#[derive(Default)]
struct Writing {
    counter: u64,
    started: bool,
    ended: bool,
    /// Told once, until it works again.
    failing: bool,
}

impl Presence {
    pub fn new(
        registry: Arc<Registry>,
        follower: Arc<Follower>,
        address: String,
        incarnation: Incarnation,
    ) -> Presence {
        Presence {
            incarnation,
            registry,
            follower,
            address,
            epoch: Instant::now(),
            watch: Mutex::default(),
            writing: AsyncMutex::default(),
        }
    }

    /// From now on the others wait for this gateway.
    pub async fn has_started(&self) {
        self.writing.lock().await.started = true;
        self.report().await;
    }

    /// Writes the report. While the store is away the others take this gateway for gone, which is right: it cannot follow.
    pub async fn report(&self) {
        let mut writing = self.writing.lock().await;
        if writing.ended {
            return;
        }
        writing.counter += 1;
        let report = self.made(writing.counter, writing.started);
        match self.registry.gateways().put(&report).await {
            Ok(()) => writing.failing = false,
            Err(error) if !writing.failing => {
                writing.failing = true;
                tracing::warn!(error = chain(&error), "this gateway's report could not be written");
            }
            Err(_) => {}
        }
    }

    fn made(&self, counter: u64, started: bool) -> Report {
        let versions = self.follower.versions.states();
        Report {
            counter,
            started,
            head: self.follower.served().head,
            versions: versions.iter().map(|(key, state)| version_report(key, state)).collect(),
            ..Report::first(self.incarnation.clone(), self.address.clone())
        }
    }

    /// What this gateway has of a version.
    pub fn own_version(&self, key: &Key) -> Option<VersionReport> {
        self.follower.versions.state(key).map(|state| version_report(key, &state))
    }

    /// Looks at the reports of all gateways, and removes those that are too old.
    pub async fn look(&self) -> Result<(), LogError> {
        let gateways = self.registry.gateways();
        let reports = gateways.read().await?;
        let gone = {
            let mut watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner);
            let now = self.epoch.elapsed();
            watch.observe(now, reports);
            watch.gone(now)
        };
        for incarnation in gone.into_iter().filter(|gone| *gone != self.incarnation) {
            tracing::info!(gateway = %incarnation, "a gateway is gone, and its report is removed");
            gateways.remove(&incarnation).await?;
        }
        Ok(())
    }

    /// The others that take requests, as they were last seen.
    pub fn others(&self) -> Vec<Report> {
        let watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner);
        let others = watch.alive(self.epoch.elapsed());
        others.filter(|report| report.incarnation != self.incarnation && report.started).cloned().collect()
    }

    fn is_alive(&self, incarnation: &Incarnation) -> bool {
        let watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner);
        watch.is_alive(self.epoch.elapsed(), incarnation)
    }

    /// Nobody is to wait for this gateway any more.
    pub async fn end(&self) {
        let mut writing = self.writing.lock().await;
        writing.ended = true;
        if let Err(error) = self.registry.gateways().remove(&self.incarnation).await {
            tracing::warn!(
                error = chain(&error),
                "this gateway's report could not be removed; it is ignored in a while"
            );
        }
    }
}

/// Reports, looks, and ends deploys that nobody is left to end. Until the token is cancelled.
pub async fn run(gateway: &Gateway, stop: &CancellationToken) {
    let presence = &gateway.presence;
    let report = async {
        let mut served = presence.follower.subscribe();
        loop {
            presence.report().await;
            // At once when something has changed, for whoever waits for it; and no oftener than ten times a second.
            tokio::time::sleep(REPORT_EVERY / 10).await;
            tokio::select! {
                changed = served.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(REPORT_EVERY) => {}
            }
        }
    };
    let look = async {
        let mut orphans = BTreeMap::new();
        let mut failing = false;
        loop {
            match presence.look().await {
                Ok(()) => {
                    failing = false;
                    end_orphans(gateway, &mut orphans).await;
                }
                Err(error) if !failing => {
                    failing = true;
                    tracing::warn!(error = chain(&error), "the other gateways cannot be seen");
                }
                Err(_) => {}
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = report => {}
        () = look => {}
    }
}

/// Gives up deploys whose gateway is gone. Of several gateways that notice, the log lets one write it.
async fn end_orphans(gateway: &Gateway, since: &mut BTreeMap<EntryNumber, Instant>) {
    let state = gateway.registry.state();
    let Some(project) = state.project(gateway.project.as_str()) else { return };
    let presence = &gateway.presence;
    let mut orphans = BTreeMap::new();
    for (model, deployment) in &project.deployments {
        for (version, preparing) in &deployment.preparing {
            let is_ours = preparing.by == presence.incarnation;
            let goes_on =
                if is_ours { gateway.deploying.try_lock().is_err() } else { presence.is_alive(&preparing.by) };
            if goes_on {
                continue;
            }
            let prepare = preparing.fact.entry;
            let first = since.get(&prepare).copied().unwrap_or_else(Instant::now);
            orphans.insert(prepare, first);
            if first.elapsed() < ORPHAN_FOR {
                continue;
            }
            let reason = "it is gone since it began the deploy".to_owned();
            let reasons = BTreeMap::from([(preparing.by.clone(), reason)]);
            let give_up = GiveUp { model: model.clone(), version: *version, prepare, reasons };
            let change = Change::Deployment(DeploymentChange::GiveUp(give_up));
            match gateway.registry.submit(&gateway.project, &change, SERVER, None).await {
                Ok(_) => tracing::warn!(%model, %version, "a deploy is given up: the gateway that began it is gone"),
                Err(error) => {
                    tracing::warn!(error = chain(&error), "a deploy could not be given up; it is tried again")
                }
            }
        }
    }
    *since = orphans;
}

fn version_report((model, version): &Key, state: &VersionState) -> VersionReport {
    let ready = state.ready.as_ref();
    // An attempt that failed counts, though what was loaded before still runs.
    let (reported, reason) = match (&state.failure, ready, state.loading) {
        (_, _, true) => (ReportedState::Loading, String::new()),
        (Some(failure), ..) => (ReportedState::Failed, failure.message.clone()),
        (None, Some(_), _) => (ReportedState::Ready, String::new()),
        (None, None, _) => (ReportedState::Loading, String::new()),
    };
    let footprint = ready.and_then(|model| model.server.footprint());
    let mut notes = ready.map(|model| model.checks.notes.clone()).unwrap_or_default();
    notes.extend(ready.and_then(|model| model.checks.problem()));
    VersionReport {
        model: model.clone(),
        version: *version,
        wanted_by: state.wanted_by,
        state: reported,
        reason,
        notes,
        memory_bytes: footprint.map_or(0, |footprint| footprint.bytes()),
        max_rows: ready.map_or(0, |model| model.server.limits().rows_max()),
    }
}
