//! The store over real clusters.

use std::time::Instant;

use bytes::Bytes;

use super::*;
use crate::conformance::redis_cluster::RedisCluster;
use crate::conformance::{self};
use crate::key::Key;

const TIMEOUT: Duration = Duration::from_secs(10);
const SHORT: Duration = Duration::from_secs(1);
/// What a busy test machine adds.
const SLACK: Duration = Duration::from_secs(2);
/// How long a failover may take: a second until the master is missed, then an election.
const FAILOVER: Duration = Duration::from_secs(40);

fn view() -> Generation {
    Generation::new("p", "v", "0123456789abcdef")
}

fn key(number: u32) -> Key {
    view().key(number.to_be_bytes())
}

fn slot_of(number: u32) -> u16 {
    slot::slot(&key(number).tagged())
}

/// Which third of the slots holds an entity.
fn master_of(number: u32) -> usize {
    usize::from(slot_of(number)) * 3 / slot::SLOTS
}

/// Entities that lie on one of three masters.
fn on(master: usize) -> impl Iterator<Item = u32> {
    (0..).filter(move |number| master_of(*number) == master)
}

fn row(number: u32, event_time: i64) -> Write {
    let blob = conformance::row(event_time, None, 0, "value");
    Write::Row { key: key(number), blob, expires: None }
}

fn expected(event_time: i64) -> Answer {
    Answer::Row(Some(conformance::row(event_time, None, 0, "value")))
}

fn fact(value: &'static str) -> Write {
    Write::Fact("fact".to_owned(), Some(Bytes::from_static(value.as_bytes())))
}

fn facts() -> [Read; 2] {
    [Read::Fact("fact".to_owned()), Read::Mark("mark".to_owned())]
}

async fn raw(cluster: &RedisCluster, node: usize, parts: &[&[u8]]) -> Value {
    let mut command = Cmd::new();
    for part in parts {
        command.arg(part);
    }
    let client = ::redis::Client::open(cluster.nodes[node].url()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    command.query_async(&mut connection).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conforms() {
    let folder = tempfile::tempdir().unwrap();
    let Some(cluster) = RedisCluster::start(folder.path(), 3, false, &[]) else { return };
    let store = RedisStore::connect(&cluster.url(), TIMEOUT).await.unwrap();
    assert_eq!(store.place(), cluster.url());
    let store = Arc::new(store);
    conformance::run(store.clone(), "cluster").await;
    let nodes = store.report().await.unwrap();
    assert_eq!(nodes.len(), 3);
    for node in nodes {
        assert_eq!((node.role.as_str(), node.problems.len()), ("master", 0), "{node:?}");
        assert!(node.keys.unwrap() > 100, "every master holds something: {node:?}");
    }
}

#[tokio::test]
async fn slots_are_those_of_redis() {
    let folder = tempfile::tempdir().unwrap();
    let Some(cluster) = RedisCluster::start(folder.path(), 1, false, &[]) else { return };
    let mut keys: Vec<Vec<u8>> =
        [&b""[..], b"{", b"}", b"{}", b"a{}b{c}", b"{a}", b"x{a}y{b}", b"{{a}}", b"a{b", b"\0\xff{\n}"]
            .map(<[u8]>::to_vec)
            .to_vec();
    keys.extend((0..200).map(|number| key(number * 7_919).tagged()));
    keys.extend((0..200u32).map(|number| number.to_string().into_bytes()));
    for key in keys {
        let answer = raw(&cluster, 0, &[b"CLUSTER", b"KEYSLOT", &key]).await;
        assert_eq!(answer, Value::Int(i64::from(slot::slot(&key))), "{}", key.escape_ascii());
    }
}

#[tokio::test]
async fn a_killed_master_is_replaced_by_its_replica() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mut cluster) = RedisCluster::start(folder.path(), 3, true, &[]) else { return };
    let timeout = Duration::from_secs(2);
    let store = RedisStore::connect(&cluster.url(), timeout).await.unwrap();
    let mark = Write::Mark("mark".to_owned(), Position { time: 1, sequence: 1 });
    let mut writes: Vec<Write> = (0..300).map(|number| row(number, 1)).collect();
    writes.extend([fact("ready"), mark]);
    store.write(writes).await.unwrap();
    assert_eq!(store.claim("writer", 5).await.unwrap(), 5);
    let roles = |nodes: &[NodeReport]| nodes.iter().filter(|node| node.role == "replica").count();
    let nodes = store.report().await.unwrap();
    assert_eq!(roles(&nodes), 3, "{nodes:?}");
    // A write does not wait for replicas; here they must have it.
    cluster.wait_until_replicated(0);

    cluster.nodes[0].kill();
    let start = Instant::now();
    let others: Vec<Read> = on(1).take(20).map(|number| Read::Row(key(number))).collect();
    let own: Vec<Read> = on(0).take(20).map(|number| Read::Row(key(number))).collect();
    // Who does not need it does not notice, not even before the others do.
    assert_eq!(store.read(&others).await.unwrap(), vec![expected(1); 20]);
    let mut failures = 0;
    loop {
        let call = Instant::now();
        let result = store.read(&own).await;
        assert!(call.elapsed() < timeout + SLACK, "{:?}", call.elapsed());
        match result {
            Ok(answers) => break assert_eq!(answers, vec![expected(1); 20]),
            Err(error) => assert!(error.is_retryable() && start.elapsed() < FAILOVER, "{error}"),
        }
        failures += 1;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(failures > 0, "the master was there all the time");
    // The functions are there, too, and what was remembered, and no epoch is given twice.
    while let Err(error) = store.write((0..300).map(|number| row(number, 2)).collect()).await {
        assert!(error.is_retryable() && start.elapsed() < FAILOVER, "{error}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let reads: Vec<Read> = (0..300).map(|number| Read::Row(key(number))).chain(facts()).collect();
    let answers = store.read(&reads).await.unwrap();
    assert_eq!(answers[..300], vec![expected(2); 300]);
    let mark = Answer::Mark(Some(Position { time: 1, sequence: 1 }));
    assert_eq!(answers[300..], [Answer::Fact(Some(Bytes::from_static(b"ready"))), mark]);
    assert_eq!(store.claim("writer", 5).await.unwrap(), 6);

    // It comes back as a replica of the one that replaced it.
    cluster.nodes[0].restart().unwrap();
    cluster.wait_until_ok();
    store.ping().await.unwrap();
}

#[tokio::test]
async fn a_silent_master_delays_only_those_who_need_it() {
    let folder = tempfile::tempdir().unwrap();
    let Some(cluster) = RedisCluster::start(folder.path(), 3, false, &["--cluster-require-full-coverage", "no"]) else {
        return;
    };
    let store = RedisStore::connect(&cluster.url(), SHORT).await.unwrap();
    store.write((0..100).map(|number| row(number, 1)).collect()).await.unwrap();
    cluster.nodes[2].signal("STOP");
    for _ in 0..3 {
        let start = Instant::now();
        let error = store.read(&[Read::Row(key(on(2).next().unwrap()))]).await.unwrap_err();
        assert!(error.is_retryable() && start.elapsed() < SHORT + SLACK, "{error} after {:?}", start.elapsed());
        let place = format!("127.0.0.1:{}", cluster.nodes[2].port());
        assert!(error.to_string().contains(&place), "{error}");
        let others: Vec<Read> = on(1).take(20).map(|number| Read::Row(key(number))).collect();
        assert_eq!(store.read(&others).await.unwrap(), vec![expected(1); 20]);
    }
    assert!(store.ping().await.unwrap_err().is_retryable());
    let nodes = store.report().await.unwrap();
    assert_eq!(nodes.iter().filter(|node| !node.problems.is_empty()).count(), 1, "{nodes:?}");
    cluster.nodes[2].signal("CONT");
    let start = Instant::now();
    while let Err(error) = store.write((0..100).map(|number| row(number, 2)).collect()).await {
        assert!(error.is_retryable() && start.elapsed() < FAILOVER, "{error}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_slot_that_moves_is_followed() {
    let folder = tempfile::tempdir().unwrap();
    let Some(cluster) = RedisCluster::start(folder.path(), 3, false, &[]) else { return };
    let store = RedisStore::connect(&cluster.url(), TIMEOUT).await.unwrap();
    // A slot of the first master that holds a copy of the facts, and entities that lie on it.
    let (_, slot) = slot::COPY_TAGS[0];
    let entities: Vec<u32> = (0..).filter(|number| slot_of(*number) == slot).take(4).collect();
    let mark = || Write::Mark("mark".to_owned(), Position { time: 3, sequence: 4 });
    let writes = vec![row(entities[0], 1), row(entities[1], 1), fact("before"), mark()];
    store.write(writes).await.unwrap();
    let reads: Vec<Read> = entities.iter().map(|number| Read::Row(key(*number))).chain(facts()).collect();
    let facts = |value: &'static str| {
        [
            Answer::Fact(Some(Bytes::from_static(value.as_bytes()))),
            Answer::Mark(Some(Position { time: 3, sequence: 4 })),
        ]
    };
    let [none, some] = [Answer::Row(None), expected(1)];
    let check = async |rows: [&Answer; 4], value| {
        let expected: Vec<Answer> = rows.into_iter().cloned().chain(facts(value)).collect();
        assert_eq!(store.read(&reads).await.unwrap(), expected);
    };
    check([&some, &some, &none, &none], "before").await;

    let number = slot.to_string();
    let ids = [cluster.id(0), cluster.id(1)];
    let setslot = async |node: usize, parts: [&str; 2]| {
        let state: [&[u8]; 5] = [b"CLUSTER", b"SETSLOT", number.as_bytes(), parts[0].as_bytes(), parts[1].as_bytes()];
        assert_eq!(raw(&cluster, node, &state).await, Value::Okay);
    };
    setslot(1, ["IMPORTING", &ids[0]]).await;
    setslot(0, ["MIGRATING", &ids[1]]).await;
    // What is there is answered by the first master, for what is not it sends us to the second (ASK).
    check([&some, &some, &none, &none], "before").await;
    let outcome = store.write(vec![row(entities[2], 1), row(entities[0], 1), row(entities[2], 1)]).await.unwrap();
    assert_eq!(outcome, WriteOutcome { applied: 1, stale: 2 });
    check([&some, &some, &some, &none], "before").await;
    // One by one the keys follow.
    let port = cluster.nodes[1].port().to_string();
    loop {
        let keys = raw(&cluster, 0, &[b"CLUSTER", b"GETKEYSINSLOT", number.as_bytes(), b"1"]).await;
        let keys: Vec<Vec<u8>> = ::redis::from_redis_value(keys).unwrap();
        let Some(key) = keys.first() else { break };
        let migrate: [&[u8]; 6] = [b"MIGRATE", b"127.0.0.1", port.as_bytes(), key, b"0", b"5000"];
        assert_eq!(raw(&cluster, 0, &migrate).await, Value::Okay);
        check([&some, &some, &some, &none], "before").await;
    }
    store.write(vec![fact("between")]).await.unwrap();
    check([&some, &some, &some, &none], "between").await;
    // Now it belongs to the second (MOVED).
    setslot(1, ["NODE", &ids[1]]).await;
    setslot(0, ["NODE", &ids[1]]).await;
    check([&some, &some, &some, &none], "between").await;
    store.write(vec![row(entities[3], 1), fact("after"), mark()]).await.unwrap();
    check([&some, &some, &some, &some], "after").await;
    assert_eq!(store.nodes.holder(slot).unwrap().server.place.as_ref(), cluster.nodes[1].url());
    assert_eq!(store.remove_generation(&view()).await.unwrap(), 4);
}

#[tokio::test]
async fn an_emptied_master_is_noticed_by_those_who_need_it() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mut cluster) = RedisCluster::start(folder.path(), 3, false, &[]) else { return };
    let store = RedisStore::connect(&cluster.url(), TIMEOUT).await.unwrap();
    let mark = |sequence| Write::Mark("mark".to_owned(), Position { time: 1, sequence });
    let mut writes: Vec<Write> = (0..100).map(|number| row(number, 1)).collect();
    writes.extend([fact("ready"), mark(7)]);
    store.write(writes).await.unwrap();

    // Without an append-only file it comes back with nothing, not even the functions.
    cluster.nodes[1].restart().unwrap();
    cluster.wait_until_ok();
    let ready = Answer::Fact(Some(Bytes::from_static(b"ready")));
    let of = |master: usize| vec![facts()[0].clone(), Read::Row(key(on(master).next().unwrap()))];
    let start = Instant::now();
    let answers = loop {
        match store.read(&of(1)).await {
            Ok(answers) => break answers,
            Err(error) => assert!(error.is_retryable() && start.elapsed() < TIMEOUT, "{error}"),
        }
    };
    assert_eq!(answers, [Answer::Fact(None), Answer::Row(None)], "it would be served as missing otherwise");
    for master in [0, 2] {
        assert_eq!(store.read(&of(master)).await.unwrap(), [ready.clone(), expected(1)], "the others are as they were");
    }
    let both = [of(0), of(1)].concat();
    assert_eq!(store.read(&both).await.unwrap()[0], Answer::Fact(None), "a call that touches it");
    assert_eq!(store.read(&facts()).await.unwrap(), [Answer::Fact(None), Answer::Mark(None)]);

    // Filled again, it counts again. The least mark is the one that everybody has.
    let mut writes: Vec<Write> = (0..100).map(|number| row(number, 1)).collect();
    writes.extend([fact("ready"), mark(3)]);
    store.write(writes).await.unwrap();
    assert_eq!(store.read(&of(1)).await.unwrap(), [ready.clone(), expected(1)]);
    let least = Answer::Mark(Some(Position { time: 1, sequence: 3 }));
    assert_eq!(store.read(&facts()).await.unwrap(), [ready, least]);
}

#[tokio::test]
async fn what_is_no_cluster_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let Some(server) = conformance::redis_server::RedisServer::start_with(folder.path(), &[]) else { return };
    let url = server.url().replace("redis://", "redis+cluster://");
    let error = RedisStore::connect(&url, TIMEOUT).await.err().unwrap();
    assert!(matches!(error, StoreError::Refused { .. }), "{error}");
    assert!(error.to_string().contains("write redis://"), "{error}");

    let folder = tempfile::tempdir().unwrap();
    let Some(cluster) = RedisCluster::start(folder.path(), 1, false, &["--maxmemory-policy", "allkeys-lru"]) else {
        return;
    };
    let error = RedisStore::connect(&cluster.nodes[0].url(), TIMEOUT).await.err().unwrap();
    assert!(error.to_string().contains("write redis+cluster://"), "{error}");
    let error = RedisStore::connect(&cluster.url(), TIMEOUT).await.err().unwrap();
    assert!(error.to_string().contains("set it to noeviction"), "{error}");
    assert!(error.to_string().contains(&format!("redis://127.0.0.1:{}", cluster.nodes[0].port())), "{error}");
}
