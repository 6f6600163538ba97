//! Arrow IPC files (`.arrow`, `.feather`, `.ipc`): a footer that names blocks, read block by block.

use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::buffer::Buffer;
use arrow::datatypes::{Schema, SchemaRef};
use arrow::ipc::convert::fb_to_schema;
use arrow::ipc::reader::FileDecoder;
use arrow::ipc::{Block, MetadataVersion, root_as_footer};
use futures::StreamExt;
use futures::stream::BoxStream;

use super::{Damage, File, OwnedFile, SourceError};

const MAGIC: &[u8] = b"ARROW1";
/// Length and magic.
const TRAILER_BYTES: u64 = 10;
/// Larger blocks than this are no batches but a mistake.
const BLOCK_BYTES_MAX: u64 = 2 << 30;

/// What a file's footer says.
#[derive(Debug, Clone)]
pub struct Footer {
    pub schema: SchemaRef,
    version: MetadataVersion,
    dictionaries: Vec<Block>,
    batches: Vec<Block>,
}

pub async fn footer(file: &File<'_>) -> Result<Footer, SourceError> {
    let size = file.meta.size;
    let damaged = |what: &str| file.damaged(Damage::Text(what.to_owned()));
    let head = file.range(0..size.min(8)).await?;
    if head.starts_with(b"FEA1") {
        return Err(damaged("it is a Feather file of version 1; write it as version 2"));
    }
    if !head.starts_with(MAGIC) {
        let stream = "it does not begin as an Arrow file does; streams of Arrow are to be written as files";
        return Err(damaged(stream));
    }
    let Some(end) = size.checked_sub(TRAILER_BYTES) else { return Err(damaged("it was cut off")) };
    let trailer = file.range(end..size).await?;
    if !trailer.ends_with(MAGIC) {
        return Err(damaged("it does not end as an Arrow file does; it was cut off"));
    }
    let length = trailer[..4].iter().rev().fold(0, |length, byte| length << 8 | u64::from(*byte));
    let Some(start) = end.checked_sub(length) else {
        return Err(damaged("its footer states more bytes than the file has"));
    };
    let bytes = file.range(start..end).await?;
    let parsed = std::panic::catch_unwind(|| parse(&bytes, start));
    match parsed {
        Ok(Ok(footer)) => Ok(footer),
        Ok(Err(what)) => Err(file.damaged(Damage::Text(what))),
        Err(_) => Err(damaged("its footer is damaged")),
    }
}

fn parse(bytes: &[u8], blocks_end: u64) -> Result<Footer, String> {
    let footer = root_as_footer(bytes).map_err(|error| error.to_string())?;
    let schema = footer.schema().ok_or("its footer has no schema")?;
    let blocks = |blocks: Option<Vec<Block>>| -> Result<Vec<Block>, String> {
        let blocks = blocks.unwrap_or_default();
        for block in &blocks {
            range(block).filter(|(_, end)| *end <= blocks_end).ok_or("a block of it lies beyond its end")?;
        }
        Ok(blocks)
    };
    Ok(Footer {
        schema: Arc::new(fb_to_schema(schema)),
        version: footer.version(),
        dictionaries: blocks(footer.dictionaries().map(|blocks| blocks.iter().copied().collect()))?,
        batches: blocks(footer.recordBatches().map(|blocks| blocks.iter().copied().collect()))?,
    })
}

fn range(block: &Block) -> Option<(u64, u64)> {
    let start = u64::try_from(block.offset()).ok()?;
    let metadata = u64::try_from(block.metaDataLength()).ok()?;
    let length = metadata.checked_add(u64::try_from(block.bodyLength()).ok()?)?;
    (length <= BLOCK_BYTES_MAX).then_some(())?;
    Some((start, start.checked_add(length)?))
}

/// Batches with the named columns as the file has them.
pub async fn stream(
    file: &File<'_>,
    columns: &Schema,
) -> Result<BoxStream<'static, Result<RecordBatch, SourceError>>, SourceError> {
    let footer = footer(file).await?;
    let projection: Vec<usize> = footer
        .schema
        .fields()
        .iter()
        .enumerate()
        .filter(|(_, field)| columns.column_with_name(field.name()).is_some())
        .map(|(index, _)| index)
        .collect();
    let mut decoder = FileDecoder::new(footer.schema.clone(), footer.version).with_projection(projection);
    let owned = file.owned();
    for block in &footer.dictionaries {
        let buffer = read(&owned, block).await?;
        decoder = decode(&owned, move || decoder.read_dictionary(block, &buffer).map(|()| decoder))?;
    }
    let decoder = Arc::new(decoder);
    let batches = futures::stream::iter(footer.batches).then(move |block| {
        let (owned, decoder) = (owned.clone(), decoder.clone());
        async move {
            let buffer = read(&owned, &block).await?;
            decode(&owned, || decoder.read_record_batch(&block, &buffer))
        }
    });
    let batches = batches.filter_map(|batch| futures::future::ready(batch.transpose()));
    Ok(super::parquet::first_error_ends(batches.boxed()))
}

async fn read(file: &OwnedFile, block: &Block) -> Result<Buffer, SourceError> {
    let Some((start, end)) = range(block) else {
        return Err(file.damaged(Damage::Text("a block of it has no sensible length".into())));
    };
    Ok(Buffer::from(file.range(start..end).await?))
}

fn decode<T>(file: &OwnedFile, decode: impl FnOnce() -> Result<T, arrow::error::ArrowError>) -> Result<T, SourceError> {
    let damage = match std::panic::catch_unwind(std::panic::AssertUnwindSafe(decode)) {
        Ok(Ok(decoded)) => return Ok(decoded),
        Ok(Err(error)) => Damage::Error(Box::new(error)),
        Err(_) => Damage::Text("a block of it is damaged".into()),
    };
    Err(file.damaged(damage))
}
