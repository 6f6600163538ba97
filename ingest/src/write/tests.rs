use std::sync::atomic::Ordering::SeqCst;

use feature_defs::aggregate::{Aggregate, Function};
use feature_defs::as_of::Times;
use feature_defs::catalog::Head;
use feature_defs::value::Value;
use feature_defs::window::{DAY, HOUR, Levels, MINUTE, Window, default_hop};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::tests::world::{Flaky, STREAM, T0, compiled};

fn layout(windows: &[Micros]) -> Layout {
    let windows: Vec<Window> = windows
        .iter()
        .map(|length| Window { length: *length, hop: Some(default_hop(*length)), head: Head::Exclusive })
        .collect();
    Layout {
        aggregates: vec![
            Aggregate::new(Function::parse("count").unwrap(), None).unwrap(),
            Aggregate::new(Function::parse("sum").unwrap(), Some(Type::Float64)).unwrap(),
        ],
        levels: Levels::new(windows.iter().filter_map(|window| window.hop)).unwrap(),
        windows,
    }
}

#[test]
fn leaving_out_unreachable_events_changes_nothing() {
    let layouts = [layout(&[HOUR]), layout(&[HOUR, 24 * HOUR]), layout(&[7 * DAY]), layout(&[HOUR, 30 * DAY])];
    let mut left_out = 0;
    for seed in 0..200 {
        let mut random = SmallRng::seed_from_u64(seed);
        let layout = &layouts[seed as usize % layouts.len()];
        let (mut plain, mut lean) = (Tiles::default(), Tiles::default());
        let mut now = 1_700_000_000_000_000;
        let mut sequence = 0;
        for _ in 0..6 {
            let mut events = Vec::new();
            let span = [HOUR, DAY, 60 * DAY][random.random_range(0..3)];
            for _ in 0..random.random_range(1..60) {
                now += random.random_range(0..span / 30);
                sequence += random.random_range(0..3);
                let event_time = now - if random.random_bool(0.3) { random.random_range(0..2 * span) } else { 0 };
                let event_time = event_time / MINUTE * MINUTE;
                let position = Position { time: now, sequence };
                let times = Times { event_time, created_time: None, known_time: event_time, position };
                let inputs = vec![Value::Bool(true), Value::Float64(f64::from(random.random_range(0..9)))];
                events.push(WindowEvent { times, inputs });
            }
            let position = Position { time: now, sequence };
            layout.apply(&mut plain, &events, position);
            let kept: Vec<&WindowEvent> = reachable(layout, &lean, &events).collect();
            left_out += events.len() - kept.len();
            layout.apply(&mut lean, kept, position);
            assert_eq!(lean, plain, "seed {seed}");
            if random.random_bool(0.3) {
                // The same events again, as after a crash.
                let kept: Vec<&WindowEvent> = reachable(layout, &lean, &events).collect();
                layout.apply(&mut lean, kept, Position { time: now, sequence: sequence + 1 });
                layout.apply(&mut plain, &[], Position { time: now, sequence: sequence + 1 });
                sequence += 1;
                assert_eq!(lean, plain, "seed {seed}, repeated");
            }
        }
    }
    assert!(left_out > 1_000, "only {left_out} events were left out");
}

/// A lane over a store of its own.
struct Written {
    store: Flaky,
    lane: Lane,
    removals: u64,
}

impl Written {
    async fn new() -> Written {
        let store = Flaky::default();
        let lane = Lane::open(&store, vec!["mark/p/s/live".into()]).await.unwrap().remove(0);
        Written { store, lane, removals: 0 }
    }

    async fn apply(&mut self, work: &[EntityWork], now: Micros) -> Result<Applied, WriteError> {
        let hand = Hand { store: &self.store, project: "p", epoch: 1, now, removals: self.removals };
        apply(hand, &mut self.lane, work).await
    }

    async fn tiles(&self, keys: &[Key]) -> Vec<Answer> {
        self.store.inner().read(&keys.iter().cloned().map(Read::AllTiles).collect::<Vec<_>>()).await.unwrap()
    }

    fn whole_reads(&self) -> u64 {
        self.store.whole_reads.load(SeqCst)
    }
}

fn windowed() -> Arc<ViewWriter> {
    let plan = compiled(STREAM);
    let view = plan.views.iter().find(|view| &*view.name == "load").unwrap();
    Arc::new(ViewWriter::new("p", view.clone(), true))
}

fn work(writer: &Arc<ViewWriter>, shop: u8, events: &[(Micros, f64)], position: Position) -> EntityWork {
    let event = |(index, (event_time, amount)): (usize, &(Micros, f64))| {
        let position = Position { sequence: position.sequence + index as u64, ..position };
        let times = Times { event_time: *event_time, created_time: None, known_time: *event_time, position };
        let top = if *amount < 50.0 { Value::Float64(*amount) } else { Value::Null };
        WindowEvent { times, inputs: vec![Value::Bool(true), Value::Float64(*amount), top] }
    };
    let last = Position { sequence: position.sequence + events.len() as u64 - 1, ..position };
    let events = events.iter().enumerate().map(event).collect();
    let change = EntityChange::Events { events, position: last };
    EntityWork { writer: writer.clone(), key: writer.generation.key([shop]), change, rows: vec![] }
}

#[tokio::test]
async fn what_is_kept_changes_nothing_that_is_written() {
    let writer = windowed();
    let keys: Vec<Key> = (0..6).map(|shop| writer.generation.key([shop])).collect();
    for seed in 0..20 {
        let mut random = SmallRng::seed_from_u64(seed);
        let (mut plain, mut keeping) = (Written::new().await, Written::new().await);
        keeping.lane.kept.turn_on();
        let mut now = T0;
        let mut sequence = 1;
        for round in 0..80 {
            // Now and then nothing happens for so long that the store may have let go of everything.
            now += if random.random_bool(0.05) { 2 * DAY } else { random.random_range(0..3 * MINUTE) };
            let mut group = Vec::new();
            for shop in 0..6 {
                if random.random_bool(0.5) {
                    continue;
                }
                let late = |random: &mut SmallRng| match random.random_range(0..10) {
                    0 => random.random_range(0..26 * HOUR),
                    1 => random.random_range(0..HOUR),
                    _ => random.random_range(0..MINUTE),
                };
                let events: Vec<(Micros, f64)> = (0..random.random_range(1..4))
                    .map(|_| (now - late(&mut random), f64::from(random.random_range(0..99))))
                    .collect();
                let from = Position { time: now, sequence };
                sequence += events.len() as u64;
                group.push(work(&writer, shop, &events, from));
            }
            for written in [&mut plain, &mut keeping] {
                written.apply(&group, now).await.unwrap();
                if round % 10 == 9 {
                    // The same again, as after a crash.
                    written.apply(&group, now).await.unwrap();
                }
                written.store.collect_expired(now).await.unwrap();
            }
            assert_eq!(keeping.tiles(&keys).await, plain.tiles(&keys).await, "seed {seed} round {round}");
        }
        let (all, some) = (plain.whole_reads(), keeping.whole_reads());
        assert!(some * 2 < all, "{some} of {all} reads were of everything");
    }
}

#[tokio::test]
async fn what_is_kept_is_forgotten_with_the_entity() {
    let writer = windowed();
    let key = writer.generation.key([1]);
    let mut written = Written::new().await;
    written.lane.kept.turn_on();
    let at = |sequence| Position { time: T0, sequence };
    written.apply(&[work(&writer, 1, &[(T0 - MINUTE, 1.0), (T0 - 3 * HOUR, 2.0)], at(1))], T0).await.unwrap();
    let mut alone = Written::new().await;
    alone.apply(&[work(&writer, 1, &[(T0, 3.0)], at(9))], T0).await.unwrap();
    written.store.write(vec![Write::Remove(key.clone())]).await.unwrap();
    written.removals += 1;
    written.apply(&[work(&writer, 1, &[(T0, 3.0)], at(9))], T0).await.unwrap();
    assert_eq!(written.tiles(std::slice::from_ref(&key)).await, alone.tiles(&[key]).await);
}

#[tokio::test]
async fn what_was_lost_or_left_unclear_is_not_kept() {
    let writer = windowed();
    let key = writer.generation.key([1]);
    let mut written = Written::new().await;
    written.lane.kept.turn_on();
    let at = |sequence| Position { time: T0, sequence };
    written.apply(&[work(&writer, 1, &[(T0 - MINUTE, 1.0)], at(1))], T0).await.unwrap();
    // One write of the next call happens, and nobody knows.
    written.store.writes_left.store(1, SeqCst);
    written.apply(&[work(&writer, 1, &[(T0 - 2, 2.0)], at(2))], T0).await.unwrap_err();
    written.store.down.store(false, SeqCst);
    written.store.writes_left.store(0, SeqCst);
    let done = written.apply(&[work(&writer, 1, &[(T0 - 2, 2.0)], at(2))], T0).await.unwrap();
    assert_eq!((done.applied, done.stale), (0, 1), "it was there");
    let mut plain = Written::new().await;
    plain.apply(&[work(&writer, 1, &[(T0 - MINUTE, 1.0), (T0 - 2, 2.0)], at(1))], T0).await.unwrap();
    assert_eq!(written.tiles(std::slice::from_ref(&key)).await, plain.tiles(&[key]).await);
    written.store.lose(2).await;
    let error = written.apply(&[work(&writer, 1, &[(T0 - 1, 4.0)], at(3))], T0).await.unwrap_err();
    assert!(matches!(error, WriteError::Lost), "{error}");
}
