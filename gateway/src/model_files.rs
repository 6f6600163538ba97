//! Model files on this machine's disk, named by the digest of their bytes.
//!
//! A restart must not fetch gigabytes again, and the process that measures a model reads it from a file. A file is put in
//! place whole or not at all, and its bytes are compared with its name whenever it is read: damage on the disk is an
//! absent file. Beside it lies what was measured of it.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use registry::id::Sha256;
use registry::model::{Artifact, ArtifactError, Artifacts};
use uuid::Uuid;

/// All files together may take so much; those used longest ago go first. A file that is larger by itself is kept while it
/// is the newest.
const BYTES_MAX: u64 = 16 << 30;

#[derive(Debug, Clone)]
pub struct ModelFiles {
    folder: Arc<Path>,
    bytes_max: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    #[error("could not keep the model file below {folder}; check that there is room and that it may be written", folder = folder.display())]
    Disk { folder: PathBuf, source: std::io::Error },
}

impl ModelFiles {
    /// The folder is made when it is first needed.
    pub fn new(folder: PathBuf) -> ModelFiles {
        ModelFiles { folder: folder.into(), bytes_max: BYTES_MAX }
    }

    /// The bytes of an artifact and the file that holds them: from the disk, else from the object store.
    pub async fn get(&self, artifacts: &Artifacts, artifact: &Artifact) -> Result<(Bytes, PathBuf), FilesError> {
        let path = self.path(&artifact.sha256);
        let (read, expected) = (path.clone(), artifact.sha256.clone());
        if let Ok(Some(bytes)) = tokio::task::spawn_blocking(move || read_whole(&read, &expected)).await {
            return Ok((bytes, path));
        }
        let bytes = artifacts.get(artifact).await?;
        let (files, kept, sha256) = (self.clone(), bytes.clone(), artifact.sha256.clone());
        let put = tokio::task::spawn_blocking(move || files.put(&sha256, &kept)).await;
        let put = put.unwrap_or_else(|error| Err(std::io::Error::other(error)));
        put.map_err(|source| FilesError::Disk { folder: self.folder.to_path_buf(), source })?;
        Ok((bytes, path))
    }

    /// What was measured of a file, under a key that says in which circumstances.
    pub fn measured(&self, sha256: &Sha256, key: &str) -> Option<Vec<u8>> {
        std::fs::read(self.measured_path(sha256, key)).ok()
    }

    /// That it cannot be kept costs measuring it again.
    pub fn keep_measured(&self, sha256: &Sha256, key: &str, text: &[u8]) {
        if let Err(error) = put_whole(&self.folder, &self.measured_path(sha256, key), text) {
            tracing::warn!(%error, folder = %self.folder.display(), "what was measured of a model could not be kept");
        }
    }

    fn path(&self, sha256: &Sha256) -> PathBuf {
        self.folder.join(format!("{sha256}.pt"))
    }

    fn measured_path(&self, sha256: &Sha256, key: &str) -> PathBuf {
        self.folder.join(format!("{sha256}.{key}.json"))
    }

    fn put(&self, sha256: &Sha256, bytes: &[u8]) -> std::io::Result<()> {
        std::fs::create_dir_all(&self.folder)?;
        let path = self.path(sha256);
        put_whole(&self.folder, &path, bytes)?;
        self.make_room(&path)
    }

    /// Removes what was used longest ago, with what was measured of it.
    fn make_room(&self, newest: &Path) -> std::io::Result<()> {
        let mut models: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
        let mut measured: Vec<PathBuf> = Vec::new();
        for entry in std::fs::read_dir(&self.folder)? {
            let path = entry?.path();
            // Another process of this machine may have removed it.
            let Ok(about) = path.metadata() else { continue };
            match path.extension().and_then(|extension| extension.to_str()) {
                Some("pt") => models.push((about.modified()?, about.len(), path)),
                Some("json") => measured.push(path),
                _ => {}
            }
        }
        models.sort();
        let mut bytes: u64 = models.iter().map(|(_, bytes, _)| bytes).sum();
        for (_, len, path) in models {
            if bytes <= self.bytes_max {
                break;
            }
            if path == newest {
                continue;
            }
            bytes -= len;
            let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
            let of_it = measured.iter().filter(|other| {
                other.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&format!("{stem}.")))
            });
            for path in of_it.chain([&path]) {
                remove(path)?;
            }
        }
        Ok(())
    }
}

fn remove(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// None where it is absent or not what its name says.
fn read_whole(path: &Path, expected: &Sha256) -> Option<Bytes> {
    let bytes = std::fs::read(path).ok()?;
    if Sha256::of(&bytes) != *expected {
        tracing::warn!(path = %path.display(), "a cached model file is damaged, and is fetched again");
        return None;
    }
    // Its age says when it was last used.
    if let Ok(file) = std::fs::File::open(path) {
        let _ = file.set_modified(SystemTime::now());
    }
    Some(bytes.into())
}

/// Whole or not at all.
fn put_whole(folder: &Path, path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let beside = folder.join(format!("{}.part", Uuid::new_v4().simple()));
    let written = std::fs::File::create(&beside).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    let put = written.and_then(|()| std::fs::rename(&beside, path));
    if put.is_err() {
        let _ = std::fs::remove_file(&beside);
    }
    put
}

#[cfg(test)]
mod tests {
    use object_store::ObjectStoreExt;
    use object_store::memory::InMemory;
    use object_store::path::Path as ObjectPath;
    use registry::id::ModelName;

    use super::*;

    #[tokio::test]
    async fn a_file_is_fetched_once_mended_when_damaged_and_leaves_when_there_is_no_room() {
        let store = Arc::new(InMemory::new());
        let artifacts = Artifacts::new(store.clone(), &ObjectPath::from("p"));
        let name = ModelName::try_new("delay").unwrap();
        let folder = tempfile::tempdir().unwrap();
        let files = ModelFiles { bytes_max: 10, ..ModelFiles::new(folder.path().join("models")) };
        let first = artifacts.put_artifact(&name, Bytes::from_static(b"first!")).await.unwrap();
        let (bytes, path) = files.get(&artifacts, &first).await.unwrap();
        assert_eq!((&bytes[..], std::fs::read(&path).unwrap()), (&b"first!"[..], b"first!".to_vec()));
        files.keep_measured(&first.sha256, "k", b"[]");
        assert_eq!(files.measured(&first.sha256, "k").unwrap(), b"[]");

        // From now on the disk has to do.
        store.delete(&ObjectPath::from(format!("p/{}", first.location))).await.unwrap();
        assert_eq!(&files.get(&artifacts, &first).await.unwrap().0[..], b"first!");
        std::fs::write(&path, b"fir").unwrap();
        assert!(matches!(files.get(&artifacts, &first).await, Err(FilesError::Artifact(_))), "a half file is no file");
        let first = artifacts.put_artifact(&name, Bytes::from_static(b"first!")).await.unwrap();
        assert_eq!(&files.get(&artifacts, &first).await.unwrap().0[..], b"first!");

        let second = artifacts.put_artifact(&name, Bytes::from_static(b"second")).await.unwrap();
        let (_, newer) = files.get(&artifacts, &second).await.unwrap();
        assert!(newer.exists() && !path.exists());
        assert_eq!(files.measured(&first.sha256, "k"), None);
        let left: Vec<_> = std::fs::read_dir(newer.parent().unwrap()).unwrap().collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }
}
