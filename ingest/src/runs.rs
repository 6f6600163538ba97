//! The log of materializations: what each run read, through which time, and what came of it.
//!
//! One immutable object per run, `<project>/materializations/<source>/<number>.json`, numbered by put-if-absent. A run is
//! written down when everything it wrote online is durable and before the online store is told how far it came, so the
//! newest number that the store names is always there. The next run learns from it which files were there before: a file
//! that is new, or was another one then, may hold rows that became known before the last run's time, and is read whole.

use std::collections::HashMap;
use std::sync::Arc;

use feature_defs::time::Micros;
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};
use serde::{Deserialize, Serialize};

/// Of what is written; a reader refuses a larger one.
const FORMAT: u32 = 1;
/// Records looked through for the last run that ended well: failures of one kind are written once, so these are months.
const LOOK_BACK: usize = 64;
/// Tries to find a number that nobody has.
const NUMBER_TRIES: usize = 16;

/// Who asked for a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum By {
    /// Somebody named a time.
    Request,
    /// The source's `every`.
    Schedule,
    /// The online store had lost what it was told, or has a view that was not there before.
    Recovery,
    /// A static source whose rows are not there.
    Load,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Done,
    Failed { reason: String },
}

/// One run of one source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    pub format: u32,
    pub number: u64,
    pub source: String,
    /// Of the source's definition.
    pub source_digest: String,
    pub by: By,
    pub started: Micros,
    pub ended: Micros,
    /// Rows that became known up to this time were taken: the run's `known_through`.
    pub through: Micros,
    /// Rows read from files, over all passes.
    pub rows_read: u64,
    /// Rows that became visible, summed over views, and what the online store made of them.
    pub rows_new: u64,
    pub rows_applied: u64,
    pub rows_stale: u64,
    pub views: Vec<RunView>,
    pub files: RunFiles,
    pub outcome: Outcome,
}

/// What a run did to one view.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunView {
    pub view: String,
    /// Of the generation: the first digits of the view's storage digest.
    pub digest: String,
    /// Through which time it was filled before; none: it was filled anew.
    pub from: Option<Micros>,
    pub rows_new: u64,
    pub rows_applied: u64,
    pub rows_stale: u64,
    /// What is unusual about it, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// The files of the source when the run began.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunFiles {
    Listed(Vec<RunFile>),
    /// The same as in the run of this number, which lists them.
    SameAs(u64),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunFile {
    pub path: String,
    pub size: u64,
    pub modified: Micros,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// No row of it becomes visible after this time; none: it is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub newest: Option<Micros>,
}

impl RunFile {
    pub fn of(meta: &ObjectMeta) -> RunFile {
        RunFile {
            path: meta.location.to_string(),
            size: meta.size,
            modified: meta.last_modified.timestamp_micros(),
            tag: meta.e_tag.clone(),
            newest: None,
        }
    }

    /// Whether it is the very same file, as far as can be told without reading it.
    pub fn is(&self, other: &RunFile) -> bool {
        (&self.path, self.size, self.modified, &self.tag) == (&other.path, other.size, other.modified, &other.tag)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum RunsError {
    #[error("the log of materializations of `{source_name}` cannot be reached on the object store; it is tried again")]
    Store { source_name: String, source: object_store::Error },
    #[error("{path} is damaged ({what}); remove it: views of its source are then filled anew")]
    Damaged { path: String, what: String },
    #[error("{path} has format {found}, the newest known here is {FORMAT}; upgrade this program")]
    Newer { path: String, found: u32 },
    #[error("no free number for a run of `{source_name}` was found, others take them all; it is tried again")]
    Contended { source_name: String },
}

impl RunsError {
    pub fn is_retryable(&self) -> bool {
        matches!(self, RunsError::Store { .. } | RunsError::Contended { .. })
    }
}

/// The runs of one project.
#[derive(Debug, Clone)]
pub struct RunLog {
    store: Arc<dyn ObjectStore>,
    /// The project's folder.
    project: Path,
}

impl RunLog {
    pub fn new(store: Arc<dyn ObjectStore>, project: Path) -> RunLog {
        RunLog { store, project }
    }

    fn folder(&self, source: &str) -> Path {
        self.project.clone().join("materializations").join(source)
    }

    fn path(&self, source: &str, number: u64) -> Path {
        self.folder(source).join(format!("{number:010}.json"))
    }

    /// The numbers of a source's runs, ascending.
    pub async fn numbers(&self, source: &str) -> Result<Vec<u64>, RunsError> {
        let folder = self.folder(source);
        let listed: Vec<ObjectMeta> = self
            .store
            .list(Some(&folder))
            .try_collect()
            .await
            .map_err(|error| RunsError::Store { source_name: source.to_owned(), source: error })?;
        let number = |meta: &ObjectMeta| meta.location.filename()?.strip_suffix(".json")?.parse().ok();
        let mut numbers: Vec<u64> = listed.iter().filter_map(number).collect();
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// None: there is no such run.
    pub async fn read(&self, source: &str, number: u64) -> Result<Option<Run>, RunsError> {
        let failed = |error| RunsError::Store { source_name: source.to_owned(), source: error };
        let path = self.path(source, number);
        let bytes = match self.store.get(&path).await {
            Ok(found) => found.bytes().await.map_err(failed)?,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        #[derive(Deserialize)]
        struct Head {
            format: u32,
        }
        let damaged = |error: serde_json::Error| RunsError::Damaged { path: path.to_string(), what: error.to_string() };
        let Head { format } = serde_json::from_slice(&bytes).map_err(damaged)?;
        if format > FORMAT {
            return Err(RunsError::Newer { path: path.to_string(), found: format });
        }
        serde_json::from_slice(&bytes).map(Some).map_err(damaged)
    }

    /// The newest runs of a source, newest first.
    pub async fn newest(&self, source: &str, runs_max: usize) -> Result<Vec<Run>, RunsError> {
        let mut runs = Vec::new();
        for number in self.numbers(source).await?.into_iter().rev().take(runs_max) {
            runs.extend(self.read(source, number).await?);
        }
        Ok(runs)
    }

    /// The last run that ended well.
    pub async fn last_done(&self, source: &str) -> Result<Option<Run>, RunsError> {
        for number in self.numbers(source).await?.into_iter().rev().take(LOOK_BACK) {
            if let Some(run) = self.read(source, number).await?.filter(|run| run.outcome == Outcome::Done) {
                return Ok(Some(run));
            }
        }
        Ok(None)
    }

    /// The files that a run found, and the number of the run that lists them. None: nobody knows any more.
    pub async fn files(&self, run: &Run) -> Result<Option<(u64, Vec<RunFile>)>, RunsError> {
        match &run.files {
            RunFiles::Listed(files) => Ok(Some((run.number, files.clone()))),
            RunFiles::SameAs(number) => match self.read(&run.source, *number).await? {
                Some(Run { files: RunFiles::Listed(files), number, .. }) => Ok(Some((number, files))),
                _ => Ok(None),
            },
        }
    }

    /// Writes a run down under the next free number, which it is given.
    pub async fn append(&self, run: &mut Run) -> Result<(), RunsError> {
        let mut number = self.numbers(&run.source).await?.last().copied().unwrap_or(0) + 1;
        for _ in 0..NUMBER_TRIES {
            run.format = FORMAT;
            run.number = number;
            let bytes = serde_json::to_vec(run).expect("numbers and texts are JSON");
            let create = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
            let path = self.path(&run.source, number);
            match self.store.put_opts(&path, PutPayload::from(bytes), create).await {
                Ok(_) => return Ok(()),
                Err(object_store::Error::AlreadyExists { .. }) => number += 1,
                Err(error) => return Err(RunsError::Store { source_name: run.source.clone(), source: error }),
            }
        }
        Err(RunsError::Contended { source_name: run.source.clone() })
    }
}

/// How a file of now stands to those of an earlier run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Seen {
    Same { newest: Option<Micros> },
    New,
    Changed,
}

/// The files of an earlier run, by path.
pub(crate) struct Before(HashMap<String, RunFile>);

impl Before {
    pub fn new(files: Vec<RunFile>) -> Before {
        Before(files.into_iter().map(|file| (file.path.clone(), file)).collect())
    }

    pub fn look(&self, file: &RunFile) -> Seen {
        match self.0.get(&file.path) {
            Some(before) if before.is(file) => Seen::Same { newest: before.newest },
            Some(_) => Seen::Changed,
            None => Seen::New,
        }
    }

    /// How many of them are not there any more.
    pub fn gone(&self, now: &[RunFile]) -> usize {
        let there: usize = now.iter().filter(|file| self.0.contains_key(&file.path)).count();
        self.0.len() - there
    }
}

#[cfg(test)]
mod tests {
    use object_store::memory::InMemory;

    use super::*;

    fn run(through: Micros, files: RunFiles, outcome: Outcome) -> Run {
        Run {
            format: 0,
            number: 0,
            source: "prices".into(),
            source_digest: "d".into(),
            by: By::Request,
            started: 1,
            ended: 2,
            through,
            rows_read: 3,
            rows_new: 2,
            rows_applied: 1,
            rows_stale: 1,
            views: vec![],
            files,
            outcome,
        }
    }

    #[tokio::test]
    async fn runs_are_numbered_once_each_and_read_back() {
        let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let log = RunLog::new(store.clone(), Path::from("root/test"));
        assert_eq!(log.last_done("prices").await.unwrap(), None);
        let file = RunFile { path: "a".into(), size: 1, modified: 2, tag: None, newest: Some(9) };
        let mut first = run(10, RunFiles::Listed(vec![file.clone()]), Outcome::Done);
        log.append(&mut first).await.unwrap();
        let mut second = run(20, RunFiles::SameAs(1), Outcome::Done);
        // Two writers with the same idea of the next number.
        let (mut third, other) = (second.clone(), RunLog::new(store.clone(), Path::from("root/test")));
        let (a, b) = tokio::join!(log.append(&mut second), other.append(&mut third));
        a.unwrap();
        b.unwrap();
        let mut failed = run(30, RunFiles::SameAs(1), Outcome::Failed { reason: "no disk".into() });
        log.append(&mut failed).await.unwrap();
        assert_eq!(log.numbers("prices").await.unwrap(), [1, 2, 3, 4]);
        assert_eq!(log.last_done("prices").await.unwrap().unwrap().number, 3);
        assert_eq!(log.files(&second).await.unwrap(), Some((1, vec![file])));
        assert_eq!(log.newest("prices", 2).await.unwrap()[0], failed);
        store
            .put(&Path::from("root/test/materializations/prices/0000000005.json"), "{\"format\": 9}".into())
            .await
            .unwrap();
        let error = log.last_done("prices").await.unwrap_err().to_string();
        assert!(error.contains("0000000005.json has format 9") && error.contains("upgrade"), "{error}");
    }

    #[test]
    fn files_are_told_apart() {
        let file = |path: &str, size| RunFile { path: path.into(), size, modified: 5, tag: None, newest: None };
        let before = Before::new(vec![RunFile { newest: Some(7), ..file("a", 1) }, file("b", 1), file("c", 1)]);
        let now = [file("a", 1), file("b", 2), file("d", 1)];
        let seen: Vec<Seen> = now.iter().map(|file| before.look(file)).collect();
        assert_eq!(seen, [Seen::Same { newest: Some(7) }, Seen::Changed, Seen::New]);
        assert_eq!(before.gone(&now), 1);
    }
}
