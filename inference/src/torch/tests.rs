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
    let elsewhere = || Torch::get().unwrap().memory(Device::Cpu).unwrap();
    assert_eq!(std::thread::spawn(elsewhere).join().unwrap(), ffi::Memory::default());
}

/// What a process has in memory cannot be told apart from what other tests have put there.
fn in_a_process_of_its_own(test: &str, body: impl FnOnce()) {
    const INSIDE: &str = "COEVAL_TEST_INSIDE";
    if std::env::var_os(INSIDE).is_some() {
        return body();
    }
    let mut process = std::process::Command::new(std::env::current_exe().unwrap());
    process.args(["--exact", &format!("torch::tests::{test}"), "--nocapture"]).env(INSIDE, "1");
    let ended = process.output().unwrap();
    let said = String::from_utf8_lossy(&ended.stdout);
    assert!(ended.status.success(), "{said}{}", String::from_utf8_lossy(&ended.stderr));
    assert!(said.contains("1 passed"), "there is no test `{test}`: {said}");
}

#[test]
fn libtorch_and_the_bindings_are_there_with_the_first_model() {
    in_a_process_of_its_own("libtorch_and_the_bindings_are_there_with_the_first_model", || {
        let maps = || std::fs::read_to_string("/proc/self/maps").unwrap();
        let before = maps();
        assert!(!before.contains("/libtorch_cpu.so") && !before.contains("libcoeval_torch.so"), "{before}");
        drop(load("delay.pt", &delay_spec(3)));
        let after = maps();
        assert!(after.contains("/libtorch_cpu.so") && after.contains("libcoeval_torch.so"), "{after}");
        assert!(!after.contains("/libtorch_cuda.so"), "nobody asked for a CUDA device");
    });
}

/// A module that does what its first number says, see `make_models.py`.
fn odd(numbers: [f32; 2]) -> Result<Vec<Tensor>, ModelError> {
    let mut model = load("odd.pt", &odd_spec());
    model.forward(&[floats(&[2, 2], &[numbers[0], numbers[1], 3.0, 4.0])])
}

fn odd_spec() -> ModelSpec {
    spec(&[("x", Dtype::Float32, 2)], &["total"])
}

#[test]
fn what_the_code_of_a_model_raises_is_told_in_one_line() {
    let raised = ModelError::Runtime("ValueError: the first number is 1".to_owned());
    assert_eq!(odd([1.0, 0.0]), Err(raised));
}

#[test]
fn outputs_that_are_not_as_declared_are_refused() {
    let check = |what: f32, expected: &str| {
        assert_eq!(odd([what, 0.0]), Err(ModelError::Runtime(expected.to_owned())));
    };
    check(3.0, "the output `total` has the shape [1], but 2 rows were passed: it must be [2] or [2, k]");
    check(4.0, "the output `total` is declared float32, but the model returned float64");
    check(7.0, "the module returned a tensor of 0 dimensions, but rows come first");
    // A number that is none is a number all the same; what it is worth is for others to say.
    let outputs = odd([2.0, 0.0]).unwrap();
    let TensorData::Float32(values) = outputs[0].data() else { panic!("floats") };
    assert!(values.len() == 2 && values.iter().all(|value| value.is_nan()));
    let mut mapped = load("mapped.pt", &odd_spec());
    let expected = "the module must return a tensor, or a tuple or list of tensors";
    assert_eq!(mapped.forward(&[floats(&[1, 2], &[0.0, 0.0])]), Err(ModelError::Runtime(expected.to_owned())));
}

#[test]
fn memory_that_is_not_there_is_an_error_of_its_own() {
    // More than any machine has.
    let error = odd([5.0, 0.0]).unwrap_err();
    let ModelError::OutOfMemory(text) = &error else { panic!("{error:?}") };
    assert!(text.starts_with("cannot allocate 1125899906842624 bytes") && !text.contains("frame #"), "{text}");
    // What the kernel would grant and then kill for: nine tenths of the machine.
    let capacity = memory::capacity().expect("Linux tells");
    let mib = (capacity / 10 * 9) >> 20;
    let error = odd([6.0, mib as f32]).unwrap_err();
    let ModelError::OutOfMemory(text) = &error else { panic!("{error:?}") };
    assert!(text.contains(&format!("may hold {}", memory::allowed(capacity))), "{text}");
    assert!(odd([6.0, 1.0]).is_ok());
}

#[tokio::test]
async fn a_server_outlives_a_model_that_takes_too_much() {
    let options = ServerOptions::new(BatchLimits::new(4, 64));
    let server = ModelServer::start("odd", Arc::new(TorchRuntime), artefact("odd.pt"), odd_spec(), options).await;
    let server = server.expect("zeros are harmless");
    let ask = |numbers: [f32; 2]| {
        let inputs = vec![("x".to_owned(), floats(&[1, 2], &numbers))];
        server.submit(inputs, Instant::now() + Duration::from_secs(30))
    };
    for _ in 0..2 {
        let refused = ask([5.0, 0.0]).await;
        assert!(matches!(refused, Err(InferError::Model(ModelError::OutOfMemory(_)))), "{refused:?}");
        assert_eq!(ask([0.0, 2.0]).await.expect("it goes on").outputs[0].1, floats(&[1], &[2.0]));
    }
    // A neighbour in the same batch is answered.
    let (large, small) = tokio::join!(ask([5.0, 0.0]), ask([0.0, 3.0]));
    assert!(matches!(large, Err(InferError::Model(ModelError::OutOfMemory(_)))), "{large:?}");
    assert_eq!(small.expect("it is harmless").outputs[0].1, floats(&[1], &[3.0]));
    assert_eq!(server.stuck(), None);
    server.shutdown().await;
}

#[test]
fn what_a_failed_forward_held_is_freed() {
    let mut model = load("odd.pt", &odd_spec());
    let held = || Torch::get().unwrap().memory(Device::Cpu).unwrap().allocated;
    let before = held();
    for what in [0.0, 1.0, 3.0, 4.0, 5.0, 7.0] {
        let _ = model.forward(&[floats(&[2, 2], &[what, 0.0, 3.0, 4.0])]);
        assert_eq!(held(), before, "{what}");
    }
    drop(model);
    assert!(held() < before);
}

#[test]
fn a_row_is_the_same_on_the_first_call_and_later() {
    let mut model = load("layers.pt", &spec(&[("x", Dtype::Float32, 16)], &["p"]));
    let inputs = [floats(&[3, 16], &(0..48_u8).map(|value| f32::from(value) / 48.0).collect::<Vec<_>>())];
    let first = model.forward(&inputs).unwrap();
    for _ in 0..20 {
        assert_eq!(model.forward(&inputs).unwrap(), first);
    }
}

#[test]
fn a_corrupt_file_is_told_and_leaves_nothing_behind() {
    let good = artefact("layers.pt");
    let spec = spec(&[("x", Dtype::Float32, 16)], &["p"]);
    let load = |bytes: &[u8]| TorchRuntime.load(&Artefact::new("layers.pt", bytes), &spec, &LoadOptions::default());
    drop(load(&good.bytes).unwrap());
    let held = Torch::get().unwrap().memory(Device::Cpu).unwrap().allocated;
    let mut broken: Vec<Vec<u8>> =
        [0, 1, 100, good.bytes.len() / 2, good.bytes.len() - 1].map(|len| good.bytes[..len].to_vec()).to_vec();
    // Bytes of the middle: the code, which is compressed or checked.
    let mut turned = good.bytes.to_vec();
    turned.iter_mut().skip(200).take(4000).for_each(|byte| *byte = !*byte);
    broken.push(turned);
    for bytes in broken {
        let error = load(&bytes).err().expect("it is corrupt");
        assert!(matches!(error, LoadError::Invalid { .. }), "{error:?}");
        let text = error.to_string();
        assert!(!text.contains('\n') && !text.contains("frame #"), "{text}");
    }
    assert_eq!(Torch::get().unwrap().memory(Device::Cpu).unwrap().allocated, held);
}

#[test]
fn a_device_that_is_not_there_is_refused_with_what_is() {
    let options = LoadOptions { device: Device::Cuda(64), threads: 1 };
    let error = TorchRuntime.load(&artefact("delay.pt"), &delay_spec(3), &options).err().expect("64 devices");
    match error {
        // The parts for CUDA may not be installed at all.
        LoadError::NoRuntime { reason } => assert!(reason.contains("libtorch_cuda.so"), "{reason}"),
        LoadError::NoDevice { device, there } => {
            assert_eq!(device, Device::Cuda(64));
            assert_eq!(there[0], "cpu");
        }
        error => panic!("{error}"),
    }
}

/// libtorch starts threads of its own for one executor: they go where it goes.
#[cfg(target_os = "linux")]
#[test]
fn all_threads_of_an_executor_go_into_the_background_and_back() {
    use crate::model::LoadOptions;
    use crate::priority::tests::{forbid_raising, of_threads};

    for may_raise in [true, false] {
        let test = async move {
            let load = LoadOptions { threads: 2, ..LoadOptions::default() };
            let options = ServerOptions { load, ..ServerOptions::new(BatchLimits::new(4096, 4096)) };
            let spec = spec(&[("x", Dtype::Float32, 16)], &["p"]);
            let started =
                ModelServer::start("several", Arc::new(TorchRuntime), artefact("layers.pt"), spec, options).await;
            let server = started.expect("it starts");
            let values: Vec<f32> = (0..4096_u32 * 16).map(|value| (value % 97) as f32 / 97.0).collect();
            let ask = || {
                let inputs = vec![("x".to_owned(), floats(&[4096, 16], &values))];
                server.submit(inputs, Instant::now() + Duration::from_secs(30))
            };
            let expected = ask().await.unwrap().outputs;
            let (team, normal) = (of_threads("several/0").len(), of_threads("several/0")[0]);
            assert!(team >= 2, "{team}");
            server.set_background(true);
            assert_eq!(ask().await.unwrap().outputs, expected);
            let all = of_threads("several/0");
            assert!(all.iter().all(|priority| priority.is_lowest()), "{all:?}, {team}, {normal:?}");
            server.set_background(false);
            while server.is_background() {
                assert_eq!(ask().await.unwrap().outputs, expected);
            }
            // Those that were replaced may be on their way out.
            let begun = Instant::now();
            while of_threads("several/0").iter().any(|priority| *priority != normal) {
                assert!(begun.elapsed() < Duration::from_secs(10));
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            assert_eq!(ask().await.unwrap().outputs, expected);
            server.shutdown().await;
        };
        let run = move || {
            if !may_raise {
                forbid_raising();
            }
            tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
        };
        std::thread::spawn(run).join().unwrap();
    }
}

/// The resident memory of this process.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("Linux tells");
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
}

#[test]
fn models_come_and_go_and_memory_stays_flat() {
    in_a_process_of_its_own("models_come_and_go_and_memory_stays_flat", || {
        const CYCLES: usize = 200;
        let spec = spec(&[("x", Dtype::Float32, 16)], &["p"]);
        let mut measured = Vec::new();
        for number in 0..CYCLES {
            // On threads that come and go with them, as executors do.
            let spec = spec.clone();
            let cycle = move || {
                let mut model = load("layers.pt", &spec);
                model.forward(&spec.zeros(64)).unwrap();
            };
            std::thread::spawn(cycle).join().unwrap();
            // The first quarter fills libtorch's own tables.
            if number >= CYCLES / 4 {
                measured.push(resident());
            }
        }
        // A module of 40 KiB may not leave its size behind each time.
        let (first, last) = (measured[0], measured[measured.len() - 1]);
        let left = last.saturating_sub(first) / (measured.len() as u64 - 1);
        assert!(left < 32 << 10, "{left} bytes are left behind by every cycle: {measured:?}");
    });
}
