//! The way to one key of a Redis, for who keeps something else there than rows: the event log.

use std::sync::Arc;
use std::time::Duration;

use ::redis::{Cmd, ServerError, Value};

use super::address::Address;
use super::nodes::{Nodes, Routed, Way};
use super::{out_of_memory, slot};
use crate::StoreError;

/// Commands to the node that holds a key, over a connection that comes back by itself. The functions of `log.lua` are there
/// whenever it is connected.
pub struct Direct {
    nodes: Arc<Nodes>,
    slot: u16,
}

impl Direct {
    /// Understands the addresses that [`RedisStore::connect`](super::RedisStore::connect) does. Connects with the first
    /// call, on the runtime of that call, where all others have to be made as well. `timeout` bounds every call.
    pub fn new(url: &str, key: &str, timeout: Duration) -> Result<Direct, StoreError> {
        Ok(Direct { nodes: Arc::new(Nodes::new(Address::parse(url)?, timeout)?), slot: slot::slot(key.as_bytes()) })
    }

    /// Sends commands about the key, or others with the same hash tag, in one round trip. The answers are in order, errors
    /// among them. Everything may be sent twice, and after an error it is not known what was done.
    pub async fn call(&self, commands: Vec<Cmd>) -> Result<Vec<Value>, StoreError> {
        let routed = commands.into_iter().map(|command| Routed { command, slot: self.slot });
        self.nodes.call(Way::Writes, routed.collect()).await
    }

    /// What an answer that is an error means.
    pub async fn refusal(&self, error: &ServerError) -> StoreError {
        let node = self.nodes.holder(self.slot);
        if error.code() == "OOM" {
            let place = self.place().to_owned();
            return StoreError::Refused { place, what: out_of_memory(node).await };
        }
        self.nodes.refusal(error, node.as_deref())
    }

    /// Without user and password.
    pub fn place(&self) -> &str {
        self.nodes.place()
    }
}
