use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::{BooleanArray, FixedSizeListArray, Float32Array, Int64Array, RecordBatch};
use arrow::datatypes::{Field, Schema};
use arrow::ipc::writer::FileWriter;
use inference::model::{InputSpec, OutputSpec};

use super::*;

fn spec() -> ModelSpec {
    ModelSpec {
        inputs: vec![InputSpec::features("dense", Dtype::Float32, 2), InputSpec::features("carrier", Dtype::Int64, 1)],
        outputs: vec![
            OutputSpec { name: "p".into(), dtype: Dtype::Float32 },
            OutputSpec { name: "is_late".into(), dtype: Dtype::Bool },
        ],
    }
}

fn list(values: ArrayRef, width: i32) -> ArrayRef {
    let item = Arc::new(Field::new("item", values.data_type().clone(), false));
    Arc::new(FixedSizeListArray::new(item, width, values, None))
}

fn columns() -> Vec<(&'static str, ArrayRef)> {
    vec![
        ("input:dense", list(Arc::new(Float32Array::from(vec![1.0, 2.0, 3.0, 4.0])), 2)),
        ("input:carrier", list(Arc::new(Int64Array::from(vec![7, 9])), 1)),
        ("output:p", Arc::new(Float32Array::from(vec![0.25, 0.5]))),
        ("output:is_late", list(Arc::new(BooleanArray::from(vec![true, false])), 1)),
    ]
}

fn file(columns: Vec<(&str, ArrayRef)>, metadata: &[(&str, &str)]) -> Vec<u8> {
    let fields: Vec<Field> =
        columns.iter().map(|(name, column)| Field::new(*name, column.data_type().clone(), true)).collect();
    let metadata: HashMap<String, String> =
        metadata.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    let schema = Arc::new(Schema::new_with_metadata(fields, metadata));
    let arrays = columns.into_iter().map(|(_, column)| column).collect();
    let batch = RecordBatch::try_new(schema.clone(), arrays).unwrap();
    let mut bytes = Vec::new();
    let mut writer = FileWriter::try_new(&mut bytes, &schema).unwrap();
    writer.write(&batch).unwrap();
    writer.finish().unwrap();
    drop(writer);
    bytes
}

#[test]
fn rows_are_read_with_their_outputs_and_tolerances() {
    let said = "{\"float32\": {\"rtol\": 0.01, \"atol\": 0}}";
    let golden = parse(&file(columns(), &[(TOLERANCE, said)]), &spec()).unwrap();
    assert_eq!(golden.rows.len(), 2);
    let row = &golden.rows[1];
    assert_eq!(row.inputs[0].1.data(), &TensorData::Float32(vec![3.0, 4.0]));
    assert_eq!(row.inputs[1].1.shape(), [1, 1]);
    assert_eq!(row.outputs[0].data(), &TensorData::Float32(vec![0.5]));
    assert_eq!((row.outputs[1].shape(), row.outputs[1].data()), (&[1][..], &TensorData::Bool(vec![false])));
    assert_eq!(golden.tolerances.of(Dtype::Float32), Tolerance { rtol: 0.01, atol: 0.0 });
    assert_eq!(golden.tolerances.of(Dtype::Float64), Tolerances::default().of(Dtype::Float64));
}

#[test]
fn what_does_not_fit_the_model_is_refused_with_the_reason() {
    #[track_caller]
    fn check(bytes: &[u8], expected: &str) {
        let reason = parse(bytes, &spec()).unwrap_err();
        assert!(reason.contains(expected), "{reason}");
    }
    check(b"not arrow at all", "the file is not in the Arrow IPC file format");
    let whole = file(columns(), &[]);
    check(&whole[..whole.len() / 2], "");
    let with = |place: usize, name: &'static str, column: ArrayRef| {
        let mut columns = columns();
        columns[place] = (name, column);
        file(columns, &[])
    };
    let floats = |count: usize| Arc::new(Float32Array::from(vec![0.5; count])) as ArrayRef;
    check(&with(0, "input:dence", list(floats(4), 2)), "there is no column `input:dense`; it has `input:dence`, ");
    check(&with(0, "input:dense", list(floats(6), 3)), "`input:dense` has [3] numbers per row, but the model takes 2");
    check(&with(1, "input:carrier", list(floats(2), 1)), "`input:carrier` is Float32, but the model declares int64");
    let nulls = Arc::new(Float32Array::from(vec![Some(0.5), None])) as ArrayRef;
    check(&with(2, "output:p", nulls), "`output:p` has nulls");
    let mut more = columns();
    more.push(("label", floats(2)));
    check(&file(more, &[]), "it has 5 columns where the model has 4 inputs and outputs");
    let empty = columns().into_iter().map(|(name, column)| (name, column.slice(0, 0))).collect();
    check(&file(empty, &[]), "there are 0 rows; send 1 to 256");
    check(&file(columns(), &[(TOLERANCE, "{\"float8\": {\"rtol\": 1, \"atol\": 1}}")]), "names the dtype `float8`");
    check(&file(columns(), &[(TOLERANCE, "{\"float32\": {\"rtol\": -1, \"atol\": 1}}")]), "not negative");
}
