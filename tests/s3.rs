//! A real S3 API server for tests: moto's, started on a free port, with one empty bucket; stopped when dropped.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use registry::store::Variables;

pub const BUCKET: &str = "coeval-test";

/// Ends when its input does, that is with the test, however that ends.
const PROGRAM: &str = r#"
import sys
import boto3
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
_, port = server.get_host_and_port()
boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}").create_bucket(Bucket=sys.argv[1])
print(port, flush=True)
sys.stdin.read()
"#;

/// A running server.
pub struct S3Server {
    child: Child,
    port: u16,
}

impl S3Server {
    /// Starts it with the Python of `COEVAL_PYTHON`, else with that of the environment that `make setup` makes. None if
    /// that has no moto, which is said on stderr; with `COEVAL_REQUIRE_S3` set that is an error instead.
    pub fn start() -> Option<S3Server> {
        let mut command = Command::new(python());
        command.args(["-c", PROGRAM, BUCKET]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let said = match command.envs(variables(0)).spawn() {
            Ok(mut child) => {
                let mut line = String::new();
                let output = child.stdout.take().expect("the output is piped");
                BufReader::new(output).read_line(&mut line).expect("the output can be read");
                if let Ok(port) = line.trim().parse() {
                    return Some(S3Server { child, port });
                }
                let ended = child.wait_with_output().expect("the child can be waited for");
                String::from_utf8_lossy(&ended.stderr).into_owned()
            }
            Err(error) => error.to_string(),
        };
        assert!(
            std::env::var_os("COEVAL_REQUIRE_S3").is_none(),
            "there is no S3 server, and COEVAL_REQUIRE_S3 is set; run `make setup`, or install moto[s3], flask and \
             flask-cors into the Python of COEVAL_PYTHON: {said}"
        );
        eprintln!("skipped: there is no S3 server; run `make setup`");
        None
    }

    /// Where it is and who may use it, as every tool of S3 is told.
    pub fn variables(&self) -> Variables {
        variables(self.port)
    }

    /// Stops it, as a bucket goes away.
    pub fn stop(self) {}
}

impl Drop for S3Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Those of a server at a port of this machine.
pub fn variables(port: u16) -> Variables {
    [
        ("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{port}")),
        ("AWS_REGION", "us-east-1".to_owned()),
        ("AWS_DEFAULT_REGION", "us-east-1".to_owned()),
        ("AWS_ACCESS_KEY_ID", "test".to_owned()),
        ("AWS_SECRET_ACCESS_KEY", "test".to_owned()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .to_vec()
}

fn python() -> PathBuf {
    if let Some(python) = std::env::var_os("COEVAL_PYTHON") {
        return python.into();
    }
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home).unwrap_or_default();
    cache.join("coeval/venv/bin/python")
}
