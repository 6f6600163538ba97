use object_store::memory::InMemory;

use super::*;

fn artifacts() -> (Artifacts, Arc<dyn ObjectStore>) {
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    (Artifacts::new(store.clone(), &Path::from("p")), store)
}

fn delay() -> ModelName {
    ModelName::try_new("delay").unwrap()
}

#[tokio::test]
async fn bytes_lie_under_their_digest_and_come_back() {
    let (artifacts, store) = artifacts();
    // One below and one above the size that is hashed in place.
    for bytes in [Bytes::from_static(b"weights"), Bytes::from(vec![7; 300 << 10])] {
        let artifact = artifacts.put_artifact(&delay(), bytes.clone()).await.unwrap();
        assert_eq!(artifact.location, format!("models/delay/{}.pt", Sha256::of(&bytes)));
        assert_eq!(artifact.bytes, bytes.len() as u64);
        assert!(store.head(&Path::from(format!("p/{}", artifact.location))).await.is_ok());
        assert_eq!(artifacts.get(&artifact).await.unwrap(), bytes);
        assert_eq!(artifacts.put_artifact(&delay(), bytes.clone()).await.unwrap(), artifact);
    }
}

#[tokio::test]
async fn damage_is_noticed_and_mended_by_storing_again() {
    for damage in ["wEights", "short", "longer than it was"] {
        let (artifacts, store) = artifacts();
        let bytes = Bytes::from_static(b"weights");
        let artifact = artifacts.put_artifact(&delay(), bytes.clone()).await.unwrap();
        let path = Path::from(format!("p/{}", artifact.location));
        store.put(&path, damage.into()).await.unwrap();

        let error = artifacts.get(&artifact).await.unwrap_err();
        assert!(matches!(error, ArtifactError::Corrupt { .. }), "{damage}: {error}");
        assert!(error.to_string().starts_with(&format!("{path} is corrupt")), "{error}");

        assert_eq!(artifacts.put_artifact(&delay(), bytes.clone()).await.unwrap(), artifact);
        assert_eq!(artifacts.get(&artifact).await.unwrap(), bytes);
    }
}

#[tokio::test]
async fn a_missing_artifact_is_named() {
    let (artifacts, store) = artifacts();
    let artifact = artifacts.put_golden_rows(&delay(), Bytes::from_static(b"rows")).await.unwrap();
    assert!(artifact.location.ends_with(".golden"));
    store.delete(&Path::from(format!("p/{}", artifact.location))).await.unwrap();
    let error = artifacts.get(&artifact).await.unwrap_err();
    assert!(matches!(error, ArtifactError::Missing { .. }), "{error}");
}
