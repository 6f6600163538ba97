use super::*;
use crate::sequential::evidence::{DriftEvidence, FirstBad, Opened, StepEvidence};
use crate::sequential::hard::Broken;
use crate::sequential::policy::PolicyError;

const HOUR: i64 = 3_600_000_000;
const DAY: i64 = 24 * HOUR;

/// As the project's example declares it.
fn policy() -> Policy {
    Policy {
        shadow: Some(ShadowPolicy {
            min_rows: 5_000,
            max_skew_rows: 0,
            drift: DriftRule::Hold,
            max_flip_rate: Some(0.02),
            max_forward_ratio: Some(1.2),
            ends_after_us: 14 * DAY,
        }),
        canary: Some(CanaryPolicy {
            unit: "aircraft".into(),
            steps: vec![2_500, 5_000, 10_000],
            bake_us: HOUR,
            min_units: 100,
            ends_after_us: 14 * DAY,
            success: vec![log_loss(Needs::NotWorseBy(0.1))],
            whole_weeks: false,
            blackouts: vec![],
        }),
        guardrails: vec![
            Guardrail::declared("error_rate < 0.5%", "error_rate", Side::Below, 0.005),
            Guardrail::declared("p99 < 60ms", "p99", Side::Below, 0.06),
        ],
        ..serde_json::from_str("{}").unwrap()
    }
}

fn log_loss(needs: Needs) -> Success {
    let (metric, range) = ("log_loss".to_owned(), (0.0, 4.0));
    Success { metric, lower_is_better: true, needs, range, centre: 0.4, shape: Shape::Mean }
}

fn passed_shadow() -> ShadowEvidence {
    ShadowEvidence {
        begun_us: 0,
        rows: 6_000,
        audited_rows: 6_000,
        drift: DriftEvidence { verdict: DriftVerdict::Stable, ..DriftEvidence::default() },
        flips: Tally::of_events(2, 3_000),
        slower: Tally::of_events(300, 3_000),
        guardrails: vec![arms(0, 3_000, 0, 3_000), arms(3, 3_000, 3, 3_000)],
        ..ShadowEvidence::default()
    }
}

fn arms(challenger: u64, of_challenger: u64, champion: u64, of_champion: u64) -> ByArm {
    ByArm { challenger: Tally::of_events(challenger, of_challenger), champion: Tally::of_events(champion, of_champion) }
}

/// Losses around `mean` of so many units.
fn losses(mean: f64, units: u64) -> Tally {
    let mut tally = Tally::default();
    for unit in 0..units {
        let metric = log_loss(Needs::Better);
        tally.add(metric.scaled(mean + 0.2 * ((unit % 5) as f64 - 2.0) / 2.0));
    }
    tally
}

/// A canary at a step, with as many errors of the challenger, and losses by arm; all units are counted at that step.
fn canary_at(step: usize, units: u64, errors: u64, loss: (f64, f64)) -> CanaryEvidence {
    let share = policy().canary.unwrap().steps[step];
    // The comparison comes from a step that has both arms.
    let (share, challenger, champion) = if share == 10_000 {
        (5_000, units, units)
    } else {
        (share, units, units * u64::from(10_000 - share) / u64::from(share))
    };
    let metrics = vec![
        arms(errors, challenger, 0, champion),
        arms(0, challenger, 0, champion),
        ByArm { challenger: losses(loss.0, challenger), champion: losses(loss.1, champion) },
    ];
    let opened = Opened { challenger, champion };
    let counted = StepEvidence { share, of: 10_000, opened, fresh: metrics.clone(), all: metrics };
    CanaryEvidence { step, steps: vec![counted], ..CanaryEvidence::default() }
}

#[track_caller]
fn check(judgement: &Judgement, decision: Decision, reason: &str) {
    assert_eq!(judgement.decision, decision, "{judgement:#?}");
    assert!(judgement.reasons.iter().any(|text| text.contains(reason)), "{:#?}", judgement.reasons);
}

#[track_caller]
fn verdict(judgement: &Judgement, name: &str) -> Verdict {
    judgement
        .criteria
        .iter()
        .find(|criterion| criterion.name == name)
        .unwrap_or_else(|| panic!("{judgement:#?}"))
        .verdict
}

#[test]
fn shadow_advances_when_everything_is_met() {
    let judgement = shadow(&policy(), &passed_shadow(), DAY);
    check(&judgement, Decision::Advance { to: 0 }, "all shadow criteria are met");
    // Higher scores are told and stop nothing.
    let mut higher = Tally::default();
    (0..1_000).for_each(|unit| higher.add((0.2 + 0.05 * f64::from(unit % 2) + 1.0) / 2.0));
    let judgement = shadow(&policy(), &ShadowEvidence { score_difference: higher, ..passed_shadow() }, DAY);
    check(&judgement, Decision::Advance { to: 0 }, "");
    let told = judgement.criteria.iter().find(|criterion| criterion.name == "score_difference").unwrap();
    let (low, high) = told.interval.unwrap();
    assert!((told.estimate.unwrap() - 0.225).abs() < 1e-6 && low > 0.2 && high < 0.25, "{told:?}");
}

#[test]
fn shadow_waits_for_what_is_missing() {
    let evidence = ShadowEvidence { rows: 4_999, ..passed_shadow() };
    check(&shadow(&policy(), &evidence, DAY), Decision::Hold, "4999 of 5000 rows scored by both");
    // None of 300 units flipped: that is less than 2 % by one look, not yet by any number of looks.
    let evidence = ShadowEvidence { flips: Tally::of_events(0, 150), ..passed_shadow() };
    check(&shadow(&policy(), &evidence, DAY), Decision::Hold, "`decision flips < 2.00 %` is open: 0.00 % of 150 units");
    let evidence = ShadowEvidence { rows: 10, shed: 30, ..passed_shadow() };
    let shed = "10 of 5000 rows scored by both versions; 30 more were shed (75.00 % of what was offered)";
    check(&shadow(&policy(), &evidence, DAY), Decision::Hold, shed);
    let evidence = ShadowEvidence { audited_rows: 10, ..passed_shadow() };
    check(&shadow(&policy(), &evidence, DAY), Decision::Hold, "0 of 10 audited rows are skewed (at most 25.89 %");
}

#[test]
fn one_skewed_row_stops_and_names_its_feature_and_minute() {
    let first_bad = Some(FirstBad { feature: "airport_load:departures_1h".into(), minute_us: 1_372_662_060_000_000 });
    let evidence = ShadowEvidence { skew_rows: 1, first_bad, ..passed_shadow() };
    let judgement = shadow(&policy(), &evidence, DAY);
    check(&judgement, Decision::Stop, "feature airport_load:departures_1h first, from 2013-07-01T07:01:00Z");
    assert_eq!(verdict(&judgement, "skew"), Verdict::Breached);
}

#[test]
fn drift_holds_until_it_is_acknowledged_and_never_stops() {
    let features = vec!["weather_now:temp".to_owned()];
    let mut drift = DriftEvidence { verdict: DriftVerdict::Drift, features: features.clone(), acknowledged: vec![] };
    let judge =
        |drift: &DriftEvidence| shadow(&policy(), &ShadowEvidence { drift: drift.clone(), ..passed_shadow() }, DAY);
    check(&judge(&drift), Decision::Hold, "inputs have drifted (weather_now:temp)");
    assert_eq!(verdict(&judge(&drift), "drift"), Verdict::Shared);
    drift.acknowledged = features;
    check(&judge(&drift), Decision::Advance { to: 0 }, "");
    // Another feature drifts afterwards.
    drift.features.push("weather_now:visib".to_owned());
    check(&judge(&drift), Decision::Hold, "weather_now:visib");
    drift.acknowledged.push(ALL_FEATURES.to_owned());
    check(&judge(&drift), Decision::Advance { to: 0 }, "");

    let mut unknown = DriftEvidence { verdict: DriftVerdict::InsufficientData, ..DriftEvidence::default() };
    check(&judge(&unknown), Decision::Hold, "too little is known of drift yet");
    unknown.acknowledged.push(ALL_FEATURES.to_owned());
    check(&judge(&unknown), Decision::Advance { to: 0 }, "");
    check(&judge(&DriftEvidence::default()), Decision::Hold, "too little is known of drift yet");
}

#[test]
fn flips_slowness_and_errors_stop_a_version_in_shadow() {
    let evidence = ShadowEvidence { flips: Tally::of_events(200, 3_000), ..passed_shadow() };
    check(&shadow(&policy(), &evidence, DAY), Decision::Stop, "`decision flips < 2.00 %` is breached: 6.67 %");
    let evidence = ShadowEvidence { slower: Tally::of_events(2_900, 3_000), ..passed_shadow() };
    check(
        &shadow(&policy(), &evidence, DAY),
        Decision::Stop,
        "within 1.2 times the champion's forward pass` is breached",
    );
    let rails = vec![arms(150, 3_000, 5, 3_000), arms(3, 3_000, 3, 3_000)];
    let evidence = ShadowEvidence { guardrails: rails, ..passed_shadow() };
    check(&shadow(&policy(), &evidence, DAY), Decision::Stop, "`error_rate < 0.5%` is breached: 5.00 % of 3000 units");
}

#[test]
fn a_worse_loss_on_the_same_rows_stops_before_users_meet_it() {
    let mut worse = Tally::default();
    for unit in 0..2_000 {
        // Half a nat worse, give or take.
        worse.add((0.5 / 4.0 + 0.1 * (f64::from(unit % 3) - 1.0) + 1.0) / 2.0);
    }
    let evidence = ShadowEvidence { paired: vec![worse], ..passed_shadow() };
    check(
        &shadow(&policy(), &evidence, DAY),
        Decision::Stop,
        "`log_loss (same rows)` is breached: challenger less champion 0.4998",
    );
    // No labels yet: that is no reason to wait in shadow.
    let evidence = ShadowEvidence { paired: vec![Tally::default()], ..passed_shadow() };
    check(&shadow(&policy(), &evidence, DAY), Decision::Advance { to: 0 }, "");
}

#[test]
fn shadow_ends_with_its_time_and_without_a_canary_waits_for_a_person() {
    let evidence = ShadowEvidence { rows: 10, ..passed_shadow() };
    let judgement = shadow(&policy(), &evidence, 14 * DAY);
    check(&judgement, Decision::End, "ended at 1970-01-15T00:00:00Z; the champion stays");
    check(&judgement, Decision::End, "10 of 5000 rows");
    let alone = Policy { canary: None, ..policy() };
    check(&shadow(&alone, &passed_shadow(), DAY), Decision::Hold, "somebody has to promote it");
}

#[test]
fn a_canary_goes_from_step_to_step_and_is_promoted() {
    let evidence = canary_at(0, 300, 0, (0.4, 0.4));
    check(&canary(&policy(), &evidence, 2 * HOUR), Decision::Advance { to: 1 }, "no guardrail is breached");
    check(&canary(&policy(), &canary_at(0, 99, 0, (0.4, 0.4)), 2 * HOUR), Decision::Hold, "99 of 100 units");
    let few = CanaryEvidence { without_unit: 7, ..canary_at(0, 99, 0, (0.4, 0.4)) };
    check(&canary(&policy(), &few, 2 * HOUR), Decision::Hold, "7 rows named no unit and are left out");
    check(&canary(&policy(), &evidence, HOUR / 2), Decision::Hold, "bakes until 1970-01-01T01:00:00Z");

    // The last step wants all met.
    let judgement = canary(&policy(), &canary_at(2, 300, 0, (0.4, 0.4)), 2 * HOUR);
    check(&judgement, Decision::Hold, "`error_rate < 0.5%` is open: 0.00 % of 300 units");
    let judgement = canary(&policy(), &canary_at(2, 3_000, 0, (0.4, 0.4)), 2 * HOUR);
    check(&judgement, Decision::Promote, "all criteria of the last step are met");
    assert_eq!(verdict(&judgement, "log_loss"), Verdict::Met);
    let text = serde_json::to_string(&judgement).unwrap();
    assert_eq!(serde_json::from_str::<Judgement>(&text).unwrap(), judgement);
}

#[test]
fn a_breach_rolls_back_at_any_step_unless_the_champion_shares_it() {
    let judgement = canary(&policy(), &canary_at(0, 300, 30, (0.4, 0.4)), 1);
    check(&judgement, Decision::RollBack, "`error_rate < 0.5%` is breached: 10.00 % of 300 units");
    assert_eq!(verdict(&judgement, "error_rate < 0.5%"), Verdict::Breached);

    let mut evidence = canary_at(0, 300, 30, (0.4, 0.4));
    evidence.steps[0].all[0].champion = Tally::of_events(90, 900);
    let judgement = canary(&policy(), &evidence, 2 * HOUR);
    check(&judgement, Decision::Hold, "breached by the champion too");
    assert_eq!(verdict(&judgement, "error_rate < 0.5%"), Verdict::Shared);
}

#[test]
fn a_worse_primary_metric_rolls_back_and_no_difference_is_not_better() {
    let judgement = canary(&policy(), &canary_at(1, 3_000, 0, (0.7, 0.4)), 2 * HOUR);
    check(&judgement, Decision::RollBack, "`log_loss` is breached: challenger less champion 0.3000");

    let mut better = policy();
    better.canary.as_mut().unwrap().success = vec![log_loss(Needs::Better)];
    let judgement = canary(&better, &canary_at(2, 3_000, 0, (0.4, 0.4)), 2 * HOUR);
    check(&judgement, Decision::Hold, "`log_loss` is open");
    check(&canary(&better, &canary_at(2, 3_000, 0, (0.3, 0.4)), 2 * HOUR), Decision::Promote, "");
    let judgement = canary(&better, &canary_at(2, 3_000, 0, (0.4, 0.4)), 15 * DAY);
    check(&judgement, Decision::End, "the time for the canary ended");
}

#[test]
fn other_metrics_are_told_and_stop_nothing() {
    let mut two = policy();
    let accuracy = Success {
        metric: "accuracy".into(),
        lower_is_better: false,
        needs: Needs::Better,
        range: (0.0, 1.0),
        centre: 0.8,
        shape: Shape::Rate,
    };
    two.canary.as_mut().unwrap().success.push(accuracy);
    let mut evidence = canary_at(2, 3_000, 0, (0.4, 0.4));
    let worse = arms(1_500, 3_000, 2_400, 3_000);
    evidence.steps[0].fresh.push(worse);
    evidence.steps[0].all.push(worse);
    let judgement = canary(&two, &evidence, 2 * HOUR);
    check(&judgement, Decision::Promote, "");
    assert_eq!(verdict(&judgement, "accuracy"), Verdict::Open);
    *evidence.steps[0].fresh.last_mut().unwrap() = arms(2_900, 3_000, 2_400, 3_000);
    assert_eq!(verdict(&canary(&two, &evidence, 2 * HOUR), "accuracy"), Verdict::Met);
}

#[test]
fn a_wrong_split_holds() {
    let mut evidence = canary_at(0, 3_000, 0, (0.4, 0.4));
    evidence.steps[0].opened.challenger = 2_400;
    let judgement = canary(&policy(), &evidence, 2 * HOUR);
    check(
        &judgement,
        Decision::Hold,
        "units are not split as declared, 21.05 % of 11400 units where 25.00 % are declared",
    );
    // What is breached is rolled back even so.
    evidence.steps[0].all[0].challenger = Tally::of_events(300, 2_400);
    check(&canary(&policy(), &evidence, 2 * HOUR), Decision::RollBack, "error_rate");
}

#[test]
fn hard_rules_need_no_units() {
    let broken = Broken { rule: "nan_rate".into(), rows: 20, events: 20, text: "20 of 20 rows had no scores".into() };
    let evidence = CanaryEvidence { broken: vec![broken.clone()], ..CanaryEvidence::default() };
    check(&canary(&policy(), &evidence, 1), Decision::RollBack, "20 of 20 rows");
    let evidence = ShadowEvidence { broken: vec![broken], ..ShadowEvidence::default() };
    check(&shadow(&policy(), &evidence, 1), Decision::Stop, "20 of 20 rows");
}

#[test]
fn blackouts_and_weeks_delay_but_do_not_keep_from_rolling_back() {
    let mut calendar = policy();
    let rules = calendar.canary.as_mut().unwrap();
    (rules.blackouts, rules.whole_weeks) = (vec![(8 * DAY, 9 * DAY)], true);
    let good = canary_at(2, 3_000, 0, (0.4, 0.4));
    check(&canary(&calendar, &good, 3 * DAY), Decision::Hold, "whole weeks, until 1970-01-08T00:00:00Z");
    check(&canary(&calendar, &good, 7 * DAY + HOUR), Decision::Promote, "");
    check(&canary(&calendar, &good, 8 * DAY + HOUR), Decision::Hold, "in a blackout, until 1970-01-10T00:00:00Z");
    check(&canary(&calendar, &good, 10 * DAY), Decision::Hold, "whole weeks, until 1970-01-15T00:00:00Z");
    check(&canary(&calendar, &canary_at(2, 3_000, 300, (0.4, 0.4)), 8 * DAY), Decision::RollBack, "error_rate");
}

#[test]
fn nothing_is_judged_before_the_first_unit() {
    let judgement = canary(&policy(), &CanaryEvidence::default(), 2 * HOUR);
    check(&judgement, Decision::Hold, "0 of 100 units");
    let judgement = shadow(&policy(), &ShadowEvidence::default(), 2 * HOUR);
    check(&judgement, Decision::Hold, "no unit is counted yet");
}

#[test]
fn policies_that_cannot_be_judged_are_refused() {
    #[track_caller]
    fn refused(change: impl Fn(&mut Policy), reason: &str) {
        let mut policy = policy();
        change(&mut policy);
        let error = policy.check().unwrap_err();
        assert!(error.to_string().contains(reason), "{error}");
    }
    assert_eq!(policy().check(), Ok(()));
    refused(|policy| (policy.shadow, policy.canary) = (None, None), "a rollout without criteria is refused");
    let canary = |change: fn(&mut CanaryPolicy)| move |policy: &mut Policy| change(policy.canary.as_mut().unwrap());
    refused(canary(|canary| canary.ends_after_us = 0), "canary.ends_after");
    refused(canary(|canary| canary.steps = vec![500, 100]), "ascending");
    refused(canary(|canary| canary.steps = vec![]), "ascending");
    refused(canary(|canary| canary.steps = vec![10_000]), "leave the champion some units");
    refused(canary(|canary| canary.success[0].range = (1.0, f64::NAN)), "two numbers");
    refused(canary(|canary| canary.success[0].needs = Needs::NotWorseBy(-1.0)), "margin");
    refused(|policy| policy.guardrails[0].bound = 0.0, "error_rate < 0.5%");
    refused(|policy| policy.alpha = f64::NAN, "alpha");
    let mut nothing = policy();
    (nothing.guardrails, nothing.canary.as_mut().unwrap().success) = (vec![], vec![]);
    assert_eq!(nothing.check(), Err(PolicyError::NothingToJudge));
}

#[test]
fn percentiles_are_shares_of_slower_rows() {
    let rail = Guardrail::declared("p95 < 60ms", "p95", Side::Below, 0.06);
    assert_eq!((rail.bound, rail.measure), (0.05, super::super::policy::Measure::SlowerThan(0.06)));
}

#[test]
fn what_gateways_count_in_shadow_is_what_is_judged() {
    use crate::sequential::exposure::{Arm, Exposure, Exposures, Options};
    use crate::sequential::policy::{ShadowMetric, paired};
    let policy = policy();
    let mut exposures = Exposures::new(Options { window_us: 10, open_max: 10_000 });
    for unit in 0..3_000_u64 {
        let score = |arm: f64| 0.2 + 0.001 * arm + 0.1 * (unit % 7) as f64 / 7.0;
        let outcome = |metric: &ShadowMetric| match metric {
            ShadowMetric::Flip => f64::from(u8::from(unit % 1_000 == 0)),
            ShadowMetric::Slower => f64::from(u8::from(unit % 10 == 0)),
            ShadowMetric::ScoreDifference => paired(score(1.0), score(0.0)),
            ShadowMetric::ChallengerGuardrail(index) => f64::from(u8::from(*index == 1 && unit % 500 == 0)),
            ShadowMetric::ChampionGuardrail(_) => 0.0,
            ShadowMetric::SuccessDifference(_) => paired(0.25, 0.3),
        };
        let metrics = policy.shadow_metrics();
        let outcomes: Vec<(usize, f64)> = metrics.iter().map(outcome).enumerate().collect();
        let exposure = Exposure { unit: unit + 1, bucket: 0, arm: Arm::Challenger, step: 5, now_us: unit as i64 };
        exposures.record(exposure, &outcomes);
    }
    exposures.close(i64::MAX);
    let mut evidence = ShadowEvidence {
        rows: 6_000,
        audited_rows: 6_000,
        drift: DriftEvidence { verdict: DriftVerdict::Stable, ..DriftEvidence::default() },
        ..ShadowEvidence::default()
    };
    evidence.count(&policy, exposures.counts(), 5);
    assert_eq!((evidence.flips, evidence.slower), (Tally::of_events(3, 3_000), Tally::of_events(300, 3_000)));
    assert_eq!(evidence.guardrails, [arms(0, 3_000, 0, 3_000), arms(6, 3_000, 0, 3_000)]);
    let judgement = shadow(&policy, &evidence, DAY);
    check(&judgement, Decision::Advance { to: 0 }, "");
    let told = judgement.criteria.iter().find(|criterion| criterion.name == "log_loss (same rows)").unwrap();
    // On the scale of 0 to 4.
    assert!((told.estimate.unwrap() + 0.2).abs() < 1e-5 && told.verdict == Verdict::Met, "{told:?}");
    let told = judgement.criteria.iter().find(|criterion| criterion.name == "score_difference").unwrap();
    assert!((told.estimate.unwrap() - 0.001).abs() < 1e-6, "{told:?}");
    let mut many = policy.clone();
    many.guardrails = vec![many.guardrails[0].clone(); 15];
    assert!(many.check().unwrap_err().to_string().contains("at most 32 are counted"));
}
