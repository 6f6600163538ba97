//! Counts of numbered things: the buckets of a sketch or a histogram.

use crate::value::DecodeError;

use super::varint;

/// A count for each number that has one. A group: what was merged can be taken out again, even before.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counts {
    /// Ascending by number; no count is zero.
    entries: Vec<(i32, i64)>,
}

impl Counts {
    pub fn push(&mut self, number: i32) {
        match self.entries.binary_search_by_key(&number, |(number, _)| *number) {
            Ok(at) => {
                self.entries[at].1 = self.entries[at].1.wrapping_add(1);
                if self.entries[at].1 == 0 {
                    self.entries.remove(at);
                }
            }
            Err(at) => self.entries.insert(at, (number, 1)),
        }
    }

    pub fn merge(&mut self, other: &Counts) {
        self.combine(other, i64::wrapping_add);
    }

    pub fn unmerge(&mut self, other: &Counts) {
        self.combine(other, i64::wrapping_sub);
    }

    fn combine(&mut self, other: &Counts, combine: impl Fn(i64, i64) -> i64) {
        // One event is most of what is merged while a window moves.
        if let [(number, count)] = other.entries[..] {
            match self.entries.binary_search_by_key(&number, |(number, _)| *number) {
                Ok(at) => {
                    self.entries[at].1 = combine(self.entries[at].1, count);
                    if self.entries[at].1 == 0 {
                        self.entries.remove(at);
                    }
                }
                Err(at) => self.entries.insert(at, (number, combine(0, count))),
            }
            return;
        }
        let mut combined = Vec::with_capacity(self.entries.len() + other.entries.len());
        let (mut mine, mut others) = (self.entries.iter().peekable(), other.entries.iter().peekable());
        loop {
            let number = match (mine.peek(), others.peek()) {
                (Some((a, _)), Some((b, _))) => *a.min(b),
                (Some((number, _)), None) | (None, Some((number, _))) => *number,
                (None, None) => break,
            };
            let take = |entry: Option<&(i32, i64)>| entry.map_or(0, |(_, count)| *count);
            let own = take(mine.next_if(|(own, _)| *own == number));
            let count = combine(own, take(others.next_if(|(other, _)| *other == number)));
            if count != 0 {
                combined.push((number, count));
            }
        }
        self.entries = combined;
    }

    /// Numbers and their counts, ascending. None for a state that is not settled: one in debt.
    pub fn settled(&self) -> Option<&[(i32, i64)]> {
        self.entries.iter().all(|(_, count)| *count > 0).then_some(&self.entries[..])
    }

    // The encoding: varint(entries), then for each: the distance of its number from the last (the first one zigzag, the
    // others less 1), and its count, zigzag.

    pub fn encode(&self, out: &mut Vec<u8>) {
        varint::encode_u64(self.entries.len() as u64, out);
        let mut last: Option<i32> = None;
        for (number, count) in &self.entries {
            match last {
                None => varint::encode_i64(i64::from(*number), out),
                Some(last) => varint::encode_u64((i64::from(*number) - i64::from(last) - 1) as u64, out),
            }
            varint::encode_i64(*count, out);
            last = Some(*number);
        }
    }

    /// `is_number` says which numbers there are.
    pub fn decode(bytes: &mut &[u8], is_number: impl Fn(i32) -> bool) -> Result<Counts, DecodeError> {
        let length = varint::decode_u64(bytes)?;
        let mut entries: Vec<(i32, i64)> = Vec::new();
        for _ in 0..length {
            let number = match entries.last() {
                None => varint::decode_i64(bytes)?,
                Some((last, _)) => i64::try_from(varint::decode_u64(bytes)?)
                    .ok()
                    .and_then(|distance| distance.checked_add(i64::from(*last) + 1))
                    .unwrap_or(i64::MAX),
            };
            let number = i32::try_from(number).ok().filter(|number| is_number(*number));
            let number = number.ok_or(DecodeError::Invalid("a count is of no bucket of its aggregate"))?;
            let count = varint::decode_i64(bytes)?;
            if count == 0 {
                return Err(DecodeError::Invalid("a count of zero is kept"));
            }
            entries.push((number, count));
        }
        Ok(Counts { entries })
    }
}
