//! `coeval forget`: removes an entity from everything that Coeval keeps.
//!
//! A running server does the work. Without one the command writes the entry of the control log that hides the entity, and
//! the server removes what is stored when it starts: what it needs to know is in the log.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;

use arrow::array::Array;
use feature_defs::forgotten::{KeyHash, from_hex};
use feature_defs::plan::encode_entity_keys;
use feature_defs::value::{Type, Value};
use proto::v1::{ForgetRequest, ForgetResult, ForgottenPlace};
use registry::forgotten::{Forget, KEYS_MAX};
use registry::id::{EntityName, KeyHash as RecordedHash, Salt};
use registry::state::Change;
use registry::{Outcome, Registry};
use serde::Serialize;

use crate::error::{CliError, counted};
use crate::output::Output;
use crate::project::{Checked, Place, Project, project_name, who};
use crate::server::{Server, ServerArguments, ServerError};
use crate::{columns, rows, tables};

/// Rows read from a file of keys at a time.
const BATCH_ROWS: usize = 8_192;

#[derive(Debug, clap::Args)]
pub struct ForgetArguments {
    /// The entity: what views are keyed by
    entity: String,
    /// Every key of the entity, as `name=value`; quotes keep the word `null`
    #[arg(value_name = "KEY=VALUE", required_unless_present = "from", conflicts_with = "from")]
    keys: Vec<String>,
    /// Several entities at once: a CSV or Parquet file with a column for each key
    #[arg(long, value_name = "FILE")]
    from: Option<PathBuf>,
    /// Count what would be removed, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Do not ask
    #[arg(long)]
    yes: bool,
    /// Why, for the audit trail
    #[arg(long, value_name = "TEXT")]
    why: Option<String>,
    /// Who, for the audit trail; without it, the account that runs this
    #[arg(long, value_name = "NAME")]
    who: Option<String>,
    #[command(flatten)]
    server: ServerArguments,
}

#[derive(Debug, Serialize)]
struct Report {
    entity: String,
    entities: usize,
    dry_run: bool,
    /// Where the work was done: `server`, or `later` by the server that starts next.
    by: &'static str,
    /// The entry of the control log.
    entry: u64,
    /// They were asked to be forgotten before.
    existed: bool,
    hashes: Vec<String>,
    places: Vec<PlaceReport>,
    seconds: f64,
}

#[derive(Debug, Serialize)]
struct PlaceReport {
    place: String,
    name: String,
    rows_removed: u64,
    rows_cleared: u64,
    files: u64,
    #[serde(skip_serializing_if = "String::is_empty")]
    note: String,
}

impl From<ForgottenPlace> for PlaceReport {
    fn from(place: ForgottenPlace) -> PlaceReport {
        let ForgottenPlace { kind, name, rows_removed, rows_cleared, files, note } = place;
        PlaceReport { place: kind, name, rows_removed, rows_cleared, files, note }
    }
}

/// The keys of an entity: names, types and a list of values for each.
struct Named {
    keys: Vec<(String, Type)>,
    values: Vec<Vec<Value>>,
}

pub async fn run(place: &Place, arguments: &ForgetArguments, output: &Output) -> Result<(), CliError> {
    let checked = Project::read(place)?.checked(output).await?;
    let named = named(&checked, arguments)?;
    let entities = named.values.first().map_or(0, Vec::len);
    if entities > KEYS_MAX {
        let text = format!("{entities} entities are too many for one call; name at most {KEYS_MAX} at once");
        return Err(CliError::Usage(text));
    }
    let what = match (entities, &arguments.from) {
        (1, None) => format!("{} {}", arguments.entity, arguments.keys.join(" ")),
        (count, _) => format!("{} of entity `{}`", counted(count, "key"), arguments.entity),
    };
    let server = match arguments.dry_run {
        // What is stored is counted by whoever has it open.
        true => Some(Server::of(place, &arguments.server, output).await?),
        false => Server::if_running(place, &arguments.server, output).await?,
    };
    if !arguments.dry_run && !arguments.yes {
        confirm(&what)?;
    }
    match server {
        Some(server) => by_server(&server, &named, arguments, &what, output).await,
        None => later(place, &checked, &named, arguments, &what, output).await,
    }
}

/// What the words, or the file, name.
fn named(checked: &Checked, arguments: &ForgetArguments) -> Result<Named, CliError> {
    let entities = &checked.catalog.entities;
    let entity = entities.iter().find(|entity| *entity.name == *arguments.entity);
    let entity = entity.ok_or_else(|| {
        CliError::unknown("entity", &arguments.entity, entities.iter().map(|entity| entity.name.as_str()))
    })?;
    if entity.keys.is_empty() {
        let text = format!("entity `{}` has no keys: it is everybody, and cannot be forgotten", arguments.entity);
        return Err(CliError::Usage(text));
    }
    let keys: Vec<(String, Type)> =
        entity.keys.iter().map(|key| (key.name.value.clone(), key.field_type.value.clone())).collect();
    let values = match &arguments.from {
        Some(file) => from_file(file, &keys)?,
        None => from_words(&arguments.entity, &arguments.keys, &keys)?,
    };
    if values.iter().flatten().any(Value::is_null) {
        return Err(CliError::Usage("a key is null, and a null names no entity".to_owned()));
    }
    Ok(Named { keys, values })
}

fn from_words(entity: &str, words: &[String], keys: &[(String, Type)]) -> Result<Vec<Vec<Value>>, CliError> {
    let mut given: BTreeMap<&str, &str> = BTreeMap::new();
    for word in words {
        let Some((name, value)) = word.split_once('=') else {
            return Err(CliError::Usage(format!("`{word}` is not `key=value`")));
        };
        if !keys.iter().any(|(key, _)| key == name) {
            return Err(CliError::unknown("key", name, keys.iter().map(|(key, _)| key.as_str())));
        }
        if given.insert(name, value).is_some() {
            return Err(CliError::Usage(format!("`{name}` is given twice")));
        }
    }
    let value = |(name, key_type): &(String, Type)| match given.get(name.as_str()) {
        Some(text) => Ok(vec![rows::value(name, text, key_type)?]),
        None => {
            let all: Vec<&str> = keys.iter().map(|(key, _)| key.as_str()).collect();
            let text = format!("key `{name}` is missing; entity `{entity}` is named by: {}", all.join(", "));
            Err(CliError::Usage(text))
        }
    };
    keys.iter().map(value).collect()
}

fn from_file(file: &std::path::Path, keys: &[(String, Type)]) -> Result<Vec<Vec<Value>>, CliError> {
    let types = Arc::new(keys.iter().cloned().collect::<BTreeMap<String, Type>>());
    let table = tables::open(file, &types, BATCH_ROWS)?;
    table.require(keys.iter().map(|(name, _)| name.as_str()))?;
    let mut values: Vec<Vec<Value>> = vec![Vec::new(); keys.len()];
    for batch in table {
        let batch = batch?;
        for ((name, key_type), values) in keys.iter().zip(&mut values) {
            let Some(column) = batch.column_by_name(name) else { continue };
            values.extend((0..column.len()).map(|row| Value::from_array(column, row, key_type)));
        }
    }
    if values.first().is_none_or(Vec::is_empty) {
        return Err(CliError::Usage(format!("{} names no entity", file.display())));
    }
    Ok(values)
}

/// It cannot be taken back, so somebody has to say so.
fn confirm(what: &str) -> Result<(), CliError> {
    if !std::io::stdin().is_terminal() {
        return Err(CliError::Usage(
            "forgetting cannot be taken back; say `--yes`, or look first with `--dry-run`".into(),
        ));
    }
    let failed = |source| CliError::Io { what: "the answer could not be read".to_owned(), source };
    let mut out = std::io::stderr().lock();
    write!(out, "Forget {what}? It cannot be taken back. Write `yes`: ").and_then(|()| out.flush()).map_err(failed)?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer).map_err(failed)?;
    match answer.trim() {
        "yes" => Ok(()),
        _ => Err(CliError::Failed("nothing was forgotten".to_owned())),
    }
}

async fn by_server(
    server: &Server,
    named: &Named,
    arguments: &ForgetArguments,
    what: &str,
    output: &Output,
) -> Result<(), CliError> {
    let columns = named.keys.iter().zip(&named.values);
    let request = ForgetRequest {
        project: server.project.clone(),
        entity: arguments.entity.clone(),
        keys: columns.map(|((name, key_type), values)| columns::encode(name, values, key_type)).collect(),
        dry_run: arguments.dry_run,
        who: who(arguments.who.as_deref()),
        why: arguments.why.clone().unwrap_or_default(),
    };
    let mut answers = server.control().forget(request).await.map_err(|status| server.failed(status))?.into_inner();
    let waiting = output.waiting();
    let mut result: Option<ForgetResult> = None;
    while let Some(progress) = answers.message().await.map_err(|status| server.failed(status))? {
        waiting.set_message(progress.stage);
        result = progress.result.or(result);
    }
    waiting.finish_and_clear();
    // The entry is in the log by then, or the call would have failed: the server goes on by itself.
    let result = result.ok_or_else(|| ServerError::Cut { address: server.address.clone() })?;
    let report = Report {
        entity: arguments.entity.clone(),
        entities: result.hashes.len(),
        dry_run: arguments.dry_run,
        by: "server",
        entry: result.control_entry,
        existed: result.existed,
        hashes: result.hashes,
        places: result.places.into_iter().map(PlaceReport::from).collect(),
        seconds: result.seconds,
    };
    show(&report, what, output);
    Ok(())
}

fn show(report: &Report, what: &str, output: &Output) {
    let is_something = |place: &&PlaceReport| place.rows_removed + place.rows_cleared + place.files > 0;
    let found: Vec<Vec<String>> = report
        .places
        .iter()
        .filter(is_something)
        .map(|place| {
            let counts = [place.rows_removed, place.rows_cleared, place.files].map(|count| count.to_string());
            [place.place.clone(), place.name.clone()].into_iter().chain(counts).collect()
        })
        .collect();
    if found.is_empty() {
        output.line(format!("{what}: nothing of it is stored"));
    } else {
        output.table(&["PLACE", "NAME", "ROWS REMOVED", "ROWS CLEARED", "FILES"], &found);
    }
    for place in report.places.iter().filter(|place| !place.note.is_empty()) {
        output.line(format!("{} `{}`: {}", place.place, place.name, place.note));
    }
    output.line(match (report.dry_run, report.existed) {
        (true, _) => format!("{what}: nothing was changed"),
        (false, false) => {
            format!("{what}: forgotten as entry {} of the control log, in {:.1} s", report.entry, report.seconds)
        }
        (false, true) => format!(
            "{what}: was forgotten before, as entry {}; looked through again in {:.1} s",
            report.entry, report.seconds
        ),
    });
    output.json(report);
}

/// Without a server: the entry is written, and the next one does the rest.
async fn later(
    place: &Place,
    checked: &Checked,
    named: &Named,
    arguments: &ForgetArguments,
    what: &str,
    output: &Output,
) -> Result<(), CliError> {
    let project = project_name(&checked.settings)?;
    let registry: Registry = place.registry(&checked.settings).await?;
    let state = registry.state();
    let known = state.project(project.as_str());
    let salt = known.and_then(|known| known.forgotten.salt.clone()).unwrap_or_else(Salt::random);
    let bytes = from_hex(salt.as_str()).unwrap_or_default();
    let columns = named.keys.iter().zip(&named.values);
    let columns: Vec<_> =
        columns.map(|((_, key_type), values)| (Value::to_array(values, key_type), key_type)).collect();
    let rows = columns.first().map_or(0, |(column, _)| column.len());
    let keys = encode_entity_keys(&columns, rows);
    let hashes = (0..rows).filter_map(|row| Some(KeyHash::of(&bytes, &arguments.entity, keys.get(row)?)));
    let recorded = hashes.map(|hash| RecordedHash::try_new(hash.to_string())).collect::<Result<Vec<_>, _>>()?;
    let entity = EntityName::try_new(arguments.entity.as_str())?;
    let change = Change::Forget(Forget { salt, entity, keys: recorded.clone() });
    let author = who(arguments.who.as_deref());
    let receipt = registry.submit(&project, &change, &author, arguments.why.as_deref()).await?;
    let existed = receipt.outcome == Outcome::AlreadySo;
    output.line(format!(
        "{what}: hidden from every reader by entry {} of the control log; no server runs, so what is stored of it is \
         removed when `coeval serve` starts",
        receipt.entry
    ));
    output.json(&Report {
        entity: arguments.entity.clone(),
        entities: recorded.len(),
        dry_run: false,
        by: "later",
        entry: receipt.entry.0,
        existed,
        hashes: recorded.iter().map(RecordedHash::to_string).collect(),
        places: Vec::new(),
        seconds: 0.0,
    });
    Ok(())
}
