//! From the `store:` of a project to an object store.
//!
//! A folder is the store of a laptop and of every test. There the log promises what it does on a cloud store: a put that
//! was acknowledged survives the machine's power, so each one is synced before it returns.

use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMultipartOptions,
    PutOptions, PutPayload, PutResult, RenameOptions,
};
use thiserror::Error;

#[derive(Debug, Error)]
pub enum StoreError {
    #[error(
        "store `{url}` cannot be opened: this build has no {scheme} support; use a folder, or a build with {scheme}"
    )]
    NoCloudSupport { url: String, scheme: &'static str },
    #[error("store `{url}` has the unknown scheme `{scheme}`; use a folder, file://, s3://, gs:// or az://")]
    UnknownScheme { url: String, scheme: String },
    #[error("store `{url}` is not a folder: {reason}; write an absolute path after file://, or a plain path")]
    NotAFolder { url: String, reason: &'static str },
    #[error("the store's folder {folder} cannot be created; create it, or change `store:`")]
    Create {
        folder: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the store's folder {folder} cannot be opened; check that it is a folder and may be read")]
    Open {
        folder: PathBuf,
        #[source]
        source: Box<object_store::Error>,
    },
}

/// Opens a store: a folder by path (a relative one is below the current folder) or `file://` URL, created when missing.
/// The path is the prefix below which everything of Coeval lies.
pub fn open_store(url: &str) -> Result<(Arc<dyn ObjectStore>, Path), StoreError> {
    let folder = parse_folder(url)?;
    std::fs::create_dir_all(&folder).map_err(|source| StoreError::Create { folder: folder.clone(), source })?;
    let files = LocalFileSystem::new_with_prefix(&folder)
        .map_err(|source| StoreError::Open { folder: folder.clone(), source: Box::new(source) })?;
    Ok((Arc::new(SyncedFolder { files: Arc::new(files) }), Path::default()))
}

fn parse_folder(url: &str) -> Result<PathBuf, StoreError> {
    let not_a_folder = |reason| StoreError::NotAFolder { url: url.to_owned(), reason };
    if url.is_empty() {
        return Err(not_a_folder("it is empty"));
    }
    let Some((scheme, rest)) = url.split_once("://") else {
        return Ok(PathBuf::from(url));
    };
    let cloud = match scheme {
        "file" => {
            let path = rest.strip_prefix("localhost").unwrap_or(rest);
            if !path.starts_with('/') {
                return Err(not_a_folder("the path after file:// is not absolute"));
            }
            return Ok(PathBuf::from(percent_decoded(path).ok_or_else(|| not_a_folder("its escapes are not UTF-8"))?));
        }
        "s3" | "s3a" => "s3",
        "gs" => "gs",
        "az" | "azure" | "abfs" | "abfss" => "az",
        _ => return Err(StoreError::UnknownScheme { url: url.to_owned(), scheme: scheme.to_owned() }),
    };
    Err(StoreError::NoCloudSupport { url: url.to_owned(), scheme: cloud })
}

fn percent_decoded(text: &str) -> Option<String> {
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
    String::from_utf8(decoded).ok()
}

/// A folder whose single puts are durable when they return. Streams of parts (datasets) are left to the system: a manifest,
/// put once they are complete, names them.
#[derive(Debug)]
struct SyncedFolder {
    files: Arc<LocalFileSystem>,
}

impl SyncedFolder {
    async fn sync(&self, location: &Path) -> object_store::Result<()> {
        let path = self.files.path_to_filesystem(location)?;
        // The entry of a new file is in its folder, and a new folder's in the one above.
        let depth = location.parts_count();
        let synced = tokio::task::spawn_blocking(move || {
            path.ancestors().take(depth + 1).try_for_each(|path| File::open(path)?.sync_all())
        })
        .await?;
        synced.map_err(|source| object_store::Error::Generic { store: "folder", source: Box::new(source) })
    }
}

impl fmt::Display for SyncedFolder {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "synced {}", self.files)
    }
}

#[async_trait]
impl ObjectStore for SyncedFolder {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> object_store::Result<PutResult> {
        let put = self.files.put_opts(location, payload, options).await?;
        self.sync(location).await?;
        Ok(put)
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.files.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> object_store::Result<GetResult> {
        self.files.get_opts(location, options).await
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> object_store::Result<Vec<Bytes>> {
        self.files.get_ranges(location, ranges).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        self.files.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.files.list(prefix)
    }

    fn list_with_offset(
        &self,
        prefix: Option<&Path>,
        offset: &Path,
    ) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.files.list_with_offset(prefix, offset)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        self.files.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> object_store::Result<()> {
        self.files.copy_opts(from, to, options).await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> object_store::Result<()> {
        self.files.rename_opts(from, to, options).await
    }
}

#[cfg(test)]
mod tests;
