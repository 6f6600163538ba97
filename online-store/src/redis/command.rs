//! What is sent for reads and writes, and what the answers mean.

use ::redis::{Cmd, Value};
use bytes::Bytes;
use feature_defs::time::{Micros, Position};
use feature_defs::value::{decode_i64, encode_i64};
use feature_defs::window::TileId;

use super::connection::Kind;
use super::nodes::Routed;
use super::slot::{COPY_TAGS, slot};
use crate::header::Header;
use crate::key::{FORMAT, Generation, Key};
use crate::row::{decode_position, encode_position};
use crate::{Answer, Read, StoreError, Write};

const HEADER_FIELD: &[u8] = b"h";

/// What a command is about, for errors.
pub(super) enum Name {
    /// The key in Redis.
    Key(Vec<u8>),
    Fact,
    Mark,
    Epoch,
    /// A further copy of a fact or a mark, which is not counted.
    Copy,
}

impl Name {
    pub(super) fn shown(&self) -> String {
        match self {
            Name::Key(key) => key.escape_ascii().to_string(),
            Name::Fact => format!("{FORMAT}:fact:*"),
            Name::Mark => format!("{FORMAT}:mark:*"),
            Name::Epoch => format!("{FORMAT}:epoch:*"),
            Name::Copy => format!("{FORMAT}:*"),
        }
    }
}

/// What a command is about, for its answer.
pub(super) struct About {
    pub(super) name: Name,
    /// Of its writer, where there is one.
    pub(super) epoch: u64,
    pub(super) slot: u16,
}

/// Commands that go in one round trip.
#[derive(Default)]
pub(super) struct Chunk {
    pub(super) commands: Vec<Routed>,
    pub(super) abouts: Vec<About>,
    pub(super) bytes: usize,
}

impl Chunk {
    /// Commands of one pipeline run even if an earlier one failed. A fact or a mark, such as a checkpoint, must not.
    pub(super) fn holds_back(&self, write: &Write) -> bool {
        matches!(write, Write::Fact(..) | Write::Mark(..))
            && self.abouts.iter().any(|about| matches!(about.name, Name::Key(_)))
    }

    pub(super) fn push(&mut self, write: Write, kind: Kind) {
        match write {
            Write::Row { key, blob, expires } => {
                let key = key.tagged();
                let mut command = Cmd::with_capacity(6, key.len() + blob.len() + 64);
                command.arg("FCALL").arg("coeval2_row").arg(1).arg(&key).arg(&blob[..]).arg(milliseconds(expires));
                self.add(command, slot(&key), Name::Key(key), 0);
            }
            Write::Tiles { key, position, epoch, set, remove, expires } => {
                let key = key.tagged();
                let bytes: usize = set.iter().map(|(_, tile)| tile.len() + 17).sum();
                let size = key.len() + bytes + 17 * remove.len() + 96;
                let mut command = Cmd::with_capacity(8 + 2 * set.len() + remove.len(), size);
                command.arg("FCALL").arg("coeval2_tiles").arg(1).arg(&key);
                let header = Header { position, epoch }.encode();
                let (position, epoch_bytes) = header.split_at(16);
                command.arg(position).arg(epoch_bytes).arg(milliseconds(expires)).arg(set.len());
                for (id, tile) in &set {
                    command.arg(&tile_field(id)[..]).arg(&tile[..]);
                }
                for id in &remove {
                    command.arg(&tile_field(id)[..]);
                }
                self.add(command, slot(&key), Name::Key(key), epoch);
            }
            Write::Remove(key) => {
                let key = key.tagged();
                let mut command = Cmd::new();
                command.arg("UNLINK").arg(&key);
                self.add(command, slot(&key), Name::Key(key), 0);
            }
            Write::Fact(name, value) => self.add_copies(kind, "fact", &name, Name::Fact, |command, key| {
                match &value {
                    Some(value) => command.arg("SET").arg(key).arg(&value[..]),
                    None => command.arg("DEL").arg(key),
                };
            }),
            Write::Mark(name, position) => self.add_mark(kind, "mark", &name, position),
        }
    }

    /// A mark of some kind: positions that never go back.
    pub(super) fn add_mark(&mut self, kind: Kind, of: &str, name: &str, position: Position) {
        let position = encode_position(position);
        self.add_copies(kind, of, name, Name::Mark, |command, key| {
            command.arg("FCALL").arg("coeval2_mark").arg(1).arg(key).arg(&position[..]);
        });
    }

    fn add_copies(&mut self, kind: Kind, of: &str, name: &str, first: Name, make: impl Fn(&mut Cmd, &[u8])) {
        let copies: Vec<Copy> = match kind {
            Kind::Alone => vec![None],
            Kind::Cluster => COPY_TAGS.iter().copied().map(Some).collect(),
        };
        let mut first = Some(first);
        for copy in copies {
            let mut command = Cmd::new();
            make(&mut command, &named(of, name, copy));
            self.add(command, copy.map_or(0, |(_, slot)| slot), first.take().unwrap_or(Name::Copy), 0);
        }
    }

    fn add(&mut self, command: Cmd, slot: u16, name: Name, epoch: u64) {
        let length = |argument| if let ::redis::Arg::Simple(bytes) = argument { <[u8]>::len(bytes) } else { 0 };
        self.bytes += command.args_iter().map(length).sum::<usize>();
        self.commands.push(Routed { command, slot });
        self.abouts.push(About { name, epoch, slot });
    }
}

/// Which copy of a fact: the number in its tag and its slot; None where there is one alone.
pub(super) type Copy = Option<(u32, u16)>;

/// The key of a fact, a mark or an epoch. No entity's key begins like this.
pub(super) fn named(of: &str, name: &str, copy: Copy) -> Vec<u8> {
    match copy {
        None => format!("{FORMAT}:{of}:{name}"),
        Some((number, _)) => format!("{FORMAT}:{of}:{{{number}}}{name}"),
    }
    .into_bytes()
}

/// Whether a read is of a fact or a mark.
pub(super) fn is_named(read: &Read) -> bool {
    matches!(read, Read::Fact(_) | Read::Mark(_))
}

/// The command of a read that is about an entity.
pub(super) fn entity_read(read: &Read) -> Option<Routed> {
    let (command, key) = match read {
        Read::Row(key) => {
            let key = key.tagged();
            let mut command = Cmd::with_capacity(2, key.len() + 3);
            command.arg("GET").arg(&key);
            (command, key)
        }
        Read::Tiles(key, ids) => {
            let key = key.tagged();
            let mut command = Cmd::with_capacity(3 + ids.len(), key.len() + 6 + 17 * ids.len());
            command.arg("HMGET").arg(&key).arg(HEADER_FIELD);
            for id in ids {
                command.arg(&tile_field(id)[..]);
            }
            (command, key)
        }
        Read::AllTiles(key) => {
            let key = key.tagged();
            let mut command = Cmd::with_capacity(2, key.len() + 7);
            command.arg("HGETALL").arg(&key);
            (command, key)
        }
        Read::Fact(_) | Read::Mark(_) => return None,
    };
    Some(Routed { command, slot: slot(&key) })
}

/// The commands of a read of a fact or a mark, one for each copy.
pub(super) fn add_named_reads(read: &Read, copies: &[Copy], commands: &mut Vec<Routed>) {
    match read {
        Read::Fact(name) => add_named("fact", name, copies, commands),
        Read::Mark(name) => add_named("mark", name, copies, commands),
        _ => {}
    }
}

pub(super) fn add_named(of: &str, name: &str, copies: &[Copy], commands: &mut Vec<Routed>) {
    for copy in copies {
        let mut command = Cmd::new();
        command.arg("GET").arg(named(of, name, *copy));
        commands.push(Routed { command, slot: copy.map_or(0, |(_, slot)| slot) });
    }
}

pub(super) fn name(read: &Read) -> Name {
    match read {
        Read::Row(key) | Read::Tiles(key, _) | Read::AllTiles(key) => Name::Key(key.tagged()),
        Read::Fact(_) => Name::Fact,
        Read::Mark(_) => Name::Mark,
    }
}

/// The answer to a read from the values of its commands, none of which is an error.
pub(super) fn answer(read: &Read, mut values: impl Iterator<Item = Value>) -> Result<Answer, StoreError> {
    let mut value = || values.next().unwrap_or(Value::Nil);
    match read {
        Read::Row(_) => Ok(Answer::Row(bytes(read, value())?)),
        Read::Fact(_) => {
            let mut fact = bytes(read, value())?;
            for other in values {
                if bytes(read, other)? != fact {
                    fact = None;
                }
            }
            Ok(Answer::Fact(fact))
        }
        Read::Mark(_) => {
            let mut least = mark(&Name::Mark, value())?;
            for other in values {
                let other = mark(&Name::Mark, other)?;
                least = least.zip(other).map(|(least, other)| least.min(other));
            }
            Ok(Answer::Mark(least))
        }
        Read::Tiles(key, ids) => {
            let values = match value() {
                Value::Array(values) => values,
                other => return Err(unexpected(&other, &name(read))),
            };
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
                ::redis::from_redis_value(value()).map_err(|error| corrupt(&name(read), &error.to_string()))?;
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

pub(super) fn mark(name: &Name, value: Value) -> Result<Option<Position>, StoreError> {
    let mark = match value {
        Value::Nil => return Ok(None),
        Value::BulkString(mark) => mark,
        value => return Err(unexpected(&value, name)),
    };
    match mark[..].try_into() {
        Ok(position) => Ok(Some(decode_position(position))),
        Err(_) => Err(corrupt(name, &format!("a mark of {} bytes, it should have 16", mark.len()))),
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

pub(super) fn corrupt(name: &Name, what: &str) -> StoreError {
    StoreError::Corrupt { key: name.shown(), what: what.to_owned() }
}

/// How the functions take an expiry: rounded up, because before it nothing may be forgotten, and positive, because Redis
/// takes nothing else.
fn milliseconds(expires: Option<Micros>) -> String {
    expires.map_or_else(String::new, |expires| (expires.div_euclid(1_000).saturating_add(1)).max(1).to_string())
}

/// An answer of a kind that the command never has.
pub(super) fn unexpected(answer: &Value, name: &Name) -> StoreError {
    let mut what = format!("the answer {answer:?}");
    what.truncate(what.floor_char_boundary(200));
    corrupt(name, &what)
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
pub(super) fn pattern(generation: &Generation) -> Vec<u8> {
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
mod tests {
    use super::*;

    #[test]
    fn patterns_take_names_literally() {
        let check = |project, view, expected: &str| {
            let pattern = pattern(&Generation::new(project, view, "00ff"));
            assert_eq!(String::from_utf8(pattern).unwrap(), expected);
        };
        check("p", "v", "c1:{p/*}v@00ff");
        check("nyc-flights", "a_b", r"c1:{nyc\-flights/*}a_b@00ff");
        check("p*", "v?[x]", r"c1:{p\*/*}v\?\[x\]@00ff");
    }

    #[test]
    fn expiries_are_rounded_up_and_positive() {
        assert_eq!(milliseconds(None), "");
        assert_eq!(milliseconds(Some(1_700_000_000_000_001)), "1700000000001");
        assert_eq!(milliseconds(Some(1_700_000_000_000_000)), "1700000000001");
        for past in [Micros::MIN, -1, 0] {
            assert_eq!(milliseconds(Some(past)), "1", "Redis takes no other past");
        }
    }

    #[test]
    fn kept_names_are_those_of_today() {
        use crate::formats::current;

        let id = TileId { level: 300_000_000, start: -300_000_000 };
        assert_eq!(tile_id(&current("redis_tile_field", &tile_field(&id))), Some(id));
        current("redis_fact", &named("fact", "ready/p/v@00", None));
        current("redis_mark", &named("mark", "departures", None));
        current("redis_epoch", &named("epoch", "departures", None));
        current("redis_cluster_fact", &named("fact", "ready/p/v@00", Some(COPY_TAGS[3])));
        let tags: Vec<String> = COPY_TAGS.iter().map(|(number, slot)| format!("{number} {slot}")).collect();
        current("redis_cluster_copies", tags.join(",").as_bytes());
    }
}
