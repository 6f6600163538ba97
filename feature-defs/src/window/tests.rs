use super::*;
use crate::aggregate::Function;
use crate::time::Position;
use crate::value::Type;

const T: Micros = 1_700_000_000 * SECOND; // 2023-11-14T22:13:20Z

fn window(length: Micros) -> Window {
    Window { length, hop: Some(default_hop(length)), head: Head::Exclusive }
}

#[test]
fn default_hops() {
    assert_eq!(default_hop(HOUR), 5 * MINUTE);
    assert_eq!(default_hop(12 * HOUR - 1), 5 * MINUTE);
    assert_eq!(default_hop(12 * HOUR), HOUR);
    assert_eq!(default_hop(12 * DAY), DAY);
}

#[test]
fn the_head_is_exclusive_and_the_tail_is_on_the_grid() {
    let hour = window(HOUR);
    assert!(!hour.contains(T, T), "a row never sees itself");
    assert!(hour.contains(T - 1, T));
    // 22:13:20 - 1 h = 21:13:20, floored to 21:10:00.
    let start = T - HOUR - 3 * MINUTE - 20 * SECOND;
    assert_eq!(hour.start(T), start);
    assert!(hour.contains(start, T));
    assert!(!hour.contains(start - 1, T));
    assert!(Window { head: Head::Inclusive, ..hour }.contains(T, T));
    assert_eq!(Window { hop: None, ..hour }.start(T), T - HOUR);
}

#[test]
fn a_cover_is_exact_and_small() {
    let levels = Levels::new([5 * MINUTE, HOUR]).unwrap();
    assert_eq!(levels.all(), [5 * MINUTE, HOUR, DAY]);
    for length in [HOUR, 6 * HOUR, 24 * HOUR, 7 * DAY, 30 * DAY] {
        let window = window(length);
        let tiles = levels.cover(window.start(T), T);
        assert_eq!(tiles[0].start, window.start(T));
        for pair in tiles.windows(2) {
            assert_eq!(pair[0].end(), pair[1].start, "no gap and no overlap");
        }
        assert_eq!(tiles.last().unwrap().end(), floor_to(T, 5 * MINUTE));
    }
    assert!(levels.cover(window(7 * DAY).start(T), T).len() <= 65);
}

#[test]
fn hops_must_divide_each_other() {
    assert_eq!(Levels::new([10 * MINUTE, 15 * MINUTE]), Err(LevelsError { smaller: 10 * MINUTE, larger: 15 * MINUTE }));
    assert_eq!(Levels::new([2 * MINUTE]).unwrap().all(), [2 * MINUTE, HOUR, DAY], "5 min does not fit on 2 min");
}

#[test]
fn late_known_events_are_not_seen_before_they_are_known() {
    let event = |event_time, known_time| WindowEvent {
        times: Times {
            event_time,
            created_time: None,
            known_time,
            position: Position { time: known_time, sequence: 1 },
        },
        inputs: vec![Value::Int64(1)],
    };
    let events = [event(T - 10, T - 10), event(T - 9, T + 1), event(T, T), event(T - 2 * HOUR, T - 2 * HOUR)];
    let count = Aggregate::new(Function::Count, Some(Type::Int64)).unwrap();
    let value = |t, visibility| window_value(&events, 0, &count, &window(HOUR), t, visibility);
    assert_eq!(value(T, Visibility::Known), Value::Int64(1));
    assert_eq!(value(T, Visibility::EventTime), Value::Int64(2));
    assert_eq!(value(T + 1, Visibility::Known), Value::Int64(3));
    let position = Position { time: T - 10, sequence: 1 };
    assert_eq!(value(T + 1, Visibility::AsKnown(position, crate::catalog::Visibility::Known)), Value::Int64(1));
}
