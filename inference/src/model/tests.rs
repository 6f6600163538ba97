use super::*;
use crate::tensor::TensorData;

fn spec() -> ModelSpec {
    ModelSpec {
        inputs: vec![InputSpec::features("dense", Dtype::Float32, 2), InputSpec::features("carrier", Dtype::Int64, 1)],
        outputs: vec![OutputSpec { name: "p_late".to_owned(), dtype: Dtype::Float32 }],
    }
}

fn batch(names: [&str; 2], rows: [usize; 2]) -> TensorBatch {
    let tensor = |name: &str, rows| match name {
        "dense" => Tensor::zeros(Dtype::Float32, rows, &[2]),
        _ => Tensor::zeros(Dtype::Int64, rows, &[1]),
    };
    names.iter().zip(rows).map(|(name, rows)| ((*name).to_owned(), tensor(name, rows))).collect()
}

fn check(batch: TensorBatch, expected: &str) {
    assert_eq!(spec().arrange(batch).unwrap_err().to_string(), expected);
}

#[test]
fn inputs_are_put_in_the_declared_order() {
    let (tensors, rows) = spec().arrange(batch(["carrier", "dense"], [3, 3])).unwrap();
    assert_eq!(rows, 3);
    assert_eq!(tensors[0].dtype(), Dtype::Float32);
    assert_eq!(tensors[1].dtype(), Dtype::Int64);
}

#[test]
fn inputs_that_do_not_fit_are_named() {
    check(
        batch(["dense", "airline"], [1, 1]),
        r#"the model takes the inputs ["dense", "carrier"], but got ["dense", "airline"]"#,
    );
    check(batch(["dense", "carrier"], [2, 3]), "the input `carrier` must be 2 rows, but is 3 rows");
    check(batch(["dense", "carrier"], [0, 0]), "the input `dense` must be at least one row, but is 0 rows");
    let narrow = vec![
        ("carrier".to_owned(), Tensor::zeros(Dtype::Int64, 1, &[1])),
        ("dense".to_owned(), Tensor::zeros(Dtype::Float64, 1, &[2])),
    ];
    check(narrow, "the input `dense` must be float32 [_, 2], but is float64 [_, 2]");
    check(vec![], r#"the model takes the inputs ["dense", "carrier"], but got []"#);
}

#[test]
fn outputs_are_checked_against_the_declaration() {
    let float = |shape: &[usize]| {
        Tensor::try_new(shape.to_vec(), TensorData::Float32(vec![0.0; shape.iter().product()])).unwrap()
    };
    let spec = spec();
    assert_eq!(spec.check_outputs(&[float(&[3])], 3), Ok(()));
    assert_eq!(spec.check_outputs(&[float(&[3, 2])], 3), Ok(()));
    let check = |outputs: &[Tensor], expected: &str| {
        assert_eq!(spec.check_outputs(outputs, 3).unwrap_err().to_string(), expected);
    };
    check(&[], "the model returned 0 tensors, but 1 outputs are declared");
    check(&[float(&[1])], "the output `p_late` has the shape [1], but 3 rows were passed: it must be [3] or [3, k]");
    check(
        &[Tensor::zeros(Dtype::Float64, 3, &[])],
        "the output `p_late` is declared float32, but the model returned float64",
    );
}

#[test]
fn a_failing_width_is_blamed_on_the_input_that_has_it() {
    let mut spec = spec();
    let check = |spec: &ModelSpec, cause: &str, expected: &str| {
        assert_eq!(spec.explain_failure(1, &ModelError::Runtime(cause.to_owned())), expected);
    };
    let shapes = "mat1 and mat2 shapes cannot be multiplied (1x2 and 30x16)";
    check(&spec, shapes, &format!("the model's input `dense` is 2 wide, but the module failed on it: {shapes}"));
    let joined = "mat1 and mat2 shapes cannot be multiplied (1x6 and 30x16)";
    let inputs = "`dense` (float32 [_, 2]) and `carrier` (int64 [_, 1])";
    check(
        &spec,
        joined,
        &format!("the model's inputs are {inputs}, but the module failed on 1 rows of them: {joined}"),
    );
    spec.inputs.pop();
    check(&spec, joined, &format!("the model's input `dense` is 2 wide, but the module failed on it: {joined}"));
}

#[test]
fn executors_are_spread_over_the_devices_in_turn() {
    let of = |names: &[&str], executors: usize| {
        let devices = Devices::from_names(names.iter().copied()).unwrap();
        (0..executors).map(|index| devices.of_executor(index).to_string()).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(of(&["cpu"], 2), "cpu cpu");
    assert_eq!(of(&[], 1), "cpu");
    assert_eq!(of(&["cuda:3", "cuda"], 5), "cuda:0 cuda:3 cuda:0 cuda:3 cuda:0");
    assert_eq!(of(&["cuda:1", "cpu", "cuda:1"], 3), "cpu cuda:1 cpu");
    assert_eq!(Devices::from_names(["cpu", "gpu"]), Err("gpu".to_owned()));
    assert_eq!(Devices::from_names(["cuda:64"]), Err("cuda:64".to_owned()));
    assert_eq!(of(&["cuda:63"], 2), "cuda:63 cuda:63");
    let overlap = |a: &[&str], b: &[&str]| {
        let devices = |names: &[&str]| Devices::from_names(names.iter().copied()).unwrap();
        devices(a).overlaps(devices(b))
    };
    assert!(overlap(&["cpu", "cuda:1"], &["cuda:1"]) && overlap(&["cpu"], &[]));
    assert!(!overlap(&["cpu", "cuda:0"], &["cuda:1"]));
    assert_eq!(Device::from_name("cuda:-1"), None);
}
