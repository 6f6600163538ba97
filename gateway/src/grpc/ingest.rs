//! Events in: pushes, materialization, flush.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use arrow::array::{ArrayRef, RecordBatch, RecordBatchOptions};
use arrow::datatypes::{Field, Schema};
use feature_defs::plan::{Plan, SourcePlan};
use feature_defs::value::Type;
use futures::{Stream, StreamExt};
use proto::v1;
use proto::v1::ingest_server::Ingest as IngestService;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::answer::Gateway;
use crate::convert;
use crate::events::{Events, EventsError, Mode, Progress, TableDone, TableProgress, Wait};
use crate::roles::Role;
use crate::status::{Failure, Kind, not_known};

/// Answers that wait for a slow reader. Beyond them the stream is not read on, and the client's own window fills.
const ANSWERS_MAX: usize = 16;
/// Events in one message.
const EVENTS_MAX: usize = 100_000;

pub struct Ingest {
    gateway: Arc<Gateway>,
}

impl Ingest {
    pub fn new(gateway: Arc<Gateway>) -> Ingest {
        Ingest { gateway }
    }
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl IngestService for Ingest {
    type PushStream = Answers<v1::PushResponse>;

    async fn push(
        &self,
        request: Request<Streaming<v1::PushRequest>>,
    ) -> Result<Response<Answers<v1::PushResponse>>, Status> {
        let gateway = self.gateway.clone();
        events(&gateway)?;
        let mut pushes = request.into_inner();
        let (sender, answers) = mpsc::channel(ANSWERS_MAX);
        // One message after the other: the log's order within a stream is the order of its messages.
        tokio::spawn(async move {
            loop {
                let message = tokio::select! {
                    biased;
                    () = gateway.drain.cancelled() => {
                        let text = "the server is shutting down; push what was not acknowledged to another one";
                        let _ = sender.send(Err(Status::unavailable(text))).await;
                        return;
                    }
                    () = sender.closed() => return,
                    message = pushes.message() => message,
                };
                let answer = match message {
                    Ok(Some(push)) => push_one(&gateway, push).await.map_err(Status::from),
                    Ok(None) => return,
                    Err(status) => Err(status),
                };
                let ended = answer.is_err();
                if sender.send(answer).await.is_err() || ended {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    type MaterializeStream = Answers<v1::MaterializeProgress>;

    async fn materialize(
        &self,
        request: Request<v1::MaterializeRequest>,
    ) -> Result<Response<Answers<v1::MaterializeProgress>>, Status> {
        let request = request.into_inner();
        let gateway = self.gateway.clone();
        gateway.check_serving()?;
        gateway.check_project(&request.project)?;
        let events = events(&gateway)?;
        let served = gateway.served();
        let sources = file_sources(served.plan()?, &request.sources)?;
        let mode = if request.dry_run { Mode::DryRun } else { Mode::Apply };
        let through = request.through;
        let (sender, progress) = mpsc::channel::<Progress>(ANSWERS_MAX);
        let work = tokio::spawn(async move { events.materialize(&sources, through, mode, sender).await });
        let reports = ReceiverStream::new(progress).map(move |progress| Ok(report(progress, through)));
        // The last message says that all is done, or why it is not.
        let end = futures::stream::once(async move {
            match work.await {
                Ok(Ok(())) => Ok(v1::MaterializeProgress { done: true, through, ..v1::MaterializeProgress::default() }),
                Ok(Err(error)) => Err(Failure::from(error).into()),
                Err(error) => Err(Failure::internal("the materialization ended early", &error).into()),
            }
        });
        Ok(Response::new(Box::pin(reports.chain(end))))
    }

    type CompactStream = Answers<v1::TableProgress>;

    async fn compact(
        &self,
        request: Request<v1::CompactRequest>,
    ) -> Result<Response<Answers<v1::TableProgress>>, Status> {
        let request = request.into_inner();
        self.gateway.check_serving()?;
        self.gateway.check_project(&request.project)?;
        let events = events(&self.gateway)?;
        let mode = if request.dry_run { Mode::DryRun } else { Mode::Apply };
        Ok(table_work(move |progress| async move { events.compact(&request.sources, mode, progress).await }))
    }

    type ImportFilesStream = Answers<v1::TableProgress>;

    async fn import_files(
        &self,
        request: Request<v1::ImportFilesRequest>,
    ) -> Result<Response<Answers<v1::TableProgress>>, Status> {
        let request = request.into_inner();
        self.gateway.check_serving()?;
        self.gateway.check_project(&request.project)?;
        let events = events(&self.gateway)?;
        Ok(table_work(move |progress| async move {
            events.import_files(&request.source, progress).await.map(|table| vec![table])
        }))
    }

    async fn flush(&self, request: Request<v1::FlushRequest>) -> Result<Response<v1::FlushResponse>, Status> {
        let gateway = &self.gateway;
        gateway.check_project(&request.into_inner().project)?;
        let written = events(gateway)?.flush().await.map_err(Failure::from)?;
        Ok(Response::new(v1::FlushResponse { events: written }))
    }
}

/// Progress as it comes; the last message says what was done, or why it was not.
fn table_work<F>(work: impl FnOnce(mpsc::Sender<TableProgress>) -> F) -> Response<Answers<v1::TableProgress>>
where
    F: Future<Output = Result<Vec<TableDone>, EventsError>> + Send + 'static,
{
    let (sender, progress) = mpsc::channel::<TableProgress>(ANSWERS_MAX);
    let work = tokio::spawn(work(sender));
    let reports = ReceiverStream::new(progress)
        .map(|(source, rows_written)| Ok(v1::TableProgress { source, rows_written, ..v1::TableProgress::default() }));
    let end = futures::stream::once(async move {
        match work.await {
            Ok(Ok(tables)) => {
                let tables = tables.into_iter().map(table_done).collect();
                Ok(v1::TableProgress { tables, done: true, ..v1::TableProgress::default() })
            }
            Ok(Err(error)) => Err(Failure::from(error).into()),
            Err(error) => Err(Failure::internal("the work on tables ended early", &error).into()),
        }
    });
    Response::new(Box::pin(reports.chain(end)))
}

fn table_done(done: TableDone) -> v1::TableDone {
    let TableDone { source, changed, files_before, files_after, files_taken, bytes_before, bytes_after, .. } = done;
    let TableDone { rows, buckets, seconds, .. } = done;
    v1::TableDone {
        source,
        changed,
        files_before,
        files_after,
        files_taken,
        bytes_before,
        bytes_after,
        rows,
        buckets,
        seconds,
    }
}

fn events(gateway: &Gateway) -> Result<Arc<dyn Events>, Failure> {
    gateway.check_role(Role::Ingest, "events are not taken, and stores not written, here")?;
    gateway.events.clone().ok_or_else(|| Failure::new(Kind::Unsupported, "this server takes no events"))
}

fn report(progress: Progress, through: i64) -> v1::MaterializeProgress {
    let Progress { source, view, rows_read, rows_applied, rows_stale, .. } = progress;
    let Progress { rows_new, rows_total, entities, seconds, message, .. } = progress;
    v1::MaterializeProgress {
        source,
        view,
        rows_read,
        rows_applied,
        rows_stale,
        done: false,
        through,
        rows_new,
        rows_total,
        entities,
        seconds,
        message: message.unwrap_or_default(),
    }
}

async fn push_one(gateway: &Gateway, push: v1::PushRequest) -> Result<v1::PushResponse, Failure> {
    let started = Instant::now();
    let answer = push_events(gateway, push).await;
    let code = answer.as_ref().err().map_or_else(|| "Ok".to_owned(), |failure| format!("{:?}", failure.kind.code()));
    gateway.metrics.call("Push", "", &code, started.elapsed());
    answer
}

async fn push_events(gateway: &Gateway, push: v1::PushRequest) -> Result<v1::PushResponse, Failure> {
    gateway.check_serving()?;
    gateway.check_project(&push.project)?;
    let served = gateway.served();
    let plan = served.plan()?;
    let streams = || plan.sources.iter().filter(|source| source.is_stream()).map(|source| &*source.name);
    let source = plan.source(&push.source).ok_or_else(|| Failure::unknown("source", &push.source, streams()))?;
    if !source.is_stream() {
        let text = format!("source `{}` is read from files, and events can be pushed to streams only", source.name);
        return Err(Failure::new(Kind::Precondition, text));
    }
    let batch = read_events(source, &push.rows)?;
    let wait = if push.wait_visible { Wait::Visible } else { Wait::Durable };
    let pushed = events(gateway)?.push(&source.name, batch, wait).await?;
    for (what, count) in [
        ("accepted", u64::from(pushed.accepted)),
        ("duplicate", u64::from(pushed.duplicates)),
        ("early", u64::from(pushed.early)),
        ("rejected", pushed.rejected.len() as u64),
    ] {
        gateway.metrics.events(what, count);
    }
    let rejected = pushed.rejected.into_iter().map(|(row, reason)| v1::Rejected { row, reason });
    Ok(v1::PushResponse {
        accepted: pushed.accepted,
        duplicates: pushed.duplicates,
        early: pushed.early,
        rejected: rejected.collect(),
        last_sequence: pushed.last_sequence,
    })
}

/// The events of a message, as a batch of the columns it has.
fn read_events(source: &SourcePlan, sent: &[v1::Column]) -> Result<RecordBatch, Failure> {
    let mut columns: Vec<ArrayRef> = Vec::with_capacity(sent.len());
    let mut fields = Vec::with_capacity(sent.len());
    let Some(rows) = sent.iter().find_map(convert::rows_of) else {
        return Err(Failure::invalid(format!("a push to `{}` carries no columns with values", source.name)));
    };
    if rows > EVENTS_MAX {
        return Err(Failure::invalid(format!("{rows} events in one message; send at most {EVENTS_MAX}")));
    }
    for (index, column) in sent.iter().enumerate() {
        let expected = column_type(source, &column.name).ok_or_else(|| {
            let what = format!("column in the schema of source `{}` named", source.name);
            Failure::invalid(not_known(&what, &column.name, source.schema.iter().map(|(name, _)| name.as_str())))
        })?;
        if sent[..index].iter().any(|other| other.name == column.name) {
            return Err(Failure::invalid(format!("column `{}` is sent twice", column.name)));
        }
        let array = convert::to_array(column, expected, rows).map_err(|error| Failure::invalid(error.to_string()))?;
        fields.push(Field::new(&column.name, array.data_type().clone(), true));
        columns.push(array);
    }
    if let Some(event_time) = source.event_time.as_deref().filter(|name| sent.iter().all(|column| column.name != *name))
    {
        let text = format!("events of source `{}` need their time in column `{event_time}`", source.name);
        return Err(Failure::invalid(text));
    }
    let options = RecordBatchOptions::new().with_row_count(Some(rows));
    RecordBatch::try_new_with_options(Arc::new(Schema::new(fields)), columns, &options)
        .map_err(|error| Failure::internal("the events could not be read", &error))
}

/// Times are timestamps, also where the schema leaves them out.
fn column_type<'a>(source: &'a SourcePlan, name: &str) -> Option<&'a Type> {
    let is_time = || [&source.event_time, &source.created_time].into_iter().flatten().any(|column| column == name);
    source.column_type(name).or_else(|| is_time().then_some(&Type::Timestamp))
}

fn file_sources(plan: &Plan, names: &[String]) -> Result<Vec<String>, Failure> {
    let files = || plan.sources.iter().filter(|source| !source.is_stream());
    if names.is_empty() {
        return Ok(files().map(|source| source.name.to_string()).collect());
    }
    for name in names {
        match plan.source(name) {
            None => return Err(Failure::unknown("source", name, files().map(|source| &*source.name))),
            Some(source) if source.is_stream() => {
                let text = format!("source `{name}` is a stream, whose events become visible by themselves");
                return Err(Failure::new(Kind::Precondition, text));
            }
            Some(_) => {}
        }
    }
    Ok(names.to_vec())
}
