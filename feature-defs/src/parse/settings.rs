//! `coeval.yaml`: one file, an overlay per environment merged over it, and `${VAR}` filled in last, so that a variable
//! which an overlay replaces need not be set.

use std::time::Duration;

use super::reader::{ABOUT, Reader};
use super::{SETTINGS_FILE, overlay_path};
use crate::catalog::{
    AuditSettings, CacheSettings, Files, LogKind, OfflineSettings, OnlineUrl, RequestTime, ServeSettings,
    ServingLogSettings, Settings,
};
use crate::diagnose::{Diagnostic, Severity, Span, Spanned, nearest, shown};
use crate::yaml::{self, Kind, Node};

pub(super) const KEYS: [&str; 12] = [
    "project",
    "store",
    "online",
    "log",
    "offline",
    "serve",
    "serving_log",
    "audit",
    "guardrails",
    ABOUT[0],
    ABOUT[1],
    ABOUT[2],
];

const GRPC_DEFAULT: &str = "127.0.0.1:7400";
const HTTP_DEFAULT: &str = "127.0.0.1:7401";
const OFFLINE_MEMORY_DEFAULT: u64 = 4 << 30;
/// Rows per second: more is a sample of its own.
const FALLBACKS_MAX: i64 = 100_000;
const CACHE_MEMORY_DEFAULT: u64 = 64 << 20;
/// Eight rows of every model: a thousandth of what one executor can do, and a broken device is noticed within a minute.
const GOLDEN_CHECKS_DEFAULT: Duration = Duration::from_secs(30);
/// The key is a sentence on purpose: whoever writes it has read it.
const BEYOND_LOOPBACK: &str = "listen_beyond_loopback_without_authentication";

/// Reads the settings out of a project's files. `environment` names the overlay, `variables` is asked for `${VAR}`.
pub fn parse_settings(
    files: &Files,
    environment: Option<&str>,
    variables: &dyn Fn(&str) -> Option<String>,
) -> Result<Settings, Vec<Diagnostic>> {
    let mut reader = Reader { files, diagnostics: Vec::new() };
    let settings = read(&mut reader, environment, variables);
    let failed = reader.diagnostics.iter().any(|diagnostic| diagnostic.severity == Severity::Error);
    match settings {
        Some(settings) if !failed => Ok(settings),
        _ => Err(reader.diagnostics),
    }
}

fn read(
    reader: &mut Reader<'_>,
    environment: Option<&str>,
    variables: &dyn Fn(&str) -> Option<String>,
) -> Option<Settings> {
    let Some(mut root) = document(reader, SETTINGS_FILE) else {
        if reader.diagnostics.is_empty() {
            let diagnostic = Diagnostic::error(format!("there is no `{SETTINGS_FILE}` here"), Span::NOWHERE);
            reader.report(diagnostic.help("run this in a project's folder, or start one with `coeval init`"));
        }
        return None;
    };
    if let Some(environment) = environment {
        let path = overlay_path(environment);
        match document(reader, &path) {
            Some(overlay) => merge(&mut root, overlay),
            None if reader.files.files.iter().any(|file| file.path == path) => return None,
            None => {
                let known: Vec<&str> = reader
                    .files
                    .files
                    .iter()
                    .filter_map(|file| file.path.strip_prefix("coeval.")?.strip_suffix(".yaml"))
                    .collect();
                let diagnostic = Diagnostic::error(
                    format!("the environment `{}` has no file `{}`", shown(environment), shown(&path)),
                    Span::NOWHERE,
                );
                reader.report(diagnostic.nearest(environment, known));
                return None;
            }
        }
    }
    interpolate(reader, &mut root, variables);
    settings(reader, &root)
}

/// The root of one file, None when there is no such file or it is not YAML.
fn document(reader: &mut Reader<'_>, path: &str) -> Option<Node> {
    let (index, file) = reader.files.files.iter().enumerate().find(|(_, file)| file.path == path)?;
    let (node, diagnostics) = yaml::parse(index as u32, &file.text);
    reader.diagnostics.extend(diagnostics);
    let node = node?;
    match node.kind {
        Kind::Null => Some(Node { kind: Kind::Mapping(Vec::new()), ..node }),
        _ => Some(node),
    }
}

/// Mappings merge key by key; everything else is replaced whole, lists too.
fn merge(base: &mut Node, overlay: Node) {
    match (&mut base.kind, overlay.kind) {
        (Kind::Mapping(entries), Kind::Mapping(over)) => {
            for (key, node) in over {
                match entries.iter_mut().find(|(name, _)| *name == key) {
                    Some((_, existing)) => merge(existing, node),
                    None => entries.push((key, node)),
                }
            }
        }
        (_, kind) => *base = Node { span: overlay.span, kind },
    }
}

fn interpolate(reader: &mut Reader<'_>, node: &mut Node, variables: &dyn Fn(&str) -> Option<String>) {
    match &mut node.kind {
        Kind::Sequence(items) => items.iter_mut().for_each(|item| interpolate(reader, item, variables)),
        Kind::Mapping(entries) => entries.iter_mut().for_each(|(_, node)| interpolate(reader, node, variables)),
        Kind::String(text) if text.contains("${") => {
            let filled = fill(reader, text, node.span, variables);
            // A setting that is a truth value can come from a variable too; every other setting is a string.
            node.kind = match filled.as_str() {
                "true" => Kind::Bool(true),
                "false" => Kind::Bool(false),
                _ => Kind::String(filled),
            };
        }
        _ => {}
    }
}

/// `${NAME}` and `${NAME:-default}` (also for an empty variable, as in the shell); `$${` is a literal `${`.
fn fill(reader: &mut Reader<'_>, text: &str, span: Span, variables: &dyn Fn(&str) -> Option<String>) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find("${") {
        let (before, after) = rest.split_at(at);
        if let Some(before) = before.strip_suffix('$') {
            out.push_str(before);
            out.push_str("${");
            rest = &after[2..];
            continue;
        }
        out.push_str(before);
        let Some(end) = after.find('}') else {
            reader.report(
                Diagnostic::error("`${` is not closed", span)
                    .help("write `${NAME}`, or `$${` for the characters themselves"),
            );
            return text.to_string();
        };
        let (name, default) = match after[2..end].split_once(":-") {
            Some((name, default)) => (name, Some(default)),
            None => (&after[2..end], None),
        };
        let valid = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        let place = within(reader, span, &after[..=end]);
        if !valid {
            reader.report(Diagnostic::error(format!("`{}` is not the name of a variable", shown(name)), place));
            out.push_str(&after[..=end]);
        } else {
            let value = variables(name).filter(|value| default.is_none() || !value.is_empty());
            match value.as_deref().or(default) {
                Some(value) => out.push_str(value),
                None => {
                    let diagnostic = Diagnostic::error(format!("the variable `{}` is not set", shown(name)), place);
                    reader.report(diagnostic.help(format!("set it, or give a default: ${{{}:-default}}", shown(name))));
                    // Something must stand here, or the setting would be reported as empty on top.
                    out.push_str(&after[..=end]);
                }
            }
        }
        rest = &after[end + 1..];
    }
    out.push_str(rest);
    out
}

/// The part of a scalar that says `words`, or all of it where it is written in another way (escapes, folded lines).
fn within(reader: &Reader<'_>, span: Span, words: &str) -> Span {
    match reader.written(span).find(words) {
        Some(at) => Span { start: span.start + at as u32, end: span.start + (at + words.len()) as u32, ..span },
        None => span,
    }
}

fn settings(reader: &mut Reader<'_>, root: &Node) -> Option<Settings> {
    let mut object = reader.object(root, "project", &KEYS)?;
    object.what = format!("`{SETTINGS_FILE}`");
    let here = object.span;
    reader.about(&object);
    let project = reader.name(&object, "project");
    if !project.is_empty() && !is_project_name(&project) {
        reader.report(
            Diagnostic::error(format!("`{}` cannot be the name of a project", shown(&project)), project.span)
                .help("use a letter, then letters, digits, `-` and `_`, 64 at most"),
        );
    }
    let store = reader.optional(&object, "store", store).unwrap_or(Spanned::new("./.coeval".to_string(), here));
    let online = reader.optional(&object, "online", online).unwrap_or(Spanned::new(OnlineUrl::Embedded, here));
    let log = reader.optional(&object, "log", |reader, node| {
        reader.one_of(node, &[("disk", LogKind::Disk), ("redis", LogKind::Redis)])
    });
    if let Some(log) = log
        && log.value == LogKind::Redis
        && online.value == OnlineUrl::Embedded
    {
        let diagnostic = Diagnostic::error("`log: redis` needs a Redis, but `online` is `embedded`", log.span);
        reader.report(diagnostic.help("write `log: disk`, or name the Redis in `online`"));
    }
    let offline = reader.optional(&object, "offline", offline).unwrap_or(OfflineSettings {
        engine: "local".to_string(),
        memory_bytes: OFFLINE_MEMORY_DEFAULT,
        spill: None,
    });
    let serve = reader.optional(&object, "serve", serve).unwrap_or(ServeSettings {
        grpc: Spanned::new(GRPC_DEFAULT.to_string(), here),
        http: Spanned::new(HTTP_DEFAULT.to_string(), here),
        request_time: RequestTime::Refused,
        beyond_loopback: false,
        cache: None,
        golden_checks: GOLDEN_CHECKS_DEFAULT,
    });
    let guardrails = reader.optional(&object, "guardrails", |reader, node| reader.list(node, Reader::guardrail));
    Some(Settings {
        project,
        store,
        online,
        log: log.map_or(LogKind::Disk, |log| log.value),
        offline,
        serve,
        serving_log: reader
            .optional(&object, "serving_log", serving_log)
            .unwrap_or(Some(ServingLogSettings::default())),
        audit: reader.optional(&object, "audit", audit).unwrap_or(Some(AuditSettings::default())),
        guardrails: guardrails.unwrap_or_default(),
    })
}

fn is_project_name(name: &str) -> bool {
    name.len() <= 64
        && name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

fn store(reader: &mut Reader<'_>, node: &Node) -> Option<Spanned<String>> {
    const SCHEMES: [&str; 4] = ["s3", "gs", "az", "file"];
    let url = reader.string(node)?;
    if let Some((scheme, _)) = url.split_once("://")
        && !SCHEMES.contains(&scheme)
    {
        let diagnostic =
            Diagnostic::error(format!("`{}://` is not an object store known here", shown(scheme)), url.span);
        let help = match nearest(scheme, SCHEMES) {
            Some(near) => format!("did you mean `{near}://`?"),
            None => "use a folder, `s3://`, `gs://` or `az://`".to_string(),
        };
        reader.report(diagnostic.help(help));
        return None;
    }
    Some(url)
}

fn online(reader: &mut Reader<'_>, node: &Node) -> Option<Spanned<OnlineUrl>> {
    let url = reader.string(node)?;
    let parsed = match url.split_once("://") {
        None if *url == "embedded" => Some(OnlineUrl::Embedded),
        Some(("redis" | "rediss", rest)) if !rest.is_empty() => Some(OnlineUrl::Redis(url.value.clone())),
        Some(("redis+cluster" | "rediss+cluster", rest)) => {
            // Between the password and the certificates.
            let hosts = rest.split('?').next().unwrap_or_default();
            let hosts = hosts.rsplit_once('@').map_or(hosts, |(_, hosts)| hosts);
            let mut seeds = hosts.trim_end_matches('/').split(',');
            seeds.all(|seed| is_address(seed.trim())).then(|| OnlineUrl::RedisCluster(url.value.clone()))
        }
        _ => None,
    };
    if parsed.is_none() {
        let diagnostic =
            Diagnostic::error(format!("`{}` is not an online store", shown(&without_password(&url))), url.span);
        let help = match url.split_once("://") {
            None => nearest(&url, ["embedded"]).map(|near| format!("did you mean `{near}`?")),
            Some((scheme, _)) => nearest(scheme, ["redis", "rediss", "redis+cluster", "rediss+cluster"])
                .filter(|near| *near != scheme)
                .map(|near| format!("did you mean `{near}://`?")),
        };
        reader.report(diagnostic.help(help.unwrap_or_else(|| {
            "use `embedded`, `redis://host:6379`, `rediss://host:6379` or `redis+cluster://a:6379,b:6379`".to_string()
        })));
    }
    Some(Spanned::new(parsed?, url.span))
}

/// An address as it may be shown.
fn without_password(url: &str) -> String {
    match (url.split_once("://"), url.rsplit_once('@')) {
        (Some((scheme, _)), Some((_, hosts))) => format!("{scheme}://***@{hosts}"),
        _ => url.to_string(),
    }
}

/// `host:port`.
fn is_address(text: &str) -> bool {
    text.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
}

fn address(reader: &mut Reader<'_>, node: &Node) -> Option<Spanned<String>> {
    let text = reader.string(node)?;
    if !is_address(&text) {
        let diagnostic = Diagnostic::error(format!("`{}` is not an address to listen on", shown(&text)), text.span);
        reader.report(diagnostic.help("write a host and a port: `127.0.0.1:7400`"));
        return None;
    }
    Some(text)
}

fn offline(reader: &mut Reader<'_>, node: &Node) -> Option<OfflineSettings> {
    let object = reader.object(node, "offline engine", &["engine", "memory", "spill"])?;
    let engine = reader.optional(&object, "engine", |reader, node| reader.one_of(node, &[("local", "local")]));
    Some(OfflineSettings {
        engine: engine.map_or("local", |engine| engine.value).to_string(),
        memory_bytes: reader.optional(&object, "memory", Reader::size).unwrap_or(OFFLINE_MEMORY_DEFAULT),
        spill: reader.optional(&object, "spill", Reader::string).map(|path| path.value),
    })
}

fn serve(reader: &mut Reader<'_>, node: &Node) -> Option<ServeSettings> {
    let object =
        reader.object(node, "server", &["grpc", "http", "request_time", "cache", "golden_checks", BEYOND_LOOPBACK])?;
    let here = object.span;
    let request_time = reader.optional(&object, "request_time", |reader, node| {
        reader.one_of(node, &[("refused", RequestTime::Refused), ("allowed", RequestTime::Allowed)])
    });
    Some(ServeSettings {
        grpc: reader.optional(&object, "grpc", address).unwrap_or(Spanned::new(GRPC_DEFAULT.to_string(), here)),
        http: reader.optional(&object, "http", address).unwrap_or(Spanned::new(HTTP_DEFAULT.to_string(), here)),
        request_time: request_time.map_or(RequestTime::Refused, |choice| choice.value),
        beyond_loopback: reader.optional(&object, BEYOND_LOOPBACK, Reader::bool).unwrap_or(false),
        cache: reader.optional(&object, "cache", cache),
        golden_checks: reader.optional(&object, "golden_checks", Reader::duration).unwrap_or(GOLDEN_CHECKS_DEFAULT),
    })
}

fn cache(reader: &mut Reader<'_>, node: &Node) -> Option<CacheSettings> {
    let object = reader.object(node, "cache", &["staleness", "memory"])?;
    // There is no bound that suits everybody, so it has to be said.
    let staleness = reader.required(&object, "staleness", Reader::duration)?;
    let memory_bytes = reader.optional(&object, "memory", Reader::size).unwrap_or(CACHE_MEMORY_DEFAULT);
    Some(CacheSettings { staleness, memory_bytes })
}

/// `off`, or how often what was served is audited. The outer None: what is wrong was reported.
fn audit(reader: &mut Reader<'_>, node: &Node) -> Option<Option<AuditSettings>> {
    if matches!(&node.kind, Kind::Bool(false)) || matches!(&node.kind, Kind::String(text) if text == "off") {
        return Some(None);
    }
    let object = reader.object(node, "audit", &["every", "max_bug_rate"])?;
    let usual = AuditSettings::default();
    Some(Some(AuditSettings {
        every: reader.optional(&object, "every", Reader::duration).unwrap_or(usual.every),
        max_bug_rate: reader.optional(&object, "max_bug_rate", Reader::share).unwrap_or(usual.max_bug_rate),
    }))
}

/// `off`, or what is logged. The outer None: what is wrong was reported.
fn serving_log(reader: &mut Reader<'_>, node: &Node) -> Option<Option<ServingLogSettings>> {
    // YAML 1.1 takes `off` for a truth value.
    if matches!(&node.kind, Kind::Bool(false)) || matches!(&node.kind, Kind::String(text) if text == "off") {
        return Some(None);
    }
    let keys = ["sample", "uniform", "fallbacks", "flush", "retention", "spool", "key"];
    let object = reader.object(node, "serving log", &keys)?;
    let usual = ServingLogSettings::default();
    let fallbacks = reader.optional(&object, "fallbacks", |reader, node| reader.integer(node, 0..=FALLBACKS_MAX));
    Some(Some(ServingLogSettings {
        sample: reader.optional(&object, "sample", Reader::share).unwrap_or(usual.sample),
        uniform: reader.optional(&object, "uniform", Reader::share).unwrap_or(usual.uniform),
        fallbacks_per_second: fallbacks.map_or(usual.fallbacks_per_second, |rows| rows as u32),
        flush: reader.optional(&object, "flush", Reader::duration).unwrap_or(usual.flush),
        retention: reader.optional(&object, "retention", Reader::duration).unwrap_or(usual.retention),
        spool_bytes: reader.optional(&object, "spool", Reader::size).unwrap_or(usual.spool_bytes),
        key: reader.optional(&object, "key", Reader::string).map(|key| key.value),
    }))
}
