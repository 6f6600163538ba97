//! Asks the versions that are loaded here for rows of the log again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::datatypes::{Float32Type, Float64Type, Int32Type, Int64Type};
use async_trait::async_trait;
use feature_defs::plan::{EncodedModelInputs, ModelPlan};
use inference::check;
use inference::model::OutputSpec;
use inference::tensor::{Dtype, Tensor, TensorData};
use offline_store::audit::Rescore;
use offline_store::serving_log::columns;

use crate::follow::Served;
use crate::predict;
use crate::versions::ServedModel;

/// How long a row waits for its turn behind requests.
const DEADLINE: Duration = Duration::from_secs(20);

/// The versions of models in this process, by name and number.
pub struct Again {
    versions: BTreeMap<(String, u32), Arc<ServedModel>>,
}

impl Again {
    pub fn of(served: &Served) -> Again {
        let versions = served.versions.iter().flat_map(|(name, versions)| {
            let ready = versions.iter().filter_map(|(number, version)| Some((*number, version.state.ready.clone()?)));
            ready.map(|(number, model)| ((name.clone(), number), model))
        });
        Again { versions: versions.collect() }
    }
}

#[async_trait]
impl Rescore for Again {
    async fn rescore(
        &self,
        model: &ModelPlan,
        version: u32,
        inputs: &EncodedModelInputs,
        logged: &RecordBatch,
    ) -> Result<Vec<Option<String>>, String> {
        let served = self.versions.get(&(model.name.to_string(), version));
        let served = served.ok_or_else(|| "the version is not loaded here".to_owned())?;
        if served.plan.semantic_digest != model.semantic_digest {
            return Err("the version is loaded under other definitions".to_owned());
        }
        let outputs = &served.server.spec().outputs;
        let mut differences = Vec::with_capacity(logged.num_rows());
        for row in 0..logged.num_rows() {
            let encoded = inputs.inputs.iter().map(|input| Ok((input.name.clone(), predict::tensor(input, &[row])?)));
            let encoded: Result<Vec<_>, inference::tensor::TensorError> = encoded.collect();
            let encoded = encoded.map_err(|error| error.to_string())?;
            let found = served.server.check(encoded, Instant::now() + DEADLINE).await;
            let found = found.map_err(|error| error.to_string())?;
            let found: Vec<Tensor> = found.outputs.into_iter().map(|(_, tensor)| tensor).collect();
            let expected: Option<Vec<Tensor>> = outputs.iter().map(|output| expected(output, logged, row)).collect();
            let Some(expected) = expected else { return Err("its outputs are not in the log as they are".to_owned()) };
            let compared = check::compare(outputs, &found, &expected, &[row], served.checks.tolerances());
            differences.push(compared.err().map(|difference| difference.to_string()));
        }
        Ok(differences)
    }
}

/// What was logged of an output, as the model gives it.
fn expected(output: &OutputSpec, logged: &RecordBatch, row: usize) -> Option<Tensor> {
    let column: &ArrayRef = logged.column_by_name(&columns::output(&output.name))?;
    if column.is_null(row) {
        return None;
    }
    let column = column.slice(row, 1);
    let values: ArrayRef = match column.as_fixed_size_list_opt() {
        Some(list) => list.value(0),
        None => column,
    };
    let data = match output.dtype {
        Dtype::Float32 => TensorData::Float32(values.as_primitive_opt::<Float32Type>()?.values().to_vec()),
        Dtype::Float64 => TensorData::Float64(values.as_primitive_opt::<Float64Type>()?.values().to_vec()),
        Dtype::Int64 => TensorData::Int64(values.as_primitive_opt::<Int64Type>()?.values().to_vec()),
        Dtype::Int32 => TensorData::Int32(values.as_primitive_opt::<Int32Type>()?.values().to_vec()),
        Dtype::Bool => TensorData::Bool(values.as_boolean_opt()?.values().iter().collect()),
    };
    Tensor::try_new(vec![1, values.len()], data).ok().map(Tensor::squeeze_single_column)
}
