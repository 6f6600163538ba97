//! Names and numbers of things in the control log, each a type of its own, so that a dataset id cannot be handed over
//! where a model name is meant. Names become parts of object paths and of messages, so they are checked once, when they
//! are parsed, also when they are read back from the log.

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Long enough for any name that a person writes, short enough for every object store's path limit.
const NAME_BYTES_MAX: usize = 128;

/// A text that does not keep the rules of the name it is meant to be.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("`{text}` cannot be a {what}: {problem}; {rule}")]
pub struct NameError {
    pub what: &'static str,
    pub text: String,
    pub problem: &'static str,
    pub rule: &'static str,
}

fn check_name(text: &str) -> Result<(), (&'static str, &'static str)> {
    const RULE: &str = "use letters, digits, `_`, `-` and `.`, beginning with a letter, a digit or `_`";
    let problem = if text.is_empty() {
        "it is empty"
    } else if text.len() > NAME_BYTES_MAX {
        "it is longer than 128 bytes"
    } else if !text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.')) {
        "it holds a character that is not allowed"
    } else if text.starts_with(['-', '.']) {
        "it begins with `-` or `.`"
    } else {
        return Ok(());
    };
    Err((problem, RULE))
}

/// Digests are made elsewhere and only compared here; all that is asked of them is that they are one printable word.
fn check_digest(text: &str) -> Result<(), (&'static str, &'static str)> {
    const RULE: &str = "use the digest that `coeval validate` prints";
    let problem = if text.is_empty() {
        "it is empty"
    } else if text.len() > NAME_BYTES_MAX {
        "it is longer than 128 bytes"
    } else if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        "it holds a character that is not printable"
    } else {
        return Ok(());
    };
    Err((problem, RULE))
}

fn check_sha256(text: &str) -> Result<(), (&'static str, &'static str)> {
    const RULE: &str = "use 64 lower-case hexadecimal digits";
    if text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
        Ok(())
    } else {
        Err(("it is not a SHA-256 digest", RULE))
    }
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $what:literal, $check:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            pub fn try_new(text: impl Into<String>) -> Result<Self, NameError> {
                let text = text.into();
                match $check(&text) {
                    Ok(()) => Ok(Self(text)),
                    Err((problem, rule)) => Err(NameError { what: $what, text, problem, rule }),
                }
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                Self::try_new(text)
            }
        }

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                Self::try_new(text)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        // So that maps keyed by the name can be asked with a plain text from a request.
        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str(&self.0)
            }
        }
    };
}

text_id!(
    /// The name of a project: the `project:` of its `coeval.yaml`.
    ProjectName,
    "project name",
    check_name
);
text_id!(
    /// The name of a feature service.
    ServiceName,
    "feature service name",
    check_name
);
text_id!(
    /// The name of a feature view.
    ViewName,
    "feature view name",
    check_name
);
text_id!(
    /// The name of a source.
    SourceName,
    "source name",
    check_name
);
text_id!(
    /// The name of a model; its versions are integers.
    ModelName,
    "model name",
    check_name
);
text_id!(
    /// The name of a flag.
    FlagName,
    "flag name",
    check_name
);
text_id!(
    /// The name of a dataset; several snapshots may bear it, each with an id of its own.
    DatasetName,
    "dataset name",
    check_name
);
text_id!(
    /// The id of one dataset snapshot.
    DatasetId,
    "dataset id",
    check_name
);
text_id!(
    /// Chosen at random by the writer of an entry, who knows its own entry by it.
    EntryId,
    "entry id",
    check_name
);
text_id!(
    /// One life of one gateway process: chosen when it starts.
    Incarnation,
    "gateway",
    check_name
);
text_id!(
    /// A digest of definitions (storage, semantic or catalog): opaque here, compared for equality only.
    Digest,
    "digest",
    check_digest
);
text_id!(
    /// The SHA-256 of stored bytes, in lower-case hexadecimal.
    Sha256,
    "SHA-256",
    check_sha256
);

text_id!(
    /// The name of an entity: a kind of thing that views are keyed by.
    EntityName,
    "entity name",
    check_name
);
text_id!(
    /// The keyed hash of an entity's key: opaque here.
    KeyHash,
    "hash of a key",
    check_sha256
);
text_id!(
    /// What keys hashes of keys, 32 random bytes in lower-case hexadecimal.
    Salt,
    "salt",
    check_sha256
);

impl Salt {
    pub fn random() -> Self {
        // Two random UUIDs are 244 random bits; hashed, they are evenly spread over all.
        let (first, second) = (uuid::Uuid::new_v4(), uuid::Uuid::new_v4());
        Self(Sha256::of(&[first.into_bytes(), second.into_bytes()].concat()).0)
    }
}

impl Incarnation {
    pub fn random() -> Self {
        Self(uuid::Uuid::new_v4().simple().to_string())
    }
}

impl EntryId {
    pub fn random() -> Self {
        Self(uuid::Uuid::new_v4().to_string())
    }
}

impl Sha256 {
    pub fn of(bytes: &[u8]) -> Self {
        use sha2::Digest as _;
        Self(format!("{:x}", sha2::Sha256::digest(bytes)))
    }
}

/// The version of a model: 1, 2, 3 and so on within its name, without holes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ModelVersion(pub u32);

impl ModelVersion {
    pub const FIRST: Self = Self(1);

    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for ModelVersion {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

/// The number of an entry in the control log: the first is 1, and there are no holes. Order is this number, not a clock.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EntryNumber(pub u64);

impl EntryNumber {
    /// The head of an empty log: no entry bears it.
    pub const NONE: Self = Self(0);
    pub const FIRST: Self = Self(1);

    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for EntryNumber {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

#[cfg(test)]
mod tests;
