//! `coeval doctor`: is everything there that the project needs? Each check says what it looked at and what to do.

use std::net::TcpListener;
use std::path::Path;
use std::time::Duration;

use feature_defs::catalog::{OnlineUrl, Settings};
use online_store::redis::RedisStore;
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
    let mut findings = vec![definitions(place).await, store(place, &settings).await, online(&settings).await];
    let server = match address(None, &settings.serve.grpc) {
        Ok(address) => Server::connect(address, settings.project.value.clone()).await.ok(),
        Err(_) => None,
    };
    let running = match server {
        Some(server) => running(&server).await,
        None => None,
    };
    match running {
        Some(running) => findings.push(running),
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

async fn online(settings: &Settings) -> Finding {
    let found = match &settings.online.value {
        OnlineUrl::Embedded => Ok("embedded, in the store's folder".to_owned()),
        OnlineUrl::Redis(url) => match RedisStore::connect(url, ONLINE_TIMEOUT).await {
            Ok(_) => Ok(format!("{} answers", without_password(url))),
            Err(error) => Err(chain(&error)),
        },
        OnlineUrl::RedisCluster(seeds) => {
            Err(format!("this build serves from one Redis, not from a cluster ({}); use redis://", seeds.join(", ")))
        }
    };
    finding("online store", found)
}

/// `redis://user:secret@host` as it may be shown.
fn without_password(url: &str) -> String {
    match (url.split_once("://"), url.rsplit_once('@')) {
        (Some((scheme, _)), Some((_, host))) => format!("{scheme}://***@{host}"),
        _ => url.to_owned(),
    }
}

/// None where what listens is no server of ours: then the ports are what is wrong.
async fn running(server: &Server) -> Option<Finding> {
    Some(match server.catalog().await {
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
    })
}

fn port(what: &'static str, address: &str) -> Finding {
    let found = match TcpListener::bind(address) {
        Ok(_) => Ok(format!("{address} is free")),
        Err(error) => Err(format!("{address} cannot be listened on: {error}; change `serve:` in coeval.yaml")),
    };
    finding(what, found)
}

fn torch() -> Finding {
    if cfg!(feature = "torch") {
        finding("torch", Ok("TorchScript models run on libtorch".to_owned()))
    } else {
        let text = "this build has no libtorch: models cannot be deployed; build with `--features torch`";
        Finding { what: "torch", health: Health::Warning, text: text.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_not_shown() {
        assert_eq!(without_password("redis://me:secret@host:6379/0"), "redis://***@host:6379/0");
        assert_eq!(without_password("redis://host:6379"), "redis://host:6379");
    }
}
