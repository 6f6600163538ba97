//! TLS and passwords, with certificates that `openssl` makes.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::*;
use crate::conformance::redis_cluster::RedisCluster;
use crate::conformance::redis_server::{RedisServer, free_port};
use crate::conformance::{self};

const TIMEOUT: Duration = Duration::from_secs(10);
/// For servers that do not answer.
const SHORT: Duration = Duration::from_secs(1);

fn openssl(folder: &Path, arguments: &str) {
    let mut command = Command::new("openssl");
    command.current_dir(folder).args(arguments.split_whitespace()).stdout(Stdio::null()).stderr(Stdio::null());
    assert!(command.status().is_ok_and(|status| status.success()), "openssl {arguments}");
}

/// A certificate authority, and a certificate that it signed for this machine.
struct Certificates {
    folder: PathBuf,
}

impl Certificates {
    /// None where there is no `openssl`, which is said.
    fn make(folder: &Path) -> Option<Certificates> {
        if Command::new("openssl").arg("version").stdout(Stdio::null()).status().is_err() {
            assert!(std::env::var_os("COEVAL_REQUIRE_REDIS").is_none(), "there is no openssl");
            eprintln!("skipped: there is no openssl on the path");
            return None;
        }
        const NEW: &str = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
        let folder = folder.to_owned();
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("names"), "subjectAltName=IP:127.0.0.1,DNS:localhost\n").unwrap();
        openssl(&folder, &format!("req -x509 {NEW} -keyout ca.key -out ca.pem -days 2 -subj /CN=authority"));
        openssl(&folder, &format!("req {NEW} -keyout key.pem -out request -subj /CN=localhost"));
        let sign =
            "x509 -req -in request -CA ca.pem -CAkey ca.key -CAcreateserial -out cert.pem -days 2 -extfile names";
        openssl(&folder, sign);
        Some(Certificates { folder })
    }

    fn path(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }

    /// What a server needs to know. `clients` is whether they have to show a certificate: `yes` or `no`.
    fn options(&self, clients: &str) -> Vec<String> {
        let mut options = vec!["--tls-auth-clients".to_owned(), clients.to_owned()];
        for (option, name) in [("cert", "cert.pem"), ("key", "key.pem"), ("ca-cert", "ca.pem")] {
            options.extend([format!("--tls-{option}-file"), self.path(name)]);
        }
        options
    }
}

fn start(folder: &Path, options: &[String]) -> Option<(RedisServer, u16)> {
    let port = free_port();
    let mut all = vec!["--tls-port".to_owned(), port.to_string()];
    all.extend_from_slice(options);
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    Some((RedisServer::start_with(folder, &all)?, port))
}

#[track_caller]
fn check_refused(result: Result<RedisStore, StoreError>, part: &str) {
    let error = result.err().unwrap_or_else(|| panic!("it is accepted, not refused with {part}"));
    let text = error.to_string();
    assert!(matches!(error, StoreError::Refused { .. }), "{text}");
    assert!(text.contains(part), "{text}");
    assert!(!text.contains("hunter"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_with_tls_and_a_password() {
    let folder = tempfile::tempdir().unwrap();
    let Some(ours) = Certificates::make(&folder.path().join("ours")) else { return };
    let others = Certificates::make(&folder.path().join("others")).unwrap();
    let mut options = ours.options("no");
    options.extend(["--requirepass".to_owned(), "hunter2/".to_owned()]);
    let Some((server, port)) = start(folder.path(), &options) else { return };
    let ca = ours.path("ca.pem");
    let connect = async |url: String| RedisStore::connect(&url, TIMEOUT).await;

    let store = connect(format!("rediss://:hunter2%2F@127.0.0.1:{port}?ca={ca}")).await.unwrap();
    assert_eq!(store.place(), format!("rediss://127.0.0.1:{port}"));
    conformance::run(Arc::new(store), "tls").await;
    let by_name = connect(format!("rediss://default:hunter2%2F@localhost:{port}?ca={ca}")).await.unwrap();
    by_name.ping().await.unwrap();

    check_refused(
        connect(format!("rediss://:hunter3@127.0.0.1:{port}?ca={ca}")).await,
        "correct the user and password",
    );
    check_refused(connect(format!("rediss://127.0.0.1:{port}?ca={ca}")).await, "it asks for a password");
    let other = others.path("ca.pem");
    check_refused(connect(format!("rediss://:hunter2%2F@127.0.0.1:{port}?ca={other}")).await, "?ca=/path/to/ca.pem");
    check_refused(connect(format!("rediss://:hunter2%2F@127.0.0.1:{port}")).await, "?ca=/path/to/ca.pem");
    let plain = server.port();
    let url = format!("rediss://:hunter2%2F@127.0.0.1:{plain}?ca={ca}");
    let error = RedisStore::connect(&url, SHORT).await.unwrap().ping().await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("if it does not speak TLS there, write redis://") && !text.contains("hunter"), "{text}");
    check_refused(connect(format!("redis://:hunter3@127.0.0.1:{plain}")).await, "correct the user and password");
    connect(format!("redis://:hunter2%2F@127.0.0.1:{plain}")).await.unwrap().ping().await.unwrap();
    // A server that is spoken to without TLS says nothing that we understand, as if it were away.
    let store = connect(format!("redis://:hunter2%2F@127.0.0.1:{port}")).await.unwrap();
    let error = store.ping().await.unwrap_err();
    assert!(error.is_retryable() && !error.to_string().contains("hunter"), "{error}");
}

#[tokio::test]
async fn a_redis_that_wants_to_know_who_we_are() {
    let folder = tempfile::tempdir().unwrap();
    let Some(ours) = Certificates::make(&folder.path().join("ours")) else { return };
    let others = Certificates::make(&folder.path().join("others")).unwrap();
    let Some((_server, port)) = start(folder.path(), &ours.options("yes")) else { return };
    let ca = ours.path("ca.pem");
    let url = |client: &Certificates| {
        let [cert, key] = ["cert.pem", "key.pem"].map(|name| client.path(name));
        format!("rediss://127.0.0.1:{port}?ca={ca}&cert={cert}&key={key}")
    };
    RedisStore::connect(&url(&ours), TIMEOUT).await.unwrap().ping().await.unwrap();
    let nobody = format!("rediss://127.0.0.1:{port}?ca={ca}");
    check_refused(RedisStore::connect(&nobody, TIMEOUT).await, "cert=/path.pem&key=/path.pem");
    check_refused(RedisStore::connect(&url(&others), TIMEOUT).await, "cert=/path.pem&key=/path.pem");
}

#[tokio::test]
async fn a_cluster_with_tls() {
    let folder = tempfile::tempdir().unwrap();
    let Some(ours) = Certificates::make(&folder.path().join("ours")) else { return };
    let options = ours.options("no");
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let Some(cluster) = RedisCluster::start(folder.path(), 2, false, &options) else { return };
    let url = format!("rediss+cluster://127.0.0.1:{}?ca={}", cluster.tls_ports[1], ours.path("ca.pem"));
    let store = RedisStore::connect(&url, TIMEOUT).await.unwrap();
    let view = Generation::new("p", "v", "0123456789abcdef");
    let row = |number: u32| {
        let blob = conformance::row(1, None, 0, "value");
        Write::Row { key: view.key(number.to_be_bytes()), blob, expires: None }
    };
    let mut writes: Vec<Write> = (0..50).map(row).collect();
    writes.push(Write::Fact("fact".to_owned(), Some(bytes::Bytes::from_static(b"1"))));
    assert_eq!(store.write(writes).await.unwrap(), WriteOutcome { applied: 51, stale: 0 });
    let places: Vec<String> = store.report().await.unwrap().into_iter().map(|node| node.place).collect();
    assert_eq!(places, [0, 1].map(|node| format!("rediss://127.0.0.1:{}", cluster.tls_ports[node])));
    assert_eq!(store.remove_generation(&view).await.unwrap(), 50);
}

/// The rights that `docs/operations.md` names are enough.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_with_few_rights() {
    let folder = tempfile::tempdir().unwrap();
    let Some(server) = RedisServer::start_with(folder.path(), &[]) else { return };
    let rights = "on >hunter2 ~c1:* +@read +@write +@scripting +info +ping +cluster";
    let mut command = vec!["ACL", "SETUSER", "coeval"];
    command.extend(rights.split(' '));
    server.ask(&command).unwrap();
    let url = format!("redis://coeval:hunter2@127.0.0.1:{}", server.port());
    let store = Arc::new(RedisStore::connect(&url, TIMEOUT).await.unwrap());
    conformance::run(store.clone(), "rights").await;
    assert_eq!(store.report().await.unwrap()[0].durability, "no append-only file");
    server.ask(&["ACL", "SETUSER", "coeval", "-@write"]).unwrap();
    let row = conformance::row(1, None, 0, "value");
    let key = Generation::new("p", "v", "00").key(*b"e");
    let error = store.write(vec![Write::Row { key, blob: row, expires: None }]).await.unwrap_err();
    assert!(matches!(error, StoreError::Refused { .. }), "{error}");
}
