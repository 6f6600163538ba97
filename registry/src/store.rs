//! From the `store:` of a project to an object store.
//!
//! A folder is the store of a laptop and of every test. There the log promises what it does on a cloud store: a put
//! that was acknowledged survives the machine's power, so each one is synced before it returns.
//!
//! A bucket is S3's or that of any server that speaks its protocol. Who it is and who may is said by the variables that
//! every such tool reads (`AWS_ENDPOINT_URL`, `AWS_REGION`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, ...), so that
//! no secret is ever written into definitions. Every request has an end: a bucket that cannot be reached is an error
//! within a minute, not a process that hangs.

use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::client::ClientConfigKey;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    BackoffConfig, CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions, RetryConfig,
};
use thiserror::Error;

/// Where nothing answers, this long is waited for a connection; where something does, a request may last
/// `REQUEST_TIMEOUT`.
const CONNECT_TIMEOUT: &str = "3 seconds";
/// Enough for the largest single request there is, 8 MiB, over a slow line.
const REQUEST_TIMEOUT: &str = "30 seconds";
/// A store that is briefly overloaded answers within these; one that is away is told to the user while they still look.
const RETRIES_MAX: usize = 3;
const RETRY_TIMEOUT: Duration = Duration::from_secs(15);

/// Variables as a process has them, by name.
pub type Variables = Vec<(String, String)>;

#[derive(Debug, Error)]
pub enum StoreError {
    #[error("store `{url}` cannot be opened: {scheme} is not supported in this version; use a folder or s3://")]
    NoCloudSupport { url: String, scheme: &'static str },
    #[error("store `{url}` has the unknown scheme `{scheme}`; use a folder, file://, s3://, gs:// or az://")]
    UnknownScheme { url: String, scheme: String },
    #[error("store `{url}` is not a folder: {reason}; write an absolute path after file://, or a plain path")]
    NotAFolder { url: String, reason: &'static str },
    #[error("`{url}` names no bucket; write s3://bucket or s3://bucket/folder")]
    NoBucket { url: String },
    #[error(
        "`{url}` cannot be opened as a bucket; check AWS_ENDPOINT_URL, AWS_REGION and the other AWS_ variables of this process"
    )]
    Bucket {
        url: String,
        #[source]
        source: Box<object_store::Error>,
    },
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

/// Opens a store: a folder by path (a relative one is below the current folder) or `file://` URL, created when missing,
/// or a bucket (`s3://bucket/prefix`), which must be there. The path is the prefix below which everything of Coeval
/// lies.
pub fn open_store(url: &str) -> Result<(Arc<dyn ObjectStore>, Path), StoreError> {
    if is_bucket(url) {
        return open_bucket(url, &variables());
    }
    let folder = parse_folder(url)?;
    std::fs::create_dir_all(&folder).map_err(|source| StoreError::Create { folder: folder.clone(), source })?;
    let files = LocalFileSystem::new_with_prefix(&folder)
        .map_err(|source| StoreError::Open { folder: folder.clone(), source: Box::new(source) })?;
    Ok((Arc::new(SyncedFolder { files: Arc::new(files) }), Path::default()))
}

/// Whether `open_store` knows what the URL means, without opening anything.
pub fn check_url(url: &str) -> Result<(), StoreError> {
    if is_bucket(url) { bucket_and_path(url).map(|_| ()) } else { parse_folder(url).map(|_| ()) }
}

/// Whether a URL names a bucket that this build can open.
pub fn is_bucket(url: &str) -> bool {
    matches!(url.split_once("://"), Some(("s3" | "s3a", _)))
}

/// The `AWS_` variables of this process.
pub fn variables() -> Variables {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .filter(|(name, _)| name.starts_with("AWS_"))
        .collect()
}

/// Opens a bucket as the variables say, and the path in it. Nothing is asked of the bucket yet.
pub fn open_bucket(url: &str, variables: &Variables) -> Result<(Arc<dyn ObjectStore>, Path), StoreError> {
    let failed = |source| StoreError::Bucket { url: url.to_owned(), source: Box::new(source) };
    let (bucket, path) = bucket_and_path(url)?;
    let mut builder = AmazonS3Builder::new()
        .with_config(AmazonS3ConfigKey::Client(ClientConfigKey::ConnectTimeout), CONNECT_TIMEOUT)
        .with_config(AmazonS3ConfigKey::Client(ClientConfigKey::Timeout), REQUEST_TIMEOUT);
    for (name, value) in variables {
        let name = name.to_ascii_lowercase();
        // Servers beside Amazon's are often reached without TLS, and then the address says so itself.
        if name.starts_with("aws_endpoint") && value.starts_with("http://") {
            builder = builder.with_allow_http(true);
        }
        if let Ok(key) = name.parse::<AmazonS3ConfigKey>() {
            builder = builder.with_config(key, value);
        }
    }
    let retry = RetryConfig {
        backoff: BackoffConfig { max_backoff: Duration::from_secs(2), ..BackoffConfig::default() },
        max_retries: RETRIES_MAX,
        retry_timeout: RETRY_TIMEOUT,
    };
    let store = builder.with_bucket_name(bucket).with_retry(retry).build().map_err(failed)?;
    let path = Path::parse(path.trim_matches('/')).map_err(|error| failed(error.into()))?;
    Ok((Arc::new(store), path))
}

fn bucket_and_path(url: &str) -> Result<(&str, &str), StoreError> {
    let no_bucket = || StoreError::NoBucket { url: url.to_owned() };
    let (_, rest) = url.split_once("://").ok_or_else(no_bucket)?;
    let (bucket, path) = rest.split_once('/').unwrap_or((rest, ""));
    if bucket.is_empty() || bucket.contains(['?', '#', '@', ':']) {
        return Err(no_bucket());
    }
    Ok((bucket, path))
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

/// A folder whose single puts are durable when they return. Streams of parts (datasets) are left to the system: a
/// manifest, put once they are complete, names them.
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
