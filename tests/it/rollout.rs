//! Rollouts over several real gateways: by the criteria and nothing else, whoever is killed meanwhile, and undone at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use online_store::conformance::redis_server::RedisServer;
use proto::v1;
use proto::v1::control_client::ControlClient;
use proto::v1::gateway_client::GatewayClient;
use registry::id::EntryNumber;
use registry::log::Entry;
use tests::Project;
use tests::column::{doubles, int64s, strings};
use tokio::task::JoinHandle;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::fleet::{Seen, gateway_with_clock, log_of, promote, refused, register, rollback, wait_for};
use crate::models::{model_file, padded};
use crate::process::Process;

/// Without shadow criteria, and with short times: what is tested is who moves the traffic, and why.
const DEFINITIONS: &str = r#"
entities:
  - {name: thing, keys: [{name: thing, type: string}]}
requests:
  - {name: trip, fields: [{name: a, type: float64}, {name: b, type: float64}, {name: c, type: float64}, {name: carrier, type: int64}]}
feature_services:
  - {name: trips, features: ["trip:a", "trip:b", "trip:c", "trip:carrier"]}
models:
  - name: delay
    features: trips
    runtime: torchscript
    inputs:
      - {name: dense, dtype: float32, features: ["trip:a", "trip:b", "trip:c"]}
      - {name: carrier, dtype: int64, features: ["trip:carrier"]}
    outputs: [{name: score, dtype: float32}]
    decision: "score > 0.5"
    batching: {max_rows: 8}
    canary: {unit: thing, without_unit: champion, steps: [50%, 100%], bake: 3s, min_units: 50, window: 1s, ends_after: 1d, guardrails: [error_rate < 20%]}
"#;

const ROWS: usize = 8;
const UNITS: usize = 20_000;
/// For two steps with their bake, and looks every two seconds on a busy machine.
const PROMOTED_WITHIN: Duration = Duration::from_secs(90);
const UNDONE_WITHIN: Duration = Duration::from_secs(1);

fn project(redis: &str) -> Project {
    let settings = format!(
        "project: life\nstore: ${{STORE:-./.coeval}}\nonline: {redis}\nserve: {{grpc: 127.0.0.1:0, http: 127.0.0.1:0}}\n"
    );
    Project::new(&settings, DEFINITIONS).unwrap()
}

/// One request about as many units as it has rows; which version answered which.
async fn ask(channel: &Channel, first: usize) -> Result<Vec<(usize, u32)>, Status> {
    let units: Vec<usize> = (first..first + ROWS).map(|unit| unit % UNITS).collect();
    let names: Vec<String> = units.iter().map(|unit| format!("unit {unit}")).collect();
    let things: Vec<Option<&str>> = names.iter().map(|name| Some(name.as_str())).collect();
    let request = v1::PredictRequest {
        project: "life".into(),
        model: "delay".into(),
        rows: vec![
            strings("thing", &things),
            doubles("a", &[Some(1.0); ROWS]),
            doubles("b", &[Some(-0.5); ROWS]),
            doubles("c", &[Some(0.25); ROWS]),
            int64s("carrier", &[Some(1); ROWS]),
        ],
        ..v1::PredictRequest::default()
    };
    let answer = GatewayClient::new(channel.clone()).predict(request).await?.into_inner();
    Ok(units.into_iter().zip(answer.outcomes.iter().map(|outcome| outcome.version)).collect())
}

/// When a request was sent, about which unit, and which version answered.
type Answered = (Instant, usize, u32);

/// Callers of one gateway, until they are told to end or the gateway is gone.
struct Traffic {
    stop: Arc<AtomicBool>,
    asked: Vec<JoinHandle<Vec<Answered>>>,
}

impl Traffic {
    fn over(gateways: &[Channel]) -> Traffic {
        let stop = Arc::new(AtomicBool::new(false));
        let next = Arc::new(AtomicUsize::new(0));
        let caller = |channel: &Channel| {
            let (channel, stopped, next) = (channel.clone(), stop.clone(), next.clone());
            tokio::spawn(async move {
                let mut asked = Vec::new();
                while !stopped.load(Ordering::SeqCst) {
                    let sent = Instant::now();
                    // A gateway that was killed answers nobody any more.
                    let Ok(answers) = ask(&channel, next.fetch_add(ROWS, Ordering::SeqCst)).await else { return asked };
                    asked.extend(answers.into_iter().map(|(unit, version)| (sent, unit, version)));
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                asked
            })
        };
        let asked = gateways.iter().map(caller).collect();
        Traffic { stop, asked }
    }

    async fn end(self) -> Vec<Vec<Answered>> {
        self.stop.store(true, Ordering::SeqCst);
        let mut all = Vec::new();
        for asked in self.asked {
            all.push(asked.await.unwrap());
        }
        all
    }
}

async fn begin(channel: &Channel, version: u32, who: &str) -> Result<v1::BeginRolloutResponse, Status> {
    let request = v1::BeginRolloutRequest {
        project: "life".into(),
        model: "delay".into(),
        version,
        who: who.into(),
        why: "a test".into(),
        ..v1::BeginRolloutRequest::default()
    };
    Ok(ControlClient::new(channel.clone()).begin_rollout(request).await?.into_inner())
}

async fn change(
    channel: &Channel,
    what: v1::change_rollout_request::Change,
) -> Result<v1::ChangeRolloutResponse, Status> {
    let request = v1::ChangeRolloutRequest {
        project: "life".into(),
        model: "delay".into(),
        change: what.into(),
        who: "ada".into(),
        why: "a test".into(),
        ..v1::ChangeRolloutRequest::default()
    };
    Ok(ControlClient::new(channel.clone()).change_rollout(request).await?.into_inner())
}

async fn story(channel: &Channel) -> serde_json::Value {
    let request = v1::GetRolloutRequest { project: "life".into(), model: "delay".into() };
    let answer = ControlClient::new(channel.clone()).get_rollout(request).await.unwrap().into_inner();
    serde_json::from_str(&answer.report).unwrap()
}

/// The entries of the control log that are about rollouts and traffic.
async fn entries(project: &Project) -> Vec<Entry> {
    let entries = log_of(project.path()).read_from(EntryNumber::FIRST, 1_000).await.unwrap();
    let about = |entry: &Entry| entry.kind.starts_with("rollout_") || entry.kind == "model_promote";
    entries.into_iter().filter(about).collect()
}

fn kinds(entries: &[Entry]) -> Vec<&str> {
    entries.iter().map(|entry| entry.kind.as_str()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_canary_over_three_gateways_goes_by_its_criteria_though_one_is_killed() {
    if !cfg!(feature = "torch") {
        eprintln!("skipped: this build has no torch");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let Some(redis) = RedisServer::start(folder.path()) else { return };
    let project = project(&redis.url());
    project.apply().await.unwrap();
    let mut gateways = Vec::new();
    for place in ["one", "two", "three"] {
        gateways.push(Seen::of(&project, place).start(&project, "gateway").await);
    }
    let channels: Vec<Channel> = gateways.iter().map(Process::channel).collect();
    let file = model_file();
    for (number, bytes) in [(1, file.clone()), (2, padded(&file, b'x')), (3, padded(&file, b'y'))] {
        assert_eq!(register(&channels[0], &bytes).await, number);
        crate::models::deploy(&channels[0], number).await.unwrap();
    }

    // Two operators at once: one rollout begins, and whoever was second is told of it.
    let both = tokio::join!(begin(&channels[0], 2, "ada"), begin(&channels[1], 3, "bob"));
    let (begun, late, version) = match both {
        (Ok(begun), Err(late)) => (begun, late, 2),
        (Err(late), Ok(begun)) => (begun, late, 3),
        other => panic!("one of two begins: {other:?}"),
    };
    assert_eq!(late.code(), Code::FailedPrecondition, "{late}");
    assert!(late.message().contains(&format!("version {version}")), "{late}");
    let again = begin(&channels[2], version, "carl").await.unwrap();
    assert!(again.existed && again.rollout == begun.rollout, "saying it twice does nothing");

    // Without a single row nothing goes on, whoever asks for it.
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(kinds(&entries(&project).await), ["rollout_begin"]);
    let advance = v1::change_rollout_request::Change::Advance;
    refused(change(&channels[0], advance).await, Code::FailedPrecondition, &["stays at", "units"]);
    refused(promote(&channels[0], version, "ada").await, Code::FailedPrecondition, &["rollout"]);

    let traffic = Traffic::over(&channels);
    wait_for("the last step", || async { kinds(&entries(&project).await).contains(&"rollout_step") }).await;
    // SIGKILL, with everything that it had open.
    drop(gateways.remove(2));
    let begun_at = Instant::now();
    while !kinds(&entries(&project).await).contains(&"model_promote") {
        let told = story(&channels[0]).await;
        assert!(begun_at.elapsed() < PROMOTED_WITHIN, "not promoted: {told:#}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let log = entries(&project).await;
    assert_eq!(kinds(&log), ["rollout_begin", "rollout_step", "model_promote"], "each of them once");
    for entry in &log[1..] {
        let evidence = &entry.body["evidence"];
        let judged_on = evidence["judged_on"].as_u64().unwrap();
        assert!(judged_on < entry.number.0, "{entry:?}");
        let criteria = evidence["numbers"]["criteria"].as_array().unwrap();
        let verdict = |name: &str| criteria.iter().find(|one| one["name"] == name).map(|one| one["verdict"].clone());
        assert_eq!(verdict("min_units"), Some("met".into()), "{evidence:#}");
        assert_ne!(verdict("error_rate < 20%"), Some("breached".into()), "{evidence:#}");
        assert_eq!(entry.who, "rollout judge");
    }
    let last = log[2].body["evidence"]["numbers"]["criteria"].to_string();
    assert!(last.contains(r#""name":"error_rate < 20%""#), "{last}");
    let met = log[2].body["evidence"]["numbers"]["criteria"].as_array().unwrap();
    assert!(met.iter().any(|one| one["name"] == "error_rate < 20%" && one["verdict"] == "met"), "{last}");

    // Everybody has the new champion, and then has it no more.
    for channel in &channels[..2] {
        wait_for("the champion answers everybody", || async {
            ask(channel, 0).await.is_ok_and(|answers| answers.iter().all(|(_, by)| *by == version))
        })
        .await;
    }
    let undone = Instant::now();
    rollback(&channels[1]).await.unwrap();
    let told = undone.elapsed();
    tokio::time::sleep(UNDONE_WITHIN + Duration::from_millis(500)).await;
    let asked = traffic.end().await;
    let mut worst = Duration::ZERO;
    for asked in &asked[..2] {
        let after: Vec<_> = asked.iter().filter(|(sent, ..)| *sent > undone).collect();
        assert!(after.len() > 100, "somebody asked afterwards: {}", after.len());
        let late = after.iter().filter(|(.., by)| *by != 1).map(|(sent, ..)| *sent - undone);
        worst = worst.max(late.max().unwrap_or_default());
    }
    eprintln!(
        "a rollback was answered after {told:?}; the last request that met the other version came {worst:?} after it was sent"
    );
    assert!(worst < UNDONE_WITHIN, "{worst:?}");
    sticky(&asked, version);
}

/// Whoever had the new version once kept it until the rollback: gateways do not differ about a unit, and a ramp only adds.
fn sticky(asked: &[Vec<Answered>], version: u32) {
    let mut all: Vec<&Answered> = asked.iter().flatten().collect();
    all.sort_by_key(|(sent, ..)| *sent);
    let last = all.iter().rev().find(|(.., by)| *by == version).map(|(sent, ..)| *sent).expect("it had traffic");
    let mut moved = std::collections::BTreeMap::new();
    let mut back = 0;
    // The moments in which one gateway has read an entry and another has not are none of a unit's.
    for (sent, unit, by) in all.iter().filter(|(sent, ..)| *sent + Duration::from_secs(1) < last) {
        match (moved.get(unit), *by == version) {
            (None, true) => {
                moved.insert(*unit, *sent);
            }
            (Some(since), false) if *sent - *since > Duration::from_secs(1) => back += 1,
            _ => {}
        }
    }
    assert!(moved.len() > 100, "{} units had the new version", moved.len());
    assert_eq!(back, 0, "of {} units that had the new version some went back to the old one", moved.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn clocks_seconds_apart_write_each_step_once() {
    let folder = tempfile::tempdir().unwrap();
    let Some(redis) = RedisServer::start(folder.path()) else { return };
    let project = project(&redis.url());
    project.apply().await.unwrap();
    let mut running = Vec::new();
    for ahead in [6, 0, -6] {
        running.push(gateway_with_clock(&project, ahead).await);
    }
    let channels: Vec<Channel> = running.iter().map(|(_, channel)| channel.clone()).collect();
    for (number, bytes) in [(1, b"one"), (2, b"two")] {
        assert_eq!(register(&channels[0], bytes).await, number);
        crate::models::deploy(&channels[0], number).await.unwrap();
    }
    begin(&channels[0], 2, "ada").await.unwrap();
    let traffic = Traffic::over(&channels);
    let begun = Instant::now();
    while !kinds(&entries(&project).await).contains(&"model_promote") {
        let told = story(&channels[2]).await;
        assert!(begun.elapsed() < PROMOTED_WITHIN, "not promoted: {told:#}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    // Each gateway has judged and wanted to write; the log has taken one of them each time.
    assert_eq!(kinds(&entries(&project).await), ["rollout_begin", "rollout_step", "model_promote"]);
    for channel in &channels {
        wait_for("all follow", || async {
            ask(channel, 0).await.is_ok_and(|answers| answers.iter().all(|(_, by)| *by == 2))
        })
        .await;
    }
    sticky(&traffic.end().await, 2);
    for (server, channel) in running {
        drop(channel);
        server.shutdown_handle().shut_down();
        server.wait().await.unwrap();
    }
}
