//! Entities that were forgotten, as far as anything may know of them: keyed hashes of their keys.
//!
//! A hash has two parts. The first two bytes are a cheap hash that tells almost every other key from a forgotten one, so
//! that a row that was not forgotten costs some nanoseconds; the rest is of HMAC-SHA-256. Both are keyed by a random salt
//! of the project. Whoever has the salt and can guess a key can tell whether it was forgotten; nobody can read a key off.

use std::collections::{BTreeMap, HashSet};
use std::fmt::{self, Display, Write};
use std::str::FromStr;
use std::sync::{Arc, PoisonError, RwLock};

use sha2::{Digest as _, Sha256};

use crate::digest::Canonical;

pub const SALT_BYTES: usize = 32;
const HASH_BYTES: usize = 32;
const HINT_BYTES: usize = 2;

/// The keyed hash of one entity's name and key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyHash([u8; HASH_BYTES]);

impl KeyHash {
    /// `key` is the canonical encoding of the entity's key.
    pub fn of(salt: &[u8], entity: &str, key: &[u8]) -> KeyHash {
        let mut hash = [0; HASH_BYTES];
        hash[..HINT_BYTES].copy_from_slice(&hint(seed(salt, entity), key).to_be_bytes());
        hash[HINT_BYTES..].copy_from_slice(&keyed(salt, entity, key)[..HASH_BYTES - HINT_BYTES]);
        KeyHash(hash)
    }
}

impl Display for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&to_hex(&self.0))
    }
}

impl FromStr for KeyHash {
    type Err = String;

    fn from_str(text: &str) -> Result<KeyHash, String> {
        let bytes = from_hex(text).and_then(|bytes| bytes.try_into().ok());
        bytes.map(KeyHash).ok_or_else(|| format!("`{text}` is no hash of a key: it has not 64 hexadecimal digits"))
    }
}

pub fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a string cannot fail");
        text
    })
}

pub fn from_hex(text: &str) -> Option<Vec<u8>> {
    if !text.is_ascii() || !text.len().is_multiple_of(2) {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect()
}

/// Mixes the project and the entity in once, so that a row costs what its key is long.
fn seed(salt: &[u8], entity: &str) -> u64 {
    fnv(fnv(0xcbf2_9ce4_8422_2325, salt), entity.as_bytes())
}

fn fnv(seed: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(seed, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

/// FNV-1a, finished as MurmurHash3 does. It is stored, so it never changes.
fn hint(seed: u64, key: &[u8]) -> u16 {
    let mut hash = fnv(seed, key);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    (hash ^ (hash >> 33)) as u16
}

fn keyed(salt: &[u8], entity: &str, key: &[u8]) -> [u8; 32] {
    let length = (entity.len() as u64).to_be_bytes();
    hmac_sha256(salt, &[&length, entity.as_bytes(), key])
}

/// RFC 2104 over SHA-256.
fn hmac_sha256(secret: &[u8], parts: &[&[u8]]) -> [u8; 32] {
    const BLOCK_BYTES: usize = 64;
    let mut block = [0; BLOCK_BYTES];
    if secret.len() > BLOCK_BYTES {
        block[..32].copy_from_slice(&Sha256::digest(secret));
    } else {
        block[..secret.len()].copy_from_slice(secret);
    }
    let mut inner = Sha256::new();
    inner.update(block.map(|byte| byte ^ 0x36));
    parts.iter().for_each(|part| inner.update(part));
    let mut outer = Sha256::new();
    outer.update(block.map(|byte| byte ^ 0x5c));
    outer.update(inner.finalize());
    outer.finalize().into()
}

/// All entities of a project that were forgotten. Never changed, only replaced by a longer list.
#[derive(Debug, Clone, Default)]
pub struct Forgotten {
    salt: Vec<u8>,
    entities: BTreeMap<Arc<str>, Listed>,
}

#[derive(Debug, Clone)]
struct Listed {
    seed: u64,
    /// One bit per hint.
    hints: Box<[u64]>,
    hashes: HashSet<KeyHash>,
}

impl Listed {
    fn may_contain(&self, key: &[u8]) -> bool {
        let hint = usize::from(hint(self.seed, key));
        self.hints[hint / 64] >> (hint % 64) & 1 == 1
    }
}

impl Forgotten {
    pub fn new(salt: &[u8], listed: impl IntoIterator<Item = (Arc<str>, KeyHash)>) -> Forgotten {
        let mut forgotten = Forgotten { salt: salt.to_vec(), entities: BTreeMap::new() };
        for (entity, hash) in listed {
            let seed = seed(salt, &entity);
            let listed = forgotten.entities.entry(entity).or_insert_with(|| Listed {
                seed,
                hints: vec![0; (1 << (8 * HINT_BYTES)) / 64].into(),
                hashes: HashSet::new(),
            });
            let hint = usize::from(u16::from_be_bytes([hash.0[0], hash.0[1]]));
            listed.hints[hint / 64] |= 1 << (hint % 64);
            listed.hashes.insert(hash);
        }
        forgotten
    }

    pub fn is_empty(&self) -> bool {
        self.entities.is_empty()
    }

    pub fn len(&self) -> usize {
        self.entities.values().map(|listed| listed.hashes.len()).sum()
    }

    /// Whether any key of an entity was forgotten.
    pub fn mentions(&self, entity: &str) -> bool {
        self.entities.contains_key(entity)
    }

    pub fn hash(&self, entity: &str, key: &[u8]) -> KeyHash {
        KeyHash::of(&self.salt, entity, key)
    }

    pub fn contains(&self, entity: &str, key: &[u8]) -> bool {
        let listed = self.entities.get(entity).filter(|listed| listed.may_contain(key));
        listed.is_some_and(|listed| listed.hashes.contains(&self.hash(entity, key)))
    }

    /// The list with some entities only; for telling what is to do about these.
    pub fn only(&self, hashes: &[(Arc<str>, KeyHash)]) -> Forgotten {
        Forgotten::new(&self.salt, hashes.iter().cloned())
    }

    /// Of what is listed of these entities; None where nothing is.
    pub fn digest_of<'a>(&self, entities: impl Iterator<Item = &'a str>) -> Option<String> {
        let mut named: Vec<&str> = entities.filter(|entity| self.mentions(entity)).collect();
        named.sort_unstable();
        named.dedup();
        let mut text = Canonical::new("forgotten");
        for entity in &named {
            let mut hashes: Vec<&KeyHash> = self.entities.get(*entity).iter().flat_map(|l| &l.hashes).collect();
            hashes.sort_unstable();
            text.add("entity", entity);
            hashes.iter().for_each(|hash| text.add("key", hash));
        }
        (!named.is_empty()).then(|| text.digest().to_string())
    }
}

/// Where the views of a plan find the list. The plan is compiled once, and entities are forgotten while it is in use.
#[derive(Debug, Default)]
pub struct ForgottenList(RwLock<Option<Arc<Forgotten>>>);

impl ForgottenList {
    /// None while nothing was forgotten.
    pub fn get(&self) -> Option<Arc<Forgotten>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn set(&self, forgotten: &Arc<Forgotten>) {
        let listed = (!forgotten.is_empty()).then(|| forgotten.clone());
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = listed;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keyed_hash_is_hmac_sha_256() {
        // RFC 4231, test cases 2 and 6.
        let found = hmac_sha256(b"Jefe", &[b"what do ya want ", b"for nothing?"]);
        assert_eq!(to_hex(&found), "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
        let found = hmac_sha256(&[0xaa; 131], &[b"Test Using Larger Than Block-Size Key - Hash Key First"]);
        assert_eq!(to_hex(&found), "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54");
    }

    #[test]
    fn stored_hashes_never_change() {
        let hash = KeyHash::of(&[7; SALT_BYTES], "airport", b"\x01JFK\x00\x00");
        assert_eq!(hash.to_string().parse::<KeyHash>(), Ok(hash));
        assert_eq!(hash.to_string(), STORED);
        assert!("12".parse::<KeyHash>().is_err() && "é".repeat(32).parse::<KeyHash>().is_err());
    }

    const STORED: &str = "f4f30ccd0890d6222b8f98e8be90c2f59f454bc9a2bc194ed7b875ad1ccb8a6f";

    #[test]
    fn only_what_was_listed_is_contained() {
        let salt = [1; SALT_BYTES];
        let hash = |entity: &str, key: &[u8]| (Arc::<str>::from(entity), KeyHash::of(&salt, entity, key));
        let forgotten = Forgotten::new(&salt, [hash("shop", b"a"), hash("shop", b"b"), hash("till", b"a")]);
        assert!(
            forgotten.contains("shop", b"a") && forgotten.contains("shop", b"b") && forgotten.contains("till", b"a")
        );
        assert!(!forgotten.contains("till", b"b") && !forgotten.contains("other", b"a"));
        let others = (0..200_000u32).filter(|key| forgotten.contains("shop", &key.to_be_bytes()));
        assert_eq!(others.count(), 0);
        let hinted = (0..200_000u32).filter(|key| forgotten.entities["shop"].may_contain(&key.to_be_bytes())).count();
        assert!(hinted < 30, "about 6 of them pass the cheap test, {hinted} did");
        let other = Forgotten::new(&[2; SALT_BYTES], [hash("shop", b"a")]);
        assert!(!other.contains("shop", b"a"), "the salt counts");
        let list = ForgottenList::default();
        assert!(list.get().is_none());
        list.set(&Arc::new(Forgotten::default()));
        assert!(list.get().is_none());
        list.set(&Arc::new(forgotten.clone()));
        assert_eq!(list.get().map(|list| list.len()), Some(3));
        assert_eq!(forgotten.digest_of(["other"].into_iter()), None);
        assert_ne!(forgotten.digest_of(["till"].into_iter()), forgotten.digest_of(["shop", "till"].into_iter()));
    }
}
