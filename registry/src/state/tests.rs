use serde_json::json;

use super::*;
use crate::deployment::{Activate, GiveUp, Prepare};
use crate::id::{Incarnation, KeyHash, Salt, Sha256};
use crate::model::{Artifact, InputColumns};

pub(crate) fn flights() -> ProjectName {
    ProjectName::try_new("flights").unwrap()
}

fn digest(text: &str) -> Digest {
    Digest::try_new(text).unwrap()
}

pub(crate) fn catalog(service_digest: &str) -> Catalog {
    let service = ServiceName::try_new("delay_inputs").unwrap();
    Catalog {
        digest: digest(&format!("catalog-{service_digest}")),
        files: BTreeMap::from([("features/airport.yaml".to_owned(), "entities: []\n".to_owned())]),
        settings: "project: flights\n".to_owned(),
        source_schemas: BTreeMap::from([(SourceName::try_new("weather").unwrap(), json!({"temp": "float64"}))]),
        views: BTreeMap::from([(
            ViewName::try_new("weather_now").unwrap(),
            ViewDigests { storage: digest("st"), semantic: digest("se") },
        )]),
        services: BTreeMap::from([(service.clone(), digest(service_digest))]),
        models: BTreeMap::from([(delay(), service)]),
    }
}

pub(crate) fn delay() -> ModelName {
    ModelName::try_new("delay").unwrap()
}

pub(crate) fn model(bytes: &str, service_digest: &str) -> NewModel {
    let sha256 = Sha256::of(bytes.as_bytes());
    let location = format!("models/delay/{sha256}.pt");
    NewModel {
        name: delay(),
        artifact: Artifact { location, sha256, bytes: bytes.len() as u64 },
        runtime: "torchscript".into(),
        service: ServiceName::try_new("delay_inputs").unwrap(),
        service_digest: digest(service_digest),
        inputs: vec![InputColumns {
            name: "dense".into(),
            dtype: "float32".into(),
            columns: vec!["weather_now:temp".into()],
        }],
        author: "ada".into(),
        commit: "4b825dc".into(),
        environment_digest: "sha256:env".into(),
        seed: Some(u64::MAX),
        hardware: "2 cores".into(),
        libraries: BTreeMap::from([("torch".to_owned(), "2.11.0".to_owned())]),
        dataset: None,
        metrics: BTreeMap::from([("auc".to_owned(), 0.1 + 0.2), ("loss".to_owned(), -0.0)]),
        importances: BTreeMap::new(),
        golden_rows: None,
    }
}

pub(crate) fn dataset(id: &str, service_digest: &str) -> NewDataset {
    NewDataset {
        name: DatasetName::try_new("first_half").unwrap(),
        id: DatasetId::try_new(id).unwrap(),
        manifest: format!("datasets/{id}/manifest.json"),
        service: ServiceName::try_new("delay_inputs").unwrap(),
        service_digest: digest(service_digest),
        spine_digest: digest("spine"),
        source_digests: BTreeMap::new(),
        rows: 12_951,
    }
}

fn gateway(name: &str) -> Incarnation {
    Incarnation::try_new(name).unwrap()
}

pub(crate) fn prepare(version: u32) -> Change {
    let prepare = Prepare { model: delay(), version: ModelVersion(version), by: gateway("g1") };
    Change::Deployment(DeploymentChange::Prepare(prepare))
}

pub(crate) fn activate(version: u32, prepare: u64) -> Change {
    let prepare = EntryNumber(prepare);
    Change::Deployment(DeploymentChange::Activate(Activate { model: delay(), version: ModelVersion(version), prepare }))
}

pub(crate) fn begin_rollout(version: u32, champion: u32) -> Change {
    use crate::assignment::{Range, Traffic};
    use crate::rollout::{Begin, Evidence, RolloutChange, Stage};
    let policy = r#"{"canary":{}}"#;
    let begin = Begin {
        model: delay(),
        version: ModelVersion(version),
        champion: ModelVersion(champion),
        policy: policy.to_owned(),
        policy_sha256: Sha256::of(policy.as_bytes()),
        traffic: Traffic { layer: "delay".into(), seed: "1".into(), ranges: vec![Range::ALL] },
        stage: Stage::Shadow,
        evidence: Evidence {
            judged_on: EntryNumber::NONE,
            reasons: vec!["planned".into()],
            numbers: json!({"days": 2}),
        },
    };
    Change::Deployment(DeploymentChange::Rollout(RolloutChange::Begin(Box::new(begin))))
}

fn give_up(version: u32, prepare: u64) -> Change {
    let (prepare, reasons) = (EntryNumber(prepare), BTreeMap::from([(gateway("g2"), "it is broken".to_owned())]));
    let give_up = GiveUp { model: delay(), version: ModelVersion(version), prepare, reasons };
    Change::Deployment(DeploymentChange::GiveUp(give_up))
}

fn promote(version: u32, from: u32) -> Change {
    let (version, from) = (ModelVersion(version), Some(ModelVersion(from)).filter(|from| from.0 > 0));
    Change::Deployment(DeploymentChange::Promote { model: delay(), version, from })
}

fn rollback(from: u32, to: u32) -> Change {
    let (from, to) = (ModelVersion(from), ModelVersion(to));
    Change::Deployment(DeploymentChange::Rollback { model: delay(), from, to })
}

fn retire(version: u32, previous_too: bool) -> Change {
    Change::Deployment(DeploymentChange::Retire { model: delay(), version: ModelVersion(version), previous_too })
}

/// Prepared and active.
fn deploy(state: &mut State, version: u32) -> Result<Option<u32>, String> {
    make(state, prepare(version))?;
    let head = state.head.0;
    make(state, activate(version, head))
}

pub(crate) fn entry_of(state: &State, kind: &str, must_understand: bool, body: serde_json::Value) -> Entry {
    let number = state.head.next();
    Entry {
        format: FORMAT,
        number,
        id: EntryId::try_new(format!("id{number}")).unwrap(),
        at: DateTime::UNIX_EPOCH + chrono::TimeDelta::seconds(number.0 as i64),
        project: flights(),
        who: "ada".into(),
        why: None,
        must_understand,
        kind: kind.into(),
        body,
    }
}

/// Judges a change and folds it; the version, or the text of the refusal.
pub(crate) fn make(state: &mut State, change: Change) -> Result<Option<u32>, String> {
    match state.judge(&flights(), &change).map_err(|refusal| refusal.to_string())? {
        Judgement::AlreadySo { version, .. } => Ok(version.map(|version| version.0)),
        Judgement::Append { kind, must_understand, body, version } => {
            let entry = entry_of(state, kind, must_understand, body);
            state.apply(&entry).unwrap();
            Ok(version.map(|version| version.0))
        }
    }
}

pub(crate) fn applied() -> State {
    let mut state = State::default();
    make(&mut state, Change::Apply(catalog("d1"))).unwrap();
    state
}

#[test]
fn a_change_to_a_project_begins_with_apply() {
    let mut state = State::default();
    let refusal = make(&mut state, prepare(1)).unwrap_err();
    assert_eq!(refusal, "project `flights` is not in this store (there are none); run `coeval apply` first");
}

#[test]
fn the_latest_apply_is_in_force_and_the_same_again_changes_nothing() {
    let mut state = applied();
    make(&mut state, Change::Apply(catalog("d1"))).unwrap();
    assert_eq!(state.head, EntryNumber(1));

    make(&mut state, Change::Apply(catalog("d2"))).unwrap();
    let project = state.project("flights").unwrap();
    assert_eq!(project.catalog(), &catalog("d2"));
    assert_eq!(project.applied.fact.entry, EntryNumber(2));
    assert_eq!(project.applied.fact.who, "ada");
    let digests = &project.services["delay_inputs"];
    assert_eq!(
        digests.iter().map(|(digest, entry)| (digest.as_str(), entry.0)).collect::<Vec<_>>(),
        [("d1", 1), ("d2", 2)]
    );
}

#[test]
fn an_apply_whose_model_takes_an_unknown_service_is_refused() {
    let mut wrong = catalog("d1");
    wrong.services.clear();
    assert_eq!(
        make(&mut State::default(), Change::Apply(wrong)).unwrap_err(),
        "model `delay` takes the feature service `delay_inputs`, which the definitions do not have (there are none)"
    );
}

#[test]
fn versions_count_from_one_and_the_same_model_keeps_its_version() {
    let mut state = applied();
    assert_eq!(make(&mut state, Change::RegisterModel(Box::new(model("a", "d1")))), Ok(Some(1)));
    assert_eq!(make(&mut state, Change::RegisterModel(Box::new(model("b", "d1")))), Ok(Some(2)));
    let head = state.head;
    // Another author and other metrics do not make another model; other rows to judge it by do.
    let again = NewModel { author: "bob".into(), metrics: BTreeMap::new(), ..model("a", "d1") };
    assert_eq!(make(&mut state, Change::RegisterModel(Box::new(again))), Ok(Some(1)));
    assert_eq!(state.head, head);
    let golden = Artifact { location: "models/delay/x.golden".into(), sha256: Sha256::of(b"rows"), bytes: 4 };
    let judged = NewModel { golden_rows: Some(golden), ..model("b", "d1") };
    assert_eq!(make(&mut state, Change::RegisterModel(Box::new(judged.clone()))), Ok(Some(3)));
    assert_eq!(make(&mut state, Change::RegisterModel(Box::new(judged))), Ok(Some(3)));

    // The same bytes over other definitions do.
    make(&mut state, Change::Apply(catalog("d2"))).unwrap();
    assert_eq!(make(&mut state, Change::RegisterModel(Box::new(model("a", "d2")))), Ok(Some(4)));

    let project = state.project("flights").unwrap();
    let record = project.model("delay", ModelVersion(1)).unwrap();
    assert_eq!(record.model, model("a", "d1"));
    assert_eq!(record.definitions, EntryNumber(1));
    assert!(!project.serves_as_applied(record));
    let record = project.model("delay", ModelVersion(4)).unwrap();
    assert_eq!((record.definitions, record.registered.entry), (EntryNumber(5), EntryNumber(6)));
    assert!(project.serves_as_applied(record));
}

#[test]
fn a_model_trained_before_the_latest_apply_is_traced_to_its_definitions() {
    let mut state = applied();
    make(&mut state, Change::Apply(catalog("d2"))).unwrap();
    assert_eq!(make(&mut state, Change::RegisterModel(Box::new(model("a", "d1")))), Ok(Some(1)));
    let record = state.project("flights").unwrap().model("delay", ModelVersion(1)).unwrap();
    assert_eq!(record.definitions, EntryNumber(1));
}

#[test]
fn wrong_models_are_refused_with_the_next_step() {
    #[track_caller]
    fn check(change: impl FnOnce(&mut NewModel), expected: &str) {
        let mut state = applied();
        make(&mut state, Change::CreateDataset(dataset("ds1", "d1"))).unwrap();
        make(&mut state, Change::Apply(catalog("d2"))).unwrap();
        let mut new = model("a", "d2");
        change(&mut new);
        assert_eq!(make(&mut state, Change::RegisterModel(Box::new(new))).unwrap_err(), expected);
        assert_eq!(state.head, EntryNumber(3));
    }
    check(
        |new| new.name = ModelName::try_new("delays").unwrap(),
        "model `delays` is not in the applied definitions of `flights` (there are: delay); define it and run `coeval apply`",
    );
    check(
        |new| new.service = ServiceName::try_new("other").unwrap(),
        "model `delay` takes the feature service `delay_inputs`, but the version was trained on `other`; \
         train on `delay_inputs`, or change `features:` of the model and run `coeval apply`",
    );
    check(
        |new| new.service_digest = digest("d3"),
        "feature service `delay_inputs` with digest d3 was never applied to `flights` (in force: d2); \
         run `coeval apply` with the definitions that the model was made with",
    );
    check(
        |new| new.dataset = Some(DatasetId::try_new("ds2").unwrap()),
        "dataset `ds2` is not in the control log of `flights` (there are: ds1); create it with `coeval dataset create`",
    );
    check(
        |new| new.dataset = Some(DatasetId::try_new("ds1").unwrap()),
        "dataset `ds1` was computed by digest d1 of feature service `delay_inputs`, but the model says that it was \
         trained on d2; register the model with the digest of its dataset",
    );
    check(
        |new| new.metrics = BTreeMap::from([("auc".to_owned(), f64::NAN)]),
        "metric `auc` of model `delay` is NaN; register finite numbers only",
    );
    check(
        |new| new.commit = " ".into(),
        "the record of model `delay` lacks its commit; a version is registered with its whole record",
    );
}

/// Every version that is more than registered.
fn standings(state: &State) -> Vec<(u32, &'static str)> {
    let project = state.project("flights").unwrap();
    let versions = project.models["delay"].keys();
    let standings = versions.map(|version| (version.0, project.standing("delay", *version).name()));
    standings.filter(|(_, standing)| *standing != "registered").collect()
}

fn three_versions() -> State {
    let mut state = applied();
    for bytes in ["a", "b", "c"] {
        make(&mut state, Change::RegisterModel(Box::new(model(bytes, "d1")))).unwrap();
    }
    state
}

#[test]
fn deploys_of_older_logs_move_the_traffic_and_keep_the_version_before() {
    let mut state = three_versions();
    let mut old = |version: u32| {
        let body = json!({"model": "delay", "version": version});
        state.apply(&entry_of(&state, kind::MODEL_DEPLOY, true, body)).unwrap();
        standings(&state)
    };
    assert_eq!(old(1), [(1, "champion")]);
    assert_eq!(old(2), [(1, "previous"), (2, "champion")]);
    assert_eq!(old(2), [(1, "previous"), (2, "champion")]);
    assert_eq!(old(1), [(1, "champion"), (2, "previous")]);
    // What is neither was on no gateway.
    assert_eq!(old(3), [(1, "previous"), (3, "champion")]);
    // And it goes on by the rules of today.
    make(&mut state, rollback(3, 1)).unwrap();
    assert_eq!(standings(&state), [(1, "champion"), (3, "active")]);
}

#[test]
fn only_the_first_version_gets_the_traffic_by_being_deployed() {
    let mut state = three_versions();
    make(&mut state, prepare(1)).unwrap();
    assert_eq!(standings(&state), [(1, "preparing")]);
    make(&mut state, activate(1, 5)).unwrap();
    assert_eq!(standings(&state), [(1, "champion")]);
    deploy(&mut state, 2).unwrap();
    assert_eq!(standings(&state), [(1, "champion"), (2, "active")]);
    // The same again is no change.
    let head = state.head;
    assert_eq!(make(&mut state, prepare(2)), Ok(Some(2)));
    assert_eq!(state.head, head);
    make(&mut state, promote(2, 1)).unwrap();
    assert_eq!(standings(&state), [(1, "previous"), (2, "champion")]);
    // New definitions move no traffic.
    make(&mut state, Change::Apply(catalog("d2"))).unwrap();
    assert_eq!(standings(&state), [(1, "previous"), (2, "champion")]);
    assert_eq!(state.project("flights").unwrap().champion("delay").unwrap().version, ModelVersion(2));
    assert_eq!(state.without_effect, 0);
}

#[test]
fn a_deploy_ends_once_and_only_by_the_entry_that_began_it() {
    let mut state = three_versions();
    make(&mut state, prepare(1)).unwrap();
    assert_eq!(
        make(&mut state, prepare(1)).unwrap_err(),
        "version 1 of model `delay` is being prepared since entry 5 of the control log, for gateway g1; wait for its end"
    );
    make(&mut state, give_up(1, 5)).unwrap();
    assert_eq!(standings(&state), []);
    let head = state.head;
    make(&mut state, give_up(1, 5)).unwrap();
    assert_eq!(state.head, head, "two gateways noticed, one wrote it");
    assert_eq!(
        make(&mut state, activate(1, 5)).unwrap_err(),
        "the deploy of version 1 of model `delay` that began with entry 5 has ended: it was given up with entry 6 (g2: it is broken)"
    );
    // A new attempt is not ended by what was said of the old one.
    make(&mut state, prepare(1)).unwrap();
    assert!(make(&mut state, activate(1, 5)).unwrap_err().ends_with("another one has begun"));
    assert!(make(&mut state, give_up(1, 5)).unwrap_err().ends_with("another one has begun"));
    make(&mut state, activate(1, 7)).unwrap();
    assert!(make(&mut state, give_up(1, 7)).unwrap_err().ends_with("it is active since entry 8"));
    assert_eq!(standings(&state), [(1, "champion")]);
}

#[test]
fn traffic_moves_only_as_it_was_judged() {
    let mut state = three_versions();
    deploy(&mut state, 1).unwrap();
    assert_eq!(
        make(&mut state, promote(2, 1)).unwrap_err(),
        "version 2 of model `delay` is registered, not active; deploy it first: `coeval model deploy delay 2`"
    );
    deploy(&mut state, 2).unwrap();
    deploy(&mut state, 3).unwrap();
    make(&mut state, promote(2, 1)).unwrap();
    // Somebody else meant to replace version 1.
    assert_eq!(
        make(&mut state, promote(3, 1)).unwrap_err(),
        "the champion of model `delay` is version 2 and not version 1 any more: somebody else moved the traffic; look at \
         `coeval model list` and decide again"
    );
    make(&mut state, rollback(2, 1)).unwrap();
    assert_eq!(standings(&state), [(1, "champion"), (2, "active"), (3, "active")]);
    // The second of two operators finds it done; nobody goes back twice.
    let head = state.head;
    make(&mut state, rollback(2, 1)).unwrap();
    assert_eq!(state.head, head);
    assert!(make(&mut state, rollback(1, 2)).is_err());
}

#[test]
fn what_answers_is_not_retired() {
    let mut state = three_versions();
    for version in 1..=3 {
        deploy(&mut state, version).unwrap();
    }
    make(&mut state, promote(2, 1)).unwrap();
    assert_eq!(
        make(&mut state, retire(2, true)).unwrap_err(),
        "version 2 of model `delay` is the champion: all requests go to it; promote another version first"
    );
    assert_eq!(
        make(&mut state, retire(1, false)).unwrap_err(),
        "version 1 of model `delay` is what a rollback goes back to; say `--force` to give that up"
    );
    make(&mut state, retire(3, false)).unwrap();
    make(&mut state, retire(1, true)).unwrap();
    assert_eq!(standings(&state), [(2, "champion")]);
    let deployment = &state.project("flights").unwrap().deployments["delay"];
    assert_eq!(deployment.previous_version(), None);
    assert!(make(&mut state, retire(3, false)).unwrap_err().contains("is registered, not active"));
    // It can come back.
    deploy(&mut state, 3).unwrap();
    assert_eq!(standings(&state), [(2, "champion"), (3, "active")]);
}

#[test]
fn approvals_are_kept_by_name() {
    let mut state = three_versions();
    let approve = || DeploymentChange::Approve { model: delay(), version: ModelVersion(2) };
    make(&mut state, Change::Deployment(approve())).unwrap();
    make(&mut state, Change::Deployment(approve())).unwrap();
    let record = state.project("flights").unwrap().model("delay", ModelVersion(2)).unwrap();
    let entries: Vec<(&str, u64)> = record.approvals.iter().map(|(who, fact)| (who.as_str(), fact.entry.0)).collect();
    assert_eq!(entries, [("ada", 5)]);
}

#[test]
fn an_unknown_version_is_refused_with_those_that_exist() {
    let mut state = applied();
    #[track_caller]
    fn check(state: &mut State, expected: &str) {
        let expected = format!("model `delay` has no version 7 ({expected}); register it with `coeval model register`");
        assert_eq!(make(state, prepare(7)).unwrap_err(), expected);
    }
    check(&mut state, "it has none");
    make(&mut state, Change::RegisterModel(Box::new(model("a", "d1")))).unwrap();
    check(&mut state, "it has version 1");
    make(&mut state, Change::RegisterModel(Box::new(model("b", "d1")))).unwrap();
    check(&mut state, "it has versions 1 to 2");
}

#[test]
fn datasets_are_found_by_id_and_by_the_latest_of_a_name() {
    let mut state = applied();
    make(&mut state, Change::CreateDataset(dataset("ds1", "d1"))).unwrap();
    make(&mut state, Change::CreateDataset(dataset("ds2", "d1"))).unwrap();
    make(&mut state, Change::CreateDataset(dataset("ds1", "d1"))).unwrap();
    assert_eq!(state.head, EntryNumber(3));
    let project = state.project("flights").unwrap();
    let id = |asked: &str| project.dataset(asked).map(|record| record.dataset.id.as_str());
    assert_eq!((id("ds1"), id("ds2"), id("first_half"), id("ds3")), (Some("ds1"), Some("ds2"), Some("ds2"), None));

    let other = NewDataset { rows: 1, ..dataset("ds1", "d1") };
    assert_eq!(
        make(&mut state, Change::CreateDataset(other)).unwrap_err(),
        "dataset id `ds1` is taken by another snapshot, of entry 2; give the new snapshot an id of its own"
    );
}

#[test]
fn an_unknown_kind_is_skipped_or_stops_changes_as_it_says() {
    let mut state = applied();
    make(&mut state, Change::RegisterModel(Box::new(model("a", "d1")))).unwrap();
    state.apply(&entry_of(&state, "note", false, json!("anything"))).unwrap();
    assert_eq!((state.skipped, &state.changes_stopped), (1, &None));
    make(&mut state, prepare(1)).unwrap();

    let before = state.projects.clone();
    state.apply(&entry_of(&state, "rollout_shadow", true, json!({}))).unwrap();
    let stopped = ChangesStopped { entry: EntryNumber(5), kind: "rollout_shadow".into() };
    assert_eq!(state.changes_stopped, Some(stopped));
    let refusal = make(&mut state, Change::Apply(catalog("d2"))).unwrap_err();
    assert_eq!(
        refusal,
        "entry 5 of the control log is of the kind `rollout_shadow`, which this build does not know; \
         make changes with the newer build that wrote it"
    );

    // What comes after is not folded either: it may rest on what was not understood.
    let later = entry_of(&state, kind::APPLY, true, serde_json::to_value(catalog("d2")).unwrap());
    state.apply(&later).unwrap();
    assert_eq!((state.head, state.projects), (EntryNumber(6), before));
}

#[test]
fn an_entry_about_nothing_has_no_effect_and_stops_nobody() {
    let mut state = applied();
    let before = state.projects.clone();
    let body = json!({"model": "delay", "version": 3});
    state.apply(&entry_of(&state, kind::MODEL_DEPLOY, true, body)).unwrap();
    let body = serde_json::to_value(RegisterBody { version: ModelVersion(5), model: model("a", "d1") }).unwrap();
    state.apply(&entry_of(&state, kind::MODEL_REGISTER, true, body)).unwrap();
    assert_eq!((state.without_effect, state.projects), (2, before));
}

#[test]
fn an_unreadable_body_and_a_wrong_order_are_errors() {
    let mut state = applied();
    let entry = entry_of(&state, kind::MODEL_DEPLOY, true, json!({"model": "delay"}));
    let error = state.apply(&entry).unwrap_err();
    assert_eq!(error.to_string(), "its `model_deploy` body cannot be read: missing field `version`");
    assert_eq!(state.head, EntryNumber(1));
    let late = Entry { number: EntryNumber(3), ..entry };
    assert_eq!(state.apply(&late), Err(FoldError::OutOfOrder { expected: EntryNumber(2), found: EntryNumber(3) }));
}

#[test]
fn the_state_survives_its_own_json() {
    let mut state = applied();
    make(&mut state, Change::CreateDataset(dataset("ds1", "d1"))).unwrap();
    let new = NewModel { dataset: Some(DatasetId::try_new("ds1").unwrap()), ..model("a", "d1") };
    make(&mut state, Change::RegisterModel(Box::new(new))).unwrap();
    deploy(&mut state, 1).unwrap();
    let bytes = serde_json::to_vec(&state).unwrap();
    let read: State = serde_json::from_slice(&bytes).unwrap();
    assert_eq!(read, state);
    assert_eq!(serde_json::to_vec(&read).unwrap(), bytes);
    let auc = read.project("flights").unwrap().champion("delay").unwrap().model.metrics["auc"];
    assert_eq!(auc.to_bits(), (0.1_f64 + 0.2).to_bits());
}

#[test]
fn what_was_forgotten_stays_forgotten_until_it_is_done_and_after() {
    let mut state = State::default();
    let project = flights();
    let act = |state: &mut State, change: &Change| match state.judge(&project, change)? {
        Judgement::Append { kind, must_understand, body, .. } => {
            let entry = entry_of(state, kind, must_understand, body);
            state.apply(&entry).unwrap();
            Ok(Some(entry.number))
        }
        Judgement::AlreadySo { .. } => Ok::<_, Refusal>(None),
    };
    let salt = Salt::random();
    let hash = |text: &str| KeyHash::try_new(Sha256::of(text.as_bytes()).as_str()).unwrap();
    let entity = EntityName::try_new("airport").unwrap();
    let forget = |salt: &Salt, keys: &[&str]| {
        let keys = keys.iter().map(|key| hash(key)).collect();
        Change::Forget(Forget { salt: salt.clone(), entity: entity.clone(), keys })
    };
    let done = |keys: &[&str]| {
        let keys = keys.iter().map(|key| hash(key)).collect();
        Change::ForgetDone(ForgetDone {
            entity: entity.clone(),
            keys,
            removed: BTreeMap::from([("history".into(), 3)]),
        })
    };
    let refused = act(&mut state, &forget(&salt, &["a"]));
    assert!(matches!(refused, Err(Refusal::UnknownProject { .. })), "{refused:?}");
    act(&mut state, &Change::Apply(catalog("d1"))).unwrap();
    assert!(matches!(act(&mut state, &forget(&salt, &[])), Err(Refusal::KeyCount { .. })));
    let first = act(&mut state, &forget(&salt, &["a"])).unwrap().unwrap();
    assert_eq!(act(&mut state, &forget(&salt, &["a"])), Ok(None));
    let second = act(&mut state, &forget(&salt, &["a", "b"])).unwrap().unwrap();
    assert_eq!(act(&mut state, &forget(&Salt::random(), &["c"])), Err(Refusal::OtherSalt));
    assert!(matches!(act(&mut state, &done(&["c"])), Err(Refusal::NotForgotten { .. })));
    let asked = |state: &State, key| state.projects[&project].forgotten.key("airport", &hash(key)).unwrap().asked.entry;
    assert_eq!((asked(&state, "a"), asked(&state, "b")), (first, second));
    let pending = |state: &State| state.projects[&project].forgotten.pending().count();
    assert_eq!(pending(&state), 2);
    act(&mut state, &done(&["a"])).unwrap().unwrap();
    assert_eq!((act(&mut state, &done(&["a"])), pending(&state)), (Ok(None), 1));
    // Later definitions change nothing about it, and it is part of what snapshots keep.
    act(&mut state, &Change::Apply(catalog("d2"))).unwrap();
    let kept: State = serde_json::from_str(&serde_json::to_string(&state).unwrap()).unwrap();
    assert_eq!(kept, state);
    assert_eq!((pending(&kept), kept.without_effect), (1, 0));
}
