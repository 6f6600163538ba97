//! `coeval init`: a small project that validates as it stands.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::error::CliError;
use crate::output::Output;
use crate::project::Place;

const SETTINGS: &str = "\
# Settings of the project. `${NAME:-value}` takes an environment variable, or the value where it is not set.
project: PROJECT
store: ./.coeval                # control log, history, datasets and models
online: embedded                # or redis://127.0.0.1:6379
serve: {grpc: 127.0.0.1:7400, http: 127.0.0.1:7401}
";

const DEFINITIONS: &str = "\
# What is known about customers, for a model that judges a basket.

entities:
  - {name: customer, keys: [{name: customer, type: string}]}

sources:
  - name: customers                       # a file that somebody else owns; no clock, so always known
    files: data/customers.csv
    static: true
    schema: [{name: customer, type: string}, {name: country, type: string}]
  - name: orders                          # a stream: events are pushed, logged and kept as history
    stream: true
    schema: [{name: customer, type: string}, {name: amount, type: float64}, {name: id, type: string}]
    event_time: ordered_at
    event_id: id

feature_views:
  - name: profile
    entity: customer
    source: customers
    features: [{name: country, type: string}]
  - name: spending
    entity: customer
    source: orders
    windows: [1h, 24h]
    aggregates:
      - {name: orders, function: count}
      - {name: amount_mean, function: mean, of: amount, default: 0.0}

requests:                                 # what a caller says
  - {name: basket, fields: [{name: total, type: float64}]}

transforms:                               # computed when asked, and identically when training
  - name: context
    inputs: [spending, basket]
    features:
      - {name: ratio, expr: \"basket.total / (spending.amount_mean_24h + 1.0)\"}

feature_services:                         # what one model needs, in order
  - {name: buying, features: [profile, spending, \"context:*\", \"basket:*\"]}
";

const CUSTOMERS: &str = "customer,country\nann,NO\nbob,DK\n";
const ORDERS: &str =
    "customer,amount,id,ordered_at\nann,12.5,o1,2024-03-10T11:00:00Z\nann,7.5,o2,2024-03-10T11:30:00Z\n";
const IGNORED: &str = ".coeval/\n";

#[derive(Debug, clap::Args)]
pub struct InitArguments {
    /// The folder to make; without it, the project's folder
    #[arg(value_name = "FOLDER")]
    folder: Option<PathBuf>,
    /// The project's name; without it, the name of the folder
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
}

#[derive(Debug, Serialize)]
struct Started {
    project: String,
    files: Vec<String>,
}

pub fn run(place: &Place, arguments: &InitArguments, output: &Output) -> Result<(), CliError> {
    let folder = &arguments.folder.as_ref().map_or_else(|| place.folder.clone(), |folder| place.folder.join(folder));
    let failed = |path: &Path| {
        let what = format!("could not write {}", path.display());
        move |source| CliError::Io { what, source }
    };
    std::fs::create_dir_all(folder).map_err(failed(folder))?;
    let name = match &arguments.name {
        Some(name) if is_name(name) => name.clone(),
        Some(name) => {
            return Err(CliError::Usage(format!(
                "`{name}` cannot be the name of a project; use a letter, then letters, digits, `-` and `_`, 64 at most"
            )));
        }
        None => name_of(folder),
    };
    let files = [
        ("coeval.yaml", SETTINGS.replace("PROJECT", &name)),
        ("features/customer.yaml", DEFINITIONS.to_owned()),
        ("data/customers.csv", CUSTOMERS.to_owned()),
        ("data/orders.csv", ORDERS.to_owned()),
        (".gitignore", IGNORED.to_owned()),
    ];
    // All or nothing: a file that is there is somebody's work.
    if let Some((present, _)) = files.iter().find(|(path, _)| *path != ".gitignore" && folder.join(path).exists()) {
        let path = folder.join(present);
        return Err(CliError::Failed(format!(
            "{} is there already; name another folder: `coeval init FOLDER`",
            path.display()
        )));
    }
    let mut written = Vec::new();
    for (path, text) in files {
        let target = folder.join(path);
        if target.exists() {
            continue;
        }
        if let Some(parent) = target.parent() {
            std::fs::create_dir_all(parent).map_err(failed(parent))?;
        }
        std::fs::write(&target, text).map_err(failed(&target))?;
        output.line(format!("wrote {}", target.display()));
        written.push(path.to_owned());
    }
    let here = if folder == Path::new(".") { String::new() } else { format!(" -C {}", folder.display()) };
    output.line(format!("next: `coeval{here} validate`, `coeval{here} apply`, `coeval{here} serve`"));
    output.json(&Started { project: name, files: written });
    Ok(())
}

fn is_name(name: &str) -> bool {
    name.len() <= 64
        && name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
}

/// The folder's name with what a project's name may not hold made `-`.
fn name_of(folder: &Path) -> String {
    let absolute = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    let name = absolute.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let kept = |c: char| if c.is_ascii_alphanumeric() || c == '_' { c } else { '-' };
    let name: String = name.chars().map(kept).skip_while(|c| !c.is_ascii_alphabetic()).take(64).collect();
    if name.is_empty() { "shop".to_owned() } else { name }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folder_names_become_project_names() {
        fn check(folder: &str, expected: &str) {
            assert_eq!(name_of(Path::new(folder)), expected);
            assert!(is_name(expected));
        }
        check("/nowhere/my shop", "my-shop");
        check("/nowhere/2024_shop", "shop");
        check("/", "shop");
    }
}
