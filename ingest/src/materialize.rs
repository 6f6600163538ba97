//! Files into the online store: what became known since the last time, up to a time that the caller names.
//!
//! A row of a file is visible from the later of its known time and its event time. A run through T takes the rows that
//! became visible after the previous run's T, groups them by entity, and writes each entity once at position (T, 0); the
//! time is remembered per view when everything is written and durable. A run that crashed half-way is repeated with any
//! T: windows skip, per entity, what their position covers, and a row of an as-of view replaces only an earlier one.
//!
//! Static sources have no times: they are loaded whole when they changed. A row that is gone from the files has to go from
//! the store too, and a changed row need not be greater than the old one, so the old rows are removed first; meanwhile the
//! view is not ready.
//!
//! Memory is bounded: when the new rows of a run do not fit, the files are read several times, each time for a part of the
//! entities.

use std::collections::{BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use feature_defs::as_of::Times;
use feature_defs::plan::{SourceKind, SourcePlan};
use feature_defs::time::{Micros, Position};
use futures::StreamExt;
use online_store::key::Generation;
use online_store::{Answer, Read, Write};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::Sender;
use tokio::time::Instant;

use crate::write::{EntityChange, EntityWork, SetAside, ViewWriter, apply};
use crate::{IngestError, Inner, Phase, dead_letter};

/// Between tries to load static sources on their own.
const RETRY_FIRST: Duration = Duration::from_millis(250);
const RETRY_LAST: Duration = Duration::from_secs(30);
/// Entities written between two messages of progress.
const WRITE_ENTITIES: usize = 8_192;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Apply,
    /// Count what would be written, and write nothing.
    DryRun,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Reading the files.
    Reading,
    /// Writing to the online store.
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
    /// Rows of views that became visible, summed over the source's views.
    pub rows_new: u64,
    /// Entities that have new rows, summed over the source's views.
    pub entities: u64,
    /// Of those, written so far.
    pub entities_written: u64,
    pub seconds: f64,
    pub message: Option<String>,
}

/// What is remembered of a view: how far it was materialized, or what its static files were.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Through {
    through: Micros,
    files: String,
}

fn through_fact(generation: &Generation) -> String {
    format!("through/{}/{}@{}", generation.project, generation.view, generation.digest)
}

/// Writes after which a generation counts as never materialized.
pub(crate) fn forget(generation: &Generation) -> Vec<Write> {
    vec![Write::Fact(generation.ready_fact(), None), Write::Fact(through_fact(generation), None)]
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
        let mut run = Run::new(inner, source, through, mode, Some(&progress));
        run.run().await?;
    }
    Ok(())
}

/// Loads static sources whose views are not ready, until it succeeds.
pub(crate) async fn load_static(inner: &Inner, names: BTreeSet<String>) {
    for name in names {
        let mut pause = RETRY_FIRST;
        loop {
            let source = inner.plan().and_then(|plan| plan.source(&name).filter(|source| source.is_static()).cloned());
            let Some(source) = source else { break };
            let result = {
                let _one = inner.materializing.lock().await;
                Run::new(inner, source, (inner.options.clock)(), Mode::Apply, None).run().await
            };
            let Err(error) = result else { break };
            let error = crate::error_chain(&error);
            tracing::error!(source = name, error, "a static source cannot be loaded; it is tried again");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY_LAST);
        }
    }
}

/// One source in one run.
struct Run<'a> {
    inner: &'a Inner,
    source: Arc<SourcePlan>,
    through: Micros,
    mode: Mode,
    progress: Option<&'a Sender<Progress>>,
    started: Instant,
    rows_read: u64,
    rows_new: u64,
    entities: u64,
    entities_written: u64,
}

/// One view that has something to do: rows visible after `from` are new; None: all are.
struct Target {
    writer: Arc<ViewWriter>,
    from: Option<Micros>,
}

/// By target and entity, with the number of new rows.
type Changes = HashMap<(usize, Box<[u8]>), (EntityChange, u32)>;

/// New rows of one part of the entities.
#[derive(Default)]
struct Collected {
    entities: Changes,
    rows: usize,
    /// Rows in memory: one per entity of an as-of view, all of them of windows.
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
        let mut hasher = DefaultHasher::new();
        entity.hash(&mut hasher);
        hasher.finish() % self.modulus == self.rest
    }
}

impl<'a> Run<'a> {
    fn new(
        inner: &'a Inner,
        source: Arc<SourcePlan>,
        through: Micros,
        mode: Mode,
        progress: Option<&'a Sender<Progress>>,
    ) -> Run<'a> {
        let started = Instant::now();
        Run {
            inner,
            source,
            through,
            mode,
            progress,
            started,
            rows_read: 0,
            rows_new: 0,
            entities: 0,
            entities_written: 0,
        }
    }

    async fn run(&mut self) -> Result<(), IngestError> {
        let Some(plan) = self.inner.plan() else { return Err(IngestError::NoPlan) };
        let pinned = self.inner.pinned();
        let views = plan.views.iter().chain(&pinned).filter(|view| {
            view.source.name == self.source.name && view.source.digest == self.source.digest && !view.is_offline_only()
        });
        let mut writers: Vec<Arc<ViewWriter>> =
            views.map(|view| Arc::new(ViewWriter::new(&self.inner.options.project, view.clone()))).collect();
        writers.sort_by(|a, b| a.generation.cmp(&b.generation));
        writers.dedup_by(|a, b| a.generation == b.generation);
        let files = match &self.source.kind {
            SourceKind::Static { pattern } => self.inner.options.sources.fingerprint(pattern).await?,
            _ => String::new(),
        };
        let mut targets = Vec::new();
        let mut reasons = BTreeSet::new();
        for writer in writers {
            match self.target(writer, &files).await? {
                Ok(target) => targets.push(target),
                Err(reason) => {
                    reasons.insert(reason);
                }
            }
        }
        if targets.is_empty() {
            let none = "no view reads this source".to_owned();
            let message = reasons.into_iter().next().unwrap_or(none);
            self.tell(Stage::Skipped, Some(message)).await;
            return Ok(());
        }
        let online = &self.inner.options.online;
        if self.mode == Mode::Apply {
            for target in targets.iter().filter(|target| target.from.is_none()) {
                let generation = &target.writer.generation;
                self.inner.set_phase(generation, Phase::Building { rows: 0 });
                online.write(forget(generation)).await?;
                online.remove_generation(generation).await?;
            }
        }
        let mut parts = vec![Part { rest: 0, modulus: 1 }];
        while let Some(part) = parts.pop() {
            let collected = self.collect(&targets, part, &mut parts).await?;
            self.rows_new += collected.rows as u64;
            self.entities += collected.entities.len() as u64;
            if self.mode == Mode::Apply {
                self.write(&targets, collected).await?;
            }
        }
        if self.mode == Mode::Apply {
            online.sync().await?;
            let remembered = Through { through: self.through, files };
            let remembered = Bytes::from(serde_json::to_vec(&remembered).expect("a time and a text are JSON"));
            for target in &targets {
                let generation = &target.writer.generation;
                // The time first: a ready view without it would take every row again.
                let through = Write::Fact(through_fact(generation), Some(remembered.clone()));
                let ready = Write::Fact(generation.ready_fact(), Some(Bytes::from_static(b"1")));
                online.write(vec![through, ready]).await?;
            }
            online.sync().await?;
            for target in &targets {
                self.inner.set_phase(&target.writer.generation, Phase::Ready);
            }
        }
        tracing::info!(
            source = %self.source.name,
            through = self.through,
            rows_read = self.rows_read,
            rows_new = self.rows_new,
            entities = self.entities,
            seconds = self.started.elapsed().as_secs_f64(),
            dry_run = self.mode == Mode::DryRun,
            "materialized"
        );
        self.tell(Stage::Done, None).await;
        Ok(())
    }

    /// What there is to do for a view, or why nothing.
    async fn target(&self, writer: Arc<ViewWriter>, files: &str) -> Result<Result<Target, String>, IngestError> {
        let generation = &writer.generation;
        let facts = [Read::Fact(generation.ready_fact()), Read::Fact(through_fact(generation))];
        let answers = self.inner.options.online.read(&facts).await?;
        let known = match answers.as_slice() {
            // An unreadable fact is like none: the view is filled anew.
            [Answer::Fact(Some(_)), Answer::Fact(Some(through))] => serde_json::from_slice::<Through>(through).ok(),
            _ => None,
        };
        Ok(match known {
            Some(known) if self.source.is_static() && known.files == files => {
                Err("its files have not changed since they were loaded".to_owned())
            }
            Some(_) if self.source.is_static() => Ok(Target { writer, from: None }),
            Some(known) if known.through >= self.through => Err(format!(
                "already materialized through {}, which is not before {}",
                show(known.through),
                show(self.through)
            )),
            Some(known) => Ok(Target { writer, from: Some(known.through) }),
            None => Ok(Target { writer, from: None }),
        })
    }

    /// Reads the files for one part of the entities. When they are too many, part of them is left for later.
    async fn collect(
        &mut self,
        targets: &[Target],
        part: Part,
        parts: &mut Vec<Part>,
    ) -> Result<Collected, IngestError> {
        let mut part = part;
        let mut names: Vec<String> = targets.iter().flat_map(|target| target.writer.view.source_columns()).collect();
        names.sort_unstable();
        names.dedup();
        let rows_max = self.inner.options.limits.materialize_rows_max;
        let mut collected = Collected::default();
        let mut scan = self.inner.options.sources.scan(&self.source, &names).await?;
        let position =
            if self.source.is_static() { Position::START } else { Position { time: self.through, sequence: 0 } };
        while let Some(batch) = scan.next().await {
            let failed = |what: String| IngestError::Scan { source_name: self.source.name.to_string(), what };
            let batch = batch.map_err(|error| failed(error.to_string()))?;
            self.rows_read += batch.num_rows() as u64;
            let times = self.source.times(&batch, None)?;
            let mut all_aside: Vec<SetAside> = Vec::new();
            for (index, target) in targets.iter().enumerate() {
                let visible: Vec<Option<Times>> = times
                    .iter()
                    .map(|times| {
                        let times = (*times)?;
                        let time = times.known_time.max(times.event_time);
                        let is_new = self.source.is_static()
                            || (time <= self.through && target.from.is_none_or(|from| time > from));
                        is_new.then_some(Times { position: Position { time, sequence: 0 }, ..times })
                    })
                    .collect();
                if visible.iter().all(Option::is_none) {
                    continue;
                }
                for rows in target.writer.rows(&batch, &visible, &mut all_aside) {
                    for row in 0..rows.len() {
                        let Some(entity) = rows.keys.get(row).filter(|entity| part.contains(entity)) else { continue };
                        let times = rows.times[row];
                        let change = if target.writer.view.is_windowed() {
                            EntityChange::Events { events: vec![target.writer.event(&rows, row, times)], position }
                        } else {
                            EntityChange::Row(target.writer.row(&rows, row, Times { position, ..times }))
                        };
                        collected.add((index, entity.into()), change);
                    }
                }
            }
            if self.mode == Mode::Apply {
                let positions: Vec<Position> = vec![position; batch.num_rows()];
                let (store, project) = (&self.inner.options.store, self.inner.project_path());
                dead_letter::write(store, &project, &self.source.name, &batch, &positions, &all_aside)
                    .await
                    .map_err(IngestError::DeadLetter)?;
            }
            while collected.held > rows_max && collected.entities.len() > 1 && part.modulus < 1 << 40 {
                parts.push(Part { rest: part.rest + part.modulus, modulus: part.modulus * 2 });
                part.modulus *= 2;
                collected.keep(part);
            }
            self.tell(Stage::Reading, None).await;
        }
        Ok(collected)
    }

    async fn write(&mut self, targets: &[Target], collected: Collected) -> Result<(), IngestError> {
        let mut work: Vec<EntityWork> = Vec::with_capacity(WRITE_ENTITIES);
        let mut entities = collected.entities.into_iter().peekable();
        while let Some(((target, entity), (mut change, _))) = entities.next() {
            if let EntityChange::Events { events, .. } = &mut change {
                events.sort_by_key(|event| event.times.position);
            }
            let writer = targets[target].writer.clone();
            let key = writer.generation.key(entity);
            work.push(EntityWork { writer, key, change, rows: Vec::new() });
            if work.len() == WRITE_ENTITIES || entities.peek().is_none() {
                let refused = apply(&*self.inner.options.online, &self.inner.options.project, &work).await?;
                if let Some(first) = refused.first() {
                    let view = &*first.generation.view;
                    tracing::warn!(
                        view,
                        entities = refused.len(),
                        reason = first.reason,
                        "entities were refused by the online store and keep their old rows"
                    );
                }
                self.entities_written += work.len() as u64;
                work.clear();
                self.tell(Stage::Writing, None).await;
            }
        }
        Ok(())
    }

    async fn tell(&self, stage: Stage, message: Option<String>) {
        let Some(progress) = self.progress else { return };
        let message = Progress {
            source: self.source.name.clone(),
            stage,
            rows_read: self.rows_read,
            rows_new: self.rows_new,
            entities: self.entities,
            entities_written: self.entities_written,
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

impl Collected {
    fn add(&mut self, entity: (usize, Box<[u8]>), change: EntityChange) {
        self.rows += 1;
        match self.entities.get_mut(&entity) {
            Some((known, rows)) => {
                self.held += usize::from(matches!(known, EntityChange::Events { .. }));
                known.join(change);
                *rows += 1;
            }
            None => {
                self.held += 1;
                self.entities.insert(entity, (change, 1));
            }
        }
    }

    fn keep(&mut self, part: Part) {
        self.entities.retain(|(_, entity), _| part.contains(entity));
        self.rows = self.entities.values().map(|(_, rows)| *rows as usize).sum();
        let held = |(change, _): &(EntityChange, u32)| match change {
            EntityChange::Row(_) => 1,
            EntityChange::Events { events, .. } => events.len(),
        };
        self.held = self.entities.values().map(held).sum();
    }
}

fn show(time: Micros) -> String {
    chrono::DateTime::from_timestamp_micros(time).map_or_else(|| time.to_string(), |time| time.to_rfc3339())
}
