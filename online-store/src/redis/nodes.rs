//! The servers of a store, which of them holds which slot, and calls that go to several of them at once.
//!
//! A Redis that is no cluster is one node that holds everything. Of a cluster we keep a map of our own, from any node that
//! answers, and draw it again when a node says that a slot has moved (MOVED), when one is lost, and when one has become a
//! replica. redis's own cluster client is not used: it sends the commands of a pipeline to one node.

mod batch;
mod map;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ::redis::{Cmd, Pipeline, ServerError, ServerErrorKind, Value};
use futures::future::join_all;
use futures::stream::{FuturesUnordered, StreamExt};
use tokio::time::{Instant, sleep, timeout_at};

use super::address::Address;
use super::connection::{Kind, Lane, Purpose, Server, load_functions};
use crate::StoreError;

use batch::{Batch, Item, Open, Round, To, key, redirection};
pub(super) use map::Map;

/// How often one call follows redirections or waits for a node that is about to answer.
const TRIES_MAX: usize = 8;
/// Waited before asking again a node that cannot answer just now, doubled each time.
const WAIT_MIN: Duration = Duration::from_millis(5);
/// The map is not drawn again so soon after the last attempt, however many calls find it wrong.
const REDRAW_MIN: Duration = Duration::from_millis(20);

/// Reads have their own connection, so that they never queue behind a large write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Reads,
    Writes,
}

/// One server.
pub(super) struct Node {
    pub(super) server: Arc<Server>,
    host: String,
    reads: Lane,
    writes: Lane,
    questions: Lane,
}

impl Node {
    fn new(server: Server, host: &str) -> Node {
        let server = Arc::new(server);
        let lane = |purpose| Lane::new(server.clone(), purpose);
        Node {
            host: host.to_owned(),
            reads: lane(Purpose::Data),
            writes: lane(Purpose::Data),
            questions: lane(Purpose::Questions),
            server,
        }
    }

    pub(super) fn lane(&self, way: Way) -> &Lane {
        match way {
            Way::Reads => &self.reads,
            Way::Writes => &self.writes,
        }
    }

    /// Somebody flushed the functions since the connection was opened.
    async fn load_functions(&self, deadline: Instant) -> Result<(), StoreError> {
        tracing::warn!(place = %self.server.place, "the functions of the online store are gone; they are loaded again");
        for answer in self.writes.call(&pipeline(load_functions()), deadline).await? {
            if let Value::ServerError(error) = answer {
                return Err(self.server.refusal(&error));
            }
        }
        Ok(())
    }

    /// Of a server that may be a replica.
    pub(super) async fn ask(&self, commands: Vec<Cmd>) -> Result<Vec<Value>, StoreError> {
        self.questions.call(&pipeline(commands), Instant::now() + self.server.timeout).await
    }
}

/// A command, and the slot of the key that it is about.
pub(super) struct Routed {
    pub(super) command: Cmd,
    pub(super) slot: u16,
}

/// All servers of a store.
pub(super) struct Nodes {
    address: Address,
    timeout: Duration,
    /// None before the first answer of a cluster.
    map: Mutex<Option<Arc<Map>>>,
    known: Mutex<HashMap<(String, u16), Arc<Node>>>,
    /// Held while the map is drawn: when that was last attempted.
    drawing: tokio::sync::Mutex<Option<Instant>>,
}

impl Nodes {
    pub(super) fn new(address: Address, timeout: Duration) -> Result<Nodes, StoreError> {
        let map = match address.kind {
            Kind::Alone => Some(Arc::new(Map::of_one(Node::new(address.server(timeout)?, "")))),
            Kind::Cluster => None,
        };
        let nodes = Nodes {
            address,
            timeout,
            map: Mutex::new(map),
            known: Mutex::default(),
            drawing: tokio::sync::Mutex::default(),
        };
        if nodes.kind() == Kind::Cluster {
            nodes.seeds()?;
        }
        Ok(nodes)
    }

    pub(super) fn kind(&self) -> Kind {
        self.address.kind
    }

    pub(super) fn place(&self) -> &str {
        &self.address.place
    }

    pub(super) fn deadline(&self) -> Instant {
        Instant::now() + self.timeout
    }

    /// The map as it is known, or as the first node that answers draws it.
    pub(super) async fn map(&self, deadline: Instant) -> Result<Arc<Map>, StoreError> {
        if let Some(map) = self.current() {
            return Ok(map);
        }
        self.redraw(None, deadline).await?;
        self.current().ok_or_else(|| self.unreachable("no node has told which slots it holds".to_owned()))
    }

    fn current(&self) -> Option<Arc<Map>> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Who holds a slot, as far as is known.
    pub(super) fn holder(&self, slot: u16) -> Option<Arc<Node>> {
        self.current().and_then(|map| map.owner(slot).cloned())
    }

    /// What an answer that is an error means.
    pub(super) fn refusal(&self, error: &ServerError, node: Option<&Node>) -> StoreError {
        match node {
            Some(node) => node.server.refusal(error),
            None => StoreError::Refused { place: self.address.place.clone(), what: error.to_string() },
        }
    }

    fn unreachable(&self, what: String) -> StoreError {
        StoreError::Unreachable { place: self.address.place.clone(), what }
    }

    fn node(&self, host: &str, port: u16) -> Result<Arc<Node>, StoreError> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(node) = known.get(&(host.to_owned(), port)) {
            return Ok(node.clone());
        }
        let node = Arc::new(Node::new(self.address.node(host, port, self.timeout)?, host));
        known.insert((host.to_owned(), port), node.clone());
        Ok(node)
    }

    fn seeds(&self) -> Result<Vec<Arc<Node>>, StoreError> {
        self.address.seeds.iter().map(|(host, port)| self.node(host, *port)).collect()
    }

    /// Draws the map again for whoever cannot do with an attempt of a moment ago.
    pub(super) async fn redraw_surely(&self, seen: u64) -> Result<(), StoreError> {
        if self.address.kind == Kind::Cluster {
            sleep(REDRAW_MIN).await;
        }
        self.redraw(Some(seen), self.deadline()).await
    }

    /// Draws the map again, unless somebody did so since `seen`: every node known is asked, the first good answer counts.
    pub(super) async fn redraw(&self, seen: Option<u64>, deadline: Instant) -> Result<(), StoreError> {
        if self.address.kind == Kind::Alone {
            return Ok(());
        }
        let Ok(mut drawing) = timeout_at(deadline, self.drawing.lock()).await else {
            return Err(self.unreachable("its nodes do not tell which slots they hold".to_owned()));
        };
        let newer = self.current().map(|map| map.number) != seen;
        if newer || drawing.is_some_and(|last| last.elapsed() < REDRAW_MIN) {
            return Ok(());
        }
        *drawing = Some(Instant::now());
        let mut candidates = self.seeds()?;
        candidates.extend(self.known.lock().unwrap_or_else(PoisonError::into_inner).values().cloned());
        candidates.sort_by_key(Arc::as_ptr);
        candidates.dedup_by_key(|node| Arc::as_ptr(node));
        let mut asked: FuturesUnordered<_> = candidates.iter().map(|node| map::ask(node, deadline)).collect();
        // A refusal explains more than that some other seed is away.
        let mut failure = None;
        while let Some(drawn) = asked.next().await {
            let drawn = match drawn {
                Ok(drawn) => drawn,
                Err(error) => {
                    if failure.as_ref().is_none_or(StoreError::is_retryable) {
                        failure = Some(error);
                    }
                    continue;
                }
            };
            let number = seen.unwrap_or(0) + 1;
            let map = drawn.map(number, |host, port| self.node(host, port))?;
            // Nodes that are not part of it any more are forgotten, with their connections.
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known.retain(|(host, port), node| {
                map.nodes().any(|other| Arc::ptr_eq(node, other))
                    || self.address.seeds.iter().any(|(seed, seed_port)| (seed, seed_port) == (host, port))
            });
            *self.map.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(map));
            return Ok(());
        }
        Err(failure.unwrap_or_else(|| self.unreachable("no node answers".to_owned())))
    }

    /// Sends each command to the node that holds its slot, all nodes at once, and returns the answers in order, errors
    /// among them. Everything a store sends may be sent twice.
    pub(super) async fn call(self: &Arc<Self>, way: Way, commands: Vec<Routed>) -> Result<Vec<Value>, StoreError> {
        let deadline = self.deadline();
        let map = self.map(deadline).await?;
        if let [node] = map.masters()
            && self.address.kind == Kind::Alone
        {
            let pipeline = pipeline(commands.into_iter().map(|routed| routed.command).collect());
            let answers = node.lane(way).call(&pipeline, deadline).await?;
            if !answers.iter().any(is_function_missing) {
                return Ok(answers);
            }
            node.load_functions(deadline).await?;
            return node.lane(way).call(&pipeline, deadline).await;
        }
        self.call_cluster(way, commands, map, deadline).await
    }

    async fn call_cluster(
        self: &Arc<Self>,
        way: Way,
        commands: Vec<Routed>,
        mut map: Arc<Map>,
        deadline: Instant,
    ) -> Result<Vec<Value>, StoreError> {
        let mut answers = vec![Value::Nil; commands.len()];
        let mut open: Vec<Open> = commands
            .into_iter()
            .enumerate()
            .map(|(index, Routed { command, slot })| Open { index, command, slot, to: To::Owner })
            .collect();
        let mut wait = WAIT_MIN;
        for turn in 1.. {
            let mut round = Round::default();
            let batches = self.batches(open, &map, &mut round)?;
            let results =
                join_all(batches.iter().map(|batch| batch.node.lane(way).call(&batch.pipeline, deadline))).await;
            let mut lost = Vec::new();
            for (batch, result) in batches.into_iter().zip(results) {
                match result {
                    Ok(values) => self.take(way, &batch, values, &mut answers, &mut round)?,
                    Err(error @ StoreError::Unreachable { .. }) => {
                        round.open.extend((0..batch.items.len()).map(|item| batch.open(item, To::Owner)));
                        lost.push((batch.node, error));
                    }
                    Err(error) => {
                        if error.is_retryable() {
                            // There is no time left to look who has taken over, but the next call should know.
                            let (nodes, seen) = (self.clone(), map.number);
                            tokio::spawn(async move { nodes.redraw(Some(seen), nodes.deadline()).await });
                        }
                        return Err(error);
                    }
                }
            }
            if round.open.is_empty() {
                return Ok(answers);
            }
            for node in std::mem::take(&mut round.without_functions) {
                node.load_functions(deadline).await?;
            }
            if round.redraw || !lost.is_empty() {
                // Should no node answer, then the error is the one that made us ask.
                let _ = self.redraw(Some(map.number), deadline).await;
                map = self.map(deadline).await?;
            }
            // Where a lost node still holds the slot only time can help, and it is not for one call to wait so long.
            let holds =
                |node: &Arc<Node>, open: &Open| map.owner(open.slot).is_some_and(|owner| Arc::ptr_eq(owner, node));
            if let Some((_, error)) = lost.into_iter().find(|(node, _)| round.open.iter().any(|open| holds(node, open)))
            {
                return Err(error);
            }
            let is_late = Instant::now() + wait >= deadline;
            if turn == TRIES_MAX || is_late {
                return Err(round.said.unwrap_or_else(|| self.unreachable("its slots keep moving".to_owned())));
            }
            if round.wait {
                sleep(wait).await;
                wait *= 2;
            }
            open = round.open;
        }
        Err(self.unreachable("its slots keep moving".to_owned()))
    }

    /// Groups commands by node, in order.
    fn batches(&self, open: Vec<Open>, map: &Map, round: &mut Round) -> Result<Vec<Batch>, StoreError> {
        let mut batches: Vec<Batch> = Vec::new();
        for mut open in open {
            let (node, is_asking) = match &open.to {
                To::Owner => match map.owner(open.slot) {
                    Some(node) => (node.clone(), false),
                    None => {
                        round.said = Some(self.unreachable(format!("no master holds slot {}", open.slot)));
                        (round.redraw, round.wait) = (true, true);
                        open.to = To::Owner;
                        round.open.push(open);
                        continue;
                    }
                },
                To::Moved(node) => (node.clone(), false),
                To::Asking(node) => (node.clone(), true),
            };
            let at = batches.iter().position(|batch| Arc::ptr_eq(&batch.node, &node)).unwrap_or_else(|| {
                batches.push(Batch { node, pipeline: Pipeline::new(), items: Vec::new() });
                batches.len() - 1
            });
            let batch = &mut batches[at];
            if is_asking {
                batch.pipeline.add_command(::redis::cmd("ASKING"));
            }
            batch.items.push(Item { index: open.index, slot: open.slot, at: batch.pipeline.len() });
            batch.pipeline.add_command(open.command);
        }
        Ok(batches)
    }

    /// Sorts the answers of a node into those that count and what has to be asked elsewhere or later.
    fn take(
        &self,
        way: Way,
        batch: &Batch,
        mut values: Vec<Value>,
        answers: &mut [Value],
        round: &mut Round,
    ) -> Result<(), StoreError> {
        let first_open = round.open.len();
        let mut answered = Vec::new();
        for (number, item) in batch.items.iter().enumerate() {
            let value = std::mem::replace(&mut values[item.at], Value::Nil);
            let to = match &value {
                value if is_function_missing(value) => {
                    if round.without_functions.last().is_none_or(|node| !Arc::ptr_eq(node, &batch.node)) {
                        round.without_functions.push(batch.node.clone());
                    }
                    Some(To::Owner)
                }
                Value::ServerError(error) => self.elsewhere(batch, error, round)?,
                _ => None,
            };
            match to {
                Some(to) => round.open.push(batch.open(number, to)),
                None => {
                    if way == Way::Writes && round.open.len() > first_open {
                        answered.push(number);
                    }
                    answers[item.index] = value;
                }
            }
        }
        // A later write of the same key must not be answered before an earlier one: sent again, that would be stale.
        let is_same = |a: &Open, number: &usize| key(&a.command) == batch.command(*number).map(key).unwrap_or_default();
        let opened = &round.open[first_open..];
        if answered
            .iter()
            .any(|number| opened.iter().any(|open| open.index < batch.items[*number].index && is_same(open, number)))
        {
            return Err(self.unreachable("a slot changed hands in the middle of a call".to_owned()));
        }
        Ok(())
    }

    /// Where a command has to be sent again after this answer; None if it is the answer.
    fn elsewhere(&self, batch: &Batch, error: &ServerError, round: &mut Round) -> Result<Option<To>, StoreError> {
        let Some(kind) = error.kind() else { return Ok(None) };
        let node = || match error.details().and_then(|details| redirection(details, &batch.node.host)) {
            Some((host, port)) => self.node(&host, port),
            None => Err(self.unreachable(format!("a redirection to nowhere: {error}"))),
        };
        let to = match kind {
            ServerErrorKind::Moved => {
                round.redraw = true;
                To::Moved(node()?)
            }
            ServerErrorKind::Ask => To::Asking(node()?),
            ServerErrorKind::TryAgain | ServerErrorKind::BusyLoading => {
                round.wait = true;
                To::Owner
            }
            ServerErrorKind::ClusterDown | ServerErrorKind::MasterDown | ServerErrorKind::ReadOnly => {
                (round.redraw, round.wait) = (true, true);
                To::Owner
            }
            _ => return Ok(None),
        };
        round.said = Some(batch.node.server.refusal(error));
        Ok(Some(to))
    }
}

fn is_function_missing(answer: &Value) -> bool {
    matches!(answer, Value::ServerError(error) if error.details().is_some_and(|text| text.contains("Function not found")))
}

pub(super) fn pipeline(commands: Vec<Cmd>) -> Pipeline {
    let mut pipeline = Pipeline::with_capacity(commands.len());
    for command in commands {
        pipeline.add_command(command);
    }
    pipeline
}
