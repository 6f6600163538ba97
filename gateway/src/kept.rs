//! What this machine keeps so that a restart needs no object store: the last fold of the control log, and the definitions that
//! served versions were trained by.
//!
//! It is a copy, never the truth: it is read only where the store does not answer, and compared with the log as soon as it
//! does (`Registry::open_or_kept`). Each process writes files of its own, named by the address it is told to listen on, so that
//! one that lost the store does not put its older fold in place of another's. Files come to be by a rename.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use registry::Registry;
use registry::id::EntryNumber;
use registry::state::Catalog;
use serde::Deserialize;
use uuid::Uuid;

use crate::status::chain;

/// Definitions of earlier entries that are kept; those of the lowest entries go first.
const DEFINITIONS_MAX: usize = 64;
/// Between writes of a log that changes all the time: a restart without the store is then so much behind, at most.
const WRITE_EVERY: Duration = Duration::from_secs(2);
/// After a write that failed.
const TRY_AGAIN: Duration = Duration::from_secs(30);

/// The files of one process.
#[derive(Debug, Clone)]
pub struct Kept {
    folder: Arc<Path>,
    fold: Arc<Path>,
}

/// As much of a fold as says how far it goes.
#[derive(Deserialize)]
struct Head {
    number: EntryNumber,
}

impl Kept {
    /// `address` is that of the settings, the same in every life of a process.
    pub fn new(folder: PathBuf, address: &str) -> Kept {
        let name: String =
            address.chars().map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' }).collect();
        let fold = folder.join(format!("fold-{name}.json"));
        Kept { folder: folder.into(), fold: fold.into() }
    }

    /// The fold, if one was kept.
    pub fn read(&self) -> Option<Vec<u8>> {
        match std::fs::read(&self.fold) {
            Ok(bytes) => Some(bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!(path = %self.fold.display(), %error, "the fold that was kept cannot be read");
                None
            }
        }
    }

    pub fn path(&self) -> &Path {
        &self.fold
    }

    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        put_whole(&self.folder, &self.fold, bytes)
    }

    fn catalog_path(&self, entry: EntryNumber) -> PathBuf {
        self.folder.join(format!("definitions-{}.json", entry.0))
    }

    /// Definitions of an earlier entry: from the log, else as they were kept. Whoever compiles them compares digests.
    pub async fn catalog(
        kept: Option<&Kept>,
        registry: &Registry,
        entry: EntryNumber,
    ) -> Result<Catalog, registry::RegistryError> {
        let away = match registry.catalog(entry).await {
            Ok(catalog) => {
                if let Some(kept) = kept
                    && let Err(error) = kept.keep_catalog(entry, &catalog)
                {
                    tracing::warn!(%error, %entry, "definitions could not be kept; a restart needs the object store");
                }
                return Ok(catalog);
            }
            Err(error) if error.is_retryable() => error,
            Err(error) => return Err(error),
        };
        let bytes = kept.and_then(|kept| std::fs::read(kept.catalog_path(entry)).ok());
        bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()).ok_or(away)
    }

    fn keep_catalog(&self, entry: EntryNumber, catalog: &Catalog) -> io::Result<()> {
        let path = self.catalog_path(entry);
        if path.exists() {
            return Ok(());
        }
        put_whole(&self.folder, &path, &serde_json::to_vec(catalog)?)?;
        let mut kept: Vec<(u64, PathBuf)> = Vec::new();
        for file in std::fs::read_dir(&self.folder)? {
            let path = file?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let number = name.and_then(|name| name.strip_prefix("definitions-")?.strip_suffix(".json")?.parse().ok());
            kept.extend(number.map(|number| (number, path)));
        }
        kept.sort();
        kept.truncate(kept.len().saturating_sub(DEFINITIONS_MAX));
        kept.iter().filter(|(number, _)| *number != entry.0).try_for_each(|(_, path)| std::fs::remove_file(path))
    }

    /// Keeps the fold as it changes. Never returns.
    pub async fn run(&self, registry: &Arc<Registry>) {
        let mut states = registry.subscribe();
        let mut failing = false;
        loop {
            states.borrow_and_update();
            let (kept, of) = (self.clone(), registry.clone());
            let written = tokio::task::spawn_blocking(move || {
                let bytes = of.keep().map_err(|error| chain(&error))?;
                kept.write(&bytes).map_err(|error| error.to_string())
            });
            let written = written.await.unwrap_or_else(|error| Err(error.to_string()));
            if let Err(error) = &written
                && !failing
            {
                let folder = self.folder.display();
                tracing::warn!(error, %folder, "the fold of the control log cannot be kept; a restart needs the object store");
            }
            failing = written.is_err();
            tokio::time::sleep(if failing { TRY_AGAIN } else { WRITE_EVERY }).await;
            if !failing && states.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

/// How far a fold that was kept goes; none where it cannot be read.
pub fn head_of(bytes: &[u8]) -> EntryNumber {
    serde_json::from_slice::<Head>(bytes).map_or(EntryNumber::NONE, |head| head.number)
}

/// Whole or not at all.
pub fn put_whole(folder: &Path, path: &Path, bytes: &[u8]) -> io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let beside = folder.join(format!("{}.part", Uuid::new_v4().simple()));
    let mut options = std::fs::File::options();
    options.write(true).create_new(true);
    #[cfg(unix)]
    // Some of it is a secret of the project.
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let written = options.open(&beside).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    let put = written.and_then(|()| std::fs::rename(&beside, path));
    if put.is_err() {
        let _ = std::fs::remove_file(&beside);
    }
    put
}
