//! The stores of several machines: a Redis 7 or a Redis Cluster, one string per row and one hash per windowed entity.
//!
//! Rows and tiles are changed by [functions](connection::FUNCTIONS) that run in the server, so that each change is one step
//! there and many go in one round trip. Reads are GET and HMGET, one pipeline per node for a call: an HMGET is one step too,
//! so the header and the tiles it returns belong together. Row: `GET`. Hash fields: `h` is the header, position and epoch; a
//! tile is `t`, level and start, 17 bytes. Facts are strings under `c1:fact:`, which no entity's key begins with; in a
//! cluster every master holds copies of them ([`slot::COPIES`]), so that one which came back empty is noticed.
//!
//! Redis is as durable as it is configured, and [`OnlineStore::sync`] can add nothing to that: with `appendfsync always` a
//! write is on disk when it returns, with `everysec` a crash takes up to the last second. It takes a tail: the append-only
//! file is in order, and a fact is only sent after everything before it was answered, so a checkpoint that survives is
//! never ahead of the data it speaks for. In a cluster this holds for each node by itself.

mod address;
mod command;
mod connection;
mod direct;
mod info;
mod nodes;
mod slot;

use std::sync::Arc;
use std::time::Duration;

use ::redis::{Cmd, ServerError, Value};
use async_trait::async_trait;
use feature_defs::time::{Micros, Position};
use futures::future::join_all;

use crate::key::Generation;
use crate::memory::{admit, no_epoch_left};
use crate::{Answer, NodeReport, OnlineStore, Read, StoreError, Write, WriteOutcome};
use address::Address;
use command::{About, Chunk, Copy, Name, corrupt, unexpected};
use connection::Kind;
use nodes::{Node, Nodes, Routed, Way, pipeline};

pub use direct::Direct;

/// A longer call to write is cut here: more would gain nothing over the network, hold up other clients of a server with one
/// thread, and keep the whole call in memory twice.
const CHUNK_COMMANDS: usize = 1_000;
const CHUNK_BYTES: usize = 8 << 20;
/// Keys the server looks at in one step of a removal, well below a millisecond.
const SCAN_KEYS: usize = 1_000;
/// A removal begins again when slots moved meanwhile, so often.
const REMOVE_TURNS_MAX: usize = 5;

/// An online store in a Redis or a Redis Cluster.
pub struct RedisStore {
    nodes: Arc<Nodes>,
}

impl RedisStore {
    /// Opens `redis://[user:password@]host:port[/db]`, `rediss://` for TLS, `redis+cluster://[user:password@]a:6379,b:6379`
    /// or `rediss+cluster://`, the last two with any nodes of the cluster; `?ca=`, `&cert=` and `&key=` name PEM files.
    ///
    /// A server that answers and cannot be a store is refused here, with the reason. One that is away is not: every call
    /// fails until it is there. `timeout` bounds every round trip; a call is one, except that writes are sent in chunks of
    /// 1,000, and a removal in steps.
    pub async fn connect(url: &str, timeout: Duration) -> Result<RedisStore, StoreError> {
        let store = RedisStore { nodes: Arc::new(Nodes::new(Address::parse(url)?, timeout)?) };
        match store.ping().await {
            Err(error) if !error.is_retryable() => Err(error),
            Err(error) => {
                tracing::warn!(%error, "the online store is away; it is tried again with every call");
                Ok(store)
            }
            Ok(()) => Ok(store),
        }
    }

    async fn send(&self, chunk: &mut Chunk, outcome: &mut WriteOutcome) -> Result<(), StoreError> {
        if chunk.commands.is_empty() {
            return Ok(());
        }
        let Chunk { commands, abouts, .. } = std::mem::take(chunk);
        let answers = self.nodes.call(Way::Writes, commands).await?;
        for (answer, about) in answers.into_iter().zip(abouts) {
            match (answer, &about.name) {
                (Value::Int(0), Name::Key(_) | Name::Mark) => outcome.stale += 1,
                (Value::ServerError(error), _) => return Err(self.refusal(&error, &about).await),
                (Value::Int(1), Name::Key(_) | Name::Mark) | (Value::Okay | Value::Int(_), Name::Fact) => {
                    outcome.applied += 1;
                }
                (Value::Okay | Value::Int(_), Name::Copy) => {}
                (answer, name) => return Err(unexpected(&answer, name)),
            }
        }
        Ok(())
    }

    /// What an answer that is an error means.
    async fn refusal(&self, error: &ServerError, about: &About) -> StoreError {
        let details = error.details().unwrap_or_default();
        let node = self.nodes.holder(about.slot);
        match error.code() {
            "WRONGTYPE" => corrupt(&about.name, "another kind of value than the key says"),
            "COEVALCORRUPT" => corrupt(&about.name, details),
            "COEVALNOEPOCH" => no_epoch_left(self.nodes.place()),
            "COEVALFENCED" => match u64::from_str_radix(details, 16) {
                Ok(newest) => StoreError::Fenced { key: about.name.shown(), epoch: about.epoch, newest },
                Err(_) => corrupt(&about.name, "an epoch that is no number"),
            },
            "OOM" => {
                let place = node.as_ref().map_or(self.nodes.place(), |node| &node.server.place).to_owned();
                StoreError::Refused { place, what: out_of_memory(node).await }
            }
            _ => self.nodes.refusal(error, node.as_deref()),
        }
    }

    /// Which copies of facts a call reads: one on each master that it touches.
    async fn copies(&self, reads: &[Read], entities: &[Routed]) -> Result<Vec<Copy>, StoreError> {
        if self.nodes.kind() == Kind::Alone {
            return Ok(vec![None]);
        }
        let map = self.nodes.map(self.nodes.deadline()).await?;
        // A mark is the least of all.
        let is_everywhere = entities.is_empty() || reads.iter().any(|read| matches!(read, Read::Mark(_)));
        let slots: Vec<u16> = entities.iter().map(|routed| routed.slot).collect();
        Ok(map.copies((!is_everywhere).then_some(&slots)).into_iter().map(Some).collect())
    }

    /// Removes the keys of a pattern from one master.
    async fn remove_from(&self, node: &Node, pattern: &[u8]) -> Result<u64, StoreError> {
        let about = About { name: Name::Key(pattern.to_vec()), epoch: 0, slot: 0 };
        let mut removed = 0;
        let mut cursor = b"0".to_vec();
        loop {
            let mut scan = Cmd::new();
            scan.arg("SCAN").arg(&cursor).arg("MATCH").arg(pattern).arg("COUNT").arg(SCAN_KEYS);
            let scanned = node.lane(Way::Writes).call(&pipeline_of(scan), self.nodes.deadline()).await?.pop();
            let (next, keys) = match scanned.unwrap_or(Value::Nil) {
                Value::ServerError(error) => return Err(self.nodes.refusal(&error, Some(node))),
                answer => ::redis::from_redis_value::<(Vec<u8>, Vec<Vec<u8>>)>(answer)
                    .map_err(|error| corrupt(&about.name, &error.to_string()))?,
            };
            // One by one: a cluster takes no command about keys of several slots.
            let unlink = |key: &Vec<u8>| {
                let mut command = Cmd::new();
                command.arg("UNLINK").arg(key);
                Routed { command, slot: slot::slot(key) }
            };
            if !keys.is_empty() {
                for answer in self.nodes.call(Way::Writes, keys.iter().map(unlink).collect()).await? {
                    match answer {
                        Value::Int(count) => removed += count as u64,
                        Value::ServerError(error) => return Err(self.refusal(&error, &about).await),
                        answer => return Err(unexpected(&answer, &about.name)),
                    }
                }
            }
            if next == b"0" {
                return Ok(removed);
            }
            cursor = next;
        }
    }
}

fn pipeline_of(command: Cmd) -> ::redis::Pipeline {
    pipeline(vec![command])
}

async fn out_of_memory(node: Option<Arc<Node>>) -> String {
    let mut info = Cmd::new();
    info.arg("INFO").arg("memory");
    let said = match node {
        Some(node) => node.ask(vec![info]).await.ok().and_then(|mut answers| answers.pop()),
        None => None,
    };
    let said: String = said.and_then(|value| ::redis::from_redis_value(value).ok()).unwrap_or_default();
    info::out_of_memory(&said)
}

#[async_trait]
impl OnlineStore for RedisStore {
    async fn read(&self, reads: &[Read]) -> Result<Vec<Answer>, StoreError> {
        if reads.is_empty() {
            return Ok(Vec::new());
        }
        // Those about entities first: they tell which nodes have to answer for the facts.
        let mut commands: Vec<Routed> = Vec::with_capacity(reads.len());
        commands.extend(reads.iter().filter_map(command::entity_read));
        let entities = commands.len();
        let mut copies = Vec::new();
        if entities < reads.len() {
            copies = self.copies(reads, &commands).await?;
            for read in reads {
                command::add_named_reads(read, &copies, &mut commands);
            }
        }
        let mut values = self.nodes.call(Way::Reads, commands).await?;
        let mut named = values.split_off(entities).into_iter();
        let mut values = values.into_iter();
        let mut answers = Vec::with_capacity(reads.len());
        for read in reads {
            let mut failure = None;
            let mut check = |at, value| match value {
                Value::ServerError(error) => {
                    failure.get_or_insert((at, error));
                    Value::Nil
                }
                value => value,
            };
            let answer = if command::is_named(read) {
                let own = named.by_ref().take(copies.len()).enumerate().map(|(at, value)| check(at, value));
                command::answer(read, own)
            } else {
                command::answer(read, values.next().map(|value| check(0, value)).into_iter())
            };
            if let Some((at, error)) = failure {
                let copy = copies.get(at).copied().flatten().map(|(_, slot)| slot);
                let slot = command::entity_read(read).map(|routed| routed.slot).or(copy).unwrap_or(0);
                let about = About { name: command::name(read), epoch: 0, slot };
                return Err(self.refusal(&error, &about).await);
            }
            answers.push(answer?);
        }
        Ok(answers)
    }

    async fn write(&self, writes: Vec<Write>) -> Result<WriteOutcome, StoreError> {
        writes.iter().try_for_each(|write| admit(write, self.nodes.place()))?;
        let mut outcome = WriteOutcome::default();
        let mut chunk = Chunk::default();
        for write in writes {
            if chunk.holds_back(&write) {
                self.send(&mut chunk, &mut outcome).await?;
            }
            chunk.push(write, self.nodes.kind());
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
        let pattern = command::pattern(generation);
        let mut removed = 0;
        for _ in 0..REMOVE_TURNS_MAX {
            let before = self.nodes.map(self.nodes.deadline()).await?;
            for node in before.masters() {
                removed += self.remove_from(node, &pattern).await?;
            }
            // A slot that moved from a master not yet looked at to one that was took its keys along.
            self.nodes.redraw_surely(before.number()).await?;
            if before.is_same(&*self.nodes.map(self.nodes.deadline()).await?) {
                return Ok(removed);
            }
        }
        let what = "slots move faster than entities are removed; try again when they have moved".to_owned();
        Err(StoreError::Unreachable { place: self.place(), what })
    }

    async fn claim(&self, name: &str, candidate: u64) -> Result<u64, StoreError> {
        admit(&Write::Mark(name.to_owned(), Position::START), self.nodes.place())?;
        // In a cluster the master that gives epochs may fail over and forget the newest. All of them remember what was
        // given, so that it is not given again.
        let seen = self.seen_epoch(name).await?;
        let candidate = seen.map_or(candidate, |seen| candidate.max(seen.saturating_add(1)));
        let key = command::named("epoch", name, None);
        let slot = slot::slot(&key);
        let mut claim = Cmd::new();
        claim.arg("FCALL").arg("coeval2_claim").arg(1).arg(key).arg(&candidate.to_be_bytes()[..]);
        let mut answers = self.nodes.call(Way::Writes, vec![Routed { command: claim, slot }]).await?;
        let epoch = match answers.pop().unwrap_or(Value::Nil) {
            Value::ServerError(error) => {
                return Err(self.refusal(&error, &About { name: Name::Epoch, epoch: candidate, slot }).await);
            }
            Value::BulkString(epoch) if epoch.len() == 8 => {
                epoch.iter().fold(0, |epoch, byte| epoch << 8 | u64::from(*byte))
            }
            answer => return Err(unexpected(&answer, &Name::Epoch)),
        };
        if self.nodes.kind() == Kind::Cluster {
            let mut chunk = Chunk::default();
            chunk.add_mark(Kind::Cluster, "seen", name, Position { time: 0, sequence: epoch });
            self.send(&mut chunk, &mut WriteOutcome::default()).await?;
        }
        Ok(epoch)
    }

    /// Redis does it by itself.
    async fn collect_expired(&self, _: Micros) -> Result<u64, StoreError> {
        Ok(0)
    }

    async fn report(&self) -> Result<Vec<NodeReport>, StoreError> {
        let kind = self.nodes.kind();
        // Nodes may have come and gone since the last call.
        let seen = self.nodes.map(self.nodes.deadline()).await.map(|map| map.number());
        let drawn = match seen {
            Ok(number) => self.nodes.redraw(Some(number), self.nodes.deadline()).await,
            Err(error) => Err(error),
        };
        let Ok(map) = self.nodes.map(self.nodes.deadline()).await else {
            let error = drawn.err().map_or_else(String::new, |error| error.to_string());
            return Ok(vec![info::absent(&self.place(), "cluster", &error)]);
        };
        let of = async |node: &Arc<Node>, role: &str| match node.ask(info::report_commands(kind)).await {
            Ok(answers) => info::report(&node.server.place, kind, &answers),
            Err(error) => info::absent(&node.server.place, role, &error.to_string()),
        };
        let masters = join_all(map.masters().iter().map(|node| of(node, "master")));
        let replicas = join_all(map.replicas().iter().map(|node| of(node, "replica")));
        let (masters, replicas) = futures::future::join(masters, replicas).await;
        let mut reports: Vec<NodeReport> = masters.into_iter().chain(replicas).collect();
        if map.uncovered() > 0 {
            let what = format!(
                "{} of {} slots are held by no master, so what lies there is UNAVAILABLE; `redis-cli --cluster fix` shows why",
                map.uncovered(),
                slot::SLOTS
            );
            reports[0].problems.push(what);
        }
        Ok(reports)
    }

    async fn ping(&self) -> Result<(), StoreError> {
        let mut ping = Cmd::new();
        ping.arg("PING");
        let ping = pipeline_of(ping);
        let deadline = self.nodes.deadline();
        let map = self.nodes.map(deadline).await?;
        let lanes = map.masters().iter().flat_map(|node| [(node, Way::Reads), (node, Way::Writes)]);
        let calls = join_all(lanes.map(async |(node, way)| match node.lane(way).call(&ping, deadline).await?.pop() {
            Some(Value::ServerError(error)) => Err(self.nodes.refusal(&error, Some(node))),
            _ => Ok(()),
        }));
        let results = calls.await;
        // Who has taken over is for the next ping to see; a refusal says more than an absence.
        if self.nodes.kind() == Kind::Cluster && results.iter().any(Result::is_err) {
            let _ = self.nodes.redraw(Some(map.number()), self.nodes.deadline()).await;
        }
        let mut errors: Vec<StoreError> = results.into_iter().filter_map(Result::err).collect();
        errors.sort_by_key(StoreError::is_retryable);
        errors.into_iter().next().map_or(Ok(()), Err)
    }

    fn place(&self) -> String {
        self.nodes.place().to_owned()
    }
}

impl RedisStore {
    /// The largest epoch of a writer that any master of a cluster remembers.
    async fn seen_epoch(&self, name: &str) -> Result<Option<u64>, StoreError> {
        if self.nodes.kind() == Kind::Alone {
            return Ok(None);
        }
        let map = self.nodes.map(self.nodes.deadline()).await?;
        let copies: Vec<Copy> = map.copies(None).into_iter().map(Some).collect();
        let mut commands = Vec::new();
        command::add_named("seen", name, &copies, &mut commands);
        let mut seen = None;
        for (value, copy) in self.nodes.call(Way::Writes, commands).await?.into_iter().zip(copies) {
            match value {
                Value::ServerError(error) => {
                    let slot = copy.map_or(0, |(_, slot)| slot);
                    return Err(self.refusal(&error, &About { name: Name::Epoch, epoch: 0, slot }).await);
                }
                value => seen = seen.max(command::mark(&Name::Epoch, value)?.map(|position| position.sequence)),
            }
        }
        Ok(seen)
    }
}

#[cfg(test)]
mod cluster_tests;
#[cfg(test)]
mod fault_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tls_tests;
