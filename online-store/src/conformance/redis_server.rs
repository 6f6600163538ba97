//! A real Redis for tests: started in a folder on a free port, stopped when dropped.

use std::io;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How long a Redis may take to start: it takes milliseconds, but a test machine may be busy.
const START: Duration = Duration::from_secs(20);

/// A running `redis-server`, or the place of one that was killed.
pub struct RedisServer {
    folder: PathBuf,
    port: u16,
    options: Vec<String>,
    child: Option<Child>,
}

impl RedisServer {
    /// Starts the program named by `COEVAL_REDIS_SERVER`, else `redis-server`, with every write on disk before it is
    /// acknowledged. None if there is no such program, which is said on stderr; with `COEVAL_REQUIRE_REDIS` set that is an
    /// error instead.
    pub fn start(folder: &Path) -> Option<RedisServer> {
        RedisServer::start_with(folder, &["--appendonly", "yes", "--appendfsync", "always"])
    }

    pub fn start_with(folder: &Path, options: &[&str]) -> Option<RedisServer> {
        let options: Vec<String> = options.iter().map(|option| (*option).to_owned()).collect();
        // A port that was free may be taken before the server binds it; then another one is tried.
        for _ in 0..10 {
            let mut server =
                RedisServer { folder: folder.to_owned(), port: free_port(), options: options.clone(), child: None };
            match server.restart() {
                Ok(()) => return Some(server),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    assert!(
                        std::env::var_os("COEVAL_REQUIRE_REDIS").is_none(),
                        "there is no redis-server, and COEVAL_REQUIRE_REDIS is set; install Redis 7"
                    );
                    eprintln!(
                        "skipped: there is no redis-server on the path; install Redis 7 or set COEVAL_REDIS_SERVER"
                    );
                    return None;
                }
                Err(_) => {}
            }
        }
        panic!("redis-server does not start, see {}", folder.join("redis.log").display());
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Kills it with SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Sends it a signal: `STOP` for silence, `CONT` for the end of it.
    pub fn signal(&self, name: &str) {
        if let Some(pid) = self.pid() {
            let sent = Command::new("kill").args([format!("-{name}"), pid.to_string()]).status();
            assert!(sent.is_ok_and(|status| status.success()), "SIG{name} was not sent to {pid}");
        }
    }

    /// Asks it something over a connection of its own.
    pub fn ask(&self, parts: &[&str]) -> ::redis::RedisResult<::redis::Value> {
        let mut connection = ::redis::Client::open(self.url())?.get_connection_with_timeout(START)?;
        let mut command = ::redis::Cmd::new();
        for part in parts {
            command.arg(part);
        }
        command.query(&mut connection)
    }

    /// Starts it again on the same port, over what it left in its folder.
    pub fn restart(&mut self) -> io::Result<()> {
        self.kill();
        let program = std::env::var_os("COEVAL_REDIS_SERVER").unwrap_or_else(|| "redis-server".into());
        let mut child = Command::new(program)
            .current_dir(&self.folder)
            .args(["--port", &self.port.to_string(), "--bind", "127.0.0.1", "--save", "", "--logfile", "redis.log"])
            .args(&self.options)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let start = Instant::now();
        while start.elapsed() < START {
            if let Some(status) = child.try_wait()? {
                return Err(io::Error::other(format!("redis-server ended with {status}")));
            }
            if TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).is_ok() {
                self.child = Some(child);
                return Ok(());
            }
            sleep(Duration::from_millis(5));
        }
        let _ = child.kill();
        let _ = child.wait();
        Err(io::Error::other("redis-server does not listen"))
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A port that was free a moment ago.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port of this machine is free");
    listener.local_addr().expect("a bound listener has an address").port()
}
