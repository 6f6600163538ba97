//! Features as a model's inputs, by the encoder that serving runs.

use std::sync::Arc;

use arrow::array::{
    ArrayRef, BooleanArray, FixedSizeListArray, Float32Array, Float64Array, Int32Array, Int64Array, RecordBatch,
    RecordBatchOptions, UInt8Array,
};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use feature_defs::catalog::Missing;
use feature_defs::plan::{Assembled, InputValues, ModelPlan, TensorType};
use tonic::Status;

use super::encode::Change;

/// The column that says where serving would refuse a row.
pub const REFUSED: &str = "__refused";

/// What encodes batches of a service's training set for a model.
pub struct TensorEncoder {
    model: Arc<ModelPlan>,
    /// Of the batches that come in: where each feature of the service is.
    features: Vec<usize>,
    /// Columns that pass through.
    passed: Vec<usize>,
    schema: SchemaRef,
}

impl TensorEncoder {
    /// `schema` is of the training set. `passed` names the columns beside the features that are kept, None: all.
    pub fn new(model: Arc<ModelPlan>, schema: &Schema, passed: Option<&[String]>) -> Result<TensorEncoder, Status> {
        let outputs = &model.service.outputs;
        let features = outputs.iter().map(|output| {
            let (index, field) = schema.column_with_name(&output.name)?;
            (*field.data_type() == output.feature_type.arrow()).then_some(index)
        });
        let features = features.collect::<Option<Vec<_>>>().ok_or_else(|| {
            let text = format!(
                "the training set lacks features of service `{}` as they are defined now; create it again",
                model.service.name
            );
            Status::failed_precondition(text)
        })?;
        let is_feature = |index: usize| {
            let name = schema.field(index).name();
            let status = name.strip_suffix("__status");
            features.contains(&index) || outputs.iter().any(|output| status == Some(&*output.name))
        };
        let passed = match passed {
            None => (0..schema.fields().len()).filter(|index| !is_feature(*index)).collect(),
            Some(names) => names
                .iter()
                .map(|name| {
                    schema.index_of(name).map_err(|_| {
                        let known: Vec<&str> = schema.fields().iter().map(|field| field.name().as_str()).collect();
                        let known = known.join(", ");
                        Status::invalid_argument(format!("the training set has no column `{name}`; it has: {known}"))
                    })
                })
                .collect::<Result<Vec<_>, _>>()?,
        };
        let mut fields: Vec<Field> = passed.iter().map(|index| schema.field(*index).clone()).collect();
        for input in &model.inputs {
            let item = match input.dtype {
                TensorType::Float32 => DataType::Float32,
                TensorType::Float64 => DataType::Float64,
                TensorType::Int32 => DataType::Int32,
                TensorType::Int64 => DataType::Int64,
                // A bit per value could not become a tensor without being unpacked.
                TensorType::Bool => DataType::UInt8,
            };
            let width = i32::try_from(input.width).map_err(|_| Status::internal("an input is too wide"))?;
            let list = DataType::FixedSizeList(Arc::new(Field::new("item", item, false)), width);
            fields.push(Field::new(&input.name, list, false));
        }
        if model.inputs.iter().any(|input| matches!(input.missing, Missing::Refuse)) {
            fields.push(Field::new(REFUSED, DataType::Boolean, false));
        }
        let mut names: Vec<&str> = fields.iter().map(|field| field.name().as_str()).collect();
        names.sort_unstable();
        if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            let text =
                format!("`{}` is both an input of model `{}` and a column; rename the column", twice[0], model.name);
            return Err(Status::invalid_argument(text));
        }
        Ok(TensorEncoder { model, features, passed, schema: Arc::new(Schema::new(fields)) })
    }

    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    pub fn into_change(self) -> Change {
        Arc::new(move |batch| self.encode(&batch))
    }

    fn encode(&self, batch: &RecordBatch) -> Result<RecordBatch, Status> {
        let rows = batch.num_rows();
        let features = Assembled {
            columns: self.features.iter().map(|index| batch.column(*index).clone()).collect(),
            // The encoder asks for values alone.
            statuses: Vec::new(),
            defaults: Vec::new(),
        };
        let encoded = self.model.encode(&features, rows);
        let mut columns: Vec<ArrayRef> = self.passed.iter().map(|index| batch.column(*index).clone()).collect();
        for (input, field) in encoded.inputs.into_iter().zip(&self.schema.fields()[self.passed.len()..]) {
            let values: ArrayRef = match input.values {
                InputValues::Float32(values) => Arc::new(Float32Array::from(values)),
                InputValues::Float64(values) => Arc::new(Float64Array::from(values)),
                InputValues::Int32(values) => Arc::new(Int32Array::from(values)),
                InputValues::Int64(values) => Arc::new(Int64Array::from(values)),
                InputValues::Bool(values) => Arc::new(values.into_iter().map(u8::from).collect::<UInt8Array>()),
            };
            let DataType::FixedSizeList(item, width) = field.data_type() else {
                return Err(Status::internal("an input is no list"));
            };
            let list = FixedSizeListArray::try_new(item.clone(), *width, values, None);
            columns.push(Arc::new(list.map_err(|error| Status::internal(error.to_string()))?));
        }
        if columns.len() < self.schema.fields().len() {
            let mut refused = vec![false; rows];
            encoded.refused.iter().for_each(|(row, _)| refused[*row] = true);
            columns.push(Arc::new(BooleanArray::from(refused)));
        }
        let options = RecordBatchOptions::new().with_row_count(Some(rows));
        RecordBatch::try_new_with_options(self.schema.clone(), columns, &options)
            .map_err(|error| Status::internal(error.to_string()))
    }
}
