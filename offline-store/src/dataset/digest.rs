//! A digest of a table's content, column by column over Arrow's own buffers.
//!
//! It depends on the rows and nothing else: not on how they are dealt into batches, not on how arrays are sliced, and not
//! on the bytes that lie under nulls. So every column is a few streams that only grow: where values are present (as runs of
//! row numbers, joined across batches), their bytes, the lengths of those that have one, and the columns inside.

use std::fmt::Write as _;
use std::ops::Range;

use arrow::array::{Array, ArrayRef, AsArray, OffsetSizeTrait, RecordBatch};
use arrow::buffer::NullBuffer;
use arrow::compute::cast;
use arrow::datatypes::{DataType, Schema};
use feature_defs::digest::Canonical;
use sha2::{Digest as _, Sha256};

/// A digest of the rows of `batches`, all of `schema`.
pub fn table_digest(schema: &Schema, batches: &[RecordBatch]) -> String {
    let mut whole = Canonical::new("table 2");
    for (index, field) in schema.fields().iter().enumerate() {
        whole.add("column", field.name());
        whole.add("type", field.data_type());
        let mut column = Column::new(field.data_type());
        for batch in batches {
            let array = batch.column(index);
            column.add(array, 0..array.len());
        }
        column.finish(&mut whole);
    }
    whole.digest().to_string()
}

/// One column, or a column inside one.
struct Column {
    rows: u64,
    /// The run of present values that may still grow.
    run: Range<u64>,
    runs: Sha256,
    values: Sha256,
    lengths: Sha256,
    /// What a column of another layout is read as.
    plain: Option<DataType>,
    children: Vec<Column>,
}

impl Column {
    fn new(data_type: &DataType) -> Column {
        let plain = match data_type {
            DataType::Dictionary(_, value) => Some(value.as_ref().clone()),
            DataType::RunEndEncoded(_, value) => Some(value.data_type().clone()),
            DataType::Utf8View => Some(DataType::LargeUtf8),
            DataType::BinaryView => Some(DataType::LargeBinary),
            DataType::ListView(item) => Some(DataType::List(item.clone())),
            DataType::LargeListView(item) => Some(DataType::LargeList(item.clone())),
            _ => None,
        };
        let children = match plain.as_ref().unwrap_or(data_type) {
            DataType::List(item)
            | DataType::LargeList(item)
            | DataType::FixedSizeList(item, _)
            | DataType::Map(item, _) => vec![Column::new(item.data_type())],
            DataType::Struct(fields) => fields.iter().map(|field| Column::new(field.data_type())).collect(),
            _ => Vec::new(),
        };
        Column {
            rows: 0,
            run: 0..0,
            runs: Sha256::new(),
            values: Sha256::new(),
            lengths: Sha256::new(),
            plain,
            children,
        }
    }

    fn add(&mut self, array: &ArrayRef, rows: Range<usize>) {
        let plain = match &self.plain {
            // A cast to the type that the values have anyway: it unfolds them and changes none.
            Some(plain) => match cast(&array.slice(rows.start, rows.len()), plain) {
                Ok(plain) => plain,
                Err(_) => return self.add_printed(array, rows),
            },
            None => return self.add_plain(array, rows),
        };
        let rows = 0..plain.len();
        self.add_plain(&plain, rows);
    }

    fn add_plain(&mut self, array: &ArrayRef, rows: Range<usize>) {
        let base = self.rows;
        self.rows += rows.len() as u64;
        let nulls = array.logical_nulls();
        let fixed = array.data_type().primitive_width().map(|width| (array.to_data(), width));
        for present in present(nulls.as_ref(), rows.clone()) {
            let begin = base + (present.start - rows.start) as u64;
            self.present(begin..begin + present.len() as u64);
            match &fixed {
                Some((data, width)) => {
                    let start = (data.offset() + present.start) * width;
                    self.values.update(&data.buffers()[0].as_slice()[start..start + present.len() * width]);
                }
                None => self.add_values(array, present),
            }
        }
    }

    /// Notes where values are; runs that touch are one, so that batches leave no trace.
    fn present(&mut self, run: Range<u64>) {
        if self.run.end == run.start && !self.run.is_empty() {
            self.run.end = run.end;
            return;
        }
        self.close_run();
        self.run = run;
    }

    fn close_run(&mut self) {
        if !self.run.is_empty() {
            self.runs.update(self.run.start.to_le_bytes());
            self.runs.update(self.run.end.to_le_bytes());
        }
    }

    /// Values, of no fixed width, of rows that are all present.
    fn add_values(&mut self, array: &ArrayRef, rows: Range<usize>) {
        match array.data_type() {
            DataType::Null => {}
            DataType::Boolean => {
                let values = array.as_boolean();
                let bytes: Vec<u8> = rows.map(|row| u8::from(values.value(row))).collect();
                self.values.update(&bytes);
            }
            DataType::Utf8 => {
                let strings = array.as_string::<i32>();
                self.add_bytes(strings.offsets(), strings.values(), rows);
            }
            DataType::LargeUtf8 => {
                let strings = array.as_string::<i64>();
                self.add_bytes(strings.offsets(), strings.values(), rows);
            }
            DataType::Binary => {
                let values = array.as_binary::<i32>();
                self.add_bytes(values.offsets(), values.values(), rows);
            }
            DataType::LargeBinary => {
                let values = array.as_binary::<i64>();
                self.add_bytes(values.offsets(), values.values(), rows);
            }
            DataType::FixedSizeBinary(_) => {
                let values = array.as_fixed_size_binary();
                rows.for_each(|row| self.values.update(values.value(row)));
            }
            DataType::List(_) => {
                let lists = array.as_list::<i32>();
                let items = self.add_lengths(lists.offsets(), rows);
                self.children[0].add(lists.values(), items);
            }
            DataType::LargeList(_) => {
                let lists = array.as_list::<i64>();
                let items = self.add_lengths(lists.offsets(), rows);
                self.children[0].add(lists.values(), items);
            }
            DataType::Map(..) => {
                let maps = array.as_map();
                let items = self.add_lengths(maps.offsets(), rows);
                let entries: ArrayRef = std::sync::Arc::new(maps.entries().clone());
                self.children[0].add(&entries, items);
            }
            DataType::FixedSizeList(_, _) => {
                let lists = array.as_fixed_size_list();
                let start = lists.value_offset(rows.start) as usize;
                let width = lists.value_length() as usize;
                self.children[0].add(lists.values(), start..start + rows.len() * width);
            }
            DataType::Struct(_) => {
                let fields = array.as_struct();
                for (child, column) in self.children.iter_mut().zip(fields.columns()) {
                    child.add(column, rows.clone());
                }
            }
            _ => self.add_printed_values(array, rows),
        }
    }

    fn add_bytes<O: OffsetSizeTrait>(&mut self, offsets: &[O], values: &[u8], rows: Range<usize>) {
        let bytes = self.add_lengths(offsets, rows);
        self.values.update(&values[bytes]);
    }

    /// Notes how long each row is and returns where their items lie.
    fn add_lengths<O: OffsetSizeTrait>(&mut self, offsets: &[O], rows: Range<usize>) -> Range<usize> {
        let mut lengths = Vec::with_capacity(rows.len() * 8);
        for bounds in offsets[rows.start..=rows.end].windows(2) {
            lengths.extend_from_slice(&((bounds[1] - bounds[0]).as_usize() as u64).to_le_bytes());
        }
        self.lengths.update(&lengths);
        offsets[rows.start].as_usize()..offsets[rows.end].as_usize()
    }

    /// Columns of types that are not ours only pass through; their printed form is enough to tell tables apart.
    fn add_printed(&mut self, array: &ArrayRef, rows: Range<usize>) {
        let base = self.rows;
        self.rows += rows.len() as u64;
        self.present(base..self.rows);
        self.add_printed_values(array, rows);
    }

    fn add_printed_values(&mut self, array: &ArrayRef, rows: Range<usize>) {
        for row in rows {
            let shown = arrow::util::display::array_value_to_string(array, row).unwrap_or_default();
            self.lengths.update((shown.len() as u64).to_le_bytes());
            self.values.update(shown.as_bytes());
        }
    }

    fn finish(mut self, whole: &mut Canonical) {
        self.close_run();
        whole.add("rows", self.rows);
        whole.add("present", hex(self.runs));
        whole.add("values", hex(self.values));
        whole.add("lengths", hex(self.lengths));
        whole.add("inside", self.children.len());
        self.children.into_iter().for_each(|child| child.finish(whole));
    }
}

/// The runs of rows that are not null.
fn present(nulls: Option<&NullBuffer>, rows: Range<usize>) -> Vec<Range<usize>> {
    match nulls {
        None if rows.is_empty() => Vec::new(),
        None => vec![rows],
        Some(nulls) => {
            let nulls = nulls.slice(rows.start, rows.len());
            nulls.valid_slices().map(|(start, end)| rows.start + start..rows.start + end).collect()
        }
    }
}

fn hex(hasher: Sha256) -> String {
    hasher.finalize().iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
