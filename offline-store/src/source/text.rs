//! CSV and JSON lines, plain or compressed: cut into chunks of whole rows in order, decoded in parallel.
//!
//! A row ends at a line's end; in CSV not within quotes. Types that nobody declared are guessed from the beginning of a
//! file, and the rest is held to the guess: a value that is of another type is an error that names its line.

use std::io::Write;
use std::sync::Arc;

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::csv::reader::Format as CsvFormat;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow::error::ArrowError;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;

use super::{BATCH_ROWS, Compression, Damage, File, Format, OwnedFile, SourceError};

/// What is read at a time: of plain text one chunk, of compressed text what becomes a few. Tests cut more often.
const READ_BYTES: u64 = if cfg!(test) { 64 << 10 } else { 4 << 20 };
const READ_COMPRESSED_BYTES: u64 = 256 << 10;
/// Compressed bytes that are expanded at a time: a thousandfold of them still fits.
const EXPAND_BYTES: usize = 16 << 10;
/// Rows are held whole; one that is longer than this was never closed.
const ROW_BYTES_MAX: usize = 64 << 20;
/// What types are guessed from.
const SAMPLE_BYTES: usize = 1 << 20;
const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

/// Whole rows of a file.
#[derive(Debug)]
struct Chunk {
    bytes: Vec<u8>,
    /// The number of its first line in the file, from 1.
    line: u64,
    /// It begins with CSV's header.
    has_header: bool,
}

/// The columns of a file, with types as they are guessed from its first rows; null where there was no value to see.
pub async fn infer(file: &File<'_>) -> Result<SchemaRef, SourceError> {
    let owned = file.owned();
    let mut chunks = chunks(owned.clone(), SAMPLE_BYTES);
    let Some(chunk) = chunks.next().await.transpose()? else {
        return Err(file.damaged(Damage::Text("it is packed and has nothing in it".into())));
    };
    let bytes = without_mark(&chunk.bytes, chunk.line);
    let damaged = |what: String| file.damaged(Damage::Text(what));
    let schema = match file.format {
        Format::Csv => {
            let format = CsvFormat::default().with_header(true);
            match format.infer_schema(bytes, None) {
                Ok((schema, _)) => schema,
                // Inference does not say in which line it failed; decoding everything as text does.
                Err(error) => {
                    let header = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
                    let (header, _) = format.infer_schema(header, None).map_err(|error| damaged(error.to_string()))?;
                    let texts = header.fields().iter().map(|field| Field::new(field.name(), DataType::Utf8, true));
                    let texts = Schema::new(texts.collect::<Vec<_>>());
                    Decoder::new(file, &texts, &texts)?.decode(&chunk)?;
                    return Err(damaged(error.to_string()));
                }
            }
        }
        _ => {
            let text = bytes.trim_ascii_start();
            if text.starts_with(b"[") {
                return Err(damaged("it is one JSON array; write one object per line".into()));
            }
            arrow::json::reader::infer_json_schema(bytes, None)
                .map_err(|error| damaged(format!("its first lines are not one JSON object each: {error}")))?
                .0
        }
    };
    Ok(Arc::new(schema))
}

/// Batches with the named columns, of the types that `read` gives them, `parallel` chunks decoded at a time.
pub fn stream(
    file: &File<'_>,
    own: &Schema,
    read: &Schema,
    parallel: usize,
) -> Result<BoxStream<'static, Result<RecordBatch, SourceError>>, SourceError> {
    let decoder = Arc::new(Decoder::new(file, own, read)?);
    let batches = chunks(file.owned(), READ_BYTES as usize)
        .map(move |chunk| {
            let decoder = decoder.clone();
            async move {
                let chunk = chunk?;
                let work = decoder.clone();
                let decoded = tokio::task::spawn_blocking(move || work.decode(&chunk)).await;
                decoded.unwrap_or_else(|_| Err(decoder.file.damaged(Damage::Text("its text is damaged".into()))))
            }
        })
        .buffered(parallel.max(1))
        .map(|batches| match batches {
            Ok(batches) => futures::stream::iter(batches.into_iter().map(Ok).collect::<Vec<_>>()),
            Err(error) => futures::stream::iter(vec![Err(error)]),
        })
        .flatten();
    Ok(super::parquet::first_error_ends(batches.boxed()))
}

/// Decodes chunks of one file.
struct Decoder {
    file: OwnedFile,
    format: Format,
    /// CSV: every column of the file; JSON: those that are read.
    schema: SchemaRef,
    projection: Vec<usize>,
}

impl Decoder {
    fn new(file: &File<'_>, own: &Schema, read: &Schema) -> Result<Decoder, SourceError> {
        let wanted = |field: &Field| read.field_with_name(field.name()).ok().map(|wanted| wanted.data_type().clone());
        let mut fields = Vec::new();
        let mut projection = Vec::new();
        for field in own.fields() {
            match wanted(field) {
                Some(data_type) => {
                    if file.format == Format::Csv && data_type.is_nested() {
                        let what = format!("column `{}` is to be {data_type}, which CSV cannot hold", field.name());
                        return Err(file.damaged(Damage::Text(what)));
                    }
                    projection.push(fields.len());
                    fields.push(Field::new(field.name(), data_type, true));
                }
                None if file.format == Format::Csv => fields.push(Field::new(field.name(), DataType::Utf8, true)),
                None => {}
            }
        }
        Ok(Decoder { file: file.owned(), format: file.format, schema: Arc::new(Schema::new(fields)), projection })
    }

    fn decode(&self, chunk: &Chunk) -> Result<Vec<RecordBatch>, SourceError> {
        let rows = without_mark(&chunk.bytes, chunk.line);
        self.rows(rows, chunk.has_header, &self.schema, &self.projection).map_err(|error| self.locate(chunk, &error))
    }

    fn rows(
        &self,
        mut rows: &[u8],
        has_header: bool,
        schema: &SchemaRef,
        projection: &[usize],
    ) -> Result<Vec<RecordBatch>, ArrowError> {
        let mut batches = Vec::new();
        match self.format {
            Format::Csv => {
                let mut decoder = arrow::csv::ReaderBuilder::new(schema.clone())
                    .with_header(has_header)
                    .with_projection(projection.to_vec())
                    .with_batch_size(BATCH_ROWS)
                    .build_decoder();
                loop {
                    let read = decoder.decode(rows)?;
                    rows = &rows[read..];
                    // The decoder takes the end of its input for the end of the last row.
                    if read == 0 || decoder.capacity() == 0 {
                        match decoder.flush()? {
                            Some(batch) => batches.push(batch),
                            None if read == 0 => return Ok(batches),
                            None => {}
                        }
                    }
                }
            }
            _ => {
                let schema = Arc::new(schema.project(projection)?);
                let mut decoder =
                    arrow::json::ReaderBuilder::new(schema).with_batch_size(BATCH_ROWS).build_decoder()?;
                loop {
                    let read = decoder.decode(rows)?;
                    rows = &rows[read..];
                    match decoder.flush()? {
                        Some(batch) => batches.push(batch),
                        None if read == 0 => return Ok(batches),
                        None => {}
                    }
                }
            }
        }
    }

    /// Which line and column an error is about: halves the rows of the chunk until the first that fails is left.
    fn locate(&self, chunk: &Chunk, error: &ArrowError) -> SourceError {
        let text = without_mark(&chunk.bytes, chunk.line);
        let mut scanner = Scanner::new(self.format);
        let mut starts = vec![0];
        while let Some(end) = scanner.first_end(&text[starts[starts.len() - 1]..]) {
            starts.push(starts[starts.len() - 1] + end);
        }
        if starts[starts.len() - 1] < text.len() {
            starts.push(text.len());
        }
        let row = |index: usize| &text[starts[index]..starts[index + 1]];
        let (mut first, mut end) = (0, starts.len() - 1);
        if chunk.has_header {
            first = (0..end).find(|index| !row(*index).trim_ascii().is_empty()).map_or(end, |index| index + 1);
        }
        let fails = |first: usize, end: usize| {
            self.rows(&text[starts[first]..starts[end]], false, &self.schema, &self.projection).is_err()
        };
        if first >= end || !fails(first, end) {
            return self.file.damaged(Damage::Text(error.to_string()));
        }
        while end - first > 1 {
            let middle = first + (end - first) / 2;
            if fails(first, middle) { end = middle } else { first = middle }
        }
        let lines = text[..starts[first]].iter().filter(|byte| **byte == b'\n').count() as u64;
        self.value(chunk.line + lines, row(first))
    }

    fn value(&self, line: u64, row: &[u8]) -> SourceError {
        let wrong = |column: Option<&Field>, found: String| match column {
            Some(field) => SourceError::Value {
                path: self.file.shown.clone(),
                line,
                column: field.name().clone(),
                value: shortened(&found),
                wanted: field.data_type().clone(),
            },
            None => SourceError::Row { path: self.file.shown.clone(), line, what: found },
        };
        let texts: Vec<Field> =
            self.schema.fields().iter().map(|field| Field::new(field.name(), DataType::Utf8, true)).collect();
        let texts = Arc::new(Schema::new(texts));
        let all: Vec<usize> = (0..texts.fields().len()).collect();
        for index in &self.projection {
            let failed = self.rows(row, false, &self.schema, &[*index]).is_err();
            let field = self.schema.field(*index);
            if !failed {
                continue;
            }
            if self.format == Format::Json {
                let value = serde_json::from_slice::<serde_json::Value>(row).ok();
                if let Some(value) = value.and_then(|row| row.get(field.name()).cloned()) {
                    return wrong(Some(field), value.to_string());
                }
                continue;
            }
            if let Ok(batches) = self.rows(row, false, &texts, &all)
                && let Some(batch) = batches.first()
            {
                let column = batch.column(*index).as_string::<i32>();
                let value = if column.is_valid(0) { column.value(0) } else { "" };
                return wrong(Some(field), value.to_owned());
            }
        }
        let what = match self.format {
            Format::Csv if std::str::from_utf8(row).is_err() => "is not UTF-8".to_owned(),
            Format::Csv => format!("has not the {} fields that the header has", self.schema.fields().len()),
            _ => "is no JSON object".to_owned(),
        };
        wrong(None, what)
    }
}

fn without_mark(bytes: &[u8], line: u64) -> &[u8] {
    if line == 1 { bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes) } else { bytes }
}

fn shortened(text: &str) -> String {
    const CHARACTERS: usize = 60;
    match text.char_indices().nth(CHARACTERS) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

/// The rows of a file from its beginning, in chunks that are a little larger than what is read at once.
fn chunks(file: OwnedFile, chunk_bytes: usize) -> BoxStream<'static, Result<Chunk, SourceError>> {
    let start = Cutter {
        scanner: Scanner::new(file.format),
        expander: Expander::new(file.compression),
        file,
        chunk_bytes,
        offset: 0,
        pending: Vec::new(),
        scanned: 0,
        cut: 0,
        line: 1,
        at_end: false,
    };
    futures::stream::try_unfold(
        start,
        |mut cutter| async move { Ok(cutter.next().await?.map(|chunk| (chunk, cutter))) },
    )
    .boxed()
}

/// Reads a file and cuts it where rows end.
struct Cutter {
    file: OwnedFile,
    chunk_bytes: usize,
    scanner: Scanner,
    expander: Expander,
    /// How much of the file was read.
    offset: u64,
    pending: Vec<u8>,
    /// How much of `pending` the scanner saw, and where the last row in it ended.
    scanned: usize,
    cut: usize,
    line: u64,
    at_end: bool,
}

impl Cutter {
    async fn next(&mut self) -> Result<Option<Chunk>, SourceError> {
        loop {
            if let Some(end) = self.scanner.last_end(&self.pending[self.scanned..]) {
                self.cut = self.scanned + end;
            }
            self.scanned = self.pending.len();
            if self.at_end {
                if self.scanner.is_open() {
                    return Err(self
                        .unclosed("opens a quote that is never closed; the file was cut off, or a quote is missing"));
                }
                self.cut = self.pending.len();
            }
            if self.cut > 0 && (self.at_end || self.pending.len() >= self.chunk_bytes) {
                let rest = self.pending.split_off(self.cut);
                let bytes = std::mem::replace(&mut self.pending, rest);
                let line = self.line;
                self.line += bytes.iter().filter(|byte| **byte == b'\n').count() as u64;
                self.scanned = self.pending.len();
                self.cut = 0;
                return Ok(Some(Chunk { bytes, line, has_header: line == 1 && self.file.format == Format::Csv }));
            }
            if self.at_end {
                return Ok(None);
            }
            if self.pending.len() - self.cut > ROW_BYTES_MAX {
                return Err(self.unclosed("is longer than 64 MiB; is a quote or a line's end missing?"));
            }
            self.read().await?;
        }
    }

    fn unclosed(&self, what: &str) -> SourceError {
        let lines = self.pending[..self.cut].iter().filter(|byte| **byte == b'\n').count() as u64;
        SourceError::Row { path: self.file.shown.clone(), line: self.line + lines, what: what.to_owned() }
    }

    async fn read(&mut self) -> Result<(), SourceError> {
        let size = self.file.meta.size;
        let step = if self.file.compression == Compression::None { READ_BYTES } else { READ_COMPRESSED_BYTES };
        let end = size.min(self.offset + step.min(self.chunk_bytes as u64));
        if self.offset == end {
            self.at_end = true;
            return self.expander.finish(&mut self.pending).map_err(|error| self.file.compressed(error));
        }
        let bytes = self.file.range(self.offset..end).await?;
        self.offset = end;
        self.expander.push(&bytes, &mut self.pending).map_err(|error| self.file.compressed(error))
    }
}

/// Makes plain text of what is in a file.
enum Expander {
    Plain,
    Gzip(Box<flate2::write::MultiGzDecoder<Vec<u8>>>),
    Zstd(Option<Box<zstd::stream::write::Decoder<'static, Vec<u8>>>>),
}

impl Expander {
    fn new(compression: Compression) -> Expander {
        match compression {
            Compression::None => Expander::Plain,
            Compression::Gzip => Expander::Gzip(Box::new(flate2::write::MultiGzDecoder::new(Vec::new()))),
            Compression::Zstd => Expander::Zstd(zstd::stream::write::Decoder::new(Vec::new()).ok().map(Box::new)),
        }
    }

    fn push(&mut self, bytes: &Bytes, text: &mut Vec<u8>) -> std::io::Result<()> {
        for piece in bytes.chunks(EXPAND_BYTES) {
            match self {
                Expander::Plain => text.extend_from_slice(piece),
                Expander::Gzip(decoder) => {
                    decoder.write_all(piece)?;
                    text.append(decoder.get_mut());
                }
                Expander::Zstd(decoder) => {
                    let decoder = decoder.as_mut().ok_or_else(|| std::io::Error::other("out of memory"))?;
                    decoder.write_all(piece)?;
                    text.append(decoder.get_mut());
                }
            }
        }
        Ok(())
    }

    fn finish(&mut self, text: &mut Vec<u8>) -> std::io::Result<()> {
        match self {
            Expander::Plain => {}
            Expander::Gzip(decoder) => {
                decoder.try_finish()?;
                text.append(decoder.get_mut());
            }
            Expander::Zstd(decoder) => {
                if let Some(decoder) = decoder.take() {
                    text.extend(decoder.finish()?);
                }
            }
        }
        Ok(())
    }
}

/// Finds where rows end.
struct Scanner {
    format: Format,
    state: State,
}

/// Where in a row of CSV: quotes count at the beginning of a field only, as its readers have it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Field,
    Plain,
    Quoted,
    /// After a quote within quotes: the end of them, or half of an escaped quote.
    Quote,
}

impl Scanner {
    fn new(format: Format) -> Scanner {
        Scanner { format, state: State::Field }
    }

    /// Within quotes.
    fn is_open(&self) -> bool {
        self.state == State::Quoted
    }

    /// Looks at more text; says behind which byte of it the last row ends.
    fn last_end(&mut self, text: &[u8]) -> Option<usize> {
        if self.format != Format::Csv {
            return text.iter().rposition(|byte| *byte == b'\n').map(|at| at + 1);
        }
        let mut last = None;
        for (at, byte) in text.iter().enumerate() {
            if self.step(*byte) {
                last = Some(at + 1);
            }
        }
        last
    }

    /// Behind which byte the first row ends.
    fn first_end(&mut self, text: &[u8]) -> Option<usize> {
        if self.format != Format::Csv {
            return text.iter().position(|byte| *byte == b'\n').map(|at| at + 1);
        }
        text.iter().position(|byte| self.step(*byte)).map(|at| at + 1)
    }

    fn step(&mut self, byte: u8) -> bool {
        self.state = match (self.state, byte) {
            (State::Quoted, b'"') => State::Quote,
            (State::Quoted, _) => State::Quoted,
            (State::Field, b'"') => State::Quoted,
            (State::Quote, b'"') => State::Quoted,
            (_, b',' | b'\r') => State::Field,
            (_, b'\n') => {
                self.state = State::Field;
                return true;
            }
            _ => State::Plain,
        };
        false
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    #[test]
    fn rows_end_where_readers_of_csv_say() {
        let check = |text: &str, expected: &[usize]| {
            let mut scanner = Scanner::new(Format::Csv);
            let ends: Vec<usize> =
                text.bytes().enumerate().filter(|(_, byte)| scanner.step(*byte)).map(|(at, _)| at + 1).collect();
            assert_eq!(ends, expected, "{text:?}");
            // However the text comes in pieces.
            for cut in 0..text.len() {
                let mut scanner = Scanner::new(Format::Csv);
                let first = scanner.last_end(&text.as_bytes()[..cut]);
                let second = scanner.last_end(&text.as_bytes()[cut..]).map(|end| end + cut);
                assert_eq!(second.or(first), expected.last().copied(), "{text:?} at {cut}");
            }
        };
        check("a,b\n1,2\n", &[4, 8]);
        check("\"a\n\",b\n", &[7]);
        check("\"a\"\"\n\",b\r\n", &[10]);
        check("5\" pipe,1\nx,2\n", &[10, 14]);
        check("a,\"b\nc", &[]);
    }
}
