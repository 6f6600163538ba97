//! Taking in a push: what is wrong with which row, what was seen before, and what goes into the log.
//!
//! Everything that can be judged is judged before the acknowledgement: columns and types of the whole push, then each row's
//! times and event id. What was acknowledged can be applied.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use arrow::array::{RecordBatch, UInt32Array};
use arrow::compute::take_record_batch;
use feature_defs::plan::{SourceKind, SourcePlan};
use feature_defs::time::{Micros, Position};
use feature_defs::window::{DAY, HOUR};
use tokio::time::Instant;

use crate::event_ids::{EventIds, Payload, Seen};
use crate::log::{Appended, Log, LogError};
use crate::{IngestError, Inner, Pushed, Stream, Wait, lock};

/// Event times beyond the years 0 to 9999 or so are mistakes, and would overflow sums of times.
const TIME_MAX: Micros = 253_402_300_799_999_999;

/// Between looks whether a full log has room, doubled from the first to the last.
const LOOK_FIRST: Duration = Duration::from_millis(10);
const LOOK_LAST: Duration = Duration::from_millis(200);

/// The least i64, which other programs use for "no time", is far outside as well.
pub(crate) fn in_range(time: Micros) -> bool {
    (-TIME_MAX..=TIME_MAX).contains(&time)
}

/// What a push is judged by. Locked for the short time in which duplicates are found and the record is appended.
pub(crate) struct Intake {
    pub plan: Arc<SourcePlan>,
    pub ids: EventIds,
    /// Of the last event that was on time: what a redelivery waits for when it waits to be visible.
    pub last_on_time: Position,
}

impl Intake {
    pub fn new(plan: Arc<SourcePlan>, ids: EventIds, applied: Position) -> Intake {
        Intake { plan, ids, last_on_time: applied }
    }

    /// Takes over the definition in force.
    pub fn adopt(&mut self, plan: Arc<SourcePlan>) {
        if plan.schema != self.plan.schema {
            self.ids.forget_payloads();
        }
        self.plan = plan;
    }
}

/// A push with its bad rows taken out.
struct Checked {
    batch: RecordBatch,
    /// Of the push, in the batch's order.
    rows: Vec<u32>,
    due: Vec<Micros>,
    /// Of sources whose events have ids: the name of the column, and what each row's id and content are.
    ids: Option<(String, Vec<(u128, Payload)>)>,
    rejected: Vec<(u32, String)>,
}

pub(crate) async fn push(
    inner: &Arc<Inner>,
    stream: &Arc<Stream>,
    batch: RecordBatch,
    wait: Wait,
) -> Result<Pushed, IngestError> {
    let early_rows = stream.early.load(Ordering::Relaxed);
    if early_rows > inner.options.limits.early_rows_max {
        let source_name = stream.name.to_string();
        return Err(IngestError::TooManyEarly { source_name, rows: early_rows });
    }
    let bytes = batch.get_array_memory_size().min(crate::log::RECORD_BYTES_MAX);
    let deadline = Instant::now() + inner.options.limits.room_wait;
    let mut pause = LOOK_FIRST;
    let (mut pushed, appended, on_time) = loop {
        let room = tokio::time::timeout_at(deadline, inner.log.room(bytes)).await;
        let permit = room.map_err(|_| LogError::Slow { millis: inner.options.limits.room_wait.as_millis() as u64 })?;
        let (checking, large) = ((inner.clone(), stream.clone(), batch.clone()), batch.num_rows() > 4_096);
        let work = move || {
            let (inner, stream, batch) = checking;
            accept(&inner, &stream, &batch, permit)
        };
        // A large push takes milliseconds of computing, which is not for a thread that serves others.
        let accepted = if large {
            tokio::task::spawn_blocking(work).await.map_err(|error| IngestError::Arrow(error.to_string()))?
        } else {
            work()
        };
        match accepted {
            // The applier makes room as soon as it can; whoever pushes waits for it a little, and is refused then.
            Err(IngestError::Log(LogError::Full { .. })) if Instant::now() + pause < deadline => {
                inner.flushes_asked.fetch_add(1, Ordering::AcqRel);
                inner.wake.notify_one();
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LOOK_LAST);
                inner.check_running()?;
            }
            accepted => break accepted?,
        }
    };
    match appended {
        Some(Appended { durable, ticket, first_sequence, .. }) => {
            inner.log.wait_durable(durable, ticket).await?;
            pushed.last_sequence = Some(first_sequence + pushed.accepted - 1);
        }
        // Events seen before may still be on their way to the disk: theirs is this push's acknowledgement too.
        None if pushed.duplicates > 0 => {
            let (durable, ticket) = inner.log.everything();
            inner.log.wait_durable(durable, ticket).await?;
        }
        None => {}
    }
    if let (Wait::Visible, Some(position)) = (wait, on_time) {
        let mut applied = stream.applied.subscribe();
        let wait = inner.options.limits.visible_wait;
        tokio::select! {
            reached = tokio::time::timeout(wait, applied.wait_for(|applied| *applied >= position)) => match reached {
                Ok(Ok(_)) => {}
                Ok(Err(_)) => return Err(IngestError::Stopping),
                Err(_) => {
                    let what = stream.status().trouble.unwrap_or_else(|| "the applier is behind".into());
                    return Err(IngestError::NotVisible { seconds: wait.as_secs(), what });
                }
            },
            () = inner.until_fenced() => inner.check_fence()?,
        }
    }
    Ok(pushed)
}

/// Checks, finds duplicates and appends. Returns the position up to which the push's due events must be applied.
fn accept(
    inner: &Inner,
    stream: &Stream,
    batch: &RecordBatch,
    permit: tokio::sync::OwnedSemaphorePermit,
) -> Result<(Pushed, Option<Appended>, Option<Position>), IngestError> {
    let mut intake = lock(&stream.intake);
    let now = (inner.options.clock)();
    let Checked { batch, rows, due, ids, rejected } =
        check(inner, &intake, batch, now, inner.options.limits.ahead_max)?;
    let mut pushed = Pushed { accepted: 0, duplicates: 0, early: 0, rejected, last_sequence: None };
    let mut new: Vec<u128> = Vec::new();
    let (batch, due) = match ids {
        None => (batch, due),
        Some((name, ids)) => {
            let mut kept: Vec<u32> = Vec::with_capacity(ids.len());
            for (row, (id, payload)) in ids.into_iter().enumerate() {
                match intake.ids.insert(id, Some(payload), now) {
                    Seen::New => {
                        new.push(id);
                        kept.push(row as u32);
                    }
                    Seen::Again => pushed.duplicates += 1,
                    // Counted with the others of a known id, and told of besides: who pushes should know.
                    Seen::Other => {
                        pushed.duplicates += 1;
                        let reason = format!(
                            "`{name}` was used before for an event that said something else; give every event its own"
                        );
                        pushed.rejected.push((rows[row], reason));
                    }
                }
            }
            pushed.rejected.sort_unstable_by_key(|(row, _)| *row);
            if kept.len() == due.len() {
                (batch, due)
            } else {
                let due = kept.iter().map(|row| due[*row as usize]).collect();
                (pick(&batch, kept)?, due)
            }
        }
    };
    let before = (pushed.duplicates > 0).then_some(intake.last_on_time);
    if due.is_empty() {
        return Ok((pushed, None, before));
    }
    pushed.accepted = due.len() as u64;
    let appended =
        Log::encode(batch, due.clone()).and_then(|encoded| inner.log.append(&stream.name, encoded, None, permit));
    let appended = match appended {
        Ok(appended) => appended,
        Err(error) => {
            intake.ids.take_back(&new);
            return Err(error.into());
        }
    };
    pushed.early = due.iter().filter(|due| **due > appended.arrival).count() as u64;
    let on_time = due.iter().rposition(|due| *due <= appended.arrival);
    let on_time =
        on_time.map(|row| Position { time: appended.arrival, sequence: appended.first_sequence + row as u64 });
    intake.last_on_time = on_time.unwrap_or(intake.last_on_time);
    Ok((pushed, Some(appended), on_time.or(before)))
}

fn check(
    inner: &Inner,
    intake: &Intake,
    batch: &RecordBatch,
    now: Micros,
    ahead_max: Micros,
) -> Result<Checked, IngestError> {
    let plan = &intake.plan;
    for field in batch.schema().fields() {
        if plan.column_type(field.name()).is_none() {
            let known: Vec<&str> = plan.schema.iter().map(|(name, _)| name.as_str()).collect();
            return Err(IngestError::UnknownColumn {
                source_name: plan.name.to_string(),
                column: field.name().clone(),
                known: known.join(", "),
            });
        }
    }
    if let Some(name) = &plan.event_time
        && batch.column_by_name(name).is_none()
    {
        return Err(IngestError::NoEventTime { source_name: plan.name.to_string(), column: name.clone() });
    }
    let batch = plan.align(batch, None)?;
    let times = plan.times(&batch, None)?;
    let forgotten = inner.forgotten_in(plan, &batch)?;
    let forgotten = |row: usize| forgotten.as_ref().and_then(|names| names[row].as_ref());
    let event_id = match &plan.kind {
        SourceKind::Stream { event_id, .. } => event_id.as_deref(),
        _ => None,
    };
    let hashes = event_id.map(|name| intake.ids.hashes(plan, name, &batch));
    let payloads = event_id.map(|_| intake.ids.payloads(plan, &batch));
    let event_time = plan.event_time.as_deref().unwrap_or("event time");
    let mut rows = Vec::with_capacity(batch.num_rows());
    let mut due = Vec::with_capacity(batch.num_rows());
    let mut ids = Vec::new();
    let mut rejected = Vec::new();
    for (row, times) in times.iter().enumerate() {
        let reason = match times {
            _ if forgotten(row).is_some() => {
                let entity = forgotten(row).map_or("entity", |entity| entity);
                format!("this `{entity}` was forgotten (`coeval forget`), and nothing is taken of it any more")
            }
            None => format!("`{event_time}` is null"),
            Some(times) if !in_range(times.event_time) || !in_range(times.known_time) => {
                format!("`{event_time}` is outside the years 0 to 9999")
            }
            Some(times) if times.event_time.saturating_sub(now) > ahead_max => {
                let ahead = show_span(ahead_max);
                format!("`{event_time}` is more than {ahead} ahead of the server's clock")
            }
            Some(times) => match (&hashes, &payloads, event_id) {
                (Some(hashes), Some(payloads), Some(name)) => match hashes[row] {
                    Some(id) => {
                        ids.push((id, payloads[row]));
                        rows.push(row as u32);
                        due.push(times.known_time.max(times.event_time));
                        continue;
                    }
                    None => format!("`{name}` is null, so a repeated delivery could not be recognised"),
                },
                _ => {
                    rows.push(row as u32);
                    due.push(times.known_time.max(times.event_time));
                    continue;
                }
            },
        };
        rejected.push((row as u32, reason));
    }
    let batch = if rejected.is_empty() { batch } else { pick(&batch, rows.clone())? };
    let ids = event_id.map(|name| (name.to_owned(), ids));
    Ok(Checked { batch, rows, due, ids, rejected })
}

fn show_span(span: Micros) -> String {
    let (count, unit) = if span >= DAY { (span / DAY, "days") } else { (span / HOUR, "hours") };
    format!("{count} {unit}")
}

fn pick(batch: &RecordBatch, rows: Vec<u32>) -> Result<RecordBatch, IngestError> {
    take_record_batch(batch, &UInt32Array::from(rows)).map_err(|error| IngestError::Arrow(error.to_string()))
}
