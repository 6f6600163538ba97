//! What a hit of the response cache takes, beside a forward of a small model over the same row: 16 features, two layers of 64.

#![expect(clippy::print_stdout, reason = "standard output is how an example answers")]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use inference::batch::BatchLimits;
use inference::executor::{ModelServer, ServerOptions};
use inference::model::{Artefact, InputSpec, LoadOptions, ModelSpec, OutputSpec, Runtime as _};
use inference::response_cache::{ResponseCache, Scope, ScopeParts};
use inference::tensor::{Dtype, Tensor, TensorBatch, TensorData};
use inference::torch::TorchRuntime;

const ROWS: usize = 10_000;

fn row(number: usize) -> TensorBatch {
    let values = (0..16).map(|place| (number * 31 + place) as f32).collect();
    vec![("x".to_owned(), Tensor::try_new(vec![1, 16], TensorData::Float32(values)).unwrap())]
}

fn told(what: &str, mut micros: Vec<f64>) {
    micros.sort_by(f64::total_cmp);
    let at = |share: usize| micros[micros.len() * share / 100];
    println!("{what}: p50 {:.2} us, p99 {:.2} us", at(50), at(99));
}

#[tokio::main]
async fn main() {
    let spec = ModelSpec {
        inputs: vec![InputSpec::features("x", Dtype::Float32, 16)],
        outputs: vec![OutputSpec { name: "p".to_owned(), dtype: Dtype::Float32 }],
    };
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/layers.pt");
    let artefact = Artefact::read(&file).expect("the module is committed");
    let rows: Vec<TensorBatch> = (0..ROWS).map(row).collect();

    let mut model = TorchRuntime.load(&artefact, &spec, &LoadOptions::default()).expect("it loads");
    let mut micros = Vec::new();
    for row in &rows {
        let started = Instant::now();
        model.forward(std::slice::from_ref(&row[0].1)).expect("it answers");
        micros.push(started.elapsed().as_secs_f64() * 1e6);
    }
    told("the forward alone", micros);

    let options = ServerOptions::new(BatchLimits::new(16, 64));
    let server =
        ModelServer::start("layers", Arc::new(TorchRuntime), artefact, spec, options).await.expect("it starts");
    let parts = ScopeParts { tenant: "shop", model: "sha256:00", plan: "plan", outputs: &["p"], parameters: &[] };
    let (scope, cache) = (Scope::new(parts), ResponseCache::new(64 << 20, Duration::from_secs(300)));
    let mut micros = Vec::new();
    for row in &rows {
        let started = Instant::now();
        let outcome = server.submit(row.clone(), started + Duration::from_secs(5)).await.expect("it answers");
        micros.push(started.elapsed().as_secs_f64() * 1e6);
        let outputs = outcome.outputs.into_iter().map(|(_, tensor)| tensor).collect();
        cache.put(cache.life(), scope.key(row), outputs, Instant::now(), None);
    }
    told("the same through the executor", micros);

    let mut micros = Vec::new();
    for row in &rows {
        let started = Instant::now();
        let key = scope.row_keys(row)[0];
        let known = cache.get(&key, started);
        micros.push(started.elapsed().as_secs_f64() * 1e6);
        assert!(known.is_some());
    }
    told("a hit", micros);
    println!("{:?}", cache.metrics());
}
