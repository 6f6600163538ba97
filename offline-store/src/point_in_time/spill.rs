//! What does not fit into memory, on disk: events of windows, and sources that are no Parquet files.

use std::fs::File;
use std::io::{BufReader, BufWriter};
use std::path::PathBuf;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BinaryArray, BooleanArray, Float64Array, Int64Array, RecordBatch, UInt32Array,
    UInt64Array,
};
use arrow::datatypes::{DataType, Field, Float64Type, Int64Type, Schema, UInt32Type, UInt64Type};
use arrow::ipc::reader::StreamReader;
use arrow::ipc::writer::StreamWriter;
use datafusion::common::internal_err;
use datafusion::error::{DataFusionError, Result};
use feature_defs::as_of::Times;
use feature_defs::time::Position;
use feature_defs::value::{Type, Value, decode_nullable, encode_nullable};

use super::windows::Kind;
use super::windows::events::{Data, Events};

/// Where to write what does not fit.
#[derive(Debug, Clone)]
pub struct Spill {
    pub folder: PathBuf,
}

/// A file that goes when nobody needs it any more.
#[derive(Debug)]
pub struct SpillFile {
    file: tempfile::NamedTempFile,
}

impl Spill {
    /// A new, empty file.
    pub fn file(&self, what: &str) -> Result<SpillFile> {
        let made = std::fs::create_dir_all(&self.folder)
            .and_then(|()| tempfile::Builder::new().prefix("coeval-").tempfile_in(&self.folder));
        let file = made.map_err(|error| self.full(what, &error))?;
        Ok(SpillFile { file })
    }

    /// The error of a file that could not be written.
    pub fn full(&self, what: &str, error: &dyn std::fmt::Display) -> DataFusionError {
        DataFusionError::Execution(format!(
            "{what} could not be written to {}: {error}; free some space there, or set offline.spill to another folder",
            self.folder.display()
        ))
    }

    pub fn write_events(&self, events: &Events) -> Result<SpillFile> {
        let file = self.file("events that do not fit into offline.memory")?;
        let mut fields = vec![Field::new("group", DataType::UInt32, false), Field::new("time", DataType::Int64, false)];
        let mut columns: Vec<ArrayRef> = vec![
            Arc::new(UInt32Array::from(events.groups.clone())),
            Arc::new(Int64Array::from(events.event_times.clone())),
        ];
        let mut add = |name: String, column: ArrayRef| {
            fields.push(Field::new(name, column.data_type().clone(), true));
            columns.push(column);
        };
        if !events.from.is_empty() {
            add("from".into(), Arc::new(Int64Array::from(events.from.clone())));
        }
        if !events.times.is_empty() {
            let times = events.times.iter();
            add("created".into(), Arc::new(times.clone().map(|t| t.created_time).collect::<Int64Array>()));
            add("known".into(), Arc::new(times.clone().map(|t| Some(t.known_time)).collect::<Int64Array>()));
            add("position".into(), Arc::new(times.clone().map(|t| Some(t.position.time)).collect::<Int64Array>()));
            add("sequence".into(), Arc::new(times.map(|t| Some(t.position.sequence)).collect::<UInt64Array>()));
        }
        for (at, column) in events.columns.iter().enumerate() {
            if !column.valid.is_empty() {
                add(format!("valid{at}"), Arc::new(BooleanArray::from(column.valid.clone())));
            }
            match &column.data {
                Data::None => {}
                Data::Float(values) => add(format!("data{at}"), Arc::new(Float64Array::from(values.clone()))),
                Data::Integer(values) => add(format!("data{at}"), Arc::new(Int64Array::from(values.clone()))),
                Data::Values(values) => {
                    let bytes = values.iter().map(|value| {
                        let mut bytes = Vec::new();
                        encode_nullable(value, &mut bytes);
                        bytes
                    });
                    let bytes: Vec<Vec<u8>> = bytes.collect();
                    add(format!("data{at}"), Arc::new(BinaryArray::from_iter_values(&bytes)));
                }
            }
        }
        let batch = RecordBatch::try_new(Arc::new(Schema::new(fields)), columns)?;
        let full = |error: &dyn std::fmt::Display| self.full("events that do not fit into offline.memory", error);
        let out = BufWriter::new(File::create(file.file.path()).map_err(|error| full(&error))?);
        let mut writer = StreamWriter::try_new(out, &batch.schema()).map_err(|error| full(&error))?;
        writer.write(&batch).and_then(|()| writer.finish()).map_err(|error| full(&error))?;
        writer.into_inner().map_err(|error| full(&error))?.into_inner().map_err(|error| full(&error.error()))?;
        Ok(file)
    }
}

impl SpillFile {
    pub fn path(&self) -> &std::path::Path {
        self.file.path()
    }

    pub fn read_events(&self, kinds: &[Kind], ordered: bool) -> Result<Events> {
        let reader = StreamReader::try_new(BufReader::new(File::open(self.file.path())?), None)?;
        let mut events = Events::new(kinds, ordered);
        for batch in reader {
            let batch = batch?;
            let mut part = Events::new(kinds, ordered);
            let integers = |name: &str| -> Vec<i64> {
                batch.column_by_name(name).map_or(Vec::new(), |c| c.as_primitive::<Int64Type>().values().to_vec())
            };
            part.groups = batch.column(0).as_primitive::<UInt32Type>().values().to_vec();
            part.event_times = integers("time");
            part.from = integers("from");
            if let Some(created) = batch.column_by_name("created") {
                let created = created.as_primitive::<Int64Type>();
                let (known, position) = (integers("known"), integers("position"));
                let Some(sequence) = batch.column_by_name("sequence") else { return internal_err!("no sequences") };
                let sequence = sequence.as_primitive::<UInt64Type>().values();
                part.times = (0..batch.num_rows())
                    .map(|row| Times {
                        event_time: part.event_times[row],
                        created_time: created.is_valid(row).then(|| created.value(row)),
                        known_time: known[row],
                        position: Position { time: position[row], sequence: sequence[row] },
                    })
                    .collect();
            }
            for (at, column) in part.columns.iter_mut().enumerate() {
                if let Some(valid) = batch.column_by_name(&format!("valid{at}")) {
                    column.valid = valid.as_boolean().values().iter().collect();
                }
                let Some(data) = batch.column_by_name(&format!("data{at}")) else { continue };
                match &mut column.data {
                    Data::None => {}
                    Data::Float(values) => *values = data.as_primitive::<Float64Type>().values().to_vec(),
                    Data::Integer(values) => *values = data.as_primitive::<Int64Type>().values().to_vec(),
                    Data::Values(values) => {
                        let value_type = match &kinds[at] {
                            Kind::Values(value_type) => value_type.clone(),
                            _ => Type::Bool,
                        };
                        let data = data.as_binary::<i32>();
                        let decoded = data.iter().map(|bytes| {
                            let mut bytes = bytes.unwrap_or(&[0]);
                            decode_nullable(&mut bytes, &value_type)
                                .map_err(|error| DataFusionError::External(Box::new(error)))
                        });
                        *values = decoded.collect::<Result<Vec<Value>>>()?;
                    }
                }
            }
            events.append(part);
        }
        Ok(events)
    }
}
