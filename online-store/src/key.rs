//! Keys: format, project, view, storage digest, entity bytes.
//!
//! Text form in Redis: `c1:{<project>/<entity bytes>}<view>@<digest>`. The braces are a cluster hash tag, so all views of
//! one entity lie on one slot. A `}` among the entity bytes ends the tag early, which moves the entity to another slot and
//! changes nothing else: the tag is still a function of project and entity alone, and never empty.

use std::fmt;
use std::sync::Arc;

/// One generation of one view: what its stored bytes mean.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Generation {
    pub project: Arc<str>,
    pub view: Arc<str>,
    /// The first 16 hexadecimal digits of the view's storage digest.
    pub digest: Arc<str>,
}

/// One entity of one generation.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    pub generation: Generation,
    /// The canonical encodings of the key values, one after the other; empty for the entity without keys.
    pub entity: Box<[u8]>,
}

/// Version of the layout of keys; the first characters of every key.
pub const FORMAT: &str = "c1";

impl Generation {
    pub fn new(project: &str, view: &str, storage_digest: &str) -> Generation {
        let digest = &storage_digest[..storage_digest.len().min(16)];
        Generation { project: project.into(), view: view.into(), digest: digest.into() }
    }

    pub fn key(&self, entity: impl Into<Box<[u8]>>) -> Key {
        Key { generation: self.clone(), entity: entity.into() }
    }

    /// The name of the fact that says this generation is complete.
    pub fn ready_fact(&self) -> String {
        format!("ready/{}/{}@{}", self.project, self.view, self.digest)
    }
}

impl Key {
    /// The bytes under which hash-tagged stores keep the entity.
    pub fn tagged(&self) -> Vec<u8> {
        let Generation { project, view, digest } = &self.generation;
        let mut bytes = Vec::with_capacity(8 + project.len() + self.entity.len() + view.len() + digest.len());
        bytes.extend_from_slice(FORMAT.as_bytes());
        bytes.extend_from_slice(b":{");
        bytes.extend_from_slice(project.as_bytes());
        bytes.push(b'/');
        bytes.extend_from_slice(&self.entity);
        bytes.push(b'}');
        bytes.extend_from_slice(view.as_bytes());
        bytes.push(b'@');
        bytes.extend_from_slice(digest.as_bytes());
        bytes
    }

    /// The bytes under which sorted stores keep the entity: all entities of a generation are neighbours, and no key is a
    /// prefix of another's (names hold no zero byte, and the length of the entity comes before it).
    pub fn sorted(&self) -> Vec<u8> {
        let mut bytes = self.generation.sorted_prefix();
        bytes.extend_from_slice(&(self.entity.len() as u32).to_be_bytes());
        bytes.extend_from_slice(&self.entity);
        bytes
    }
}

impl Generation {
    /// What every [`Key::sorted`] of the generation begins with.
    pub fn sorted_prefix(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for part in [FORMAT, &self.project, &self.view, &self.digest] {
            bytes.extend_from_slice(part.as_bytes());
            bytes.push(0);
        }
        bytes
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Generation { project, view, digest } = &self.generation;
        write!(f, "{project}/{view}@{digest}/{}", self.entity.escape_ascii())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_never_meet() {
        let generation = Generation::new("p", "view", "0123456789abcdef0123");
        assert_eq!(generation.digest.as_ref(), "0123456789abcdef");
        let keys = [
            generation.key(*b"ab"),
            generation.key(*b"a"),
            generation.key(*b"a\0\0\0\x01"),
            generation.key([]),
            Generation::new("p", "view2", "0123456789abcdef").key(*b"a"),
            Generation::new("p2", "view", "0123456789abcdef").key(*b"a"),
            Generation::new("p", "view", "1123456789abcdef").key(*b"a"),
        ];
        for (i, a) in keys.iter().enumerate() {
            for (j, b) in keys.iter().enumerate() {
                assert_eq!(a.tagged() == b.tagged(), i == j);
                assert_eq!(a.sorted() == b.sorted(), i == j);
                assert!(i == j || !b.sorted().starts_with(&a.sorted()));
            }
        }
    }

    #[test]
    fn all_views_of_an_entity_share_a_tag() {
        let tag = |key: Key| {
            let bytes = key.tagged();
            let open = bytes.iter().position(|byte| *byte == b'{').unwrap();
            let close = open + bytes[open..].iter().position(|byte| *byte == b'}').unwrap();
            bytes[open + 1..close].to_vec()
        };
        for entity in [&b"JFK"[..], b"", b"a}b", b"}"] {
            let a = tag(Generation::new("p", "v", "00").key(entity));
            let b = tag(Generation::new("p", "w", "11").key(entity));
            assert_eq!(a, b);
            assert!(!a.is_empty());
        }
    }

    #[test]
    fn kept_keys_are_those_of_today() {
        let key = Generation::new("shop-1", "last_sale", "0123456789abcdef0123").key(*b"a\0}\xff");
        crate::formats::current("key_tagged", &key.tagged());
        crate::formats::current("key_sorted", &key.sorted());
    }
}
