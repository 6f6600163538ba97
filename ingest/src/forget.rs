//! Forgetting entities: from the online store, histories and copies of files, the event log and the dead letters.
//!
//! The list comes first. Once every writer follows it nothing of the entity is written any more, and readers find nothing
//! of it, whatever is still stored; so a process that is killed in the middle leaves something to do and nothing wrong, and
//! the same work again finishes it. Where only the hashes are known, because somebody else was asked and died, the keys
//! are found in what is to be removed; so the online store, which cannot be searched, goes before what it was made from.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use arrow::array::{Array, RecordBatch};
use arrow::datatypes::{Field, Schema};
use feature_defs::forgotten::{Forgotten, KeyHash};
use feature_defs::plan::{Judge, KeysOfViews, RowsError, SourceKind, SourcePlan, ViewPlan};
use futures::{StreamExt, TryStreamExt};
use object_store::{ObjectStoreExt, PutPayload};
use offline_store::history::Positioned;
use offline_store::table::Table;
use offline_store::table::redact;
use online_store::key::{Generation, Key};
use online_store::{Answer, Read, Write};
use tokio::sync::mpsc::Sender;

use crate::log::{Events, LogError, RecordRef};
use crate::{IngestError, Inner, Mode, Stream, tables};

/// Keys read or removed in one call of the online store.
const KEYS_PER_CALL: usize = 512;

/// What is to be forgotten.
#[derive(Debug, Clone)]
pub struct Forgetting {
    /// Everything that was ever forgotten, these included.
    pub list: Arc<Forgotten>,
    pub hashes: Vec<(Arc<str>, KeyHash)>,
    /// The keys themselves, encoded, where they are known.
    pub keys: Vec<(Arc<str>, Box<[u8]>)>,
}

/// A place where something was, or would be, removed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Place {
    /// `online`, `history`, `table`, `log`, `dead letters`, or `files`: those somebody else owns, which are hidden and stay.
    pub kind: &'static str,
    /// The view or source.
    pub name: String,
    pub rows_removed: u64,
    /// Rows that stay for other entities, without what only this one's views read.
    pub rows_cleared: u64,
    /// Files rewritten or deleted.
    pub files: u64,
    /// What should be known about it.
    pub note: Option<String>,
}

impl Inner {
    /// All who read a source: views in force, and views of earlier definitions that are still written.
    fn readers(&self) -> Vec<Arc<ViewPlan>> {
        let plan = self.plan();
        plan.iter().flat_map(|plan| plan.views.iter().cloned()).chain(self.pinned()).collect()
    }

    fn judge(&self, source: &Arc<SourcePlan>, forgotten: &Arc<Forgotten>) -> Option<Judge> {
        Judge::new(source, self.readers().iter(), forgotten)
    }

    /// Events without what was forgotten: what is applied and what becomes history.
    pub fn redacted(&self, source: &Arc<SourcePlan>, events: Positioned) -> Result<Positioned, IngestError> {
        let Some(forgotten) = self.forgotten.get() else { return Ok(events) };
        let Positioned { mut batch, mut positions } = events;
        if let Some(redaction) = self.judge(source, &forgotten).map(|judge| judge.judge(&batch)).transpose()?.flatten()
        {
            let mut row = 0..positions.len();
            positions.retain(|_| row.next().is_some_and(|row| redaction.keeps(row)));
            batch = redaction.apply(&batch)?;
        }
        // What was taken out of the log left a place without any value.
        let times = source.event_time.as_deref().and_then(|name| batch.column_by_name(name)).cloned();
        if let Some(times) = times.filter(|times| times.null_count() > 0) {
            let valid = arrow::compute::is_not_null(&times).map_err(|error| IngestError::Arrow(error.to_string()))?;
            let mut kept = valid.values().iter();
            positions.retain(|_| kept.next().unwrap_or(false));
            batch = arrow::compute::filter_record_batch(&batch, &valid)
                .map_err(|error| IngestError::Arrow(error.to_string()))?;
        }
        Ok(Positioned { batch, positions })
    }

    /// Rows of a prior history without what was forgotten.
    pub fn redacted_batch(&self, source: &Arc<SourcePlan>, batch: RecordBatch) -> Result<RecordBatch, IngestError> {
        let Some(forgotten) = self.forgotten.get().filter(|_| batch.num_rows() > 0) else { return Ok(batch) };
        match self.judge(source, &forgotten).map(|judge| judge.judge(&batch)).transpose()?.flatten() {
            Some(redaction) => Ok(redaction.apply(&batch)?),
            None => Ok(batch),
        }
    }

    /// By row of a push, the entity that was forgotten; None where no row names one.
    pub fn forgotten_in(
        &self,
        source: &Arc<SourcePlan>,
        batch: &RecordBatch,
    ) -> Result<Option<Vec<Option<Arc<str>>>>, RowsError> {
        let Some(forgotten) = self.forgotten.get() else { return Ok(None) };
        self.judge(source, &forgotten).map_or(Ok(None), |judge| judge.names(batch))
    }
}

/// From when this returns on, nothing is written of what is listed: whoever had begun before is done.
pub(crate) async fn follow(inner: &Inner, list: &Arc<Forgotten>) {
    inner.forgotten.set(list);
    inner.readers().iter().for_each(|view| view.forgotten.set(list));
    for stream in inner.streams().values() {
        let state = stream.state.lock().await;
        state.live.iter().chain(&state.building).for_each(|writer| writer.view.forgotten.set(list));
    }
    drop(inner.writing.write().await);
}

/// See [`crate::Ingest::forget`].
pub(crate) async fn forget(
    inner: &Arc<Inner>,
    what: &Forgetting,
    mode: Mode,
    progress: Sender<String>,
) -> Result<Vec<Place>, IngestError> {
    let _one = inner.forgetting.lock().await;
    let plan = inner.plan().ok_or(IngestError::NoPlan)?;
    let tell = |text: String| drop(progress.try_send(text));
    if mode == Mode::Apply {
        follow(inner, &what.list).await;
    }
    // A materialization under way holds rows that it read before.
    tell("waiting for a materialization under way".into());
    let _materializing = inner.materializing.lock().await;
    let only = Arc::new(what.list.only(&what.hashes));
    let judges: Vec<Judge> = plan.sources.iter().filter_map(|source| inner.judge(source, &only)).collect();
    let mut places = Vec::new();
    let mut keys: BTreeSet<(Generation, Box<[u8]>)> = BTreeSet::new();
    for view in inner.readers().iter().filter(|view| !view.is_offline_only()) {
        let generation = Generation::new(&inner.options.project, &view.name, view.storage_digest.as_str());
        let own = what.keys.iter().filter(|(entity, _)| *entity == view.entity);
        keys.extend(own.map(|(_, key)| (generation.clone(), key.clone())));
    }

    let mut tables_found = Vec::new();
    for judge in &judges {
        let source = &judge.source;
        tell(format!("looking into `{}`", source.name));
        if let Some(stream) = stream_of(inner, source) {
            stream.state.lock().await.flush(inner).await?;
        }
        let mut found = KeysOfViews::new();
        if let Some(table) = Table::open(inner.options.store.clone(), &inner.project_path(), source).await? {
            let looked = redact::look(&table, judge).await?;
            found.extend(looked.keys.iter().cloned());
            tables_found.push((judge, looked));
        }
        if source.is_stream() {
            let logged = in_log(inner, judge, Mode::DryRun).await?;
            found.extend(logged.keys);
        } else {
            places.push(in_files(inner, judge, !what.keys.is_empty(), &mut found).await?);
        }
        for (view, key) in found {
            let view = &judge.views[view];
            if !view.is_offline_only() {
                keys.insert((Generation::new(&inner.options.project, &view.name, view.storage_digest.as_str()), key));
            }
        }
    }
    tell(format!("removing {} keys from the online store", keys.len()));
    let online = from_online(inner, keys, mode).await?;
    if mode == Mode::Apply {
        // What it was made from goes next; a killed process finds the keys there.
        inner.options.online.sync().await?;
    }
    places.splice(0..0, online);

    for (judge, mut found) in tables_found {
        let source = &judge.source;
        if mode == Mode::Apply {
            tell(format!("rewriting what is kept of `{}`", source.name));
            let _one = inner.tables.lock().await;
            let table = Table::open(inner.options.store.clone(), &inner.project_path(), source).await?;
            if let Some(mut table) = table {
                found = redact::redact(&mut table, judge, &tables::work(inner), &|_| {}).await?;
            }
            if let Some(stream) = stream_of(inner, source) {
                stream.state.lock().await.history.reload().await?;
            }
        }
        places.push(Place {
            kind: if source.is_stream() { "history" } else { "table" },
            name: source.name.to_string(),
            rows_removed: found.rows_removed,
            rows_cleared: found.rows_cleared,
            files: found.files,
            note: None,
        });
    }
    for judge in &judges {
        if judge.source.is_stream() {
            let found = in_log(inner, judge, mode).await?;
            places.push(Place {
                kind: "log",
                name: judge.source.name.to_string(),
                rows_removed: found.removed,
                rows_cleared: found.cleared,
                files: found.segments,
                note: None,
            });
        }
        places.push(in_dead_letters(inner, judge, mode).await?);
    }
    if mode == Mode::Apply {
        tell("purging the files of the online store".into());
        inner.options.online.sync().await?;
        inner.options.online.purge().await?;
    }
    Ok(places)
}

fn stream_of(inner: &Inner, source: &SourcePlan) -> Option<Arc<Stream>> {
    inner.streams().get(&source.name).cloned()
}

/// Files that somebody else owns: counted, and what they say is hidden.
async fn in_files(
    inner: &Inner,
    judge: &Judge,
    keys_are_known: bool,
    found: &mut KeysOfViews,
) -> Result<Place, IngestError> {
    let source = &judge.source;
    let mut place = Place { kind: "files", name: source.name.to_string(), ..Place::default() };
    let (SourceKind::Files { pattern } | SourceKind::Static { pattern }) = &source.kind else { return Ok(place) };
    let counted = async {
        let mut rows = 0;
        let mut scan = inner.options.sources.scan(source, &judge.columns()).await?;
        while let Some(batch) = scan.next().await {
            let failed = |what: String| IngestError::Scan { source_name: source.name.to_string(), what };
            rows += judge.keys(&batch.map_err(|error| failed(error.to_string()))?, found)?;
        }
        Ok::<u64, IngestError>(rows)
    };
    match counted.await {
        Ok(0) => {}
        Ok(rows) => {
            place.note = Some(format!(
                "{rows} rows of {pattern} are hidden from now on and stay in files that are not Coeval's to change; \
                 whoever owns them has to"
            ));
        }
        // Without them no key is found, and none is needed.
        Err(error) if keys_are_known => {
            place.note = Some(format!("its files could not be read ({error}); what they hold is hidden"));
        }
        Err(error) => return Err(error),
    }
    Ok(place)
}

/// Removes keys, or counts those that are there; by view.
async fn from_online(
    inner: &Inner,
    keys: BTreeSet<(Generation, Box<[u8]>)>,
    mode: Mode,
) -> Result<Vec<Place>, IngestError> {
    let online = &inner.options.online;
    let mut removed: BTreeMap<String, u64> = BTreeMap::new();
    let mut by_view: BTreeMap<Generation, Vec<Key>> = BTreeMap::new();
    for (generation, key) in keys {
        let key = generation.key(key);
        by_view.entry(generation).or_default().push(key);
    }
    let plan = inner.plan();
    let pinned = inner.pinned();
    let views = || plan.iter().flat_map(|plan| &plan.views).chain(&pinned);
    for (generation, keys) in by_view {
        // A row is no hash of tiles, and asking for it as one is an error.
        let is_windowed = views().any(|view| {
            let digest = view.storage_digest.as_str();
            Generation::new(&generation.project, &view.name, digest) == generation && view.is_windowed()
        });
        let mut count = 0;
        for keys in keys.chunks(KEYS_PER_CALL) {
            count += match mode {
                Mode::Apply => {
                    inner.removals.fetch_add(1, Ordering::AcqRel);
                    online.write(keys.iter().cloned().map(Write::Remove).collect()).await?.applied
                }
                Mode::DryRun => {
                    let reads = keys.iter().map(|key| match is_windowed {
                        true => Read::Tiles(key.clone(), Vec::new()),
                        false => Read::Row(key.clone()),
                    });
                    let answers = online.read(&reads.collect::<Vec<_>>()).await?;
                    let is_there = |answer: &&Answer| {
                        matches!(answer, Answer::Row(Some(_)) | Answer::Tiles { position: Some(_), .. })
                    };
                    answers.iter().filter(is_there).count() as u64
                }
            };
        }
        *removed.entry(generation.view.to_string()).or_default() += count;
    }
    let place = |(name, rows_removed)| Place { kind: "online", name, rows_removed, ..Place::default() };
    Ok(removed.into_iter().map(place).collect())
}

#[derive(Default)]
struct Logged {
    removed: u64,
    cleared: u64,
    segments: u64,
    keys: KeysOfViews,
}

/// The records of one source in the event log. Applied ones are history by now and leave with their segment; those that
/// wait for their time, or lie in the same segment, are written anew.
async fn in_log(inner: &Arc<Inner>, judge: &Judge, mode: Mode) -> Result<Logged, IngestError> {
    let Some(stream) = stream_of(inner, &judge.source) else { return Ok(Logged::default()) };
    if mode == Mode::Apply {
        inner.log.seal().await?;
        inner.log.delete_released();
    }
    let (worker, judge) = (inner.clone(), judge.clone());
    let work = move || {
        let mut logged = Logged::default();
        let mut blanked = Vec::new();
        let mut change = |record: &RecordRef, events: &Events| -> Result<Option<Events>, LogError> {
            if record.source != judge.source.name {
                return Ok(None);
            }
            let failed = |error: RowsError| LogError::Encode(error.to_string());
            // A record whose columns no longer fit was, or will be, a dead letter.
            let Ok(batch) = judge.source.align(&events.batch, None) else { return Ok(None) };
            let Some(redaction) = judge.judge(&batch).map_err(failed)? else { return Ok(None) };
            judge.keys(&batch, &mut logged.keys).map_err(failed)?;
            logged.removed += redaction.removed();
            logged.cleared += redaction.cleared();
            let mut due = events.due.clone();
            for row in (0..due.len()).filter(|row| !redaction.keeps(*row)) {
                due[row] = crate::log::BLANK;
                blanked.push((record.segment, record.first_sequence + row as u64));
            }
            Ok(Some(Events { batch: redaction.blank(&batch).map_err(failed)?, due }))
        };
        let segments = match mode {
            Mode::Apply => worker.log.rewrite_sealed(&mut change)?,
            Mode::DryRun => worker.log.look(&mut change)?,
        };
        logged.segments = segments;
        Ok::<_, LogError>((logged, blanked))
    };
    let done = tokio::task::spawn_blocking(work).await.map_err(|error| IngestError::Arrow(error.to_string()))?;
    let (logged, blanked) = done?;
    if mode == Mode::Apply && !blanked.is_empty() {
        stream.state.lock().await.drop_early(&inner.log, &blanked);
        inner.log.delete_released();
    }
    Ok(logged)
}

/// Lines about forgotten entities are taken out of the dead letters of a source.
async fn in_dead_letters(inner: &Inner, judge: &Judge, mode: Mode) -> Result<Place, IngestError> {
    let source = &judge.source;
    let mut place = Place { kind: "dead letters", name: source.name.to_string(), ..Place::default() };
    let store = &inner.options.store;
    let folder = inner.project_path().join("dead-letters").join(&*source.name);
    let objects: Vec<_> = store.list(Some(&folder)).try_collect().await.map_err(IngestError::DeadLetter)?;
    let names = judge.columns();
    let fields = source.schema.iter().filter(|(name, _)| names.contains(name));
    let schema = Arc::new(Schema::new(
        fields.map(|(name, column_type)| Field::new(name, column_type.arrow(), true)).collect::<Vec<_>>(),
    ));
    for object in objects.iter().filter(|object| object.location.extension() == Some("jsonl")) {
        let found = store.get(&object.location).await.map_err(IngestError::DeadLetter)?;
        let bytes = found.bytes().await.map_err(IngestError::DeadLetter)?;
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().collect();
        let left: Vec<&str> = lines.iter().copied().filter(|line| !is_about(judge, &schema, line)).collect();
        if left.len() == lines.len() {
            continue;
        }
        place.rows_removed += (lines.len() - left.len()) as u64;
        place.files += 1;
        if mode == Mode::DryRun {
            continue;
        }
        if left.is_empty() {
            store.delete(&object.location).await.map_err(IngestError::DeadLetter)?;
        } else {
            let text = left.iter().fold(String::new(), |text, line| text + line + "\n");
            store.put(&object.location, PutPayload::from(text)).await.map_err(IngestError::DeadLetter)?;
        }
    }
    Ok(place)
}

/// Whether a dead letter is about a forgotten entity. One that cannot be read as a row of the source is left alone.
fn is_about(judge: &Judge, schema: &Arc<Schema>, line: &str) -> bool {
    let row = || -> Option<RecordBatch> {
        let letter: serde_json::Value = serde_json::from_str(line).ok()?;
        let mut decoder = arrow::json::ReaderBuilder::new(schema.clone()).build_decoder().ok()?;
        decoder.decode(letter.get("row")?.to_string().as_bytes()).ok()?;
        decoder.flush().ok()?
    };
    row().is_some_and(|row| judge.keys(&row, &mut KeysOfViews::new()).is_ok_and(|rows| rows > 0))
}

impl crate::Ingest {
    /// What was forgotten, from now on: when this returns, nothing more is written of it.
    pub async fn follow_forgotten(&self, list: &Arc<Forgotten>) {
        follow(&self.inner, list).await;
    }

    /// Removes entities from everything that this crate keeps; see [`Place`]. May be repeated, and is finished by a
    /// repetition when it was killed. `progress` hears what is being done.
    pub async fn forget(
        &self,
        what: &Forgetting,
        mode: Mode,
        progress: Sender<String>,
    ) -> Result<Vec<Place>, IngestError> {
        self.inner.check_running()?;
        forget(&self.inner, what, mode, progress).await
    }
}
