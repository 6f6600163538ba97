//! Blocks: which rows of a feature are not independent of each other, because one source row made their values.
//!
//! A block is
//! - of an as-of view, the source row: the entity and the event time of the row that answered;
//! - of a window, the entity and the span of the window's length that the row's time lies in: two rows that are further
//!   apart share no event;
//! - of what came with the request, the row itself: all that it brought, and its time.
//!
//! Training and serving name them by the same code. What depends on several inputs has a block of each, and the profile
//! keeps the one by which its rows are worth least.

use std::collections::HashMap;

use arrow::array::ArrayRef;
use drift::counts::bucket_of_row;
use drift::random::{hash, mix};
use feature_defs::plan::{EntityKeys, ServicePlan, Slot, ViewPlanKind, encode_entity_keys};
use feature_defs::time::{Micros, floor_to};
use feature_defs::value::{Cells, Type, encode_cells};
use feature_defs::window::{DAY, HOUR, MINUTE, SECOND};

/// The block of what depends on nothing but the request. No view may be called so.
pub const ROW: &str = "(row)";

/// Blocks that one feature is counted by while its profile is made; a transform of more inputs than this is judged by the
/// first ones.
const CANDIDATES_MAX: usize = 4;

/// What rows share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shared {
    Nothing,
    SourceRow { input: usize },
    Window { input: usize, length: Micros },
}

/// The blocks of a service's features.
#[derive(Debug, Clone)]
pub struct Blocks {
    kinds: Vec<(String, Shared)>,
    /// By output, the blocks that its values may share, the widest first; never empty.
    of_outputs: Vec<Vec<usize>>,
}

/// What blocks are made of, by row.
pub struct Answered<'a> {
    /// The columns of the service.
    pub columns: &'a [ArrayRef],
    pub at: &'a [Micros],
    /// By input; empty for windowed views.
    pub event_times: &'a [&'a [Option<Micros>]],
}

impl Blocks {
    pub fn of(service: &ServicePlan) -> Blocks {
        let mut blocks = Blocks { kinds: Vec::new(), of_outputs: Vec::with_capacity(service.outputs.len()) };
        for output in &service.outputs {
            let mut shared = Vec::new();
            shared_by(service, output.slot, &mut shared);
            shared.retain(|shared| *shared != Shared::Nothing);
            // The longest window first: without a second look at the data it is the likeliest to be shared by most.
            shared.sort_by_key(|shared| match shared {
                Shared::Window { length, .. } => std::cmp::Reverse(*length),
                _ => std::cmp::Reverse(0),
            });
            shared.truncate(CANDIDATES_MAX);
            if shared.is_empty() {
                shared.push(Shared::Nothing);
            }
            let of_output = shared.into_iter().map(|shared| blocks.place(service, shared)).collect();
            blocks.of_outputs.push(of_output);
        }
        blocks
    }

    fn place(&mut self, service: &ServicePlan, shared: Shared) -> usize {
        if let Some(known) = self.kinds.iter().position(|(_, known)| *known == shared) {
            return known;
        }
        let name = match shared {
            Shared::Nothing => ROW.to_owned(),
            Shared::SourceRow { input } => service.inputs[input].alias.clone(),
            Shared::Window { input, length } => format!("{}[{}]", service.inputs[input].alias, span(length)),
        };
        self.kinds.push((name, shared));
        self.kinds.len() - 1
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.kinds.iter().map(|(name, _)| name.as_str())
    }

    pub fn position(&self, name: &str) -> Option<usize> {
        self.names().position(|known| known == name)
    }

    /// The blocks that an output's values may share.
    pub fn of_output(&self, output: usize) -> &[usize] {
        self.of_outputs.get(output).map_or(&[], Vec::as_slice)
    }

    /// The bucket of each row's block, of those blocks that are `wanted`; the others are empty.
    pub fn buckets(&self, service: &ServicePlan, given: &Answered<'_>, wanted: impl Fn(usize) -> bool) -> Vec<Vec<u8>> {
        let rows = given.at.len();
        let mut hashed: HashMap<&[usize], Vec<u64>> = HashMap::new();
        let mut of_rows = Vec::new();
        for (_, (_, shared)) in self.kinds.iter().enumerate().filter(|(index, _)| wanted(*index)) {
            match shared {
                Shared::Nothing => of_rows = requests(service, given.columns, rows),
                Shared::SourceRow { input } | Shared::Window { input, .. } => {
                    let keys = service.inputs[*input].keys.as_slice();
                    hashed.entry(keys).or_insert_with(|| entities(service, keys, given.columns, rows));
                }
            }
        }
        let bucket = |entity: u64, time: Micros| bucket_of_row(entity ^ mix(time as u64));
        let kinds = self.kinds.iter().enumerate().map(|(index, (_, shared))| {
            if !wanted(index) {
                return Vec::new();
            }
            let entities = |keys: &[usize]| hashed.get(keys).map(Vec::as_slice).unwrap_or_default();
            match *shared {
                Shared::Nothing => of_rows.iter().zip(given.at).map(|(row, at)| bucket(*row, *at)).collect(),
                Shared::Window { input, length } => {
                    let entities = entities(&service.inputs[input].keys).iter();
                    entities.zip(given.at).map(|(entity, at)| bucket(*entity, floor_to(*at, length.max(1)))).collect()
                }
                Shared::SourceRow { input } => {
                    let entities = entities(&service.inputs[input].keys);
                    let times = given.event_times.get(input).copied().unwrap_or_default();
                    // That an entity has no row is one fact about it, however often it is asked for.
                    let time = |row: usize| times.get(row).copied().flatten().unwrap_or(Micros::MAX);
                    entities.iter().enumerate().map(|(row, entity)| bucket(*entity, time(row))).collect()
                }
            }
        });
        kinds.collect()
    }
}

/// Hashes of all that rows brought.
fn requests(service: &ServicePlan, columns: &[ArrayRef], rows: usize) -> Vec<u64> {
    let cells: Vec<Cells<'_>> =
        service.columns.iter().zip(columns).map(|(wanted, column)| Cells::new(column, &wanted.column_type)).collect();
    let mut bytes = Vec::new();
    let row = |row: usize| {
        bytes.clear();
        encode_cells(&cells, row, &mut bytes);
        hash(&bytes)
    };
    (0..rows).map(row).collect()
}

/// Hashes of the entities of rows.
fn entities(service: &ServicePlan, keys: &[usize], columns: &[ArrayRef], rows: usize) -> Vec<u64> {
    let parts = keys.iter().filter_map(|key| {
        let wanted: &Type = &service.columns.get(*key)?.column_type;
        Some((columns.get(*key)?.clone(), wanted))
    });
    let parts: Vec<(ArrayRef, &Type)> = parts.collect();
    let keys: EntityKeys = encode_entity_keys(&parts, rows);
    // Rows whose key has a null share the fact that nothing is known of them.
    (0..rows).map(|row| keys.get(row).map_or(0, hash)).collect()
}

/// What the values of a slot may share, each once.
fn shared_by(service: &ServicePlan, slot: Slot, shared: &mut Vec<Shared>) {
    let one = match slot {
        Slot::Feature { input, feature } => match &service.inputs[input].view.kind {
            ViewPlanKind::AsOf { .. } => Shared::SourceRow { input },
            ViewPlanKind::Windowed { outputs, .. } => {
                Shared::Window { input, length: outputs.get(feature).map_or(DAY, |output| output.window.length) }
            }
        },
        Slot::EventTime { input } => Shared::SourceRow { input },
        Slot::At | Slot::Request(_) => Shared::Nothing,
        Slot::Transform(index) => {
            // A transform reads only earlier ones, so this ends.
            return service.transforms[index].reads.iter().for_each(|slot| shared_by(service, *slot, shared));
        }
    };
    if !shared.contains(&one) {
        shared.push(one);
    }
}

/// A length as definitions write it, in its largest whole unit.
fn span(length: Micros) -> String {
    let units = [(DAY, "d"), (HOUR, "h"), (MINUTE, "m"), (SECOND, "s")];
    let unit = units.iter().find(|(unit, _)| length % unit == 0 && length >= *unit);
    unit.map_or_else(|| format!("{length}us"), |(unit, name)| format!("{}{name}", length / unit))
}
