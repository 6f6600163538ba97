//! What one life of one gateway has counted, as bytes: written whole at every flush over what it wrote before, read and merged
//! by whoever judges. Cumulative, so a lost flush is mended by the next one, and what a killed gateway had not flushed is all that
//! is missing.

use thiserror::Error;

use super::exposure::Exposures;
use super::policy::BUCKETS;
use super::seen::{Seen, WORDS};
use super::tally::{Cell, Counts, METRICS_MAX, STEPS_MAX, Tally, Uncounted};

/// Ten thousand buckets of 64 steps with 32 metrics would be more; what is, is far less.
pub const BYTES_MAX: usize = 16 << 20;

const MAGIC: [u8; 4] = *b"CvRC";
const VERSION: u8 = 1;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    pub counts: Counts,
    pub seen: Seen,
}

#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SnapshotError {
    #[error("these bytes are no counts of a rollout")]
    Foreign,
    #[error("counts of a rollout in format {0} are from a newer build; judge with that one")]
    Newer(u8),
    #[error("counts of a rollout are damaged: {0}; the gateway writes them anew at its next flush")]
    Damaged(&'static str),
}

impl Snapshot {
    pub fn of(exposures: &Exposures) -> Snapshot {
        Snapshot { counts: exposures.counts().clone(), seen: exposures.seen().clone() }
    }

    /// What several gateways have counted.
    pub fn merge(&mut self, other: &Snapshot) {
        self.counts.merge(&other.counts);
        self.seen.merge(&other.seen);
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = [MAGIC.as_slice(), &[VERSION]].concat();
        let out = &mut bytes;
        let Uncounted { without_unit, repeated, full, elsewhere } = self.counts.uncounted;
        [without_unit, repeated, full, elsewhere].iter().for_each(|count| put(out, *count));
        put(out, self.counts.steps.len() as u64);
        for (step, cells) in &self.counts.steps {
            put(out, *step);
            put(out, cells.len() as u64);
            for (bucket, cell) in cells {
                put(out, u64::from(*bucket));
                put(out, cell.opened);
                for tallies in [&cell.fresh, &cell.moved] {
                    put(out, tallies.len() as u64);
                    tallies.iter().flat_map(Tally::parts).for_each(|part| put(out, part));
                }
            }
        }
        // A filter of few units is mostly zeros: runs of them are a number.
        let words: Vec<u64> = self.seen.clone().into();
        let mut words = words.as_slice();
        while !words.is_empty() {
            let zeros = words.iter().take_while(|word| **word == 0).count();
            let others = words[zeros..].iter().take_while(|word| **word != 0).count();
            put(out, zeros as u64);
            put(out, others as u64);
            for word in &words[zeros..zeros + others] {
                out.extend(word.to_le_bytes());
            }
            words = &words[zeros + others..];
        }
        bytes
    }

    pub fn decode(bytes: &[u8]) -> Result<Snapshot, SnapshotError> {
        let Some((head, rest)) = bytes.split_first_chunk::<5>() else { return Err(SnapshotError::Foreign) };
        match head {
            [a, b, c, d, _] if [*a, *b, *c, *d] != MAGIC => return Err(SnapshotError::Foreign),
            [.., version] if *version > VERSION => return Err(SnapshotError::Newer(*version)),
            _ => {}
        }
        if bytes.len() > BYTES_MAX {
            return Err(SnapshotError::Damaged("there are too many of them"));
        }
        let mut reader = Reader(rest);
        let uncounted = Uncounted {
            without_unit: reader.number()?,
            repeated: reader.number()?,
            full: reader.number()?,
            elsewhere: reader.number()?,
        };
        let mut counts = Counts { uncounted, ..Counts::default() };
        for _ in 0..reader.count(STEPS_MAX)? {
            let step = reader.number()?;
            let mut cells = std::collections::BTreeMap::new();
            for _ in 0..reader.count(usize::from(BUCKETS))? {
                let bucket = reader.count(usize::from(BUCKETS) - 1)? as u16;
                let opened = reader.number()?;
                let cell = Cell { opened, fresh: reader.tallies()?, moved: reader.tallies()? };
                cells.insert(bucket, cell);
            }
            counts.steps.insert(step, cells);
        }
        let mut words = Vec::new();
        while words.len() < WORDS {
            let zeros = reader.count(WORDS - words.len())?;
            words.resize(words.len() + zeros, 0);
            let others = reader.count(WORDS - words.len())?;
            if zeros + others == 0 {
                return Err(SnapshotError::Damaged("a run is empty"));
            }
            for _ in 0..others {
                words.push(reader.word()?);
            }
        }
        if !reader.0.is_empty() {
            return Err(SnapshotError::Damaged("something follows the end"));
        }
        let seen = Seen::try_from(words).map_err(|_| SnapshotError::Damaged("the filter is too large"))?;
        Ok(Snapshot { counts, seen })
    }
}

/// Seven bits a byte, the lowest first.
fn put(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn number(&mut self) -> Result<u64, SnapshotError> {
        let mut number = 0_u64;
        for shift in (0..64).step_by(7) {
            let Some((byte, rest)) = self.0.split_first() else {
                return Err(SnapshotError::Damaged("they end too early"));
            };
            self.0 = rest;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                break;
            }
            number |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err(SnapshotError::Damaged("a number is too long"))
    }

    fn count(&mut self, most: usize) -> Result<usize, SnapshotError> {
        let number = self.number()?;
        usize::try_from(number)
            .ok()
            .filter(|count| *count <= most)
            .ok_or(SnapshotError::Damaged("a number is larger than it can be"))
    }

    fn tallies(&mut self) -> Result<Vec<Tally>, SnapshotError> {
        let many = self.count(METRICS_MAX)?;
        let tally = |reader: &mut Self| {
            let parts = [reader.number()?, reader.number()?, reader.number()?];
            Tally::of_parts(parts).ok_or(SnapshotError::Damaged("outcomes are larger than they can be"))
        };
        (0..many).map(|_| tally(self)).collect()
    }

    fn word(&mut self) -> Result<u64, SnapshotError> {
        let (word, rest) = self.0.split_first_chunk::<8>().ok_or(SnapshotError::Damaged("they end too early"))?;
        self.0 = rest;
        Ok(u64::from_le_bytes(*word))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;
    use crate::sequential::exposure::{Arm, Exposure, Options};

    fn counted(units: u64, seed: u64) -> Snapshot {
        let mut exposures = Exposures::new(Options { window_us: 1, open_max: 1_000_000 });
        let mut random = Random::new(seed);
        for unit in 0..units {
            let bucket = random.below(10_000) as u16;
            let arm = if bucket < 2_500 { Arm::Challenger } else { Arm::Champion };
            let exposure = Exposure { unit: random.bits(), bucket, arm, step: 40 + unit % 2, now_us: unit as i64 * 2 };
            let outcomes = [(0, f64::from(u8::from(random.unit() < 0.01))), (1, 0.0), (2, random.unit())];
            exposures.record(exposure, &outcomes);
        }
        exposures.without_unit();
        exposures.close(i64::MAX);
        Snapshot::of(&exposures)
    }

    #[test]
    fn what_is_written_is_read_and_merges() {
        let (mut first, second) = (counted(3_000, 1), counted(5_000, 2));
        assert_eq!(Snapshot::decode(&first.encode()), Ok(first.clone()));
        assert_eq!(Snapshot::decode(&Snapshot::default().encode()), Ok(Snapshot::default()));
        first.merge(&second);
        assert_eq!(Snapshot::decode(&first.encode()), Ok(first.clone()));
        assert_eq!(first.counts.uncounted.without_unit, 2);
        let opened: u64 = [40, 41].map(|step| first.counts.total(step, |_| true).opened).iter().sum();
        assert_eq!(opened, 8_000);
    }

    /// Bytes that an earlier build has written.
    #[test]
    fn version_1_is_read() {
        let mut expected = Snapshot::default();
        expected.counts.uncounted = Uncounted { without_unit: 1, repeated: 300, full: 0, elsewhere: 2 };
        let cell = expected.counts.cell(7, 9_999).unwrap();
        cell.opened = 5;
        cell.tally(true, 1).add(0.5);
        cell.tally(false, 0).add(1.0);
        let head = b"CvRC\x01\x01\xac\x02\x00\x02\x01\x07\x01\x8f\x4e\x05";
        let tallies = b"\x02\x00\x00\x00\x01\x80\x80\x80\x04\x80\x80\x80\x02\x01\x01\x80\x80\x80\x08\x80\x80\x80\x08";
        let filter = b"\x80\x80\x01\x00";
        assert_eq!(Snapshot::decode(&[head.as_slice(), tallies, filter].concat()), Ok(expected.clone()));
        assert_eq!(expected.encode(), [head.as_slice(), tallies, filter].concat());
    }

    #[test]
    fn damage_is_told_and_never_panics() {
        assert_eq!(Snapshot::decode(b""), Err(SnapshotError::Foreign));
        assert_eq!(Snapshot::decode(b"PAR1\x01xxx"), Err(SnapshotError::Foreign));
        assert_eq!(Snapshot::decode(b"CvRC\x02"), Err(SnapshotError::Newer(2)));
        let bytes = counted(50, 3).encode();
        for end in 5..bytes.len() {
            assert!(Snapshot::decode(&bytes[..end]).is_err(), "{end}");
        }
        assert!(Snapshot::decode(&[bytes.as_slice(), b"x"].concat()).is_err());
        let mut random = Random::new(4);
        for _ in 0..20_000 {
            let mut bytes = bytes.clone();
            for _ in 0..3 {
                let at = random.below(bytes.len() as u64) as usize;
                bytes[at] = random.bits() as u8;
            }
            if let Ok(damaged) = Snapshot::decode(&bytes) {
                let mut merged = damaged.clone();
                merged.merge(&damaged);
                let _ = merged.counts.total(40, |_| true);
            }
        }
    }

    #[test]
    fn a_large_rollout_is_small_enough_to_write_at_every_flush() {
        let bytes = counted(100_000, 5).encode();
        assert!(bytes.len() < 900_000, "{}", bytes.len());
        assert!(counted(300, 6).encode().len() < 20_000);
    }
}
