//! Faults of real servers and of the network before them.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::sleep;

use super::*;
use crate::conformance::redis_server::{RedisServer, free_port};
use crate::conformance::{self};

const TIMEOUT: Duration = Duration::from_secs(10);
const SHORT: Duration = Duration::from_secs(1);
/// What a busy test machine adds.
const SLACK: Duration = Duration::from_secs(2);

fn view() -> Generation {
    Generation::new("p", "v", "0123456789abcdef")
}

fn row(entity: &str, event_time: i64) -> Write {
    let blob = conformance::row(event_time, None, 0, "value");
    Write::Row { key: view().key(entity.as_bytes()), blob, expires: None }
}

fn expected(event_time: i64) -> Answer {
    Answer::Row(Some(conformance::row(event_time, None, 0, "value")))
}

fn read(entity: &str) -> [Read; 2] {
    [Read::Fact("ready".to_owned()), Read::Row(view().key(entity.as_bytes()))]
}

fn ready() -> Write {
    Write::Fact("ready".to_owned(), Some(Bytes::from_static(b"1")))
}

/// Carries bytes to a server at once, and back late.
struct SlowProxy {
    port: u16,
    delay_ms: Arc<AtomicU64>,
}

impl SlowProxy {
    async fn before(server: u16) -> SlowProxy {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let delay_ms = Arc::new(AtomicU64::new(0));
        let delay = delay_ms.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, server)).await else { continue };
                let (mut from_client, mut to_client) = client.into_split();
                let (mut from_server, mut to_server) = server.into_split();
                tokio::spawn(async move { tokio::io::copy(&mut from_client, &mut to_server).await });
                let delay = delay.clone();
                tokio::spawn(async move {
                    let mut buffer = vec![0; 1 << 16];
                    while let Ok(count @ 1..) = from_server.read(&mut buffer).await {
                        sleep(Duration::from_millis(delay.load(Ordering::SeqCst))).await;
                        if to_client.write_all(&buffer[..count]).await.is_err() {
                            break;
                        }
                    }
                });
            }
        });
        SlowProxy { port, delay_ms }
    }

    fn delay(&self, milliseconds: u64) {
        self.delay_ms.store(milliseconds, Ordering::SeqCst);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_network_is_waited_for_no_longer_than_the_timeout() {
    let folder = tempfile::tempdir().unwrap();
    let Some(server) = RedisServer::start_with(folder.path(), &[]) else { return };
    let proxy = SlowProxy::before(server.port()).await;
    let url = format!("redis://127.0.0.1:{}", proxy.port);
    let store = RedisStore::connect(&url, SHORT).await.unwrap();
    store.write(vec![row("e", 1), ready()]).await.unwrap();

    // Slow, but in time, and calls do not queue behind each other.
    proxy.delay(200);
    let start = Instant::now();
    let reads = read("e");
    for answers in join_all((0..20).map(|_| store.read(&reads))).await {
        assert_eq!(answers.unwrap()[1], expected(1));
    }
    assert!(start.elapsed() >= Duration::from_millis(200) && start.elapsed() < SHORT + SLACK, "{:?}", start.elapsed());

    // Too slow.
    proxy.delay(3_000);
    let start = Instant::now();
    for result in join_all((0..20).map(|_| store.read(&reads))).await {
        let error = result.unwrap_err();
        assert!(matches!(error, StoreError::Timeout { .. }), "{error}");
    }
    assert!(store.write(vec![row("e", 2)]).await.unwrap_err().is_retryable());
    assert!(start.elapsed() < 2 * SHORT + SLACK, "{:?}", start.elapsed());

    // Well again. The write that was given up may have happened.
    proxy.delay(0);
    let start = Instant::now();
    while let Err(error) = store.write(vec![row("e", 3)]).await {
        assert!(error.is_retryable() && start.elapsed() < TIMEOUT, "{error}");
        sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(store.read(&reads).await.unwrap()[1], expected(3));
}

#[tokio::test]
async fn full_memory_stops_writes_and_not_reads() {
    let folder = tempfile::tempdir().unwrap();
    let Some(server) = RedisServer::start_with(folder.path(), &["--maxmemory", "8mb"]) else { return };
    let store = RedisStore::connect(&server.url(), TIMEOUT).await.unwrap();
    store.write(vec![row("e", 1), ready()]).await.unwrap();
    let large = "x".repeat(1 << 20);
    let mut error = None;
    for number in 0..20 {
        let blob = conformance::row(1, None, 0, &large);
        let key = view().key(format!("large {number}").as_bytes());
        let fact = Write::Fact("written".to_owned(), Some(Bytes::from(number.to_string())));
        if let Err(refused) = store.write(vec![Write::Row { key, blob, expires: None }, fact]).await {
            error = Some((number, refused));
            break;
        }
    }
    let (written, error) = error.expect("20 MiB do not fit");
    let text = error.to_string();
    assert!(matches!(error, StoreError::Refused { .. }), "{text}");
    for part in ["its memory is full", "of 8.0 MiB", "reads go on", "raise maxmemory", &server.url()] {
        assert!(text.contains(part), "{text}");
    }
    // Over new connections, too, whose functions cannot be loaded now.
    for store in [&store, &RedisStore::connect(&server.url(), TIMEOUT).await.unwrap()] {
        let answers = store.read(&read("e")).await.unwrap();
        assert_eq!(answers, [Answer::Fact(Some(Bytes::from_static(b"1"))), expected(1)]);
    }
    let last = store.read(&[Read::Fact("written".to_owned())]).await.unwrap();
    assert_eq!(last, [Answer::Fact(Some(Bytes::from((written - 1).to_string())))], "no fact gets ahead");
    let nodes = store.report().await.unwrap();
    assert!(nodes[0].problems[0].contains("refuses writes when all of it is used"), "{nodes:?}");

    // Room again, and it goes on by itself.
    assert_eq!(store.remove_generation(&Generation::new("p", "none", "00")).await.unwrap(), 0);
    server.ask(&["CONFIG", "SET", "maxmemory", "64mb"]).unwrap();
    store.write(vec![row("e", 2)]).await.unwrap();
}

#[tokio::test]
async fn a_restart_shows_whether_the_data_is_still_there() {
    for (options, is_kept) in [(&["--appendonly", "yes", "--appendfsync", "always"][..], true), (&[], false)] {
        let folder = tempfile::tempdir().unwrap();
        let Some(mut server) = RedisServer::start_with(folder.path(), options) else { return };
        let store = RedisStore::connect(&server.url(), TIMEOUT).await.unwrap();
        let durability = store.report().await.unwrap().remove(0).durability;
        assert_eq!(durability, if is_kept { "appendfsync always" } else { "no append-only file" });
        let mark = Write::Mark("mark".to_owned(), Position { time: 1, sequence: 2 });
        store.write(vec![row("e", 1), ready(), mark]).await.unwrap();
        server.restart().unwrap();
        let mut reads = read("e").to_vec();
        reads.push(Read::Mark("mark".to_owned()));
        let start = Instant::now();
        let answers = loop {
            match store.read(&reads).await {
                Ok(answers) => break answers,
                // It still loads.
                Err(error) => assert!(error.is_retryable() && start.elapsed() < TIMEOUT, "{error}"),
            }
            sleep(Duration::from_millis(10)).await;
        };
        let expected = match is_kept {
            true => [
                Answer::Fact(Some(Bytes::from_static(b"1"))),
                expected(1),
                Answer::Mark(Some(Position { time: 1, sequence: 2 })),
            ],
            false => [Answer::Fact(None), Answer::Row(None), Answer::Mark(None)],
        };
        assert_eq!(answers, expected);
        store.write(vec![row("e", 2), ready()]).await.unwrap();
    }
}

#[tokio::test]
async fn a_store_is_opened_before_its_redis_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mut server) = RedisServer::start_with(folder.path(), &[]) else { return };
    server.kill();
    let cluster = format!("redis+cluster://127.0.0.1:{},127.0.0.1:{}", server.port(), free_port());
    for url in [server.url(), cluster] {
        let store = RedisStore::connect(&url, SHORT).await.unwrap();
        let start = Instant::now();
        for error in [
            store.read(&read("e")).await.unwrap_err(),
            store.write(vec![row("e", 1)]).await.unwrap_err(),
            store.ping().await.unwrap_err(),
        ] {
            assert!(error.is_retryable() && error.to_string().contains("start it or check `online:`"), "{error}");
        }
        assert!(start.elapsed() < SHORT + SLACK, "{:?}", start.elapsed());
        let nodes = store.report().await.unwrap();
        assert!(nodes[0].problems[0].contains("cannot be reached"), "{nodes:?}");
    }
    let store = RedisStore::connect(&server.url(), TIMEOUT).await.unwrap();
    server.restart().unwrap();
    let start = Instant::now();
    while let Err(error) = store.write(vec![row("e", 1)]).await {
        assert!(error.is_retryable() && start.elapsed() < TIMEOUT, "{error}");
        sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(store.read(&read("e")).await.unwrap()[1], expected(1));
}
