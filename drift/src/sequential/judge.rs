//! The verdict on each criterion of a rollout, and what is to be done. A pure function of the policy that was pinned, what was
//! counted, and the time: any gateway may judge, and two that judge the same counts agree.
//!
//! What each verdict means is the same everywhere: a bound is `Met` when the confidence sequence lies within it, `Breached`
//! when it lies beyond, `Open` while it straddles. A breach that the champion shares is `Shared`: something is wrong with the
//! world, not with the challenger, so the rollout holds.

use serde::{Deserialize, Serialize};

use super::bets::{Shape, Sums};
use super::correction::{benjamini_hochberg, holm};
use super::difference::Stratum;
use super::evidence::{ByArm, CanaryEvidence, DriftVerdict, ShadowEvidence};
use super::policy::{CanaryPolicy, DriftRule, Guardrail, Needs, Policy, ShadowPolicy, Side, Success};
use super::tally::Tally;
use super::{difference, mean, sample_ratio};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Breached,
    /// Breached by both arms.
    Shared,
    Open,
    Met,
}

/// What is to be done now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    /// Nothing: the reasons say what is waited for.
    Hold,
    /// Shadow is passed, or the next step is due: `to` is the index of the canary's step.
    Advance { to: usize },
    /// The last step is passed.
    Promote,
    /// Traffic goes back to the champion.
    RollBack,
    /// As `RollBack`, of a version in shadow, which has no traffic.
    Stop,
    /// The time is over and the criteria are not shown to be met; the champion stays.
    End,
}

/// One criterion with its numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Criterion {
    /// As declared, or by name: `p99 < 60ms`, `log_loss`, `sample_ratio`, `min_units`.
    pub name: String,
    pub verdict: Verdict,
    /// Units (rows, where a criterion counts rows) that it rests on.
    pub units: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub estimate: Option<f64>,
    /// The confidence sequence, each end with the policy's alpha.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<(f64, f64)>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bound: Option<f64>,
    /// The champion's estimate beside it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub champion: Option<f64>,
    pub text: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Judgement {
    pub decision: Decision,
    /// Why, most important first.
    pub reasons: Vec<String>,
    pub criteria: Vec<Criterion>,
}

impl Criterion {
    fn new(name: &str, verdict: Verdict, units: u64, text: String) -> Criterion {
        let name = name.to_owned();
        Criterion { name, verdict, units, estimate: None, interval: None, bound: None, champion: None, text }
    }
}

/// Judges a version in shadow.
pub fn shadow(policy: &Policy, evidence: &ShadowEvidence, now_us: i64) -> Judgement {
    let Some(rules) = &policy.shadow else {
        return hold_without("the rollout has no shadow criteria");
    };
    let mut drafts = Vec::new();
    if let Some(rate) = rules.max_flip_rate {
        let name = format!("decision flips < {}", percent(rate));
        drafts.push(bounded(&name, evidence.flips.sums(), rate, Side::Below, Shape::Rate, policy.alpha));
    }
    if let Some(ratio) = rules.max_forward_ratio {
        let name = format!("half of the rows within {ratio} times the champion's forward pass");
        drafts.push(bounded(&name, evidence.slower.sums(), 0.5, Side::Below, Shape::Rate, policy.alpha));
    }
    let nothing = ByArm::default();
    drafts.extend(guardrails(policy, |metric| *evidence.guardrails.get(metric).unwrap_or(&nothing)));
    drafts.extend(paired(policy, evidence));
    let mut criteria = vec![scored(rules, evidence), skew(rules, evidence, policy.alpha), drift(rules, evidence)];
    criteria.extend(settled(drafts, policy.alpha));
    criteria.push(score_difference(evidence, policy.alpha));

    let breached = texts(&criteria, &[Verdict::Breached]);
    // The last guardrails wait for traffic of their own; in shadow they must only not be breached.
    let waits = |criterion: &&Criterion| match criterion.verdict {
        Verdict::Met => false,
        Verdict::Open => !policy.guardrails.iter().any(|rail| rail.text == criterion.name) && !is_paired(criterion),
        Verdict::Breached | Verdict::Shared => true,
    };
    let waiting: Vec<String> = criteria.iter().filter(waits).map(|criterion| criterion.text.clone()).collect();
    let (decision, reasons) = if let Some(broken) = first_broken(&evidence.broken) {
        (Decision::Stop, vec![broken])
    } else if !breached.is_empty() {
        (Decision::Stop, breached)
    } else if let Some(over) = over("shadow", evidence.begun_us, rules.ends_after_us, now_us) {
        (Decision::End, [vec![over], waiting].concat())
    } else if !waiting.is_empty() {
        (Decision::Hold, waiting)
    } else {
        match &policy.canary {
            Some(canary) => match canary.blackout_until(now_us) {
                Some(until) => (Decision::Hold, vec![blackout(until)]),
                None => (Decision::Advance { to: 0 }, vec!["all shadow criteria are met".to_owned()]),
            },
            None => {
                let reason = "all shadow criteria are met; the model declares no canary, so somebody has to promote it";
                (Decision::Hold, vec![reason.to_owned()])
            }
        }
    };
    Judgement { decision, reasons, criteria }
}

/// Judges a version that has traffic.
pub fn canary(policy: &Policy, evidence: &CanaryEvidence, now_us: i64) -> Judgement {
    let Some(rules) = &policy.canary else {
        return hold_without("the rollout has no canary criteria");
    };
    let mut drafts = guardrails(policy, |metric| evidence.all(metric));
    drafts.extend(success(policy, rules, evidence));
    let settled = settled(drafts, policy.alpha);
    let (rails, success) = settled.split_at(policy.guardrails.len());
    let primary = success.get(..1).unwrap_or_default();
    let split = split(policy, evidence);
    let units = evidence.challenger_units(policy);
    let mut enough = at_least("min_units", units, rules.min_units, "units of the challenger counted");
    if evidence.without_unit > 0 {
        enough.text += &format!("; {} rows named no unit and are left out", evidence.without_unit);
    }
    let last = evidence.step + 1 >= rules.steps.len();

    let breached = [texts(rails, &[Verdict::Breached]), texts(primary, &[Verdict::Breached])].concat();
    let mut waiting = texts(rails, &[Verdict::Shared]);
    waiting.extend(texts(std::slice::from_ref(&split), &[Verdict::Breached]));
    waiting.extend(texts(std::slice::from_ref(&enough), &[Verdict::Open]));
    let baked = evidence.step_begun_us.saturating_add(rules.bake_us);
    if now_us < baked {
        waiting.push(format!("the step bakes until {}", time(baked)));
    }
    if let Some(until) = rules.blackout_until(now_us) {
        waiting.push(blackout(until));
    }
    if last {
        waiting.extend(texts(rails, &[Verdict::Open]));
        waiting.extend(texts(primary, &[Verdict::Open]));
        if let Some(until) = rules.week_over(evidence.begun_us, now_us) {
            waiting.push(format!("a promotion waits for whole weeks, until {}", time(until)));
        }
    }
    let (decision, reasons) = if let Some(broken) = first_broken(&evidence.broken) {
        (Decision::RollBack, vec![broken])
    } else if !breached.is_empty() {
        (Decision::RollBack, breached)
    } else if let Some(over) = over("canary", evidence.begun_us, rules.ends_after_us, now_us) {
        (Decision::End, [vec![over], waiting].concat())
    } else if !waiting.is_empty() {
        (Decision::Hold, waiting)
    } else if last {
        (Decision::Promote, vec!["all criteria of the last step are met".to_owned()])
    } else {
        let reason = "no guardrail is breached, and the step has baked with enough units";
        (Decision::Advance { to: evidence.step + 1 }, vec![reason.to_owned()])
    };
    let criteria = [rails, success, &[split, enough]].concat();
    Judgement { decision, reasons, criteria }
}

fn hold_without(reason: &str) -> Judgement {
    Judgement { decision: Decision::Hold, reasons: vec![reason.to_owned()], criteria: Vec::new() }
}

fn texts(criteria: &[Criterion], verdicts: &[Verdict]) -> Vec<String> {
    let chosen = criteria.iter().filter(|criterion| verdicts.contains(&criterion.verdict));
    chosen.map(|criterion| criterion.text.clone()).collect()
}

fn first_broken(broken: &[super::hard::Broken]) -> Option<String> {
    broken.first().map(|broken| broken.text.clone())
}

fn at_least(name: &str, found: u64, wanted: u64, what: &str) -> Criterion {
    let verdict = if found >= wanted { Verdict::Met } else { Verdict::Open };
    Criterion::new(name, verdict, found, format!("{found} of {wanted} {what}"))
}

fn scored(rules: &ShadowPolicy, evidence: &ShadowEvidence) -> Criterion {
    let mut criterion = at_least("min_rows", evidence.rows, rules.min_rows, "rows scored by both versions");
    let offered = evidence.rows.saturating_add(evidence.shed);
    if evidence.shed > 0 {
        let share = percent(evidence.shed as f64 / offered as f64);
        criterion.text += &format!("; {} more were shed ({share} of what was offered)", evidence.shed);
    }
    criterion
}

/// Told only: a better model may well score otherwise.
fn score_difference(evidence: &ShadowEvidence, alpha: f64) -> Criterion {
    let sums = evidence.score_difference.sums();
    let back = |x: f64| 2.0 * x - 1.0;
    let estimate = sums.mean().map(back);
    let interval = (back(mean::lower(&sums, alpha, Shape::Mean)), back(mean::upper(&sums, alpha, Shape::Mean)));
    let text = match estimate {
        Some(estimate) => format!("score on the same rows: {}", less(estimate, interval, sums.units)),
        None => "no score is compared yet".to_owned(),
    };
    let criterion = Criterion::new("score_difference", Verdict::Met, sums.units as u64, text);
    Criterion { estimate, interval: Some(interval), ..criterion }
}

/// Any row beyond the allowed ones stops: there is no noise in bits.
fn skew(rules: &ShadowPolicy, evidence: &ShadowEvidence, alpha: f64) -> Criterion {
    let (found, rows) = (evidence.skew_rows, evidence.audited_rows);
    let bound = mean::upper_of_count(found.min(rows), rows, alpha);
    let verdict = if found > rules.max_skew_rows {
        Verdict::Breached
    } else if rows >= rules.min_rows.max(1) {
        Verdict::Met
    } else {
        Verdict::Open
    };
    let place = match &evidence.first_bad {
        Some(bad) if found > 0 => format!("; feature {} first, from {}", bad.feature, time(bad.minute_us)),
        _ => String::new(),
    };
    let text = format!(
        "{found} of {rows} audited rows are skewed (at most {} with {} confidence; allowed {}){place}",
        percent(bound),
        percent(1.0 - alpha),
        rules.max_skew_rows
    );
    Criterion {
        interval: Some((0.0, bound)),
        estimate: (rows > 0).then(|| found as f64 / rows as f64),
        ..Criterion::new("skew", verdict, rows, text)
    }
}

/// Acknowledged in place of a feature's name, it stands for all features, also where nothing could be judged: few source rows may
/// stay too few for ever.
pub const ALL_FEATURES: &str = "*";

/// Both versions were served the same rows, so their drift holds and never stops.
fn drift(rules: &ShadowPolicy, evidence: &ShadowEvidence) -> Criterion {
    let drift = &evidence.drift;
    let all = drift.acknowledged.iter().any(|name| name == ALL_FEATURES);
    let open: Vec<&str> =
        drift.features.iter().filter(|name| !drift.acknowledged.contains(name)).map(String::as_str).collect();
    let (verdict, text) = match (rules.drift, drift.verdict) {
        (DriftRule::Ignore, _) => (Verdict::Met, "drift is ignored by policy".to_owned()),
        (_, DriftVerdict::Stable) => (Verdict::Met, "inputs have not drifted".to_owned()),
        _ if all => (Verdict::Met, "whatever drift there may be is acknowledged".to_owned()),
        (_, DriftVerdict::Drift) if open.is_empty() => {
            (Verdict::Met, format!("drift of {} is acknowledged", listed(&drift.features)))
        }
        (_, DriftVerdict::Drift) => {
            let text = format!("inputs have drifted ({}); acknowledge it on record, or retrain", listed(&open));
            (Verdict::Shared, text)
        }
        (_, DriftVerdict::InsufficientData | DriftVerdict::Unknown) => {
            let text =
                format!("too little is known of drift yet; acknowledge `{ALL_FEATURES}` to go on without knowing");
            (Verdict::Open, text)
        }
    };
    Criterion::new("drift", verdict, evidence.rows, text)
}

/// A criterion before it is known which breaches hold: that takes all of them.
struct Draft {
    /// Met or open; its text lacks the verdict.
    criterion: Criterion,
    /// The logarithm of the evidence that it is breached; none for what never stops anything.
    ln_breach: Option<f64>,
    /// Whether the champion breaches it too.
    shared: bool,
}

/// Breaches, corrected for the number of criteria that could stop: the chance of any false one is alpha.
fn settled(drafts: Vec<Draft>, alpha: f64) -> Vec<Criterion> {
    let stopping: Vec<f64> = drafts.iter().filter_map(|draft| draft.ln_breach).collect();
    let mut breached = holm(&stopping, alpha).into_iter();
    let settle = |Draft { mut criterion, ln_breach, shared }: Draft| {
        if ln_breach.is_some() && breached.next() == Some(true) {
            criterion.verdict = if shared { Verdict::Shared } else { Verdict::Breached };
        }
        let word = match criterion.verdict {
            Verdict::Breached => "breached",
            Verdict::Shared => "breached by the champion too",
            Verdict::Open => "open",
            Verdict::Met => "met",
        };
        criterion.text = format!("`{}` is {word}: {}", criterion.name, criterion.text);
        criterion
    };
    drafts.into_iter().map(settle).collect()
}

/// A mean that is held to a bound, without a champion to compare it with.
fn bounded(name: &str, sums: Sums, bound: f64, side: Side, shape: Shape, alpha: f64) -> Draft {
    let (beyond, within) = sided(&sums, bound, side, shape);
    let verdict = if within >= -libm::log(alpha) { Verdict::Met } else { Verdict::Open };
    let interval = (mean::lower(&sums, alpha, shape), mean::upper(&sums, alpha, shape));
    let estimate = sums.mean();
    let text = match estimate {
        Some(estimate) => format!(
            "{} of {} units, between {} and {}",
            percent(estimate),
            sums.units,
            percent(interval.0),
            percent(interval.1)
        ),
        None => "no unit is counted yet".to_owned(),
    };
    let criterion = Criterion {
        estimate,
        interval: Some(interval),
        bound: Some(bound),
        ..Criterion::new(name, verdict, sums.units as u64, text)
    };
    Draft { criterion, ln_breach: Some(beyond), shared: false }
}

/// Logarithms of the evidence that the mean is beyond, and within, its bound.
fn sided(sums: &Sums, bound: f64, side: Side, shape: Shape) -> (f64, f64) {
    let (above, below) = (mean::ln_above(sums, bound, shape), mean::ln_below(sums, bound, shape));
    match side {
        Side::Below => (above, below),
        Side::Above => (below, above),
    }
}

fn guardrails(policy: &Policy, of: impl Fn(usize) -> ByArm) -> Vec<Draft> {
    let judge = |(index, rail): (usize, &Guardrail)| {
        let arm = of(index);
        let champion = arm.champion.sums();
        let mut draft = bounded(&rail.text, arm.challenger.sums(), rail.bound, rail.side, rail.shape, policy.alpha);
        // The champion is asked without a correction: what is suspected of both must not be blamed on one.
        draft.shared = sided(&champion, rail.bound, rail.side, rail.shape).0 >= -libm::log(policy.alpha);
        if let Some(mean) = champion.mean() {
            draft.criterion.champion = Some(mean);
            draft.criterion.text += &format!("; champion {} of {} units", percent(mean), champion.units);
        }
        draft
    };
    policy.guardrails.iter().enumerate().map(judge).collect()
}

/// Success metrics over both arms. The first decides, at alpha, since it was named before. Others stop nothing, and those
/// are called met of which at most alpha are so falsely.
fn success(policy: &Policy, rules: &CanaryPolicy, evidence: &CanaryEvidence) -> Vec<Draft> {
    let first = policy.guardrails.len();
    type Compared<'a> = (&'a Success, Vec<Stratum>, f64, f64);
    fn compare(metric: &Success, strata: Vec<Stratum>) -> Compared<'_> {
        let margin = scaled_margin(metric);
        let (worse, better) = if metric.lower_is_better {
            let worse = difference::ln_above(&strata, margin, metric.shape);
            (worse, difference::ln_below(&strata, margin, metric.shape))
        } else {
            let worse = difference::ln_below(&strata, -margin, metric.shape);
            (worse, difference::ln_above(&strata, -margin, metric.shape))
        };
        (metric, strata, worse, better)
    }
    let strata = |index: usize, metric: &Success| evidence.strata(first + index, metric.scaled(metric.centre));
    let all: Vec<Compared<'_>> =
        rules.success.iter().enumerate().map(|(index, metric)| compare(metric, strata(index, metric))).collect();
    let others: Vec<f64> = all.iter().skip(1).map(|(_, _, _, better)| *better).collect();
    let others = benjamini_hochberg(&others, policy.alpha);
    let draft = |(index, (metric, strata, worse, better)): (usize, &Compared<'_>)| {
        let met = match index.checked_sub(1) {
            None => *better >= -libm::log(policy.alpha),
            Some(other) => others[other],
        };
        let verdict = if met { Verdict::Met } else { Verdict::Open };
        // Told in the metric's own unit.
        let unit = metric.range.1 - metric.range.0;
        let units: f64 = strata.iter().map(|stratum| stratum.challenger.units + stratum.champion.units).sum();
        let (low, high) = difference::bounds(strata, policy.alpha, metric.shape);
        let estimate = difference::estimate(strata).map(|estimate| estimate * unit);
        let interval = (low * unit, high * unit);
        let text = match estimate {
            Some(estimate) => less(estimate, interval, units),
            None => "the arms cannot be compared yet".to_owned(),
        };
        let bound = if metric.lower_is_better { scaled_margin(metric) } else { -scaled_margin(metric) };
        let criterion = Criterion {
            estimate,
            interval: Some(interval),
            bound: Some(bound * unit),
            ..Criterion::new(&metric.metric, verdict, units as u64, text)
        };
        Draft { criterion, ln_breach: (index == 0).then_some(*worse), shared: false }
    };
    all.iter().enumerate().map(draft).collect()
}

/// By how much the challenger may be worse, on the counted scale.
fn scaled_margin(metric: &Success) -> f64 {
    match metric.needs {
        Needs::Better => 0.0,
        Needs::NotWorseBy(margin) => margin / (metric.range.1 - metric.range.0),
    }
}

fn less(estimate: f64, (low, high): (f64, f64), units: f64) -> String {
    format!("challenger less champion {estimate:.4}, between {low:.4} and {high:.4}, {units} units")
}

const PAIRED: &str = " (same rows)";

fn is_paired(criterion: &Criterion) -> bool {
    criterion.name.ends_with(PAIRED)
}

/// Success metrics on the rows that both versions have scored, where labels have come: a challenger that is shown to be
/// worse need not meet users at all.
fn paired(policy: &Policy, evidence: &ShadowEvidence) -> Vec<Draft> {
    let metrics = policy.canary.iter().flat_map(|canary| &canary.success).enumerate();
    let judge = |((index, metric), tally): ((usize, &Success), &Tally)| {
        let name = format!("{}{PAIRED}", metric.metric);
        let unit = metric.range.1 - metric.range.0;
        let (side, sign) = if metric.lower_is_better { (Side::Below, 1.0) } else { (Side::Above, -1.0) };
        // A difference d is counted as (d + 1)/2.
        let bound = 0.5 + sign * scaled_margin(metric) / 2.0;
        let mut draft = bounded(&name, tally.sums(), bound, side, Shape::Mean, policy.alpha);
        let back = |x: f64| (2.0 * x - 1.0) * unit;
        let criterion = &mut draft.criterion;
        criterion.estimate = criterion.estimate.map(back);
        criterion.interval = criterion.interval.map(|(low, high)| (back(low), back(high)));
        criterion.bound = Some(back(bound));
        criterion.text = match (criterion.estimate, criterion.interval) {
            (Some(estimate), Some(interval)) => less(estimate, interval, tally.units as f64),
            _ => "no label has come yet".to_owned(),
        };
        Draft { ln_breach: draft.ln_breach.filter(|_| index == 0), ..draft }
    };
    metrics.zip(&evidence.paired).map(judge).collect()
}

fn split(policy: &Policy, evidence: &CanaryEvidence) -> Criterion {
    let splits = evidence.splits();
    let ln = sample_ratio::ln_evidence(&splits);
    let verdict = if ln >= -libm::log(policy.sample_ratio_alpha) { Verdict::Breached } else { Verdict::Met };
    let units: u64 = splits.iter().flat_map(|split| &split.units).sum();
    let latest = match splits.last() {
        Some(split) => {
            let all: u64 = split.units.iter().sum();
            let share = split.units[0] as f64 / all.max(1) as f64;
            format!(", {} of {all} units where {} are declared", percent(share), percent(split.shares[0]))
        }
        None => String::new(),
    };
    let text = match verdict {
        Verdict::Breached => {
            format!(
                "units are not split as declared{latest}; nothing that compares the arms can be believed: find what loses them"
            )
        }
        _ => format!("units are split as declared{latest}"),
    };
    Criterion::new("sample_ratio", verdict, units, text)
}

fn over(what: &str, begun_us: i64, ends_after_us: i64, now_us: i64) -> Option<String> {
    let end = begun_us.saturating_add(ends_after_us);
    (now_us >= end).then(|| format!("the time for the {what} ended at {}; the champion stays", time(end)))
}

fn blackout(until: i64) -> String {
    format!("nothing is advanced in a blackout, until {}", time(until))
}

fn percent(share: f64) -> String {
    // Small rates are what most bounds are about.
    let percent = 100.0 * share;
    if percent != 0.0 && percent.abs() < 0.1 { format!("{percent:.4} %") } else { format!("{percent:.2} %") }
}

fn listed<T: AsRef<str>>(names: &[T]) -> String {
    const NAMES_MAX: usize = 5;
    let shown: Vec<&str> = names.iter().take(NAMES_MAX).map(AsRef::as_ref).collect();
    let more = names.len().saturating_sub(NAMES_MAX);
    if more > 0 { format!("{} and {more} more", shown.join(", ")) } else { shown.join(", ") }
}

/// 2013-01-31T06:00:00Z (Hinnant's civil-from-days).
fn time(us: i64) -> String {
    let seconds = us.div_euclid(1_000_000);
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute) = (second / 3_600, second / 60 % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{:02}Z", second % 60)
}

#[cfg(test)]
mod tests;
