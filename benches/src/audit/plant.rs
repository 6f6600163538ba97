//! Seven faults, each in the mechanism that would have it.

use feature_defs::time::{Micros, Position};
use feature_defs::value::Value;
use feature_defs::window::{DAY, HOUR, MINUTE};
use offline_store::audit::cause::Fault;
use rand::Rng;
use rand::rngs::SmallRng;

use super::world::Answered;

pub const FAULTS: [Fault; 7] =
    [Fault::Clock, Fault::Bound, Fault::Stale, Fault::Dropped, Fault::Twice, Fault::Default, Fault::Scale];

/// A fault with the setting that it has on all rows of a log.
#[derive(Debug, Clone, Copy)]
pub enum Planted {
    /// Transforms read times of another zone.
    TransformsClock(Micros),
    /// The whole request is answered at a time of another zone.
    RequestClock(Micros),
    /// The tail of the windows is so many hops too early.
    Tail(i64),
    /// Windows are read from tiles that are so old.
    Stale(Micros),
    /// An event within the windows never got there.
    Dropped,
    /// It got there twice.
    Twice,
    /// The default stands for what there is.
    LevelDefault,
    ItemsDefault,
    /// Windows hold nothing.
    NoTiles,
    /// Amounts in cents.
    Cents,
    Fahrenheit,
    /// Distances in kilometres, not miles.
    Kilometres,
}

/// The zones that people are in and forget about.
const ZONES: [Micros; 10] =
    [-8 * HOUR, -7 * HOUR, -5 * HOUR, -4 * HOUR, -3 * HOUR, HOUR, 2 * HOUR, 5 * HOUR + 30 * MINUTE, 8 * HOUR, 9 * HOUR];

impl Planted {
    pub fn of(fault: Fault, random: &mut SmallRng) -> Planted {
        let zone = ZONES[random.random_range(0..ZONES.len())];
        match (fault, random.random_range(0..3)) {
            (Fault::Clock, 0) => Planted::RequestClock(zone),
            (Fault::Clock, _) => Planted::TransformsClock(zone),
            (Fault::Bound, 0) => Planted::Tail(-1),
            (Fault::Bound, _) => Planted::Tail(1),
            (Fault::Stale, _) => Planted::Stale(random.random_range(HOUR..4 * HOUR)),
            (Fault::Dropped, _) => Planted::Dropped,
            (Fault::Twice, _) => Planted::Twice,
            (Fault::Default, 0) => Planted::LevelDefault,
            (Fault::Default, 1) => Planted::ItemsDefault,
            (Fault::Default, _) => Planted::NoTiles,
            (Fault::Scale, 0) => Planted::Cents,
            (Fault::Scale, 1) => Planted::Fahrenheit,
            (Fault::Scale, _) => Planted::Kilometres,
        }
    }

    /// How the row is answered with the fault.
    pub fn plant(self, row: &mut Answered, random: &mut SmallRng) {
        match self {
            Planted::TransformsClock(zone) => row.at_transforms += zone,
            Planted::RequestClock(zone) => {
                row.at_views += zone;
                row.at_transforms += zone;
            }
            Planted::Tail(hops) => row.longer_by_hops = hops,
            Planted::Stale(age) => {
                let old = Position { time: row.asked.at - age, sequence: u64::MAX };
                row.orders.retain(|event| event.times.position <= old);
            }
            Planted::Dropped | Planted::Twice => {
                let (start, end, applied) = (row.asked.at - DAY, row.asked.at, row.applied);
                let inside = row.orders.iter().enumerate().filter(|(_, event)| {
                    (start..end).contains(&event.times.event_time) && event.times.position <= applied
                });
                let inside: Vec<usize> = inside.map(|(place, _)| place).collect();
                if inside.is_empty() {
                    return;
                }
                let place = inside[random.random_range(0..inside.len())];
                if matches!(self, Planted::Dropped) {
                    row.orders.remove(place);
                } else {
                    row.orders.push(row.orders[place].clone());
                }
            }
            Planted::LevelDefault => row.put.push(("reading:level".to_owned(), Value::Float64(0.5))),
            Planted::ItemsDefault => row.put.push(("spend:items_24h".to_owned(), Value::Float64(1.0))),
            Planted::NoTiles => row.orders.clear(),
            Planted::Cents => row.orders.iter_mut().for_each(|event| {
                for input in [1, 3] {
                    if let Value::Float64(amount) = &mut event.inputs[input] {
                        *amount *= 100.0;
                    }
                }
            }),
            Planted::Fahrenheit => row.readings.iter_mut().for_each(|reading| {
                if let Value::Float64(temp) = &mut reading.values[0] {
                    *temp = *temp * 1.8 + 32.0;
                }
            }),
            Planted::Kilometres => row.distance *= 1.609_344,
        }
    }
}
