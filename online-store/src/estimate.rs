//! What a view will take in the online store, before anything is written: for `coeval plan`.
//!
//! Nothing is guessed from formulas: the bytes are those that [`row`] and [`Layout`] write for an invented entity. Strings
//! and lists have a length that only the data knows; here they are short. An *active* entity of a windowed view has an
//! event in every tile of the finest level, all the way back: the most tiles that it can have.

use feature_defs::as_of::{Row, Times};
use feature_defs::plan::{ViewPlan, ViewPlanKind};
use feature_defs::time::{Micros, Position};
use feature_defs::value::{Type, Value, encode};
use feature_defs::window::{DAY, HOUR, MINUTE, TileId, WindowEvent};

use crate::key::Generation;
use crate::row;
use crate::tile::{Layout, Tiles};

/// Bytes as they are stored and read, without what the store adds for its own structures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Estimate {
    /// Of one active entity, its key included.
    pub stored_bytes: usize,
    /// What one read of such an entity brings.
    pub read_bytes: usize,
    /// Tiles of an active entity; None for rows.
    pub stored_tiles: Option<usize>,
    /// Tiles that the read at a bad moment asks for.
    pub read_tiles: Option<usize>,
}

/// A read larger than this takes longer than the rest of the request.
pub const READ_BYTES_WARNED: usize = 64 << 10;

/// Events of the invented entity. Windows beyond so many finest tiles are estimated from wider gaps between events.
const EVENTS_MAX: i64 = 10_000;
/// A day in 2024. The time of day makes tails and heads ragged, so that a read takes tiles of every level.
const T: Micros = 19_800 * DAY + 13 * HOUR + 37 * MINUTE;
/// The field under which a tile lies.
const FIELD_BYTES: usize = 17;
const ITEMS: i64 = 8;

/// None for views that are not stored online.
pub fn estimate(project: &str, view: &ViewPlan) -> Option<Estimate> {
    let mut entity = Vec::new();
    view.keys.iter().for_each(|key| encode(&invented(&key.key_type, 1), &mut entity));
    let key_bytes = Generation::new(project, &view.name, view.storage_digest.as_str()).key(entity).tagged().len();
    let types = view.row_types();
    let values = |n: i64| types.iter().map(|value_type| invented(value_type, n)).collect::<Vec<_>>();
    match &view.kind {
        ViewPlanKind::AsOf { .. } => {
            let read_bytes = row::encode(&Row { times: times(T, 1), deleted: false, values: values(1) }).len();
            Some(Estimate { stored_bytes: key_bytes + read_bytes, read_bytes, stored_tiles: None, read_tiles: None })
        }
        ViewPlanKind::Windowed { levels: None, .. } => None,
        ViewPlanKind::Windowed { aggregates, windows, levels: Some(levels), .. } => {
            let layout = Layout {
                aggregates: aggregates.iter().map(|aggregate| aggregate.aggregate.clone()).collect(),
                windows: windows.clone(),
                levels: levels.clone(),
            };
            let finest = levels.finest();
            let from = windows.iter().map(|window| window.start(T)).min().unwrap_or(T) - DAY;
            let gap = finest.max((T - from) / EVENTS_MAX);
            let events: Vec<WindowEvent> = (0..=(T - from) / gap)
                .map(|n| WindowEvent { times: times(from + n * gap, n), inputs: values(n) })
                .collect();
            let mut tiles = Tiles::default();
            let last = events.last().map_or(Position::START, |event| event.times.position);
            layout.apply(&mut tiles, &events, last)?;
            let bytes = |id: &TileId| tiles.tiles.get(id).map(|tile| layout.encode(tile).len());
            let stored: usize = tiles.tiles.keys().filter_map(|id| Some(bytes(id)? + FIELD_BYTES)).sum();
            let wanted = layout.tiles_at(T);
            Some(Estimate {
                stored_bytes: key_bytes + stored,
                read_bytes: wanted.iter().filter_map(bytes).sum(),
                stored_tiles: Some(tiles.tiles.len()),
                read_tiles: Some(wanted.len()),
            })
        }
    }
}

fn times(event_time: Micros, sequence: i64) -> Times {
    let position = Position { time: event_time, sequence: sequence.unsigned_abs() + 1 };
    Times { event_time, created_time: None, known_time: event_time, position }
}

/// Some value of a type, another one for another n.
fn invented(value_type: &Type, n: i64) -> Value {
    match value_type {
        Type::Bool => Value::Bool(n % 2 == 0),
        // Also the number of a bucket, of which there are at least two.
        Type::Int32 => Value::Int32((n % 2) as i32),
        Type::Int64 => Value::Int64(n.wrapping_mul(7_919)),
        Type::Float32 => Value::Float32(n as f32 * 0.37),
        Type::Float64 => Value::Float64(n as f64 * 0.37),
        Type::String => Value::String(format!("value-{n:06}").into()),
        Type::Binary => Value::Binary(n.to_be_bytes().to_vec().into()),
        Type::Timestamp => Value::Timestamp(T + n),
        Type::Date => Value::Date(n as i32),
        Type::Decimal { .. } => Value::Decimal(i128::from(n % 10)),
        Type::List(item) => Value::List((0..ITEMS).map(|i| invented(item, n + i)).collect()),
        Type::Map(value) => {
            Value::Map((0..ITEMS).map(|i| (format!("key-{i}").into(), invented(value, n + i))).collect())
        }
        Type::Struct(fields) => Value::Struct(fields.iter().map(|(_, field)| invented(field, n)).collect()),
        Type::Vector(width) => Value::Vector((0..*width).map(|i| n as f32 + i as f32).collect::<Vec<_>>().into()),
    }
}

#[cfg(test)]
mod tests {
    use feature_defs::catalog::{Files, SourceFile};
    use feature_defs::plan::{SourceSchemas, compile_definitions};

    use super::*;

    const DEFINITIONS: &str = "
entities: [{name: shop, keys: [{name: shop, type: string}]}]
sources:
  - name: sales
    stream: true
    schema: [{name: shop, type: string}, {name: kind, type: string}, {name: amount, type: float64}, {name: n, type: int64}]
    event_time: sold_at
feature_views:
  - {name: latest, entity: shop, source: sales, features: [{name: amount, type: float64}, {name: n, type: int64}]}
  - {name: counts, entity: shop, source: sales, windows: [7d], aggregates: [{name: sales, function: count}]}
  - name: sketches
    entity: shop
    source: sales
    windows: [1h, 7d]
    aggregates:
      - {name: p90, function: percentile, q: 0.9, of: amount, clamp: [0, 1000000]}
      - {name: kinds, function: distinct_count, of: kind}
  - {name: exact, entity: shop, source: sales, windows: [1h], hop: none, aggregates: [{name: sales, function: count}]}
";

    #[test]
    fn an_estimate_is_what_is_written() {
        let file = SourceFile { path: "shop.yaml".into(), text: DEFINITIONS.into() };
        let plan = compile_definitions("p", &Files::new(vec![file]), &SourceSchemas::new()).unwrap();
        let of = |view: &str| estimate("p", plan.view(view).unwrap());
        let latest = of("latest").unwrap();
        // 51 bytes of times and marks, one of validity, two numbers.
        assert_eq!(latest.read_bytes, 51 + 1 + 16);
        assert!(latest.stored_bytes > latest.read_bytes);
        let counts = of("counts").unwrap();
        // Seven days and the day that goes: 8 of 288 five-minute, 24 hour and 1 day tiles at most.
        assert!((65..=80).contains(&counts.read_tiles.unwrap()), "{counts:?}");
        assert!(counts.stored_tiles.unwrap() > 200, "{counts:?}");
        assert!(counts.read_bytes < counts.stored_bytes);
        let sketches = of("sketches").unwrap();
        assert!(sketches.read_bytes > counts.read_bytes);
        assert_eq!(of("exact"), None);
    }
}
