//! Building generations from what is already there: the prior history of a stream, once, and every view that is new.
//!
//! A view that is new, changed, or lost by the online store starts empty and is filled from history in order of position,
//! while live events go on to the other views. Rounds get shorter, because history grows more slowly than it is read; the
//! last one runs while the applier waits, so the generation joins the live ones at exactly the position they are at. Its
//! ready fact is written then. After a crash it is built again from the start.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{RecordBatch, UInt64Array};
use arrow::compute::{concat_batches, take_record_batch};
use arrow::datatypes::Schema;
use bytes::Bytes;
use feature_defs::plan::{SourceKind, SourcePlan};
use feature_defs::time::{Micros, Position};
use feature_defs::value::{Value, encode_row};
use futures::StreamExt;
use offline_store::history::{History, HistoryError, Imported, Positioned};
use online_store::{StoreError, Write};

use crate::apply::{StreamState, apply_rows};
use crate::log::Log;
use crate::push::in_range;
use crate::write::{Lane, ViewWriter};
use crate::{IngestError, Inner, Phase, Stream, dead_letter, lock};

/// Rows applied at once: entities are read, changed and written once per chunk, so larger is faster; about 100 MB of rows
/// and states.
const CHUNK_ROWS: usize = 128 << 10;
/// A round that found fewer rows is followed by the last one, for which the applier waits: well under a second.
const LAST_ROUND_ROWS: u64 = 20_000;
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// A prior history is sorted in memory.
const IMPORT_BYTES_MAX: usize = 8 << 30;

/// Starts the builder of a source unless it runs. The caller holds the state's lock.
pub(crate) fn start(inner: &Arc<Inner>, stream: &Arc<Stream>, state: &mut StreamState) {
    if state.builder_runs || (state.building.is_empty() && state.imported) {
        return;
    }
    state.builder_runs = true;
    let (builder_inner, stream) = (inner.clone(), stream.clone());
    inner.spawn(async move { build(&builder_inner, &stream).await });
}

/// Until nothing is left to build. Failures are tried again: the store or the disk may come back.
async fn build(inner: &Arc<Inner>, stream: &Arc<Stream>) {
    loop {
        match try_build(inner, stream).await {
            Ok(true) => {}
            Ok(false) => return,
            Err(IngestError::Store(error @ StoreError::Fenced { .. })) => return inner.fence(&error),
            Err(error) => {
                let error = crate::error_chain(&error);
                tracing::error!(source = %stream.name, error, "views cannot be built; it is tried again");
                stream.set_build_trouble(Some(error));
                tokio::time::sleep(RETRY_AFTER).await;
            }
        }
    }
}

/// False: nothing is left to do, and the builder has signed off.
async fn try_build(inner: &Arc<Inner>, stream: &Arc<Stream>) -> Result<bool, IngestError> {
    let needs_import = !stream.state.lock().await.imported;
    if needs_import {
        import(inner, stream).await?;
    }
    let wanted = {
        let mut state = stream.state.lock().await;
        if state.building.is_empty() {
            state.builder_runs = false;
            state.grown = true;
            stream.set_build_trouble(None);
            return Ok(false);
        }
        state.building.clone()
    };
    let store = &inner.options.online;
    for writer in &wanted {
        // What is there may be the rest of an earlier attempt with other events; positions would hide older ones.
        store.write(vec![Write::Fact(writer.generation.ready_fact(), None)]).await?;
        store.remove_generation(&writer.generation).await?;
    }
    // Behind each chunk goes a mark, so that a store that loses what was written is noticed, and the build repeated.
    let lane = format!("mark/{}/{}/build", inner.options.project, stream.name);
    let mut lane = Lane::open(&**store, vec![lane]).await?.remove(0);
    lane.kept.turn_on();
    tracing::info!(source = %stream.name, views = wanted.len(), "building views from history");
    let started = tokio::time::Instant::now();
    let mut from = Position::START;
    let mut rows = 0;
    loop {
        let (plan, scan, writers) = {
            let mut state = stream.state.lock().await;
            state.flush(inner).await?;
            // Another process may have compacted it, and what was replaced does not stay for ever.
            state.history.reload().await?;
            let writers = still_wanted(&wanted, &state);
            let scan = state.history.scan(&state.plan, Some(columns(&writers)), from);
            (state.plan.clone(), scan, writers)
        };
        if writers.is_empty() {
            return Ok(true);
        }
        let round = pass(inner, stream, &mut lane, (&plan, &writers), scan, &mut from, &mut rows).await?;
        if round < LAST_ROUND_ROWS {
            break;
        }
    }
    let mut state = stream.state.lock().await;
    state.flush(inner).await?;
    let writers = still_wanted(&wanted, &state);
    let scan = state.history.scan(&state.plan, Some(columns(&writers)), from);
    let plan = state.plan.clone();
    pass(inner, stream, &mut lane, (&plan, &writers), scan, &mut from, &mut rows).await?;
    lane.check(&**store).await?;
    // Everything in history is in them now, and everything applied is in history, so they join here.
    state.join(inner, &writers, lane.kept).await?;
    store.sync().await?;
    let ready =
        writers.iter().map(|writer| Write::Fact(writer.generation.ready_fact(), Some(Bytes::from_static(b"1"))));
    store.write(ready.collect()).await?;
    store.sync().await?;
    for writer in &writers {
        inner.set_phase(&writer.generation, Phase::Ready);
    }
    inner.remember_wanted(&stream.name, &state).await?;
    stream.set_build_trouble(None);
    let seconds = started.elapsed().as_secs_f64();
    tracing::info!(source = %stream.name, rows, seconds, rows_per_second = rows as f64 / seconds.max(1e-6), "views are built");
    Ok(true)
}

fn still_wanted(wanted: &[Arc<ViewWriter>], state: &StreamState) -> Vec<Arc<ViewWriter>> {
    let is_building = |writer: &&Arc<ViewWriter>| state.building.iter().any(|known| Arc::ptr_eq(known, writer));
    wanted.iter().filter(is_building).cloned().collect()
}

fn columns(writers: &[Arc<ViewWriter>]) -> Vec<String> {
    let mut names: Vec<String> = writers.iter().flat_map(|writer| writer.view.source_columns()).collect();
    names.sort_unstable();
    names.dedup();
    names
}

/// Applies everything a scan brings; `from` follows, for the next round.
async fn pass(
    inner: &Arc<Inner>,
    stream: &Stream,
    lane: &mut Lane,
    (plan, writers): (&SourcePlan, &[Arc<ViewWriter>]),
    mut scan: futures::stream::BoxStream<'static, Result<Positioned, HistoryError>>,
    from: &mut Position,
    total: &mut u64,
) -> Result<u64, IngestError> {
    let mut chunk: Vec<Positioned> = Vec::new();
    let mut chunk_rows = 0;
    let mut rows = 0;
    loop {
        let next = scan.next().await.transpose()?;
        let ended = next.is_none();
        if let Some(next) = next {
            chunk_rows += next.positions.len();
            chunk.push(next);
        }
        if chunk_rows >= CHUNK_ROWS || (ended && chunk_rows > 0) {
            let positions: Vec<Position> = chunk.iter().flat_map(|part| &part.positions).copied().collect();
            let batch = concat_batches(&chunk[0].batch.schema(), chunk.iter().map(|part| &part.batch))
                .map_err(|error| IngestError::Arrow(error.to_string()))?;
            let whole = Positioned { batch, positions };
            let store = &*inner.options.online;
            // Lost between two chunks is lost as well.
            lane.check(store).await?;
            let (aside, _) = apply_rows(inner, lane, plan, writers, &whole).await?;
            dead_letter::write(
                &inner.options.store,
                &inner.project_path(),
                &stream.name,
                &whole.batch,
                &whole.positions,
                &aside,
            )
            .await
            .map_err(IngestError::DeadLetter)?;
            rows += chunk_rows as u64;
            *total += chunk_rows as u64;
            *from = whole.positions.last().copied().unwrap_or(*from);
            for writer in writers {
                inner.set_phase(&writer.generation, Phase::Building { rows: *total });
            }
            chunk.clear();
            chunk_rows = 0;
        }
        if ended {
            return Ok(rows);
        }
    }
}

/// Takes in what happened before the stream began. Rows are ordered by (event time, canonical encoding) and numbered from
/// 1, so the result does not depend on files or their order. Rows that are not visible yet go through the log like early
/// pushes.
async fn import(inner: &Arc<Inner>, stream: &Arc<Stream>) -> Result<(), IngestError> {
    let plan = stream.state.lock().await.plan.clone();
    let SourceKind::Stream { history: Some(pattern), event_id } = &plan.kind else {
        // The definitions no longer name a prior history.
        let mut state = stream.state.lock().await;
        state.go_on(&inner.log).await?;
        stream.imported.send_replace(true);
        return Ok(());
    };
    let started = tokio::time::Instant::now();
    tracing::info!(source = %stream.name, pattern, "importing what happened before the stream began");
    let names: Vec<String> = plan.schema.iter().map(|(name, _)| name.clone()).collect();
    let mut scan = inner.options.sources.scan(&plan, &names).await?;
    let mut batches: Vec<RecordBatch> = Vec::new();
    let (mut bytes, mut read) = (0, 0);
    while let Some(batch) = scan.next().await {
        let batch = batch
            .map_err(|error| IngestError::Scan { source_name: stream.name.to_string(), what: error.to_string() })?;
        let batch = plan.align(&batch, None)?;
        bytes += batch.get_array_memory_size();
        read += batch.num_rows() as u64;
        if bytes > IMPORT_BYTES_MAX {
            let source_name = stream.name.to_string();
            return Err(IngestError::ImportTooLarge {
                source_name,
                pattern: pattern.clone(),
                bytes_max: IMPORT_BYTES_MAX,
            });
        }
        stream.set_importing(read);
        batches.push(batch);
    }
    drop(scan);
    let whole = match batches.first() {
        Some(first) => {
            concat_batches(&first.schema(), &batches).map_err(|error| IngestError::Arrow(error.to_string()))?
        }
        None => RecordBatch::new_empty(Arc::new(Schema::empty())),
    };
    drop(batches);
    let whole = inner.redacted_batch(&plan, whole)?;
    let sorted = {
        let (plan, event_id) = (plan.clone(), event_id.clone());
        let blocking = tokio::task::spawn_blocking(move || Prior::sort(&plan, event_id.as_deref(), whole));
        blocking.await.map_err(|error| IngestError::Arrow(error.to_string()))??
    };
    let Prior { batch, positions, skipped } = sorted;
    // Nothing can be pushed while this runs, so no arrival is before this moment's.
    let now = inner.log.horizon(&stream.name, u64::MAX).unwrap_or_else(|| (inner.options.clock)());
    let visible = positions.partition_point(|position| position.time <= now);
    let id = format!("{now}-{}", inner.log.next_sequence());
    let early = batch.slice(visible, batch.num_rows() - visible);
    let mut logged = None;
    for (from, positions) in positions[visible..].chunks(8_192).enumerate() {
        let rows = early.slice(from * 8_192, positions.len());
        let due: Vec<Micros> = positions.iter().map(|position| position.time).collect();
        let permit = inner.log.room(rows.get_array_memory_size().min(crate::log::RECORD_BYTES_MAX)).await;
        let encoded = Log::encode(rows, due)?;
        logged = Some(inner.log.append(&stream.name, encoded, Some(id.as_str().into()), permit)?);
    }
    if let Some(appended) = logged {
        inner.log.wait_durable(appended.durable, appended.ticket).await?;
    }
    let rows = batch.num_rows() as u64;
    let imported = Imported { id, pattern: pattern.clone(), rows, skipped, at: now };
    let visible = Positioned { batch: batch.slice(0, visible), positions: positions[..visible].to_vec() };
    {
        let mut state = stream.state.lock().await;
        state.history.import(&plan, std::slice::from_ref(&visible), imported).await?;
        state.grown = true;
        remember_ids(stream, &plan, &batch);
        state.go_on(&inner.log).await?;
        stream.applied.send_replace(state.applied);
    }
    stream.imported.send_replace(true);
    inner.wake.notify_one();
    let seconds = started.elapsed().as_secs_f64();
    tracing::info!(source = %stream.name, rows, skipped, seconds, rows_per_second = rows as f64 / seconds.max(1e-6), "the prior history is imported");
    Ok(())
}

fn remember_ids(stream: &Stream, plan: &SourcePlan, batch: &RecordBatch) {
    let SourceKind::Stream { event_id: Some(name), .. } = &plan.kind else { return };
    let mut intake = lock(&stream.intake);
    for id in intake.ids.hashes(plan, name, batch).into_iter().flatten() {
        intake.ids.insert_imported(id);
    }
}

/// Fills the index of event ids from the history: what was imported, and what was pushed within the horizon, with what it
/// said.
pub(crate) async fn recall_ids(
    stream: &Stream,
    plan: &Arc<SourcePlan>,
    history: &History,
    oldest: Micros,
) -> Result<(), IngestError> {
    let SourceKind::Stream { event_id: Some(name), .. } = &plan.kind else { return Ok(()) };
    if history.manifest().imported.is_some() {
        let mut scan = history.scan(plan, Some(vec![name.clone()]), Position::START);
        while let Some(events) = scan.next().await.transpose()? {
            let mut intake = lock(&stream.intake);
            let ids = intake.ids.hashes(plan, name, &events.batch);
            for (position, id) in events.positions.iter().zip(ids) {
                if let Some(id) = id.filter(|_| position.sequence < offline_store::history::FIRST_PUSHED) {
                    intake.ids.insert_imported(id);
                }
            }
        }
    }
    let mut scan = history.scan(plan, None, Position { time: oldest, sequence: 0 });
    while let Some(events) = scan.next().await.transpose()? {
        let mut intake = lock(&stream.intake);
        let ids = intake.ids.hashes(plan, name, &events.batch);
        let payloads = intake.ids.payloads(plan, &events.batch);
        for ((position, id), payload) in events.positions.iter().zip(ids).zip(payloads) {
            if let Some(id) = id.filter(|_| position.sequence >= offline_store::history::FIRST_PUSHED) {
                intake.ids.insert(id, Some(payload), position.time);
            }
        }
    }
    Ok(())
}

/// A prior history in order of position.
struct Prior {
    batch: RecordBatch,
    positions: Vec<Position>,
    /// Rows without a usable event time, and rows whose event id an earlier row had.
    skipped: u64,
}

impl Prior {
    fn sort(plan: &SourcePlan, event_id: Option<&str>, whole: RecordBatch) -> Result<Prior, IngestError> {
        if whole.num_rows() == 0 {
            return Ok(Prior { batch: whole, positions: Vec::new(), skipped: 0 });
        }
        let times = plan.times(&whole, None)?;
        let usable = |row: &u32| {
            times[*row as usize].is_some_and(|times| in_range(times.event_time) && in_range(times.known_time))
        };
        let mut rows: Vec<u32> = (0..whole.num_rows() as u32).filter(usable).collect();
        let event_time = |row: u32| times[row as usize].map_or(Micros::MIN, |times| times.event_time);
        rows.sort_by_key(|row| event_time(*row));
        // Encodings are made only where event times tie.
        for tied in rows.chunk_by_mut(|a, b| event_time(*a) == event_time(*b)).filter(|tied| tied.len() > 1) {
            tied.sort_by_cached_key(|row| canonical(plan, &whole, *row as usize));
        }
        let mut seen: HashMap<Vec<u8>, ()> = HashMap::new();
        if let Some(name) = event_id
            && let Some(column_type) = plan.column_type(name)
            && let Some(column) = whole.column_by_name(name)
        {
            rows.retain(|row| {
                let id = Value::from_array(column, *row as usize, column_type);
                let mut bytes = Vec::new();
                let is_null = id.is_null();
                encode_row(&[id], &mut bytes);
                is_null || seen.insert(bytes, ()).is_none()
            });
        }
        let skipped = (whole.num_rows() - rows.len()) as u64;
        let mut positioned: Vec<(Position, u32)> = rows
            .iter()
            .enumerate()
            .map(|(index, row)| {
                let time = times[*row as usize].map_or(Micros::MIN, |times| times.known_time.max(times.event_time));
                (Position { time, sequence: index as u64 + 1 }, *row)
            })
            .collect();
        positioned.sort_unstable();
        let indices = UInt64Array::from_iter_values(positioned.iter().map(|(_, row)| u64::from(*row)));
        let batch = take_record_batch(&whole, &indices).map_err(|error| IngestError::Arrow(error.to_string()))?;
        Ok(Prior { batch, positions: positioned.into_iter().map(|(position, _)| position).collect(), skipped })
    }
}

/// The canonical encoding of all declared columns of a row.
fn canonical(plan: &SourcePlan, batch: &RecordBatch, row: usize) -> Vec<u8> {
    let columns = plan.schema.iter().zip(batch.columns());
    let values: Vec<Value> =
        columns.map(|((_, column_type), column)| Value::from_array(column, row, column_type)).collect();
    let mut bytes = Vec::new();
    encode_row(&values, &mut bytes);
    bytes
}
