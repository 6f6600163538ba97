//! Digests over our own canonical text.
//!
//! The text is a list of `name=length:value` lines, so that no value can be mistaken for a name or for the next value, and
//! it is independent of YAML layout, of map order and of any library's way of printing.

use std::fmt::{self, Display, Write};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// A SHA-256 in hexadecimal.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Digest(String);

impl Digest {
    pub fn of_bytes(bytes: &[u8]) -> Digest {
        let mut text = String::with_capacity(64);
        for byte in Sha256::digest(bytes) {
            write!(text, "{byte:02x}").expect("writing to a string cannot fail");
        }
        Digest(text)
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Enough to tell digests of one project apart, for people.
    pub fn short(&self) -> &str {
        &self.0[..12]
    }
}

impl Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Canonical text under construction.
#[derive(Debug, Default, Clone)]
pub struct Canonical(String);

impl Canonical {
    /// `kind` says what is described, so that two kinds of object never share a digest.
    pub fn new(kind: &str) -> Canonical {
        Canonical::default().with("kind", kind)
    }

    pub fn with(mut self, name: &str, value: impl Display) -> Canonical {
        self.add(name, value);
        self
    }

    pub fn add(&mut self, name: &str, value: impl Display) {
        let value = value.to_string();
        writeln!(self.0, "{name}={}:{value}", value.len()).expect("writing to a string cannot fail");
    }

    /// Nothing is written for None, so a field added later with None as its default changes no old digest.
    pub fn maybe(&mut self, name: &str, value: Option<impl Display>) {
        if let Some(value) = value {
            self.add(name, value);
        }
    }

    pub fn digest(&self) -> Digest {
        Digest::of_bytes(self.0.as_bytes())
    }

    pub fn text(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_cannot_pose_as_names() {
        let a = Canonical::new("view").with("a", "x\nb=1:y");
        let b = Canonical::new("view").with("a", "x").with("b", "y");
        assert_ne!(a.digest(), b.digest());
        assert_ne!(Canonical::new("view").digest(), Canonical::new("source").digest());
    }

    #[test]
    fn the_digest_is_sha256() {
        assert_eq!(
            Digest::of_bytes(b"abc").as_str(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }
}
