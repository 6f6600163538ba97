use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::diagnose::{locate, render};

/// The example of the design, word for word, with the second stream and its view written out.
pub(crate) const SETTINGS: &str = include_str!("example/coeval.yaml");
pub(crate) const DEFINITIONS: &str = include_str!("example/airport.yaml");

pub(crate) fn files(files: &[(&str, &str)]) -> Files {
    Files::new(files.iter().map(|(path, text)| SourceFile { path: path.to_string(), text: text.to_string() }).collect())
}

/// The diagnostics of parsing one definition file, one line each: `line:column message; help`.
fn problems(text: &str) -> Vec<String> {
    let files = files(&[("a.yaml", text)]);
    let (_, diagnostics) = parse_definitions("p", &files);
    lines(&diagnostics, &files)
}

pub(crate) fn lines(diagnostics: &[Diagnostic], files: &Files) -> Vec<String> {
    locate(diagnostics, files)
        .into_iter()
        .map(|located| {
            let help = located.help.map_or(String::new(), |help| format!("; {help}"));
            format!("{}:{} {}{help}", located.line, located.column, located.message)
        })
        .collect()
}

fn check(text: &str, expected: &[&str]) {
    assert_eq!(problems(text), expected, "{text}");
}

fn example() -> Catalog {
    let files = files(&[("coeval.yaml", SETTINGS), ("features/airport.yaml", DEFINITIONS)]);
    let (catalog, diagnostics) = parse_definitions("nyc-flights", &files);
    assert!(diagnostics.is_empty(), "{}", render(&diagnostics, &files, false));
    catalog
}

#[test]
fn the_example_of_the_design_is_read_whole() {
    let catalog = example();
    let counts = [
        catalog.entities.len(),
        catalog.sources.len(),
        catalog.feature_views.len(),
        catalog.requests.len(),
        catalog.transforms.len(),
        catalog.vocabularies.len(),
        catalog.feature_services.len(),
        catalog.models.len(),
    ];
    assert_eq!(counts, [4, 4, 3, 1, 1, 1, 1, 1]);

    let weather = catalog.source("weather").unwrap();
    assert_eq!((weather.delay, weather.every), (Duration::from_secs(600), Some(Duration::from_secs(3600))));
    assert!(matches!(&catalog.source("planes").unwrap().kind, SourceKind::Files { is_static: true, .. }));
    let departures = catalog.source("departures").unwrap();
    let SourceKind::Stream { event_id: Some(event_id), history: Some(history) } = &departures.kind else {
        panic!("a stream")
    };
    assert_eq!((event_id.as_str(), history.as_str()), ("event_id", "data/departures/*.parquet"));
    assert_eq!(departures.deleted.as_ref().unwrap().value, "withdrawn");
    assert_eq!(departures.schema.len(), 5);

    let now = catalog.view("weather_now").unwrap();
    assert_eq!((now.keys[0].0.as_str(), now.keys[0].1.as_str()), ("airport", "origin"));
    assert_eq!(now.filter.as_ref().unwrap().value, "visib IS NOT NULL");
    assert_eq!(now.freshness, Some(Duration::from_secs(5400)));
    let ViewKind::AsOf { ttl, keep: None, features } = &now.kind else { panic!("as of") };
    assert_eq!(*ttl, Some(Duration::from_secs(3 * 3600)));
    assert_eq!(features[2].default.as_ref().unwrap().value, Literal::Float(10.0));

    let load = catalog.view("airport_load").unwrap();
    let names = load.feature_names();
    assert_eq!(names[..3], ["departures_1h", "departures_6h", "departures_24h"]);
    assert_eq!((names.len(), names[9].as_str()), (10, "dep_delay_p90_24h"));
    let ViewKind::Windowed { aggregates, head: Head::Exclusive, hop: None, .. } = &load.kind else {
        panic!("windowed")
    };
    assert_eq!(aggregates[3].parameters.clamp.as_ref().unwrap().value, (-120.0, 2880.0));
    assert!(!load.is_offline_only());

    let vocabulary = catalog.vocabulary("carriers").unwrap();
    assert_eq!((vocabulary.values.len(), vocabulary.values[0].as_str()), (16, "9E"));

    let service = catalog.service("delay_inputs").unwrap();
    let addresses: Vec<&str> = service.features.iter().map(Input::address).collect();
    assert_eq!(addresses, ["weather_now", "airport_load", "context", "flight"]);

    let model = catalog.model("delay").unwrap();
    assert_eq!(model.inputs[0].missing, Missing::Value(0.0));
    assert_eq!(model.inputs[1].missing, Missing::Refuse);
    assert_eq!(model.placement.max_shape["dense"], [256, 64]);
    assert_eq!(model.slo.deadline, Some(Duration::from_millis(50)));
    assert_eq!(model.label.as_ref().unwrap().within, Some(Duration::from_secs(86_400)));
    assert!(matches!(&model.fallback, Some(Fallback::Values(values)) if values[0].1 == 0.22));
    assert_eq!(model.shadow.as_ref().unwrap().max_forward_ratio, Some(1.2));
    let canary = model.canary.as_ref().unwrap();
    assert_eq!(canary.steps, [0.01, 0.05, 0.25, 0.5, 1.0]);
    let guardrails: Vec<(&str, f64)> = canary.guardrails.iter().map(|g| (g.metric.as_str(), g.bound)).collect();
    assert_eq!(guardrails, [("error_rate", 0.005), ("p99", 0.06)]);
}

#[test]
fn a_mistake_is_shown_as_the_user_wrote_it() {
    let text = DEFINITIONS.replace("    event_time: observed_at\n", "    event_tme: observed_at\n");
    let files = files(&[("features/airport.yaml", &text)]);
    let (_, diagnostics) = parse_definitions("p", &files);
    let expected = "\
error: source `weather` has no `event_time`
 --> features/airport.yaml:9:11
  |
9 |   - name: weather                       # files that somebody else owns
  |           ^^^^^^^
  |
  = help: name the column, or write `static: true`

error: unknown key `event_tme` in source `weather`
  --> features/airport.yaml:11:5
   |
11 |     event_tme: observed_at
   |     ^^^^^^^^^
   |
   = help: did you mean `event_time`?
";
    assert_eq!(render(&diagnostics, &files, false), expected);
}

#[test]
fn files_and_sections() {
    check("", &[]);
    check("# nothing yet\nmodels:\n", &[]);
    check("- a\n", &["1:1 expected a mapping with sections such as `feature_views`, got a list"]);
    check("entitys: []\n", &["1:1 unknown section `entitys`; did you mean `entities`?"]);
    check("project: x\n", &["1:1 unknown section `project`; settings belong in `coeval.yaml`"]);
    check("entities: 3\n", &["1:11 expected a list, got the integer 3"]);
    check("entities: [x]\n", &["1:12 expected a mapping that describes an entity, got the string `x`"]);
    check("a: [\n", &["2:1 not valid YAML: while parsing a node, did not find expected node content"]);
    check(
        "entities:\n  - {name: a, keys: [], nmae: b}\n  - {keys: []}\n",
        &["2:25 unknown key `nmae` in entity `a`; did you mean `name`?", "3:6 entity has no `name`"],
    );
}

#[test]
fn sources_are_files_or_streams() {
    fn source(rest: &str, expected: &[&str]) {
        check(&format!("sources:\n  - name: s\n{rest}"), expected);
    }
    source(
        "    event_time: t\n",
        &["2:11 source `s` has neither `files` nor `stream`; write `files: data/*.parquet`, or `stream: true`"],
    );
    source(
        "    files: a.csv\n    stream: true\n    event_time: t\n    schema: []\n",
        &["4:5 source `s` has both `files` and `stream`; files from before the stream began go under `history`"],
    );
    source(
        "    files: a.csv\n    static: true\n    event_time: t\n    delay: 1h\n    every: 1h\n",
        &[
            "5:5 `event_time` of source `s` has no meaning for a static source, whose rows are always known",
            "6:5 `delay` of source `s` has no meaning for a static source, whose rows are always known",
            "7:5 `every` of source `s` has no meaning for a static source, whose rows are always known",
        ],
    );
    source(
        "    files: a.csv\n    event_time: t\n    created_time: c\n    delay: 1h\n",
        &["5:5 source `s` has both `delay` and `created_time`; both say when a row becomes known: keep one"],
    );
    source(
        "    stream: true\n",
        &[
            "2:11 source `s` is a stream and has no `schema`; declare its columns: `schema: [{name: airport, type: string}]`",
            "2:11 source `s` has no `event_time`; name the column that says when an event happened",
        ],
    );
    source(
        "    files: a.csv\n    event_time: t\n    history: b.csv\n    event_id: e\n",
        &[
            "5:5 `history` of source `s` goes with `stream: true`",
            "6:5 `event_id` of source `s` goes with `stream: true`",
        ],
    );
    source("    files: a.csv\n    event_time: t\n    delay: 0s\n    visibility: ingested\n", &[]);
    source(
        "    files: a.csv\n    event_time: t\n    visibility: evnt_time\n",
        &[
            "5:17 expected `known` or `event_time` or `ingested`, got the string `evnt_time`; did you mean `event_time`?",
        ],
    );
}

#[test]
fn views_read_rows_or_windows() {
    fn view(rest: &str, expected: &[&str]) {
        check(&format!("feature_views:\n  - name: v\n    entity: e\n    source: s\n{rest}"), expected);
    }
    view(
        "",
        &[
            "2:11 feature view `v` has neither `features` nor `aggregates`; `features` reads the latest row, `aggregates` summarises windows of events",
        ],
    );
    view(
        "    features: [{name: a}]\n    windows: [1h]\n    aggregates: [{name: n, function: count}]\n",
        &["5:5 feature view `v` has both `features` and `aggregates`; split it into two views"],
    );
    view(
        "    features: [{name: a}]\n    windows: [1h]\n    head: inclusive\n",
        &[
            "6:5 `windows` of feature view `v` goes with `aggregates`",
            "7:5 `head` of feature view `v` goes with `aggregates`",
        ],
    );
    view(
        "    ttl: 1h\n    windows: [1h]\n    aggregates: [{name: n, function: count}]\n",
        &["5:5 `ttl` of feature view `v` goes with `features`; aggregates have `windows`"],
    );
    view(
        "    aggregates: [{name: n, function: count}]\n",
        &["2:11 feature view `v` has no `windows`; write `windows: [1h, 24h]`"],
    );
    view("    aggregates: [{name: n, function: count, windows: [1h]}]\n    hop: none\n    head: inclusive\n", &[]);
    view("    features: [{name: a}]\n    ttl: 60\n", &["6:10 expected a duration such as `10m`, got the integer 60"]);
    view("    features: []\n", &["5:15 `features` of feature view `v` is empty"]);
    view(
        "    features: [{name: a, type: decimal(18,2)}]\n",
        &[
            "5:32 `decimal(18` is not a type; did you mean `decimal(18,2)`?",
            "5:43 unknown key `2)` in feature `a`; quote a type that contains a comma: \"decimal(18,2)\"",
        ],
    );
    view("    features: [{name: a, type: \"decimal(18,2)\", tags: [x, y], owner: me, description: d}]\n", &[]);
    view(
        "    features: [{name: yes, type: integer}, {name: true}]\n",
        &[
            "5:34 `integer` is not a type; did you mean `int64`?",
            "5:51 expected a string, got the boolean true; quote it: \"true\"",
        ],
    );
}

#[test]
fn all_mistakes_are_collected() {
    check(
        "vocabularies:\n  - {name: v, values: [NO, 12, true, 1e3, ~]}\nfeature_services:\n  - {name: s, features: [3, {as: x}]}\n",
        &[
            "2:28 expected a string, got the integer 12; quote it: \"12\"",
            "2:32 expected a string, got the boolean true; quote it: \"true\"",
            "2:38 expected a string, got the number 1000; quote it: \"1e3\"",
            "2:43 expected a string, got nothing; quote it: \"~\"",
            "4:26 expected a name (a string) or a mapping such as `{view: weather, keys: {airport: origin}}`, got the integer 3; quote it: \"3\"",
            "4:30 input has no `view`",
        ],
    );
}

#[test]
fn models_are_checked_key_by_key() {
    fn model(from: &str, to: &str, expected: &[&str]) {
        let at = DEFINITIONS.find("models:\n").unwrap();
        let text = DEFINITIONS[at..].replace(from, to);
        assert_ne!(text, DEFINITIONS[at..], "{from} is in the example");
        check(&text, expected);
    }
    model("runtime: torchscript ", "runtime: onnx ", &["4:14 expected `torchscript` or `pt2`, got the string `onnx`"]);
    model("missing: 0.0", "missing: zero", &["6:88 expected `refuse`, `nan` or a number, got the string `zero`"]);
    model("missing: 0.0", "missing: .nan", &[]);
    model(
        "dtype: int64",
        "dtype: string",
        &["7:32 a tensor cannot hold `string`; use `float32`, `float64`, `int64`, `int32` or `bool`"],
    );
    model("fallback: {p_late: 0.22}", "fallback: none", &[]);
    model("fallback: {p_late: 0.22}", "cache: {max_bytes: 64MiB, ttl: 5m}", &[]);
    model(
        "success: [log_loss]",
        "window: 10m, whole_weeks: true, alpha: 1%, blackouts: [{from: 2026-12-24, until: \"2026-12-27T12:00:00Z\"}], success: [{metric: log_loss, not_worse_by: 0.01, centre: 0.4}, {metric: clicks, range: [0, 5], better: higher}]",
        &[],
    );
    model(
        "success: [log_loss]",
        "alpha: 60%",
        &["17:137 `alpha` is the chance of a false verdict, more than 0% and at most 50%; leave it out for 5%"],
    );
    model(
        "success: [log_loss]",
        "blackouts: [{from: 2026-12-27, until: 2026-12-24}]",
        &["17:143 a blackout ends after it begins"],
    );
    model(
        "success: [log_loss]",
        "success: [{metric: clicks, range: [5, 0]}]",
        &["17:164 expected two numbers, the lower one first, got a list"],
    );
    model(
        "fallback: {p_late: 0.22}",
        "cache: {max_bytes: 1KiB, size: 1MiB}",
        &[
            "15:24 1024 bytes hold hardly any answer; use at least `64KiB`, or leave out `cache`",
            "15:30 unknown key `size` in response cache; known here: `max_bytes`, `ttl`",
        ],
    );
    model("fallback: {p_late: 0.22}", "fallback: {model: delay_small}", &[]);
    model(
        "fallback: {p_late: 0.22}",
        "fallback: 3",
        &["15:15 expected `{output: value}`, `{model: name}` or `none`, got the integer 3"],
    );
    model("policy: adaptive", "policy: window, window: 5ms", &[]);
    model("policy: adaptive", "policy: window, window: 0ms", &[]);
    model("policy: adaptive", "policy: window", &["14:16 the policy `window` needs its length; add `window: 10ms`"]);
    model(
        "policy: adaptive",
        "window: 5ms",
        &[
            "14:16 `window` belongs to the policy `window`; add `policy: window`, or remove `window`: the adaptive policy \
           has none",
        ],
    );
    model(
        "policy: adaptive",
        "policy: window, window: 1m",
        &["14:32 a window of 60s holds requests back for too long; use at most 10s"],
    );
    model("policy: adaptive", "policy: fixed", &["14:24 expected `adaptive` or `window`, got the string `fixed`"]);
    model(
        "max_queue_rows: 4096",
        "max_queue_rows: 10",
        &["14:49 `max_queue_rows` is smaller than one batch of 256 rows; a queue holds at least one full batch"],
    );
    model("drift: hold", "drift: wait", &["16:55 expected `hold` or `ignore`, got the string `wait`"]);
    model(
        "[1%, 5%, 25%",
        "[1%, 25%, 5%",
        &["17:71 each step must be larger than the one before it; a ramp only adds units: `[1%, 5%, 25%, 100%]`"],
    );
    model(
        "[1%, 5%",
        "[0%, 5%",
        &["17:62 each step must be larger than the one before it; a ramp only adds units: `[1%, 5%, 25%, 100%]`"],
    );
    model("100%]", "101%]", &["17:80 expected a share from `0%` to `100%`, got the string `101%`"]);
    model("p99 < 60ms", "p99 < 60%", &["17:183 `p99` is compared with a duration such as `60ms`"]);
    model("error_rate < 0.5%", "error_rate < 5ms", &["17:164 `error_rate` is compared with a share such as `0.5%`"]);
    model(
        "error_rate < 0.5%",
        "error_rate = 1",
        &[
            "17:164 `error_rate = 1` is not a comparison; write a metric, a sign and a bound: `error_rate < 0.5%`, `p99 < 60ms`",
        ],
    );
    model(
        "error_rate < 0.5%",
        "eror_rate < 1",
        &["17:164 `eror_rate` is taken for a metric of your own; did you mean `error_rate`?"],
    );
    model(
        "post: []",
        "post: [{name: q, expr: p_late, default: 1}]",
        &[
            "9:36 unknown key `default` in model output `q`; known here: `name`, `expr`, `type`, `description`, `owner`, `tags`",
        ],
    );
    model("executors: 1", "executors: 0", &["12:44 expected an integer from 1 to 256, got the integer 0"]);
}

#[test]
fn quantities() {
    let micros = |text: &str| units::duration(text).map(|duration| duration.as_micros());
    assert_eq!(micros("10m"), Some(600_000_000));
    assert_eq!(micros("1h30m"), Some(5_400_000_000));
    assert_eq!(micros("50ms"), Some(50_000));
    assert_eq!(micros("14d"), Some(14 * 86_400_000_000));
    assert_eq!(micros("1m50ms7us"), Some(60_050_007));
    for wrong in ["", "h", "10", "10 m", "30m1h", "1h1h", "1.5h", "-1h", "99999999999999999999d", "40000d", "1H", "1é"]
    {
        assert_eq!(micros(wrong), None, "{wrong}");
    }
    assert_eq!(units::size("8GiB"), Some(8 << 30));
    assert_eq!(units::size("500 MB"), Some(500_000_000));
    for wrong in ["", "8", "GiB", "8gib", "0B", "99999999999TiB"] {
        assert_eq!(units::size(wrong), None, "{wrong}");
    }
    assert_eq!(units::percentage("0.5%"), Some(0.005));
    assert_eq!(units::percentage("-1%"), None);
    assert_eq!(units::comparison("p99<=1h"), Some(("p99", Comparison::LessOrEqual, units::Bound::Seconds(3600.0))));
    assert_eq!(units::comparison("auc > 0.7"), Some(("auc", Comparison::Greater, units::Bound::Number(0.7))));
    for wrong in ["", "<", "a <", "< 1", "a b < 1", "a < b", "a << 1", "a < inf"] {
        assert_eq!(units::comparison(wrong), None, "{wrong}");
    }
}

fn read_settings(texts: &[(&str, &str)], environment: Option<&str>) -> Result<Settings, Vec<String>> {
    let files = files(texts);
    let variables = |name: &str| match name {
        "HOST" => Some("redis.example".to_string()),
        "EMPTY" => Some(String::new()),
        "YES" => Some("true".to_string()),
        _ => None,
    };
    parse_settings(&files, environment, &variables).map_err(|diagnostics| lines(&diagnostics, &files))
}

#[test]
fn settings_have_defaults() {
    let settings = read_settings(&[("coeval.yaml", SETTINGS)], None).unwrap();
    assert_eq!(settings.project.value, "nyc-flights");
    assert_eq!(settings.offline.memory_bytes, 8 << 30);
    assert_eq!(settings.offline.spill.as_deref(), Some("./.coeval/spill"));
    assert_eq!((settings.guardrails[0].metric.as_str(), settings.guardrails[0].bound), ("error_rate", 0.01));

    let settings = read_settings(&[("coeval.yaml", "project: p\n")], None).unwrap();
    assert_eq!(settings.store.value, "./.coeval");
    assert_eq!((settings.online.value, settings.log), (OnlineUrl::Embedded, LogKind::Disk));
    assert_eq!((settings.offline.engine.as_str(), settings.offline.memory_bytes), ("local", 4 << 30));
    assert_eq!((settings.serve.grpc.as_str(), settings.serve.http.as_str()), ("127.0.0.1:7400", "127.0.0.1:7401"));
    assert_eq!((settings.serve.request_time, settings.serve.beyond_loopback), (RequestTime::Refused, false));
    assert_eq!(settings.serve.golden_checks.as_secs(), 30);
    let settings = read_settings(&[("coeval.yaml", "project: p\nserve: {golden_checks: 5m}\n")], None).unwrap();
    assert_eq!(settings.serve.golden_checks.as_secs(), 300);
}

#[test]
fn overlays_and_variables() {
    let base = "project: p\nonline: redis://${UNSET}:6379\nserve: {grpc: 127.0.0.1:1, http: 127.0.0.1:2}\n";
    let overlay = "online: redis://${HOST}:${PORT:-6379}/${EMPTY:-0}\nserve: {http: 0.0.0.0:80, listen_beyond_loopback_without_authentication: \"${YES}\"}\n";
    let settings = read_settings(&[("coeval.yaml", base), ("coeval.prod.yaml", overlay)], Some("prod")).unwrap();
    assert_eq!(settings.online.value, OnlineUrl::Redis("redis://redis.example:6379/0".to_string()));
    let cluster = "rediss+cluster://me:p@ss@a:1,b:2?ca=/etc/ca.pem";
    let one = read_settings(&[("coeval.yaml", &format!("project: p\nonline: {cluster}\n"))], None).unwrap();
    assert_eq!(one.online.value, OnlineUrl::RedisCluster(cluster.to_string()), "the store reads the rest");
    assert_eq!((settings.serve.grpc.as_str(), settings.serve.http.as_str()), ("127.0.0.1:1", "0.0.0.0:80"));
    assert!(settings.serve.beyond_loopback);

    let settings = read_settings(&[("coeval.yaml", "project: p\nstore: a$${HOST}b\n")], None).unwrap();
    assert_eq!(settings.store.value, "a${HOST}b");
}

#[test]
fn wrong_settings_say_where() {
    fn check(text: &str, expected: &[&str]) {
        assert_eq!(read_settings(&[("coeval.yaml", text)], None).map(|_| ()).unwrap_err(), expected);
    }
    check(
        "project: p\nonline: redis://${UNSET}:6379\n",
        &["2:17 the variable `UNSET` is not set; set it, or give a default: ${UNSET:-default}"],
    );
    check(
        "project: p\nstore: ${HOST\n",
        &["2:8 `${` is not closed; write `${NAME}`, or `$${` for the characters themselves"],
    );
    check("project: p\nstore: ${1}\n", &["2:8 `1` is not the name of a variable"]);
    check(
        "project: my project\n",
        &[
            "1:10 `my project` cannot be the name of a project; use a letter, then letters, digits, `-` and `_`, 64 at most",
        ],
    );
    check(
        "stor: x\n",
        &["1:1 unknown key `stor` in project; did you mean `store`?", "1:1 `coeval.yaml` has no `project`"],
    );
    check(
        "project: p\nstore: s4://bucket\n",
        &["2:8 `s4://` is not an object store known here; did you mean `s3://`?"],
    );
    check("project: p\nonline: embeded\n", &["2:9 `embeded` is not an online store; did you mean `embedded`?"]);
    check(
        "project: p\nonline: redis+cluster://a:1,b\n",
        &[
            "2:9 `redis+cluster://a:1,b` is not an online store; use `embedded`, `redis://host:6379`, `rediss://host:6379` or `redis+cluster://a:6379,b:6379`",
        ],
    );
    check(
        "project: p\nlog: redis\n",
        &[
            "2:6 `log: redis` needs a Redis, but `online` is `embedded`; write `log: disk`, or name the Redis in `online`",
        ],
    );
    check("project: p\nserve: {grpc: 7400}\n", &["2:15 expected a string, got the integer 7400; quote it: \"7400\""]);
    check(
        "project: p\nserve: {grpc: localhost}\n",
        &["2:15 `localhost` is not an address to listen on; write a host and a port: `127.0.0.1:7400`"],
    );
    check("project: p\noffline: {memory: lots}\n", &["2:19 `lots` is not a size; write it like `512MiB` or `8GiB`"]);
    assert_eq!(
        read_settings(&[], None).map(|_| ()).unwrap_err(),
        ["1:1 there is no `coeval.yaml` here; run this in a project's folder, or start one with `coeval init`"]
    );
    let texts = [("coeval.yaml", "project: p\n"), ("coeval.prod.yaml", "")];
    assert_eq!(
        read_settings(&texts, Some("prd")).map(|_| ()).unwrap_err(),
        ["1:1 the environment `prd` has no file `coeval.prd.yaml`; did you mean `prod`?"]
    );
}

#[test]
fn settings_files_are_no_definitions() {
    assert!(is_settings_path("coeval.yaml") && is_settings_path("coeval.prod.yaml"));
    assert!(!is_settings_path("features/coeval.yaml") && !is_settings_path("models.yaml"));
}

/// Parsing, checking and rendering answer for any text.
pub(crate) fn survive(text: &str) {
    let files = Files {
        files: vec![
            Arc::new(SourceFile { path: "coeval.yaml".to_string(), text: text.to_string() }),
            Arc::new(SourceFile { path: "a.yaml".to_string(), text: text.to_string() }),
        ],
    };
    let (catalog, mut diagnostics) = parse_definitions("p", &files);
    diagnostics.extend(crate::check::check(&catalog));
    diagnostics.extend(parse_settings(&files, None, &|_| None).err().unwrap_or_default());
    render(&diagnostics, &files, false);
    locate(&diagnostics, &files);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Lines and words of the example, cut, repeated and replaced.
    #[test]
    fn mangled_definitions_never_panic(
        edits in prop::collection::vec(
            (any::<prop::sample::Index>(), 0usize..40, "[-a-z0-9é漢:{}\\[\\],&*!|>'\"%#?~<. \t\n]{0,12}"), 1..6)
    ) {
        let mut text = DEFINITIONS.to_string();
        for (at, cut, insert) in edits {
            let starts: Vec<usize> = text.char_indices().map(|(offset, _)| offset).collect();
            if starts.is_empty() {
                break;
            }
            let from = at.index(starts.len());
            let to = (from + cut).min(starts.len() - 1);
            text.replace_range(starts[from]..starts[to], &insert);
        }
        survive(&text);
    }

    #[test]
    fn any_settings_never_panic(text in "(project|store|online|serve|guardrails|offline|log)?: ?[-$a-z{}:,/%<é\n\\[\\] 0-9]{0,60}") {
        survive(&text);
    }
}

#[test]
fn the_serving_log_is_on_unless_it_is_turned_off() {
    let settings = |text: &str| read_settings(&[("coeval.yaml", &format!("project: p\n{text}"))], None);
    assert_eq!(settings("").unwrap().serving_log, Some(ServingLogSettings::default()));
    assert_eq!(settings("serving_log: off").unwrap().serving_log, None);
    assert_eq!(settings("serving_log: false").unwrap().serving_log, None);
    let text = "serving_log: {sample: 100%, uniform: 0, fallbacks: 3, flush: 1s, retention: 2d, spool: 1MiB, key: abc}";
    let wanted = ServingLogSettings {
        sample: 1.0,
        uniform: 0.0,
        fallbacks_per_second: 3,
        flush: Duration::from_secs(1),
        retention: Duration::from_secs(172_800),
        spool_bytes: 1 << 20,
        key: Some("abc".into()),
    };
    assert_eq!(settings(text).unwrap().serving_log, Some(wanted));
    assert!(settings("serving_log: {sample: 200%}").is_err());
    assert!(settings("serving_log: {fallbacks: -1}").is_err());
}

#[test]
fn audits_are_hourly_unless_said_otherwise() {
    let settings = |text: &str| read_settings(&[("coeval.yaml", &format!("project: p\n{text}"))], None);
    let hourly = AuditSettings { every: Duration::from_secs(3_600), max_bug_rate: 0.0 };
    assert_eq!(settings("").unwrap().audit, Some(hourly));
    assert_eq!(settings("audit: off").unwrap().audit, None);
    let wanted = AuditSettings { every: Duration::from_secs(600), max_bug_rate: 0.001 };
    assert_eq!(settings("audit: {every: 10m, max_bug_rate: 0.1%}").unwrap().audit, Some(wanted));
    for wrong in ["audit: {every: 0s}", "audit: {max_bug_rate: 2}", "audit: {each: 1h}"] {
        assert!(settings(wrong).is_err(), "{wrong}");
    }
}
