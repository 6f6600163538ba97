//! From the pattern of a definition to the files it names: one file, a folder, or a glob; on this machine or in a
//! bucket.
//!
//! Folders called `key=value` are entered and give a column; other folders are entered by a glob only (`**`). What
//! begins with a point or an underscore is somebody's half-written or private file and is passed over.

use std::path::{Component, Path as FilePath, PathBuf};
use std::sync::Arc;

use datafusion::execution::object_store::ObjectStoreUrl;
use datafusion::execution::runtime_env::RuntimeEnv;
use futures::TryStreamExt;
use glob::MatchOptions;
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt};
use registry::store::{Variables, is_bucket, open_bucket};

use super::{Format, SourceError};

/// More files than a source can sensibly have; a pattern that meets them is a mistake, or a table for a table format.
const FILES_MAX: usize = 1_000_000;

const GLOB: MatchOptions =
    MatchOptions { case_sensitive: true, require_literal_separator: true, require_literal_leading_dot: false };

/// Where the files of a pattern lie.
#[derive(Debug, Clone)]
pub struct Place {
    pub store: Arc<dyn ObjectStore>,
    pub store_url: ObjectStoreUrl,
    /// How paths of this place are shown: below which folder of this machine, or with which URL before them.
    pub shown: Shown,
}

#[derive(Debug, Clone)]
pub enum Shown {
    Below(PathBuf),
    Bucket(String),
}

/// A pattern, taken apart.
#[derive(Debug)]
pub struct Pattern {
    pub text: String,
    pub place: Place,
    /// What is listed, or the one file.
    prefix: Path,
    kind: Kind,
    /// Folders above this one are not the source's business: `key=value` in them gives no column.
    root: Path,
}

#[derive(Debug)]
enum Kind {
    /// A file, or a folder of a bucket: only looking tells.
    One,
    Folder,
    /// Matched against the path below `prefix`.
    Glob(glob::Pattern),
}

impl Place {
    /// A path as the user wrote it: relative to the project folder where it lies below it.
    pub fn show(&self, path: &Path) -> String {
        match &self.shown {
            Shown::Below(folder) => {
                let whole = FilePath::new("/").join(path.as_ref());
                whole.strip_prefix(folder).unwrap_or(&whole).display().to_string()
            }
            Shown::Bucket(url) => format!("{url}/{path}"),
        }
    }

    /// What is wrong when a store does not give what it was asked for.
    pub fn failed(&self, path: &Path, error: object_store::Error) -> SourceError {
        match error {
            object_store::Error::NotFound { .. } => SourceError::Gone { path: self.show(path) },
            error => self.unanswered(path, error),
        }
    }

    fn unanswered(&self, path: &Path, error: object_store::Error) -> SourceError {
        let (shown, source) = (self.show(path), Box::new(error));
        match &self.shown {
            Shown::Below(_) => SourceError::NotRead { path: shown, source },
            Shown::Bucket(url) => SourceError::Bucket { url: url.clone(), path: shown, source },
        }
    }
}

impl Pattern {
    pub fn parse(
        text: &str,
        folder: &FilePath,
        runtime: &RuntimeEnv,
        variables: &Variables,
    ) -> Result<Pattern, SourceError> {
        let bad = |what: String| SourceError::BadPattern { pattern: text.into(), what };
        let (place, path, root) = match text.split_once("://") {
            Some(_) if is_bucket(text) => {
                let rest = text.split_once("://").map_or("", |(_, rest)| rest);
                let (bucket, path) = rest.split_once('/').unwrap_or((rest, ""));
                let url = format!("s3://{bucket}");
                let store_url = ObjectStoreUrl::parse(&url).map_err(|error| bad(error.to_string()))?;
                let store = match runtime.object_store(&store_url) {
                    Ok(store) => store,
                    Err(_) => {
                        let (store, _) = open_bucket(&url, variables)?;
                        runtime.register_object_store(store_url.as_ref(), store.clone());
                        store
                    }
                };
                (Place { store, store_url, shown: Shown::Bucket(url) }, path.to_owned(), Path::default())
            }
            Some(("file", path)) => {
                let path = path.strip_prefix("localhost").unwrap_or(path);
                (local(folder, runtime).map_err(bad)?, path.trim_start_matches('/').to_owned(), Path::default())
            }
            Some((scheme, _)) => {
                return Err(bad(format!("`{scheme}://` is not supported in this version; use a path or s3://")));
            }
            None => {
                let absolute = lexical(&folder.join(text));
                let slash = if text.ends_with('/') { "/" } else { "" };
                let path = format!("{}{slash}", absolute.to_string_lossy().trim_start_matches('/'));
                let below = absolute.starts_with(folder);
                let root = if below { folder.to_string_lossy().into_owned() } else { String::new() };
                (local(folder, runtime).map_err(bad)?, path, raw_path(root.trim_matches('/')).map_err(bad)?)
            }
        };
        let parsed = |path: &str| raw_path(path).map_err(bad);
        let is_glob = |segment: &str| segment.contains(['*', '?', '[']);
        let (prefix, kind) = match path.split('/').position(is_glob) {
            Some(first) => {
                let segments: Vec<&str> = path.split('/').collect();
                let glob = glob::Pattern::new(&segments[first..].join("/")).map_err(|error| bad(error.to_string()))?;
                (parsed(&segments[..first].join("/"))?, Kind::Glob(glob))
            }
            None if path.is_empty() || path.ends_with('/') => (parsed(path.trim_end_matches('/'))?, Kind::Folder),
            None => (parsed(&path)?, Kind::One),
        };
        Ok(Pattern { text: text.to_owned(), place, prefix, kind, root })
    }

    /// The files there are right now, in the order of their paths.
    pub async fn list(&self) -> Result<Vec<ObjectMeta>, SourceError> {
        let mut files = match &self.kind {
            Kind::One => match self.head().await? {
                Some(file) => return Ok(vec![file]),
                None => self.below().await?,
            },
            Kind::Folder | Kind::Glob(_) => self.below().await?,
        };
        if files.is_empty() {
            return Err(self.nothing());
        }
        files.sort_by(|a, b| a.location.cmp(&b.location));
        Ok(files)
    }

    /// Columns that the folders above a file give, in order; a null where the folder says so.
    pub fn partition_values(&self, file: &Path) -> Vec<(String, Option<String>)> {
        let Some(parts) = file.prefix_match(&self.root) else { return Vec::new() };
        let mut folders: Vec<String> = parts.map(|part| part.as_ref().to_owned()).collect();
        folders.pop();
        let pairs = folders.iter().filter_map(|folder| folder.split_once('='));
        pairs
            .filter(|(key, _)| !key.is_empty())
            .map(|(key, value)| {
                let value = (value != "__HIVE_DEFAULT_PARTITION__").then(|| percent_decoded(value));
                (percent_decoded(key), value)
            })
            .collect()
    }

    pub fn nothing(&self) -> SourceError {
        let folder = match &self.place.shown {
            Shown::Below(folder) => folder.display().to_string(),
            Shown::Bucket(url) => url.clone(),
        };
        SourceError::NoFiles { pattern: self.text.clone(), folder }
    }

    async fn head(&self) -> Result<Option<ObjectMeta>, SourceError> {
        match self.place.store.head(&self.prefix).await {
            Ok(file) => Ok(Some(file)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            // On this machine a folder has a name and no content.
            Err(_) if self.is_local_folder() => Ok(None),
            Err(error) => Err(self.place.failed(&self.prefix, error)),
        }
    }

    fn is_local_folder(&self) -> bool {
        matches!(self.place.shown, Shown::Below(_)) && FilePath::new("/").join(self.prefix.as_ref()).is_dir()
    }

    async fn below(&self) -> Result<Vec<ObjectMeta>, SourceError> {
        let mut listed = self.place.store.list(Some(&self.prefix));
        let mut files = Vec::new();
        loop {
            match listed.try_next().await {
                Ok(Some(file)) if self.is_wanted(&file) => files.push(file),
                Ok(Some(_)) => {}
                Ok(None) => return Ok(files),
                Err(object_store::Error::NotFound { .. }) if matches!(self.place.shown, Shown::Below(_)) => {
                    return Ok(Vec::new());
                }
                // There it is the bucket itself that is not found.
                Err(error) => return Err(self.place.unanswered(&self.prefix, error)),
            }
            if files.len() > FILES_MAX {
                let what = format!("it matches more than {FILES_MAX} files; name fewer");
                return Err(SourceError::BadPattern { pattern: self.text.clone(), what });
            }
        }
    }

    fn is_wanted(&self, file: &ObjectMeta) -> bool {
        let Some(parts) = file.location.prefix_match(&self.prefix) else { return false };
        let segments: Vec<String> = parts.map(|part| part.as_ref().to_owned()).collect();
        let Some((name, folders)) = segments.split_last() else { return false };
        let is_private = |name: &str| name.starts_with(['.', '_']);
        if is_private(name) || folders.iter().any(|folder| is_private(folder) && !folder.contains('=')) {
            return false;
        }
        // Stores that know no folders keep empty objects in their place.
        if file.size == 0 && Format::of(name).is_none() {
            return false;
        }
        match &self.kind {
            Kind::Glob(glob) => glob.matches_with(&segments.join("/"), GLOB),
            Kind::One | Kind::Folder => folders.iter().all(|folder| folder.contains('=')),
        }
    }
}

fn local(folder: &FilePath, runtime: &RuntimeEnv) -> Result<Place, String> {
    let store_url = ObjectStoreUrl::local_filesystem();
    let store = runtime.object_store(&store_url).map_err(|error| error.to_string())?;
    Ok(Place { store, store_url, shown: Shown::Below(folder.to_path_buf()) })
}

/// A path whose segments are names as they are on disk: `Path` writes characters that some stores cannot hold as
/// escapes.
fn raw_path(path: &str) -> Result<Path, String> {
    let segments = path.split('/').filter(|segment| !segment.is_empty() && *segment != ".");
    Path::parse(segments.collect::<Vec<_>>().join("/")).map_err(|error| error.to_string())
}

/// Without `.` and `..`, looking at nothing on disk: a pattern need not exist.
fn lexical(path: &FilePath) -> PathBuf {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => {
                plain.pop();
            }
            other => plain.push(other),
        }
    }
    plain
}

fn percent_decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let escape = (bytes[at] == b'%').then(|| text.get(at + 1..at + 3)).flatten();
        match escape.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                decoded.push(byte);
                at += 3;
            }
            None => {
                decoded.push(bytes[at]);
                at += 1;
            }
        }
    }
    // What decodes to no text was no escape.
    String::from_utf8(decoded).unwrap_or_else(|_| text.to_owned())
}
