//! Counts of values by bin and bucket of blocks: the state that serving keeps, and the reference a training set leaves.
//!
//! Rows that came from the same source row, or the same day, are not independent, and how far apart two distributions are
//! by chance depends on it. So every count is kept by *bucket*: the blocks of rows are spread over 64 buckets, and what
//! differs between buckets says how noisy the sum is (see `noise`). That is all a resampling of whole blocks needs, in a
//! state of fixed size that merges by addition: a block that several replicas saw adds up in one bucket.

use serde::{Deserialize, Serialize};

use crate::DriftError;
use crate::distinct::Distinct;
use crate::layout::Layout;
use crate::moments::Moments;
use crate::number::{self, Number};
use crate::random::{hash, mix};

/// Buckets of blocks: as many as tell a variance within a fifth, and few enough that counts stay in the nearest cache.
pub const BUCKETS: usize = 64;

/// The format of stored profiles and counts.
pub const FORMAT: u32 = 1;

/// The bucket of a block that is named by a key: the hash of the source row that the value came from.
#[inline]
pub fn bucket_of_row(id: u64) -> u8 {
    (mix(id ^ 0x6275_636b_6574_7321) >> 58) as u8
}

/// The bucket of a day, or of any numbered span of time: neighbours never share one.
#[inline]
pub fn bucket_of_day(day: i64) -> u8 {
    day.rem_euclid(BUCKETS as i64) as u8
}

/// What became of a row's value, beside the value. Bits of [`Rows::flags`].
pub struct Flag;

impl Flag {
    /// The declared default stands in for it.
    pub const DEFAULTED: u8 = 1;
    /// It is older than the declared freshness.
    pub const STALE: u8 = 2;
    /// The store or the model did not answer in time, and a fallback stands in.
    pub const FALLBACK: u8 = 4;
}

/// Which rows have a value.
#[derive(Debug, Clone, Copy)]
pub enum Validity<'a> {
    All,
    /// A bitmap as Arrow has it: bit `offset + i`, lowest first, is set where row `i` has a value.
    Bitmap {
        bytes: &'a [u8],
        offset: usize,
    },
}

/// What rows have in common whatever the type of their values.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// The bucket of each row's block; as many as there are rows. Only the lowest six bits count.
    pub buckets: &'a [u8],
    pub validity: Validity<'a>,
    /// Bits of [`Flag`] for each row; none where all values are plain.
    pub flags: Option<&'a [u8]>,
}

/// What a row is counted as: exactly one of the first five. `Stale` is counted beside them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Value,
    Null,
    NotANumber,
    Defaulted,
    Fallback,
    Stale,
}

pub const OUTCOMES: usize = 6;

/// How often each outcome came, by bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcomes(pub(crate) Vec<u64>);

impl Default for Outcomes {
    fn default() -> Outcomes {
        Outcomes(vec![0; BUCKETS * OUTCOMES])
    }
}

impl Outcomes {
    #[inline(always)]
    fn add(&mut self, bucket: usize, outcome: Outcome) {
        self.0[bucket * OUTCOMES + outcome as usize] += 1;
    }

    pub fn total(&self, outcome: Outcome) -> u64 {
        self.0.iter().skip(outcome as usize).step_by(OUTCOMES).sum()
    }

    pub fn rows(&self) -> u64 {
        self.0.chunks(OUTCOMES).map(|bucket| bucket[..OUTCOMES - 1].iter().sum::<u64>()).sum()
    }

    pub(crate) fn merge(&mut self, other: &Outcomes) {
        add(&mut self.0, &other.0);
    }

    /// Sorts rows into outcomes, and hands those that have a value to `take`. Inlined, so that the loop is one.
    #[inline(always)]
    pub(crate) fn sort(
        &mut self,
        rows: &Rows<'_>,
        range: std::ops::Range<usize>,
        is_nan: impl Fn(usize) -> bool,
        mut take: impl FnMut(usize, usize, bool),
    ) {
        for i in range {
            let bucket = usize::from(rows.buckets[i]) % BUCKETS;
            let flags = rows.flags.map_or(0, |flags| flags[i]);
            let valid = match rows.validity {
                Validity::All => true,
                Validity::Bitmap { bytes, offset } => bytes[(offset + i) / 8] >> ((offset + i) % 8) & 1 == 1,
            };
            let outcome = if flags & Flag::FALLBACK != 0 {
                Outcome::Fallback
            } else if flags & Flag::DEFAULTED != 0 {
                Outcome::Defaulted
            } else if !valid {
                Outcome::Null
            } else if is_nan(i) {
                Outcome::NotANumber
            } else {
                Outcome::Value
            };
            self.add(bucket, outcome);
            if flags & Flag::STALE != 0 {
                self.add(bucket, Outcome::Stale);
            }
            take(i, bucket, outcome == Outcome::Value);
        }
    }
}

/// The counts of one distribution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    pub(crate) bins: usize,
    /// `bins` counts for each bucket.
    pub(crate) cells: Vec<u64>,
    pub moments: Moments,
    pub distinct: Distinct,
}

impl Part {
    fn new(bins: usize) -> Part {
        Part { bins, cells: vec![0; bins * BUCKETS], moments: Moments::default(), distinct: Distinct::default() }
    }

    #[inline(always)]
    pub(crate) fn count(&mut self, bucket: usize, bin: u8) {
        self.cells[bucket * self.bins + usize::from(bin)] += 1;
    }

    /// Counts by bucket and bin: as many as there are bins for each bucket.
    pub fn cells(&self) -> &[u64] {
        &self.cells
    }

    /// Counts by bin, over all buckets.
    pub fn totals(&self) -> Vec<u64> {
        let mut totals = vec![0; self.bins];
        self.cells.chunks(self.bins.max(1)).for_each(|bucket| add(&mut totals, bucket));
        totals
    }

    fn merge(&mut self, other: &Part) {
        add(&mut self.cells, &other.cells);
        self.moments.merge(&other.moments);
        self.distinct.merge(&other.distinct);
    }
}

fn add(into: &mut [u64], other: &[u64]) {
    into.iter_mut().zip(other).for_each(|(count, other)| *count = count.saturating_add(*other));
}

/// Counts over the bins of one layout. Merging adds, so it is associative and commutative, and nothing is rounded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Stored", into = "Stored")]
pub struct Counts {
    layout: u64,
    pub(crate) outcomes: Outcomes,
    pub(crate) parts: Vec<Part>,
}

/// Rows are worked on in pieces of this size, so that what lies between the loops stays in the nearest cache.
pub(crate) const PIECE: usize = 256;

impl Counts {
    pub fn new(layout: &Layout) -> Counts {
        let parts = (0..layout.parts()).map(|part| Part::new(layout.bins(part))).collect();
        Counts { layout: layout.digest(), outcomes: Outcomes::default(), parts }
    }

    pub fn outcomes(&self) -> &Outcomes {
        &self.outcomes
    }

    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Whether these are counts over the bins of `layout`.
    pub fn fits(&self, layout: &Layout) -> bool {
        self.layout == layout.digest()
            && self.parts.len() == layout.parts()
            && self.parts.iter().enumerate().all(|(i, part)| part.bins == layout.bins(i))
    }

    pub fn merge(&mut self, other: &Counts) -> Result<(), DriftError> {
        let shapes = |counts: &Counts| counts.parts.iter().map(|part| part.bins).collect::<Vec<_>>();
        if self.layout != other.layout || shapes(self) != shapes(other) {
            return Err(DriftError::OtherLayout);
        }
        self.outcomes.merge(&other.outcomes);
        self.parts.iter_mut().zip(&other.parts).for_each(|(part, other)| part.merge(other));
        Ok(())
    }

    pub(crate) fn parts_mut(&mut self) -> (&mut Outcomes, &mut [Part]) {
        (&mut self.outcomes, &mut self.parts)
    }
}

/// A layout, and counts that fit it: the comparison of digests is paid once, not for each batch.
#[derive(Debug, Clone)]
pub struct Counter {
    layout: std::sync::Arc<Layout>,
    counts: Counts,
}

impl Counter {
    pub fn new(layout: std::sync::Arc<Layout>) -> Counter {
        Counter { counts: Counts::new(&layout), layout }
    }

    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// What was counted since the last time, for whoever sums up: a flush.
    pub fn take(&mut self) -> Counts {
        std::mem::replace(&mut self.counts, Counts::new(&self.layout))
    }

    /// Numbers; of times, the ages at their requests (see [`Layout::Ordered`]).
    pub fn add_numbers<T: Number>(&mut self, values: &[T], rows: &Rows<'_>) -> Result<(), DriftError> {
        let Layout::Ordered { scale, edges } = &*self.layout else {
            return Err(self.wrong_kind("numbers"));
        };
        if *scale != T::SCALE {
            return Err(self.wrong_kind("numbers of another type"));
        }
        rows.check(values.len())?;
        let (outcomes, parts) = self.counts.parts_mut();
        let [part] = parts else { return Err(DriftError::OtherLayout) };
        let mut taken = [T::default(); PIECE];
        let (mut keys, mut buckets, mut bins) = ([0; PIECE], [0_u8; PIECE], [0_u8; PIECE]);
        for from in (0..values.len()).step_by(PIECE) {
            let range = from..(from + PIECE).min(values.len());
            let mut count = 0;
            outcomes.sort(
                rows,
                range,
                |i| values[i].is_nan(),
                |i, bucket, has_value| {
                    // Written always, kept where there is a value: no branch.
                    let place = count % PIECE;
                    (taken[place], keys[place], buckets[place]) = (values[i], values[i].key(), bucket as u8);
                    count += usize::from(has_value);
                },
            );
            edges.find(&keys[..count], &mut bins[..count]);
            for (bucket, bin) in buckets[..count].iter().zip(&bins[..count]) {
                part.count(usize::from(*bucket), *bin);
            }
            T::add(&mut part.moments, taken[..count].iter().copied());
            part.distinct.add(keys[..count].iter().map(|key| mix(*key as u64)));
        }
        Ok(())
    }

    /// Texts or bytes, one for each row; what stands where there is no value is passed over.
    pub fn add_texts<'a>(
        &mut self,
        values: impl ExactSizeIterator<Item = &'a [u8]>,
        rows: &Rows<'_>,
    ) -> Result<(), DriftError> {
        let Layout::Categories(categories) = &*self.layout else {
            return Err(self.wrong_kind("categories"));
        };
        rows.check(values.len())?;
        let (outcomes, parts) = self.counts.parts_mut();
        let [part] = parts else { return Err(DriftError::OtherLayout) };
        let mut values = values;
        let (mut hashes, mut buckets, mut bins) = ([0_u64; PIECE], [0_u8; PIECE], [0_u8; PIECE]);
        for from in (0..rows.buckets.len()).step_by(PIECE) {
            let range = from..(from + PIECE).min(rows.buckets.len());
            let mut count = 0;
            outcomes.sort(
                rows,
                range,
                |_| false,
                |_, bucket, has_value| {
                    let value = values.next().unwrap_or_default();
                    if has_value {
                        let place = count % PIECE;
                        (hashes[place], buckets[place]) = (hash(value), bucket as u8);
                        count += 1;
                    }
                },
            );
            hashes[..count].iter().zip(&mut bins).for_each(|(hash, bin)| *bin = categories.find(*hash));
            for (bucket, bin) in buckets[..count].iter().zip(&bins[..count]) {
                part.count(usize::from(*bucket), *bin);
            }
            part.distinct.add(hashes[..count].iter().copied());
        }
        Ok(())
    }

    /// Vectors, one after the other.
    pub fn add_vectors(&mut self, values: &[f32], rows: &Rows<'_>) -> Result<(), DriftError> {
        let Layout::Vectors(vectors) = &*self.layout else {
            return Err(self.wrong_kind("vectors"));
        };
        let dimension = vectors.directions.dimension();
        rows.check_length(values.len(), rows.buckets.len().saturating_mul(dimension))?;
        rows.check(rows.buckets.len())?;
        let (outcomes, parts) = self.counts.parts_mut();
        let mut numbers = vec![0.0; parts.len()];
        for i in 0..rows.buckets.len() {
            let measured = vectors.directions.measure(&values[i * dimension..(i + 1) * dimension], &mut numbers);
            outcomes.sort(
                rows,
                i..i + 1,
                |_| !measured,
                |_, bucket, has_value| {
                    for ((part, edges), number) in
                        parts.iter_mut().zip(&vectors.edges).zip(&numbers).filter(|_| has_value)
                    {
                        let (key, mut bin) = (number::key(*number), [0]);
                        edges.find(&[key], &mut bin);
                        part.count(bucket, bin[0]);
                        part.moments.add_f64([*number].into_iter());
                        part.distinct.add([mix(key as u64)].into_iter());
                    }
                },
            );
        }
        Ok(())
    }

    /// Rows of a feature whose values are not looked at, or of any feature whose rows have none.
    pub fn add_presence(&mut self, rows: &Rows<'_>) -> Result<(), DriftError> {
        if !matches!(*self.layout, Layout::Presence) {
            return Err(self.wrong_kind("presence"));
        }
        rows.check(rows.buckets.len())?;
        self.counts.outcomes.sort(rows, 0..rows.buckets.len(), |_| false, |_, _, _| ());
        Ok(())
    }

    fn wrong_kind(&self, given: &'static str) -> DriftError {
        DriftError::WrongKind { profiled: self.layout.name(), given }
    }
}

impl Rows<'_> {
    /// Whether everything is there for `rows` rows.
    pub(crate) fn check(&self, rows: usize) -> Result<(), DriftError> {
        self.check_length(self.buckets.len(), rows)?;
        self.check_length(self.flags.map_or(rows, <[u8]>::len), rows)?;
        match self.validity {
            Validity::All => Ok(()),
            Validity::Bitmap { bytes, offset } => {
                let bits = offset.saturating_add(rows);
                if bits <= bytes.len().saturating_mul(8) { Ok(()) } else { self.check_length(bytes.len() * 8, bits) }
            }
        }
    }

    fn check_length(&self, given: usize, wanted: usize) -> Result<(), DriftError> {
        if given == wanted { Ok(()) } else { Err(DriftError::Length { given, wanted }) }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    format: u32,
    layout: u64,
    outcomes: Vec<u64>,
    parts: Vec<StoredPart>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredPart {
    bins: usize,
    cells: Vec<u64>,
    moments: Moments,
    distinct: Distinct,
}

impl From<Counts> for Stored {
    fn from(counts: Counts) -> Stored {
        let parts = counts.parts.into_iter().map(|part| {
            let Part { bins, cells, moments, distinct } = part;
            StoredPart { bins, cells, moments, distinct }
        });
        Stored { format: FORMAT, layout: counts.layout, outcomes: counts.outcomes.0, parts: parts.collect() }
    }
}

impl TryFrom<Stored> for Counts {
    type Error = String;

    fn try_from(stored: Stored) -> Result<Counts, String> {
        check_format(stored.format)?;
        if stored.outcomes.len() != BUCKETS * OUTCOMES {
            return Err("some counts do not have the outcomes of every bucket".into());
        }
        let parts = stored.parts.into_iter().map(|part| {
            let StoredPart { bins, cells, moments, distinct } = part;
            if bins == 0 || bins > 256 || cells.len() != bins * BUCKETS {
                return Err("some counts do not have the bins of every bucket".to_owned());
            }
            Ok(Part { bins, cells, moments, distinct })
        });
        let parts: Vec<Part> = parts.collect::<Result<_, _>>()?;
        Ok(Counts { layout: stored.layout, outcomes: Outcomes(stored.outcomes), parts })
    }
}

pub(crate) fn check_format(format: u32) -> Result<(), String> {
    if format == FORMAT {
        return Ok(());
    }
    Err(format!(
        "profiles and counts of format {format} are not of format {FORMAT}, which this release reads: use one that wrote them"
    ))
}

#[cfg(test)]
mod tests;
