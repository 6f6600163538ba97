//! Commands on their way: which node they go to, and which of them have to go elsewhere or again.

use std::sync::Arc;

use ::redis::{Cmd, Pipeline};

use super::Node;
use crate::StoreError;

/// A command without an answer yet.
pub(super) struct Open {
    /// Where its answer goes.
    pub(super) index: usize,
    pub(super) command: Cmd,
    pub(super) slot: u16,
    pub(super) to: To,
}

pub(super) enum To {
    /// Whoever holds the slot, by the map.
    Owner,
    Moved(Arc<Node>),
    /// The slot is on its way there.
    Asking(Arc<Node>),
}

/// What one node is sent.
pub(super) struct Batch {
    pub(super) node: Arc<Node>,
    pub(super) pipeline: Pipeline,
    pub(super) items: Vec<Item>,
}

pub(super) struct Item {
    pub(super) index: usize,
    pub(super) slot: u16,
    /// Its place in the pipeline.
    pub(super) at: usize,
}

impl Batch {
    pub(super) fn command(&self, number: usize) -> Option<&Cmd> {
        self.pipeline.cmd_iter().nth(self.items[number].at)
    }

    pub(super) fn open(&self, number: usize, to: To) -> Open {
        let Item { index, slot, .. } = self.items[number];
        Open { index, command: self.command(number).cloned().unwrap_or_default(), slot, to }
    }
}

/// What is left after every node was asked once.
#[derive(Default)]
pub(super) struct Round {
    pub(super) open: Vec<Open>,
    pub(super) redraw: bool,
    pub(super) wait: bool,
    pub(super) without_functions: Vec<Arc<Node>>,
    /// By the last node that could not answer.
    pub(super) said: Option<StoreError>,
}

/// The key that a command of ours is about.
pub(super) fn key(command: &Cmd) -> Vec<u8> {
    let argument = |at: usize| match command.args_iter().nth(at) {
        Some(::redis::Arg::Simple(bytes)) => bytes.to_vec(),
        _ => Vec::new(),
    };
    if argument(0) == b"FCALL" { argument(3) } else { argument(1) }
}

/// Host and port of `<slot> <host>:<port>`; without a host it is that of the node that answered.
pub(super) fn redirection(details: &str, host: &str) -> Option<(String, u16)> {
    let (_, address) = details.split_once(' ')?;
    let (named, port) = address.trim().rsplit_once(':')?;
    let host = if named.is_empty() || named == "?" { host } else { named };
    Some((host.to_owned(), port.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirections() {
        assert_eq!(redirection("3999 127.0.0.1:6381", "h"), Some(("127.0.0.1".to_owned(), 6381)));
        assert_eq!(redirection("3999 :6381", "h"), Some(("h".to_owned(), 6381)));
        assert_eq!(redirection("3999 ?:6381", "h"), Some(("h".to_owned(), 6381)));
        assert_eq!(redirection("3999 ::1:6381", "h"), Some(("::1".to_owned(), 6381)));
        assert_eq!(redirection("3999", "h"), None);
        assert_eq!(redirection("3999 h:", "h"), None);
    }
}
