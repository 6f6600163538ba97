//! `coeval doctor`: is everything there that the project needs? Each check says what it looked at and what to do.

use std::net::TcpListener;
use std::path::Path;
use std::time::Duration;

use feature_defs::catalog::{LogKind, OnlineUrl, Settings};
use gateway::config::local_folder;
use inference::memory::{PERCENT_MAX, shown};
use online_store::redis::RedisStore;
use online_store::{NodeReport, OnlineStore};
use proto::v1::{GetMemoryRequest, GetMemoryResponse, ModelMemory};
use serde::Serialize;

use crate::error::{CliError, chain, counted};
use crate::output::Output;
use crate::project::{Place, Project};
use crate::server::{Server, ServerError, address};

const ONLINE_TIMEOUT: Duration = Duration::from_secs(3);
/// Written and removed again.
const PROBE: &str = ".coeval-doctor";

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Health {
    Ok,
    Warning,
    Error,
}

#[derive(Debug, Serialize)]
struct Finding {
    what: &'static str,
    health: Health,
    text: String,
}

pub async fn run(place: &Place, output: &Output) -> Result<(), CliError> {
    let settings = place.settings(output)?;
    let mut findings = vec![definitions(place).await, store(place, &settings).await];
    findings.extend(online(place, &settings).await);
    findings.extend(event_log(&settings).await);
    let server = match address(None, &settings.serve.grpc) {
        Ok(address) => Server::connect(address, settings.project.value.clone()).await.ok(),
        Err(_) => None,
    };
    let running = match server {
        Some(server) => running(&server).await,
        None => None,
    };
    match running {
        Some(running) => findings.extend(running),
        None => findings.extend([port("grpc port", &settings.serve.grpc), port("http port", &settings.serve.http)]),
    }
    findings.push(torch());

    for Finding { what, health, text } in &findings {
        let mark = match health {
            Health::Ok => "ok     ",
            Health::Warning => "warning",
            Health::Error => "ERROR  ",
        };
        output.line(format!("{mark}  {what:<12}  {text}"));
    }
    output.json(&findings);
    match findings.iter().filter(|finding| finding.health == Health::Error).count() {
        0 => Ok(()),
        errors => Err(CliError::Failed(format!("{} of {} failed", counted(errors, "check"), findings.len()))),
    }
}

fn finding(what: &'static str, found: Result<String, String>) -> Finding {
    match found {
        Ok(text) => Finding { what, health: Health::Ok, text },
        Err(text) => Finding { what, health: Health::Error, text },
    }
}

async fn definitions(place: &Place) -> Finding {
    let found = match Project::read(place) {
        Err(error) => Err(chain(&error)),
        Ok(project) => match project.check().await {
            Ok(checked) => Ok(format!("{} is valid", checked.plan.project)),
            Err(_) => Err("the definitions have errors; `coeval validate` shows them".to_owned()),
        },
    };
    finding("definitions", found)
}

async fn store(place: &Place, settings: &Settings) -> Finding {
    let url = place.resolve(&settings.store);
    let absent = place.store_is_absent(settings);
    let found = if absent {
        // Looking must not create it: what counts is whether `apply` could.
        let parent = Path::new(&url).ancestors().skip(1).find(|folder| folder.exists());
        match parent.map(writable) {
            Some(Ok(())) => Ok(format!("{url} is not there yet and can be created")),
            Some(Err(error)) => Err(format!("{url} cannot be created: {error}")),
            None => Err(format!("{url} cannot be created: no folder above it exists")),
        }
    } else {
        match place.registry(settings).await {
            Err(error) => Err(chain(&error)),
            Ok(registry) => {
                let state = registry.state();
                let applied = match state.project(&settings.project) {
                    Some(project) => format!("entry {} is in force", project.applied.fact.entry),
                    None => "nothing is applied yet".to_owned(),
                };
                let is_folder = !url.contains("://");
                match if is_folder { writable(Path::new(&url)) } else { Ok(()) } {
                    Ok(()) => Ok(format!("{url} answers, {applied}")),
                    Err(error) => Err(format!("{url} cannot be written: {error}")),
                }
            }
        }
    };
    finding("store", found)
}

fn writable(folder: &Path) -> std::io::Result<()> {
    let probe = folder.join(PROBE);
    std::fs::write(&probe, b"")?;
    std::fs::remove_file(probe)
}

/// One finding per node.
async fn online(place: &Place, settings: &Settings) -> Vec<Finding> {
    const WHAT: &str = "online store";
    let url = match &settings.online.value {
        OnlineUrl::Embedded => return vec![finding(WHAT, embedded(place, settings))],
        OnlineUrl::Redis(url) | OnlineUrl::RedisCluster(url) => url,
    };
    let store = match RedisStore::connect(url, ONLINE_TIMEOUT).await {
        Ok(store) => store,
        Err(error) => return vec![finding(WHAT, Err(chain(&error)))],
    };
    let failure = store.ping().await.err();
    let nodes = store.report().await.unwrap_or_default();
    let mut findings: Vec<Finding> = nodes.iter().map(|node| node_finding(WHAT, node, failure.is_some())).collect();
    if let Some(error) = failure
        && findings.iter().all(|finding| finding.health == Health::Ok)
    {
        findings.push(finding(WHAT, Err(chain(&error))));
    }
    findings
}

/// One that is on disk is the server's own, which says itself what is wrong with it.
async fn event_log(settings: &Settings) -> Option<Finding> {
    let (LogKind::Redis, OnlineUrl::Redis(url) | OnlineUrl::RedisCluster(url)) = (settings.log, &settings.online.value)
    else {
        return None;
    };
    let looked = ingest::log::look(url, &settings.project).await;
    Some(finding("event log", looked.map_err(|error| chain(&error))))
}

/// `is_failing`: the store as a whole does not answer, so what is wrong with a node is why.
fn node_finding(what: &'static str, node: &NodeReport, is_failing: bool) -> Finding {
    let NodeReport { place, role, durability, problems, .. } = node;
    if !problems.is_empty() {
        let health = if is_failing { Health::Error } else { Health::Warning };
        return Finding { what, health, text: format!("{place} ({role}): {}", problems.join("; ")) };
    }
    let used = match (node.used_bytes, node.max_bytes) {
        (Some(used), Some(max)) => format!("{} of {} used", size(used), size(max)),
        (Some(used), None) => format!("{} used, no maxmemory", size(used)),
        _ => "memory unknown".to_owned(),
    };
    let keys = node.keys.map_or(String::new(), |keys| format!(", {keys} keys"));
    finding(what, Ok(format!("{place} ({role}): {used}{keys}, {durability}")))
}

/// Looked at from outside: the store is held open by the server that uses it.
fn embedded(place: &Place, settings: &Settings) -> Result<String, String> {
    let folder = local_folder(&place.folder, &settings.store, &settings.project).join("online");
    let shown = folder.display();
    if !folder.exists() {
        return Ok(format!("embedded, {shown} is made by the first `coeval serve`"));
    }
    match bytes_below(&folder) {
        Ok(bytes) => Ok(format!("embedded, {shown}: {} used, synced disk", size(bytes))),
        Err(error) => Err(format!("embedded, {shown} cannot be read: {error}; check who owns it")),
    }
}

fn bytes_below(folder: &Path) -> std::io::Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        bytes += match entry.metadata() {
            Ok(about) if about.is_dir() => bytes_below(&entry.path())?,
            Ok(about) => about.len(),
            // A running server tidies up.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => 0,
            Err(error) => return Err(error),
        };
    }
    Ok(bytes)
}

fn size(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// None where what listens is no server of ours: then the ports are what is wrong.
async fn running(server: &Server) -> Option<Vec<Finding>> {
    let found = match server.catalog().await {
        Ok(catalog) => {
            let waiting: Vec<&str> =
                catalog.views.iter().filter(|view| !view.ready).map(|view| view.name.as_str()).collect();
            let text = format!("{} serves {}", server.address, catalog.project);
            if waiting.is_empty() {
                finding("server", Ok(text))
            } else {
                let text = format!("{text}; not answering yet: {}", waiting.join(", "));
                Finding { what: "server", health: Health::Warning, text }
            }
        }
        Err(ServerError::Unreachable { .. }) => return None,
        Err(error) => finding("server", Err(chain(&error))),
    };
    let mut findings = vec![found];
    let request = GetMemoryRequest { project: server.project.clone() };
    // A server of an earlier version does not know.
    if let Ok(memory) = server.control().get_memory(request).await {
        findings.extend(memory_findings(&memory.into_inner()));
    }
    Some(findings)
}

/// The models' ledger: its sum, its entries, and what is not in it.
fn memory_findings(memory: &GetMemoryResponse) -> Vec<Finding> {
    const WHAT: &str = "memory";
    let on_cpu = memory.models.iter().filter(|model| model.device == "cpu");
    let taken = on_cpu.map(|model| model.bytes).sum();
    let of = match memory.capacity {
        0 => String::new(),
        capacity => format!(" of the {} that they may, {PERCENT_MAX} % of {}", shown(memory.allowed), shown(capacity)),
    };
    let resident = shown(memory.resident);
    let mut findings =
        vec![finding(WHAT, Ok(format!("models take {}{of}; the process has {resident} in RAM", shown(taken))))];
    let model = |model: &ModelMemory| {
        finding(WHAT, Ok(format!("{} on {}: {} = {}", model.name, model.device, shown(model.bytes), model.arithmetic)))
    };
    findings.extend(memory.models.iter().map(model));
    let alarm = |text: &String| Finding { what: WHAT, health: Health::Warning, text: text.clone() };
    findings.extend(memory.alarms.iter().map(alarm));
    findings
}

fn port(what: &'static str, address: &str) -> Finding {
    let found = match TcpListener::bind(address) {
        Ok(_) => Ok(format!("{address} is free")),
        Err(error) => Err(format!("{address} cannot be listened on: {error}; change `serve:` in coeval.yaml")),
    };
    finding(what, found)
}

fn torch() -> Finding {
    #[cfg(feature = "torch")]
    let (health, text) = match inference::torch::find() {
        Ok(folder) => (Health::Ok, format!("TorchScript models run on the libtorch in {}", folder.display())),
        // Only models need it.
        Err(error) => (Health::Warning, format!("models cannot be deployed: {error}")),
    };
    #[cfg(not(feature = "torch"))]
    let (health, text) = {
        let text = "this build has no torch: models cannot be deployed; build with `--features torch`";
        (Health::Warning, text.to_owned())
    };
    Finding { what: "torch", health, text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ledger_is_a_sum_its_entries_and_what_grows() {
        let model = ModelMemory {
            name: "delay/2".to_owned(),
            bytes: 3 << 20,
            arithmetic: "the file of 3.0 MiB".to_owned(),
            device: "cpu".to_owned(),
        };
        let memory = GetMemoryResponse {
            capacity: 10 << 30,
            allowed: 8 << 30,
            resident: 300 << 20,
            models: vec![model],
            alarms: vec!["it grows".to_owned()],
        };
        let lines: Vec<(Health, String)> =
            memory_findings(&memory).into_iter().map(|finding| (finding.health, finding.text)).collect();
        let sum =
            "models take 3.0 MiB of the 8.0 GiB that they may, 80 % of 10.0 GiB; the process has 300.0 MiB in RAM";
        assert_eq!(
            lines,
            [
                (Health::Ok, sum.to_owned()),
                (Health::Ok, "delay/2 on cpu: 3.0 MiB = the file of 3.0 MiB".to_owned()),
                (Health::Warning, "it grows".to_owned()),
            ]
        );
    }

    #[test]
    fn a_node_is_one_line() {
        let mut node = NodeReport {
            place: "redis://host:6379".to_owned(),
            role: "master".to_owned(),
            used_bytes: Some(3 << 19),
            max_bytes: Some(100 << 20),
            keys: Some(12),
            durability: "appendfsync always".to_owned(),
            problems: vec![],
        };
        let found = node_finding("online store", &node, false);
        assert_eq!(found.health, Health::Ok);
        let expected = "redis://host:6379 (master): 1.5 MiB of 100.0 MiB used, 12 keys, appendfsync always";
        assert_eq!(found.text, expected);
        node.problems = vec!["this; do that".to_owned()];
        assert_eq!(node_finding("online store", &node, false).health, Health::Warning);
        let found = node_finding("online store", &node, true);
        assert_eq!(found.health, Health::Error);
        assert_eq!(found.text, "redis://host:6379 (master): this; do that");
    }
}
