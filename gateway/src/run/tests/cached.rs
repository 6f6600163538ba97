//! Models whose answers are given again.

use super::*;

fn hits(metrics: &str, model: &str, what: &str) -> u64 {
    let line = format!("coeval_model{{model=\"{model}\",version=\"1\",what=\"response_cache_{what}\"}} ");
    let found = metrics.lines().find_map(|metric| metric.strip_prefix(&line));
    found.unwrap_or_else(|| panic!("{line} is missing in:\n{metrics}")).parse().unwrap()
}

fn cached(answer: &v1::PredictResponse) -> Vec<bool> {
    answer.outcomes.iter().map(|outcome| outcome.cached).collect()
}

fn all(columns: Vec<(&str, Vec<f64>)>) -> Vec<v1::Column> {
    columns.into_iter().map(|(name, values)| numbers(name, &values.into_iter().map(Some).collect::<Vec<_>>())).collect()
}

async fn with(models: &[&str]) -> Server {
    let mut server = start_with(RequestTime::Allowed, Some(Arc::new(EchoRuntime::new()))).await;
    for model in models {
        server.register(model, b"a model").await.unwrap();
        server.deploy(model, 1).await.unwrap();
    }
    server
}

/// What other servers fail: the same file, the same bytes of inputs, and another shape.
#[tokio::test]
async fn the_same_bytes_of_another_shape_are_another_question() {
    let mut server = with(&["pairs", "triples"]).await;
    for repeat in [false, true] {
        let pairs = all(vec![("a", vec![1.0, 3.0, 5.0]), ("b", vec![2.0, 4.0, 6.0])]);
        let answer = server.predict(asked_to_predict("pairs", pairs)).await.unwrap();
        assert_eq!((floats(&answer.outputs[0]), cached(&answer)), (vec![3.0, 7.0, 11.0], vec![repeat; 3]));
        let triples = all(vec![("a", vec![1.0, 4.0]), ("b", vec![2.0, 5.0]), ("c", vec![3.0, 6.0])]);
        let answer = server.predict(asked_to_predict("triples", triples)).await.unwrap();
        assert_eq!((floats(&answer.outputs[0]), cached(&answer)), (vec![6.0, 15.0], vec![repeat; 2]));
    }
    server.stop().await;
}

#[tokio::test]
async fn rows_that_are_known_are_not_run_and_others_are() {
    let mut server = with(&["pairs"]).await;
    let ask = |a: &[f64], b: &[f64]| asked_to_predict("pairs", all(vec![("a", a.to_vec()), ("b", b.to_vec())]));
    let first = server.predict(ask(&[1.0, 2.0], &[1.0, 1.0])).await.unwrap();
    assert_eq!(cached(&first), [false, false]);
    // Another request, another order, a row that is new, one twice, and one whose zero is another zero.
    let second = server.predict(ask(&[2.0, 9.0, 1.0, 9.0, 0.0, -0.0], &[1.0; 6])).await.unwrap();
    assert_eq!(floats(&second.outputs[0]), [3.0, 10.0, 2.0, 10.0, 1.0, 1.0]);
    assert_eq!(cached(&second)[..4], [true, false, true, false]);
    assert!(second.outcomes.iter().all(|outcome| outcome.status() == v1::RowStatus::Ok && outcome.version == 1));
    assert_eq!(second.outcomes[0].wait_reason(), v1::WaitReason::Unspecified);
    // What follows the outputs is computed as ever.
    assert_eq!(floats(&second.outputs[1]), [6.0, 20.0, 4.0, 20.0, 2.0, 2.0]);
    let third = server.predict(ask(&[9.0, 2.0], &[1.0, 1.0])).await.unwrap();
    assert_eq!((cached(&third), floats(&third.outputs[0])), (vec![true, true], vec![10.0, 3.0]));
    assert_eq!(third.timings.unwrap().forward_us, 0);
    let (_, metrics) = server.http("GET", "/metrics", "").await;
    assert_eq!((hits(&metrics, "pairs", "hits"), hits(&metrics, "pairs", "misses")), (4, 6));
    assert!(hits(&metrics, "pairs", "bytes") > 0 && hits(&metrics, "pairs", "entries") >= 4);
    server.stop().await;
}

#[tokio::test]
async fn neither_failures_nor_fallbacks_are_kept() {
    let failing = EchoRuntime::new().with_hook(|inputs| match inputs[0].data() {
        TensorData::Float32(values) if values.contains(&13.0) => Err(ModelError::Runtime("it is unlucky".to_owned())),
        _ => Ok(()),
    });
    let mut server = start_with(RequestTime::Refused, Some(Arc::new(failing))).await;
    server.register("pairs", b"a model").await.unwrap();
    server.deploy("pairs", 1).await.unwrap();
    let row = |value: f64| asked_to_predict("pairs", all(vec![("a", vec![value]), ("b", vec![1.0])]));
    for (value, status) in [(13.0, v1::RowStatus::Fallback), (f64::NAN, v1::RowStatus::Fallback)] {
        for _ in 0..2 {
            let answer = server.predict(row(value)).await.unwrap();
            assert_eq!((answer.outcomes[0].status(), cached(&answer)), (status, vec![false]), "{value}");
        }
    }
    let (_, metrics) = server.http("GET", "/metrics", "").await;
    assert_eq!((hits(&metrics, "pairs", "entries"), hits(&metrics, "pairs", "misses")), (0, 4));
    server.stop().await;
}

#[tokio::test]
async fn what_is_known_ends_with_the_version_and_with_its_standing() {
    let mut server = with(&["pairs"]).await;
    let row = || all(vec![("a", vec![1.0]), ("b", vec![1.0])]);
    let named = |version: u32| v1::PredictRequest { version, ..asked_to_predict("pairs", row()) };
    assert_eq!(cached(&server.predict(named(1)).await.unwrap()), [false]);
    assert_eq!(cached(&server.predict(named(1)).await.unwrap()), [true]);
    // Another file: the other version knows nothing of it, and the first one is no longer what it was.
    server.register("pairs", b"another model").await.unwrap();
    server.deploy("pairs", 2).await.unwrap();
    assert_eq!(cached(&server.predict(named(2)).await.unwrap()), [false]);
    assert_eq!(cached(&server.predict(named(2)).await.unwrap()), [true]);
    assert_eq!(cached(&server.predict(named(1)).await.unwrap()), [true], "it stands where it stood");
    for champion in [2, 1] {
        let (project, model, who) = ("shops".to_owned(), "pairs".to_owned(), "ada".to_owned());
        let request = v1::PromoteModelRequest { project, model, version: champion, who, why: "a test".to_owned() };
        server.control.promote_model(request).await.unwrap();
        for version in [1, 2] {
            assert_eq!(cached(&server.predict(named(version)).await.unwrap()), [false], "{champion} is the champion");
            assert_eq!(cached(&server.predict(named(version)).await.unwrap()), [true]);
        }
    }
    server.stop().await;
}

/// The sale of `a` was an hour ago, and is fresh for two.
#[tokio::test]
async fn nothing_is_known_of_features_that_are_stale() {
    let mut server = with(&["fresh"]).await;
    let ask = |at: Micros| v1::PredictRequest {
        at: vec![at],
        ..asked_to_predict("fresh", vec![texts("shop", &[Some("a")]), numbers("total", &[Some(1.0)])])
    };
    for (at, stale, known) in [
        (NOW, false, false),
        (NOW, false, true),
        // Within the hour that is left.
        (NOW + HOUR, false, true),
        (NOW + HOUR + 1, true, false),
        (NOW + HOUR + 1, true, false),
        (NOW, false, true),
    ] {
        let answer = server.predict(ask(at)).await.unwrap();
        assert_eq!((answer.stale, cached(&answer)), (stale, vec![known]), "{}", at - NOW);
        assert_eq!(floats(&answer.outputs[0]), [3.0]);
    }
    server.stop().await;
}

/// Of a model that is never the same, nothing is.
#[tokio::test]
async fn a_model_that_does_not_answer_the_same_twice_has_no_cache() {
    let mut server = start_with(RequestTime::Refused, Some(Arc::new(Noisy(EchoRuntime::new())))).await;
    server.register("pairs", b"a model").await.unwrap();
    server.deploy("pairs", 1).await.unwrap();
    let row = || asked_to_predict("pairs", all(vec![("a", vec![1.0]), ("b", vec![1.0])]));
    for _ in 0..3 {
        assert_eq!(cached(&server.predict(row()).await.unwrap()), [false]);
    }
    let (_, metrics) = server.http("GET", "/metrics", "").await;
    assert!(!metrics.contains("response_cache_hits"));
    server.stop().await;
}

/// Adds what it was called before.
struct Noisy(EchoRuntime);

struct NoisyModel(Box<dyn inference::model::Model>, f32);

impl Runtime for Noisy {
    fn load(
        &self,
        artefact: &inference::model::Artefact,
        spec: &inference::model::ModelSpec,
        options: &inference::model::LoadOptions,
    ) -> Result<Box<dyn inference::model::Model>, inference::model::LoadError> {
        Ok(Box::new(NoisyModel(self.0.load(artefact, spec, options)?, 0.0)))
    }
}

impl inference::model::Model for NoisyModel {
    fn spec(&self) -> &inference::model::ModelSpec {
        self.0.spec()
    }

    fn forward(&mut self, inputs: &[inference::tensor::Tensor]) -> Result<Vec<inference::tensor::Tensor>, ModelError> {
        self.1 += 1.0;
        let outputs = self.0.forward(inputs)?;
        let noisy = outputs.into_iter().map(|tensor| {
            let TensorData::Float32(values) = tensor.data() else { panic!("floats") };
            let values = values.iter().map(|value| value + self.1).collect();
            inference::tensor::Tensor::try_new(tensor.shape().to_vec(), TensorData::Float32(values)).unwrap()
        });
        Ok(noisy.collect())
    }
}
