use feature_defs::aggregate::{Aggregate, Function};
use feature_defs::as_of::Times;
use feature_defs::catalog::Head;
use feature_defs::value::Value;
use feature_defs::window::{DAY, HOUR, Levels, MINUTE, Window, default_hop};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::*;

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
