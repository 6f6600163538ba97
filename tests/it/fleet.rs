//! Several processes over one project: gateways that share a Redis, an object store and a control log.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use arrow_flight::Ticket;
use arrow_flight::flight_service_client::FlightServiceClient;
use gateway::config::ServeOptions;
use gateway::roles::Roles;
use gateway::run::{Running, serve};
use inference::echo::EchoRuntime;
use online_store::conformance::redis_server::RedisServer;
use proto::v1;
use proto::v1::control_client::ControlClient;
use proto::v1::gateway_client::GatewayClient;
use proto::v1::ingest_client::IngestClient;
use registry::id::{EntryId, EntryNumber, ProjectName};
use registry::log::{Append, ControlLog, Draft};
use tests::Project;
use tests::column::{doubles, int64s, strings, timestamps};
use tokio::task::JoinHandle;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::models::{model_file, padded};
use crate::process::Process;

const DEFINITIONS: &str = r#"
entities:
  - {name: thing, keys: [{name: thing, type: string}]}
sources:
  - name: sightings
    stream: true
    schema: [{name: thing, type: string}, {name: size, type: float64}]
    event_time: seen_at
feature_views:
  - {name: last, entity: thing, source: sightings, features: [{name: size, type: float64}]}
requests:
  - {name: trip, fields: [{name: a, type: float64}, {name: b, type: float64}, {name: c, type: float64}, {name: carrier, type: int64}]}
feature_services:
  - {name: things, features: ["last:*"]}
  - {name: trips, features: ["trip:a", "trip:b", "trip:c", "trip:carrier"]}
models:
  - name: delay
    features: trips
    runtime: torchscript
    inputs:
      - {name: dense, dtype: float32, features: ["trip:a", "trip:b", "trip:c"]}
      - {name: carrier, dtype: int64, features: ["trip:carrier"]}
    outputs: [{name: score, dtype: float32}]
    batching: {max_rows: 8}
"#;

/// The promise, on the clock of whoever says that it is to be undone.
const UNDONE_WITHIN: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(30);
const ROUNDS: usize = 5;

fn project(redis: &str) -> Project {
    let settings = format!(
        "project: life\nstore: ${{STORE:-./.coeval}}\nonline: {redis}\nserve: {{grpc: 127.0.0.1:0, http: 127.0.0.1:0}}\n"
    );
    Project::new(&settings, DEFINITIONS).unwrap()
}

/// The store as one process sees it: a folder of its own, in which what all share is a link. So its link can be cut alone.
pub struct Seen {
    folder: PathBuf,
    shared: PathBuf,
}

impl Seen {
    pub fn of(project: &Project, process: &str) -> Seen {
        let folder = project.path().join(process);
        let shared = project.path().join(".coeval/life");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::create_dir_all(&shared).unwrap();
        let seen = Seen { folder, shared };
        seen.mend();
        seen
    }

    fn link(&self) -> PathBuf {
        self.folder.join("life")
    }

    fn mend(&self) {
        let _ = std::fs::remove_file(self.link());
        // What a process has put where nothing was mounted.
        let _ = std::fs::remove_dir_all(self.link());
        symlink(&self.shared, self.link()).unwrap();
    }

    /// Every look fails.
    fn cut(&self) {
        std::fs::remove_file(self.link()).unwrap();
        std::fs::write(self.link(), b"in the way").unwrap();
    }

    /// Every look finds nothing, as in a folder that is not mounted.
    fn unmount(&self) {
        std::fs::remove_file(self.link()).unwrap();
    }

    pub async fn start(&self, project: &Project, roles: &str) -> Process {
        let variables = [("STORE".to_owned(), self.folder.display().to_string())];
        Process::start_as(project.path(), roles, &variables, &self.folder.join("ready.json")).await
    }
}

fn trip(model: &str) -> v1::PredictRequest {
    v1::PredictRequest {
        project: "life".into(),
        model: model.into(),
        rows: vec![
            doubles("a", &[Some(1.0)]),
            doubles("b", &[Some(-0.5)]),
            doubles("c", &[Some(0.25)]),
            int64s("carrier", &[Some(1)]),
        ],
        ..v1::PredictRequest::default()
    }
}

/// The version that answers.
pub async fn version(channel: &Channel) -> Result<u32, Status> {
    let answer = GatewayClient::new(channel.clone()).predict(trip("delay")).await?.into_inner();
    let outcome = answer.outcomes.first().ok_or_else(|| Status::internal("no row"))?;
    if outcome.status() != v1::RowStatus::Ok {
        return Err(Status::internal(outcome.reason.clone()));
    }
    Ok(outcome.version)
}

pub async fn register(channel: &Channel, bytes: &[u8]) -> u32 {
    crate::models::register(channel, bytes).await
}

pub async fn promote(channel: &Channel, version: u32, who: &str) -> Result<v1::TrafficResponse, Status> {
    let (project, model, why) = ("life".to_owned(), "delay".to_owned(), "a test".to_owned());
    let request = v1::PromoteModelRequest { project, model, version, who: who.into(), why };
    Ok(ControlClient::new(channel.clone()).promote_model(request).await?.into_inner())
}

pub async fn rollback(channel: &Channel) -> Result<v1::TrafficResponse, Status> {
    let (project, model, why) = ("life".to_owned(), "delay".to_owned(), "a test".to_owned());
    let request = v1::RollbackModelRequest { project, model, who: "bob".into(), why };
    Ok(ControlClient::new(channel.clone()).rollback_model(request).await?.into_inner())
}

pub async fn wait_for<F: Future<Output = bool>>(what: &str, mut is_so: impl FnMut() -> F) -> Duration {
    let begun = Instant::now();
    while !is_so().await {
        assert!(begun.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    begun.elapsed()
}

/// Every process serves what the log says.
async fn all_serve(processes: &[Process], wanted: u32) {
    for process in processes {
        let channel = process.channel();
        wait_for("the version is served", || async { version(&channel).await.ok() == Some(wanted) }).await;
    }
}

/// Somebody who goes on asking one gateway, and notes when each request was sent and which version answered it.
struct Caller {
    stop: Arc<AtomicBool>,
    asked: JoinHandle<Vec<(Instant, u32)>>,
}

impl Caller {
    fn of(process: &Process) -> Caller {
        let stop = Arc::new(AtomicBool::new(false));
        let (channel, stopped) = (process.channel(), stop.clone());
        let asked = tokio::spawn(async move {
            let mut asked = Vec::new();
            while !stopped.load(Ordering::SeqCst) {
                let sent = Instant::now();
                asked.push((sent, version(&channel).await.expect("a gateway answers throughout")));
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            asked
        });
        Caller { stop, asked }
    }

    async fn end(self) -> Vec<(Instant, u32)> {
        self.stop.store(true, Ordering::SeqCst);
        self.asked.await.unwrap()
    }
}

async fn push(channel: &Channel) -> Result<v1::PushResponse, Status> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros() as i64;
    let request = v1::PushRequest {
        project: "life".into(),
        source: "sightings".into(),
        rows: vec![
            strings("thing", &[Some("x")]),
            doubles("size", &[Some(2.5)]),
            timestamps("seen_at", &[Some(now - 1_000)]),
        ],
        wait_visible: true,
    };
    let mut answers = IngestClient::new(channel.clone()).push(futures::stream::iter([request])).await?.into_inner();
    answers.message().await?.ok_or_else(|| Status::unavailable("no answer"))
}

async fn features(channel: &Channel) -> Result<v1::GetFeaturesResponse, Status> {
    let request = v1::GetFeaturesRequest {
        project: "life".into(),
        what: Some(v1::get_features_request::What::Service("things".into())),
        rows: vec![strings("thing", &[Some("x")])],
        ..v1::GetFeaturesRequest::default()
    };
    Ok(GatewayClient::new(channel.clone()).get_features(request).await?.into_inner())
}

#[track_caller]
pub fn refused<T: std::fmt::Debug>(answer: Result<T, Status>, code: Code, words: &[&str]) {
    let status = answer.expect_err("it is refused");
    assert_eq!(status.code(), code, "{status}");
    for word in words {
        assert!(status.message().contains(word), "{status}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn three_gateways_go_back_within_a_second_and_survive_the_loss_of_one() {
    if !cfg!(feature = "torch") {
        eprintln!("skipped: this build has no torch");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let Some(redis) = RedisServer::start(folder.path()) else { return };
    let project = project(&redis.url());
    project.apply().await.unwrap();
    let writer = Seen::of(&project, "writer").start(&project, "ingest,offline").await;
    let mut gateways = Vec::new();
    // Two of them on one folder, as processes of one machine are.
    for place in ["one", "one", "two"] {
        gateways.push(Seen::of(&project, place).start(&project, "gateway").await);
    }
    let channels: Vec<Channel> = gateways.iter().map(Process::channel).collect();

    // Each does its own work, what the writer writes is read by all, and the rest is refused with where to go.
    assert_eq!(push(&writer.channel()).await.unwrap().accepted, 1);
    for channel in &channels {
        let answer = features(channel).await.unwrap();
        assert_eq!(answer.features[0].statuses, [v1::FieldStatus::Present as i32], "{answer:?}");
    }
    refused(push(&channels[0]).await, Code::Unimplemented, &["--roles gateway", "has the role `ingest`"]);
    refused(features(&writer.channel()).await, Code::Unimplemented, &["--roles ingest,offline", "role `gateway`"]);
    let mut flight = FlightServiceClient::new(channels[0].clone());
    let ticket = Ticket { ticket: Vec::new().into() };
    refused(flight.do_get(ticket).await, Code::Unimplemented, &["has the role `offline`"]);
    refused(promote(&writer.channel(), 1, "ada").await, Code::Unimplemented, &["has the role `gateway`"]);

    let file = model_file();
    for (number, bytes) in [file.clone(), padded(&file, b'x'), padded(&file, b'y')].iter().enumerate() {
        assert_eq!(register(&channels[number], bytes).await, number as u32 + 1);
        let deployed = crate::models::deploy(&channels[number], number as u32 + 1).await.unwrap();
        assert_eq!(
            (deployed.champion, deployed.gateways.len()),
            (1, 3),
            "all have it, and the writer none: {deployed:?}"
        );
    }

    let mut worst = Duration::ZERO;
    for round in 0..ROUNDS {
        let callers: Vec<Caller> = gateways.iter().map(Caller::of).collect();
        promote(&channels[round % 3], 2, "ada").await.unwrap();
        all_serve(&gateways, 2).await;
        let undone = Instant::now();
        rollback(&channels[(round + 1) % 3]).await.unwrap();
        tokio::time::sleep(UNDONE_WITHIN + Duration::from_millis(500)).await;
        for caller in callers {
            let asked = caller.end().await;
            assert!(asked.iter().any(|(sent, _)| *sent > undone + UNDONE_WITHIN), "somebody asked afterwards");
            let late = asked.iter().filter(|(sent, version)| *sent > undone && *version != 1);
            worst = worst.max(late.map(|(sent, _)| *sent - undone).max().unwrap_or_default());
        }
    }
    eprintln!("{ROUNDS} rollbacks over three gateways: the last request that met the new version came {worst:?} after");
    assert!(worst < UNDONE_WITHIN, "a request that came {worst:?} after the rollback met the new version");

    // Two operators: what was judged on a state that is no more is refused, and says so.
    let mut refusals = 0;
    for _ in 0..20 {
        let both = tokio::join!(promote(&channels[0], 2, "ada"), promote(&channels[1], 3, "bob"));
        let winners: Vec<u32> =
            [(&both.0, 2), (&both.1, 3)].iter().filter(|(a, _)| a.is_ok()).map(|(_, v)| *v).collect();
        for answer in [both.0, both.1] {
            if let Err(status) = answer {
                refusals += 1;
                assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
                assert!(status.message().contains("version"), "{status}");
            }
        }
        assert!(!winners.is_empty(), "one of them gets what it asked for");
        // Whoever it is, all agree.
        let mut seen = Vec::new();
        for channel in &channels {
            let refresh = v1::RefreshRequest { project: "life".into(), at_least: 0 };
            ControlClient::new(channel.clone()).refresh(refresh).await.unwrap();
            seen.push(version(channel).await.unwrap());
        }
        assert!(seen.iter().all(|one| *one == seen[0] && winners.contains(one)), "{seen:?} of {winners:?}");
        promote(&channels[2], 1, "carl").await.unwrap();
        all_serve(&gateways, 1).await;
        if refusals > 0 {
            break;
        }
    }
    assert!(refusals > 0, "twenty times two operators at once, and never a conflict");

    // A gateway that is killed holds nobody up, and comes back with what the log says by then.
    drop(gateways.remove(2));
    promote(&channels[0], 3, "ada").await.unwrap();
    all_serve(&gateways, 3).await;
    gateways.push(Seen::of(&project, "two").start(&project, "gateway").await);
    assert_eq!(version(&gateways[2].channel()).await.unwrap(), 3, "at once");
    for mut process in gateways.into_iter().chain([writer]) {
        process.terminate();
        assert_eq!(process.exit_code(PATIENCE).await, Some(0));
    }
}

fn metric(process: &Process, name: &str) -> f64 {
    let text = process.get("/metrics");
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("{name}: {text}"));
    line.trim().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_cannot_read_the_log_says_so_and_serves_also_after_a_restart() {
    if !cfg!(feature = "torch") {
        eprintln!("skipped: this build has no torch");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let Some(redis) = RedisServer::start(folder.path()) else { return };
    let project = project(&redis.url());
    project.apply().await.unwrap();
    let (whole, cut) = (Seen::of(&project, "whole"), Seen::of(&project, "cut"));
    let well = whole.start(&project, "gateway").await;
    let mut process = cut.start(&project, "gateway").await;
    let file = model_file();
    for (number, bytes) in [(1, file.clone()), (2, padded(&file, b'x'))] {
        assert_eq!(register(&well.channel(), &bytes).await, number);
        crate::models::deploy(&well.channel(), number).await.unwrap();
    }
    promote(&well.channel(), 2, "ada").await.unwrap();
    let channel = process.channel();
    wait_for("the version is served", || async { version(&channel).await.ok() == Some(2) }).await;
    // From now on it is served by definitions that are no longer in force, which have to be kept as well.
    let changed = DEFINITIONS.replace(
        r#"["trip:a", "trip:b", "trip:c", "trip:carrier"]"#,
        r#"["trip:b", "trip:a", "trip:c", "trip:carrier"]"#,
    );
    assert_ne!(changed, DEFINITIONS);
    std::fs::write(project.path().join("definitions.yaml"), changed).unwrap();
    let applied = Command::new(crate::process::binary()).arg("-C").arg(project.path()).arg("apply").output().unwrap();
    assert!(applied.status.success(), "{}", String::from_utf8_lossy(&applied.stderr));
    let kept = cut.folder.join("local/life/control-log");
    wait_for("earlier definitions are kept", || async { kept.join("definitions-1.json").exists() }).await;
    wait_for("the fold is kept", || async {
        let text = std::fs::read_to_string(kept.join("fold-127.0.0.1-0.json")).unwrap_or_default();
        text.contains(&format!("\"number\":{}", metric(&process, "coeval_control_log_head")))
    })
    .await;

    for (how, words) in [("cut", "could not read"), ("unmounted", "is not in the store any more")] {
        match how {
            "cut" => cut.cut(),
            _ => cut.unmount(),
        }
        wait_for("it says so", || async { process.get("/ready").contains("the control log could not be read") }).await;
        let ready = process.get("/ready");
        assert!(ready.starts_with("HTTP/1.1 200") && ready.contains("\"degraded\":true"), "{ready}");
        wait_for("the age grows", || async { metric(&process, "coeval_control_log_age_seconds") > 2.0 }).await;
        assert_eq!(version(&process.channel()).await.unwrap(), 2, "it goes on");
        assert!(rollback(&process.channel()).await.is_err(), "nothing is changed from there: {words}");
        cut.mend();
        let back = wait_for("it is well again", || async {
            !process.get("/ready").contains("control log") && metric(&process, "coeval_control_log_age_seconds") < 2.0
        });
        back.await;
    }

    // A restart in the middle of it serves what was served.
    cut.cut();
    process.terminate();
    let _ = process.exit_code(PATIENCE).await;
    let process = cut.start(&project, "gateway").await;
    assert_eq!(version(&process.channel()).await.unwrap(), 2, "the last fold");
    let ready = process.get("/ready");
    assert!(ready.starts_with("HTTP/1.1 200") && ready.contains("the control log could not be read"), "{ready}");
    // What was changed meanwhile is followed as soon as the log is there.
    rollback(&well.channel()).await.unwrap();
    assert_eq!(version(&process.channel()).await.unwrap(), 2);
    cut.mend();
    let channel = process.channel();
    wait_for("the log is followed", || async { version(&channel).await.ok() == Some(1) }).await;
    drop(process);

    // Where nothing is mounted, an empty log is not taken for the truth.
    cut.unmount();
    let said = Command::new(crate::process::binary())
        .arg("-C")
        .arg(project.path())
        .args(["serve", "--roles", "gateway"])
        .env("STORE", &cut.folder)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&said.stderr);
    assert_eq!(said.status.code(), Some(1), "{text}");
    assert!(text.contains("has no control log of this project") && text.contains("mounted"), "{text}");
}

/// A gateway in this process, whose clock is wrong.
pub async fn gateway_with_clock(project: &Project, ahead_seconds: i64) -> (Running, Channel) {
    let clock = Arc::new(move || {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros() as i64;
        now + ahead_seconds * 1_000_000
    });
    let options = ServeOptions {
        settings: project.settings().unwrap(),
        roles: "gateway".parse::<Roles>().unwrap(),
        project_dir: project.path().into(),
        clock,
        runtime: Some(Arc::new(EchoRuntime::new())),
        certifier: None,
    };
    let running = serve(options).await.unwrap();
    running.started().await;
    let channel = Channel::from_shared(format!("http://{}", running.grpc_addr)).unwrap().connect().await.unwrap();
    (running, channel)
}

pub fn log_of(project: &Path) -> ControlLog {
    let (store, root) = registry::store::open_store(&project.join(".coeval").display().to_string()).unwrap();
    ControlLog::new(store, &root.join("life"))
}

#[tokio::test(flavor = "multi_thread")]
async fn clocks_apart_and_entries_of_the_future_leave_gateways_of_one_mind() {
    let folder = tempfile::tempdir().unwrap();
    let Some(redis) = RedisServer::start(folder.path()) else { return };
    let project = project(&redis.url());
    project.apply().await.unwrap();
    let mut running = Vec::new();
    for ahead in [7, 0, -7] {
        running.push(gateway_with_clock(&project, ahead).await);
    }
    let channels: Vec<Channel> = running.iter().map(|(_, channel)| channel.clone()).collect();
    for (number, bytes) in [(1, b"one"), (2, b"two")] {
        assert_eq!(register(&channels[0], bytes).await, number);
        crate::models::deploy(&channels[0], number).await.unwrap();
    }
    // By the fast clock first, and by the slow one after it.
    promote(&channels[0], 2, "ada").await.unwrap();
    rollback(&channels[2]).await.unwrap();
    promote(&channels[1], 2, "carl").await.unwrap();
    for channel in &channels {
        wait_for("all follow the order of entries", || async { version(channel).await.ok() == Some(2) }).await;
    }
    let log = log_of(project.path());
    let entries = log.read_from(EntryNumber::FIRST, 100).await.unwrap();
    assert!(entries.windows(2).any(|pair| pair[1].at < pair[0].at), "the clocks were apart");
    let numbers: Vec<u64> = entries.iter().map(|entry| entry.number.0).collect();
    assert_eq!(numbers, (1..=entries.len() as u64).collect::<Vec<_>>());

    // An entry that this build does not know and must: changes stop, serving does not.
    let draft = Draft {
        id: EntryId::random(),
        at: chrono::Utc::now(),
        project: ProjectName::try_new("life").unwrap(),
        who: "a newer build".into(),
        why: None,
        must_understand: true,
        kind: "teleport".into(),
        body: serde_json::json!({}),
    };
    let head = EntryNumber(entries.len() as u64);
    assert!(matches!(log.append(&draft, head).await.unwrap(), Append::Appended(_)));
    for (server, channel) in &running {
        let gateway = server.gateway();
        wait_for("it says so", || async { gateway.readiness().reasons.iter().any(|why| why.contains("`teleport`")) })
            .await;
        assert!(gateway.readiness().ready);
        assert_eq!(version(channel).await.unwrap(), 2, "it goes on");
        refused(rollback(channel).await, Code::FailedPrecondition, &["`teleport`", "newer build"]);
    }
    assert_eq!(log.head().await.unwrap(), head.next(), "nothing was added");
    for (server, channel) in running {
        drop(channel);
        server.shutdown_handle().shut_down();
        server.wait().await.unwrap();
    }
}
