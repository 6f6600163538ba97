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
        "s3://bucket/prefix",
        Err("store `s3://bucket/prefix` cannot be opened: this build has no s3 support; \
             use a folder, or a build with s3"),
    );
    check(
        "abfss://c@a/p",
        Err("store `abfss://c@a/p` cannot be opened: this build has no az support; use a folder, or a build with az"),
    );
    check(
        "ftp://host",
        Err("store `ftp://host` has the unknown scheme `ftp`; use a folder, file://, s3://, gs:// or az://"),
    );
    check("", Err("store `` is not a folder: it is empty; write an absolute path after file://, or a plain path"));
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
