//! Rows of the serving log as an audit takes them: what of them can be replayed, and the spine that replays it.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, RecordBatch, UInt32Array};
use arrow::compute::take_record_batch;
use arrow::datatypes::{Field, Int64Type, Schema, TimestampMicrosecondType, UInt64Type};
use feature_defs::plan::{ServicePlan, Slot};
use feature_defs::time::{Micros, Position};
use feature_defs::value::{Type, Value};

use super::AuditError;
use super::compare::{Column, statuses};
use super::tally::NotAudited;
use crate::explain::Needed;
use crate::point_in_time::by_row::Applied;
use crate::point_in_time::{EVENT_TIMESTAMP, not_answered_column, position_columns};
use crate::serving_log::columns as names;

/// Some rows of one file of the log.
#[derive(Debug, Clone)]
pub struct Logged {
    pub batch: RecordBatch,
    /// Columns that hold keyed hashes in place of values.
    pub hashed: Arc<[String]>,
}

/// What history can answer: up to which position each stream's holds everything.
pub type Held = BTreeMap<Arc<str>, Position>;

impl Logged {
    pub fn rows(&self) -> usize {
        self.batch.num_rows()
    }

    pub fn take(&self, rows: &[u32]) -> Result<Logged, AuditError> {
        let batch = take_record_batch(&self.batch, &UInt32Array::from(rows.to_vec()))?;
        Ok(Logged { batch, hashed: self.hashed.clone() })
    }

    pub fn slice(&self, start: usize, rows: usize) -> Logged {
        Logged { batch: self.batch.slice(start, rows), hashed: self.hashed.clone() }
    }

    fn column(&self, name: &str) -> Result<&ArrayRef, AuditError> {
        self.batch.column_by_name(name).ok_or_else(|| AuditError::Damaged { column: name.to_owned() })
    }

    fn is_hashed(&self, name: &str) -> bool {
        self.hashed.iter().any(|hashed| hashed == name)
    }

    pub fn times(&self, name: &str) -> Result<Vec<Micros>, AuditError> {
        let damaged = || AuditError::Damaged { column: name.to_owned() };
        let times = self.column(name)?.as_primitive_opt::<TimestampMicrosecondType>().ok_or_else(damaged)?;
        if times.null_count() > 0 {
            return Err(damaged());
        }
        Ok(times.values().to_vec())
    }

    pub fn request(&self, row: usize) -> (String, u32) {
        let id = self.batch.column_by_name(names::REQUEST_ID).and_then(|ids| ids.as_string_opt::<i32>());
        let number = self.batch.column_by_name(names::ROW);
        let number = number.and_then(|rows| rows.as_primitive_opt::<arrow::datatypes::UInt32Type>());
        (id.map_or_else(String::new, |ids| ids.value(row).to_owned()), number.map_or(0, |rows| rows.value(row)))
    }

    /// What was served of a feature; None where it was logged as a hash.
    pub fn served(&self, service: &ServicePlan, output: usize) -> Result<Option<Column>, AuditError> {
        let output = &service.outputs[output];
        let name = names::feature(&output.name);
        if self.is_hashed(&name) {
            return Ok(None);
        }
        let values = self.column(&name)?.clone();
        let status = names::status(&output.name);
        let statuses = statuses(self.column(&status)?).ok_or(AuditError::Damaged { column: status })?;
        if *values.data_type() != output.feature_type.arrow() {
            return Err(AuditError::Damaged { column: name });
        }
        Ok(Some(Column { values, statuses }))
    }

    /// What a request gave, in the order of the service's columns. In place of what was hashed there is something that the
    /// column may hold, and nothing that is made of it may be looked at.
    pub fn given(&self, service: &ServicePlan) -> Result<Vec<ArrayRef>, AuditError> {
        let rows = self.rows();
        let columns = service.columns.iter().map(|column| {
            let name = names::input(&column.name);
            if self.is_hashed(&name) {
                let something = something(&column.column_type);
                return Ok(Value::to_array(std::iter::repeat_n(&something, rows), &column.column_type));
            }
            let values = self.column(&name)?;
            if *values.data_type() != column.column_type.arrow() {
                return Err(AuditError::Damaged { column: name });
            }
            Ok(values.clone())
        });
        columns.collect()
    }

    /// What of each input's events had been applied when a row was answered.
    pub fn applied(&self, alias: &str) -> Result<Vec<Applied>, AuditError> {
        let (time, sequence, reason) =
            (names::position_time(alias), names::position_sequence(alias), names::reason(alias));
        let damaged = |column: &str| AuditError::Damaged { column: column.to_owned() };
        let times = self.column(&time)?.as_primitive_opt::<Int64Type>().ok_or_else(|| damaged(&time))?;
        let sequences = self.column(&sequence)?.as_primitive_opt::<UInt64Type>().ok_or_else(|| damaged(&sequence))?;
        let reasons = self.column(&reason)?;
        let applied = (0..self.rows()).map(|row| {
            if reasons.is_valid(row) {
                Applied::NotAnswered
            } else if times.is_null(row) || sequences.is_null(row) {
                Applied::Nothing
            } else {
                Applied::UpTo(Position { time: times.value(row), sequence: sequences.value(row) })
            }
        });
        Ok(applied.collect())
    }

    /// Why rows cannot be replayed at all, row by row.
    pub fn left_out(&self, service: &ServicePlan, held: &Held) -> Result<Vec<Option<NotAudited>>, AuditError> {
        let rows = self.rows();
        let mut why: Vec<Option<NotAudited>> = vec![None; rows];
        let given = self.given(service)?;
        for (index, column) in service.columns.iter().enumerate() {
            let is_hashed = self.is_hashed(&names::input(&column.name));
            for (row, why) in why.iter_mut().enumerate() {
                if is_hashed && column.is_key {
                    *why = Some(NotAudited::Hashed);
                } else if !column.is_key && !column.nullable && given[index].is_null(row) {
                    why.get_or_insert(NotAudited::Incomplete);
                }
            }
        }
        for input in &service.inputs {
            let keys: Vec<(ArrayRef, &Type)> =
                input.keys.iter().map(|key| (given[*key].clone(), &service.columns[*key].column_type)).collect();
            let forgotten = input.view.forgotten.get().and_then(|list| input.view.hidden(&list, &keys, rows));
            let applied = self.applied(&input.alias)?;
            let held = held.get(&input.view.source.name);
            for (row, why) in why.iter_mut().enumerate() {
                if forgotten.as_ref().is_some_and(|forgotten| forgotten[row]) {
                    why.get_or_insert(NotAudited::Forgotten);
                }
                if let (Applied::UpTo(applied), Some(held)) = (applied[row], held)
                    && applied > *held
                {
                    why.get_or_insert(NotAudited::BeyondHistory);
                }
            }
        }
        Ok(why)
    }

    /// Features that cannot be judged although their rows can be replayed: what they are, or are made of, was hashed.
    pub fn features_left_out(&self, service: &ServicePlan) -> Vec<bool> {
        let hidden = |slot: &Slot| match slot {
            Slot::Request(column) => self.is_hashed(&names::input(&service.columns[*column].name)),
            _ => false,
        };
        let outputs = service.outputs.iter().map(|output| {
            self.is_hashed(&names::feature(&output.name)) || Needed::of(service, output.slot).slots.iter().any(hidden)
        });
        outputs.collect()
    }

    /// The spine that asks for the same rows again; `as_known` says with what had been applied.
    pub fn spine(&self, service: &ServicePlan, as_known: bool) -> Result<RecordBatch, AuditError> {
        let mut fields: Vec<Field> = Vec::new();
        let mut columns: Vec<ArrayRef> = Vec::new();
        let mut put = |name: String, column: ArrayRef| {
            fields.push(Field::new(name, column.data_type().clone(), true));
            columns.push(column);
        };
        put(EVENT_TIMESTAMP.to_owned(), self.column(names::AT)?.clone());
        for (column, values) in service.columns.iter().zip(self.given(service)?) {
            put(column.name.clone(), values);
        }
        for input in service.inputs.iter().filter(|_| as_known) {
            let (time, sequence) = position_columns(&input.alias);
            put(time, self.column(&names::position_time(&input.alias))?.clone());
            put(sequence, self.column(&names::position_sequence(&input.alias))?.clone());
            let not_answered: BooleanArray =
                self.applied(&input.alias)?.iter().map(|applied| Some(*applied == Applied::NotAnswered)).collect();
            put(not_answered_column(&input.alias), Arc::new(not_answered));
        }
        Ok(RecordBatch::try_new(Arc::new(Schema::new(fields)), columns)?)
    }
}

/// A value that any column of a type may hold.
fn something(of: &Type) -> Value {
    match of {
        Type::Bool => Value::Bool(false),
        Type::Int32 => Value::Int32(0),
        Type::Int64 => Value::Int64(0),
        Type::Float32 => Value::Float32(0.0),
        Type::Float64 => Value::Float64(0.0),
        Type::String => Value::String("".into()),
        Type::Binary => Value::Binary([].into()),
        Type::Timestamp => Value::Timestamp(0),
        Type::Date => Value::Date(0),
        Type::Decimal { .. } => Value::Decimal(0),
        Type::List(_) => Value::List(Vec::new()),
        Type::Map(_) => Value::Map(Vec::new()),
        Type::Struct(fields) => Value::Struct(vec![Value::Null; fields.len()]),
        Type::Vector(n) => Value::Vector(vec![0.0; *n as usize].into()),
    }
}
