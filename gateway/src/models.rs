//! How the models of this gateway are: for probes, for people, and for itself, again and again.

use std::sync::Arc;
use std::time::Duration;

use registry::deployment::Standing;
use serde::Serialize;

use crate::answer::Gateway;
use crate::follow::{Served, Version};
use crate::status::Failure;

/// A model, with every version that the log wants here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ModelHealth {
    pub model: String,
    /// What answers requests that name no version, on this gateway.
    pub champion: Option<u32>,
    pub versions: Vec<VersionHealth>,
}

/// Whether a version answers here, and how well it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VersionHealth {
    pub version: u32,
    /// `preparing`, `active`, `previous` or `champion`.
    pub state: &'static str,
    pub ready: bool,
    /// It answers, though not everything as it should.
    pub degraded: bool,
    pub reasons: Vec<String>,
    pub notes: Vec<String>,
    pub max_rows: usize,
    pub memory_bytes: u64,
}

fn health(number: u32, version: &Version) -> VersionHealth {
    let state = &version.state;
    let mut reasons: Vec<String> = state.failure.iter().map(|failure| failure.message.clone()).collect();
    if state.loading {
        reasons.push("it is being loaded".to_owned());
    }
    let mut is_up = version.standing > Standing::Preparing && state.ready.is_some();
    let model = state.ready.as_ref();
    if let Some(model) = model {
        if let Err(error) = model.server.ready() {
            is_up = false;
            reasons.push(error.to_string());
        }
        reasons.extend(model.checks.problem());
    }
    VersionHealth {
        version: number,
        state: version.standing.name(),
        ready: is_up,
        degraded: !reasons.is_empty(),
        reasons,
        notes: model.map(|model| model.checks.notes.clone()).unwrap_or_default(),
        max_rows: model.map_or(0, |model| model.server.limits().rows_max()),
        memory_bytes: model.and_then(|model| model.server.footprint()).map_or(0, |footprint| footprint.bytes()),
    }
}

impl Served {
    pub fn model_health(&self, name: &str) -> Result<ModelHealth, Failure> {
        let Some(versions) = self.versions.get(name) else {
            // It says what there is instead.
            self.model(name, 0)?;
            let versions = Vec::new();
            return Ok(ModelHealth { model: name.to_owned(), champion: None, versions });
        };
        Ok(ModelHealth {
            model: name.to_owned(),
            champion: self.models.get(name).map(|model| model.version),
            versions: versions.iter().map(|(number, version)| health(*number, version)).collect(),
        })
    }

    pub fn version_health(&self, name: &str, number: u32) -> Result<VersionHealth, Failure> {
        match self.versions.get(name).and_then(|versions| versions.get(&number)) {
            Some(version) => Ok(health(number, version)),
            None => {
                self.model(name, number)?;
                Err(Failure::unknown("version here named", &number.to_string(), []))
            }
        }
    }
}

/// Checks every version that is served, again and again.
pub async fn check_again(gateway: &Arc<Gateway>, every: Duration) {
    let mut interval = tokio::time::interval(every);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // What is loaded was checked just now.
    interval.tick().await;
    loop {
        interval.tick().await;
        check_once(gateway).await;
    }
}

/// One round over all versions, one after the other: it is to be noticed by nobody.
pub async fn check_once(gateway: &Gateway) {
    let models: Vec<_> = gateway.served().loaded().cloned().collect();
    for model in models.iter().filter(|model| !model.checks.is_empty()) {
        let before = model.checks.problem();
        let round = model.checks.round(&model.server).await;
        gateway.metrics.golden_checked(&model.name, model.version, round.name());
        match (before, model.checks.problem()) {
            (None, Some(problem)) => {
                tracing::error!(model = %model.name, version = model.version, problem, "a check fails");
            }
            (Some(_), None) => tracing::info!(model = %model.name, version = model.version, "its checks pass again"),
            _ => {}
        }
    }
}
