//! Rows for a version in shadow: scored after the champion has answered, on what the champion leaves, and shed when that is not
//! enough.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use feature_defs::time::Micros;
use proto::v1::Column;
use tokio::sync::Notify;

use super::trial::{SHADOW, Trial};
use crate::answer::Gateway;
use crate::observe::{Exposed, Observed, ObservedPrediction};
use crate::predict::{self, Predicted};
use crate::request::{self, Rows};
use crate::versions::ServedModel;

/// Rows that wait, and requests. What is further behind tells nothing that the next rows would not.
const ROWS_MAX: usize = 20_000;
const WORKS_MAX: usize = 4_096;
/// What has waited so long is shed: the champion is too busy for a shadow.
const WAIT_MAX: Duration = Duration::from_secs(20);
/// Between looks at a champion that is busy.
const LOOK: Duration = Duration::from_micros(500);
/// Requests that are scored side by side, so that the version may batch them.
const SIDE_BY_SIDE: usize = 8;
const DEADLINE: Duration = Duration::from_secs(10);

/// One request that the champion has answered.
pub struct Work {
    pub trial: Arc<Trial>,
    pub observed: Arc<Observed>,
    /// What the caller sent; empty where the champion's features are those of the version.
    pub columns: Vec<Column>,
    pub rows: usize,
    pub at: Vec<Micros>,
}

/// Requests that wait for a version in shadow.
#[derive(Default)]
pub struct Queue {
    waiting: Mutex<VecDeque<(Work, Instant)>>,
    rows: AtomicUsize,
    come: Notify,
}

impl Queue {
    /// Gives the work back where there is no room.
    pub fn offer(&self, work: Work) -> Result<(), Work> {
        let rows = work.observed.rows.count;
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() >= WORKS_MAX || self.rows.load(Ordering::Relaxed) + rows > ROWS_MAX {
            return Err(work);
        }
        self.rows.fetch_add(rows, Ordering::Relaxed);
        waiting.push_back((work, Instant::now()));
        drop(waiting);
        self.come.notify_one();
        Ok(())
    }

    fn take(&self) -> Option<(Work, Instant)> {
        let taken = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front()?;
        self.rows.fetch_sub(taken.0.observed.rows.count, Ordering::Relaxed);
        Some(taken)
    }
}

/// Scores what comes, until it is dropped.
pub async fn run(gateway: &Arc<Gateway>) {
    let workers = (0..SIDE_BY_SIDE).map(|_| work(gateway));
    futures::future::join_all(workers).await;
}

async fn work(gateway: &Arc<Gateway>) {
    let rollouts = &gateway.rollouts;
    loop {
        let Some((work, since)) = rollouts.queue.take() else {
            rollouts.queue.come.notified().await;
            // Others may wait for what is left.
            continue;
        };
        rollouts.queue.come.notify_one();
        let rows = work.observed.rows.count as u64;
        if !champion_is_idle(gateway, &work.trial, since).await {
            rollouts.shed(&work.trial, rows);
            continue;
        }
        let Some(challenger) = work.trial.challenger.clone() else { continue };
        match score(gateway, &challenger, &work).await {
            Some(observed) => gateway.observing.hand_over(observed),
            None => rollouts.shed(&work.trial, rows),
        }
    }
}

/// Waits until the champion has nothing to do; false where that takes too long.
async fn champion_is_idle(gateway: &Gateway, trial: &Trial, since: Instant) -> bool {
    loop {
        if since.elapsed() > WAIT_MAX {
            return false;
        }
        let served = gateway.served();
        match served.models.get(&*trial.model) {
            Some(champion) if champion.server.is_busy() => tokio::time::sleep(LOOK).await,
            _ => return true,
        }
    }
}

/// What the version says of rows that the champion has answered. None where its features could not be had.
async fn score(gateway: &Gateway, challenger: &Arc<ServedModel>, work: &Work) -> Option<Observed> {
    let Work { trial, observed, columns, at, .. } = work;
    let champion = observed.prediction.as_ref()?;
    let started = Instant::now();
    let service = &challenger.plan.service;
    let (rows, features): (Rows, _) = if service.semantic_digest == observed.service.semantic_digest {
        (observed.rows.picked_all(), observed.features.clone())
    } else {
        let taken = |column: &&Column| service.columns.iter().any(|wanted| wanted.name == column.name);
        let sent: Vec<Column> = columns.iter().filter(taken).cloned().collect();
        let rows = request::read_rows(service, &sent, work.rows).ok()?;
        let features = gateway.features(&gateway.prepared(service), &rows, at, started + DEADLINE).await.ok()?;
        (rows, Arc::new(features))
    };
    let fetched = features.fetch_time + features.transform_time;
    let forward = Instant::now();
    let predicted = predict::behind_requests(challenger, &rows, &features, started + DEADLINE).await.ok()?;
    let Predicted { outputs, rows: outcomes, encoded, queue_time, forward_time } = predicted;
    let assigned = champion.exposed.as_ref().map_or_else(Vec::new, |exposed| exposed.assigned.clone());
    let exposed = Exposed { trial: trial.clone(), assigned, beside: Some(observed.clone()) };
    let prediction = ObservedPrediction {
        plan: challenger.plan.clone(),
        version: challenger.version,
        arm: SHADOW,
        outputs,
        rows: outcomes,
        encoded,
        queue_time,
        forward_time,
        exposed: Some(exposed),
    };
    Some(Observed {
        service: service.clone(),
        rows,
        features,
        places: observed.places.clone(),
        request_id: observed.request_id.clone(),
        time: gateway.observing.now(),
        // What it would have taken in the champion's place.
        total: fetched + forward.elapsed(),
        prediction: Some(prediction),
    })
}
