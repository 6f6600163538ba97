use serde_json::json;

use super::*;
use crate::assignment::Range;
use crate::deployment::DeploymentChange;
use crate::state::tests::{activate, applied, begin_rollout, delay, entry_of, flights, make, model, prepare};
use crate::state::{Change, Judgement, State};

const POLICY: &str = r#"{"canary":{}}"#;

fn evidence(judged_on: u64) -> Evidence {
    let numbers = json!({"criteria": [{"name": "error_rate < 0.5%", "units": 3000}]});
    Evidence { judged_on: EntryNumber(judged_on), reasons: vec!["all criteria are met".to_owned()], numbers }
}

fn begin_with(change: impl FnOnce(&mut Begin)) -> Change {
    let Change::Deployment(DeploymentChange::Rollout(RolloutChange::Begin(mut begin))) = begin_rollout(2, 1) else {
        unreachable!("it begins a rollout")
    };
    change(&mut begin);
    rollout(RolloutChange::Begin(begin))
}

fn rollout(change: RolloutChange) -> Change {
    Change::Deployment(DeploymentChange::Rollout(change))
}

fn canary(step: u32, share: u16) -> Stage {
    Stage::Canary { step, share }
}

fn step(rollout_at: u64, from: Stage, to: Stage, evidence: Evidence) -> Change {
    let (model, version, began) = (delay(), ModelVersion(2), EntryNumber(rollout_at));
    rollout(RolloutChange::Step(Step { model, version, rollout: began, from, to, evidence }))
}

fn promote(rollout_at: u64, from: Stage, evidence: Evidence) -> Change {
    let (model, version, began) = (delay(), ModelVersion(2), EntryNumber(rollout_at));
    rollout(RolloutChange::Promote(Promotion { model, version, rollout: began, from, evidence }))
}

fn end(rollout_at: u64, ending: Ending) -> Change {
    let (model, version, began) = (delay(), ModelVersion(2), EntryNumber(rollout_at));
    rollout(RolloutChange::End(End { model, version, rollout: began, ending, evidence: evidence(0) }))
}

fn hold(rollout_at: u64, by: Holder, reason: &str) -> Change {
    let (model, version, began) = (delay(), ModelVersion(2), EntryNumber(rollout_at));
    let evidence = Evidence { reasons: vec![reason.to_owned()], ..evidence(0) };
    rollout(RolloutChange::Hold(Hold { model, version, rollout: began, by, evidence }))
}

fn switch(version: u32, off: bool) -> Change {
    let switch = Switch { model: delay(), version: ModelVersion(version) };
    rollout(if off { RolloutChange::Off(switch) } else { RolloutChange::On(switch) })
}

fn promote_by_hand(version: u32, from: u32) -> Change {
    let (version, from) = (ModelVersion(version), Some(ModelVersion(from)));
    Change::Deployment(DeploymentChange::Promote { model: delay(), version, from })
}

/// Three versions on the gateways, the first champion.
fn three_active() -> State {
    let mut state = applied();
    for (version, bytes) in (1..).zip(["a", "b", "c"]) {
        make(&mut state, Change::RegisterModel(Box::new(model(bytes, "d1")))).unwrap();
        make(&mut state, prepare(version)).unwrap();
        let prepared = state.head.0;
        make(&mut state, activate(version, prepared)).unwrap();
    }
    state
}

/// A rollout of version 2 that has just begun, and the number of the entry that began it.
fn begun() -> (State, u64) {
    let mut state = three_active();
    make(&mut state, begin_with(|_| {})).unwrap();
    let rollout_at = state.head.0;
    (state, rollout_at)
}

fn deployment(state: &State) -> &Deployment {
    &state.project("flights").unwrap().deployments["delay"]
}

fn running(state: &State) -> &Rollout {
    deployment(state).rollout.as_deref().unwrap()
}

#[track_caller]
fn refused(state: &mut State, change: Change, expected: &str) {
    let head = state.head;
    let refusal = make(state, change).unwrap_err();
    assert!(refusal.contains(expected), "{refusal}");
    assert_eq!(state.head, head);
}

#[track_caller]
fn already_so(state: &mut State, change: Change) {
    let head = state.head;
    make(state, change).unwrap();
    assert_eq!(state.head, head);
}

#[test]
fn a_version_goes_through_shadow_and_canary_to_champion() {
    let (mut state, at) = begun();
    assert_eq!((running(&state).stage, running(&state).share()), (Stage::Shadow, 0));
    assert_eq!(running(&state).policy, POLICY);
    let mut from = Stage::Shadow;
    for (index, share) in [2_500, 5_000, 10_000].into_iter().enumerate() {
        let (to, judged_on) = (canary(index as u32, share), state.head.0);
        make(&mut state, step(at, from, to, evidence(judged_on))).unwrap();
        assert_eq!((running(&state).stage, running(&state).share(), running(&state).staged()), (to, share, state.head));
        from = to;
    }
    assert_eq!(running(&state).stages.len(), 4);
    assert_eq!(from.to_string(), "canary step 3 (100 %)");
    // Traffic has not moved for good before the promotion.
    assert_eq!(deployment(&state).champion_version(), Some(ModelVersion(1)));
    let judged_on = state.head.0;
    make(&mut state, promote(at, from, evidence(judged_on))).unwrap();
    let deployment = deployment(&state);
    assert_eq!(deployment.champion_version(), Some(ModelVersion(2)));
    assert_eq!(deployment.previous_version(), Some(ModelVersion(1)));
    assert_eq!(deployment.rollout, None);
    let [ended] = &deployment.ended[..] else { panic!("{:?}", deployment.ended) };
    assert_eq!((ended.ending, ended.stage, ended.begun.entry.0), (Ending::Promoted, from, at));
    assert_eq!(ended.reasons, ["all criteria are met"]);
    assert_eq!(state.without_effect, 0);

    // And back in one change, with what is said of rollbacks today.
    let (from, to) = (ModelVersion(2), ModelVersion(1));
    make(&mut state, Change::Deployment(DeploymentChange::Rollback { model: delay(), from, to })).unwrap();
    assert_eq!(self::deployment(&state).champion_version(), Some(ModelVersion(1)));
}

#[test]
fn nothing_moves_without_fresh_evidence() {
    let (mut state, at) = begun();
    let nothing = Evidence { numbers: json!({}), ..evidence(at) };
    refused(&mut state, step(at, Stage::Shadow, canary(0, 100), nothing), "moves by evidence only");
    let unexplained = Evidence { reasons: vec![], ..evidence(at) };
    refused(&mut state, promote(at, Stage::Shadow, unexplained), "moves by evidence only");
    let stale = "were judged on entry 10 of the control log, and entry 11 has changed the rollout since";
    assert_eq!(at, 11);
    refused(&mut state, step(at, Stage::Shadow, canary(0, 100), evidence(at - 1)), stale);
    let large = Evidence { numbers: json!({"x": "y".repeat(NUMBERS_BYTES_MAX)}), ..evidence(at) };
    refused(&mut state, step(at, Stage::Shadow, canary(0, 100), large), "more than 524288");
    let many = Evidence { reasons: vec![String::new(); REASONS_MAX + 1], ..evidence(at) };
    refused(&mut state, step(at, Stage::Shadow, canary(0, 100), many), "at most 32 reasons");
}

#[test]
fn steps_go_up_one_at_a_time() {
    let (mut state, at) = begun();
    for (to, text) in [
        (
            canary(1, 100),
            "after shadow of model `delay` comes a larger share, one step at a time, not canary step 2 (1 %)",
        ),
        (canary(0, 0), "(0 %)"),
        (canary(0, 10_001), "comes a larger share"),
    ] {
        refused(&mut state, step(at, Stage::Shadow, to, evidence(at)), text);
    }
    make(&mut state, step(at, Stage::Shadow, canary(0, 500), evidence(at))).unwrap();
    for to in [canary(1, 500), canary(1, 100), canary(2, 5_000), Stage::Shadow] {
        refused(&mut state, step(at, canary(0, 500), to, evidence(99)), "one step at a time");
    }
}

#[test]
fn of_two_who_advance_one_succeeds_and_of_two_who_differ_one_is_told() {
    let (mut state, at) = begun();
    let advance = step(at, Stage::Shadow, canary(0, 500), evidence(at));
    let roll_back = end(at, Ending::RolledBack);
    // Both were judged on the same head; the first is in the log, and the second is judged again.
    let mut other = state.clone();
    make(&mut state, advance.clone()).unwrap();
    already_so(&mut state, advance.clone());
    make(&mut other, roll_back.clone()).unwrap();
    already_so(&mut other, roll_back.clone());
    refused(&mut other, advance, "does not run any more: RolledBack with entry 12");
    // Going back is right whatever came between.
    make(&mut state, roll_back).unwrap();
    assert_eq!(deployment(&state).rollout, None);
    refused(&mut state, promote(at, canary(0, 500), evidence(99)), "does not run any more");
    refused(&mut state, step(at + 7, Stage::Shadow, canary(0, 1), evidence(99)), "does not run");
    // A stage that somebody else has left.
    let (mut state, at) = begun();
    make(&mut state, step(at, Stage::Shadow, canary(0, 500), evidence(at))).unwrap();
    refused(&mut state, promote(at, Stage::Shadow, evidence(99)), "is at canary step 1 (5 %) and not at shadow");
}

#[test]
fn a_person_holds_and_resumes_and_the_judge_only_tells() {
    let (mut state, at) = begun();
    make(&mut state, hold(at, Holder::Judge, "4999 of 5000 rows")).unwrap();
    already_so(&mut state, hold(at, Holder::Judge, "4999 of 5000 rows"));
    let judged_on = state.head.0;
    make(&mut state, step(at, Stage::Shadow, canary(0, 500), evidence(judged_on))).unwrap();
    assert_eq!(running(&state).held, None);

    make(&mut state, hold(at, Holder::Person, "quarter end")).unwrap();
    already_so(&mut state, hold(at, Holder::Judge, "bakes"));
    let held = "is held by ada since entry 14 of the control log (quarter end)";
    refused(&mut state, step(at, canary(0, 500), canary(1, 1_000), evidence(99)), held);
    refused(&mut state, promote(at, canary(0, 500), evidence(99)), held);
    let resume = |at: u64| {
        let (model, version, began) = (delay(), ModelVersion(2), EntryNumber(at));
        rollout(RolloutChange::Resume(Resume { model, version, rollout: began }))
    };
    make(&mut state, resume(at)).unwrap();
    already_so(&mut state, resume(at));
    make(&mut state, step(at, canary(0, 500), canary(1, 1_000), evidence(99))).unwrap();
    // A hold does not keep anybody from going back.
    make(&mut state, hold(at, Holder::Person, "again")).unwrap();
    make(&mut state, end(at, Ending::RolledBack)).unwrap();
}

#[test]
fn drift_is_acknowledged_by_feature_and_on_record() {
    let (mut state, at) = begun();
    let acknowledge = |features: &[&str]| {
        let features = features.iter().map(|feature| (*feature).to_owned()).collect();
        let (model, version, began) = (delay(), ModelVersion(2), EntryNumber(at));
        rollout(RolloutChange::Acknowledge(Acknowledge { model, version, rollout: began, features }))
    };
    make(&mut state, acknowledge(&["weather_now:temp"])).unwrap();
    already_so(&mut state, acknowledge(&["weather_now:temp"]));
    make(&mut state, acknowledge(&["weather_now:temp", "weather_now:visib"])).unwrap();
    let known: Vec<_> = running(&state).acknowledged.iter().map(|(name, fact)| (name.as_str(), fact.entry.0)).collect();
    assert_eq!(known, [("weather_now:temp", 12), ("weather_now:visib", 13)]);
    refused(&mut state, acknowledge(&[]), "name 1 to 1000 features");
    // What was judged before does not know of it.
    refused(&mut state, step(at, Stage::Shadow, canary(0, 500), evidence(at)), "entry 13 has changed the rollout");
}

#[test]
fn what_cannot_be_rolled_out_is_refused() {
    let mut state = three_active();
    type Case = (fn(&mut Begin), &'static str);
    let cases: [Case; 10] = [
        (|begin| begin.version = ModelVersion(1), "version 1 of model `delay` is champion"),
        (|begin| begin.version = ModelVersion(9), "has no version 9"),
        (|begin| begin.champion = ModelVersion(3), "is version 1 and not 3, which the rollout was planned against"),
        (|begin| begin.policy = " ".into(), "a rollout without criteria is refused"),
        (|begin| begin.policy.push(' '), "its digest is not that of its text"),
        (|begin| begin.stage = canary(1, 100), "one step at a time"),
        (|begin| begin.traffic.ranges.clear(), "between 1 and 64 ranges"),
        (|begin| begin.traffic.ranges = vec![Range { from: 0, to: 10_001 }], "at most 10000"),
        (|begin| begin.traffic.layer.clear(), "a layer and a seed"),
        (|begin| begin.evidence.reasons = vec!["x".repeat(5_000)], "reasons of 4096 bytes"),
    ];
    for (change, expected) in cases {
        refused(&mut state, begin_with(change), expected);
    }
    make(&mut state, begin_with(|begin| begin.stage = canary(0, 2_500))).unwrap();
    already_so(&mut state, begin_with(|begin| begin.stage = canary(0, 2_500)));
    let other = begin_with(|begin| begin.version = ModelVersion(3));
    refused(&mut state, other, "because that of version 2 does since entry 11");
}

#[test]
fn whoever_promotes_or_retires_by_hand_meets_the_rollout() {
    let (mut state, at) = begun();
    for version in [2, 3] {
        refused(
            &mut state,
            promote_by_hand(version, 1),
            "version 2 of model `delay` is being rolled out since entry 11",
        );
    }
    let retire =
        Change::Deployment(DeploymentChange::Retire { model: delay(), version: ModelVersion(2), previous_too: false });
    refused(&mut state, retire.clone(), "is being rolled out");
    refused(&mut state, end(at, Ending::Promoted), "Promoted is not how a rollout is ended by itself");
    make(&mut state, end(at, Ending::Abandoned)).unwrap();
    make(&mut state, promote_by_hand(3, 1)).unwrap();
    make(&mut state, retire).unwrap();
    assert_eq!(deployment(&state).ended[0].ending, Ending::Abandoned);
}

#[test]
fn a_rollback_of_the_champion_ends_what_was_compared_with_it() {
    let mut state = three_active();
    make(&mut state, promote_by_hand(3, 1)).unwrap();
    make(&mut state, begin_with(|begin| begin.champion = ModelVersion(3))).unwrap();
    let (from, to) = (ModelVersion(3), ModelVersion(1));
    make(&mut state, Change::Deployment(DeploymentChange::Rollback { model: delay(), from, to })).unwrap();
    assert_eq!(deployment(&state).champion_version(), Some(ModelVersion(1)));
    assert_eq!(deployment(&state).rollout, None);
    assert_eq!(deployment(&state).ended[0].ending, Ending::Superseded);
}

#[test]
fn off_serves_the_fallback_until_somebody_turns_it_on() {
    let (mut state, _) = begun();
    refused(&mut state, switch(2, true), "is version 1 and not version 2 any more");
    make(&mut state, switch(1, true)).unwrap();
    already_so(&mut state, switch(1, true));
    assert!(deployment(&state).off.is_some());
    assert_eq!(deployment(&state).ended[0].ending, Ending::TurnedOff);
    refused(&mut state, begin_with(|_| {}), "is off since entry 12");
    make(&mut state, switch(1, false)).unwrap();
    already_so(&mut state, switch(1, false));
    assert_eq!(deployment(&state).off, None);
    // A promotion turns it on too, also of the version that was champion.
    make(&mut state, switch(1, true)).unwrap();
    make(&mut state, promote_by_hand(1, 1)).unwrap();
    assert_eq!((deployment(&state).off.clone(), deployment(&state).previous_version()), (None, None));
}

#[test]
fn models_of_one_layer_do_not_share_buckets() {
    let (state, at) = begun();
    let deployments = &state.project("flights").unwrap().deployments;
    let other = |layer: &str, from: u16| Begin {
        model: ModelName::try_new("fares").unwrap(),
        version: ModelVersion(2),
        champion: ModelVersion(1),
        policy: POLICY.to_owned(),
        policy_sha256: Sha256::of(POLICY.as_bytes()),
        traffic: Traffic { layer: layer.into(), seed: "2".into(), ranges: vec![Range { from, to: 10_000 }] },
        stage: Stage::Shadow,
        evidence: evidence(at),
    };
    let taken = buckets_taken(deployments, &other("delay", 9_999)).unwrap_err();
    assert!(taken.to_string().contains("layer `delay` has buckets that the rollout of model `delay` owns"), "{taken}");
    assert_eq!(buckets_taken(deployments, &other("fares", 0)), Ok(()));
}

/// Entries that came by other ways than being judged: they change nothing where they do not fit, and stop nothing.
#[test]
fn entries_that_do_not_fit_are_without_effect() {
    let (mut state, at) = begun();
    let before = deployment(&state).clone();
    let changes = [
        step(at, canary(0, 1), canary(1, 2), evidence(0)),
        step(at + 1, Stage::Shadow, canary(0, 1), evidence(0)),
        promote(at + 1, Stage::Shadow, evidence(0)),
        end(at + 1, Ending::Expired),
        begin_with(|_| {}),
        switch(2, true),
        switch(1, false),
    ];
    let count = changes.len() as u64;
    let kinds =
        ["rollout_step", "rollout_step", "model_promote", "rollout_end", "rollout_begin", "model_off", "model_on"];
    for (change, kind) in changes.into_iter().zip(kinds) {
        let Change::Deployment(DeploymentChange::Rollout(change)) = change else { unreachable!() };
        let body = match &change {
            RolloutChange::Begin(body) => serde_json::to_value(body),
            RolloutChange::Step(body) => serde_json::to_value(body),
            RolloutChange::Promote(body) => serde_json::to_value(body),
            RolloutChange::End(body) => serde_json::to_value(body),
            RolloutChange::Off(body) | RolloutChange::On(body) => serde_json::to_value(body),
            other => panic!("{other:?}"),
        };
        let entry = entry_of(&state, kind, true, body.unwrap());
        state.apply(&entry).unwrap();
    }
    assert_eq!(*deployment(&state), before);
    assert_eq!(state.without_effect, count);
}

#[test]
fn a_kind_from_the_future_stops_changes_and_not_serving() {
    let (mut state, at) = begun();
    make(&mut state, step(at, Stage::Shadow, canary(0, 500), evidence(at))).unwrap();
    let future = entry_of(&state, "rollout_teleport", true, json!({"model": "delay"}));
    state.apply(&future).unwrap();
    assert_eq!(running(&state).share(), 500);
    let refusal = state.judge(&flights(), &end(at, Ending::RolledBack)).unwrap_err();
    assert!(refusal.to_string().contains("`rollout_teleport`, which this build does not know"), "{refusal}");
}

#[test]
fn the_state_survives_being_written_and_read() {
    let (mut state, at) = begun();
    make(&mut state, hold(at, Holder::Person, "x")).unwrap();
    make(&mut state, end(at, Ending::Expired)).unwrap();
    make(&mut state, begin_with(|begin| begin.stage = canary(0, 100))).unwrap();
    let text = serde_json::to_string(&state).unwrap();
    assert_eq!(serde_json::from_str::<State>(&text).unwrap(), state);
    // An older body of a promotion has no evidence.
    let judgement = three_active().judge(&flights(), &promote_by_hand(2, 1)).unwrap();
    let Judgement::Append { body, .. } = judgement else { panic!() };
    assert_eq!(body, json!({"model": "delay", "version": 2}));
}

#[test]
fn only_a_few_ended_rollouts_are_remembered() {
    let mut state = three_active();
    for _ in 0..ENDED_MAX + 3 {
        make(&mut state, begin_with(|_| {})).unwrap();
        let at = state.head.0;
        make(&mut state, end(at, Ending::Abandoned)).unwrap();
    }
    assert_eq!(deployment(&state).ended.len(), ENDED_MAX);
    assert_eq!(deployment(&state).ended.last().unwrap().fact.entry, state.head);
}

#[test]
fn the_champion_before_is_kept_for_a_time() {
    use chrono::TimeDelta;
    let mut state = three_active();
    let champion = |state: &State| deployment(state).champion.clone().unwrap();
    assert_eq!(champion(&state).previous_kept_until(TimeDelta::hours(24)), None);
    make(&mut state, promote_by_hand(2, 1)).unwrap();
    let champion = champion(&state);
    assert_eq!(champion.previous_kept_until(TimeDelta::hours(24)), Some(champion.fact.at + TimeDelta::hours(24)));
    assert_eq!(champion.previous_kept_until(TimeDelta::MAX), None);
}
