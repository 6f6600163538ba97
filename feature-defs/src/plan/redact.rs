//! What forgetting an entity means for rows: which ones are nobody's any more, and what of the others has to go.
//!
//! A row is *about* a forgotten entity when the key columns of some view hold its key. It stays as long as a view of
//! another entity counts it, because its windows would silently change otherwise; of such a row everything goes that no
//! such view reads, and in any case the columns that held the forgotten key. Where that key is itself what another view
//! computes with, that view sees null from then on.

use std::collections::BTreeSet;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, RecordBatch, RecordBatchOptions, UInt32Array};
use arrow::buffer::NullBuffer;
use arrow::compute::take;

use super::{EntityKeys, RowsError, SourceKind, SourcePlan, ViewPlan, encode_entity_keys};
use crate::forgotten::Forgotten;
use crate::value::Type;

impl ViewPlan {
    /// The encoded keys of rows, given their columns. A row that is about a forgotten entity has none, as if it were null.
    pub fn entity_keys(&self, columns: &[(ArrayRef, &Type)], rows: usize) -> EntityKeys {
        let mut keys = encode_entity_keys(columns, rows);
        if let Some(forgotten) = self.forgotten.get()
            && let Some(hidden) = self.hidden(&forgotten, columns, rows)
        {
            keys.hide(&hidden);
        }
        keys
    }

    /// Which rows are about a forgotten entity, given the columns of their keys; None where none is.
    pub fn hidden(&self, forgotten: &Forgotten, columns: &[(ArrayRef, &Type)], rows: usize) -> Option<Vec<bool>> {
        let mut all: Option<Vec<bool>> = None;
        for part in 0..self.about.len() {
            let Some(hidden) = self.hidden_by(part, forgotten, columns, rows) else { continue };
            match &mut all {
                Some(all) => all.iter_mut().zip(hidden).for_each(|(all, hidden)| *all |= hidden),
                none => *none = Some(hidden),
            }
        }
        all
    }

    fn hidden_by(
        &self,
        part: usize,
        forgotten: &Forgotten,
        columns: &[(ArrayRef, &Type)],
        rows: usize,
    ) -> Option<Vec<bool>> {
        let part = &self.about[part];
        if part.keys.is_empty() || !forgotten.mentions(&part.entity) {
            return None;
        }
        let columns: Vec<(ArrayRef, &Type)> = part.keys.iter().map(|key| columns[*key].clone()).collect();
        let keys = encode_entity_keys(&columns, rows);
        let mut hidden: Option<Vec<bool>> = None;
        // Rows of a file that is sorted, or of a busy entity, come in a row.
        let mut last: Option<(&[u8], bool)> = None;
        for row in 0..rows {
            let Some(key) = keys.get(row) else { continue };
            let is_listed = match last {
                Some((known, is_listed)) if known == key => is_listed,
                _ => forgotten.contains(&part.entity, key),
            };
            last = Some((key, is_listed));
            if is_listed {
                hidden.get_or_insert_with(|| vec![false; rows])[row] = true;
            }
        }
        hidden
    }

    /// Whether the list has anything to do with this view.
    pub fn is_about(&self, forgotten: &Forgotten) -> bool {
        self.about.iter().any(|part| !part.keys.is_empty() && forgotten.mentions(&part.entity))
    }
}

/// Forgets entities in the rows of one source.
#[derive(Debug, Clone)]
pub struct Judge {
    pub source: Arc<SourcePlan>,
    /// Everybody who reads the source.
    pub views: Vec<Arc<ViewPlan>>,
    pub forgotten: Arc<Forgotten>,
}

/// Encoded keys, by view of a [`Judge`].
pub type KeysOfViews = BTreeSet<(usize, Box<[u8]>)>;

impl Judge {
    /// Of the views given, those that read this source are asked. None: none of them has anything to do with the list.
    pub fn new<'a>(
        source: &Arc<SourcePlan>,
        views: impl Iterator<Item = &'a Arc<ViewPlan>>,
        forgotten: &Arc<Forgotten>,
    ) -> Option<Judge> {
        let mut of_source: Vec<Arc<ViewPlan>> = Vec::new();
        for view in views.filter(|view| view.source.name == source.name) {
            let same = |known: &Arc<ViewPlan>| {
                known.name == view.name
                    && known.storage_digest == view.storage_digest
                    && known.keys.len() == view.keys.len()
            };
            if !of_source.iter().any(same) {
                of_source.push(view.clone());
            }
        }
        let is_about = of_source.iter().any(|view| view.is_about(forgotten));
        is_about.then(|| Judge { source: source.clone(), views: of_source, forgotten: forgotten.clone() })
    }

    /// The columns by which rows are judged.
    pub fn columns(&self) -> Vec<String> {
        let mut names: Vec<String> = self.views.iter().flat_map(|view| view.source_columns()).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// See [`redact`].
    pub fn judge(&self, batch: &RecordBatch) -> Result<Option<Redaction>, RowsError> {
        redact(&self.source, &self.views, &self.forgotten, batch)
    }

    /// Which rows are about a forgotten entity, and which one; None where none is.
    pub fn names(&self, batch: &RecordBatch) -> Result<Option<Vec<Option<Arc<str>>>>, RowsError> {
        let mut names: Option<Vec<Option<Arc<str>>>> = None;
        for view in self.views.iter().filter(|view| view.is_about(&self.forgotten)) {
            let own = view.source.align(batch, Some(&view.source_columns()))?;
            let keys = view.key_columns(&own)?;
            for (at, part) in view.about.iter().enumerate() {
                let Some(hidden) = view.hidden_by(at, &self.forgotten, &keys, batch.num_rows()) else { continue };
                let names = names.get_or_insert_with(|| vec![None; batch.num_rows()]);
                for (name, _) in names.iter_mut().zip(hidden).filter(|(_, hidden)| *hidden) {
                    name.get_or_insert_with(|| part.entity.clone());
                }
            }
        }
        Ok(names)
    }

    /// The keys, of every view, of rows that are about a forgotten entity, and the number of such rows.
    pub fn keys(&self, batch: &RecordBatch, found: &mut KeysOfViews) -> Result<u64, RowsError> {
        let rows = batch.num_rows();
        let mut about = vec![false; rows];
        for (at, view) in self.views.iter().enumerate().filter(|(_, view)| view.is_about(&self.forgotten)) {
            let own = view.source.align(batch, Some(&view.source_columns()))?;
            let columns = view.key_columns(&own)?;
            let Some(hidden) = view.hidden(&self.forgotten, &columns, rows) else { continue };
            let keys = encode_entity_keys(&columns, rows);
            for row in (0..rows).filter(|row| hidden[*row]) {
                about[row] = true;
                if let Some(key) = keys.get(row) {
                    found.insert((at, key.into()));
                }
            }
        }
        Ok(about.into_iter().filter(|about| *about).count() as u64)
    }
}

/// What goes of a batch's rows.
#[derive(Debug, Clone)]
pub struct Redaction {
    /// By row: whether it stays.
    keep: Vec<bool>,
    /// By row: whether it stays and loses something.
    cleared: Vec<bool>,
    /// By column of the batch, and by row: whether the value goes. None: no value of the column does.
    clear: Vec<Option<Vec<bool>>>,
}

/// What forgetting does to rows of a source, read by these views of it. The batch has the source's declared columns, and
/// others beside them that nobody reads, or the names of which begin with `__` and stay. None: the rows are about no
/// forgotten entity, or have lost everything already.
pub fn redact(
    source: &SourcePlan,
    views: &[Arc<ViewPlan>],
    forgotten: &Forgotten,
    batch: &RecordBatch,
) -> Result<Option<Redaction>, RowsError> {
    if !views.iter().any(|view| view.is_about(forgotten)) {
        return Ok(None);
    }
    let rows = batch.num_rows();
    let mut about: Option<Vec<bool>> = None;
    // Columns that hold a forgotten key, and the rows where they do.
    let mut held: Vec<(String, Vec<bool>)> = Vec::new();
    for view in views.iter().filter(|view| view.is_about(forgotten)) {
        let own = view.source.align(batch, Some(&view.source_columns()))?;
        let keys = view.key_columns(&own)?;
        for part in 0..view.about.len() {
            let Some(hidden) = view.hidden_by(part, forgotten, &keys, rows) else { continue };
            held.extend(view.about[part].keys.iter().map(|key| (view.keys[*key].column.clone(), hidden.clone())));
            match &mut about {
                Some(about) => about.iter_mut().zip(hidden).for_each(|(about, hidden)| *about |= hidden),
                none => *none = Some(hidden),
            }
        }
    }
    let Some(about) = about else { return Ok(None) };
    // Rows that a view counts all the same, and the columns that it reads.
    let mut counted: Vec<(Vec<bool>, Vec<String>)> = Vec::new();
    for view in views {
        let columns = view.source_columns();
        let own = view.source.align(batch, Some(&columns))?;
        let keys = view.key_columns(&own)?;
        let hidden = view.hidden(forgotten, &keys, rows);
        let valid = encode_entity_keys(&keys, rows);
        let included = view.included(&own)?;
        let counts = (0..rows).map(|row| {
            !hidden.as_ref().is_some_and(|hidden| hidden[row])
                && valid.get(row).is_some()
                && included.as_ref().is_none_or(|included| included.is_valid(row) && included.value(row))
        });
        counted.push((counts.collect(), columns));
    }
    let is_counted = |row: usize| counted.iter().any(|(counts, _)| counts[row]);
    let keep: Vec<bool> = (0..rows).map(|row| !about[row] || is_counted(row)).collect();
    let cleared: Vec<bool> = (0..rows).map(|row| about[row] && keep[row]).collect();
    let schema = batch.schema();
    let clear = schema.fields().iter().map(|field| {
        let name = field.name();
        if name.starts_with("__") || source.is_of_every_row(name) || !cleared.contains(&true) {
            return None;
        }
        let goes = |row: usize| {
            cleared[row]
                && (held.iter().any(|(column, hidden)| column == name && hidden[row])
                    || !counted.iter().any(|(counts, columns)| counts[row] && columns.contains(name)))
        };
        let goes: Vec<bool> = (0..rows).map(goes).collect();
        goes.contains(&true).then_some(goes)
    });
    let clear = clear.collect();
    Ok(Some(Redaction { keep, cleared, clear }))
}

impl SourcePlan {
    /// What a row keeps whoever is forgotten: its times, and the id by which its redelivery is recognised.
    fn is_of_every_row(&self, name: &str) -> bool {
        let event_id = match &self.kind {
            SourceKind::Stream { event_id, .. } => event_id.as_deref(),
            _ => None,
        };
        [self.event_time.as_deref(), self.created_time.as_deref(), event_id].contains(&Some(name))
    }
}

impl Redaction {
    /// Rows that go.
    pub fn removed(&self) -> u64 {
        self.keep.iter().filter(|keep| !**keep).count() as u64
    }

    /// Rows that stay and lose something.
    pub fn cleared(&self) -> u64 {
        self.cleared.iter().filter(|cleared| **cleared).count() as u64
    }

    pub fn keeps(&self, row: usize) -> bool {
        self.keep[row]
    }

    /// Whether values of a column go.
    pub fn clears(&self, batch: &RecordBatch, name: &str) -> bool {
        batch.schema_ref().column_with_name(name).is_some_and(|(index, _)| self.clear[index].is_some())
    }

    /// The rows that stay, without what goes. `batch` is the one that was judged.
    pub fn apply(&self, batch: &RecordBatch) -> Result<RecordBatch, RowsError> {
        let kept: Vec<u32> = (0..batch.num_rows() as u32).filter(|row| self.keep[*row as usize]).collect();
        self.pick(batch, &kept, false)
    }

    /// All rows, those that go without any value.
    pub fn blank(&self, batch: &RecordBatch) -> Result<RecordBatch, RowsError> {
        let all: Vec<u32> = (0..batch.num_rows() as u32).collect();
        self.pick(batch, &all, true)
    }

    fn pick(&self, batch: &RecordBatch, rows: &[u32], blanks: bool) -> Result<RecordBatch, RowsError> {
        let mut columns = Vec::with_capacity(batch.num_columns());
        for (column, clear) in batch.columns().iter().zip(&self.clear) {
            let goes = |row: u32| {
                clear.as_ref().is_some_and(|clear| clear[row as usize]) || (blanks && !self.keep[row as usize])
            };
            // A value under a null would still be in the buffers, and in files made of them, so it is not taken at all:
            // the place of a null is beyond every row.
            let places = rows.iter().map(|row| if goes(*row) { u32::MAX } else { *row }).collect::<Vec<u32>>();
            let valid = NullBuffer::from(places.iter().map(|place| *place != u32::MAX).collect::<Vec<bool>>());
            columns.push(take(column, &UInt32Array::new(places.into(), Some(valid)), None)?);
        }
        let options = RecordBatchOptions::new().with_row_count(Some(rows.len()));
        Ok(RecordBatch::try_new_with_options(batch.schema(), columns, &options)?)
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::{AsArray, StringArray, TimestampMicrosecondArray};

    use super::*;
    use crate::catalog::{Files, SourceFile};
    use crate::forgotten::{KeyHash, SALT_BYTES};
    use crate::plan::{Plan, SourceSchemas, compile_definitions};
    use crate::value::{Value, encode};

    const DEFINITIONS: &str = r#"
entities:
  - {name: airport, keys: [{name: airport, type: string}]}
  - {name: route, keys: [{name: origin, type: string}, {name: dest, type: string}]}
  - {name: aircraft, keys: [{name: tail, type: string}]}
sources:
  - name: flights
    stream: true
    schema: [{name: origin, type: string}, {name: dest, type: string}, {name: tail, type: string}, {name: gate, type: string}, {name: miles, type: string}, {name: id, type: string}]
    event_time: left_at
    event_id: id
feature_views:
  - {name: gates, entity: airport, keys: {airport: origin}, source: flights, features: [{name: gate, type: string}]}
  - {name: routes, entity: route, source: flights, features: [{name: miles, type: string}]}
  - {name: last, entity: aircraft, source: flights, where: "dest <> 'LGA'", features: [{name: miles, type: string}]}
"#;

    fn plan() -> Plan {
        let files = Files::new(vec![SourceFile { path: "a.yaml".into(), text: DEFINITIONS.into() }]);
        compile_definitions("p", &files, &SourceSchemas::new()).unwrap()
    }

    fn batch(plan: &Plan, rows: &[[Option<&str>; 6]]) -> RecordBatch {
        let names = ["origin", "dest", "tail", "gate", "miles", "id"];
        let column = |at: usize| Arc::new(rows.iter().map(|row| row[at]).collect::<StringArray>()) as ArrayRef;
        let times = TimestampMicrosecondArray::from(vec![5; rows.len()]).with_timezone("UTC");
        let columns = names.iter().enumerate().map(|(at, name)| (*name, column(at), true));
        let all = columns.chain([("left_at", Arc::new(times) as ArrayRef, true)]);
        plan.sources[0].align(&RecordBatch::try_from_iter_with_nullable(all).unwrap(), None).unwrap()
    }

    fn forgotten(entity: &str, key: &str) -> Forgotten {
        let mut bytes = Vec::new();
        encode(&Value::String(key.into()), &mut bytes);
        let salt = [3; SALT_BYTES];
        Forgotten::new(&salt, [(entity.into(), KeyHash::of(&salt, entity, &bytes))])
    }

    fn rows(batch: &RecordBatch) -> Vec<String> {
        let shown = |row: usize| {
            let columns = batch.columns().iter().filter_map(|column| column.as_string_opt::<i32>());
            columns.map(|c| if c.is_valid(row) { c.value(row) } else { "-" }).collect::<Vec<_>>().join(" ")
        };
        (0..batch.num_rows()).map(shown).collect()
    }

    #[test]
    fn rows_stay_for_others_without_what_only_the_forgotten_needed() {
        let plan = plan();
        let given = [
            [Some("JFK"), Some("BOS"), Some("N1"), Some("g1"), Some("187"), Some("a")],
            [Some("BOS"), Some("JFK"), Some("N1"), Some("g2"), Some("187"), Some("b")],
            // `last` does not count this one, so nobody does.
            [Some("JFK"), Some("LGA"), Some("N2"), Some("g3"), Some("11"), Some("c")],
            [Some("JFK"), Some("BOS"), None, Some("g4"), Some("187"), Some("d")],
            [None, Some("BOS"), Some("N3"), Some("g5"), Some("1"), Some("e")],
        ];
        let given = batch(&plan, &given);
        let list = forgotten("airport", "JFK");
        let found = redact(&plan.sources[0], &plan.views, &list, &given).unwrap().unwrap();
        assert_eq!((found.removed(), found.cleared()), (2, 1));
        let left = found.apply(&given).unwrap();
        assert_eq!(rows(&left), ["- BOS N1 - 187 a", "BOS JFK N1 g2 187 b", "- BOS N3 g5 1 e"]);
        assert!(redact(&plan.sources[0], &plan.views, &list, &left).unwrap().is_none(), "once is enough");
        let blank = found.blank(&given).unwrap();
        assert_eq!(rows(&blank)[2..4], ["- - - - - -", "- - - - - -"]);
        assert!(blank.column_by_name("left_at").unwrap().is_null(2));
        // What is under a null is not in the buffers either.
        for gone in ["JFK", "g1", "g3", "g4"] {
            let bytes = blank.column(0).to_data().buffers()[1].as_slice().to_vec();
            let gates = blank.column(3).to_data().buffers()[1].as_slice().to_vec();
            let all = String::from_utf8([bytes, gates].concat()).unwrap();
            assert!(!all.contains(gone), "{gone} in {all}");
        }
        let list = forgotten("aircraft", "N1");
        let found = redact(&plan.sources[0], &plan.views, &list, &given).unwrap().unwrap();
        assert_eq!(rows(&found.apply(&given).unwrap())[0], "JFK BOS - g1 187 a");
        assert!(redact(&plan.sources[0], &plan.views, &forgotten("route", "JFK"), &given).unwrap().is_none());
    }

    #[test]
    fn a_key_within_a_longer_one_hides_it() {
        let plan = plan();
        let given = [
            [Some("JFK"), Some("BOS"), Some("N1"), None, None, Some("a")],
            [Some("BOS"), Some("JFK"), Some("N1"), None, None, Some("b")],
        ];
        let given = batch(&plan, &given);
        let times = plan.sources[0].times(&given, None).unwrap();
        let count = |view: &str| plan.view(view).unwrap().rows(&given, &times).unwrap().len();
        assert_eq!([count("gates"), count("routes"), count("last")], [2, 2, 2]);
        plan.forget(&Arc::new(forgotten("airport", "JFK")));
        assert_eq!([count("gates"), count("routes"), count("last")], [1, 1, 2]);
        plan.forget(&Arc::new(Forgotten::default()));
        assert_eq!([count("gates"), count("routes"), count("last")], [2, 2, 2]);
    }
}
