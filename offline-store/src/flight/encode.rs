//! From record batches to Flight messages without copying them.
//!
//! The buffers of a batch are sent from where they lie: the message is written as frames of an HTTP/2 body, of which only
//! the small ones (headers, padding, validity) are gathered into one. The library's own encoder copies every buffer into
//! a message and the message into a frame.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use arrow::array::{Array, ArrayRef, RecordBatch, RecordBatchOptions};
use arrow::buffer::Buffer;
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow::error::ArrowError;
use arrow::ipc::CompressionType;
use arrow::ipc::writer::{IpcWriteOptions, StreamEncoder};
use arrow_flight::FlightData;
use bytes::{BufMut, Bytes, BytesMut};
use futures::stream::{BoxStream, Stream, StreamExt};
use http_body::Frame;
use prost::encoding::{WireType, encode_key, encode_varint};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tonic::Status;
use tonic::codegen::http::HeaderMap;

/// Buffers smaller than this are gathered: a frame of HTTP/2 costs more than the copy.
const GATHER_BYTES: usize = 16 << 10;
/// Messages are at most about this large: clients bound what they take.
const MESSAGE_BYTES: usize = 8 << 20;
/// Messages that are ready and wait for the network.
const MESSAGES_AHEAD: usize = 2;

/// One Flight message: the same as [`FlightData`], in pieces.
#[derive(Debug, Default)]
pub struct Message {
    header: Bytes,
    body: Vec<Bytes>,
    metadata: Bytes,
}

impl Message {
    /// A message without a batch.
    pub fn last(metadata: Bytes) -> Message {
        Message { metadata, ..Message::default() }
    }

    fn body_bytes(&self) -> usize {
        self.body.iter().map(Bytes::len).sum()
    }

    /// The message in one piece.
    pub fn into_flight_data(self) -> FlightData {
        let mut data_body = BytesMut::with_capacity(self.body_bytes());
        self.body.iter().for_each(|piece| data_body.put_slice(piece));
        FlightData {
            data_header: self.header,
            data_body: data_body.freeze(),
            app_metadata: self.metadata,
            flight_descriptor: None,
        }
    }

    /// The message as gRPC frames it: a flag, its length, and the fields of `FlightData`.
    fn into_frames(self) -> VecDeque<Bytes> {
        const HEADER: u32 = 2;
        const METADATA: u32 = 3;
        const BODY: u32 = 1000;
        let body_bytes = self.body_bytes();
        let mut fields = BytesMut::with_capacity(self.header.len() + self.metadata.len() + 32);
        for (number, value) in [(HEADER, &self.header), (METADATA, &self.metadata)] {
            if !value.is_empty() {
                encode_key(number, WireType::LengthDelimited, &mut fields);
                encode_varint(value.len() as u64, &mut fields);
                fields.put_slice(value);
            }
        }
        if body_bytes > 0 {
            encode_key(BODY, WireType::LengthDelimited, &mut fields);
            encode_varint(body_bytes as u64, &mut fields);
        }
        let mut gathered = BytesMut::with_capacity(5 + fields.len());
        gathered.put_u8(0);
        // Messages are far below 4 GiB: see MESSAGE_BYTES.
        gathered.put_u32((fields.len() + body_bytes) as u32);
        gathered.put_slice(&fields);
        let mut frames = VecDeque::new();
        for piece in self.body {
            if piece.len() < GATHER_BYTES {
                gathered.put_slice(&piece);
                continue;
            }
            if !gathered.is_empty() {
                frames.push_back(gathered.split().freeze());
            }
            frames.push_back(piece);
        }
        if !gathered.is_empty() {
            frames.push_back(gathered.freeze());
        }
        frames
    }
}

/// How the buffers of an answer are compressed.
pub fn compression(named: &str) -> Result<Option<CompressionType>, Status> {
    match named {
        "" | "none" => Ok(None),
        "lz4" => Ok(Some(CompressionType::LZ4_FRAME)),
        "zstd" => Ok(Some(CompressionType::ZSTD)),
        other => Err(Status::invalid_argument(format!("compression `{other}` is unknown; it is none, lz4 or zstd"))),
    }
}

/// What happens to each batch before it is sent.
pub type Change = Arc<dyn Fn(RecordBatch) -> Result<RecordBatch, Status> + Send + Sync>;

/// The messages of a stream of batches: the schema, then the batches as `change` leaves them. They are encoded on a
/// thread that may be kept busy, beside whatever makes the batches, and a few messages ahead of the network.
pub fn messages(
    schema: &SchemaRef,
    batches: BoxStream<'static, Result<RecordBatch, Status>>,
    change: Option<Change>,
    compression: Option<CompressionType>,
) -> Result<Messages, Status> {
    let schema = plain_schema(schema);
    let options = IpcWriteOptions::default().try_with_compression(compression).map_err(failed)?;
    let encoder = StreamEncoder::try_new_with_options(&schema, options).map_err(failed)?;
    let encode = Encode { encoder, schema, change, begun: false };
    let (sender, ready) = mpsc::channel(MESSAGES_AHEAD);
    let mut tasks = JoinSet::new();
    tasks.spawn(run(encode, batches, sender));
    Ok(Messages { ready, _tasks: tasks })
}

/// Messages as they are ready. Dropping it ends the work behind it.
pub struct Messages {
    ready: mpsc::Receiver<Result<Message, Status>>,
    _tasks: JoinSet<()>,
}

impl Stream for Messages {
    type Item = Result<Message, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.ready.poll_recv(context)
    }
}

struct Encode {
    encoder: StreamEncoder,
    schema: SchemaRef,
    change: Option<Change>,
    begun: bool,
}

async fn run(
    mut encode: Encode,
    batches: BoxStream<'static, Result<RecordBatch, Status>>,
    ready: mpsc::Sender<Result<Message, Status>>,
) {
    let mut batches = batches.fuse();
    loop {
        let batch = match batches.next().await {
            Some(Ok(batch)) => batch,
            Some(Err(status)) => {
                let _ = ready.send(Err(status)).await;
                return;
            }
            None if encode.begun => return,
            // Readers learn the columns of an answer without rows too.
            None => RecordBatch::new_empty(encode.schema.clone()),
        };
        let is_last = batch.num_rows() == 0 && !encode.begun && batch.schema_ref() == &encode.schema;
        let encoded = tokio::task::spawn_blocking(move || {
            let messages = if is_last { encode.first() } else { encode.batch(batch) };
            (messages, encode)
        });
        let messages = match encoded.await {
            Ok((messages, rest)) => {
                encode = rest;
                messages
            }
            Err(error) => {
                let _ = ready.send(Err(Status::internal(format!("encoding a batch broke: {error}")))).await;
                return;
            }
        };
        match messages {
            Ok(messages) => {
                for message in messages {
                    // The reader may be gone; then nobody misses the rest.
                    if ready.send(Ok(message)).await.is_err() {
                        return;
                    }
                }
            }
            Err(status) => {
                let _ = ready.send(Err(status)).await;
                return;
            }
        }
    }
}

impl Encode {
    /// The schema alone.
    fn first(&mut self) -> Result<Vec<Message>, Status> {
        let messages = self.encode(&RecordBatch::new_empty(self.schema.clone()))?;
        Ok(messages.into_iter().take(1).collect())
    }

    fn batch(&mut self, batch: RecordBatch) -> Result<Vec<Message>, Status> {
        let batch = match &self.change {
            Some(change) => change(batch)?,
            None => batch,
        };
        let batch = self.plain(batch)?;
        let size = |column: &ArrayRef| column.to_data().get_slice_memory_size().unwrap_or(MESSAGE_BYTES);
        let bytes: usize = batch.columns().iter().map(size).sum();
        let parts = bytes.div_ceil(MESSAGE_BYTES).clamp(1, batch.num_rows().max(1));
        let rows = batch.num_rows().div_ceil(parts).max(1);
        let mut messages = Vec::new();
        let mut at = 0;
        while at < batch.num_rows() {
            let count = rows.min(batch.num_rows() - at);
            messages.extend(self.encode(&batch.slice(at, count))?);
            at += count;
        }
        Ok(messages)
    }

    /// Dictionaries are unfolded: not every client keeps them across batches.
    fn plain(&self, batch: RecordBatch) -> Result<RecordBatch, Status> {
        if batch.schema_ref() == &self.schema {
            return Ok(batch);
        }
        let columns = batch.columns().iter().zip(self.schema.fields()).map(|(column, field)| {
            if column.data_type() == field.data_type() { Ok(column.clone()) } else { cast(column, field.data_type()) }
        });
        let columns = columns.collect::<Result<Vec<_>, _>>().map_err(failed)?;
        let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
        RecordBatch::try_new_with_options(self.schema.clone(), columns, &options).map_err(failed)
    }

    fn encode(&mut self, batch: &RecordBatch) -> Result<Vec<Message>, Status> {
        let buffers = self.encoder.encode(batch).map_err(failed)?;
        let mut buffers: VecDeque<Bytes> =
            buffers.into_iter().map(bytes_of).filter(|bytes| !bytes.is_empty()).collect();
        let mut messages = Vec::with_capacity(2);
        if !std::mem::replace(&mut self.begun, true) {
            // Schemas have no body.
            messages.push(Message { header: header(&mut buffers)?, ..Message::default() });
        }
        let header = header(&mut buffers)?;
        messages.push(Message { header, body: buffers.into(), metadata: Bytes::new() });
        Ok(messages)
    }
}

/// Takes the header of a message off an encapsulated one: a marker, a length, and that many bytes.
fn header(buffers: &mut VecDeque<Bytes>) -> Result<Bytes, Status> {
    let prefix = take(buffers, 8)?;
    let mut length = [0; 4];
    length.copy_from_slice(&prefix[4..8]);
    take(buffers, u32::from_le_bytes(length) as usize)
}

fn take(buffers: &mut VecDeque<Bytes>, length: usize) -> Result<Bytes, Status> {
    let mut taken = BytesMut::with_capacity(length);
    while taken.len() < length {
        let Some(mut first) = buffers.pop_front() else {
            return Err(Status::internal("an encoded batch is shorter than it says"));
        };
        let wanted = first.len().min(length - taken.len());
        taken.put_slice(&first.split_to(wanted));
        if !first.is_empty() {
            buffers.push_front(first);
        }
    }
    Ok(taken.freeze())
}

fn bytes_of(buffer: Buffer) -> Bytes {
    struct Owner(Buffer);
    impl AsRef<[u8]> for Owner {
        fn as_ref(&self) -> &[u8] {
            self.0.as_slice()
        }
    }
    Bytes::from_owner(Owner(buffer))
}

fn failed(error: ArrowError) -> Status {
    Status::internal(format!("a batch could not be encoded: {error}"))
}

/// The schema as it is sent.
pub fn plain_schema(schema: &SchemaRef) -> SchemaRef {
    if !schema.fields().iter().any(|field| matches!(field.data_type(), DataType::Dictionary(..))) {
        return schema.clone();
    }
    let fields = schema.fields().iter().map(|field| match field.data_type() {
        DataType::Dictionary(_, value) => Field::clone(field).with_data_type(value.as_ref().clone()),
        _ => Field::clone(field),
    });
    Arc::new(Schema::new_with_metadata(fields.collect::<Vec<_>>(), schema.metadata().clone()))
}

/// Messages as the body of a gRPC response.
pub struct Body {
    messages: BoxStream<'static, Result<Message, Status>>,
    frames: VecDeque<Bytes>,
    ended: bool,
}

impl Body {
    pub fn new(messages: BoxStream<'static, Result<Message, Status>>) -> Body {
        Body { messages, frames: VecDeque::new(), ended: false }
    }

    fn end(&mut self, status: &Status) -> Frame<Bytes> {
        self.ended = true;
        let mut trailers = HeaderMap::new();
        if status.add_header(&mut trailers).is_err() {
            // A text that no header can carry must not turn a failure into an end that looks well.
            let _ = Status::new(status.code(), "").add_header(&mut trailers);
        }
        Frame::trailers(trailers)
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        loop {
            if self.ended {
                return Poll::Ready(None);
            }
            if let Some(frame) = self.frames.pop_front() {
                return Poll::Ready(Some(Ok(Frame::data(frame))));
            }
            match self.messages.poll_next_unpin(context) {
                Poll::Ready(Some(Ok(message))) => self.frames = message.into_frames(),
                Poll::Ready(Some(Err(status))) => return Poll::Ready(Some(Ok(self.end(&status)))),
                Poll::Ready(None) => return Poll::Ready(Some(Ok(self.end(&Status::ok(""))))),
                Poll::Pending => return Poll::Pending,
            }
        }
    }
}
