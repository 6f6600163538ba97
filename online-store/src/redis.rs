//! The store of several machines: a Redis 7, one string per row and one hash per windowed entity.
//!
//! Rows and tiles are changed by [functions](connection::FUNCTIONS) that run in the server, so that each change is one step
//! there and many go in one round trip. Reads are GET and HMGET, one pipeline for a call: an HMGET is one step too, so the
//! header and the tiles it returns belong together. Row: `GET`. Hash fields: `h` is the header, position and epoch; a tile is `t`,
//! level and start, 17 bytes. Facts are strings under `c1:fact:`, which no entity's key begins with.
//!
//! Redis is as durable as it is configured, and [`OnlineStore::sync`] can add nothing to that: with `appendfsync always` a
//! write is on disk when it returns, with `everysec` a crash takes up to the last second. It takes a tail: the append-only
//! file is in order, and a fact is only sent after everything before it was answered, so a checkpoint that survives is
//! never ahead of the data it speaks for.

mod connection;

use std::sync::Arc;
use std::time::Duration;

use ::redis::{Cmd, Pipeline, ServerError, Value};
use async_trait::async_trait;
use bytes::Bytes;
use feature_defs::time::{Micros, Position};
use feature_defs::value::{decode_i64, encode_i64};
use feature_defs::window::TileId;

use crate::header::Header;
use crate::key::{FORMAT, Generation, Key};
use crate::memory::{admit, no_epoch_left};
use crate::row::{decode_position, encode_position};
use crate::{Answer, NodeReport, OnlineStore, Read, StoreError, Write, WriteOutcome};
use connection::{Lane, Server};

/// A longer call to write is cut here: more would gain nothing over the network, hold up other clients of a server with one
/// thread, and keep the whole call in memory twice.
const CHUNK_COMMANDS: usize = 1_000;
const CHUNK_BYTES: usize = 8 << 20;
/// Keys the server looks at in one step of a removal, well below a millisecond.
const SCAN_KEYS: usize = 1_000;
const HEADER_FIELD: &[u8] = b"h";

/// An online store in a Redis.
pub struct RedisStore {
    server: Arc<Server>,
    /// Reads have their own connection, so that they never queue behind a large write.
    reads: Lane,
    writes: Lane,
}

impl RedisStore {
    /// Connects to `redis://[user:password@]host:port[/db]` and checks that the server can be a store. `timeout` bounds
    /// every round trip; a call is one, except that writes are sent in chunks of 1,000, and a removal in steps. Each of
    /// these waits at most so long, so a server that has gone silent fails the call within one timeout.
    pub async fn connect(url: &str, timeout: Duration) -> Result<RedisStore, StoreError> {
        let server = Arc::new(Server::new(url, timeout)?);
        let store = RedisStore { reads: Lane::new(server.clone()), writes: Lane::new(server.clone()), server };
        store.ping().await?;
        Ok(store)
    }

    async fn send(&self, chunk: &mut Chunk, outcome: &mut WriteOutcome) -> Result<(), StoreError> {
        if chunk.commands.is_empty() {
            return Ok(());
        }
        let chunk = std::mem::take(chunk);
        let pipeline = pipeline(chunk.commands);
        let mut answers = self.writes.call(&pipeline).await?;
        if answers.iter().any(is_function_missing) {
            // Someone flushed the functions since the connection was opened. Repeating a write changes nothing, so the
            // whole chunk goes again.
            self.load_functions().await?;
            answers = self.writes.call(&pipeline).await?;
        }
        for (answer, (name, epoch)) in answers.into_iter().zip(chunk.names) {
            match (answer, name) {
                (Value::Int(0), Name::Key(_) | Name::Mark) => outcome.stale += 1,
                (Value::ServerError(error), name) => return Err(self.refusal(&error, &name, epoch)),
                (Value::Int(1), Name::Key(_) | Name::Mark) | (Value::Okay | Value::Int(_), Name::Fact) => {
                    outcome.applied += 1
                }
                (answer, name) => return Err(unexpected(&answer, &name)),
            }
        }
        Ok(())
    }

    async fn load_functions(&self) -> Result<(), StoreError> {
        tracing::warn!(place = %self.server.place, "the functions of the online store are gone; they are loaded again");
        match self.writes.call(&pipeline(vec![connection::load_functions()])).await?.pop() {
            Some(Value::ServerError(error)) => Err(self.server.refusal(&error)),
            _ => Ok(()),
        }
    }

    /// `epoch`: of the writer, where there is one.
    fn refusal(&self, error: &ServerError, name: &Name, epoch: u64) -> StoreError {
        let details = error.details().unwrap_or_default();
        match error.code() {
            "WRONGTYPE" => corrupt(name, "another kind of value than the key says"),
            "COEVALCORRUPT" => corrupt(name, details),
            "COEVALNOEPOCH" => no_epoch_left(&self.server.place),
            "COEVALFENCED" => match u64::from_str_radix(details, 16) {
                Ok(newest) => StoreError::Fenced { key: name.shown(), epoch, newest },
                Err(_) => corrupt(name, "an epoch that is no number"),
            },
            _ => self.server.refusal(error),
        }
    }
}

#[async_trait]
impl OnlineStore for RedisStore {
    async fn read(&self, reads: &[Read]) -> Result<Vec<Answer>, StoreError> {
        if reads.is_empty() {
            return Ok(Vec::new());
        }
        let values = self.reads.call(&pipeline(reads.iter().map(command).collect())).await?;
        let answer = |(read, value): (&Read, Value)| match value {
            Value::ServerError(error) => Err(self.refusal(&error, &name(read), 0)),
            value => answer(read, value),
        };
        reads.iter().zip(values).map(answer).collect()
    }

    async fn write(&self, writes: Vec<Write>) -> Result<WriteOutcome, StoreError> {
        writes.iter().try_for_each(|write| admit(write, &self.server.place))?;
        let mut outcome = WriteOutcome::default();
        let mut chunk = Chunk::default();
        for write in writes {
            // Commands of one pipeline run even if an earlier one failed. A fact or a mark, such as a checkpoint, must not.
            if matches!(write, Write::Fact(..) | Write::Mark(..)) && !chunk.only_facts() {
                self.send(&mut chunk, &mut outcome).await?;
            }
            chunk.push(write);
            if chunk.commands.len() >= CHUNK_COMMANDS || chunk.bytes >= CHUNK_BYTES {
                self.send(&mut chunk, &mut outcome).await?;
            }
        }
        self.send(&mut chunk, &mut outcome).await?;
        Ok(outcome)
    }

    async fn sync(&self) -> Result<(), StoreError> {
        self.ping().await
    }

    async fn remove_generation(&self, generation: &Generation) -> Result<u64, StoreError> {
        let pattern = pattern(generation);
        let mut removed = 0;
        let mut cursor = b"0".to_vec();
        loop {
            let mut scan = Cmd::new();
            scan.arg("SCAN").arg(&cursor).arg("MATCH").arg(&pattern).arg("COUNT").arg(SCAN_KEYS);
            let name = Name::Key(pattern.clone());
            let answer = self.writes.call(&pipeline(vec![scan])).await?.pop().unwrap_or(Value::Nil);
            let (next, keys) = match answer {
                Value::ServerError(error) => return Err(self.server.refusal(&error)),
                answer => ::redis::from_redis_value::<(Vec<u8>, Vec<Vec<u8>>)>(answer)
                    .map_err(|error| corrupt(&name, &error.to_string()))?,
            };
            if !keys.is_empty() {
                let mut unlink = Cmd::new();
                unlink.arg("UNLINK").arg(&keys);
                match self.writes.call(&pipeline(vec![unlink])).await?.pop().unwrap_or(Value::Nil) {
                    Value::Int(count) => removed += count as u64,
                    Value::ServerError(error) => return Err(self.server.refusal(&error)),
                    answer => return Err(unexpected(&answer, &name)),
                }
            }
            if next == b"0" {
                return Ok(removed);
            }
            cursor = next;
        }
    }

    async fn claim(&self, name: &str, candidate: u64) -> Result<u64, StoreError> {
        admit(&Write::Mark(name.to_owned(), Position::START), &self.server.place)?;
        let mut command = Cmd::new();
        command.arg("FCALL").arg("coeval2_claim").arg(1).arg(named("epoch", name)).arg(&candidate.to_be_bytes()[..]);
        let pipeline = pipeline(vec![command]);
        let mut answers = self.writes.call(&pipeline).await?;
        if answers.iter().any(is_function_missing) {
            self.load_functions().await?;
            answers = self.writes.call(&pipeline).await?;
        }
        match answers.pop().unwrap_or(Value::Nil) {
            Value::ServerError(error) => Err(self.refusal(&error, &Name::Epoch, candidate)),
            Value::BulkString(epoch) if epoch.len() == 8 => {
                Ok(epoch.iter().fold(0, |epoch, byte| epoch << 8 | u64::from(*byte)))
            }
            answer => Err(unexpected(&answer, &Name::Epoch)),
        }
    }

    /// Redis does it by itself.
    async fn collect_expired(&self, _: Micros) -> Result<u64, StoreError> {
        Ok(0)
    }

    async fn report(&self) -> Result<Vec<NodeReport>, StoreError> {
        let report = match self.reads.call(&pipeline(connection::report_commands())).await {
            Ok(answers) => connection::report(&self.server.place, &answers),
            Err(error) => NodeReport {
                place: self.server.place.clone(),
                role: "master".to_owned(),
                durability: "unknown".to_owned(),
                problems: vec![error.to_string()],
                ..NodeReport::default()
            },
        };
        Ok(vec![report])
    }

    async fn ping(&self) -> Result<(), StoreError> {
        let mut ping = Cmd::new();
        ping.arg("PING");
        let ping = pipeline(vec![ping]);
        for lane in [&self.reads, &self.writes] {
            if let Some(Value::ServerError(error)) = lane.call(&ping).await?.pop() {
                return Err(self.server.refusal(&error));
            }
        }
        Ok(())
    }

    fn place(&self) -> String {
        self.server.place.clone()
    }
}

/// What a command is about, for errors.
enum Name {
    /// The key in Redis.
    Key(Vec<u8>),
    Fact,
    Mark,
    Epoch,
}

impl Name {
    fn shown(&self) -> String {
        match self {
            Name::Key(key) => key.escape_ascii().to_string(),
            Name::Fact => format!("{FORMAT}:fact:*"),
            Name::Mark => format!("{FORMAT}:mark:*"),
            Name::Epoch => format!("{FORMAT}:epoch:*"),
        }
    }
}

/// Commands that go in one round trip.
#[derive(Default)]
struct Chunk {
    commands: Vec<Cmd>,
    /// What each is about, and the epoch of its writer.
    names: Vec<(Name, u64)>,
    bytes: usize,
}

impl Chunk {
    fn only_facts(&self) -> bool {
        self.names.iter().all(|(name, _)| matches!(name, Name::Fact | Name::Mark))
    }

    fn push(&mut self, write: Write) {
        let mut command = Cmd::new();
        let mut writer = 0;
        let name = match write {
            Write::Row { key, blob, expires } => {
                let key = key.tagged();
                command.arg("FCALL").arg("coeval2_row").arg(1).arg(&key).arg(&blob[..]).arg(milliseconds(expires));
                Name::Key(key)
            }
            Write::Tiles { key, position, epoch, set, remove, expires } => {
                writer = epoch;
                let key = key.tagged();
                command.arg("FCALL").arg("coeval2_tiles").arg(1).arg(&key);
                let header = Header { position, epoch }.encode();
                let (position, epoch) = header.split_at(16);
                command.arg(position).arg(epoch).arg(milliseconds(expires)).arg(set.len());
                for (id, tile) in &set {
                    command.arg(&tile_field(id)[..]).arg(&tile[..]);
                }
                for id in &remove {
                    command.arg(&tile_field(id)[..]);
                }
                Name::Key(key)
            }
            Write::Remove(key) => {
                let key = key.tagged();
                command.arg("UNLINK").arg(&key);
                Name::Key(key)
            }
            Write::Fact(name, Some(value)) => {
                command.arg("SET").arg(named("fact", &name)).arg(&value[..]);
                Name::Fact
            }
            Write::Fact(name, None) => {
                command.arg("DEL").arg(named("fact", &name));
                Name::Fact
            }
            Write::Mark(name, position) => {
                let position = encode_position(position);
                command.arg("FCALL").arg("coeval2_mark").arg(1).arg(named("mark", &name)).arg(&position[..]);
                Name::Mark
            }
        };
        self.bytes += command.get_packed_command().len();
        self.commands.push(command);
        self.names.push((name, writer));
    }
}

fn pipeline(commands: Vec<Cmd>) -> Pipeline {
    let mut pipeline = Pipeline::with_capacity(commands.len());
    for command in commands {
        pipeline.add_command(command);
    }
    pipeline
}

fn command(read: &Read) -> Cmd {
    let mut command = Cmd::new();
    match read {
        Read::Row(key) => command.arg("GET").arg(key.tagged()),
        Read::Tiles(key, ids) => {
            command.arg("HMGET").arg(key.tagged()).arg(HEADER_FIELD);
            for id in ids {
                command.arg(&tile_field(id)[..]);
            }
            &mut command
        }
        Read::AllTiles(key) => command.arg("HGETALL").arg(key.tagged()),
        Read::Fact(name) => command.arg("GET").arg(named("fact", name)),
        Read::Mark(name) => command.arg("GET").arg(named("mark", name)),
    };
    command
}

fn name(read: &Read) -> Name {
    match read {
        Read::Row(key) | Read::Tiles(key, _) | Read::AllTiles(key) => Name::Key(key.tagged()),
        Read::Fact(_) => Name::Fact,
        Read::Mark(_) => Name::Mark,
    }
}

fn answer(read: &Read, value: Value) -> Result<Answer, StoreError> {
    match read {
        Read::Row(_) => Ok(Answer::Row(bytes(read, value)?)),
        Read::Fact(_) => Ok(Answer::Fact(bytes(read, value)?)),
        Read::Mark(_) => {
            let mark = bytes(read, value)?;
            let position = |mark: Bytes| match mark[..].try_into() {
                Ok(position) => Ok(decode_position(position)),
                Err(_) => Err(corrupt(&Name::Mark, &format!("a mark of {} bytes, it should have 16", mark.len()))),
            };
            Ok(Answer::Mark(mark.map(position).transpose()?))
        }
        Read::Tiles(key, ids) => {
            let Value::Array(values) = value else { return Err(unexpected(&value, &name(read))) };
            if values.len() != 1 + ids.len() {
                let what = format!("{} answers for {} fields", values.len(), 1 + ids.len());
                return Err(corrupt(&name(read), &what));
            }
            let mut values = values.into_iter().map(|value| bytes(read, value));
            let header = values.next().transpose()?.flatten();
            let position = header.map(|header| position(key, &header)).transpose()?;
            Ok(Answer::Tiles { position, tiles: values.collect::<Result<_, _>>()? })
        }
        Read::AllTiles(key) => {
            let fields: Vec<(Bytes, Bytes)> =
                ::redis::from_redis_value(value).map_err(|error| corrupt(&name(read), &error.to_string()))?;
            let mut header = None;
            let mut tiles = Vec::with_capacity(fields.len().saturating_sub(1));
            for (field, value) in fields {
                if field == HEADER_FIELD {
                    header = Some(position(key, &value)?);
                } else if let Some(id) = tile_id(&field) {
                    tiles.push((id, value));
                } else {
                    return Err(corrupt(&name(read), &format!("a field `{}`", field.escape_ascii())));
                }
            }
            tiles.sort_unstable_by_key(|(id, _)| *id);
            Ok(Answer::AllTiles { position: header, tiles })
        }
    }
}

fn bytes(read: &Read, value: Value) -> Result<Option<Bytes>, StoreError> {
    match value {
        Value::Nil => Ok(None),
        Value::BulkString(bytes) => Ok(Some(bytes.into())),
        value => Err(unexpected(&value, &name(read))),
    }
}

fn position(key: &Key, header: &[u8]) -> Result<Position, StoreError> {
    match Header::decode(header) {
        Some(header) => Ok(header.position),
        None => Err(StoreError::Corrupt {
            key: key.to_string(),
            what: format!("a header of {} bytes, it should have 16 or 24", header.len()),
        }),
    }
}

fn corrupt(name: &Name, what: &str) -> StoreError {
    StoreError::Corrupt { key: name.shown(), what: what.to_owned() }
}

/// How the functions take an expiry: rounded up, because before it nothing may be forgotten, and positive, because Redis
/// takes nothing else.
fn milliseconds(expires: Option<Micros>) -> String {
    expires.map_or_else(String::new, |expires| (expires.div_euclid(1_000).saturating_add(1)).max(1).to_string())
}

/// An answer of a kind that the command never has.
fn unexpected(answer: &Value, name: &Name) -> StoreError {
    let mut what = format!("the answer {answer:?}");
    what.truncate(what.floor_char_boundary(200));
    corrupt(name, &what)
}

fn is_function_missing(answer: &Value) -> bool {
    matches!(answer, Value::ServerError(error) if error.details().is_some_and(|text| text.contains("Function not found")))
}

fn named(kind: &str, name: &str) -> Vec<u8> {
    format!("{FORMAT}:{kind}:{name}").into_bytes()
}

fn tile_field(id: &TileId) -> [u8; 17] {
    let mut field = [b't'; 17];
    field[1..9].copy_from_slice(&id.level.to_be_bytes());
    field[9..].copy_from_slice(&encode_i64(id.start));
    field
}

fn tile_id(field: &[u8]) -> Option<TileId> {
    let id: &[u8; 16] = field.strip_prefix(b"t")?.try_into().ok()?;
    let [level, start] = [0, 8].map(|at| std::array::from_fn(|i| id[at + i]));
    Some(TileId { level: i64::from_be_bytes(level), start: decode_i64(start) })
}

/// The pattern of the keys of a generation. Names are taken literally. What stands for the entity may hold braces, but the
/// view behind the last one cannot, so no other generation matches.
fn pattern(generation: &Generation) -> Vec<u8> {
    let Generation { project, view, digest } = generation;
    let mut pattern = format!("{FORMAT}:{{").into_bytes();
    escape(project, &mut pattern);
    pattern.extend_from_slice(b"/*}");
    escape(view, &mut pattern);
    pattern.push(b'@');
    escape(digest, &mut pattern);
    pattern
}

fn escape(text: &str, pattern: &mut Vec<u8>) {
    for byte in text.bytes() {
        if b"*?[]^-\\".contains(&byte) {
            pattern.push(b'\\');
        }
        pattern.push(byte);
    }
}

#[cfg(test)]
mod tests;
