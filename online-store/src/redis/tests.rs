use std::net::{Ipv4Addr, TcpListener};
use std::process::Command;
use std::time::Instant;

use bytes::Bytes;
use feature_defs::window::TileId;

use super::*;
use crate::conformance::{self, redis_server::RedisServer};
use crate::row::encode_position;

const TIMEOUT: Duration = Duration::from_secs(10);
/// For servers that do not answer.
const SHORT: Duration = Duration::from_secs(1);

fn view() -> Generation {
    Generation::new("p", "v", "0123456789abcdef")
}

fn write_row(entity: &str, event_time: i64) -> Write {
    Write::Row {
        key: view().key(entity.as_bytes()),
        blob: conformance::row(event_time, None, 0, "value"),
        expires: None,
    }
}

async fn raw(server: &RedisServer, parts: &[&[u8]]) -> Value {
    let mut command = Cmd::new();
    for part in parts {
        command.arg(part);
    }
    let client = ::redis::Client::open(server.url()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    command.query_async(&mut connection).await.unwrap()
}

/// Says what is on the wire: a key and a value that other versions must find.
#[tokio::test]
async fn the_layout_of_version_1() {
    let folder = tempfile::tempdir().unwrap();
    let Some(server) = RedisServer::start(folder.path()) else { return };
    let store = RedisStore::connect(&server.url(), TIMEOUT).await.unwrap();
    let id = TileId { level: 300_000_000, start: -300_000_000 };
    let position = Position { time: 1, sequence: 2 };
    let writes = vec![
        Write::Tiles {
            key: view().key(*b"e"),
            position,
            set: vec![(id, Bytes::from_static(b"tile"))],
            remove: vec![],
            epoch: 0,
            expires: None,
        },
        Write::Fact("checkpoint".to_owned(), Some(Bytes::from_static(b"7"))),
    ];
    store.write(writes).await.unwrap();
    let header = b"\x80\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\0";
    let field = b"t\0\0\0\0\x11\xe1\xa3\0\x7f\xff\xff\xff\xee\x1e\x5d\0";
    let key = b"c1:{p/e}v@0123456789abcdef";
    assert_eq!(raw(&server, &[b"HLEN", key]).await, Value::Int(2));
    assert_eq!(raw(&server, &[b"HGET", key, b"h"]).await, Value::BulkString(header.to_vec()));
    assert_eq!(raw(&server, &[b"HGET", key, field]).await, Value::BulkString(b"tile".to_vec()));
    assert_eq!(raw(&server, &[b"GET", b"c1:fact:checkpoint"]).await, Value::BulkString(b"7".to_vec()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conforms() {
    let folder = tempfile::tempdir().unwrap();
    let Some(server) = RedisServer::start_with(folder.path(), &[]) else { return };
    let store = RedisStore::connect(&server.url(), TIMEOUT).await.unwrap();
    conformance::run(Arc::new(store), "redis").await;
}

#[tokio::test]
async fn a_killed_redis_is_an_error_and_then_works_again() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mut server) = RedisServer::start(folder.path()) else { return };
    let store = RedisStore::connect(&server.url(), TIMEOUT).await.unwrap();
    assert_eq!(store.write(vec![write_row("e", 1)]).await.unwrap().applied, 1);
    store.sync().await.unwrap();

    server.kill();
    for _ in 0..3 {
        let start = Instant::now();
        let error = store.read(&[Read::Row(view().key(*b"e"))]).await.unwrap_err();
        assert!(matches!(error, StoreError::Unreachable { .. }), "{error}");
        assert!(error.is_retryable());
        let error = store.write(vec![write_row("e", 2)]).await.unwrap_err();
        assert!(matches!(error, StoreError::Unreachable { .. }), "{error}");
        assert!(start.elapsed() < TIMEOUT);
    }

    server.restart().unwrap();
    let start = Instant::now();
    let outcome = loop {
        match store.write(vec![write_row("e", 1), write_row("e", 3)]).await {
            Ok(outcome) => break outcome,
            Err(error) => assert!(error.is_retryable(), "{error}"),
        }
        assert!(start.elapsed() < TIMEOUT, "it comes back within the longest backoff");
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    assert_eq!(outcome, WriteOutcome { applied: 1, stale: 1 }, "what was acknowledged is still there");
    while let Err(error) = store.read(&[]).await.and(store.ping().await) {
        assert!(error.is_retryable() && start.elapsed() < TIMEOUT, "{error}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let answers = store.read(&[Read::Row(view().key(*b"e"))]).await.unwrap();
    assert_eq!(answers, [Answer::Row(Some(conformance::row(3, None, 0, "value")))]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_killed_in_the_middle_of_writes_keeps_what_it_acknowledged() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mut server) = RedisServer::start(folder.path()) else { return };
    let store = Arc::new(RedisStore::connect(&server.url(), TIMEOUT).await.unwrap());
    let (acknowledged, mut progress) = tokio::sync::watch::channel(0);
    let writer = tokio::spawn({
        let store = store.clone();
        async move {
            for event_time in 1.. {
                let start = Instant::now();
                match store.write(vec![write_row("e", event_time)]).await {
                    Ok(outcome) => assert_eq!(outcome, WriteOutcome { applied: 1, stale: 0 }),
                    Err(error) => {
                        assert!(error.is_retryable() && start.elapsed() < TIMEOUT, "{error}");
                        return;
                    }
                }
                acknowledged.send_replace(event_time);
            }
        }
    });
    progress.wait_for(|written| *written >= 20).await.unwrap();
    server.kill();
    writer.await.unwrap();
    let acknowledged = *progress.borrow();

    server.restart().unwrap();
    let start = Instant::now();
    let answers = loop {
        match store.read(&[Read::Row(view().key(*b"e"))]).await {
            Ok(answers) => break answers,
            Err(error) => assert!(error.is_retryable() && start.elapsed() < TIMEOUT, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    // The write that failed may have happened.
    let row = |event_time| [Answer::Row(Some(conformance::row(event_time, None, 0, "value")))];
    assert!(answers == row(acknowledged) || answers == row(acknowledged + 1), "{answers:?} after {acknowledged}");
}

#[tokio::test]
async fn a_restart_between_two_calls_is_not_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mut server) = RedisServer::start(folder.path()) else { return };
    let store = RedisStore::connect(&server.url(), TIMEOUT).await.unwrap();
    for event_time in 1..4 {
        store.write(vec![write_row("e", event_time)]).await.unwrap();
        server.restart().unwrap();
        // It may still be loading, which is an error of its own kind; once it has loaded, the first call succeeds.
        let start = Instant::now();
        while raw_loading(&server).await {
            assert!(start.elapsed() < TIMEOUT);
        }
        let answers = store.read(&[Read::Row(view().key(*b"e"))]).await.unwrap();
        assert_eq!(answers, [Answer::Row(Some(conformance::row(event_time, None, 0, "value")))]);
    }
}

async fn raw_loading(server: &RedisServer) -> bool {
    let Value::BulkString(info) = raw(server, &[b"INFO", b"persistence"]).await else { panic!("INFO is text") };
    String::from_utf8_lossy(&info).contains("loading:1")
}

/// A server that takes connections and says nothing, as after SIGSTOP or behind a firewall that drops packets.
#[tokio::test]
async fn a_silent_redis_never_holds_a_call() {
    let folder = tempfile::tempdir().unwrap();
    let Some(server) = RedisServer::start_with(folder.path(), &[]) else { return };
    let store = RedisStore::connect(&server.url(), SHORT).await.unwrap();
    let signal = |name: &str| {
        let pid = server.pid().unwrap().to_string();
        assert!(Command::new("kill").args([name, &pid]).status().unwrap().success());
    };
    signal("-STOP");
    let start = Instant::now();
    let error = store.write(vec![write_row("e", 1)]).await.unwrap_err();
    assert!(matches!(error, StoreError::Timeout { millis: 1000, .. }), "{error}");
    assert!(error.to_string().contains(&format!("redis://127.0.0.1:{} did not answer within 1000 ms", server.port())));
    // The next call meets no connection at all, and many at once do not wait for each other.
    let reads = [Read::Row(view().key(*b"e"))];
    let calls = (0..50).map(|_| store.read(&reads));
    for result in join_all(calls).await {
        assert!(result.unwrap_err().is_retryable());
    }
    assert!(start.elapsed() < TIMEOUT, "{:?}", start.elapsed());

    signal("-CONT");
    let start = Instant::now();
    while let Err(error) = store.write(vec![write_row("e", 2)]).await {
        assert!(error.is_retryable() && start.elapsed() < TIMEOUT, "{error}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn an_unreachable_redis_is_named_with_the_next_step() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let start = Instant::now();
    let store = RedisStore::connect(&format!("redis://:secret@127.0.0.1:{port}"), SHORT).await.unwrap();
    let error = store.ping().await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("no connection within 1000 ms"), "{text}");
    assert!(error.is_retryable());

    drop(listener);
    let store = RedisStore::connect(&format!("redis://:secret@127.0.0.1:{port}"), TIMEOUT).await.unwrap();
    let error = store.ping().await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&format!("redis://127.0.0.1:{port} cannot be reached")), "{text}");
    assert!(text.contains("Connection refused"), "{text}");
    assert!(text.contains("start it or check `online:` in coeval.yaml"), "{text}");
    assert!(!text.contains("secret"), "{text}");
    assert!(start.elapsed() < TIMEOUT);
}

#[tokio::test]
async fn flushed_functions_are_loaded_again() {
    let folder = tempfile::tempdir().unwrap();
    let Some(server) = RedisServer::start(folder.path()) else { return };
    let store = RedisStore::connect(&server.url(), TIMEOUT).await.unwrap();
    for event_time in 1..3 {
        raw(&server, &[b"FUNCTION", b"FLUSH"]).await;
        let fact = Write::Fact("checkpoint".to_owned(), Some(Bytes::from_static(b"1")));
        let outcome = store.write(vec![write_row("e", event_time), write_row("f", event_time), fact]).await.unwrap();
        assert_eq!(outcome, WriteOutcome { applied: 3, stale: 0 });
    }
}

#[tokio::test]
async fn servers_that_would_lose_features_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let options = ["--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"];
    let Some(server) = RedisServer::start_with(folder.path(), &options) else { return };
    let error = RedisStore::connect(&server.url(), TIMEOUT).await.err().unwrap();
    assert!(matches!(error, StoreError::Refused { .. }), "{error}");
    assert!(error.to_string().contains("set it to noeviction"), "{error}");

    raw(&server, &[b"CONFIG", b"SET", b"maxmemory-policy", b"noeviction"]).await;
    let store = RedisStore::connect(&server.url(), TIMEOUT).await.unwrap();
    raw(&server, &[b"CONFIG", b"SET", b"maxmemory", b"1"]).await;
    let fact = Write::Fact("checkpoint".to_owned(), Some(Bytes::from_static(b"1")));
    let error = store.write(vec![write_row("e", 1), fact]).await.unwrap_err();
    assert!(matches!(error, StoreError::Refused { .. }), "{error}");
    assert!(error.to_string().contains("OOM"), "{error}");

    // Memory is there again: the checkpoint did not get ahead of the row.
    raw(&server, &[b"CONFIG", b"SET", b"maxmemory", b"0"]).await;
    let reads = [Read::Row(view().key(*b"e")), Read::Fact("checkpoint".to_owned())];
    assert_eq!(store.read(&reads).await.unwrap(), [Answer::Row(None), Answer::Fact(None)]);

    raw(&server, &[b"CONFIG", b"SET", b"requirepass", b"hunter2"]).await;
    let error = RedisStore::connect(&server.url(), TIMEOUT).await.err().unwrap();
    assert!(matches!(error, StoreError::Refused { .. }), "{error}");
    let url = format!("redis://:hunter2@127.0.0.1:{}/1", server.port());
    let store = RedisStore::connect(&url, TIMEOUT).await.unwrap();
    assert_eq!(store.place(), format!("redis://127.0.0.1:{}/1", server.port()));
}

#[tokio::test]
async fn foreign_bytes_are_corrupt() {
    let folder = tempfile::tempdir().unwrap();
    let Some(server) = RedisServer::start(folder.path()) else { return };
    let store = RedisStore::connect(&server.url(), TIMEOUT).await.unwrap();
    let key = view().key(*b"e");
    let tiles = || {
        vec![Write::Tiles {
            key: key.clone(),
            position: Position::END,
            set: vec![],
            remove: vec![],
            epoch: 0,
            expires: None,
        }]
    };
    let corrupt = |error: StoreError, part: &str| {
        assert!(matches!(error, StoreError::Corrupt { .. }), "{error}");
        assert!(error.to_string().contains(part), "{error}");
    };

    raw(&server, &[b"SET", &key.tagged(), b"short"]).await;
    corrupt(store.write(vec![write_row("e", 1)]).await.unwrap_err(), "c1:{p/e}v@0123456789abcdef");
    corrupt(store.write(vec![write_row("e", 1)]).await.unwrap_err(), "a row of 5 bytes");
    corrupt(store.write(tiles()).await.unwrap_err(), "another kind of value");
    corrupt(store.read(&[Read::AllTiles(key.clone())]).await.unwrap_err(), "another kind of value");

    raw(&server, &[b"DEL", &key.tagged()]).await;
    raw(&server, &[b"HSET", &key.tagged(), b"h", b"short"]).await;
    corrupt(store.write(tiles()).await.unwrap_err(), "a header of 5 bytes");
    corrupt(store.read(&[Read::Tiles(key.clone(), vec![])]).await.unwrap_err(), "a header of 5 bytes");
    corrupt(store.write(vec![write_row("e", 1)]).await.unwrap_err(), "another kind of value");

    raw(&server, &[b"HSET", &key.tagged(), b"h", &encode_position(Position::START), b"x", b"y"]).await;
    corrupt(store.read(&[Read::AllTiles(key.clone())]).await.unwrap_err(), "a field `x`");
}
