use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;
use crate::batch::BatchLimits;
use crate::executor::{InferError, ModelServer, Outcome, ServerOptions, StartError};
use crate::model::{InputSpec, OutputSpec};
use crate::tensor::{Dtype, TensorData};

fn artefact(name: &str) -> Artefact {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    Artefact::read(&folder.join(name)).expect("the module is committed")
}

fn spec(inputs: &[(&str, Dtype, usize)], outputs: &[&str]) -> ModelSpec {
    ModelSpec {
        inputs: inputs.iter().map(|&(name, dtype, width)| InputSpec::features(name, dtype, width)).collect(),
        outputs: outputs.iter().map(|&name| OutputSpec { name: name.to_owned(), dtype: Dtype::Float32 }).collect(),
    }
}

fn delay_spec(width: usize) -> ModelSpec {
    spec(&[("dense", Dtype::Float32, width), ("carrier", Dtype::Int64, 1)], &["score"])
}

fn load(name: &str, spec: &ModelSpec) -> Box<dyn Model> {
    TorchRuntime.load(&artefact(name), spec, &LoadOptions::default()).expect("the module loads")
}

fn floats(shape: &[usize], values: &[f32]) -> Tensor {
    Tensor::try_new(shape.to_vec(), TensorData::Float32(values.to_vec())).expect("a valid tensor")
}

fn ints(values: &[i64]) -> Tensor {
    Tensor::try_new(vec![values.len(), 1], TensorData::Int64(values.to_vec())).expect("a valid tensor")
}

async fn start(name: &str, spec: ModelSpec, executors: usize) -> Result<ModelServer, StartError> {
    let options = ServerOptions { executors, ..ServerOptions::new(BatchLimits::new(16, 256)) };
    ModelServer::start("delay", Arc::new(TorchRuntime), artefact(name), spec, options).await
}

async fn score(server: &ModelServer, dense: &[f32], carriers: &[i64]) -> Result<Outcome, InferError> {
    let rows = carriers.len();
    let inputs = vec![("dense".to_owned(), floats(&[rows, 3], dense)), ("carrier".to_owned(), ints(carriers))];
    server.submit(inputs, Instant::now() + Duration::from_secs(30)).await
}

#[test]
fn a_module_is_run_with_its_inputs_by_position() {
    let mut model = load("delay.pt", &delay_spec(3));
    let dense = floats(&[2, 3], &[1.0, 1.0, 1.0, 0.5, 0.0, -1.0]);
    let outputs = model.forward(&[dense, ints(&[0, 2])]).unwrap();
    assert_eq!(outputs, [floats(&[2, 1], &[16.0, 27.5])]);
}

#[test]
fn several_outputs_any_layout_and_evaluation_mode() {
    let mut model = load("many.pt", &spec(&[("x", Dtype::Float32, 2)], &["total", "pair"]));
    let outputs = model.forward(&[floats(&[3, 2], &[1.0, 2.0, -3.0, 1.0, 0.0, 0.5])]).unwrap();
    assert_eq!(outputs[0], floats(&[3], &[3.0, -2.0, 0.5]));
    assert_eq!(outputs[1], floats(&[3, 2], &[6.0, 0.0, -4.0, 1.0, 1.0, 0.0]));
}

#[test]
fn loading_what_is_no_module_says_so_in_one_line() {
    let artefact = Artefact::new("models/delay.pt", *b"not a zip archive");
    let error = TorchRuntime.load(&artefact, &delay_spec(3), &LoadOptions::default()).err().expect("it is no module");
    let text = error.to_string();
    assert!(text.starts_with("models/delay.pt is not a model that can be loaded: "), "{text}");
    assert!(!text.contains("frame #") && !text.contains('\n'), "{text}");
    assert!(matches!(Artefact::read(std::path::Path::new("/does/not/exist.pt")), Err(LoadError::Read { .. })));
}

#[tokio::test]
async fn a_width_that_does_not_fit_is_found_before_ready() {
    let error = start("delay.pt", delay_spec(4), 2).await.err().expect("the width does not fit");
    assert_eq!(
        error.to_string(),
        "the model `delay` does not fit its declaration: the model's input `dense` is 4 wide, but the module failed on \
         it: mat1 and mat2 shapes cannot be multiplied (1x4 and 3x1)"
    );
    let error = start("half.pt", spec(&[("x", Dtype::Float32, 2)], &["p"]), 1).await.err().expect("half is not served");
    assert!(error.to_string().contains("convert it, for example to float32"), "{error}");
    let error = start("many.pt", spec(&[("x", Dtype::Float32, 2)], &["p"]), 1).await.err().expect("two outputs");
    assert!(error.to_string().ends_with("the model returned 2 tensors, but 1 outputs are declared"), "{error}");
}

#[tokio::test]
async fn a_server_answers_the_same_alone_and_in_a_batch() {
    let server = Arc::new(start("delay.pt", delay_spec(3), 2).await.expect("it starts"));
    // Warm-up covered every padded size on both executors.
    let sizes: Vec<(usize, usize)> = server.warm_up().iter().map(|entry| (entry.executor, entry.rows)).collect();
    assert_eq!(sizes, [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (1, 1), (1, 2), (1, 4), (1, 8), (1, 16)]);
    let mut calls = Vec::new();
    for index in 0..200_u8 {
        let server = server.clone();
        calls.push(tokio::spawn(async move {
            let value = f32::from(index);
            let outcome = score(&server, &[value, 0.0, 1.0], &[1]).await.expect("it runs");
            (value, outcome)
        }));
    }
    for call in calls {
        let (value, outcome) = call.await.expect("no panic");
        assert_eq!(outcome.outputs, [("score".to_owned(), floats(&[1], &[value + 3.0 + 20.0]))]);
        assert!(outcome.batch_rows <= 16);
    }
    // Forty rows are three batches.
    let dense: Vec<f32> = (0..120).map(|index| if index % 3 == 0 { index as f32 } else { 0.0 }).collect();
    let outcome = score(&server, &dense, &[0; 40]).await.expect("it runs");
    let expected: Vec<f32> = (0..40).map(|row| row as f32 * 3.0 + 10.0).collect();
    assert_eq!(outcome.outputs, [("score".to_owned(), floats(&[40], &expected))]);
    let metrics = server.metrics();
    assert_eq!((metrics.rows, metrics.queue_rows, metrics.failures), (240, 0, 0));
    server.shutdown().await;
}

#[tokio::test]
async fn a_row_beyond_the_embedding_fails_alone() {
    let server = start("delay.pt", delay_spec(3), 1).await.expect("it starts");
    let (good, bad, also_good) = tokio::join!(
        score(&server, &[1.0, 0.0, 0.0], &[0]),
        score(&server, &[1.0, 0.0, 0.0], &[7]),
        score(&server, &[2.0, 0.0, 0.0], &[0]),
    );
    assert_eq!(good.expect("its row is fine").outputs[0].1, floats(&[1], &[11.0]));
    assert_eq!(also_good.expect("its row is fine").outputs[0].1, floats(&[1], &[12.0]));
    assert_eq!(bad, Err(InferError::Model(ModelError::Runtime("index out of range in self".to_owned()))));
}

#[test]
fn backtraces_and_listings_are_cut() {
    let check = |text: &str, expected: &str| assert_eq!(clean(text), expected);
    check(
        "bad zip\nException raised from valid at inline_container.cc:197 (most recent call first):\nframe #0",
        "bad zip",
    );
    check(
        "The following operation failed in the TorchScript interpreter.\nTraceback of TorchScript (most recent call last):\n\
         \x20   return self.linear(x)\n           ~~~~~ <--- HERE\nRuntimeError: mat1 and mat2\nshapes differ\n",
        "mat1 and mat2 shapes differ",
    );
    check("", "libtorch gave no reason");
    assert_eq!(clean(&"x".repeat(900)).len(), 504);
    assert!(is_out_of_memory(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"
    ));
}

#[test]
fn what_weights_and_forwards_take_is_counted_on_their_own_thread() {
    let mut model = load("delay.pt", &delay_spec(3));
    let weights = model.memory().expect("it counts").weights;
    // A few numbers, each tensor aligned to 64 bytes.
    assert!((64..100_000).contains(&weights), "{weights}");
    let mut of = |rows: usize| {
        let dense = Tensor::zeros(Dtype::Float32, rows, &[3]);
        model.forward(&[dense, ints(&vec![0; rows])]).unwrap();
        model.memory().expect("it counts").forward
    };
    let (one, many) = (of(1), of(100_000));
    // Inputs of 12 and 8 bytes a row, and the output of 4, at least.
    assert!((100_000 * 24..100_000 * 200).contains(&many), "{many}");
    assert!(one < many / 100, "{one}");
    // malloc rounds as it likes, from one time to the next.
    assert!(of(100_000).abs_diff(many) < many / 20, "something is left behind, or was at first");
    let elsewhere = std::thread::spawn(ffi::memory_held).join().unwrap();
    assert_eq!(elsewhere, 0);
}
