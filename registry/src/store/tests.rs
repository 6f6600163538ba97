use object_store::{ObjectStoreExt, PutMode};

use super::*;

#[track_caller]
fn check(url: &str, expected: Result<&str, &str>) {
    let actual = parse_folder(url).map_err(|error| error.to_string());
    assert_eq!(actual, expected.map(PathBuf::from).map_err(str::to_owned));
}

#[test]
fn urls_become_folders_or_reasons() {
    check("./.coeval", Ok("./.coeval"));
    check("/var/lib/coeval", Ok("/var/lib/coeval"));
    check("file:///var/lib/coeval", Ok("/var/lib/coeval"));
    check("file://localhost/var/my%20store", Ok("/var/my store"));
    check("file:///100%", Ok("/100%"));
    check(
        "file://relative/path",
        Err("store `file://relative/path` is not a folder: the path after file:// is not absolute; \
             write an absolute path after file://, or a plain path"),
    );
    check(
        "abfss://c@a/p",
        Err("store `abfss://c@a/p` cannot be opened: az is not supported in this version; use a folder or s3://"),
    );
    check(
        "ftp://host",
        Err("store `ftp://host` has the unknown scheme `ftp`; use a folder, file://, s3://, gs:// or az://"),
    );
    check("", Err("store `` is not a folder: it is empty; write an absolute path after file://, or a plain path"));
}

#[test]
fn urls_become_buckets_or_reasons() {
    let keys = |endpoint: &str| -> Variables {
        [("AWS_ENDPOINT_URL", endpoint), ("AWS_ACCESS_KEY_ID", "k"), ("AWS_SECRET_ACCESS_KEY", "s")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .to_vec()
    };
    let open = |url: &str| open_bucket(url, &keys("http://127.0.0.1:1"));
    assert_eq!(open("s3://bucket/a/b/").unwrap().1, Path::from("a/b"));
    assert_eq!(open("s3a://bucket").unwrap().1, Path::default());
    for url in ["s3://", "s3:///a", "s3://bucket:9000/a", "s3://user@bucket"] {
        assert!(matches!(open(url), Err(StoreError::NoBucket { .. })), "{url}");
    }
    let bad = open_bucket("s3://bucket", &vec![("AWS_CONDITIONAL_PUT".to_owned(), "perhaps".to_owned())]).unwrap_err();
    assert!(bad.to_string().starts_with("`s3://bucket` cannot be opened as a bucket; check AWS_ENDPOINT_URL"), "{bad}");
}

#[tokio::test]
async fn a_missing_folder_is_created_and_keeps_what_is_put() {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("a/b");
    for expected in [None, Some("kept")] {
        let (store, prefix) = open_store(folder.to_str().unwrap()).unwrap();
        let path = prefix.join("deep").join("down.txt");
        match expected {
            None => {
                let create = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
                store.put_opts(&path, "kept".into(), create).await.unwrap();
            }
            Some(text) => assert_eq!(store.get(&path).await.unwrap().bytes().await.unwrap(), text),
        }
    }
    assert_eq!(std::fs::read_to_string(folder.join("deep/down.txt")).unwrap(), "kept");
}

#[tokio::test]
async fn a_file_where_the_folder_should_be_is_named() {
    let parent = tempfile::tempdir().unwrap();
    let file = parent.path().join("taken");
    std::fs::write(&file, "").unwrap();
    let error = open_store(file.to_str().unwrap()).unwrap_err();
    assert!(matches!(error, StoreError::Create { .. }), "{error}");
    assert!(error.to_string().contains("/taken"), "{error}");
}
