use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::*;
use crate::batch::{Policy, WaitReason};
use crate::device::{Seat, SharedDevice, SharedDevices};
use crate::echo::{EchoRuntime, Gate};
use crate::memory::Footprint;
use crate::model::{InputSpec, OutputSpec};
use crate::tensor::{Dtype, Tensor, TensorData};

mod background;

const LONG: Duration = Duration::from_secs(30);

fn spec() -> ModelSpec {
    ModelSpec {
        inputs: vec![InputSpec::features("x", Dtype::Float32, 2)],
        outputs: vec![OutputSpec { name: "sum".to_owned(), dtype: Dtype::Float32 }],
    }
}

fn floats(shape: &[usize], values: &[f32]) -> Tensor {
    Tensor::try_new(shape.to_vec(), TensorData::Float32(values.to_vec())).expect("a valid tensor")
}

/// A request whose rows are (value, 1), so that the outputs are value + 1.
fn request(values: &[f32]) -> TensorBatch {
    let rows: Vec<f32> = values.iter().flat_map(|&value| [value, 1.0]).collect();
    vec![("x".to_owned(), floats(&[values.len(), 2], &rows))]
}

fn answer(values: &[f32]) -> TensorBatch {
    let sums: Vec<f32> = values.iter().map(|value| value + 1.0).collect();
    vec![("sum".to_owned(), floats(&[values.len()], &sums))]
}

async fn start(runtime: EchoRuntime, executors: usize, rows_max: usize, queue_rows_max: usize) -> Arc<ModelServer> {
    let limits = BatchLimits::new(rows_max, queue_rows_max);
    start_with(runtime, ServerOptions { executors, ..ServerOptions::new(limits) }).await
}

async fn start_with(runtime: EchoRuntime, options: ServerOptions) -> Arc<ModelServer> {
    let artefact = Artefact::new("echo", *b"echo");
    let server = ModelServer::start("echo", Arc::new(runtime), artefact, spec(), options).await;
    Arc::new(server.expect("echo starts"))
}

fn spawn(
    server: &Arc<ModelServer>,
    values: &[f32],
    patience: Duration,
) -> tokio::task::JoinHandle<Result<Outcome, InferError>> {
    let (server, inputs) = (server.clone(), request(values));
    tokio::spawn(async move { server.submit(inputs, Instant::now() + patience).await })
}

/// Lets spawned tasks run until the queue is as long as expected.
async fn until_queued(server: &ModelServer, rows: u64) {
    let start = Instant::now();
    while server.metrics().queue_rows != rows {
        assert!(start.elapsed() < Duration::from_secs(10), "{:?} never had {rows} rows queued", server.metrics());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

async fn until(mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(10), "it never came to hold");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Lets spawned tasks run until a forward stands before the gate.
async fn until_held(gate: &Gate) {
    let start = Instant::now();
    while gate.held() == 0 {
        assert!(start.elapsed() < Duration::from_secs(10), "no forward came");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn a_lone_request_runs_at_once() {
    let server = start(EchoRuntime::new(), 1, 8, 64).await;
    let outcome = server.submit(request(&[4.0, 5.0, 6.0]), Instant::now() + LONG).await.unwrap();
    assert_eq!(outcome.outputs, answer(&[4.0, 5.0, 6.0]));
    assert_eq!((outcome.batch_rows, outcome.waited.reason()), (3, WaitReason::None));
    let metrics = server.metrics();
    assert_eq!((metrics.requests, metrics.batches, metrics.rows, metrics.padding_rows), (1, 1, 3, 1));
    assert_eq!((metrics.queue_rows, metrics.executors_ready), (0, 1));
    assert_eq!(server.ready(), Ok(()));
}

#[tokio::test]
async fn requests_that_gather_share_a_batch() {
    let gate = Gate::new();
    let server = start(EchoRuntime::new().with_gate(gate.clone()), 1, 8, 64).await;
    gate.close();
    let first = spawn(&server, &[1.0], LONG);
    until_held(&gate).await;
    let later: Vec<_> = (2..5_u8).map(|value| spawn(&server, &[f32::from(value)], LONG)).collect();
    until_queued(&server, 3).await;
    gate.open();
    let first = first.await.unwrap().unwrap();
    assert_eq!((first.outputs, first.batch_rows, first.waited.reason()), (answer(&[1.0]), 1, WaitReason::None));
    for (value, call) in (2..5_u8).zip(later) {
        let outcome = call.await.unwrap().unwrap();
        assert_eq!(outcome.outputs, answer(&[f32::from(value)]));
        assert_eq!((outcome.batch_rows, outcome.waited.reason()), (3, WaitReason::ExecutorBusy));
        assert_eq!(outcome.waited.executor_busy, outcome.waited.whole);
    }
    assert_eq!(server.metrics().batches, 2);
}

#[tokio::test]
async fn a_check_shares_batches_with_requests_and_is_in_no_count() {
    let gate = Gate::new();
    let limits = BatchLimits::new(8, 64).with_tiers(2);
    let failing = EchoRuntime::new().with_hook({
        let gate = gate.clone();
        move |inputs| {
            gate.pass();
            match inputs[0].data() {
                TensorData::Float32(values) if values.contains(&13.0) => Err(ModelError::Runtime("unlucky".into())),
                _ => Ok(()),
            }
        }
    });
    let server = start_with(failing, ServerOptions::new(limits)).await;
    let later = Instant::now() + LONG;
    assert_eq!(server.check(request(&[1.0, 2.0, 3.0]), later).await.unwrap().outputs, answer(&[1.0, 2.0, 3.0]));
    assert!(server.check(request(&[13.0]), later).await.is_err());
    let alone = server.metrics();
    assert_eq!((alone.requests, alone.rows, alone.batches, alone.padding_rows, alone.failures), (0, 0, 0, 0, 0));

    gate.close();
    let first = spawn(&server, &[1.0], LONG);
    until_held(&gate).await;
    let beside = tokio::spawn({
        let server = server.clone();
        async move { server.check(request(&[7.0]), later).await }
    });
    let second = spawn(&server, &[2.0], LONG);
    until_queued(&server, 2).await;
    gate.open();
    assert_eq!(first.await.unwrap().unwrap().outputs, answer(&[1.0]));
    let (second, beside) = (second.await.unwrap().unwrap(), beside.await.unwrap().unwrap());
    assert_eq!((second.outputs, beside.outputs), (answer(&[2.0]), answer(&[7.0])));
    assert_eq!(second.batch_rows, 2, "they ran together");
    let metrics = server.metrics();
    assert_eq!((metrics.requests, metrics.rows, metrics.batches), (2, 2, 2));
    assert_eq!(metrics.breaker_openings, 0);
}

#[tokio::test]
async fn a_large_request_is_split_and_put_together_again() {
    let server = start(EchoRuntime::new(), 2, 4, 64).await;
    let values: Vec<f32> = (0..11_u8).map(f32::from).collect();
    let outcome = server.submit(request(&values), Instant::now() + LONG).await.unwrap();
    assert_eq!(outcome.outputs, answer(&values));
    assert!(outcome.batch_rows <= 4);
    assert_eq!(server.metrics().rows, 11);
    let too_large = server.submit(request(&[0.0; 65]), Instant::now() + LONG).await;
    assert_eq!(too_large, Err(InferError::TooLarge { rows: 65, rows_max: 64 }));
}

#[tokio::test]
async fn a_full_queue_refuses_and_a_cancelled_caller_makes_room() {
    let gate = Gate::new();
    let server = start(EchoRuntime::new().with_gate(gate.clone()), 1, 4, 4).await;
    gate.close();
    let running = spawn(&server, &[1.0], LONG);
    until_held(&gate).await;
    let queued = spawn(&server, &[2.0, 3.0, 4.0], LONG);
    until_queued(&server, 3).await;
    let full = server.submit(request(&[5.0, 6.0]), Instant::now() + LONG).await;
    assert_eq!(full, Err(InferError::QueueFull { queue_rows: 3, queue_rows_max: 4 }));
    queued.abort();
    until_queued(&server, 0).await;
    let after = spawn(&server, &[5.0, 6.0], LONG);
    until_queued(&server, 2).await;
    gate.open();
    assert_eq!(running.await.unwrap().unwrap().outputs, answer(&[1.0]));
    assert_eq!(after.await.unwrap().unwrap().outputs, answer(&[5.0, 6.0]));
    let metrics = server.metrics();
    assert_eq!((metrics.rejected, metrics.cancelled, metrics.rows), (1, 1, 3));
}

#[tokio::test]
async fn a_deadline_is_answered_while_the_executor_is_still_busy() {
    let gate = Gate::new();
    let server = start(EchoRuntime::new().with_gate(gate.clone()), 1, 4, 4).await;
    gate.close();
    let running = spawn(&server, &[1.0], LONG);
    until_held(&gate).await;
    let late = server.submit(request(&[2.0]), Instant::now() + Duration::from_millis(20)).await;
    assert_eq!(late, Err(InferError::Expired));
    assert_eq!(server.submit(request(&[2.0]), Instant::now()).await, Err(InferError::Expired));
    assert_eq!(server.metrics().queue_rows, 0);
    gate.open();
    assert_eq!(running.await.unwrap().unwrap().outputs, answer(&[1.0]));
    let metrics = server.metrics();
    assert_eq!((metrics.expired, metrics.cancelled, metrics.rows), (2, 0, 1));
}

#[tokio::test]
async fn a_panic_fails_its_batch_and_the_model_is_replaced() {
    let loads = Arc::new(AtomicUsize::new(0));
    let counted = loads.clone();
    let runtime = EchoRuntime::new().with_hook(move |inputs| {
        // Warm-up of one row marks a load.
        if matches!(inputs[0].data(), TensorData::Float32(values) if values.as_slice() == [0.0, 0.0]) {
            counted.fetch_add(1, Ordering::SeqCst);
        }
        if matches!(inputs[0].data(), TensorData::Float32(values) if values.contains(&666.0)) {
            panic!("the number of the beast");
        }
        Ok(())
    });
    let server = start(runtime, 1, 4, 64).await;
    let loaded = loads.load(Ordering::SeqCst);
    let panicked = server.submit(request(&[666.0]), Instant::now() + LONG).await;
    assert_eq!(panicked, Err(InferError::Model(ModelError::Panicked("the number of the beast".to_owned()))));
    let after = server.submit(request(&[1.0]), Instant::now() + LONG).await.unwrap();
    assert_eq!(after.outputs, answer(&[1.0]));
    assert!(loads.load(Ordering::SeqCst) > loaded, "the model was not loaded again");
    let metrics = server.metrics();
    assert_eq!((metrics.panics, metrics.failures, metrics.executors_ready), (1, 1, 1));
}

#[tokio::test]
async fn while_no_model_can_be_loaded_requests_are_refused_and_later_served() {
    let broken = Arc::new(AtomicBool::new(false));
    let switch = broken.clone();
    let runtime =
        EchoRuntime::new().with_hook(move |_| if switch.load(Ordering::SeqCst) { panic!("broken") } else { Ok(()) });
    let server = start(runtime, 1, 4, 64).await;
    broken.store(true, Ordering::SeqCst);
    let panicked = server.submit(request(&[1.0]), Instant::now() + LONG).await;
    assert_eq!(panicked, Err(InferError::Model(ModelError::Panicked("broken".to_owned()))));
    // Queued or not when the reload fails, it is refused and not left waiting.
    let refused = server.submit(request(&[1.0]), Instant::now() + LONG).await;
    let reason = "the code of the model `echo` panicked while loading: broken".to_owned();
    assert_eq!(refused, Err(InferError::Unavailable(reason)));
    assert!(server.ready().is_err());
    broken.store(false, Ordering::SeqCst);
    let start = Instant::now();
    while server.ready().is_err() && start.elapsed() < Duration::from_secs(20) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let after = server.submit(request(&[1.0]), Instant::now() + LONG).await.unwrap();
    assert_eq!(after.outputs, answer(&[1.0]));
}

#[tokio::test]
async fn an_input_the_model_cannot_take_fails_its_own_request() {
    let gate = Gate::new();
    let held = gate.clone();
    let runtime = EchoRuntime::new().with_hook(move |inputs| {
        held.pass();
        match inputs[0].data() {
            TensorData::Float32(values) if values.iter().any(|value| value.is_nan()) => {
                Err(ModelError::Runtime("not a number".to_owned()))
            }
            _ => Ok(()),
        }
    });
    let server = start(runtime, 1, 8, 64).await;
    gate.close();
    let running = spawn(&server, &[0.0], LONG);
    until_held(&gate).await;
    let calls: Vec<_> = [1.0, f32::NAN, 3.0].iter().map(|&value| spawn(&server, &[value], LONG)).collect();
    until_queued(&server, 3).await;
    gate.open();
    assert!(running.await.unwrap().is_ok());
    let mut outcomes = Vec::new();
    for call in calls {
        outcomes.push(call.await.unwrap().map(|outcome| outcome.outputs));
    }
    assert_eq!(outcomes[0], Ok(answer(&[1.0])));
    assert_eq!(outcomes[1], Err(InferError::Model(ModelError::Runtime("not a number".to_owned()))));
    assert_eq!(outcomes[2], Ok(answer(&[3.0])));
    assert_eq!((server.metrics().isolated, server.metrics().failures), (3, 2));
}

#[tokio::test]
async fn inputs_are_checked_before_they_are_queued() {
    let server = start(EchoRuntime::new(), 1, 8, 64).await;
    let narrow = vec![("x".to_owned(), floats(&[1, 1], &[1.0]))];
    let error = server.submit(narrow, Instant::now() + LONG).await.unwrap_err();
    assert_eq!(error.to_string(), "the input `x` must be float32 [_, 2], but is float32 [_, 1]");
    assert_eq!(server.metrics().batches, 0);
}

#[tokio::test]
async fn shutdown_finishes_the_queue_and_refuses_the_rest() {
    let gate = Gate::new();
    let server = start(EchoRuntime::new().with_gate(gate.clone()), 1, 1, 64).await;
    gate.close();
    let calls: Vec<_> = (0..4_u8).map(|value| spawn(&server, &[f32::from(value)], LONG)).collect();
    until_held(&gate).await;
    until_queued(&server, 3).await;
    let closing = tokio::spawn({
        let server = server.clone();
        async move { server.shutdown().await }
    });
    while server.ready().is_ok() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(server.submit(request(&[9.0]), Instant::now() + LONG).await, Err(InferError::ShuttingDown));
    gate.open();
    closing.await.unwrap();
    for (value, call) in (0..4_u8).zip(calls) {
        assert_eq!(call.await.unwrap().unwrap().outputs, answer(&[f32::from(value)]));
    }
    server.shutdown().await;
}

#[tokio::test]
async fn a_start_that_fails_says_why() {
    let check = |runtime: EchoRuntime, bytes: &'static [u8], expected: &'static str| async move {
        let options = ServerOptions { executors: 2, ..ServerOptions::new(BatchLimits::new(4, 8)) };
        let artefact = Artefact::new("models/echo", bytes);
        let started = ModelServer::start("echo", Arc::new(runtime), artefact, spec(), options).await;
        assert_eq!(chain(&started.err().expect("it must fail")), expected);
    };
    check(
        EchoRuntime::new(),
        b"broken",
        "cannot load the model `echo`: models/echo is not a model that can be loaded: it says it is broken",
    )
    .await;
    check(
        EchoRuntime::new().with_hook(|_| Err(ModelError::Runtime("no".to_owned()))),
        b"",
        "the model `echo` does not fit its declaration: the model's input `x` is 2 wide, but the module failed on it: no",
    )
    .await;
    check(
        EchoRuntime::new().with_hook(|_| panic!("oh")),
        b"",
        "the code of the model `echo` panicked while loading: oh",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_request_of_a_storm_gets_its_own_rows() {
    let server = start(EchoRuntime::new().with_delay(Duration::from_micros(200)), 2, 16, 8192).await;
    let calls: Vec<_> = (0..400_u16)
        .map(|index| {
            let values: Vec<f32> = (0..1 + index % 20).map(|row| f32::from(index * 32 + row)).collect();
            (spawn(&server, &values, LONG), values)
        })
        .collect();
    for (call, values) in calls {
        assert_eq!(call.await.unwrap().unwrap().outputs, answer(&values));
    }
    let metrics = server.metrics();
    assert_eq!(metrics.rows, 400 / 20 * (1..=20).sum::<u64>());
    assert!(metrics.batches < 400, "nothing was batched: {metrics:?}");
}

#[tokio::test]
async fn a_fixed_window_is_waited_for_and_told() {
    let limits = BatchLimits::new(4, 64).with_policy(Policy::Window(Duration::from_millis(30)));
    let server = start_with(EchoRuntime::new(), ServerOptions::new(limits)).await;
    let calls = [spawn(&server, &[1.0], LONG), spawn(&server, &[2.0], LONG)];
    for call in calls {
        let outcome = call.await.unwrap().unwrap();
        assert_eq!((outcome.batch_rows, outcome.waited.reason()), (2, WaitReason::Linger));
        assert!(outcome.waited.whole >= Duration::from_millis(20), "{:?}", outcome.waited);
    }
    // A full batch does not wait.
    let full = server.submit(request(&[1.0; 4]), Instant::now() + LONG).await.unwrap();
    assert_eq!(full.waited.linger, Duration::ZERO);
    assert!(server.metrics().waited.linger > Duration::from_millis(40));
}

#[tokio::test]
async fn what_cannot_be_answered_in_time_is_refused_before_its_deadline() {
    let server = start(EchoRuntime::new().with_delay(Duration::from_millis(40)), 1, 1, 64).await;
    let running: Vec<_> = (0..4).map(|_| spawn(&server, &[1.0], LONG)).collect();
    until_queued(&server, 3).await;
    // Three forwards of 40 ms wait.
    let start = Instant::now();
    let late = server.submit(request(&[2.0]), start + Duration::from_millis(90)).await;
    assert!(matches!(late, Err(InferError::TooLate { .. })), "{late:?}");
    assert!(start.elapsed() < Duration::from_millis(20), "it was not told at once");
    for call in running {
        assert!(call.await.unwrap().is_ok());
    }
    assert_eq!(server.metrics().rejected, 1);
}

#[tokio::test]
async fn higher_tiers_go_first_and_the_lower_one_says_it_was_overtaken() {
    let gate = Gate::new();
    let limits = BatchLimits::new(1, 64).with_tiers(2);
    let server = start_with(EchoRuntime::new().with_gate(gate.clone()), ServerOptions::new(limits)).await;
    gate.close();
    let running = spawn(&server, &[0.0], LONG);
    until_held(&gate).await;
    let low = tokio::spawn({
        let server = server.clone();
        async move { server.submit_in_tier(request(&[1.0]), Instant::now() + LONG, 1).await }
    });
    until_queued(&server, 1).await;
    let high = spawn(&server, &[2.0], LONG);
    until_queued(&server, 2).await;
    gate.open();
    assert!(running.await.unwrap().is_ok());
    assert_eq!(high.await.unwrap().unwrap().waited.tier, Duration::ZERO);
    assert!(low.await.unwrap().unwrap().waited.tier > Duration::ZERO);
}

#[tokio::test]
async fn a_batch_that_memory_is_short_for_is_run_in_halves_and_batches_shrink() {
    let gate = Gate::new();
    let (held, small) = (gate.clone(), Arc::new(AtomicBool::new(false)));
    let switch = small.clone();
    let runtime = EchoRuntime::new().with_hook(move |inputs| {
        held.pass();
        let too_large = switch.load(Ordering::SeqCst) && inputs[0].rows() > 4;
        if too_large { Err(ModelError::OutOfMemory("8 rows".to_owned())) } else { Ok(()) }
    });
    let server = start(runtime, 1, 8, 64).await;
    small.store(true, Ordering::SeqCst);
    gate.close();
    let running = spawn(&server, &[0.0], LONG);
    until_held(&gate).await;
    let calls: Vec<_> = (0..8_u8).map(|value| spawn(&server, &[f32::from(value)], LONG)).collect();
    until_queued(&server, 8).await;
    gate.open();
    assert!(running.await.unwrap().is_ok());
    for (value, call) in (0..8_u8).zip(calls) {
        assert_eq!(call.await.unwrap().unwrap().outputs, answer(&[f32::from(value)]));
    }
    let metrics = server.metrics();
    assert_eq!((metrics.out_of_memory, metrics.rows_cap), (1, 4));
}

/// A model that hangs on 666 until it is let go.
async fn hanging(gate: &Arc<Gate>, executors: usize) -> Arc<ModelServer> {
    let held = gate.clone();
    let runtime = EchoRuntime::new().with_hook(move |inputs| {
        if matches!(inputs[0].data(), TensorData::Float32(values) if values.contains(&666.0)) {
            held.pass();
        }
        Ok(())
    });
    let forward_max = Duration::from_millis(60);
    let options = ServerOptions { executors, forward_max, ..ServerOptions::new(BatchLimits::new(4, 64)) };
    start_with(runtime, options).await
}

#[tokio::test]
async fn a_forward_that_does_not_end_is_given_up_and_its_executor_replaced_once() {
    let gate = Gate::new();
    let server = hanging(&gate, 1).await;
    gate.close();
    let hung = server.submit(request(&[666.0]), Instant::now() + LONG).await;
    assert_eq!(hung, Err(InferError::Model(ModelError::Hung(Duration::from_millis(60)))));
    let after = server.submit(request(&[1.0]), Instant::now() + LONG).await.unwrap();
    assert_eq!(after.outputs, answer(&[1.0]));
    assert_eq!((server.metrics().hangs, server.metrics().executors_ready, server.stuck()), (1, 1, None));

    // What was given up may end late, and changes nothing by it.
    gate.open();
    while gate.held() > 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let after = server.submit(request(&[2.0]), Instant::now() + LONG).await.unwrap();
    assert_eq!(after.outputs, answer(&[2.0]));

    gate.close();
    let hung = spawn(&server, &[666.0], LONG);
    until_held(&gate).await;
    let queued = spawn(&server, &[3.0], LONG);
    until_queued(&server, 1).await;
    assert!(matches!(hung.await.unwrap(), Err(InferError::Model(ModelError::Hung(_)))));
    let stuck = "the model did not answer within 60.0ms, again after its executor was replaced; restart the process";
    let unavailable = InferError::Unavailable(stuck.to_owned());
    assert_eq!(queued.await.unwrap(), Err(unavailable.clone()));
    assert_eq!(server.submit(request(&[1.0]), Instant::now() + LONG).await, Err(unavailable.clone()));
    assert_eq!((server.ready(), server.stuck()), (Err(unavailable), Some(stuck.to_owned())));
    // The end does not wait for what does not end.
    server.shutdown().await;
    gate.open();
}

#[tokio::test]
async fn executors_load_on_the_devices_in_turn() {
    #[derive(Default)]
    struct Noting(std::sync::Mutex<Vec<String>>);
    impl Runtime for Noting {
        fn load(
            &self,
            artefact: &Artefact,
            spec: &ModelSpec,
            options: &LoadOptions,
        ) -> Result<Box<dyn crate::model::Model>, LoadError> {
            self.0.lock().unwrap().push(format!("{} with {} threads", options.device, options.threads));
            EchoRuntime::new().load(artefact, spec, options)
        }
    }
    let noting = Arc::new(Noting::default());
    let devices = Devices::from_names(["cuda:1", "cuda:0"]).unwrap();
    let load = LoadOptions { threads: 2, ..LoadOptions::default() };
    let options = ServerOptions { executors: 3, devices, load, ..ServerOptions::new(BatchLimits::new(2, 8)) };
    let artefact = Artefact::new("echo", *b"echo");
    let server = ModelServer::start("echo", noting.clone(), artefact, spec(), options).await.unwrap();
    let mut loaded = noting.0.lock().unwrap().clone();
    loaded.sort();
    assert_eq!(loaded, ["cuda:0 with 2 threads", "cuda:0 with 2 threads", "cuda:1 with 2 threads"]);
    server.shutdown().await;
}

#[tokio::test]
async fn a_lost_device_is_not_tried_again_and_only_a_new_process_helps() {
    let gate = Gate::new();
    let (held, runs) = (gate.clone(), Arc::new(AtomicUsize::new(0)));
    let counted = runs.clone();
    let runtime = EchoRuntime::new().with_hook(move |inputs| {
        held.pass();
        if matches!(inputs[0].data(), TensorData::Float32(values) if values.contains(&666.0)) {
            counted.fetch_add(1, Ordering::Relaxed);
            return Err(ModelError::Device("an illegal memory access was encountered".to_owned()));
        }
        Ok(())
    });
    let server = start(runtime, 1, 2, 64).await;
    gate.close();
    let first = spawn(&server, &[1.0], LONG);
    until_held(&gate).await;
    // The next batch is two of these, and one is left in the queue.
    let lost: Vec<_> = (0..2).map(|_| spawn(&server, &[666.0], LONG)).collect();
    until_queued(&server, 2).await;
    let queued = spawn(&server, &[3.0], LONG);
    until_queued(&server, 3).await;
    gate.open();
    assert_eq!(first.await.unwrap().unwrap().outputs, answer(&[1.0]));
    let reason = "the device is lost to this process: an illegal memory access was encountered";
    for lost in lost {
        assert_eq!(lost.await.unwrap().unwrap_err().to_string(), reason);
    }
    assert_eq!(runs.load(Ordering::Relaxed), 1, "neither half nor member is run again");
    let unavailable = InferError::Unavailable(format!("{reason}; restart the process"));
    assert_eq!(queued.await.unwrap(), Err(unavailable.clone()));
    assert_eq!(server.submit(request(&[1.0]), Instant::now() + LONG).await, Err(unavailable.clone()));
    assert_eq!(
        (server.ready(), server.stuck()),
        (Err(unavailable.clone()), Some(format!("{reason}; restart the process")))
    );
    server.shutdown().await;
}

#[tokio::test]
async fn a_model_that_does_not_fit_into_memory_is_refused_while_it_is_warmed_up() {
    let start = async |capacity: u64, others: u64| {
        // An executor may still be measuring when the other one has found that the model does not fit.
        let rows_run = Arc::new(AtomicUsize::new(0));
        let most = rows_run.clone();
        let runtime = EchoRuntime::new().with_memory(1_000, 100).with_hook(move |inputs| {
            most.fetch_max(inputs[0].rows(), Ordering::SeqCst);
            Ok(())
        });
        let devices = SharedDevices::with_cpu(SharedDevice::new(2, Some(capacity)));
        let device = devices.cpu().unwrap();
        let other = Seat::new(device.clone(), 1, Arc::default());
        let taken =
            Footprint { name: "other".to_owned(), file_bytes: others, executors: 0, weight_bytes: 0, sizes: vec![] };
        other.reserve(taken).unwrap();
        let options = ServerOptions { executors: 2, ..ServerOptions::new(BatchLimits::new(64, 64)) };
        let artefact = Artefact::new("echo", *b"echo");
        let started = ModelServer::start_on(&devices, "echo", Arc::new(runtime), artefact, spec(), options).await;
        if started.is_err() {
            // The other executor may still be about to end.
            until(|| device.footprints().len() == 1).await;
        }
        (started, rows_run.load(Ordering::SeqCst))
    };
    // The file of 4 bytes and twice 1,000 and 64 times 100 are 14,804.
    let (server, _) = start(18_600, 0).await;
    let footprint = server.unwrap().footprint().unwrap();
    assert_eq!((footprint.bytes(), footprint.sizes.len()), (14_804, 7));
    let (refused, ran) = start(18_400, 0).await;
    let error = refused.err().expect("it does not fit").to_string();
    assert!(error.starts_with("model `echo` needs 14.5 KiB of memory (the file of 4 bytes + 2 executors x"), "{error}");
    assert!(error.ends_with("with `batching.max_rows: 32` it would fit"), "{error}");
    assert_eq!(ran, 64, "it was measured");
    // What cannot fit at all is not tried.
    let (refused, ran) = start(18_400, 9_000).await;
    let error = refused.err().expect("it does not fit").to_string();
    assert!(error.ends_with("with `batching.max_rows: 16` it would fit"), "{error}");
    assert_eq!(ran, 32);
}

#[tokio::test]
async fn while_memory_is_short_lower_tiers_wait_and_are_refused() {
    let limits = BatchLimits::new(4, 64).with_tiers(2);
    let server = start_with(EchoRuntime::new(), ServerOptions::new(limits)).await;
    server.memory_used(91);
    let refused = server.submit_in_tier(request(&[1.0]), Instant::now() + LONG, 1).await;
    assert_eq!(refused, Err(InferError::MemoryShort { percent: 91 }));
    assert!(server.submit(request(&[1.0]), Instant::now() + LONG).await.is_ok());
    server.memory_used(81);
    let waiting = tokio::spawn({
        let server = server.clone();
        async move { server.submit_in_tier(request(&[2.0]), Instant::now() + LONG, 1).await }
    });
    until_queued(&server, 1).await;
    assert!(server.submit(request(&[1.0]), Instant::now() + LONG).await.is_ok());
    assert_eq!(server.metrics().queue_rows, 1);
    server.memory_used(50);
    let waited = waiting.await.unwrap().unwrap().waited;
    assert_eq!(waited.reason(), WaitReason::MemoryPermit, "{waited:?}");
}

async fn start_on(devices: &SharedDevices, runtime: EchoRuntime, executors: usize) -> Arc<ModelServer> {
    let options = ServerOptions { executors, ..ServerOptions::new(BatchLimits::new(1, 64)) };
    let artefact = Artefact::new("echo", *b"echo");
    let started = ModelServer::start_on(devices, "echo", Arc::new(runtime), artefact, spec(), options).await;
    Arc::new(started.unwrap())
}

fn submit(server: &Arc<ModelServer>) -> tokio::task::JoinHandle<Result<Outcome, InferError>> {
    let server = server.clone();
    tokio::spawn(async move { server.submit(request(&[1.0]), Instant::now() + LONG).await })
}

#[tokio::test]
async fn no_model_holds_the_last_executor_of_a_device() {
    let devices = SharedDevices::with_cpu(SharedDevice::new(2, None));
    let gate = Gate::new();
    let greedy = start_on(&devices, EchoRuntime::new().with_gate(gate.clone()), 2).await;
    let other = start_on(&devices, EchoRuntime::new(), 1).await;
    gate.close();
    let requests: Vec<_> = (0..4).map(|_| submit(&greedy)).collect();
    until_held(&gate).await;
    // Its second executor does not begin, whatever is queued, and so the other model answers at once.
    for _ in 0..20 {
        assert_eq!(submit(&other).await.unwrap().unwrap().waited.reason(), WaitReason::None);
    }
    assert_eq!((gate.held(), greedy.metrics().queue_rows), (1, 3));
    gate.open();
    for request in requests {
        request.await.unwrap().unwrap();
    }
    // Alone it takes both.
    drop(other);
    gate.close();
    let requests: Vec<_> = (0..2).map(|_| submit(&greedy)).collect();
    until(|| gate.held() == 2).await;
    gate.open();
    for request in requests {
        request.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn who_waits_for_another_model_on_the_device_is_told_so() {
    let devices = SharedDevices::with_cpu(SharedDevice::new(1, None));
    let gate = Gate::new();
    let slow = start_on(&devices, EchoRuntime::new().with_gate(gate.clone()), 1).await;
    let other = start_on(&devices, EchoRuntime::new(), 1).await;
    gate.close();
    let held = submit(&slow);
    until_held(&gate).await;
    let waiting = submit(&other);
    until_queued(&other, 1).await;
    let expired = other.submit(request(&[1.0]), Instant::now() + Duration::from_millis(20)).await;
    assert_eq!(expired, Err(InferError::Expired));
    gate.open();
    held.await.unwrap().unwrap();
    let waited = waiting.await.unwrap().unwrap().waited;
    assert_eq!(waited.reason(), WaitReason::ExecutorBusy, "{waited:?}");
    assert!(waited.executor_busy >= Duration::from_millis(20), "{waited:?}");
}

#[tokio::test]
async fn what_a_model_keeps_after_its_forwards_is_known() {
    let runtime = EchoRuntime::new().with_memory(1_000, 1).with_leak(10);
    let server = start_with(runtime, ServerOptions::new(BatchLimits::new(1, 8))).await;
    assert_eq!(server.held(), None);
    let mut last = 0;
    for _ in 0..3 {
        server.submit(request(&[1.0]), Instant::now() + LONG).await.unwrap();
        let held = server.held().unwrap();
        assert!(held == last + 10 || last == 0, "{last}, then {held}");
        last = held;
    }
}

#[tokio::test]
async fn want_of_memory_again_and_again_closes_the_device_to_all_its_models() {
    let devices = SharedDevices::with_cpu(SharedDevice::new(2, None));
    let warm = Arc::new(AtomicBool::new(false));
    let is_warm = warm.clone();
    let short = EchoRuntime::new().with_hook(move |_| match is_warm.load(Ordering::SeqCst) {
        true => Err(ModelError::OutOfMemory("no room".to_owned())),
        false => Ok(()),
    });
    let short = start_on(&devices, short, 1).await;
    let other = start_on(&devices, EchoRuntime::new(), 1).await;
    warm.store(true, Ordering::SeqCst);
    for _ in 0..3 {
        assert!(matches!(submit(&short).await.unwrap(), Err(InferError::Model(ModelError::OutOfMemory(_)))));
    }
    assert!(matches!(submit(&other).await.unwrap(), Err(InferError::DeviceBreakerOpen { failures: 3, .. })));
    let device = devices.cpu().unwrap();
    assert!(device.open().is_some());
    // One is let through after a second, and shows that the device is well.
    tokio::time::sleep(Duration::from_millis(1_050)).await;
    submit(&other).await.unwrap().unwrap();
    submit(&other).await.unwrap().unwrap();
    assert_eq!(device.open(), None);
}
