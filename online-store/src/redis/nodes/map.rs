//! Which master holds which slots.

use std::sync::Arc;

use ::redis::{Cmd, FromRedisValue, Value};
use tokio::time::Instant;

use super::super::slot::{COPY_TAGS, SLOTS};
use super::{Node, pipeline};
use crate::StoreError;

const NOBODY: u16 = u16::MAX;

/// A picture of the cluster.
pub(in super::super) struct Map {
    /// Counts pictures, so that a call which finds this one wrong knows whether another has been drawn since.
    pub(super) number: u64,
    masters: Vec<Arc<Node>>,
    replicas: Vec<Arc<Node>>,
    /// For each slot the index of its master; empty where one node holds everything.
    owners: Vec<u16>,
    /// For each master one of the copies of facts that it holds, if it holds any.
    copies: Vec<Option<(u32, u16)>>,
}

impl Map {
    pub(super) fn of_one(node: Node) -> Map {
        let masters = vec![Arc::new(node)];
        Map { number: 0, masters, replicas: Vec::new(), owners: Vec::new(), copies: Vec::new() }
    }

    pub(in super::super) fn number(&self) -> u64 {
        self.number
    }

    pub(in super::super) fn masters(&self) -> &[Arc<Node>] {
        &self.masters
    }

    pub(in super::super) fn replicas(&self) -> &[Arc<Node>] {
        &self.replicas
    }

    pub(super) fn nodes(&self) -> impl Iterator<Item = &Arc<Node>> {
        self.masters.iter().chain(&self.replicas)
    }

    pub(in super::super) fn owner(&self, slot: u16) -> Option<&Arc<Node>> {
        if self.owners.is_empty() {
            return self.masters.first();
        }
        self.masters.get(usize::from(self.owners[usize::from(slot)]))
    }

    /// One copy of facts on each master that holds one of these slots, or on each of all masters.
    pub(in super::super) fn copies(&self, slots: Option<&[u16]>) -> Vec<(u32, u16)> {
        let of_all = || self.copies.iter().copied().flatten().collect();
        let Some(slots) = slots else { return of_all() };
        let mut is_touched = vec![false; self.masters.len()];
        for slot in slots {
            if let Some(touched) = is_touched.get_mut(usize::from(self.owners[usize::from(*slot)])) {
                *touched = true;
            }
        }
        let copies: Vec<_> = self.copies.iter().zip(is_touched).filter(|(_, touched)| *touched).collect();
        // A master with a handful of slots may hold no copy; then the others speak for it.
        match copies.iter().filter_map(|(copy, _)| **copy).collect::<Vec<_>>() {
            copies if copies.is_empty() => of_all(),
            copies => copies,
        }
    }

    /// How many slots nobody holds.
    pub(in super::super) fn uncovered(&self) -> usize {
        self.owners.iter().filter(|owner| **owner == NOBODY).count()
    }

    /// Whether every slot is held by the same master in both.
    pub(in super::super) fn is_same(&self, other: &Map) -> bool {
        Arc::ptr_eq(&self.masters[0], &other.masters[0])
            && self.masters.len() == other.masters.len()
            && self.masters.iter().zip(&other.masters).all(|(a, b)| Arc::ptr_eq(a, b))
            && self.owners == other.owners
    }
}

/// What one node says of all slots.
pub(super) struct Drawn {
    ranges: Vec<Range>,
}

struct Range {
    first: u16,
    last: u16,
    /// The master, then its replicas.
    nodes: Vec<(String, u16)>,
}

/// Asks a node which slots everybody holds.
pub(super) async fn ask(node: &Arc<Node>, deadline: Instant) -> Result<Drawn, StoreError> {
    let mut command = Cmd::new();
    command.arg("CLUSTER").arg("SLOTS");
    let answer = node.questions.call(&pipeline(vec![command]), deadline).await?.pop().unwrap_or(Value::Nil);
    let unreachable =
        |what: &str| StoreError::Unreachable { place: node.server.place.to_string(), what: what.to_owned() };
    match answer {
        Value::ServerError(error) if error.details().is_some_and(|text| text.contains("cluster support disabled")) => {
            let what = "it is no node of a cluster; write redis:// in `online:`".to_owned();
            Err(StoreError::Refused { place: node.server.place.to_string(), what })
        }
        Value::ServerError(error) => Err(node.server.refusal(&error)),
        Value::Array(ranges) if ranges.is_empty() => {
            Err(unreachable("it belongs to no cluster yet; create one with `redis-cli --cluster create`"))
        }
        answer => read(&answer, &node.host)
            .map(|ranges| Drawn { ranges })
            .ok_or_else(|| unreachable("its answer to CLUSTER SLOTS is none")),
    }
}

fn read(answer: &Value, asked: &str) -> Option<Vec<Range>> {
    let Value::Array(ranges) = answer else { return None };
    let range = |range: &Value| {
        let Value::Array(parts) = range else { return None };
        let [Value::Int(first), Value::Int(last), nodes @ ..] = &parts[..] else { return None };
        let slot = |slot: &i64| u16::try_from(*slot).ok().filter(|slot| usize::from(*slot) < SLOTS);
        let nodes: Option<Vec<_>> = nodes.iter().map(|node| place(node, asked)).collect();
        Some(Range { first: slot(first)?, last: slot(last)?, nodes: nodes.filter(|nodes| !nodes.is_empty())? })
    };
    ranges.iter().map(range).collect()
}

/// Host and port of a node. One that does not know its own host is where we asked.
fn place(node: &Value, asked: &str) -> Option<(String, u16)> {
    let Value::Array(parts) = node else { return None };
    let [host, Value::Int(port), ..] = &parts[..] else { return None };
    let host = match host {
        Value::Nil => String::new(),
        host => String::from_redis_value_ref(host).ok()?,
    };
    let host = if host.is_empty() || host == "?" { asked.to_owned() } else { host };
    Some((host, u16::try_from(*port).ok()?))
}

impl Drawn {
    pub(super) fn map(
        self,
        number: u64,
        node: impl Fn(&str, u16) -> Result<Arc<Node>, StoreError>,
    ) -> Result<Map, StoreError> {
        let mut map =
            Map { number, masters: Vec::new(), replicas: Vec::new(), owners: vec![NOBODY; SLOTS], copies: Vec::new() };
        let place = |nodes: &mut Vec<Arc<Node>>, (host, port): &(String, u16)| {
            let node = node(host, *port)?;
            let at = nodes.iter().position(|other| Arc::ptr_eq(other, &node));
            Ok::<_, StoreError>(at.unwrap_or_else(|| {
                nodes.push(node);
                nodes.len() - 1
            }))
        };
        let mut ranges = self.ranges;
        ranges.sort_unstable_by_key(|range| range.first);
        for Range { first, last, nodes } in &ranges {
            let master = place(&mut map.masters, &nodes[0])?;
            for replica in &nodes[1..] {
                place(&mut map.replicas, replica)?;
            }
            for slot in *first..=*last {
                map.owners[usize::from(slot)] = master as u16;
            }
        }
        let copy = |master: usize| {
            COPY_TAGS.iter().copied().find(|(_, slot)| usize::from(map.owners[usize::from(*slot)]) == master)
        };
        map.copies = (0..map.masters.len()).map(copy).collect();
        Ok(map)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Value {
        Value::BulkString(text.as_bytes().to_vec())
    }

    #[test]
    fn answers_are_read_or_are_none() {
        let node = |host: Value, port| Value::Array(vec![host, Value::Int(port), text("id"), Value::Array(vec![])]);
        let range = |nodes| {
            let mut parts = vec![Value::Int(0), Value::Int(16_383)];
            parts.extend::<Vec<Value>>(nodes);
            Value::Array(vec![Value::Array(parts)])
        };
        let ranges = read(&range(vec![node(text("a"), 1), node(Value::Nil, 2), node(text(""), 3)]), "asked").unwrap();
        assert_eq!((ranges[0].first, ranges[0].last), (0, 16_383));
        let nodes: Vec<_> = ranges[0].nodes.iter().map(|(host, port)| (host.as_str(), *port)).collect();
        assert_eq!(nodes, [("a", 1), ("asked", 2), ("asked", 3)]);
        for damaged in [
            Value::Nil,
            Value::Array(vec![Value::Nil]),
            range(vec![]),
            range(vec![text("a")]),
            range(vec![node(text("a"), 70_000)]),
            Value::Array(vec![Value::Array(vec![Value::Int(0), Value::Int(16_384), node(text("a"), 1)])]),
            Value::Array(vec![Value::Array(vec![Value::Int(-1), Value::Int(3), node(text("a"), 1)])]),
        ] {
            assert!(read(&damaged, "asked").is_none(), "{damaged:?}");
        }
    }
}
