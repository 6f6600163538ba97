//! The program as users meet it: its words, its exit status, and what it leaves behind.

use std::io::Write as _;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Starting takes milliseconds; two cores shared with a compiler take longer.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a command said.
struct Said {
    status: i32,
    out: String,
    err: String,
}

/// A project in a folder of its own, begun with `coeval init`.
struct Project {
    folder: TempDir,
}

fn coeval(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_coeval"));
    command.arg("-C").arg(folder).args(arguments).stdin(Stdio::null());
    // What whoever runs the tests has set must not reach them.
    for variable in ["COEVAL_ENV", "COEVAL_SERVER", "COEVAL_LOG", "NO_COLOR"] {
        command.env_remove(variable);
    }
    command.env("USER", "tester").env("RUST_BACKTRACE", "0");
    command
}

impl Project {
    fn new() -> Project {
        let project = Project { folder: tempfile::tempdir().unwrap() };
        let said = project.run(&["init", "--name", "shop"]);
        assert_eq!(said.status, 0, "{}", said.err);
        project
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn run(&self, arguments: &[&str]) -> Said {
        let output = coeval(self.folder.path(), arguments).output().unwrap();
        Said {
            status: output.status.code().unwrap_or(-1),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Replaces a text that must be there.
    fn edit(&self, file: &str, from: &str, to: &str) {
        let text = std::fs::read_to_string(self.path(file)).unwrap();
        assert!(text.contains(from), "{file} has no `{from}`");
        std::fs::write(self.path(file), text.replace(from, to)).unwrap();
    }

    fn free_ports(&self) {
        self.edit("coeval.yaml", "127.0.0.1:7400", "127.0.0.1:0");
        self.edit("coeval.yaml", "127.0.0.1:7401", "127.0.0.1:0");
    }

    fn json(&self, arguments: &[&str]) -> serde_json::Value {
        let said = self.run(arguments);
        assert_eq!(said.status, 0, "{arguments:?}: {}", said.err);
        serde_json::from_str(&said.out).unwrap()
    }
}

const DEFINITIONS: &str = "features/customer.yaml";

/// One edit of the starter's definitions, and what `validate` then says.
#[track_caller]
fn check(from: &str, to: &str, expected: &[&str]) {
    let project = Project::new();
    project.edit(DEFINITIONS, from, to);
    let said = project.run(&["validate"]);
    assert_eq!(said.status, 1, "{}", said.out);
    assert_eq!(said.out, "");
    for text in expected {
        assert!(said.err.contains(text), "no `{text}` in:\n{}", said.err);
    }
}

#[test]
fn what_init_writes_is_valid_and_can_be_applied() {
    let project = Project::new();
    let said = project.run(&["validate"]);
    assert_eq!((said.status, said.err.as_str()), (0, ""));
    assert!(said.out.starts_with("shop is valid: 2 sources, 2 feature views, 1 service, 0 models\n"), "{}", said.out);
    assert_eq!(project.json(&["validate", "--json"]), serde_json::json!([]));

    let plan = project.run(&["plan"]);
    assert!(plan.out.contains("5 added, 0 changed, 0 removed; 2 view generations to backfill"), "{}", plan.out);
    assert!(!project.path(".coeval").exists(), "`plan` reads only");
    project.free_ports();
    let applied = project.run(&["apply", "--why", "to begin"]);
    assert!(applied.out.contains("applied as entry 1 by tester"), "{}", applied.out);
    let again = project.run(&["apply"]);
    assert!(again.out.contains("nothing to do: entry 1 put just this in force"), "{}", again.out);

    // A default changes what a view means and not what is stored of it.
    project.edit(DEFINITIONS, "default: 0.0", "default: 1.0");
    let plan = project.json(&["plan", "--json"]);
    let changed: Vec<(&str, &str, bool)> = plan["changes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|change| {
            (change["kind"].as_str().unwrap(), change["what"].as_str().unwrap(), change["backfill"].is_string())
        })
        .collect();
    assert_eq!(changed, [("view", "changed", false), ("service", "changed", false)]);
    let applied = project.json(&["apply", "--json"]);
    assert_eq!((applied["entry"].as_u64(), applied["changed"].as_bool()), (Some(2), Some(true)));

    // A comment changes nothing but the text.
    project.edit(DEFINITIONS, "# What is known", "# All that is known");
    let plan = project.run(&["plan"]);
    assert!(plan.out.contains("only texts differ: no value changes"), "{}", plan.out);
}

#[test]
fn init_leaves_what_is_there_alone() {
    let project = Project::new();
    project.edit("coeval.yaml", "shop", "mine");
    let said = project.run(&["init"]);
    assert_eq!(said.status, 1);
    assert!(said.err.contains("coeval.yaml is there already"), "{}", said.err);
    assert!(std::fs::read_to_string(project.path("coeval.yaml")).unwrap().contains("mine"));
}

#[test]
fn an_unknown_key() {
    let expected = [
        "error: unknown key `windws` in feature view `spending`\n",
        "--> features/customer.yaml:25:5\n",
        "25 |     windws: [1h, 24h]\n",
        "|     ^^^^^^\n",
        "= help: did you mean `windows`?\n",
        "error: 2 errors in ",
    ];
    check("windows:", "windws:", &expected);
}

#[test]
fn a_column_that_does_not_exist() {
    let expected = ["error: no column `amont`", "features/customer.yaml:28:49", "^^^^^", "did you mean `amount`?"];
    check("of: amount", "of: amont", &expected);
}

#[test]
fn a_column_that_the_files_do_not_have() {
    let expected =
        ["the files of source `customers` have no column `contry`", "features/customer.yaml:10:53", "`country`?"];
    check(
        "{name: country, type: string}]\n  - name: orders",
        "{name: contry, type: string}]\n  - name: orders",
        &expected,
    );
}

#[test]
fn a_type_error_in_an_expression() {
    let expected = ["AND needs a bool, not int64", "features/customer.yaml:37:30", "^^^^^^^^^^^^^^^^^^^"];
    check("basket.total / (spending.amount_mean_24h + 1.0)", "spending.orders_24h AND basket.total", &expected);
}

#[test]
fn a_circle_of_transforms() {
    let circle = "transforms:\n  - {name: a, inputs: [b], features: [{name: x, expr: \"b.y\"}]}\n  \
                  - {name: b, inputs: [a], features: [{name: y, expr: \"a.x\"}]}\n";
    check(
        "transforms: ",
        &format!("{circle}\n# "),
        &["transforms depend on each other in a circle: a -> b -> a", "35:24"],
    );
}

#[test]
fn a_service_of_a_view_that_does_not_exist() {
    let expected = ["there is no feature view, request or transform `profil`", "did you mean `profile`?"];
    check("features: [profile,", "features: [profil,", &expected);
}

#[test]
fn an_entity_key_of_the_wrong_type() {
    let expected = ["error: ", "features/customer.yaml", "float64"];
    check("keys: [{name: customer, type: string}]", "keys: [{name: customer, type: float64}]", &expected);
}

/// Replaces the starter's file of customers by others.
fn customers(pattern: &str, files: &[(&str, &str)]) -> Project {
    let project = Project::new();
    project.edit(DEFINITIONS, "files: data/customers.csv", &format!("files: {pattern}"));
    for (name, text) in files {
        let path = project.path("data/customers").join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    project
}

#[test]
fn files_that_differ_in_a_column_that_is_read() {
    let files = [("a.csv", "customer,country,x\nann,NO,1\n"), ("b.csv", "customer\nbob\n")];
    let said = customers("data/customers/*.csv", &files).run(&["validate"]);
    assert_eq!(said.status, 1, "{}", said.out);
    for text in [
        "error: column `country` is absent in data/customers/b.csv, but Utf8 in data/customers/a.csv; files of one source",
        "--> features/customer.yaml:8:12\n",
        "8 |     files: data/customers/*.csv\n",
    ] {
        assert!(said.err.contains(text), "no `{text}` in:\n{}", said.err);
    }
}

#[test]
fn files_that_cannot_be_read() {
    let cut = customers("data/customers/", &[("a.csv", "customer,country\nann,\"NO\n")]).run(&["validate"]);
    assert!(cut.err.contains("data/customers/a.csv line 2 opens a quote that is never closed"), "{}", cut.err);
    let empty = customers("data/customers/", &[("a.parquet", "")]).run(&["plan"]);
    assert!(empty.err.contains("data/customers/a.parquet cannot be read as Parquet: it has 0 bytes"), "{}", empty.err);
    assert!(empty.err.contains("--> features/customer.yaml:8:12\n"), "{}", empty.err);
    let typed = customers("data/customers/", &[("a.jsonl", "{\"customer\": \"ann\", \"country\": 47}\n")]);
    let typed = typed.run(&["validate"]);
    assert!(typed.err.contains("column `country` of source `customers` is Int64, but string"), "{}", typed.err);
}

#[test]
fn folders_and_text_have_the_types_that_the_definitions_give() {
    let project = customers("data/customers", &[("country=47/a.csv", "customer\n007\n")]);
    let declared = "    schema: [{name: customer, type: string}, {name: country, type: string}]\n  - name: orders";
    project.edit(DEFINITIONS, declared, "  - name: orders");
    let said = project.run(&["validate"]);
    assert_eq!((said.status, said.err.as_str()), (0, ""));
}

#[test]
fn a_store_that_this_version_cannot_open() {
    let project = Project::new();
    project.edit("coeval.yaml", "./.coeval ", "gs://bucket ");
    let said = project.run(&["validate"]);
    assert_eq!(said.status, 1, "{}", said.out);
    assert!(said.err.contains("store `gs://bucket` cannot be opened: gs is not supported"), "{}", said.err);
    assert!(said.err.contains("--> coeval.yaml:3:8\n"), "{}", said.err);
}

#[test]
fn settings_are_checked_as_well() {
    let project = Project::new();
    project.edit("coeval.yaml", "serve:", "sreve:");
    let said = project.run(&["validate", "--json"]);
    assert_eq!(said.status, 1);
    let diagnostics: serde_json::Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!(diagnostics[0]["file"], "coeval.yaml");
    assert_eq!(diagnostics[0]["line"], 5);
    assert_eq!(diagnostics[0]["help"], "did you mean `serve`?");
    assert_eq!(diagnostics[0]["severity"], "error");

    let said = project.run(&["--env", "prod", "validate"]);
    assert!(said.err.contains("the environment `prod` has no file `coeval.prod.yaml`"), "{}", said.err);
    std::fs::remove_file(project.path("coeval.yaml")).unwrap();
    let said = project.run(&["validate"]);
    assert_eq!(said.status, 1);
    assert!(said.err.contains("start one with `coeval init`"), "{}", said.err);
}

#[test]
fn a_folder_that_is_no_project() {
    let project = Project::new();
    let output = coeval(&project.path("nowhere"), &["validate"]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains("nowhere is not there; name it with `-C DIR`"), "{said}");
}

#[test]
fn a_corrupt_parquet_file_is_named() {
    let whole = {
        use arrow::array::{ArrayRef, RecordBatch, StringArray};
        let column = |texts: [&'static str; 2]| std::sync::Arc::new(StringArray::from(texts.to_vec())) as ArrayRef;
        let columns = [("customer", column(["ann", "bob"])), ("country", column(["NO", "DK"]))];
        let batch = RecordBatch::try_from_iter(columns).unwrap();
        let mut writer = parquet::arrow::ArrowWriter::try_new(Vec::new(), batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.into_inner().unwrap()
    };
    let project = Project::new();
    project.edit(DEFINITIONS, "data/customers.csv", "data/customers.parquet");
    let write = |bytes: &[u8]| std::fs::write(project.path("data/customers.parquet"), bytes).unwrap();
    write(&whole);
    assert_eq!(project.run(&["validate"]).status, 0);
    let mut long_footer = whole.clone();
    let footer = whole.len() - 8;
    long_footer[footer..footer + 4].copy_from_slice(&u32::MAX.to_le_bytes());
    for bytes in [&whole[..whole.len() / 2], &long_footer, b"PAR1 no parquet PAR1", b"", b"customer,country\n"] {
        write(bytes);
        let said = project.run(&["validate"]);
        assert_eq!(said.status, 1, "{}", said.err);
        assert!(said.err.contains("customers.parquet cannot be read as Parquet"), "{}", said.err);
        assert!(said.err.contains("features/customer.yaml:8:12"), "{}", said.err);
    }
}

#[test]
fn files_that_are_not_there_yet_are_a_warning_where_the_schema_is_declared() {
    let project = Project::new();
    std::fs::remove_file(project.path("data/customers.csv")).unwrap();
    let said = project.run(&["validate"]);
    assert_eq!(said.status, 0, "{}", said.err);
    assert!(said.err.contains("warning: no file matches `data/customers.csv`"), "{}", said.err);
    assert!(said.out.contains("1 warning"), "{}", said.out);
    project.edit(DEFINITIONS, "    schema: [{name: customer, type: string}, {name: country, type: string}]\n", "");
    let said = project.run(&["validate"]);
    assert_eq!(said.status, 1);
    assert!(said.err.contains("error: no file matches `data/customers.csv`"), "{}", said.err);
}

#[test]
fn a_yaml_file_under_another_ending_is_noticed() {
    let project = Project::new();
    std::fs::write(project.path("features/more.yml"), "nonsense").unwrap();
    let said = project.run(&["validate"]);
    assert_eq!(said.status, 0);
    assert!(said.err.contains("warning: `features/more.yml` is not read"), "{}", said.err);
}

#[test]
fn no_server() {
    let project = Project::new();
    // Taken and let go again: nobody listens there.
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    project.edit("coeval.yaml", "127.0.0.1:7400", &address);
    for command in [
        &["features", "get", "buying", "--row", "customer=ann,total=1"][..],
        &["predict", "delay", "--row", "customer=ann"],
        &["model", "list"],
        &["dataset", "list"],
        &["materialize", "--through", "now"],
        &["ingest", "orders", "data/orders.csv"],
    ] {
        let said = project.run(command);
        assert_eq!(said.status, 1, "{command:?}");
        let expected = format!("error: no server answers at {address}; start one with `coeval serve`");
        assert!(said.err.starts_with(&expected), "{command:?}: {}", said.err);
    }
    project.edit("coeval.yaml", &address, "127.0.0.1:0");
    let said = project.run(&["model", "list"]);
    assert!(said.err.contains("name the server with `--server HOST:PORT`"), "{}", said.err);
}

#[test]
fn what_is_not_understood_ends_with_2() {
    let project = Project::new();
    for command in [&["valdate"][..], &["serve", "--roles", "getaway"], &["materialize", "--through", "soon"]] {
        assert_eq!(project.run(command).status, 2, "{command:?}");
    }
}

/// A server that is killed when the test ends, however it ends.
struct Server {
    process: Child,
    address: String,
}

impl Server {
    fn start(project: &Project) -> Server {
        let ready = project.path("ready.json");
        let mut command = coeval(project.folder.path(), &["serve", "--ready-file"]);
        let log = std::fs::File::create(project.path("server.log")).unwrap();
        let process = command.arg(&ready).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let mut server = Server { process, address: String::new() };
        let ends = Instant::now() + PATIENCE;
        while Instant::now() < ends {
            let log = || std::fs::read_to_string(project.path("server.log")).unwrap();
            assert!(server.process.try_wait().unwrap().is_none(), "the server ended: {}", log());
            if let Ok(text) = std::fs::read_to_string(&ready) {
                // It appears whole or not at all.
                let said: serde_json::Value = serde_json::from_str(&text).unwrap();
                assert_eq!(said["pid"], server.process.id());
                server.address = said["grpc"].as_str().unwrap().to_owned();
                return server;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("the server is not ready");
    }

    fn terminate(&mut self) -> i32 {
        let pid = self.process.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        let ends = Instant::now() + PATIENCE;
        while Instant::now() < ends {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status.code().unwrap_or(-1);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("the server does not end");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn from_definitions_to_features_and_a_dataset() {
    let project = Project::new();
    project.free_ports();
    assert_eq!(project.run(&["apply"]).status, 0);
    let mut server = Server::start(&project);
    let on = |command: &[&str]| project.run(&[command, &["--server", &server.address]].concat());

    let said = on(&["apply"]);
    assert!(said.out.contains(&format!("the server at {} serves it", server.address)), "{}{}", said.out, said.err);
    // Files are named from where the command is run, not from the project.
    let orders = project.path("data/orders.csv");
    let orders = orders.to_str().unwrap();
    let said = on(&["ingest", "orders", orders, "--wait"]);
    assert_eq!(said.out, "orders: 2 accepted, 0 known already, 0 early, 0 rejected\n", "{}", said.err);
    let said = on(&["ingest", "orders", orders]);
    assert_eq!(said.out, "orders: 0 accepted, 2 known already, 0 early, 0 rejected\n", "{}", said.err);
    let said = on(&["materialize", "--through", "now", "--json"]);
    assert_eq!(said.status, 0, "{}", said.err);

    // Tables, by the server that runs.
    let said = on(&["compact", "--dry-run"]);
    assert!(said.out.contains("orders: 2 rows in 1 of 1 files would be rewritten\n"), "{}{}", said.out, said.err);
    let said = on(&["compact", "orders", "--json"]);
    let compacted: serde_json::Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!((compacted["by"].as_str(), compacted["tables"][0]["rows"].as_u64()), (Some("server"), Some(2)));
    let said = on(&["compact", "orders"]);
    assert_eq!(said.out, "orders: nothing to do, 1 files\n", "{}", said.err);
    let said = on(&["ingest", "customers", "--json"]);
    assert_eq!(said.status, 0, "{}", said.err);
    let imported: serde_json::Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!((imported["changed"].as_bool(), imported["buckets"].as_u64()), (Some(true), Some(1)));
    let said = on(&["ingest", "orders"]);
    assert_eq!(said.status, 2);
    assert!(said.err.contains("`orders` is a stream: name the files"), "{}", said.err);

    let said =
        on(&["features", "get", "buying", "--row", "customer=ann,total=3", "--row", "customer=zoe,total=1", "--json"]);
    assert_eq!(said.status, 0, "{}", said.err);
    let answer: serde_json::Value = serde_json::from_str(&said.out).unwrap();
    let feature = |row: usize, name: &str| answer["rows"][row]["features"][name].clone();
    assert_eq!(feature(0, "profile:country"), serde_json::json!({"value": "NO", "status": "PRESENT"}));
    assert_eq!(feature(1, "profile:country"), serde_json::json!({"value": null, "status": "NOT_FOUND"}));
    // The orders of the example are long past.
    assert_eq!(feature(0, "spending:orders_24h"), serde_json::json!({"value": 0, "status": "PRESENT"}));
    assert_eq!(feature(0, "context:ratio")["value"], 3.0);

    let said = on(&["features", "get", "buing", "--row", "customer=ann"]);
    assert_eq!(said.status, 1);
    assert!(said.err.contains("there is no feature service `buing`; did you mean `buying`?"), "{}", said.err);
    let said = on(&["features", "get", "buying", "--row", "customer=ann,total=much"]);
    assert_eq!(said.status, 2);
    assert!(said.err.contains("`much` is not a float64, which column `total` is"), "{}", said.err);
    let said = on(&["ingest", "ordres", orders]);
    assert!(said.err.contains("there is no source `ordres`; did you mean `orders`?"), "{}", said.err);

    let mut spine = std::fs::File::create(project.path("spine.csv")).unwrap();
    writeln!(spine, "event_timestamp,customer,total\n2024-03-10T12:00:00Z,ann,3\n2024-03-10T11:15:00Z,bob,1").unwrap();
    let path = project.path("spine.csv");
    let path = path.to_str().unwrap();
    let said = on(&["dataset", "create", "first", "--service", "buying", "--spine", path, "--json"]);
    assert_eq!(said.status, 0, "{}", said.err);
    let dataset: serde_json::Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!((dataset["name"].as_str(), dataset["rows"].as_u64()), (Some("first"), Some(2)));
    let said = on(&["dataset", "list"]);
    assert!(said.out.contains(dataset["id"].as_str().unwrap()), "{}", said.out);
    // The store says why a row of it is what it is, while the server runs.
    let explain = |row: &str| {
        let row = ["--dataset", "first", "--row", row];
        project.run(&[&["explain", "buying", "spending:amount_mean_24h"], &row[..]].concat())
    };
    let said = explain("0");
    for text in
        ["spending:amount_mean_24h = 10.0  PRESENT\n", "2 inside\n", "id=o2", "the dataset has the same value\n"]
    {
        assert!(said.out.contains(text), "no `{text}` in:\n{}{}", said.out, said.err);
    }
    let said = explain("2");
    assert!(said.err.contains("dataset `first` has 2 rows, counted from 0: there is no row 2"), "{}", said.err);
    let said = on(&["dataset", "show", "frist"]);
    assert!(said.err.contains("there is no dataset `frist`; did you mean `first`?"), "{}", said.err);

    // A spine without its key column.
    std::fs::write(path, "event_timestamp,custmer,total\n2024-03-10T12:00:00Z,ann,3\n").unwrap();
    let said = on(&["dataset", "create", "second", "--service", "buying", "--spine", path]);
    assert_eq!(said.status, 1);
    assert!(said.err.contains("customer"), "{}", said.err);

    // A file that is no model is refused and leaves no version.
    let said = on(&["model", "register", "delay", path]);
    assert_eq!(said.status, 1, "{}", said.out);
    assert_eq!(on(&["model", "list", "--json"]).out.trim(), "[]");
    let said = project.run(&["doctor"]);
    assert_eq!(said.status, 0, "{}", said.out);

    assert_eq!(server.terminate(), 0);
    assert!(!project.path("ready.json").exists());
    let mut again = Server::start(&project);
    let said = project.run(&["ingest", "orders", orders, "--server", &again.address]);
    assert!(said.out.contains("0 accepted, 2 known already"), "{}{}", said.out, said.err);
    assert_eq!(again.terminate(), 0);
}

#[test]
fn a_server_without_models_does_not_load_libtorch() {
    let project = Project::new();
    project.free_ports();
    let mut server = Server::start(&project);
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", server.process.id())).unwrap();
    let files = || maps.lines().filter_map(|line| line.split_whitespace().nth(5));
    assert!(files().any(|file| file.ends_with("/coeval")), "{maps}");
    let names = files().filter_map(|file| file.rsplit('/').next());
    let loaded: Vec<&str> = names.filter(|name| name.contains("torch") || name.contains("libc10")).collect();
    assert!(loaded.is_empty(), "{loaded:?}");
    assert_eq!(server.terminate(), 0);
}

#[test]
fn a_port_in_use() {
    let project = Project::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    project.edit("coeval.yaml", "127.0.0.1:7400", &address);
    project.edit("coeval.yaml", "127.0.0.1:7401", "127.0.0.1:0");
    let said = project.run(&["serve"]);
    assert_eq!(said.status, 1);
    assert!(said.err.contains(&format!("{address} is in use by another process")), "{}", said.err);
    assert!(said.err.contains("serve.grpc"), "{}", said.err);
    assert!(!project.path(".coeval").exists(), "nothing is touched before the port is ours");
    let said = project.run(&["doctor"]);
    assert_eq!(said.status, 1);
    assert!(said.out.contains(&format!("ERROR    grpc port     {address} cannot be listened on")), "{}", said.out);
}

#[test]
fn a_server_beyond_loopback_is_refused() {
    let project = Project::new();
    project.edit("coeval.yaml", "127.0.0.1:7400", "0.0.0.0:0");
    let said = project.run(&["serve"]);
    assert_eq!(said.status, 1);
    assert!(said.err.contains("listen_beyond_loopback_without_authentication: true"), "{}", said.err);
}

#[test]
fn an_unreachable_redis() {
    let project = Project::new();
    project.free_ports();
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    project.edit("coeval.yaml", "online: embedded ", &format!("online: redis://:hunter2@{address} "));
    let said = project.run(&["doctor"]);
    assert_eq!(said.status, 1);
    assert!(said.out.contains(&format!("ERROR    online store  redis://{address}")), "{}", said.out);
    // An address that can never be right ends the server before it begins.
    project.edit("coeval.yaml", "redis://:hunter2@", "rediss://:hunter2@");
    project.edit("coeval.yaml", &address.to_string(), &format!("{address}?ca=/nowhere/ca.pem"));
    for command in ["serve", "doctor"] {
        let said = project.run(&[command]);
        assert_eq!(said.status, 1, "{command}");
        let text = said.out + &said.err;
        assert!(text.contains("/nowhere/ca.pem, cannot be read"), "{command}: {text}");
        assert!(!text.contains("hunter2"), "{command}: {text}");
    }
}

#[test]
fn tables_without_a_server() {
    let project = Project::new();
    project.free_ports();
    assert_eq!(project.run(&["compact"]).out, "orders: nothing to do, 0 files\n");
    let said = project.run(&["ingest", "customers"]);
    assert!(said.out.starts_with("customers: ") && said.out.contains(" rows imported in "), "{}{}", said.out, said.err);
    let said = project.run(&["ingest", "customers"]);
    assert!(said.out.contains("its files have not changed since they were imported"), "{}{}", said.out, said.err);
    let compacted = project.json(&["compact", "--json"]);
    assert_eq!((compacted["by"].as_str(), compacted["tables"][0]["changed"].as_bool()), (Some("here"), Some(false)));

    let customers = project.path("data/customers.csv");
    let mut text = std::fs::read_to_string(&customers).unwrap();
    text.push_str(text.lines().last().unwrap().to_owned().as_str());
    std::fs::write(&customers, text).unwrap();
    assert_eq!(project.json(&["ingest", "customers", "--json"])["changed"].as_bool(), Some(true));

    for command in ["ingest", "compact"] {
        let said = project.run(&[command, "custmers"]);
        assert_eq!(said.status, 1);
        assert!(said.err.contains("there is no source `custmers`; did you mean `customers`?"), "{}", said.err);
    }
    let said = project.run(&["ingest", "orders"]);
    assert_eq!(said.status, 2);
    let said = project.run(&["compact", "--server", "127.0.0.1:1"]);
    assert!(said.err.contains("no server answers at 127.0.0.1:1"), "{}", said.err);
}

#[test]
fn one_cell_is_explained_without_a_server() {
    let project = Project::new();
    project.free_ports();
    let row = ["--at", "2024-03-10T12:00:00Z", "--key", "customer=ann", "--field", "total=3"];
    let explain =
        |feature: &str, more: &[&str]| project.run(&[&["explain", "buying", feature], &row[..], more].concat());
    let said = explain("profile:country", &[]);
    assert!(said.out.starts_with("profile:country = NO  PRESENT\n"), "{}{}", said.out, said.err);
    for text in ["gives the same to the last bit", "from country=NO customer=ann", "a static row is of any age"] {
        assert!(said.out.contains(text), "no `{text}` in:\n{}", said.out);
    }
    let said = explain("context:ratio", &["--json"]);
    let answer: serde_json::Value = serde_json::from_str(&said.out).expect(&said.err);
    assert_eq!((answer["value"].as_f64(), answer["status"].as_str()), (Some(3.0), Some("NULL_VALUE")));
    let window = &answer["inputs"][0]["lookup"]["windows"][0];
    assert_eq!(window["start"], "2024-03-09T12:00:00Z");
    assert_eq!((window["events"].as_u64(), window["length"].as_str()), (Some(0), Some("1d")));
    assert!(!project.path(".coeval").exists(), "`explain` reads only");

    let said = project.run(&["explain", "buying"]);
    assert!(said.out.contains("PitJoin") && said.out.contains("customers"), "{}{}", said.out, said.err);

    let said = explain("profile:contry", &[]);
    assert_eq!(said.status, 1);
    assert!(said.err.contains("there is no feature `profile:contry`; did you mean `profile:country`?"), "{}", said.err);
    let said = project.run(&["explain", "buing"]);
    assert!(said.err.contains("there is no feature service `buing`; did you mean `buying`?"), "{}", said.err);
    let usage = |arguments: &[&str], expected: &str| {
        let said = project.run(&[&["explain", "buying", "profile:country"], arguments].concat());
        assert_eq!(said.status, 2, "{arguments:?}: {}", said.out);
        assert!(said.err.contains(expected), "{arguments:?}: {}", said.err);
    };
    usage(&row[..4], "service `buying` takes `total`, a float64; write `--field total=...`");
    usage(&[&row[..2], &row[4..]].concat(), "service `buying` takes `customer`, a string; write `--key customer=...`");
    usage(&["--at", "soon", "--key", "customer=ann"], "`soon` is not a time");
    usage(&row[2..], "write `--at 2024-03-10T12:00:00Z`");
    usage(&["--dataset", "first"], "--row");
}

const MODEL: &str = "\
requests:
  - {name: trip, fields: [{name: a, type: float64}, {name: b, type: float64}, {name: c, type: float64}, {name: carrier, type: int64}]}
feature_services:
  - {name: trips, features: [\"trip:a\", \"trip:b\", \"trip:c\", \"trip:carrier\"]}
models:
  - name: delay
    features: trips
    runtime: torchscript
    inputs:
      - {name: dense, dtype: float32, features: [\"trip:a\", \"trip:b\", \"trip:c\"]}
      - {name: carrier, dtype: int64, features: [\"trip:carrier\"]}
    outputs: [{name: score, dtype: float32}]
    batching: {max_rows: 8}
";

#[test]
fn a_model_file_is_measured_in_a_process_of_its_own() {
    let project = Project::new();
    std::fs::write(project.path("features/model.yaml"), MODEL).unwrap();
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../inference/tests/data/delay.pt");
    let file = file.to_str().unwrap();
    let said = project.run(&["model", "certify", "dela", file]);
    assert_eq!(said.status, 1);
    assert!(said.err.contains("there is no model `dela`; did you mean `delay`?"), "{}", said.err);
    let said = project.run(&["model", "certify", "delay", file]);
    if !cfg!(feature = "torch") {
        assert!(said.err.contains("this build has no torch, so it cannot run models"), "{}", said.err);
        return;
    }
    assert_eq!(said.status, 0, "{}", said.err);
    assert!(said.out.contains("delay: a file of ") && said.out.contains("80 % of this machine"), "{}", said.out);
    let certified = project.json(&["--json", "model", "certify", "delay", file]);
    let rows: Vec<u64> =
        certified["sizes"].as_array().unwrap().iter().map(|size| size["rows"].as_u64().unwrap()).collect();
    assert_eq!(rows, [1, 2, 4, 8]);
    assert!(certified["weight_bytes"].as_u64().unwrap() > 0, "{certified}");
    assert!(certified["sizes"][3]["bytes"].as_u64().unwrap() >= 8 * 24, "{certified}");

    let broken = project.path("broken.pt");
    std::fs::write(&broken, "not a model").unwrap();
    let said = project.run(&["model", "certify", "delay", broken.to_str().unwrap()]);
    assert_eq!(said.status, 1);
    assert!(said.err.contains("could not be measured: ") && said.err.contains("not a model"), "{}", said.err);
    // Trained with another width than the definitions have.
    project.edit("features/model.yaml", "features: [\"trip:a\", \"trip:b\", \"trip:c\"]}", "features: [\"trip:a\"]}");
    let said = project.run(&["model", "certify", "delay", file]);
    assert!(said.err.contains("mat1 and mat2 shapes cannot be multiplied"), "{}", said.err);
    // A device that is not there: libtorch says so, or has no parts for it.
    project.edit("features/model.yaml", "max_rows: 8}", "max_rows: 8}\n    placement: {devices: [\"cuda:63\"]}");
    let said = project.run(&["model", "certify", "delay", file]);
    assert_eq!(said.status, 1);
    let reasons = ["there is no device `cuda:63` here; there is cpu", "libtorch_cuda.so"];
    assert!(reasons.iter().any(|reason| said.err.contains(reason)), "{}", said.err);
}

#[test]
fn a_version_goes_from_its_file_to_the_traffic_and_back() {
    if !cfg!(feature = "torch") {
        eprintln!("skipped: this build has no torch");
        return;
    }
    let project = Project::new();
    project.free_ports();
    std::fs::write(project.path("features/model.yaml"), MODEL).unwrap();
    assert_eq!(project.run(&["apply"]).status, 0);
    let server = Server::start(&project);
    let on = |command: &[&str]| project.run(&[command, &["--server", &server.address]].concat());
    let first = Path::new(env!("CARGO_MANIFEST_DIR")).join("../inference/tests/data/delay.pt");
    // The same model in another file: the archive has a comment of one letter.
    let mut bytes = std::fs::read(&first).unwrap();
    let end = bytes.len() - 2;
    bytes[end] = 1;
    bytes.push(b'x');
    let second = project.path("second.pt");
    std::fs::write(&second, bytes).unwrap();
    for file in [&first, &second] {
        let said = on(&["model", "register", "delay", file.to_str().unwrap()]);
        assert_eq!(said.status, 0, "{}", said.err);
    }
    let golden = project.path("golden.arrow");
    std::fs::write(&golden, "no rows").unwrap();
    let said = on(&["model", "register", "delay", second.to_str().unwrap(), "--golden", golden.to_str().unwrap()]);
    assert_eq!(said.status, 1);
    assert!(said.err.contains("the golden rows cannot be used: the file is not in the Arrow IPC"), "{}", said.err);

    #[track_caller]
    fn check(said: &Said, expected: &str) {
        assert_eq!(said.status, 0, "{}", said.err);
        assert!(said.out.contains(expected), "{}", said.out);
    }
    check(
        &on(&["model", "deploy", "delay", "1", "--why", "first"]),
        "delay: version 1 is the first, and has the traffic",
    );
    let said = on(&["model", "deploy", "delay", "2", "--why", "second"]);
    check(&said, "answers requests that name it; the traffic goes to version 1");
    check(&said, "`coeval rollout promote delay 2 --why ...` moves the traffic to it");
    check(
        &on(&["model", "approve", "delay", "2", "--why", "reviewed", "--who", "eve"]),
        "version 2 is approved by eve",
    );
    let promoted = on(&["rollout", "promote", "delay", "2", "--why", "better"]);
    check(&promoted, "delay: the traffic goes to version 2, before to 1");
    let shown = on(&["model", "show", "delay"]);
    check(&shown, "delay version 2, champion");
    check(&shown, ": reviewed");
    check(&shown, "batches of at most 8");
    let rolled_back = on(&["rollout", "rollback", "delay", "--why", "worse"]);
    check(&rolled_back, "delay: the traffic goes to version 1, before to 2");
    let said = on(&["rollout", "rollback", "delay", "--why", "again"]);
    assert_eq!(said.status, 1);
    assert!(said.err.contains("has no previous champion to go back to"), "{}", said.err);
    let said = on(&["model", "retire", "delay", "1", "--why", "none"]);
    assert!(said.err.contains("version 1 of model `delay` is the champion"), "{}", said.err);
    check(&on(&["model", "retire", "delay", "2", "--why", "replaced"]), "delay: version 2 is on no gateway any more");
    let listed = on(&["model", "list", "--json"]);
    let listed: serde_json::Value = serde_json::from_str(&listed.out).unwrap();
    let states: Vec<&str> = listed.as_array().unwrap().iter().map(|model| model["state"].as_str().unwrap()).collect();
    assert_eq!(states, ["champion", "registered"]);
}
