use super::*;

fn write(folder: &Path, name: &str, text: &str) {
    let path = folder.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

#[tokio::test]
async fn csv_folders_and_globs() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "data/a.csv", "k,x\nJFK,1.5\n");
    write(folder.path(), "data/b.csv", "k,x\nEWR,2.5\n");
    let sources = Sources::new(folder.path()).unwrap();
    let expected = vec![("k".to_string(), Type::String), ("x".to_string(), Type::Float64)];
    for pattern in ["data/*.csv", "data/", "data", "data/a.csv"] {
        assert_eq!(sources.schema(pattern).await.unwrap(), expected, "{pattern}");
    }
    assert_eq!(sources.files("data").await.unwrap().files.len(), 2);
    let before = sources.fingerprint("data").await.unwrap();
    write(folder.path(), "data/c.csv", "k,x\nLGA,3.5\n");
    assert_ne!(sources.fingerprint("data").await.unwrap(), before, "a new file is seen");
}

#[tokio::test]
async fn what_is_wrong_names_the_file() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "bad/x.parquet", "this is no parquet file at all");
    write(folder.path(), "mixed/a.csv", "k,x\nJFK,1.5\n");
    write(folder.path(), "mixed/b.csv", "k,y\nJFK,1.5\n");
    write(folder.path(), "odd/a.xlsx", "?");
    let sources = Sources::new(folder.path()).unwrap();
    let message = |pattern: &'static str| {
        let sources = &sources;
        async move { sources.schema(pattern).await.unwrap_err().to_string() }
    };
    assert_eq!(
        message("bad/*.parquet").await,
        "bad/x.parquet cannot be read as Parquet; replace or remove the file, then try again"
    );
    assert!(message("none/*.parquet").await.starts_with("no file matches `none/*.parquet`"));
    assert!(message("none.parquet").await.starts_with("no file matches `none.parquet`"));
    assert!(message("odd/*").await.starts_with("odd/a.xlsx is of no known format"));
    let mixed = sources.files("mixed").await.unwrap();
    assert_eq!(
        mixed.select(["x"]).unwrap_err().to_string(),
        "column `x` is absent in mixed/b.csv, but Float64 in mixed/a.csv; files of one source have one schema"
    );
    assert_eq!(mixed.select(["k"]).unwrap().schema.fields().len(), 1, "columns that nobody reads may differ");
}
