//! Where a source row lies, and sets of such places.

use arrow::buffer::{BooleanBuffer, Buffer};

use super::files::Files;

/// A row of a source: its row group among all of the source's, its row in it, and whether it is a tombstone. One word, so
/// that a slot's candidate is small.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place(u64);

const DELETED: u64 = 1 << 63;

impl Place {
    /// No row.
    pub const NONE: Place = Place(u64::MAX);

    #[inline]
    pub fn new(unit: u32, row: u32, deleted: bool) -> Place {
        Place(u64::from(unit) << 32 | u64::from(row) | if deleted { DELETED } else { 0 })
    }

    pub fn unit(self) -> usize {
        ((self.0 & !DELETED) >> 32) as usize
    }

    pub fn row(self) -> usize {
        self.0 as u32 as usize
    }

    pub fn is_deleted(self) -> bool {
        self.0 & DELETED != 0
    }
}

/// A set of rows of a source, one bit each, that knows how many of them come before each.
#[derive(Debug)]
pub struct Marks {
    words: Vec<u64>,
    /// First word of each unit, and the end.
    starts: Vec<usize>,
    rows: Vec<usize>,
    /// Rows marked before each word; filled by [`Marks::count`].
    before: Vec<u32>,
    marked: usize,
}

impl Marks {
    pub fn new(files: &Files) -> Marks {
        let rows: Vec<usize> = files.units().iter().map(|unit| unit.rows).collect();
        let mut starts = vec![0];
        for rows in &rows {
            starts.push(starts[starts.len() - 1] + rows.div_ceil(64));
        }
        Marks { words: vec![0; starts[rows.len()]], starts, rows, before: Vec::new(), marked: 0 }
    }

    /// Bytes that the marks of a source take.
    pub fn bytes(files: &Files) -> usize {
        files.rows().div_ceil(64) * 12
    }

    #[inline]
    pub fn mark(&mut self, place: Place) {
        let row = place.row();
        self.words[self.starts[place.unit()] + row / 64] |= 1 << (row % 64);
    }

    /// Counts what is marked; after it, nothing is marked any more.
    pub fn count(&mut self) {
        self.before = Vec::with_capacity(self.words.len());
        let mut marked = 0u32;
        for word in &self.words {
            self.before.push(marked);
            marked += word.count_ones();
        }
        self.marked = marked as usize;
    }

    pub fn marked(&self) -> usize {
        self.marked
    }

    /// How many marked rows come before a place.
    #[inline]
    pub fn rank(&self, place: Place) -> u32 {
        let (word, bit) = (self.starts[place.unit()] + place.row() / 64, place.row() % 64);
        self.before[word] + (self.words[word] & ((1 << bit) - 1)).count_ones()
    }

    pub fn of_unit(&self, unit: usize) -> BooleanBuffer {
        let words = &self.words[self.starts[unit]..self.starts[unit + 1]];
        BooleanBuffer::new(Buffer::from_slice_ref(words), 0, self.rows[unit])
    }

    pub fn any_in_unit(&self, unit: usize) -> bool {
        self.words[self.starts[unit]..self.starts[unit + 1]].iter().any(|word| *word != 0)
    }
}
