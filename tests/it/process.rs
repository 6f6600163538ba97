//! The real binary as a process of its own, killed in the middle of its work.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use proto::v1;
use proto::v1::gateway_client::GatewayClient;
use proto::v1::ingest_client::IngestClient;
use tests::Project;
use tests::column::{strings, timestamps};
use tonic::transport::Channel;

const SETTINGS: &str = "project: kill\nserve: {grpc: 127.0.0.1:0, http: 127.0.0.1:0}\n";

const DEFINITIONS: &str = r#"
entities:
  - {name: everything, keys: []}
  - {name: thing, keys: [{name: thing, type: string}]}
sources:
  - name: sightings
    stream: true
    schema: [{name: thing, type: string}, {name: id, type: string}]
    event_time: seen_at
    event_id: id
feature_views:
  - {name: all, entity: everything, source: sightings, windows: [24h], aggregates: [{name: n, function: count}]}
  - {name: last, entity: thing, source: sightings, features: [{name: id, type: string}]}
feature_services:
  - {name: both, features: ["all:*", "last:*"]}
"#;

/// The binary that the workspace's own build put beside this test.
pub fn binary() -> PathBuf {
    let test = std::env::current_exe().expect("a test has a path");
    let folder = test.parent().and_then(Path::parent).expect("tests lie below the profile's folder");
    let binary = folder.join("coeval");
    assert!(binary.exists(), "{} is missing; build the workspace: `cargo build --workspace`", binary.display());
    binary
}

pub struct Process {
    child: Child,
    channel: Channel,
    grpc: String,
    http: String,
}

impl Process {
    async fn start(project: &Project) -> Process {
        Process::start_with(project.path(), &[]).await
    }

    /// With variables of its own.
    pub async fn start_with(folder: &Path, variables: &[(String, String)]) -> Process {
        Process::start_as(folder, "all", variables, &folder.join("ready.json")).await
    }

    /// One of several over a project.
    pub async fn start_as(folder: &Path, roles: &str, variables: &[(String, String)], ready: &Path) -> Process {
        let _ = std::fs::remove_file(ready);
        let mut child = Command::new(binary())
            .arg("-C")
            .arg(folder)
            .args(["serve", "--roles", roles, "--ready-file"])
            .arg(ready)
            .envs(variables.iter().cloned())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the binary starts");
        let begun = Instant::now();
        let text = loop {
            if let Ok(text) = std::fs::read_to_string(ready) {
                break text;
            }
            if let Some(status) = child.try_wait().expect("the child can be asked") {
                panic!("the server ended with {status} before it was ready");
            }
            assert!(begun.elapsed() < Duration::from_secs(60), "the server is not ready after a minute");
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        let addresses: serde_json::Value = serde_json::from_str(&text).expect("the ready file is JSON");
        let grpc = addresses["grpc"].as_str().expect("the ready file names the gRPC address");
        let http = addresses["http"].as_str().expect("the ready file names the HTTP address");
        let channel = Channel::from_shared(format!("http://{grpc}")).unwrap().connect().await.unwrap();
        Process { child, channel, grpc: grpc.to_owned(), http: http.to_owned() }
    }

    pub fn address(&self) -> String {
        self.grpc.clone()
    }

    /// What a page of the HTTP port says.
    pub fn get(&self, page: &str) -> String {
        let mut stream = std::net::TcpStream::connect(&self.http).expect("the HTTP port answers");
        write!(stream, "GET {page} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n").expect("it takes a request");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("it answers with text");
        text
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Asks it to drain and end.
    pub fn terminate(&self) {
        let sent = Command::new("kill").args(["-TERM", &self.pid().to_string()]).status();
        assert!(sent.is_ok_and(|status| status.success()), "the server could not be told to end");
    }

    /// How it ended by itself; None if it did not in time, or by a signal.
    pub async fn exit_code(&mut self, within: Duration) -> Option<i32> {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("the child can be asked") {
                return status.code();
            }
            if begun.elapsed() > within {
                return None;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    async fn push(&self, ids: &[String], wait_visible: bool) -> Result<v1::PushResponse, tonic::Status> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_micros() as i64;
        let texts: Vec<Option<&str>> = ids.iter().map(|id| Some(id.as_str())).collect();
        let things: Vec<Option<&str>> = ids.iter().map(|_| Some("x")).collect();
        let times = vec![Some(now - 1_000); ids.len()];
        let request = v1::PushRequest {
            project: "kill".into(),
            source: "sightings".into(),
            rows: vec![strings("thing", &things), strings("id", &texts), timestamps("seen_at", &times)],
            wait_visible,
        };
        let mut ingest = IngestClient::new(self.channel.clone());
        let mut answers = ingest.push(futures::stream::iter([request])).await?.into_inner();
        answers.message().await?.ok_or_else(|| tonic::Status::unavailable("no answer"))
    }

    async fn count(&self) -> i64 {
        let request = v1::GetFeaturesRequest {
            project: "kill".into(),
            what: Some(v1::get_features_request::What::Service("both".into())),
            rows: vec![strings("thing", &[Some("x")])],
            ..v1::GetFeaturesRequest::default()
        };
        let answer = GatewayClient::new(self.channel.clone()).get_features(request).await.unwrap().into_inner();
        let count = answer.features.iter().find(|feature| feature.name == "all:n_24h").expect("the count is asked");
        assert_eq!(count.statuses, [v1::FieldStatus::Present as i32], "the count answers");
        match count.values.as_ref().and_then(|column| column.values.as_ref()) {
            Some(v1::column::Values::Int64s(counts)) => counts.values[0],
            other => panic!("a count is an int64, not {other:?}"),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // SIGKILL, on purpose: nothing gets a chance to tidy up.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_killed_in_the_middle_of_pushes_loses_and_doubles_nothing() {
    let project = Project::new(SETTINGS, DEFINITIONS).unwrap();
    project.apply().await.unwrap();
    let mut sent: Vec<String> = Vec::new();
    let mut acknowledged = 0;
    for round in 0..3 {
        let process = Process::start(&project).await;
        let killed_after = Duration::from_millis(400 + 300 * round);
        let killer_pid = process.child.id();
        let killer = tokio::spawn(async move {
            tokio::time::sleep(killed_after).await;
            // The same as `kill -9`: from outside, whatever the server is doing.
            let _ = Command::new("kill").args(["-9", &killer_pid.to_string()]).status();
        });
        // Several pushers at once, so that the kill finds appends, syncs and applications under way.
        let pushes = (0..4).map(|pusher| {
            let process = &process;
            async move {
                let (mut tried, mut held) = (Vec::new(), 0);
                for n in 0.. {
                    let ids: Vec<String> = (0..5).map(|i| format!("{round}-{pusher}-{n}-{i}")).collect();
                    tried.extend(ids.clone());
                    match process.push(&ids, n % 3 == 0).await {
                        Ok(answer) => {
                            assert_eq!((answer.accepted, answer.duplicates), (5, 0));
                            held += 5;
                        }
                        Err(_) => break,
                    }
                }
                (tried, held)
            }
        });
        for (tried, held) in futures::future::join_all(pushes).await {
            sent.extend(tried);
            acknowledged += held;
        }
        killer.await.unwrap();
    }
    assert!(acknowledged > 50, "the rounds did some work: {acknowledged}");

    let process = Process::start(&project).await;
    let nudge = process.push(&["nudge".into()], true).await.unwrap();
    assert_eq!(nudge.accepted, 1);
    let found = process.count().await - 1;
    let most = sent.len() as i64;
    assert!(found >= acknowledged, "{found} events are there, {acknowledged} were acknowledged");
    assert!(found <= most, "{found} events are there, only {most} were sent");
    // Whoever was not told sends again; what was there already is recognised.
    let (mut accepted, mut duplicates) = (0, 0);
    for ids in sent.chunks(500) {
        let answer = process.push(ids, true).await.unwrap();
        accepted += i64::from(answer.accepted);
        duplicates += i64::from(answer.duplicates);
    }
    assert_eq!((accepted, duplicates), (most - found, found));
    assert_eq!(process.count().await, most + 1, "each event counts once");
}
