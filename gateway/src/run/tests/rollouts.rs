//! Rollouts as callers meet them: rows to arms, a version in shadow, one that is broken, and the switch.

use inference::model::{Artefact, LoadError, LoadOptions, Model, ModelSpec};
use inference::tensor::Tensor;
use proto::v1::change_rollout_request::Change as Ask;
use serde_json::Value as Json;

use super::*;

/// Adds up its inputs; artefacts that begin with `nan` give no number, with `other` a hundred more.
struct Kinds;

struct Kind(Arc<[u8]>, ModelSpec);

impl Runtime for Kinds {
    fn load(&self, artefact: &Artefact, spec: &ModelSpec, _: &LoadOptions) -> Result<Box<dyn Model>, LoadError> {
        Ok(Box::new(Kind(artefact.bytes.clone(), spec.clone())))
    }
}

impl Model for Kind {
    fn spec(&self) -> &ModelSpec {
        &self.1
    }

    fn forward(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, ModelError> {
        let TensorData::Float32(values) = inputs[0].data() else { panic!("all inputs here are float32") };
        let more = if self.0.starts_with(b"other") { 100.0 } else { 0.0 };
        // Warm-up runs on zeros, and has to be passed.
        let nan = self.0.starts_with(b"nan");
        let sums = values.iter().map(|value| if nan && *value != 0.0 { f32::NAN } else { value + more });
        let sums: Vec<f32> = sums.collect();
        Ok(vec![Tensor::try_new(vec![sums.len()], TensorData::Float32(sums)).unwrap()])
    }
}

async fn serving(artefact: &[u8]) -> Server {
    let mut server = start_with(RequestTime::Refused, Some(Arc::new(Kinds))).await;
    for (number, bytes) in [(1, b"first".as_slice()), (2, artefact)] {
        assert_eq!(server.register("tried", bytes).await.unwrap().version, number);
        server.deploy("tried", number).await.unwrap();
    }
    server
}

/// A row per shop, without the shop where there is none; all ask about the same total.
fn rows(shops: &[Option<&str>]) -> v1::PredictRequest {
    let total = vec![Some(1.0); shops.len()];
    v1::PredictRequest {
        project: "shops".into(),
        model: "tried".into(),
        rows: vec![column_of("total", &total), texts("shop", shops)],
        ..v1::PredictRequest::default()
    }
}

fn column_of(name: &str, values: &[Option<f64>]) -> v1::Column {
    let array: arrow::array::Float64Array = values.iter().copied().collect();
    crate::convert::from_array(name, &array, &Type::Float64)
}

fn texts(name: &str, values: &[Option<&str>]) -> v1::Column {
    let array: arrow::array::StringArray = values.iter().copied().collect();
    crate::convert::from_array(name, &array, &Type::String)
}

fn scores(answer: &v1::PredictResponse) -> Vec<f32> {
    let Some(Values::Floats(scores)) = &answer.outputs[0].values else { panic!("{:?}", answer.outputs) };
    scores.values.clone()
}

impl Server {
    async fn begin(&mut self, stage: &str, skip_shadow: bool) -> Result<u64, tonic::Status> {
        let request = v1::BeginRolloutRequest {
            project: "shops".into(),
            model: "tried".into(),
            version: 2,
            stage: stage.into(),
            skip_shadow,
            who: "ada".into(),
            why: "it looks better".into(),
            ..v1::BeginRolloutRequest::default()
        };
        Ok(self.control.begin_rollout(request).await?.into_inner().rollout)
    }

    async fn change(&mut self, change: Ask, features: &[&str]) -> Result<v1::ChangeRolloutResponse, tonic::Status> {
        let request = v1::ChangeRolloutRequest {
            project: "shops".into(),
            model: "tried".into(),
            change: change as i32,
            features: features.iter().map(|feature| (*feature).to_owned()).collect(),
            who: "bob".into(),
            why: "because".into(),
        };
        Ok(self.control.change_rollout(request).await?.into_inner())
    }

    async fn story(&mut self) -> Json {
        let request = v1::GetRolloutRequest { project: "shops".into(), model: "tried".into() };
        let report = self.control.get_rollout(request).await.unwrap().into_inner().report;
        serde_json::from_str(&report).unwrap()
    }

    /// Asks until what is told of the rollout is as wanted.
    async fn until(&mut self, ask: bool, wanted: impl Fn(&Json) -> bool) -> Json {
        let began = std::time::Instant::now();
        loop {
            if ask {
                let names: Vec<String> = (0..40).map(|shop| format!("shop {shop}")).collect();
                let shops: Vec<Option<&str>> = names.iter().map(|name| Some(name.as_str())).collect();
                self.predict(rows(&shops)).await.unwrap();
            }
            self.clock_time.fetch_add(1_000_000, Ordering::SeqCst);
            let story = self.story().await;
            if wanted(&story) {
                return story;
            }
            assert!(began.elapsed() < Duration::from_secs(60), "{story:#}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

#[tokio::test]
async fn rows_of_one_request_go_to_the_arms_of_their_units() {
    let mut server = serving(b"other").await;
    let refused = server.begin("canary", false).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("--skip-shadow"), "{}", refused.message());
    server.begin("canary", true).await.unwrap();

    let names: Vec<String> = (0..200).map(|shop| format!("shop {shop}")).collect();
    let mut shops: Vec<Option<&str>> = names.iter().map(|name| Some(name.as_str())).collect();
    shops.push(None);
    let answer = server.predict(v1::PredictRequest { include_features: true, ..rows(&shops) }).await.unwrap();
    assert_eq!((answer.outcomes.len(), answer.at.len()), (201, 201));
    let mut challengers = 0;
    for (row, (outcome, score)) in answer.outcomes.iter().zip(scores(&answer)).enumerate() {
        let (version, arm, expected) =
            if outcome.version == 2 { (2, "challenger", 101.0) } else { (1, "champion", 1.0) };
        assert_eq!((outcome.version, outcome.arm.as_str(), score), (version, arm, expected), "{row}");
        challengers += u32::from(version == 2);
    }
    assert!((60..140).contains(&challengers), "{challengers} of 200 at 50 %");
    assert_eq!(answer.outcomes[200].arm, "champion", "a row without its unit");
    assert_eq!(answer.features[0].statuses.len(), 201);
    // Who has a version keeps it, alone and in another order.
    let backwards: Vec<Option<&str>> = shops[..200].iter().rev().copied().collect();
    let again = server.predict(rows(&backwards)).await.unwrap();
    let versions = |answer: &v1::PredictResponse| answer.outcomes.iter().map(|row| row.version).collect::<Vec<_>>();
    let mut reversed = versions(&again);
    reversed.reverse();
    assert_eq!(reversed, versions(&answer)[..200]);
    for row in [0, 57, 199] {
        let alone = server.predict(rows(&shops[row..=row])).await.unwrap();
        assert_eq!(versions(&alone)[0], versions(&answer)[row]);
    }
    // Without the column everybody gets the champion, and who names a version gets that.
    let mut without = rows(&shops);
    without.rows.truncate(1);
    let outcomes = server.predict(without.clone()).await.unwrap().outcomes;
    assert!(outcomes.iter().all(|row| row.version == 1));
    without.version = 2;
    let outcomes = server.predict(without).await.unwrap().outcomes;
    assert!(outcomes.iter().all(|row| row.version == 2 && row.arm == "named"));
    let mut wrong = rows(&shops);
    wrong.rows.push(texts("colour", &shops));
    assert_eq!(server.predict(wrong).await.unwrap_err().code(), Code::InvalidArgument);

    // Over HTTP too; and clients are told which column that is.
    let (status, body) =
        server.http("POST", "/v1/models/tried/predict", r#"{"rows": {"total": [1.0], "shop": ["shop 57"]}}"#).await;
    assert_eq!(status, 200, "{body}");
    let expected = versions(&answer)[57];
    assert!(body.contains(&format!("\"version\":{expected}")), "{body}");
    let catalog =
        server.control.get_catalog(v1::GetCatalogRequest { project: "shops".into() }).await.unwrap().into_inner();
    let totals = catalog.services.iter().find(|service| service.name == "totals").unwrap();
    assert_eq!(totals.units.iter().map(|unit| unit.name.as_str()).collect::<Vec<_>>(), ["shop"]);

    let answer = server.rollback("tried").await.unwrap();
    assert_eq!((answer.champion, answer.before, answer.ended), (1, 1, 2));
    let outcomes = server.predict(rows(&shops)).await.unwrap().outcomes;
    assert!(outcomes.iter().all(|row| row.version == 1));
    assert_eq!(server.story().await["ended"][0]["ending"], "abandoned");
}

#[tokio::test]
async fn a_canary_becomes_champion_by_its_criteria() {
    let mut server = serving(b"other").await;
    server.begin("canary", true).await.unwrap();
    let held = server.change(Ask::Hold, &[]).await.unwrap();
    assert!(!held.existed);
    server.until(true, |story| story["running"]["judged"]["judgement"]["decision"]["advance"].is_object()).await;
    assert_eq!(server.story().await["running"]["share"], 0.5, "a person holds it");
    server.change(Ask::Resume, &[]).await.unwrap();
    let story = server.until(true, |story| story["champion"]["version"] == 2).await;
    assert_eq!(story["previous"]["version"], 1, "{story:#}");
    let told: Vec<&str> =
        story["history"].as_array().unwrap().iter().filter_map(|line| line["kind"].as_str()).collect();
    assert!(
        told.ends_with(&["rollout_begin", "rollout_hold", "rollout_resume", "rollout_step", "model_promote"]),
        "{told:?}"
    );
    let promoted = story["history"].as_array().unwrap().last().unwrap();
    assert!(promoted["numbers"]["criteria"].as_array().unwrap().len() >= 3, "{promoted:#}");
    assert_eq!(server.rollback("tried").await.unwrap().champion, 1);
}

#[tokio::test]
async fn a_broken_version_is_taken_out_at_once_and_the_champion_answers() {
    let mut server = serving(b"nan").await;
    server.begin("canary", true).await.unwrap();
    let names: Vec<String> = (0..100).map(|shop| format!("shop {shop}")).collect();
    let shops: Vec<Option<&str>> = names.iter().map(|name| Some(name.as_str())).collect();
    let answer = server.predict(rows(&shops)).await.unwrap();
    let (ours, theirs): (Vec<_>, Vec<_>) = answer.outcomes.iter().partition(|row| row.version == 2);
    assert!(!ours.is_empty() && theirs.iter().all(|row| row.status == v1::RowStatus::Ok as i32));
    for row in ours {
        assert_eq!(row.status, v1::RowStatus::Fallback as i32);
        assert!(row.reason.contains("NaN") && row.reason.contains("version 1 answered"), "{}", row.reason);
    }
    assert!(scores(&answer).iter().all(|score| *score == 1.0), "nobody gets less than the champion's answer");
    let began = std::time::Instant::now();
    while server.predict(rows(&shops)).await.unwrap().outcomes.iter().any(|row| row.version == 2) {
        assert!(began.elapsed() < Duration::from_secs(5), "it still has traffic");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let story = server.until(false, |story| !story["ended"].as_array().unwrap().is_empty()).await;
    assert_eq!(story["ended"][0]["ending"], "rolled_back");
    assert!(story["ended"][0]["reasons"][0].as_str().unwrap().contains("rows of the last 30 s"), "{story:#}");
}

#[tokio::test]
async fn a_version_in_shadow_answers_nobody_and_is_stopped_by_what_it_would_say() {
    let mut server = serving(b"other").await;
    server.begin("shadow", false).await.unwrap();
    // Every decision flips: more than the tenth that is allowed.
    let story = server.until(true, |story| !story["ended"].as_array().unwrap().is_empty()).await;
    assert_eq!(story["ended"][0]["ending"], "stopped", "{story:#}");
    let reason = story["ended"][0]["reasons"][0].as_str().unwrap();
    assert!(reason.starts_with("`decision flips < 10.00 %` is breached"), "{reason}");
    let end = story["history"].as_array().unwrap().last().unwrap();
    assert!(end["numbers"]["evidence"]["rows"].as_u64().unwrap() >= 5, "{end:#}");
    let named = server.until(true, |story| story["champion"]["version"] == 1).await;
    assert!(named["running"].is_null());
}

#[tokio::test]
async fn a_model_that_is_off_answers_with_its_fallback() {
    let mut server = serving(b"other").await;
    server.begin("canary", true).await.unwrap();
    server.change(Ask::Off, &[]).await.unwrap();
    let answer = server.predict(rows(&[Some("a"), None])).await.unwrap();
    assert_eq!(scores(&answer), [0.25, 0.25]);
    for row in &answer.outcomes {
        assert_eq!((row.status, row.arm.as_str()), (v1::RowStatus::Fallback as i32, "off"));
        assert!(row.reason.contains("off since entry") && row.reason.contains("because"), "{}", row.reason);
    }
    let refused = server.begin("canary", true).await.unwrap_err();
    assert!(refused.message().contains("coeval rollout on tried"), "{}", refused.message());
    server.change(Ask::On, &[]).await.unwrap();
    let answer = server.predict(rows(&[Some("a")])).await.unwrap();
    assert_eq!((scores(&answer)[0], answer.outcomes[0].arm.as_str()), (1.0, "champion"));
    assert_eq!(server.story().await["ended"][0]["ending"], "turned_off");
}

#[tokio::test]
async fn what_cannot_be_asked_is_refused_with_the_next_step() {
    let mut server = serving(b"other").await;
    let none = server.change(Ask::Hold, &[]).await.unwrap_err();
    assert!(none.message().contains("coeval rollout shadow tried VERSION"), "{}", none.message());
    server.begin("shadow", false).await.unwrap();
    let unknown = server.change(Ask::Acknowledge, &["basket:totle"]).await.unwrap_err();
    assert!(unknown.message().contains("basket:total"), "{}", unknown.message());
    server.change(Ask::Acknowledge, &["*"]).await.unwrap();
    assert!(server.change(Ask::Acknowledge, &["*"]).await.unwrap().existed);
    let promote = v1::PromoteModelRequest {
        project: "shops".into(),
        model: "tried".into(),
        version: 2,
        who: "ada".into(),
        why: "on a feeling".into(),
    };
    let refused = server.control.promote_model(promote).await.unwrap_err();
    assert!(refused.message().contains("by its criteria"), "{}", refused.message());
    let early = server.change(Ask::Advance, &[]).await.unwrap_err();
    assert!(
        early.message().contains("stays at shadow") && early.message().contains("0 of 5 rows"),
        "{}",
        early.message()
    );
}
