//! From this machine's disk to the object store, and what has been there for long enough.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use chrono::Days;
use feature_defs::catalog::ServingLogSettings;
use feature_defs::forgotten::{from_hex, to_hex};
use feature_defs::plan::Plan;
use feature_defs::time::Micros;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions};
use offline_store::serving_log;
use tokio::sync::Notify;
use uuid::Uuid;

use super::metrics::LogMetrics;
use super::spool::{Leftover, Spool, Spooled};
use super::{Accounts, LogSetupError};
use crate::answer::Clock;
use crate::kept::put_whole;
use crate::status::chain;

const KEY: &str = "serving-log-key";
/// Uploads are tried again after this, doubled each time up to the longest.
const RETRY_FIRST: Duration = Duration::from_millis(500);
const RETRY_LONGEST: Duration = Duration::from_secs(30);
/// One upload takes no longer, or counts as failed.
const UPLOAD_WITHIN: Duration = Duration::from_secs(30);
/// The disk is looked at this often though nothing was said to have come.
const LOOK: Duration = Duration::from_secs(60);
const REMOVE_EVERY: Duration = Duration::from_secs(3_600);
/// An object store that is away for longer is a problem to be told.
const TOLD_AFTER: Duration = Duration::from_secs(60);

/// Gives the definitions in force.
pub type Definitions<'a> = dyn Fn() -> Option<Arc<Plan>> + Send + Sync + 'a;

/// Uploads what is on disk.
pub struct Uploads {
    pub(super) store: Arc<dyn ObjectStore>,
    pub(super) root: Path,
    /// Of all lives of servers on this machine.
    pub(super) folder: PathBuf,
    pub(super) spool: Arc<Spool>,
    pub(super) changed: Arc<Notify>,
    pub(super) metrics: LogMetrics,
    pub(super) accounts: Arc<Accounts>,
    pub(super) retention: Duration,
    pub(super) failing: Mutex<Option<Failing>>,
    pub(super) key: Vec<u8>,
}

/// An object store that does not take uploads.
#[derive(Debug, Clone)]
pub(super) struct Failing {
    since: Instant,
    why: String,
}

impl Uploads {
    /// Uploads until cancelled by being dropped. `plan` are the definitions in force: they say what was forgotten.
    pub async fn run(&self, clock: &Clock, plan: &Definitions<'_>) {
        let mut leftovers = self.leftovers();
        let mut wait = RETRY_FIRST;
        let mut removed: Option<Instant> = None;
        loop {
            match self.all(&mut leftovers, plan).await {
                Ok(()) => {
                    *self.failing.lock().unwrap_or_else(PoisonError::into_inner) = None;
                    wait = RETRY_FIRST;
                    if removed.is_none_or(|at| at.elapsed() >= REMOVE_EVERY) {
                        self.remove_old(clock()).await;
                        removed = Some(Instant::now());
                    }
                    let _ = tokio::time::timeout(LOOK, self.changed.notified()).await;
                }
                Err(why) => {
                    self.failed(why);
                    tokio::time::sleep(wait).await;
                    wait = (wait * 2).min(RETRY_LONGEST);
                }
            }
        }
    }

    /// Uploads what there is once, for the end. What stays on disk goes with the next start on this machine.
    pub async fn last(&self, within: Duration, plan: &Definitions<'_>) {
        let all = async { self.all(&mut Vec::new(), plan).await };
        let why = match tokio::time::timeout(within, all).await {
            Ok(Ok(())) => return self.spool.close(),
            Ok(Err(why)) => why,
            Err(_) => "the object store did not answer in time".to_owned(),
        };
        tracing::warn!(bytes = self.spool.bytes(), why, "part of the serving log stays on disk for the next start");
    }

    /// What values of sensitive columns are hashed with.
    pub fn hash_key(&self) -> &[u8] {
        &self.key
    }

    /// What somebody should know.
    pub fn problem(&self) -> Option<String> {
        let failing = self.failing.lock().unwrap_or_else(PoisonError::into_inner).clone()?;
        let age = failing.since.elapsed();
        (age > TOLD_AFTER).then(|| {
            let (bytes, lost) = (self.spool.bytes(), self.accounts.lost());
            let since = age.as_secs();
            let why = failing.why;
            format!("the serving log was not uploaded for {since} s ({why}): {bytes} bytes wait on disk, {lost} rows are lost")
        })
    }

    fn failed(&self, why: String) {
        self.metrics.upload_failed();
        let mut failing = self.failing.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *failing {
            Some(failing) => failing.why = why,
            none => {
                tracing::warn!(why, "the serving log cannot be uploaded; it waits on disk");
                *none = Some(Failing { since: Instant::now(), why });
            }
        }
    }

    fn leftovers(&self) -> Vec<Leftover> {
        Spool::leftovers(&self.folder, &self.spool).unwrap_or_else(|error| {
            tracing::warn!(folder = %self.folder.display(), %error, "what earlier servers left of the serving log cannot be read");
            Vec::new()
        })
    }

    async fn all(&self, leftovers: &mut Vec<Leftover>, plan: &Definitions<'_>) -> Result<(), String> {
        while let Some(leftover) = leftovers.last() {
            for file in leftover.waiting().map_err(|error| error.to_string())? {
                self.one(&file, plan().as_deref()).await?;
            }
            if let Some(leftover) = leftovers.pop()
                && let Err(error) = leftover.close()
            {
                tracing::warn!(%error, "an empty folder of the serving log could not be removed");
            }
        }
        for file in self.spool.waiting().map_err(|error| error.to_string())? {
            self.one(&file, plan().as_deref()).await?;
        }
        Ok(())
    }

    async fn one(&self, file: &Spooled, plan: Option<&Plan>) -> Result<(), String> {
        let bytes = match tokio::fs::read(&file.path).await {
            Ok(bytes) => bytes,
            // Replaced or removed since it was listed.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(format!("{}: {error}", file.path.display())),
        };
        let path = file.place.iter().fold(serving_log::folder(&self.root), |path, part| path.join(part.as_str()));
        let bytes = match plan.and_then(|plan| without_forgotten(plan, &path, &bytes)) {
            Some(left) if left.is_empty() => return self.remove(file),
            Some(left) => left,
            None => bytes,
        };
        let put = tokio::time::timeout(UPLOAD_WITHIN, self.store.put(&path, bytes.into())).await;
        match put {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err(chain(&error)),
            Err(_) => return Err(format!("{path} was not taken within {} s", UPLOAD_WITHIN.as_secs())),
        }
        self.remove(file)
    }

    fn remove(&self, file: &Spooled) -> Result<(), String> {
        match self.spool.remove(file) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(format!("{}: {error}", file.path.display())),
        }
        self.metrics.spooled(self.spool.bytes());
        Ok(())
    }

    /// Every gateway does it; who comes second finds nothing.
    async fn remove_old(&self, now: Micros) {
        let days = Days::new(self.retention.as_secs().div_ceil(24 * 3_600));
        let Some(first) = serving_log::day(now).checked_sub_days(days) else { return };
        match serving_log::remove_before(&self.store, &self.root, first).await {
            Ok(0) => {}
            Ok(objects) => tracing::info!(objects, %first, "older parts of the serving log were removed"),
            Err(error) => tracing::warn!(error = %chain(&error), "older parts of the serving log could not be removed"),
        }
    }
}

/// The file without rows about entities that were forgotten since they were answered; None where it stays as it is.
fn without_forgotten(plan: &Plan, path: &Path, bytes: &[u8]) -> Option<Vec<u8>> {
    let forgotten = plan.forgotten.get()?;
    if !path.as_ref().ends_with(".parquet") {
        return None;
    }
    let rows = serving_log::decode(path.as_ref(), bytes.to_vec().into()).ok()?;
    let service = plan.service(&rows.header.service)?;
    let left = serving_log::redact::file_without(service, &rows, &forgotten).ok()??;
    Some(left.0)
}

/// The key, from the object store or, while that is away, as this machine kept it.
pub(super) async fn key_or_kept(
    settings: &ServingLogSettings,
    store: &Arc<dyn ObjectStore>,
    root: &Path,
    folder: &std::path::Path,
) -> Result<Vec<u8>, LogSetupError> {
    let path = folder.join(KEY);
    match hash_key(Some(settings), store, root).await {
        Ok(key) => {
            let is_kept = settings.key.is_some() || std::fs::read(&path).is_ok_and(|kept| kept == key);
            if !is_kept && let Err(error) = put_whole(folder, &path, &key) {
                tracing::warn!(%error, path = %path.display(), "the key could not be kept; a restart needs the object store");
            }
            Ok(key)
        }
        Err(error) => std::fs::read(&path).map_err(|_| error),
    }
}

/// What values of sensitive columns are hashed with: what the settings say, or else a random key that whoever comes first
/// leaves below the project's root on the object store.
pub async fn hash_key(
    settings: Option<&ServingLogSettings>,
    store: &Arc<dyn ObjectStore>,
    root: &Path,
) -> Result<Vec<u8>, LogSetupError> {
    if let Some(key) = settings.and_then(|settings| settings.key.as_ref()) {
        return Ok(key.as_bytes().to_vec());
    }
    let path = root.clone().join(KEY);
    let failed = |source| LogSetupError::Key { path: path.to_string(), source };
    let made: Vec<u8> = [Uuid::new_v4(), Uuid::new_v4()].iter().flat_map(|id| id.into_bytes()).collect();
    let create = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
    match store.put_opts(&path, to_hex(&made).into(), create).await {
        Ok(_) => return Ok(made),
        Err(object_store::Error::AlreadyExists { .. }) => {}
        Err(source) => return Err(failed(source)),
    }
    let read = async { store.get(&path).await?.bytes().await };
    let bytes = read.await.map_err(failed)?;
    // Whatever is there is the key: a person may have put one.
    let text = String::from_utf8_lossy(&bytes);
    Ok(from_hex(text.trim()).unwrap_or_else(|| bytes.to_vec()))
}
