//! The registry: which definitions, datasets, model versions and deployments there are, who made them so, and when.
//!
//! All of it is the fold of one control log on object storage (`log`), so that gateways need no database, nobody's change
//! is lost, and the log itself is the audit trail. `state` holds the rules, pure; `Registry` is the shell around them that
//! reads, judges and appends. This crate knows no status code and opens no socket, and time is what the caller's clock
//! says.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use object_store::ObjectStore;
use object_store::path::Path;
use thiserror::Error;
use tokio::sync::{Mutex, watch};

pub mod id;

pub mod log;
pub mod state;

pub mod assignment;
pub mod dataset;
pub mod deployment;
pub mod flags;
pub mod forgotten;
pub mod gateways;
pub mod model;
pub mod rollout;
pub mod snapshot;
pub mod store;

use gateways::Gateways;
use id::{EntryId, EntryNumber, ModelVersion, ProjectName};
use log::{Append, ControlLog, Draft, Entry, LogError};
use model::Artifacts;
use state::{Catalog, Change, Judgement, Refusal, State};

/// How often a change is judged again after somebody else was faster. Every conflict means that another change went in, so
/// whoever comes to this bound faces a flood, not bad luck.
const TRIES_MAX: usize = 64;

/// Entries are folded in pieces of this size, and the state is published after each.
const FOLD_BATCH: usize = 256;

/// Where times of entries come from.
pub type Clock = Arc<dyn Fn() -> DateTime<Utc> + Send + Sync>;

/// What became of a change that was not refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Appended,
    /// The state was already as the change would have made it; nothing was written.
    AlreadySo,
}

#[derive(Debug, Clone)]
pub struct Receipt {
    pub outcome: Outcome,
    /// The entry that makes it so: the new one, or the one that did it before.
    pub entry: EntryNumber,
    /// The version that was registered or deployed; `None` for other changes.
    pub version: Option<ModelVersion>,
    /// A state that holds the change.
    pub state: Arc<State>,
}

#[derive(Debug, Error)]
pub enum RegistryError {
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("a change to `{project}` does not say who makes it; name the author")]
    Unsigned { project: ProjectName },
    #[error("the change to `{project}` met {tries} other changes in a row; try again when fewer are made at once")]
    Contended { project: ProjectName, tries: usize },
    #[error(
        "the change is recorded as entry {entry}, but the log could not be read back; it takes effect when the store answers again"
    )]
    Unread {
        entry: EntryNumber,
        #[source]
        source: Box<RegistryError>,
    },
    #[error("control log entry {entry} does not hold definitions; ask for the entry of an `apply`")]
    NotDefinitions { entry: EntryNumber },
}

impl RegistryError {
    /// Whether the same call may succeed later without anybody mending anything.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Log(error) => error.is_retryable(),
            Self::Contended { .. } => true,
            Self::Refused(_) | Self::Unsigned { .. } | Self::Unread { .. } | Self::NotDefinitions { .. } => false,
        }
    }
}

/// The control log together with its fold in memory. Cheap to share behind an `Arc`; when the store is away, `state` still
/// answers with the last fold.
pub struct Registry {
    log: ControlLog,
    artifacts: Artifacts,
    gateways: Gateways,
    root: Path,
    clock: Clock,
    /// Written by `refresh` only, while it holds `folding`.
    state: watch::Sender<Arc<State>>,
    folding: Mutex<Folding>,
    /// Changes of one process go one after the other; between processes the log decides.
    submitting: Mutex<()>,
}

/// Whether the fold in memory is known to be of the log in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Folding {
    OfTheLog,
    /// It was kept elsewhere while the store was away.
    Kept,
}

impl Registry {
    /// Reads the newest snapshot and the entries after it. Fails when the store is away, or the log is damaged.
    pub async fn open(store: Arc<dyn ObjectStore>, prefix: &Path, clock: Clock) -> Result<Self, RegistryError> {
        let log = ControlLog::new(store.clone(), prefix);
        let state = snapshot::load(&log).await?;
        // Following the log cannot tell a hole from the end, so holes are looked for once, here.
        log.head_after(state.head).await?;
        let registry = Self::with(store, prefix, clock, state, Folding::OfTheLog);
        registry.refresh().await?;
        Ok(registry)
    }

    /// As `open`; but where the store is away, it begins with the fold that `keep` has given before, so that a process which
    /// restarts meanwhile serves what it served. The error then says why. The first `refresh` that reaches the store looks
    /// whether the fold is of the log there, and folds the log anew where it is not.
    pub async fn open_or_kept(
        store: Arc<dyn ObjectStore>,
        prefix: &Path,
        clock: Clock,
        kept: Option<&[u8]>,
    ) -> Result<(Self, Option<RegistryError>), RegistryError> {
        let away = match (Self::open(store.clone(), prefix, clock.clone()).await, kept) {
            (Ok(registry), _) => return Ok((registry, None)),
            (Err(error), Some(_)) if error.is_retryable() => error,
            (Err(error), _) => return Err(error),
        };
        match kept.map(snapshot::decode) {
            Some(Ok(state)) => Ok((Self::with(store, prefix, clock, state, Folding::Kept), Some(away))),
            Some(Err(reason)) => {
                tracing::warn!(reason, "the fold that was kept cannot be used");
                Err(away)
            }
            None => Err(away),
        }
    }

    fn with(store: Arc<dyn ObjectStore>, prefix: &Path, clock: Clock, state: State, folding: Folding) -> Self {
        Self {
            log: ControlLog::new(store.clone(), prefix),
            artifacts: Artifacts::new(store.clone(), prefix),
            gateways: Gateways::new(store, prefix),
            root: prefix.clone(),
            clock,
            state: watch::Sender::new(Arc::new(state)),
            folding: Mutex::new(folding),
            submitting: Mutex::new(()),
        }
    }

    /// The last fold as bytes for `open_or_kept`: to be kept outside of the store, for the time when it is away.
    pub fn keep(&self) -> Result<Vec<u8>, RegistryError> {
        let state = self.state();
        snapshot::encode(&state)
            .map_err(|error| LogError::Corrupt { object: self.log.path(state.head), reason: error.to_string() }.into())
    }

    /// The last fold. Never waits.
    pub fn state(&self) -> Arc<State> {
        self.state.borrow().clone()
    }

    /// Tells of every new state.
    pub fn subscribe(&self) -> watch::Receiver<Arc<State>> {
        self.state.subscribe()
    }

    pub fn log(&self) -> &ControlLog {
        &self.log
    }

    pub fn artifacts(&self) -> &Artifacts {
        &self.artifacts
    }

    pub fn gateways(&self) -> &Gateways {
        &self.gateways
    }

    /// Below which the project keeps everything on the object store.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Folds what others have appended; one small request when there is nothing. On an error the state stays at the last
    /// entry that could be folded.
    pub async fn refresh(&self) -> Result<Arc<State>, RegistryError> {
        let mut folding = self.folding.lock().await;
        if *folding == Folding::Kept {
            if !snapshot::is_of(&self.log, &self.state()).await? {
                tracing::warn!("the fold that was kept is not of this log; folding the log anew");
                self.state.send_replace(Arc::new(snapshot::load(&self.log).await?));
            }
            self.log.head_after(self.state().head).await?;
            *folding = Folding::OfTheLog;
        }
        let mut due = None;
        let folded = self.fold_new_entries(&mut due).await;
        if let Some(state) = due
            && let Err(error) = snapshot::write(&self.log, &state).await
        {
            // A start without it takes longer, and that is all.
            tracing::warn!(error = %error, number = %state.head, "could not write a control log snapshot");
        }
        folded?;
        Ok(self.state())
    }

    /// `due` becomes the last fold that is to be written as a snapshot; while catching up over many only that one is worth
    /// writing.
    async fn fold_new_entries(&self, due: &mut Option<Arc<State>>) -> Result<(), RegistryError> {
        loop {
            let before = self.state();
            let entries = self.log.read_from(before.head.next(), FOLD_BATCH).await?;
            if entries.is_empty() {
                return Ok(());
            }
            let mut state = State::clone(&before);
            let mut failure = None;
            for entry in &entries {
                if let Err(error) = state.apply(entry) {
                    let object = self.log.path(entry.number);
                    failure = Some(LogError::Corrupt { object, reason: error.to_string() });
                    break;
                }
                if snapshot::is_due(&state) {
                    *due = Some(Arc::new(state.clone()));
                }
            }
            if state.head != before.head {
                self.state.send_replace(Arc::new(state));
            }
            if let Some(failure) = failure {
                return Err(failure.into());
            }
            if entries.len() < FOLD_BATCH {
                return Ok(());
            }
        }
    }

    /// Fails when the entry that the fold ends with is not in the store any more.
    pub async fn look_for_head(&self) -> Result<(), RegistryError> {
        let state = self.state();
        if snapshot::is_of(&self.log, &state).await? {
            return Ok(());
        }
        Err(LogError::Gone { object: self.log.path(state.head) }.into())
    }

    /// Makes a change: judged on the newest state, appended, and judged again whenever somebody else was faster.
    pub async fn submit(
        &self,
        project: &ProjectName,
        change: &Change,
        who: &str,
        why: Option<&str>,
    ) -> Result<Receipt, RegistryError> {
        if who.trim().is_empty() {
            return Err(RegistryError::Unsigned { project: project.clone() });
        }
        let _submitting = self.submitting.lock().await;
        let id = EntryId::random();
        for _ in 0..TRIES_MAX {
            let state = self.refresh().await?;
            let (kind, must_understand, body, version) = match state.judge(project, change)? {
                Judgement::AlreadySo { entry, version } => {
                    return Ok(Receipt { outcome: Outcome::AlreadySo, entry, version, state });
                }
                Judgement::Append { kind, must_understand, body, version } => (kind, must_understand, body, version),
            };
            let draft = Draft {
                id: id.clone(),
                at: (self.clock)(),
                project: project.clone(),
                who: who.to_owned(),
                why: why.map(str::to_owned),
                must_understand,
                kind: kind.to_owned(),
                body,
            };
            match self.log.append(&draft, state.head).await? {
                Append::Appended(entry) => {
                    let state = self
                        .refresh()
                        .await
                        .map_err(|source| RegistryError::Unread { entry, source: Box::new(source) })?;
                    return Ok(Receipt { outcome: Outcome::Appended, entry, version, state });
                }
                Append::Conflict { .. } => {}
            }
        }
        Err(RegistryError::Contended { project: project.clone(), tries: TRIES_MAX })
    }

    /// The definitions of an earlier `apply`, by which a version that was trained on them is served.
    pub async fn catalog(&self, entry: EntryNumber) -> Result<Catalog, RegistryError> {
        let found = self.log.read(entry).await?.ok_or(RegistryError::NotDefinitions { entry })?;
        match state::catalog_of(&found) {
            Ok(Some(catalog)) => Ok(catalog),
            Ok(None) => Err(RegistryError::NotDefinitions { entry }),
            Err(error) => Err(LogError::Corrupt { object: self.log.path(entry), reason: error.to_string() }.into()),
        }
    }

    /// The audit trail: entries from `first` on, at most `entries_max`.
    pub async fn history(&self, first: EntryNumber, entries_max: usize) -> Result<Vec<Entry>, RegistryError> {
        Ok(self.log.read_from(first, entries_max).await?)
    }
}

#[cfg(test)]
mod tests;
