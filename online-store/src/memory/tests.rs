use std::sync::Arc;

use super::*;
use crate::conformance;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conforms() {
    conformance::run(Arc::new(MemoryStore::new()), "memory").await;
}

#[test]
fn key_bytes_is_the_length_of_the_longer_form() {
    for entity in [&b""[..], b"JFK", &[0xff; 300]] {
        let key = Generation::new("project", "view", "0123456789abcdef").key(entity);
        assert_eq!(key_bytes(&key), key.sorted().len());
        assert!(key_bytes(&key) >= key.tagged().len());
    }
}
