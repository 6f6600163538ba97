//! What ours sends to Redis for each request, as Redis saw it.

use anyhow::Context as _;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;

use super::raw::GET_FEATURES;

/// The words of one command.
pub type Command = Vec<Vec<u8>>;

/// The commands of each call that reads features; markers of generations, which only ours asks for, are left out. A row
/// that ours reads with GET is copied into a hash of one field, so that the floor reads as many bytes with HMGET.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Recorded {
    pub calls: Vec<Vec<Command>>,
}

const COPY_FIELD: &[u8] = b"v";

/// Sends each request to `address` and writes down what reaches the Redis at `redis` (host:port) meanwhile.
pub async fn run(redis: &str, address: &str, requests: &[Bytes]) -> anyhow::Result<Recorded> {
    let mut monitor = BufReader::new(TcpStream::connect(redis).await?);
    monitor.get_mut().write_all(b"MONITOR\r\n").await?;
    let mut line = Vec::new();
    monitor.read_until(b'\n', &mut line).await?;
    anyhow::ensure!(line.starts_with(b"+OK"), "Redis does not show what it is sent");
    let url = format!("redis://{redis}");
    let mut client = redis::Client::open(url)?.get_multiplexed_async_connection().await?;
    let mut recorded = Recorded::default();
    for request in requests {
        super::load::one(address, GET_FEATURES, request.clone()).await?;
        // Everything before this word belongs to the request.
        redis::cmd("ECHO").arg("coeval-bench-mark").exec_async(&mut client).await?;
        let mut call = Vec::new();
        loop {
            line.clear();
            monitor.read_until(b'\n', &mut line).await?;
            let command = words(&line).with_context(|| format!("not a command: {}", line.escape_ascii()))?;
            match command.first().map(Vec::as_slice) {
                Some(b"ECHO") => break,
                Some(b"GET") if command[1].starts_with(b"c1:{") => call.push(command),
                Some(b"HMGET") => call.push(command),
                _ => {}
            }
        }
        anyhow::ensure!(!call.is_empty(), "the server read nothing from this Redis");
        recorded.calls.push(call);
    }
    // Only now: the copies would be recorded, too.
    for command in recorded.calls.iter_mut().flatten().filter(|command| command[0] == b"GET") {
        *command = copy(&mut client, &command[1]).await?;
    }
    Ok(recorded)
}

async fn copy(redis: &mut redis::aio::MultiplexedConnection, key: &[u8]) -> anyhow::Result<Command> {
    let value: Option<Vec<u8>> = redis::cmd("GET").arg(key).query_async(redis).await?;
    let to = [b"floor:", key].concat();
    if let Some(value) = value {
        redis::cmd("HSET").arg(&to).arg(COPY_FIELD).arg(value).exec_async(redis).await?;
    }
    Ok(vec![b"HMGET".to_vec(), to, COPY_FIELD.to_vec()])
}

/// The quoted words of a line such as `+1700000000.1 [0 127.0.0.1:5000] "GET" "a\x00b"`.
fn words(line: &[u8]) -> Option<Command> {
    let mut rest = &line[line.iter().position(|byte| *byte == b'"')?..];
    let mut words = Vec::new();
    while let Some(start) = rest.iter().position(|byte| *byte == b'"') {
        rest = &rest[start + 1..];
        let mut word = Vec::new();
        loop {
            let (first, tail) = rest.split_first()?;
            rest = tail;
            match first {
                b'"' => break,
                b'\\' => {
                    let (escape, tail) = rest.split_first()?;
                    rest = tail;
                    word.push(match escape {
                        b'n' => b'\n',
                        b'r' => b'\r',
                        b't' => b'\t',
                        b'a' => 7,
                        b'b' => 8,
                        b'x' => {
                            let (digits, tail) = rest.split_at_checked(2)?;
                            rest = tail;
                            u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?
                        }
                        other => *other,
                    });
                }
                other => word.push(*other),
            }
        }
        words.push(word);
    }
    Some(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_read_back() {
        let line = br#"+1700000000.123456 [0 127.0.0.1:5000] "HMGET" "c1:{p/\x80\x00\"\\a}v@0" "t\n\x01""#;
        let expected: Command = vec![b"HMGET".to_vec(), b"c1:{p/\x80\x00\"\\a}v@0".to_vec(), b"t\n\x01".to_vec()];
        assert_eq!(words(line), Some(expected));
        assert_eq!(words(b"+OK\r\n"), None);
    }
}
