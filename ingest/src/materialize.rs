//! Files into the online store: what became known since the last time, up to a time that the caller names.
//!
//! A row of a file is visible from the later of its known time and its event time. A run through T takes the rows that
//! became visible after the previous run's T, and all rows up to T of files that were not there at that run, or were other
//! files then: their rows may have become known before. When everything is written and durable, the run is written down
//! ([`runs`](crate::runs)), and the online store remembers its time and its number per view. A run that crashed half-way is
//! repeated with any T.
//!
//! Rows of as-of views are read, encoded and sent batch by batch, several calls at once: the store keeps the greatest of an
//! entity, so neither order nor repetition matters. Windows need all new events of an entity at one position: they are
//! grouped, each entity is written once at position (T, 0), and a repeated run skips, per entity, what its position covers.
//! When the new events do not fit in memory, the files are read several times, each time for a part of the entities. Events
//! cannot be taken back from windows either, so a file that changed in place has its windows built anew, and so have files
//! that went while others came, which may be the same rows under another name.
//!
//! Static sources have no times: they are loaded whole when they changed. A row that is gone from the files has to go from
//! the store too, and a changed row need not be greater than the old one, so the old rows are removed first; meanwhile the
//! view is not ready.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use arrow::array::RecordBatch;
use bytes::Bytes;
use feature_defs::as_of::Times;
use feature_defs::plan::{SourceKind, SourcePlan};
use feature_defs::time::{Micros, Position, STATIC};
use futures::StreamExt;
use offline_store::source::{Format, SourceFiles};
use online_store::key::{Generation, Key};
use online_store::{Answer, OnlineStore, Read, StoreError, Write, row};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::Sender;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::runs::{Before, By, Outcome, RunFile, RunFiles, RunView, Seen};
use crate::write::{Applied, EntityChange, EntityWork, Hand, Lane, SetAside, ViewWriter, apply};
use crate::{IngestError, Inner, Phase, dead_letter, lock};

/// Entities of windows written between two messages of progress.
const WRITE_ENTITIES: usize = 8_192;
/// Rows of as-of views in one call of the store: a few megabytes, and some milliseconds of the store's time.
const WRITE_ROWS: usize = 4_096;
/// Calls on their way to the store at once, so that reading and encoding go on beside them.
const LANES: usize = 3;
/// Files are read in at most about so many pieces, each remembered with its newest row.
const PIECES: usize = 64;
/// Footers are asked how many rows there are, if there are not more files than this.
const COUNTED_FILES: usize = 256;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Apply,
    /// Count what would be written, and write nothing.
    DryRun,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Reading the files, and writing what needs no grouping.
    Reading,
    /// Writing windows to the online store.
    Writing,
    /// This source is done.
    Done,
    /// There was nothing to do; the message says why.
    Skipped,
}

/// How far a source is. Messages but the last of a source may be left out when nobody reads them fast enough.
#[derive(Debug, Clone, PartialEq)]
pub struct Progress {
    pub source: Arc<str>,
    pub stage: Stage,
    /// Rows read from files, over all passes.
    pub rows_read: u64,
    /// Rows that one pass will read, where files say so without being read.
    pub rows_total: Option<u64>,
    /// Rows of views that became visible, summed over the source's views.
    pub rows_new: u64,
    /// Of those, rows that the store took (a dry run: would take).
    pub rows_applied: u64,
    /// Of those, rows that the store had already, or something later.
    pub rows_stale: u64,
    /// Entities that were written (a dry run: that would change), summed over the source's views. An as-of entity whose
    /// rows lie far apart in the files is written, and counted, several times.
    pub entities: u64,
    pub views: Vec<ViewProgress>,
    pub seconds: f64,
    pub message: Option<String>,
}

/// How far one view of a source is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ViewProgress {
    pub view: Arc<str>,
    pub rows_new: u64,
    pub rows_applied: u64,
    pub rows_stale: u64,
    pub entities: u64,
}

/// What is remembered of a view: how far it was materialized, and which run says with what files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Through {
    pub through: Micros,
    /// What the files of a static source were.
    files: String,
    /// None: it was written before runs were.
    #[serde(default)]
    run: Option<u64>,
}

impl Through {
    pub fn fact(generation: &Generation) -> String {
        format!("through/{}/{}@{}", generation.project, generation.view, generation.digest)
    }

    /// An unreadable fact is like none: the view is filled anew.
    pub fn read(answer: Option<&Answer>) -> Option<Through> {
        let Some(Answer::Fact(Some(bytes))) = answer else { return None };
        serde_json::from_slice(bytes).ok()
    }
}

/// Names the files of the last attempt to fill windows of a generation, while it has not ended well.
fn attempt_fact(generation: &Generation) -> String {
    format!("attempt/{}/{}@{}", generation.project, generation.view, generation.digest)
}

/// Writes after which a generation counts as never materialized.
pub(crate) fn forget(generation: &Generation) -> Vec<Write> {
    let facts = [generation.ready_fact(), Through::fact(generation), attempt_fact(generation)];
    facts.into_iter().map(|name| Write::Fact(name, None)).collect()
}

/// See [`crate::Ingest::materialize`].
pub(crate) async fn materialize(
    inner: &Inner,
    names: &[String],
    through: Micros,
    mode: Mode,
    progress: Sender<Progress>,
) -> Result<(), IngestError> {
    let plan = inner.plan().ok_or(IngestError::NoPlan)?;
    let mut sources: Vec<Arc<SourcePlan>> = Vec::new();
    for name in names {
        let source = plan.source(name).ok_or_else(|| {
            let known: Vec<&str> = plan.sources.iter().filter(|s| !s.is_stream()).map(|s| &*s.name).collect();
            IngestError::UnknownFiles { source_name: name.clone(), known: known.join(", ") }
        })?;
        if source.is_stream() {
            return Err(IngestError::NotFiles { source_name: name.clone() });
        }
        sources.push(source.clone());
    }
    if names.is_empty() {
        sources.extend(plan.sources.iter().filter(|source| !source.is_stream()).cloned());
    }
    let now = (inner.options.clock)();
    if through > now {
        let shown = |time: Micros| {
            let time = chrono::DateTime::from_timestamp_micros(time);
            time.map_or_else(|| "the far future".to_owned(), |time| time.to_rfc3339())
        };
        return Err(IngestError::ThroughInFuture { through: shown(through), now: shown(now) });
    }
    // A view of earlier definitions is filled from its own source, as it was then.
    for view in inner.pinned() {
        let named = sources.iter().any(|source| source.name == view.source.name);
        if named && !sources.iter().any(|source| source.digest == view.source.digest) {
            sources.push(view.source.clone());
        }
    }
    for source in sources {
        let _one = inner.materializing.lock().await;
        Run::new(inner, source, through, mode, By::Request, Some(&progress)).run().await?;
    }
    Ok(())
}

/// One source through a time, without being asked by anybody.
pub(crate) async fn by_itself(inner: &Inner, name: &str, through: Micros, by: By) -> Result<(), IngestError> {
    let plan = inner.plan().ok_or(IngestError::NoPlan)?;
    let named = plan.source(name).filter(|source| !source.is_stream()).cloned();
    let pinned = inner.pinned().into_iter().map(|view| view.source.clone()).filter(|source| &*source.name == name);
    let mut sources: Vec<Arc<SourcePlan>> = Vec::new();
    for source in named.into_iter().chain(pinned) {
        if !sources.iter().any(|known| known.digest == source.digest) {
            sources.push(source);
        }
    }
    for source in sources {
        let _one = inner.materializing.lock().await;
        Run::new(inner, source, through, Mode::Apply, by, None).run().await?;
    }
    Ok(())
}

/// One source in one run.
struct Run<'a> {
    inner: &'a Inner,
    source: Arc<SourcePlan>,
    through: Micros,
    mode: Mode,
    by: By,
    progress: Option<&'a Sender<Progress>>,
    started: Instant,
    started_at: Micros,
    rows_read: u64,
    rows_total: Option<u64>,
    targets: Vec<Target>,
    /// Of a dry run: entities that would change, as hashes, so that each counts once. Bounded; see `is_counted_exactly`.
    changing: HashSet<u64>,
    is_counted_exactly: bool,
}

/// One view that has something to do.
struct Target {
    writer: Arc<ViewWriter>,
    /// Rows visible after this are new, besides those of files that are; None: all are.
    from: Option<Micros>,
    /// The files that were there at the run that `from` is of.
    before: Option<Before>,
    note: Option<String>,
    rows_new: u64,
    rows_applied: u64,
    rows_stale: u64,
    entities: u64,
}

/// Files that are read together: they are new to the same targets.
struct Piece {
    files: Vec<usize>,
    /// By target.
    is_new: Vec<bool>,
}

/// By target and entity, with the number of new rows.
type Changes = HashMap<(usize, Box<[u8]>), (EntityChange, u32)>;

/// New events of one part of the entities.
#[derive(Default)]
struct Collected {
    entities: Changes,
    /// Events in memory.
    held: usize,
}

/// A part of the entities: those whose hash leaves this rest.
#[derive(Clone, Copy)]
struct Part {
    rest: u64,
    modulus: u64,
}

impl Part {
    fn contains(&self, entity: &[u8]) -> bool {
        hash_of(entity) % self.modulus == self.rest
    }
}

fn hash_of(what: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    what.hash(&mut hasher);
    hasher.finish()
}

impl<'a> Run<'a> {
    fn new(
        inner: &'a Inner,
        source: Arc<SourcePlan>,
        through: Micros,
        mode: Mode,
        by: By,
        progress: Option<&'a Sender<Progress>>,
    ) -> Run<'a> {
        Run {
            inner,
            source,
            through,
            mode,
            by,
            progress,
            started: Instant::now(),
            started_at: (inner.options.clock)(),
            rows_read: 0,
            rows_total: None,
            targets: Vec::new(),
            changing: HashSet::new(),
            is_counted_exactly: true,
        }
    }

    async fn run(&mut self) -> Result<(), IngestError> {
        let Some(plan) = self.inner.plan() else { return Err(IngestError::NoPlan) };
        self.inner.check_fence()?;
        let pinned = self.inner.pinned();
        let views = plan.views.iter().chain(&pinned).filter(|view| {
            view.source.name == self.source.name && view.source.digest == self.source.digest && !view.is_offline_only()
        });
        let mut writers: Vec<Arc<ViewWriter>> = views.map(|view| self.inner.writer(view)).collect();
        writers.sort_by(|a, b| a.generation.cmp(&b.generation));
        writers.dedup_by(|a, b| a.generation == b.generation);
        if writers.is_empty() {
            self.tell(Stage::Skipped, Some("no view reads this source".to_owned())).await;
            return Ok(());
        }
        let static_files = match &self.source.kind {
            SourceKind::Static { pattern } => self.inner.options.sources.fingerprint(pattern).await?,
            _ => String::new(),
        };
        let mut reasons = BTreeSet::new();
        for writer in writers {
            match self.target(writer, &static_files).await? {
                Ok(target) => self.targets.push(target),
                Err(reason) => {
                    reasons.insert(reason);
                }
            }
        }
        if self.targets.is_empty() {
            let message = reasons.into_iter().next();
            self.tell(Stage::Skipped, message).await;
            return Ok(());
        }
        let mut files: Vec<RunFile> = Vec::new();
        let result = self.work(&static_files, &mut files).await;
        if let Err(IngestError::Store(error @ StoreError::Fenced { .. })) = &result {
            self.inner.fence(error);
        }
        if let Err(error) = &result
            && self.mode == Mode::Apply
        {
            self.write_down_failure(&crate::error_chain(error), files).await;
        }
        result?;
        let rows_new: u64 = self.targets.iter().map(|target| target.rows_new).sum();
        tracing::info!(
            source = %self.source.name,
            through = self.through,
            by = ?self.by,
            rows_read = self.rows_read,
            rows_new,
            seconds = self.started.elapsed().as_secs_f64(),
            dry_run = self.mode == Mode::DryRun,
            "materialized"
        );
        let notes: Vec<String> = self.targets.iter().filter_map(|target| target.note.clone()).collect();
        let inexact = (!self.is_counted_exactly).then(|| "the number of entities is a lower bound".to_owned());
        let message: Vec<String> = notes.into_iter().chain(inexact).collect();
        self.tell(Stage::Done, (!message.is_empty()).then(|| message.join("; "))).await;
        Ok(())
    }

    /// Everything between knowing what is to be done and saying that it was. `files` are those of the moment it began.
    async fn work(&mut self, static_files: &str, files: &mut Vec<RunFile>) -> Result<(), IngestError> {
        let mut columns: Vec<String> =
            self.targets.iter().flat_map(|target| target.writer.view.source_columns()).collect();
        columns.sort_unstable();
        columns.dedup();
        let listed = self.inner.options.sources.files_of(&self.source, &columns).await?;
        *files = listed.files.iter().map(|file| RunFile::of(&file.meta)).collect();
        self.look_at_files(files).await?;
        let pieces = self.pieces(files);
        self.count(&listed, &pieces).await;
        let online = self.inner.options.online.clone();
        if self.mode == Mode::Apply {
            let digest = hash_of(files.iter().map(|file| (&file.path, file.size, file.modified)).collect::<Vec<_>>());
            for target in &self.targets {
                let generation = &target.writer.generation;
                if target.from.is_none() {
                    self.inner.set_phase(generation, Phase::Building { rows: 0 });
                    online.write(forget(generation)).await?;
                    online.remove_generation(generation).await?;
                }
                if target.writer.view.is_windowed() {
                    let attempt = Bytes::from(digest.to_string());
                    online.write(vec![Write::Fact(attempt_fact(generation), Some(attempt))]).await?;
                }
            }
        }
        self.fill(&listed, &pieces, &columns, files).await?;
        if self.mode == Mode::Apply {
            online.sync().await?;
            let number = self.write_down(Outcome::Done, std::mem::take(files)).await?;
            let remembered = Through { through: self.through, files: static_files.to_owned(), run: Some(number) };
            let remembered = Bytes::from(serde_json::to_vec(&remembered).expect("a time and a text are JSON"));
            for target in &self.targets {
                let generation = &target.writer.generation;
                // The time first: a ready view without it would take every row again.
                let through = Write::Fact(Through::fact(generation), Some(remembered.clone()));
                let attempt = Write::Fact(attempt_fact(generation), None);
                let ready = Write::Fact(generation.ready_fact(), Some(Bytes::from_static(b"1")));
                online.write(vec![through, attempt, ready]).await?;
            }
            online.sync().await?;
            for target in &self.targets {
                self.inner.set_phase(&target.writer.generation, Phase::Ready);
            }
        }
        Ok(())
    }

    /// What there is to do for a view, or why nothing.
    async fn target(&self, writer: Arc<ViewWriter>, files: &str) -> Result<Result<Target, String>, IngestError> {
        let generation = &writer.generation;
        let facts = [Read::Fact(generation.ready_fact()), Read::Fact(Through::fact(generation))];
        let answers = self.inner.options.online.read(&facts).await?;
        let is_ready = matches!(answers.first(), Some(Answer::Fact(Some(_))));
        let known = Through::read(answers.get(1)).filter(|_| is_ready);
        let target = |from, before| {
            let (note, rows_new, rows_applied, rows_stale, entities) = (None, 0, 0, 0, 0);
            Target { writer: writer.clone(), from, before, note, rows_new, rows_applied, rows_stale, entities }
        };
        Ok(match known {
            Some(known) if self.source.is_static() && known.files == files => {
                Err("its files have not changed since they were loaded".to_owned())
            }
            Some(_) if self.source.is_static() => Ok(target(None, None)),
            Some(known) if known.through >= self.through => Err(format!(
                "already materialized through {}, which is not before {}",
                show(known.through),
                show(self.through)
            )),
            Some(known) => {
                let run = match known.run {
                    Some(number) => self.inner.runs().read(&self.source.name, number).await?,
                    None => None,
                };
                let mut files = match &run {
                    Some(run) => self.inner.runs().files(run).await?.map(|(_, files)| files),
                    None => None,
                };
                // With another delay or grid, rows become visible at other times.
                if run.is_some_and(|run| *run.source_digest != *self.source.digest.as_str()) {
                    files.iter_mut().flatten().for_each(|file| file.newest = None);
                }
                let mut target = target(Some(known.through), files.map(Before::new));
                if known.run.is_some() && target.before.is_none() && target.writer.view.is_windowed() {
                    self.rebuild(&mut target, "the record of the run before is gone");
                }
                Ok(target)
            }
            None => Ok(target(None, None)),
        })
    }

    /// Windows cannot take events back, so they begin anew.
    fn rebuild(&self, target: &mut Target, why: &str) {
        let view = &*target.writer.view.name;
        tracing::warn!(source = %self.source.name, view, why, "the windows of a view are built anew");
        target.note = Some(format!("the windows of `{view}` were built anew: {why}"));
        target.from = None;
        target.before = None;
    }

    /// Finds out which windows have to be built anew.
    async fn look_at_files(&mut self, files: &[RunFile]) -> Result<(), IngestError> {
        let digest = hash_of(files.iter().map(|file| (&file.path, file.size, file.modified)).collect::<Vec<_>>());
        let mut targets = std::mem::take(&mut self.targets);
        for target in targets.iter_mut().filter(|target| target.writer.view.is_windowed() && target.from.is_some()) {
            let attempt = [Read::Fact(attempt_fact(&target.writer.generation))];
            let attempt = self.inner.options.online.read(&attempt).await?;
            if let Some(Answer::Fact(Some(attempt))) = attempt.first()
                && **attempt != *digest.to_string().as_bytes()
            {
                self.rebuild(target, "files changed after a run that did not end");
                continue;
            }
            let Some(before) = &target.before else { continue };
            let seen: Vec<Seen> = files.iter().map(|file| before.look(file)).collect();
            let first = |wanted| seen.iter().position(|seen| *seen == wanted).map(|file| &files[file].path);
            let (changed, new, gone) = (first(Seen::Changed), first(Seen::New), before.gone(files));
            if let Some(path) = changed {
                let why = format!("{path} is another file than at the run before");
                self.rebuild(target, &why);
            } else if let Some(path) = new.filter(|_| gone > 0) {
                let why = format!("{gone} files of the run before are gone, and {path} may hold their rows");
                self.rebuild(target, &why);
            }
        }
        self.targets = targets;
        Ok(())
    }

    /// Which files are read, and together with which.
    fn pieces(&self, files: &[RunFile]) -> Vec<Piece> {
        let mut classes: BTreeMap<Vec<bool>, Vec<usize>> = BTreeMap::new();
        for (index, file) in files.iter().enumerate() {
            let mut is_new = Vec::with_capacity(self.targets.len());
            let mut is_wanted = false;
            for target in &self.targets {
                let seen = match (&target.before, target.from) {
                    (Some(before), Some(_)) => before.look(file),
                    // Written before runs were: what files there were, nobody knows. Rows are taken again, events are not.
                    (None, Some(_)) if target.writer.view.is_windowed() => Seen::Same { newest: None },
                    _ => Seen::New,
                };
                is_wanted |= match (seen, target.from) {
                    (Seen::Same { newest: Some(newest) }, Some(from)) => newest > from,
                    _ => true,
                };
                is_new.push(matches!(seen, Seen::New | Seen::Changed));
            }
            if is_wanted {
                classes.entry(is_new).or_default().push(index);
            }
        }
        let wanted: usize = classes.values().map(Vec::len).sum();
        let together = wanted.div_ceil(PIECES).max(1);
        let mut pieces = Vec::new();
        for (is_new, files) in classes {
            pieces.extend(files.chunks(together).map(|files| Piece { files: files.to_vec(), is_new: is_new.clone() }));
        }
        pieces
    }

    /// How many rows there are to read, where that costs little.
    async fn count(&mut self, listed: &SourceFiles, pieces: &[Piece]) {
        let files: Vec<usize> = pieces.iter().flat_map(|piece| &piece.files).copied().collect();
        if self.progress.is_none() || listed.format() != Format::Parquet || files.len() > COUNTED_FILES {
            return;
        }
        let mut rows = 0;
        for file in files {
            // A file that cannot be read is named when its rows are.
            let Ok(metadata) = listed.parquet_metadata(file).await else { return };
            rows += u64::try_from(metadata.metadata().file_metadata().num_rows()).unwrap_or(0);
        }
        self.rows_total = Some(rows);
    }

    /// Reads the files and writes (or compares) everything new. Learns the newest row of each file on the way.
    async fn fill(
        &mut self,
        listed: &SourceFiles,
        pieces: &[Piece],
        columns: &[String],
        files: &mut [RunFile],
    ) -> Result<(), IngestError> {
        for (index, file) in files.iter_mut().enumerate() {
            let before = self.targets.iter().find_map(|target| target.before.as_ref());
            if let Some(Seen::Same { newest }) = before.map(|before| before.look(file))
                && !pieces.iter().any(|piece| piece.files.contains(&index))
            {
                file.newest = newest;
            }
        }
        let has_windows = self.targets.iter().any(|target| target.writer.view.is_windowed());
        let mut parts = vec![Part { rest: 0, modulus: 1 }];
        let (project, source) = (&self.inner.options.project, &self.source.name);
        let marks = (0..=LANES).map(|lane| format!("mark/{project}/{source}/lane{lane}")).collect();
        let mut lanes = Lane::open(&*self.inner.options.online, marks).await?;
        let mut windows = lanes.pop().expect("there is a lane more than rows need");
        let mut rows = Some(Lanes { pending: Pending::default(), free: lanes, busy: JoinSet::new() });
        while let Some(mut part) = parts.pop() {
            let mut collected = Collected::default();
            for piece in pieces {
                let newest = self
                    .read(
                        &listed.part(&piece.files),
                        columns,
                        &piece.is_new,
                        &mut rows,
                        &mut collected,
                        &mut part,
                        &mut parts,
                    )
                    .await?;
                piece.files.iter().for_each(|file| files[*file].newest = newest);
            }
            // Rows need one pass only.
            if let Some(rows) = rows.take() {
                rows.close(self).await?;
            }
            self.write(collected, &mut windows).await?;
            if !has_windows {
                break;
            }
        }
        self.check(&windows).await
    }

    /// One piece of the files, for one part of the entities of windows, and in the first pass for rows. When the events are
    /// too many, part of them is left for later. Returns when the newest row becomes visible.
    #[expect(clippy::too_many_arguments, reason = "one pass over one piece, cut out of `fill`")]
    async fn read(
        &mut self,
        files: &SourceFiles,
        columns: &[String],
        is_new: &[bool],
        rows: &mut Option<Lanes>,
        collected: &mut Collected,
        part: &mut Part,
        parts: &mut Vec<Part>,
    ) -> Result<Option<Micros>, IngestError> {
        let rows_max = self.inner.options.limits.materialize_rows_max;
        let mut newest = Micros::MIN;
        let mut scan = self.inner.options.sources.scan_files(&self.source, columns, files).await?;
        while let Some(batch) = scan.next().await {
            let failed = |what: String| IngestError::Scan { source_name: self.source.name.to_string(), what };
            let batch = batch.map_err(|error| failed(error.to_string()))?;
            self.rows_read += batch.num_rows() as u64;
            let times = self.source.times(&batch, None)?;
            let visible = |times: &Times| times.known_time.max(times.event_time);
            newest = times.iter().flatten().map(visible).max().unwrap_or(newest).max(newest);
            let mut all_aside: Vec<SetAside> = Vec::new();
            for (index, is_new) in is_new.iter().enumerate() {
                let writer = self.targets[index].writer.clone();
                if !writer.view.is_windowed() && rows.is_none() {
                    continue;
                }
                let new = self.new_rows(index, *is_new, &times);
                if new.iter().all(Option::is_none) {
                    continue;
                }
                if let (false, Some(lanes)) = (writer.view.is_windowed(), &mut *rows) {
                    lanes.take(self, index, &batch, &new, &mut all_aside).await?;
                } else {
                    self.collect(index, &batch, &new, *part, collected, &mut all_aside);
                }
            }
            if self.mode == Mode::Apply {
                let positions: Vec<Position> = vec![self.position(); batch.num_rows()];
                let (store, project) = (&self.inner.options.store, self.inner.project_path());
                dead_letter::write(store, &project, &self.source.name, &batch, &positions, &all_aside)
                    .await
                    .map_err(IngestError::DeadLetter)?;
            }
            while collected.held > rows_max && collected.entities.len() > 1 && part.modulus < 1 << 40 {
                parts.push(Part { rest: part.rest + part.modulus, modulus: part.modulus * 2 });
                part.modulus *= 2;
                collected.keep(*part);
            }
            self.tell(Stage::Reading, None).await;
        }
        Ok((newest > Micros::MIN).then_some(newest))
    }

    /// Of everything that this run writes.
    fn position(&self) -> Position {
        if self.source.is_static() { Position::START } else { Position { time: self.through, sequence: 0 } }
    }

    /// The times of the rows that a target has not seen. Events carry the position at which they come in: after what is
    /// applied, also where they should have been there earlier.
    fn new_rows(&self, target: usize, is_new: bool, times: &[Option<Times>]) -> Vec<Option<Times>> {
        let from = self.targets[target].from;
        let new = |times: &Option<Times>| {
            let times = (*times)?;
            let time = times.known_time.max(times.event_time);
            if self.source.is_static() {
                return Some(Times { position: Position { time, sequence: 0 }, ..times });
            }
            let is_after = from.is_none_or(|from| time > from);
            if time > self.through || !(is_after || is_new) {
                return None;
            }
            let time = from.map_or(time, |from| time.max(from.saturating_add(1)));
            Some(Times { position: Position { time, sequence: 0 }, ..times })
        };
        times.iter().map(new).collect()
    }

    /// Groups the new events of windows.
    fn collect(
        &mut self,
        target: usize,
        batch: &RecordBatch,
        new: &[Option<Times>],
        part: Part,
        collected: &mut Collected,
        aside: &mut Vec<SetAside>,
    ) {
        let position = self.position();
        let writer = self.targets[target].writer.clone();
        for rows in writer.rows(batch, new, aside) {
            for row in 0..rows.len() {
                let Some(entity) = rows.keys.get(row).filter(|entity| part.contains(entity)) else { continue };
                let event = writer.event(&rows, row, rows.times[row]);
                collected.add((target, entity.into()), EntityChange::Events { events: vec![event], position });
            }
        }
    }

    /// Fails if something that went through a lane is not there any more.
    async fn check(&self, lane: &Lane) -> Result<(), IngestError> {
        if self.mode == Mode::Apply {
            lane.check(&*self.inner.options.online).await?;
        }
        Ok(())
    }

    /// Writes the windows that were collected; a dry run compares them.
    async fn write(&mut self, collected: Collected, lane: &mut Lane) -> Result<(), IngestError> {
        let online = self.inner.options.online.clone();
        let mut by_target: Vec<Vec<EntityWork>> = self.targets.iter().map(|_| Vec::new()).collect();
        for ((target, entity), (mut change, rows)) in collected.entities {
            if let EntityChange::Events { events, .. } = &mut change {
                events.sort_by_key(|event| event.times.position);
            }
            self.targets[target].rows_new += u64::from(rows);
            let writer = self.targets[target].writer.clone();
            let key = writer.generation.key(entity);
            by_target[target].push(EntityWork { writer, key, change, rows: Vec::new() });
        }
        for (target, work) in by_target.into_iter().enumerate() {
            for work in work.chunks(WRITE_ENTITIES) {
                let target = &mut self.targets[target];
                if self.mode == Mode::DryRun {
                    compare_windows(&*online, target, work).await?;
                } else {
                    let done = apply(self.inner.hand(), lane, work).await?;
                    tell_refused(&done);
                    (target.rows_applied, target.rows_stale) =
                        (target.rows_applied + done.applied, target.rows_stale + done.stale);
                    target.entities += (work.len() - done.aside.len()) as u64;
                }
                self.tell(Stage::Writing, None).await;
            }
        }
        Ok(())
    }

    /// Writes the run down under the next number.
    async fn write_down(&self, outcome: Outcome, files: Vec<RunFile>) -> Result<u64, IngestError> {
        let log = self.inner.runs();
        let last = log.last_done(&self.source.name).await?;
        let before = match &last {
            Some(last) => log.files(last).await?,
            None => None,
        };
        let files = match before {
            Some((number, before)) if before == files => RunFiles::SameAs(number),
            _ => RunFiles::Listed(files),
        };
        let sum = |of: fn(&Target) -> u64| self.targets.iter().map(of).sum();
        let view = |target: &Target| RunView {
            view: target.writer.generation.view.to_string(),
            digest: target.writer.generation.digest.to_string(),
            from: target.from,
            rows_new: target.rows_new,
            rows_applied: target.rows_applied,
            rows_stale: target.rows_stale,
            note: target.note.clone(),
        };
        let mut run = crate::runs::Run {
            format: 0,
            number: 0,
            source: self.source.name.to_string(),
            source_digest: self.source.digest.as_str().to_owned(),
            by: self.by,
            started: self.started_at,
            ended: (self.inner.options.clock)(),
            through: self.through,
            rows_read: self.rows_read,
            rows_new: sum(|target| target.rows_new),
            rows_applied: sum(|target| target.rows_applied),
            rows_stale: sum(|target| target.rows_stale),
            views: self.targets.iter().map(view).collect(),
            files,
            outcome,
        };
        log.append(&mut run).await?;
        if run.outcome == Outcome::Done {
            lock(&self.inner.kept).logged(&self.source.name, run.through);
        }
        Ok(run.number)
    }

    /// A failure is written down once as long as its reason stays the same: what is tried again every minute would bury
    /// the rest.
    async fn write_down_failure(&self, reason: &str, files: Vec<RunFile>) {
        let log = self.inner.runs();
        let known = match log.newest(&self.source.name, 1).await {
            Ok(runs) => runs.first().map(|run| run.outcome.clone()),
            Err(_) => return,
        };
        let outcome = Outcome::Failed { reason: reason.to_owned() };
        if known.as_ref() != Some(&outcome)
            && let Err(error) = self.write_down(outcome, files).await
        {
            tracing::warn!(source = %self.source.name, %error, "a failed materialization could not be written down");
        }
    }

    async fn tell(&self, stage: Stage, message: Option<String>) {
        let Some(progress) = self.progress else { return };
        let sum = |of: fn(&Target) -> u64| self.targets.iter().map(of).sum();
        let view = |target: &Target| ViewProgress {
            view: target.writer.generation.view.clone(),
            rows_new: target.rows_new,
            rows_applied: target.rows_applied,
            rows_stale: target.rows_stale,
            entities: target.entities,
        };
        let message = Progress {
            source: self.source.name.clone(),
            stage,
            rows_read: self.rows_read,
            rows_total: self.rows_total,
            rows_new: sum(|target| target.rows_new),
            rows_applied: sum(|target| target.rows_applied),
            rows_stale: sum(|target| target.rows_stale),
            entities: sum(|target| target.entities),
            views: self.targets.iter().map(view).collect(),
            seconds: self.started.elapsed().as_secs_f64(),
            message,
        };
        // Whoever asked may have gone away; the work goes on.
        match stage {
            Stage::Done | Stage::Skipped => drop(progress.send(message).await),
            Stage::Reading | Stage::Writing => drop(progress.try_send(message)),
        }
    }
}

fn tell_refused(done: &Applied) {
    if let Some(first) = done.aside.first() {
        let view = &*first.generation.view;
        tracing::warn!(
            view,
            entities = done.aside.len(),
            reason = first.reason,
            "entities were refused by the online store and keep their old rows"
        );
    }
}

/// What windows would change: events after the position of their entity are new to it.
async fn compare_windows(
    online: &dyn OnlineStore,
    target: &mut Target,
    work: &[EntityWork],
) -> Result<(), IngestError> {
    for work in work.chunks(WRITE_ROWS) {
        let reads: Vec<Read> = work.iter().map(|work| Read::Tiles(work.key.clone(), Vec::new())).collect();
        // What is built anew is removed first.
        let answers = if target.from.is_some() { online.read(&reads).await? } else { Vec::new() };
        for (index, work) in work.iter().enumerate() {
            let EntityChange::Events { events, .. } = &work.change else { continue };
            let position = match answers.get(index) {
                Some(Answer::Tiles { position: Some(position), .. }) => *position,
                _ => Position::START,
            };
            let new = events.iter().filter(|event| event.times.position > position).count() as u64;
            target.rows_applied += new;
            target.rows_stale += events.len() as u64 - new;
            target.entities += u64::from(new > 0);
        }
    }
    Ok(())
}

/// Rows of as-of views on their way to the store. A lane has one call under way; its mark tells whether what it wrote
/// before is still there.
struct Lanes {
    pending: Pending,
    free: Vec<Lane>,
    busy: JoinSet<Result<(Lane, usize, Landed), IngestError>>,
}

/// What became of one call: rows that the store took, and did not; in a dry run, the entities that would change.
#[derive(Default)]
struct Landed {
    applied: u64,
    stale: u64,
    entities: u64,
    changing: Vec<u64>,
}

/// The rows of one call: one target's, one of each entity.
#[derive(Default)]
struct Pending {
    target: usize,
    rows: Vec<(Box<[u8]>, Bytes)>,
    /// By hash of the entity.
    places: HashMap<u64, usize>,
    /// Rows that a greater one of the same call replaced.
    merged: u64,
}

impl Pending {
    fn add(&mut self, entity: &[u8], blob: Bytes) {
        let place = *self.places.entry(hash_of(entity)).or_insert(self.rows.len());
        match self.rows.get_mut(place) {
            Some((known, row)) if **known == *entity => {
                if row::order(&blob) > row::order(row) {
                    *row = blob;
                }
                self.merged += 1;
            }
            // Either new, or another entity with the same hash.
            _ => self.rows.push((entity.into(), blob)),
        }
    }
}

impl Lanes {
    /// Takes the new rows of a batch.
    async fn take(
        &mut self,
        run: &mut Run<'_>,
        target: usize,
        batch: &RecordBatch,
        new: &[Option<Times>],
        aside: &mut Vec<SetAside>,
    ) -> Result<(), IngestError> {
        let writer = run.targets[target].writer.clone();
        for rows in writer.rows(batch, new, aside) {
            let blobs = writer.blobs(&rows, run.position());
            run.targets[target].rows_new += blobs.len() as u64;
            for (row, blob) in blobs.into_iter().enumerate() {
                let Some(entity) = rows.keys.get(row) else { continue };
                if self.pending.target != target || self.pending.rows.len() >= WRITE_ROWS {
                    self.send(run).await?;
                    self.pending.target = target;
                }
                self.pending.add(entity, blob);
            }
        }
        Ok(())
    }

    /// Puts what is pending on its way; waits for a lane if none is free.
    async fn send(&mut self, run: &mut Run<'_>) -> Result<(), IngestError> {
        if self.pending.rows.is_empty() {
            return Ok(());
        }
        let Pending { target, rows, merged, .. } = std::mem::take(&mut self.pending);
        run.targets[target].rows_stale += merged;
        let lane = match self.free.pop() {
            Some(lane) => lane,
            None => self.landed(run).await?,
        };
        let writer = run.targets[target].writer.clone();
        let (online, project) = (run.inner.options.online.clone(), run.inner.options.project.clone());
        let is_empty_before = run.targets[target].from.is_none();
        let mode = run.mode;
        self.busy.spawn(async move {
            match mode {
                Mode::Apply => write_rows(&*online, &project, lane, &writer, rows).await,
                Mode::DryRun => compare_rows(&*online, lane, &writer, rows, is_empty_before).await,
            }
            .map(|(lane, landed)| (lane, target, landed))
        });
        Ok(())
    }

    /// Waits for one call to end and counts what came of it.
    async fn landed(&mut self, run: &mut Run<'_>) -> Result<Lane, IngestError> {
        let ended = self.busy.join_next().await;
        let ended = ended.ok_or_else(|| IngestError::Arrow("no call to the store is under way".into()))?;
        let (lane, target, landed) = ended.map_err(|error| IngestError::Arrow(error.to_string()))??;
        let target = &mut run.targets[target];
        target.rows_applied += landed.applied;
        target.rows_stale += landed.stale;
        target.entities += landed.entities;
        let entities_max = run.inner.options.limits.materialize_rows_max;
        for entity in landed.changing {
            if run.changing.len() < entities_max || run.changing.contains(&entity) {
                target.entities += u64::from(run.changing.insert(entity));
            } else {
                run.is_counted_exactly = false;
            }
        }
        Ok(lane)
    }

    /// Sends what is left, waits for everything, and makes sure that all of it is there.
    async fn close(mut self, run: &mut Run<'_>) -> Result<(), IngestError> {
        self.send(run).await?;
        while !self.busy.is_empty() {
            let lane = self.landed(run).await?;
            self.free.push(lane);
        }
        for lane in &self.free {
            run.check(lane).await?;
        }
        Ok(())
    }
}

/// One call of the store, with the lane's next mark behind the rows.
async fn write_rows(
    store: &dyn OnlineStore,
    project: &str,
    mut lane: Lane,
    writer: &Arc<ViewWriter>,
    rows: Vec<(Box<[u8]>, Bytes)>,
) -> Result<(Lane, Landed), IngestError> {
    lane.check(store).await?;
    let count = rows.len() as u64;
    let keyed: Vec<(Key, Bytes)> =
        rows.into_iter().map(|(entity, blob)| (writer.generation.key(entity), blob)).collect();
    let writes = keyed.iter().map(|(key, blob)| writer.write_row(key.clone(), blob.clone())).collect();
    let landed = match lane.write(store, writes).await {
        Ok(outcome) => {
            let stale = outcome.stale.min(count);
            Landed { applied: count - stale, stale, entities: count, changing: Vec::new() }
        }
        // One row may be too large: they are tried in halves, and the one is told apart.
        Err(StoreError::Refused { .. } | StoreError::Corrupt { .. }) => {
            let work = |(key, blob): (Key, Bytes)| EntityWork {
                writer: writer.clone(),
                key,
                change: EntityChange::Row(blob),
                rows: Vec::new(),
            };
            let work: Vec<EntityWork> = keyed.into_iter().map(work).collect();
            let done = apply(Hand { store, project, epoch: 0, now: STATIC, removals: 0 }, &mut lane, &work).await?;
            tell_refused(&done);
            Landed { applied: done.applied, stale: done.stale, entities: done.applied, changing: Vec::new() }
        }
        Err(error) => return Err(error.into()),
    };
    Ok((lane, landed))
}

/// What the rows would change.
async fn compare_rows(
    store: &dyn OnlineStore,
    lane: Lane,
    writer: &Arc<ViewWriter>,
    rows: Vec<(Box<[u8]>, Bytes)>,
    is_empty_before: bool,
) -> Result<(Lane, Landed), IngestError> {
    let hashes: Vec<u64> = rows.iter().map(|(entity, _)| hash_of((&writer.generation, entity))).collect();
    let reads = rows.iter().map(|(entity, _)| Read::Row(writer.generation.key(entity.clone()))).collect::<Vec<_>>();
    // What is loaded anew is removed first.
    let answers = if is_empty_before { Vec::new() } else { store.read(&reads).await? };
    let mut landed = Landed::default();
    for (index, (_, blob)) in rows.iter().enumerate() {
        let is_there = match answers.get(index) {
            Some(Answer::Row(Some(stored))) => row::order(stored) >= row::order(blob),
            _ => false,
        };
        if is_there {
            landed.stale += 1;
        } else {
            landed.applied += 1;
            landed.changing.push(hashes[index]);
        }
    }
    Ok((lane, landed))
}

impl Collected {
    fn add(&mut self, entity: (usize, Box<[u8]>), change: EntityChange) {
        self.held += 1;
        match self.entities.get_mut(&entity) {
            Some((known, rows)) => {
                known.join(change);
                *rows += 1;
            }
            None => {
                self.entities.insert(entity, (change, 1));
            }
        }
    }

    fn keep(&mut self, part: Part) {
        self.entities.retain(|(_, entity), _| part.contains(entity));
        self.held = self.entities.values().map(|(_, rows)| *rows as usize).sum();
    }
}

fn show(time: Micros) -> String {
    chrono::DateTime::from_timestamp_micros(time).map_or_else(|| time.to_string(), |time| time.to_rfc3339())
}
