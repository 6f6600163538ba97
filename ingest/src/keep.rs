//! What is done without being asked: once a second, a look at what the online store still has, and at what is due.
//!
//! A store that lost its contents lost the facts that say what is complete, and one that lost only its newest writes lost
//! its newest marks. Streams are then built again, or written again from where the mark is (`apply`); sources of files are
//! materialized again through the time of the last run that was written down. The same look finds what the grid of a source
//! (`every`) asks for: one run through the newest instant that has passed, however many were missed. Whatever fails is tried
//! again, with longer and longer pauses, and says so until it succeeds.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use feature_defs::plan::{Plan, SourcePlan, ViewPlan};
use feature_defs::time::{Micros, floor_to};
use online_store::key::Generation;
use online_store::{Answer, Read};
use tokio::time::Instant;

use crate::materialize::{self, Through};
use crate::runs::By;
use crate::{IngestError, Inner, Phase, lock};

const LOOK_EVERY: Duration = Duration::from_secs(1);
/// What expired is garbage, and no hurry.
const COLLECT_EVERY: Duration = Duration::from_secs(3_600);
/// Between tries of a run that failed: doubled from the first to the last.
const RETRY_FIRST: Duration = Duration::from_millis(250);
const RETRY_LAST: Duration = Duration::from_secs(60);

/// How the sources of files are doing that are looked after here.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    sources: BTreeMap<String, KeptSource>,
}

#[derive(Debug, Default)]
struct KeptSource {
    /// Through which time the last run went that is written down; the outer None: not looked up yet.
    logged: Option<Option<Micros>>,
    is_running: bool,
    trouble: Option<(By, String)>,
    retry_at: Option<Instant>,
    pause: Duration,
}

impl Kept {
    /// A run was written down.
    pub fn logged(&mut self, source: &str, through: Micros) {
        self.sources.entry(source.to_owned()).or_default().logged = Some(Some(through));
    }

    pub fn troubles(&self) -> Vec<String> {
        let troubles = self.sources.iter().filter_map(|(name, source)| Some((name, source.trouble.as_ref()?)));
        let text = |(name, (by, what)): (&String, &(By, String))| {
            let why = match by {
                By::Schedule => "is due on its schedule and cannot be materialized",
                By::Load => "cannot be loaded",
                By::Recovery | By::Request => "has to be materialized again, which fails",
            };
            format!("source `{name}` {why}: {what}; it is tried again")
        };
        troubles.map(text).collect()
    }
}

/// The task: until the process ends, or writes nothing more.
pub(crate) async fn run(inner: Arc<Inner>) {
    let mut stopping = inner.stopping.subscribe();
    let mut collected = Instant::now();
    loop {
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            () = inner.look.notified() => {}
            _ = stopping.changed() => return,
        }
        let Some(plan) = inner.plan() else { continue };
        if inner.check_running().is_err() {
            return;
        }
        look_at_streams(&inner).await;
        if let Err(error) = look_at_files(&inner, &plan).await {
            // A store that does not answer is told of elsewhere.
            tracing::debug!(%error, "the online store does not say what it has of files");
        }
        if collected.elapsed() >= COLLECT_EVERY {
            collected = Instant::now();
            collect(&inner).await;
        }
    }
}

/// Lets the store drop what has expired.
pub(crate) async fn collect(inner: &Inner) {
    if !inner.options.expires {
        return;
    }
    match inner.options.online.collect_expired((inner.options.clock)()).await {
        Ok(0) => {}
        Ok(entities) => tracing::info!(entities, "expired entities were removed from the online store"),
        Err(error) => tracing::warn!(%error, "expired entities stay in the online store for another hour"),
    }
}

async fn look_at_streams(inner: &Arc<Inner>) {
    for stream in inner.streams().values() {
        let mut state = stream.state.lock().await;
        if let Err(error) = state.look(inner, stream).await {
            tracing::debug!(source = %stream.name, %error, "the online store does not say what it has of a stream");
        }
    }
}

/// One source of files with its views.
struct Files {
    source: Arc<SourcePlan>,
    generations: Vec<Generation>,
}

/// What a source needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Due {
    through: Micros,
    by: By,
}

async fn look_at_files(inner: &Arc<Inner>, plan: &Plan) -> Result<(), IngestError> {
    let pinned = inner.pinned();
    let sources: Vec<Files> = plan
        .sources
        .iter()
        .filter(|source| !source.is_stream())
        .map(|source| {
            let is_wanted = |view: &&Arc<ViewPlan>| view.source.name == source.name && !view.is_offline_only();
            let views = plan.views.iter().chain(&pinned).filter(is_wanted);
            let mut generations: Vec<Generation> = views.map(|view| inner.writer(view).generation.clone()).collect();
            generations.sort();
            generations.dedup();
            Files { source: source.clone(), generations }
        })
        .filter(|files| !files.generations.is_empty())
        .collect();
    let all = || sources.iter().flat_map(|files| &files.generations);
    let reads: Vec<Read> = all()
        .flat_map(|generation| [Read::Fact(generation.ready_fact()), Read::Fact(Through::fact(generation))])
        .collect();
    if reads.is_empty() {
        return Ok(());
    }
    let answers = inner.options.online.read(&reads).await?;
    let mut answers = answers.chunks(2);
    for Files { source, generations } in &sources {
        // Through which time every view of the source is filled.
        let mut filled: Option<Micros> = Some(Micros::MAX);
        for generation in generations {
            let answers = answers.next().unwrap_or_default();
            let is_ready = matches!(answers.first(), Some(Answer::Fact(Some(_))));
            let through = Through::read(answers.get(1)).filter(|_| is_ready).map(|known| known.through);
            filled = filled.min(through);
            if through.is_none() && inner.phase(generation) == Some(Phase::Ready) {
                tracing::warn!(source = %source.name, view = %generation.view, "the online store lost a view, which is filled again");
                inner.set_phase(generation, Phase::Building { rows: 0 });
            }
        }
        let due = due(inner, source, filled).await?;
        if let Some(due) = due.filter(|_| may_start(inner, &source.name)) {
            let (task_inner, name) = (inner.clone(), source.name.clone());
            inner.spawn(async move { run_one(&task_inner, &name, due).await });
        }
    }
    Ok(())
}

/// What there is to do for a source that is filled through this time.
async fn due(inner: &Inner, source: &SourcePlan, filled: Option<Micros>) -> Result<Option<Due>, IngestError> {
    let now = (inner.options.clock)();
    if source.is_static() {
        return Ok(filled.is_none().then_some(Due { through: now, by: By::Load }));
    }
    let known = lock(&inner.kept).sources.entry(source.name.to_string()).or_default().logged;
    let logged = match known {
        Some(logged) => logged,
        None => {
            let logged = inner.runs().last_done(&source.name).await?.map(|run| run.through);
            lock(&inner.kept).sources.entry(source.name.to_string()).or_default().logged.get_or_insert(logged);
            logged
        }
    };
    let every = source.clock.every;
    let instant = (inner.options.schedule && every > 0).then(|| floor_to(now, every));
    // The clock may have been set back since.
    let logged = logged.filter(|logged| *logged <= now);
    let due = match (logged, instant) {
        (Some(logged), Some(instant)) if logged >= instant => Due { through: logged, by: By::Recovery },
        (_, Some(instant)) => Due { through: instant, by: By::Schedule },
        (Some(logged), None) => Due { through: logged, by: By::Recovery },
        (None, None) => return Ok(None),
    };
    Ok(filled.is_none_or(|filled| filled < due.through).then_some(due))
}

/// Takes the source for a run, unless one goes on or it is too early to try again.
fn may_start(inner: &Inner, source: &str) -> bool {
    let mut kept = lock(&inner.kept);
    let source = kept.sources.entry(source.to_owned()).or_default();
    let may = !source.is_running && source.retry_at.is_none_or(|at| Instant::now() >= at);
    source.is_running |= may;
    may
}

async fn run_one(inner: &Inner, name: &str, due: Due) {
    let result = materialize::by_itself(inner, name, due.through, due.by).await;
    let mut kept = lock(&inner.kept);
    let source = kept.sources.entry(name.to_owned()).or_default();
    source.is_running = false;
    match result {
        Ok(()) => {
            source.retry_at = None;
            source.pause = RETRY_FIRST;
            if source.trouble.take().is_some() {
                tracing::info!(source = name, "a source is materialized again");
            }
        }
        Err(error) => {
            let error = crate::error_chain(&error);
            if source.trouble.as_ref().is_none_or(|(_, before)| *before != error) {
                tracing::error!(source = name, by = ?due.by, error, "a source cannot be materialized; it is tried again");
            }
            source.trouble = Some((due.by, error));
            source.pause = source.pause.max(RETRY_FIRST);
            source.retry_at = Some(Instant::now() + source.pause);
            source.pause = (source.pause * 2).min(RETRY_LAST);
        }
    }
}
