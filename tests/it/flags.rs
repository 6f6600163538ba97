//! Flags in a whole server: changes and who may make them, evaluation over gRPC, HTTP and OpenFeature's own protocol, exposures,
//! and a store that is away.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use feature_defs::time::Micros;
use feature_defs::window::{DAY, HOUR, SECOND};
use gateway::flags::client::{EvaluationContext, FlagClient, Resolution};
use proto::v1;
use serde_json::{Value as Json, json};
use tests::{ManualClock, Project, Server};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::Code;

const SETTINGS: &str = "project: flags\nserve: {grpc: 127.0.0.1:0, http: 127.0.0.1:0}\nserving_log: off\n";
const DEFINITIONS: &str = r#"
requests: [{name: trip, fields: [{name: length, type: float64}]}]
feature_services: [{name: trips, features: ["trip:length"]}]
"#;
const NOON: Micros = 1_700_000_000 * SECOND / DAY * DAY + 12 * HOUR;

fn flag(share: u16) -> Json {
    json!({
        "name": "new_page", "kind": "boolean", "default": "off", "enabled": true,
        "variants": {"on": true, "off": false},
        "rules": [
            {"when": "role = 'pilot' AND hours >= 100", "then": {"variant": "on"}},
            {"then": {"split": {"layer": "delay", "seed": "1", "slices": [{"variant": "on", "from": 0, "to": share}]}}},
        ],
    })
}

async fn set(server: &Server, flag: &Json, after: u64, reshuffle: bool) -> Result<v1::SetFlagResponse, tonic::Status> {
    let request = v1::SetFlagRequest {
        project: "flags".into(),
        flag: flag.to_string(),
        after,
        reshuffle,
        who: "ada".into(),
        why: "a test".into(),
    };
    Ok(server.control.clone().set_flag(request).await?.into_inner())
}

fn question(unit: Option<&str>, context: Json) -> v1::EvaluateFlagsRequest {
    v1::EvaluateFlagsRequest {
        project: "flags".into(),
        flags: vec![v1::FlagQuestion { name: "new_page".into(), r#type: "boolean".into() }],
        targeting_key: unit.map(str::to_owned),
        context: context.to_string(),
        exposures: v1::Exposures::Log.into(),
    }
}

async fn ask(server: &Server, question: v1::EvaluateFlagsRequest) -> v1::FlagValue {
    let answer = server.gateway.clone().evaluate_flags(question).await.unwrap().into_inner();
    answer.flags.into_iter().next().unwrap()
}

/// Status, the value of a header, and the body.
async fn http(server: &Server, request: &str, headers: &str, body: &str, header: &str) -> (u16, String, Json) {
    let mut stream = TcpStream::connect(server.running.http_addr).await.unwrap();
    let length = body.len();
    let text = format!(
        "{request} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n{body}"
    );
    stream.write_all(text.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let found = head.lines().find_map(|line| line.strip_prefix(&format!("{header}: ")));
    let body = serde_json::from_str(body).unwrap_or_else(|_| Json::from(body));
    (status, found.unwrap_or_default().to_owned(), body)
}

async fn start(project: &Project) -> (Server, ManualClock) {
    let clock = ManualClock::at(NOON);
    (Server::start(project, &clock, None).await.unwrap(), clock)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flag_is_set_ramped_and_removed_by_whoever_looked_last() {
    let project = Project::new(SETTINGS, DEFINITIONS).unwrap();
    project.apply().await.unwrap();
    let (server, _clock) = start(&project).await;
    let missing = ask(&server, question(Some("N14228"), json!({}))).await;
    assert_eq!((missing.reason.as_str(), missing.error_code.as_str()), ("ERROR", "FLAG_NOT_FOUND"));

    let first = set(&server, &flag(1_000), 0, false).await.unwrap();
    let reads: Vec<String> = first.attributes.iter().map(|of| format!("{} {}", of.name, of.types.join("|"))).collect();
    assert_eq!(reads, ["role string", "hours number"]);
    // The gateway that took the change serves it when it has answered.
    let pilot = ask(&server, question(None, json!({"role": "pilot", "hours": 250}))).await;
    assert_eq!(
        (pilot.value.as_str(), pilot.reason.as_str(), pilot.entry),
        ("true", "TARGETING_MATCH", first.control_entry)
    );
    assert_eq!(ask(&server, question(None, json!({"role": "pilot"}))).await.error_code, "TARGETING_KEY_MISSING");
    assert!(set(&server, &flag(1_000), 0, false).await.unwrap().existed);

    let refused = |status: tonic::Status| (status.code(), status.message().to_owned());
    let (code, text) = refused(set(&server, &flag(2_000), 0, false).await.unwrap_err());
    assert!(code == Code::FailedPrecondition && text.contains("was changed by ada"), "{text}");
    let (code, text) = refused(set(&server, &flag(500), first.control_entry, false).await.unwrap_err());
    assert!(code == Code::FailedPrecondition && text.contains("--reshuffle"), "{text}");
    let mut broken = flag(1_000);
    broken["rules"][0]["when"] = json!("upper(role) > 3");
    let (code, text) = refused(set(&server, &broken, first.control_entry, false).await.unwrap_err());
    assert!(code == Code::InvalidArgument && text.contains("cannot compare string with int64"), "{text}");
    broken["rules"][0] = json!({"then": {"variant": "none"}});
    let (code, text) = refused(set(&server, &broken, first.control_entry, false).await.unwrap_err());
    assert!(code == Code::InvalidArgument && text.contains("no variant `none`"), "{text}");
    broken["colour"] = json!("red");
    assert_eq!(refused(set(&server, &broken, first.control_entry, false).await.unwrap_err()).0, Code::InvalidArgument);
    let unsigned = v1::SetFlagRequest {
        project: "flags".into(),
        flag: flag(1).to_string(),
        who: "ada".into(),
        ..Default::default()
    };
    let (code, text) = refused(server.control.clone().set_flag(unsigned).await.unwrap_err());
    assert!(code == Code::InvalidArgument && text.contains("`why`"), "{text}");

    // Two at once from one look: one is refused and told by whom.
    let (one, two) = (flag(2_000), flag(3_000));
    let (one, two) =
        tokio::join!(set(&server, &one, first.control_entry, false), set(&server, &two, first.control_entry, false));
    let (won, lost) = if one.is_ok() { (one, two) } else { (two, one) };
    assert!(lost.unwrap_err().message().contains("was changed by ada"));
    let second = won.unwrap().control_entry;

    let request = v1::ListFlagsRequest { project: "flags".into(), names: vec![] };
    let listed = server.control.clone().list_flags(request).await.unwrap().into_inner();
    assert_eq!((listed.flags.len(), listed.flags[0].entry, listed.flags[0].who.as_str()), (1, second, "ada"));
    let unknown = v1::ListFlagsRequest { project: "flags".into(), names: vec!["new_pages".into()] };
    let (code, text) = refused(server.control.clone().list_flags(unknown).await.unwrap_err());
    assert!(code == Code::NotFound && text.contains("did you mean `new_page`?"), "{text}");

    let history =
        |changes_max: u32| v1::GetFlagHistoryRequest { project: "flags".into(), name: "new_page".into(), changes_max };
    let remove = v1::RemoveFlagRequest {
        project: "flags".into(),
        name: "new_page".into(),
        after: second,
        who: "bob".into(),
        why: "it is on for good".into(),
    };
    let before = server.control.clone().get_flag_history(history(0)).await.unwrap().into_inner();
    assert_eq!(before.changes.iter().map(|change| change.entry).collect::<Vec<_>>(), [second, first.control_entry]);
    assert!(server.control.clone().get_flag_history(history(1)).await.unwrap().into_inner().truncated);
    let stale = v1::RemoveFlagRequest { after: first.control_entry, ..remove.clone() };
    assert_eq!(server.control.clone().remove_flag(stale).await.unwrap_err().code(), Code::FailedPrecondition);
    let third = server.control.clone().remove_flag(remove).await.unwrap().into_inner().control_entry;
    assert_eq!(ask(&server, question(Some("N14228"), json!({}))).await.error_code, "FLAG_NOT_FOUND");
    // Also of a flag that is no more.
    let after = server.control.clone().get_flag_history(history(0)).await.unwrap().into_inner();
    assert_eq!(
        after.changes.iter().map(|change| change.entry).collect::<Vec<_>>(),
        [third, second, first.control_entry]
    );
    assert!(after.changes[0].flag.is_empty() && after.changes[0].why == "it is on for good");
    server.stop().await.unwrap();
}

async fn units_on(server: &Server, units: &[String]) -> BTreeSet<String> {
    let mut on = BTreeSet::new();
    for unit in units {
        let value = ask(server, question(Some(unit), json!({}))).await;
        assert_eq!(value.value == "true", value.reason == "SPLIT", "{value:?}");
        if value.value == "true" {
            on.insert(unit.clone());
        }
    }
    on
}

#[tokio::test(flavor = "multi_thread")]
async fn splits_are_sticky_held_out_and_written_down() {
    let project = Project::new(SETTINGS, DEFINITIONS).unwrap();
    project.apply().await.unwrap();
    let (server, clock) = start(&project).await;
    let units: Vec<String> = (0..400).map(|unit| format!("unit-{unit}@example.com")).collect();
    let first = set(&server, &flag(2_500), 0, false).await.unwrap().control_entry;
    let quarter = units_on(&server, &units).await;
    assert!((70..130).contains(&quarter.len()), "{}", quarter.len());
    assert_eq!(units_on(&server, &units).await, quarter);
    clock.advance(HOUR);
    let second = set(&server, &flag(5_000), first, false).await.unwrap().control_entry;
    let half = units_on(&server, &units).await;
    assert!(half.is_superset(&quarter) && (160..240).contains(&half.len()), "{}", half.len());

    let exposures = |from: Micros, to: Micros| {
        let mut control = server.control.clone();
        async move {
            let request = v1::GetFlagExposuresRequest { project: "flags".into(), name: "new_page".into(), from, to };
            let report = control.get_flag_exposures(request).await.unwrap().into_inner().report;
            serde_json::from_str::<Json>(&report).unwrap()
        }
    };
    let told = exposures(NOON, NOON + 2 * HOUR).await;
    assert_eq!(
        told["entries"][first.to_string()]["on"],
        json!({"units": quarter.len(), "evaluations": 2 * quarter.len()})
    );
    assert_eq!(told["entries"][second.to_string()]["on"], json!({"units": half.len(), "evaluations": half.len()}));
    assert_eq!(told["torn_units"], 0);
    // Whoever only looks is not written down.
    let quiet = v1::EvaluateFlagsRequest {
        exposures: v1::Exposures::None.into(),
        ..question(quarter.first().map(String::as_str), json!({}))
    };
    assert_eq!(ask(&server, quiet).await.reason, "SPLIT");
    assert_eq!(exposures(NOON, NOON + 2 * HOUR).await, told);

    // Units that are held out are in no split; there are about a fifth of them, and the others stay where they are.
    let holdout =
        v1::SetHoldoutRequest { project: "flags".into(), buckets: 2_000, who: "ada".into(), why: "a baseline".into() };
    server.control.clone().set_holdout(holdout.clone()).await.unwrap();
    let left = units_on(&server, &units).await;
    assert!(
        left.is_subset(&half) && left.len() < half.len() && left.len() * 10 > half.len() * 7,
        "{} of {}",
        left.len(),
        half.len()
    );
    assert!(server.control.clone().set_holdout(holdout.clone()).await.unwrap().into_inner().existed);
    let too_many = v1::SetHoldoutRequest { buckets: 9_000, ..holdout };
    assert_eq!(server.control.clone().set_holdout(too_many).await.unwrap_err().code(), Code::InvalidArgument);

    let metrics = http(&server, "GET /metrics", "", "", "").await.2;
    let metrics = metrics.as_str().unwrap();
    let evaluations = 2 * quarter.len() + half.len() + 1 + left.len();
    let line =
        format!("coeval_flag_evaluations_total{{flag=\"new_page\",variant=\"on\",reason=\"SPLIT\"}} {evaluations}");
    assert!(metrics.contains(&line), "{line}");
    server.stop().await.unwrap();

    // After a restart, at the same places: what was asked last is on the store too, and no key is.
    let (server, _clock) = start(&project).await;
    assert_eq!(units_on(&server, &units).await, left);
    server.stop().await.unwrap();
    let objects = objects(&project.path().join(".coeval"));
    assert!(objects.len() >= 3, "{objects:?}");
}

fn objects(folder: &Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(objects(&path));
        } else if path.to_string_lossy().ends_with(".jsonl.zst") {
            found.push(path);
        }
    }
    found
}

/// The remote evaluation protocol, byte by byte, and our own twin.
#[tokio::test(flavor = "multi_thread")]
async fn flags_over_http() {
    let project = Project::new(SETTINGS, DEFINITIONS).unwrap();
    project.apply().await.unwrap();
    let (server, _clock) = start(&project).await;
    let entry = set(&server, &flag(10_000), 0, false).await.unwrap().control_entry;
    let one = "POST /ofrep/v1/evaluate/flags/new_page";
    let (status, _, body) = http(&server, one, "", r#"{"context": {"targetingKey": "N14228"}}"#, "").await;
    let split =
        json!({"key": "new_page", "value": true, "variant": "on", "reason": "SPLIT", "metadata": {"entry": entry}});
    assert_eq!((status, body), (200, split.clone()));
    let (status, _, body) = http(&server, one, "", "{}", "").await;
    assert_eq!(
        (status, body["errorCode"].as_str(), body["key"].as_str()),
        (400, Some("TARGETING_KEY_MISSING"), Some("new_page"))
    );
    let (status, _, body) = http(&server, "POST /ofrep/v1/evaluate/flags/old_page", "", "{}", "").await;
    assert_eq!((status, body["errorCode"].as_str()), (404, Some("FLAG_NOT_FOUND")));
    for (wrong, code) in [
        ("{", "PARSE_ERROR"),
        (r#"{"context": 3}"#, "INVALID_CONTEXT"),
        (r#"{"context": {"targetingKey": 3}}"#, "INVALID_CONTEXT"),
    ] {
        let (status, _, body) = http(&server, one, "", wrong, "").await;
        assert_eq!((status, body["errorCode"].as_str()), (400, Some(code)), "{wrong}");
    }

    let all = "POST /ofrep/v1/evaluate/flags";
    let context = r#"{"context": {"targetingKey": "N14228"}}"#;
    let (status, tag, body) = http(&server, all, "", context, "etag").await;
    assert_eq!((status, &body), (200, &json!({"flags": [split]})));
    let known = format!("if-none-match: {tag}\r\n");
    let (status, same, body) = http(&server, all, &known, context, "etag").await;
    assert_eq!((status, same, body), (304, tag.clone(), json!("")));
    // Another context, and another flag, are another answer.
    let (status, other, _) =
        http(&server, all, &known, r#"{"context": {"targetingKey": "N14228", "role": "pilot", "hours": 100}}"#, "etag")
            .await;
    assert!(status == 200 && other != tag);
    let mut plain = flag(0);
    plain["rules"] = json!([]);
    set(&server, &plain, entry, false).await.unwrap();
    let (status, _, body) = http(&server, all, &known, context, "etag").await;
    assert_eq!(
        (status, body["flags"][0]["value"].as_bool(), body["flags"][0]["reason"].as_str()),
        (200, Some(false), Some("DEFAULT"))
    );
    let (status, _, body) = http(&server, "GET /ofrep/v1/configuration", "", "", "").await;
    assert_eq!((status, body["name"].as_str()), (200, Some("coeval")));

    let ours =
        r#"{"flags": {"new_page": "boolean", "old_page": null}, "targeting_key": "N14228", "exposures": "none"}"#;
    let (status, _, body) = http(&server, "POST /v1/flags", "", ours, "").await;
    assert_eq!(
        (status, &body["flags"]["new_page"]["value"], body["flags"]["old_page"]["error_code"].as_str()),
        (200, &json!(false), Some("FLAG_NOT_FOUND"))
    );
    let (status, _, body) = http(&server, "POST /v1/flags", "", r#"{"flags": {"new_page": "bool"}}"#, "").await;
    assert!(status == 400 && body["error"].as_str().unwrap().contains("there are: boolean"), "{body}");
    server.stop().await.unwrap();
}

/// As a provider of OpenFeature asks, in Rust.
#[tokio::test(flavor = "multi_thread")]
async fn flags_for_programs_in_rust() {
    let project = Project::new(SETTINGS, DEFINITIONS).unwrap();
    project.apply().await.unwrap();
    let (server, _clock) = start(&project).await;
    let entry = set(&server, &flag(10_000), 0, false).await.unwrap().control_entry;
    let typed = |name: &str, kind: &str, value: Json| json!({"name": name, "kind": kind, "default": "a", "enabled": true, "variants": {"a": value}});
    set(&server, &typed("limit", "integer", json!(7)), 0, false).await.unwrap();
    set(&server, &typed("color", "string", json!("blue \"sky\"")), 0, false).await.unwrap();
    set(&server, &typed("look", "object", json!({"size": [1, 2]})), 0, false).await.unwrap();
    let address = format!("http://{}", server.running.grpc_addr);
    let channel = tonic::transport::Channel::from_shared(address).unwrap().connect().await.unwrap();
    let flags = FlagClient::new(channel, "flags", Duration::from_secs(5));
    let nobody = EvaluationContext::default();
    let pilot = json!({"role": "pilot", "hours": 200}).as_object().cloned().unwrap();
    let pilot = EvaluationContext { targeting_key: Some("N14228".into()), attributes: pilot };
    let found = flags.resolve_bool_value("new_page", &pilot).await.unwrap();
    let expected = Resolution { value: true, variant: "on".into(), reason: "TARGETING_MATCH".into(), entry };
    assert_eq!(found, expected);
    assert_eq!(flags.resolve_int_value("limit", &nobody).await.unwrap().value, 7);
    assert_eq!(flags.resolve_float_value("limit", &nobody).await.unwrap().value, 7.0);
    assert_eq!(flags.resolve_string_value("color", &nobody).await.unwrap().value, "blue \"sky\"");
    assert_eq!(json!(flags.resolve_struct_value("look", &nobody).await.unwrap().value), json!({"size": [1, 2]}));
    let code = |error: gateway::flags::client::ResolutionError| error.code;
    assert_eq!(code(flags.resolve_bool_value("new_page", &nobody).await.unwrap_err()), "TARGETING_KEY_MISSING");
    assert_eq!(code(flags.resolve_bool_value("limit", &nobody).await.unwrap_err()), "TYPE_MISMATCH");
    assert_eq!(code(flags.resolve_bool_value("nothing", &nobody).await.unwrap_err()), "FLAG_NOT_FOUND");
    let large = json!({"x": "y".repeat(70_000)}).as_object().cloned().unwrap();
    let large = EvaluationContext { targeting_key: None, attributes: large };
    assert_eq!(code(flags.resolve_bool_value("limit", &large).await.unwrap_err()), "INVALID_CONTEXT");
    server.stop().await.unwrap();
    assert_eq!(code(flags.resolve_int_value("limit", &nobody).await.unwrap_err()), "GENERAL");
}

/// What is served is the last fold; exposures wait until the store is back.
#[tokio::test(flavor = "multi_thread")]
async fn flags_are_served_while_the_store_is_away() {
    let project = Project::new(SETTINGS, DEFINITIONS).unwrap();
    project.apply().await.unwrap();
    let (server, _clock) = start(&project).await;
    set(&server, &flag(10_000), 0, false).await.unwrap();
    let store = project.path().join(".coeval").join("flags");
    let aside = project.path().join("aside");
    std::fs::rename(&store, &aside).unwrap();
    std::fs::write(&store, "").unwrap();
    for unit in 0..50 {
        let value = ask(&server, question(Some(&format!("unit-{unit}")), json!({}))).await;
        assert_eq!((value.value.as_str(), value.reason.as_str()), ("true", "SPLIT"));
    }
    let request =
        v1::GetFlagExposuresRequest { project: "flags".into(), name: "new_page".into(), from: NOON, to: NOON + HOUR };
    let away = server.control.clone().get_flag_exposures(request.clone()).await.unwrap_err();
    assert_eq!(away.code(), Code::Unavailable, "{away}");
    std::fs::remove_file(&store).unwrap();
    std::fs::rename(&aside, &store).unwrap();
    let report = server.control.clone().get_flag_exposures(request).await.unwrap().into_inner().report;
    let report: Json = serde_json::from_str(&report).unwrap();
    let entries: Vec<&Json> = report["entries"].as_object().unwrap().values().collect();
    assert_eq!(entries, [&json!({"on": {"units": 50, "evaluations": 50}})]);
    server.stop().await.unwrap();
}
