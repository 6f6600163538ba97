use feature_defs::aggregate::{Arguments, Buckets, Clamp, Function, Quantile};
use feature_defs::as_of::Visibility;
use feature_defs::catalog::Head;
use feature_defs::window::{DAY, HOUR, MINUTE, SECOND, default_hop, window_value};

use feature_defs::time::floor_to;
use feature_defs::window::WindowEvent;

use super::*;

const T0: Micros = 1_700_000_000 * SECOND;

fn layout(lengths: &[Micros]) -> Layout {
    let windows: Vec<Window> = lengths
        .iter()
        .map(|length| Window { length: *length, hop: Some(default_hop(*length)), head: Head::Exclusive })
        .collect();
    let levels = Levels::new(windows.iter().filter_map(|window| window.hop)).unwrap();
    let aggregates = [
        (Function::Count, None),
        (Function::Sum, Some(Type::Float64)),
        (Function::Min, Some(Type::Float64)),
        (Function::Max, Some(Type::Int64)),
    ]
    .map(|(function, input)| Aggregate::new(function, input).unwrap());
    Layout { aggregates: aggregates.into(), windows, levels }
}

/// A small generator of its own, so that a failing seed can be run again anywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// Events in order of position: mostly fresh, some late, some tied, some known later than they happened.
fn events(random: &mut Random, n: u64, step: Micros) -> Vec<WindowEvent> {
    let mut clock = T0;
    (1..=n)
        .map(|sequence| {
            clock += random.below(step as u64) as Micros;
            let late = match random.below(5) {
                0 => random.below(3 * DAY as u64) as Micros,
                1 => random.below(10 * MINUTE as u64) as Micros,
                _ => 0,
            };
            let event_time = if random.below(3) == 0 { floor_to(clock - late, MINUTE) } else { clock - late };
            let known_time = if random.below(4) == 0 { clock } else { event_time };
            let position = Position { time: clock, sequence };
            let times = Times { event_time, created_time: None, known_time, position };
            let float = match random.below(12) {
                0 => Value::Null,
                1 => Value::Float64(f64::NAN),
                2 => Value::Float64(1e300),
                3 => Value::Float64(-1e300),
                other => Value::Float64(other as f64 / 10.0),
            };
            let inputs = vec![Value::Bool(true), float.clone(), float, Value::Int64(random.below(1_000) as i64)];
            WindowEvent { times, inputs }
        })
        .collect()
}

fn outputs(layout: &Layout) -> Vec<(usize, Window)> {
    (0..layout.aggregates.len()).flat_map(|a| layout.windows.iter().map(move |window| (a, *window))).collect()
}

/// Reads through bytes, as a reader does: only the tiles asked for.
fn read(layout: &Layout, tiles: &Tiles, t: Micros) -> Result<Vec<Value>, AtBeforeStore> {
    let ids = layout.tiles_at(t);
    let answer = ids.iter().filter_map(|id| match id {
        &BOUNDS => Some((BOUNDS, encode_bounds(tiles.exact_from))),
        id => Some((*id, layout.encode(tiles.tiles.get(id)?))),
    });
    let answer: Vec<(TileId, Bytes)> = answer.collect();
    let stored = StoredTiles::new(tiles.position, answer.iter().map(|(id, bytes)| (*id, &bytes[..]))).unwrap();
    let tiles = layout.decode_answer(tiles.position, answer.iter().cloned()).unwrap();
    let decoded = layout.read(&tiles, &outputs(layout), t);
    // Tiles that are read again are kept decoded, and answer the same.
    for _ in 0..3 {
        let read = layout.read_stored(&stored, &outputs(layout), t);
        assert_eq!(read, decoded.clone().map_err(ReadError::from), "as they are stored");
    }
    decoded
}

fn reference(layout: &Layout, events: &[WindowEvent], t: Micros) -> Vec<Value> {
    outputs(layout)
        .iter()
        .map(|(a, window)| window_value(events, *a, &layout.aggregates[*a], window, t, Visibility::Known))
        .collect()
}

#[test]
fn tiles_agree_with_the_reference_at_every_position() {
    for seed in 1..=20 {
        let layout = layout(&[HOUR, 6 * HOUR, 24 * HOUR, 7 * DAY]);
        let mut random = Random(seed * 0x9e37_79b9);
        let all = events(&mut random, 300, 20 * MINUTE);
        let mut tiles = Tiles::default();
        let (mut exact, mut refused) = (0, 0);
        for (i, event) in all.iter().enumerate() {
            layout.apply(&mut tiles, [event], event.times.position);
            let now = event.times.position.time;
            // At the server's clock every read is exact.
            for t in [now, now + 1, now + 7 * MINUTE, now + 2 * HOUR, now + 3 * DAY] {
                assert_eq!(read(&layout, &tiles, t), Ok(reference(&layout, &all[..=i], t)), "seed {seed} event {i}");
            }
            // At a past time a read is exact or says that it is not.
            for back in [1, 30 * SECOND, 4 * MINUTE, 6 * MINUTE, 11 * MINUTE, HOUR, DAY] {
                match read(&layout, &tiles, now - back) {
                    Ok(values) => {
                        exact += 1;
                        assert_eq!(values, reference(&layout, &all[..=i], now - back), "seed {seed} event {i} -{back}");
                    }
                    Err(AtBeforeStore) => refused += 1,
                }
            }
        }
        assert!(exact > 300 && refused > 300, "both happen: {exact} exact, {refused} refused");
    }
}

/// Every function over inputs that try it, whole and by parts.
fn every_function() -> Vec<Aggregate> {
    let decimal = Type::Decimal { precision: 38, scale: 3 };
    let names = || Buckets::values(Type::String, vec![text("a"), text("b")]).unwrap();
    let edges = |input: Type| Buckets::edges(input, vec![-1.0, 0.5, 100.0]).unwrap();
    let arguments = Arguments {
        q: Quantile::new(0.9),
        clamp: Clamp::new(-1000.0, 1000.0),
        n: Some(3),
        k: Some(4),
        buckets: Some(edges(Type::Float64)),
    };
    let make =
        |name: &str, input: Type| Aggregate::new(Function::new(name, arguments.clone()).unwrap(), Some(input)).unwrap();
    vec![
        Aggregate::new(Function::Count, None).unwrap(),
        make("count", Type::String),
        make("sum", Type::Int64),
        make("sum", decimal.clone()),
        make("mean", Type::Float64),
        make("max", Type::Float64),
        make("variance", Type::Float64),
        make("variance", decimal),
        make("stddev", Type::Int64),
        make("first", Type::Float64),
        make("last", Type::String),
        make("last", Type::List(Box::new(Type::Int64))),
        make("last_n", Type::Int64),
        make("distinct_count", Type::String),
        make("distinct_count", Type::Float64),
        make("percentile", Type::Float64),
        make("percentile", Type::Int64),
        make("top_k", Type::Float64),
        make("top_k", Type::String),
        make("histogram", Type::Float64),
        Aggregate::new(Function::Histogram(names()), Some(Type::String)).unwrap(),
        Aggregate::new(Function::Count, None).unwrap().by(names()).unwrap(),
        make("sum", Type::Float64).by(edges(Type::Float64)).unwrap(),
        make("stddev", Type::Float64).by(names()).unwrap(),
        make("last_n", Type::String).by(names()).unwrap(),
        make("distinct_count", Type::Int64).by(edges(Type::Int64)).unwrap(),
        make("percentile", Type::Float64).by(names()).unwrap(),
    ]
}

fn text(text: &str) -> Value {
    Value::String(text.into())
}

/// Few values, so that they meet, and those that are hard.
fn any_value(random: &mut Random, value_type: &Type) -> Value {
    if random.below(8) == 0 {
        return Value::Null;
    }
    match value_type {
        Type::Bool => Value::Bool(true),
        Type::Int32 => Value::Int32(random.below(4) as i32),
        Type::Int64 => match random.below(8) {
            0 => Value::Int64(i64::MAX),
            1 => Value::Int64(i64::MIN),
            _ => Value::Int64(random.below(40) as i64 - 20),
        },
        Type::Float64 => Value::Float64(match random.below(10) {
            0 => f64::NAN,
            1 => f64::INFINITY,
            2 => 1e300,
            3 => -1e300,
            4 => 0.0,
            other => other as f64 / 10.0 - 0.6,
        }),
        Type::Decimal { .. } => Value::Decimal(match random.below(6) {
            0 => 10_i128.pow(38) - 1,
            1 => 1 - 10_i128.pow(38),
            other => i128::from(other) - 3,
        }),
        Type::String => text(["", "a", "b", "c", "OTHER"][random.below(5) as usize]),
        Type::List(item) => Value::List((0..random.below(3)).map(|_| any_value(random, item)).collect()),
        Type::Struct(fields) => Value::Struct(fields.iter().map(|(_, field)| any_value(random, field)).collect()),
        other => panic!("no values of {other}"),
    }
}

#[test]
fn every_function_agrees_with_the_reference() {
    for seed in 1..=2 {
        let layout = Layout { aggregates: every_function(), ..layout(&[HOUR, 24 * HOUR]) };
        let types = layout.input_types();
        let mut random = Random(seed * 0x9e37_79b9);
        let mut all = events(&mut random, 100, 20 * MINUTE);
        for event in &mut all {
            // Ties of event time are decided by the created time, then by the sequence.
            event.times.created_time = (random.below(2) == 0).then_some(event.times.known_time);
            event.inputs = types.iter().map(|value_type| any_value(&mut random, value_type)).collect();
        }
        let mut tiles = Tiles::default();
        let (mut exact, mut present) = (0, 0);
        for (i, event) in all.iter().enumerate() {
            layout.apply(&mut tiles, [event], event.times.position);
            let now = event.times.position.time;
            for t in [now, now + 7 * MINUTE, now + 3 * HOUR] {
                let values = read(&layout, &tiles, t).expect("exact at the server's clock");
                present += values.iter().filter(|value| !value.is_null()).count();
                assert_eq!(values, reference(&layout, &all[..=i], t), "seed {seed} event {i}");
            }
            for back in [30 * SECOND, 4 * MINUTE, 11 * MINUTE] {
                if let Ok(values) = read(&layout, &tiles, now - back) {
                    exact += 1;
                    assert_eq!(values, reference(&layout, &all[..=i], now - back), "seed {seed} event {i} -{back}");
                }
            }
        }
        assert!(exact > 30 && present > 5_000, "{exact} exact in the past, {present} values");
    }
}

#[test]
fn folding_keeps_the_order_of_values() {
    let last = Aggregate::new(Function::Last, Some(Type::Int64)).unwrap();
    let layout = Layout { aggregates: vec![last], ..layout(&[HOUR]) };
    let start = floor_to(T0, 5 * MINUTE);
    // All at two times: only the sequence tells which is the last.
    let all: Vec<WindowEvent> = (0..3_000u64)
        .map(|i| {
            let event_time = start + (i % 2) as Micros;
            let position = Position { time: start + MINUTE, sequence: i + 1 };
            let times = Times { event_time, created_time: None, known_time: event_time, position };
            WindowEvent { times, inputs: vec![Value::Int64((i * 7_919 % 3_000) as i64)] }
        })
        .collect();
    let mut tiles = Tiles::default();
    for batch in all.chunks(100) {
        layout.apply(&mut tiles, batch, batch.last().unwrap().times.position);
    }
    assert_eq!(read(&layout, &tiles, start + MINUTE), Ok(reference(&layout, &all, start + MINUTE)));
}

#[test]
fn tiles_without_order_are_written_as_ever() {
    let aggregates = vec![Aggregate::new(Function::Count, None).unwrap()];
    let layout = Layout { aggregates, ..layout(&[HOUR]) };
    let times = |created_time| {
        let position = Position { time: 2, sequence: 9 };
        Times { event_time: 1, created_time, known_time: 2, position }
    };
    let mut tiles = Tiles::default();
    let event = WindowEvent { times: times(Some(2)), inputs: vec![Value::Bool(true)] };
    layout.apply(&mut tiles, [&event], event.times.position);
    let tile = &tiles.tiles[&TileId { level: 5 * MINUTE, start: 0 }];
    let (event_time, known_time, never) = (encode_i64(1), encode_i64(2), encode_i64(Micros::MIN));
    // Count 1; raw from 0, nothing folded, one event of one byte of validity and one of value.
    let expected = [
        &[1, 1][..],
        &event_time,
        &known_time,
        &[2],
        &encode_i64(0),
        &never,
        &[0, 1],
        &event_time,
        &known_time,
        &[2, 1, 1],
    ]
    .concat();
    assert_eq!(layout.encode(tile), expected);
    assert_eq!(layout.decode(&expected).as_ref(), Ok(tile));
}

#[test]
fn applying_any_prefix_again_changes_nothing() {
    let layout = layout(&[HOUR, 24 * HOUR]);
    let all = events(&mut Random(7), 100, 10 * MINUTE);
    let mut once = Tiles::default();
    for event in &all {
        layout.apply(&mut once, [event], event.times.position);
    }
    let mut again = once.clone();
    for event in &all {
        assert_eq!(layout.apply(&mut again, [event], event.times.position), None);
    }
    assert_eq!(again, once);
    // In batches the same bytes come out.
    let mut batched = Tiles::default();
    for batch in all.chunks(17) {
        layout.apply(&mut batched, batch, batch.last().unwrap().times.position);
    }
    let now = all.last().unwrap().times.position.time;
    assert_eq!(read(&layout, &batched, now), read(&layout, &once, now));
}

#[test]
fn a_full_tile_folds_and_stays_exact_at_its_newest_time() {
    let layout = layout(&[HOUR]);
    let start = floor_to(T0, 5 * MINUTE);
    let all: Vec<WindowEvent> = (0..3_000u64)
        .map(|i| {
            let event_time = start + i as Micros * 1_000;
            let position = Position { time: event_time, sequence: i + 1 };
            let times = Times { event_time, created_time: None, known_time: event_time, position };
            let inputs = vec![Value::Bool(true), Value::Float64(0.1), Value::Float64(i as f64), Value::Int64(i as i64)];
            WindowEvent { times, inputs }
        })
        .collect();
    let mut tiles = Tiles::default();
    for event in &all {
        layout.apply(&mut tiles, [event], event.times.position);
        let raw = tiles.tiles[&TileId { level: 5 * MINUTE, start }].raw.as_ref().unwrap();
        assert!(raw.events.len() <= RAW_EVENTS_MAX);
    }
    let last = all.last().unwrap().times.event_time;
    for t in [last, last - 100_000, last + 1] {
        assert_eq!(read(&layout, &tiles, t), Ok(reference(&layout, &all, t)));
    }
    assert_eq!(read(&layout, &tiles, start + 1_000), Err(AtBeforeStore), "folded away, and said so");
}

#[test]
fn an_entity_stays_small() {
    let layout = layout(&[HOUR, 6 * HOUR, 24 * HOUR]);
    let mut tiles = Tiles::default();
    for i in 0..20_000u64 {
        let event_time = T0 + i as Micros * 7 * MINUTE;
        let position = Position { time: event_time, sequence: i + 1 };
        let times = Times { event_time, created_time: None, known_time: event_time, position };
        let inputs = vec![Value::Bool(true), Value::Float64(1.0), Value::Float64(1.0), Value::Int64(1)];
        layout.apply(&mut tiles, [&WindowEvent { times, inputs }], position);
    }
    // 6 h of 5 min tiles, 25 h of 1 h tiles, 2 d of 1 d tiles, and a little over.
    assert!(tiles.tiles.len() < 120, "{} tiles", tiles.tiles.len());
}

#[test]
fn damage_is_an_error_and_never_a_panic() {
    let layout = layout(&[HOUR]);
    let mut tiles = Tiles::default();
    for event in events(&mut Random(3), 40, SECOND) {
        layout.apply(&mut tiles, [&event], event.times.position);
    }
    for tile in tiles.tiles.values() {
        let bytes = layout.encode(tile);
        assert_eq!(&layout.decode(&bytes).unwrap(), tile);
        for length in 0..bytes.len() {
            assert!(layout.decode(&bytes[..length]).is_err());
        }
        let mut future = bytes.to_vec();
        future[0] = 3;
        assert_eq!(layout.decode(&future), Err(DecodeError::Version { found: 3, newest: 2 }));
    }
}

#[test]
fn kept_tiles_are_read() {
    use crate::formats::current;

    let unordered = layout(&[HOUR, 24 * HOUR]);
    let ordered = Layout { aggregates: every_function(), ..layout(&[HOUR, 24 * HOUR]) };
    for (version, layout) in [(1, unordered), (2, ordered)] {
        let types = layout.input_types();
        let mut random = Random(0x9e37_79b9);
        let mut all = events(&mut random, 12, 4 * MINUTE);
        for event in &mut all {
            event.times.created_time = (random.below(2) == 0).then_some(event.times.known_time);
            event.inputs = types.iter().map(|value_type| any_value(&mut random, value_type)).collect();
        }
        let mut tiles = Tiles::default();
        for event in &all {
            layout.apply(&mut tiles, [event], event.times.position);
        }
        let finest = layout.levels.finest();
        let coarse = tiles.tiles.iter().find(|(id, _)| id.level > finest).expect("an hour holds events").1;
        let raw = tiles.tiles.iter().rfind(|(id, _)| id.level == finest).expect("the newest holds events").1;
        assert!(raw.raw.is_some() && coarse.raw.is_none());
        for (name, tile) in [("tile", coarse), ("tile_raw", raw)] {
            let kept = current(&format!("{name}_v{version}"), &layout.encode(tile));
            assert_eq!(kept[0], version);
            assert_eq!(layout.decode(&kept).as_ref(), Ok(tile), "{name} {version}");
        }
    }
    let kept = current("bounds_v1", &encode_bounds(T0));
    assert_eq!(decode_bounds(&kept), Ok(T0));
}

#[test]
fn damage_of_a_stored_tile_is_told_from_absence() {
    let layout = layout(&[HOUR]);
    let mut tiles = Tiles::default();
    let event = &events(&mut Random(7), 1, MINUTE)[0];
    layout.apply(&mut tiles, [event], event.times.position);
    let t = event.times.event_time + 20 * MINUTE;
    let read = |keep: fn(Bytes) -> Bytes| {
        let stored = layout.tiles_at(t).into_iter().filter_map(|id| Some((id, layout.encode(tiles.tiles.get(&id)?))));
        let stored: Vec<(TileId, Bytes)> = stored.map(|(id, bytes)| (id, keep(bytes))).collect();
        assert!(!stored.is_empty());
        let stored = StoredTiles::new(tiles.position, stored.iter().map(|(id, bytes)| (*id, &bytes[..])))?;
        Ok::<_, DecodeError>(layout.read_stored(&stored, &outputs(&layout), t))
    };
    assert!(matches!(read(|bytes| bytes), Ok(Ok(_))));
    assert!(
        matches!(read(|bytes| bytes.slice(..18)), Ok(Err(ReadError::Corrupt(DecodeError::Truncated)))),
        "no states"
    );
    assert!(matches!(read(|bytes| bytes.slice(..17)), Err(DecodeError::Truncated)), "no times");
}
