//! How long the declared criteria will take at the traffic there is: asked before anything starts, so that nobody waits two
//! weeks for what two weeks cannot show.
//!
//! Bets grow, unit by unit, at a rate that is known where the truth is assumed; the criterion is decided when they have grown to
//! 1/alpha and what the mixture costs, later by the noise of growth in nine of ten cases. Nothing here decides anything.

use serde::{Deserialize, Serialize};

use super::bets::MIXTURE_NATS;
use super::policy::{Measure, Needs, Policy, Side};
use super::tally::Tally;

/// Of cases in which the plan's number is enough.
pub const POWER: f64 = 0.9;

/// The normal deviate that POWER of cases lie below.
const POWER_DEVIATE: f64 = 1.281_55;

/// What is known of the traffic, and of the champion, before.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Traffic {
    pub rows_per_day: f64,
    /// Different units seen within the first day, the first two, and so on: fewer new ones come each day.
    pub units_by_day: Vec<u64>,
    /// By guardrail, what the champion does now; the challenger is assumed to do the same.
    pub guardrails: Vec<Tally>,
    /// By success metric, the champion's values on the counted scale, and the improvement that is hoped for (or, where the
    /// criterion is not to be worse, 0) in the metric's own unit.
    pub success: Vec<(Tally, f64)>,
    /// Share of rows whose decision is expected to flip.
    pub flip_rate: f64,
}

/// What one criterion needs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Need {
    pub name: String,
    /// `rows` or `units`, at the step named.
    pub counted: Counted,
    /// None where it cannot be met: what is assumed lies at the bound or beyond.
    pub needed: Option<u64>,
    /// Of the challenger, or of both arms for a comparison, by the share of the step.
    pub step: Option<usize>,
    /// None where the traffic never brings so many.
    pub days: Option<f64>,
    pub text: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Counted {
    Rows,
    Units,
}

/// Everything that has to be shown, stage by stage.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    pub needs: Vec<Need>,
    /// Until the last criterion is met and the last step has baked; None where one of them never is.
    pub days: Option<f64>,
    /// What somebody should change before beginning.
    pub warnings: Vec<String>,
}

const DAY_US: f64 = 86_400e6;

pub fn plan(policy: &Policy, traffic: &Traffic) -> Plan {
    let mut plan = Plan::default();
    let mut total = Some(0.0);
    let later = |total: Option<f64>, days: Option<f64>| Some(total? + days?);
    if let Some(shadow) = &policy.shadow {
        let mut needs = vec![by_rows("min_rows", Some(shadow.min_rows), traffic)];
        if let Some(bound) = shadow.max_flip_rate {
            let needed = units_to_bound(traffic.flip_rate, bound, policy.alpha);
            let name = "max_flip_rate";
            needs.push(match policy.canary {
                Some(_) => by_units(name, needed, 1.0, None, traffic),
                None => by_rows(name, needed, traffic),
            });
        }
        let days = longest(&needs);
        ends_within(&mut plan, "shadow", days, shadow.ends_after_us);
        total = later(total, days);
        plan.needs.extend(needs);
    }
    if let Some(canary) = &policy.canary {
        let bake = canary.bake_us as f64 / DAY_US;
        let mut days = Some(0.0);
        for (step, buckets) in canary.steps.iter().enumerate() {
            let share = f64::from(*buckets) / f64::from(super::policy::BUCKETS);
            let mut needs = vec![by_units("min_units", Some(canary.min_units), share, Some(step), traffic)];
            if step + 1 == canary.steps.len() {
                for (index, rail) in policy.guardrails.iter().enumerate() {
                    let rate = traffic.guardrails.get(index).and_then(|tally| tally.sums().mean()).unwrap_or(0.0);
                    let needed = match rail.side {
                        Side::Below => units_to_bound(rate, rail.bound, policy.alpha),
                        Side::Above => units_to_bound(1.0 - rate, 1.0 - rail.bound, policy.alpha),
                    };
                    let mut need = by_units(&rail.text, needed, share, Some(step), traffic);
                    if let (Measure::SlowerThan(seconds), None) = (&rail.measure, needed) {
                        need.text += &format!("; {:.2} % of rows take longer than {seconds} s now", 100.0 * rate);
                    }
                    needs.push(need);
                }
            }
            let step_days = longest(&needs).map(|days| days.max(bake));
            days = later(days, step_days);
            plan.needs.extend(needs);
        }
        // Comparisons need both arms: the step that leaves the smaller one most.
        let fairest = canary.steps.iter().enumerate().map(|(step, buckets)| {
            let share = f64::from(*buckets) / f64::from(super::policy::BUCKETS);
            (step, share, share * (1.0 - share))
        });
        if let Some((step, share, _)) = fairest.max_by(|a, b| a.2.total_cmp(&b.2))
            && let Some((metric, (values, hoped))) = canary.success.iter().zip(&traffic.success).next()
        {
            let unit = metric.range.1 - metric.range.0;
            let effect = match metric.needs {
                Needs::Better => hoped.abs() / unit,
                Needs::NotWorseBy(margin) => (margin + hoped) / unit,
            };
            let needed =
                values.sums().variance().and_then(|variance| units_to_compare(variance, effect, share, policy.alpha));
            let need = by_units(&metric.metric, needed, 1.0, Some(step), traffic);
            days = match (days, need.days) {
                (Some(days), Some(needed)) => Some(days.max(needed)),
                _ => None,
            };
            plan.needs.push(need);
        }
        ends_within(&mut plan, "canary", days, canary.ends_after_us);
        total = later(total, days);
    }
    plan.days = total;
    let never = plan.needs.iter().filter(|need| need.days.is_none()).map(|need| need.text.clone());
    plan.warnings.extend(never.collect::<Vec<_>>());
    plan
}

/// Units until a mean of `rate` is shown to be below `bound`, nine times in ten.
pub fn units_to_bound(rate: f64, bound: f64, alpha: f64) -> Option<u64> {
    if !(rate >= 0.0 && rate < bound && bound < 1.0) {
        return None;
    }
    // Growth per unit of the best stake, which is the divergence of the two coins, and its variance.
    let (on_one, on_zero) = (if rate > 0.0 { libm::log(rate / bound) } else { 0.0 }, ln_ratio(1.0 - rate, 1.0 - bound));
    let growth = rate * on_one + (1.0 - rate) * on_zero;
    let variance = rate * (1.0 - rate) * (on_one - on_zero) * (on_one - on_zero);
    until(growth, variance, alpha)
}

/// Units of both arms until a difference of `effect` between outcomes of that variance is shown, nine times in ten.
pub fn units_to_compare(variance: f64, effect: f64, share: f64, alpha: f64) -> Option<u64> {
    if !(effect > 0.0 && share > 0.0 && share < 1.0) {
        return None;
    }
    // The growth of the best stake on gains of mean m and variance v is m²/2v; the variance of growth twice that.
    let growth = share * (1.0 - share) * effect * effect / (2.0 * variance.max(1e-9));
    until(growth, 2.0 * growth, alpha)
}

/// n with n·growth − deviate·√(n·variance) = what is wanted.
fn until(growth: f64, variance: f64, alpha: f64) -> Option<u64> {
    if growth.is_nan() || growth <= 0.0 {
        return None;
    }
    let wanted = MIXTURE_NATS - libm::log(alpha);
    let deviate = POWER_DEVIATE * variance.sqrt();
    let root = (deviate + (deviate * deviate + 4.0 * growth * wanted).sqrt()) / (2.0 * growth);
    let units = (root * root).ceil();
    (units < 1e15).then_some(units as u64)
}

fn ln_ratio(a: f64, b: f64) -> f64 {
    libm::log(a / b)
}

fn by_rows(name: &str, needed: Option<u64>, traffic: &Traffic) -> Need {
    let days = needed.filter(|_| traffic.rows_per_day > 0.0).map(|rows| rows as f64 / traffic.rows_per_day);
    let text = match (needed, days) {
        (None, _) => format!("`{name}` cannot be met: what is expected is at its bound or beyond"),
        (Some(needed), None) => format!("`{name}` needs {needed} rows, and there is no traffic"),
        (Some(needed), Some(days)) => format!("`{name}` needs {needed} rows: {days:.1} days"),
    };
    Need { name: name.to_owned(), counted: Counted::Rows, needed, step: None, days, text }
}

fn by_units(name: &str, needed: Option<u64>, share: f64, step: Option<usize>, traffic: &Traffic) -> Need {
    let days = needed.and_then(|needed| days_of(needed as f64 / share.max(1e-9), &traffic.units_by_day));
    let known = traffic.units_by_day.last().copied().unwrap_or(0);
    let at = step.map_or(String::new(), |step| format!(" at step {}", step + 1));
    let text = match (needed, days) {
        (None, _) => format!("`{name}`{at} cannot be met: what is expected is at its bound or beyond"),
        (Some(needed), None) => format!(
            "`{name}`{at} needs {needed} units of a share of {:.2} %, and {known} units are all that came within {} days",
            100.0 * share,
            traffic.units_by_day.len()
        ),
        (Some(needed), Some(days)) => format!("`{name}`{at} needs {needed} units: {days:.1} days"),
    };
    Need { name: name.to_owned(), counted: Counted::Units, needed, step, days, text }
}

/// When so many different units will have come. Beyond the days that are known, as many come daily as on the last.
fn days_of(units: f64, by_day: &[u64]) -> Option<f64> {
    let mut before = 0.0;
    for (day, seen) in by_day.iter().enumerate() {
        let seen = *seen as f64;
        if seen >= units {
            let new = (seen - before).max(1e-9);
            return Some(day as f64 + ((units - before) / new).clamp(0.0, 1.0));
        }
        before = seen;
    }
    let daily = match by_day {
        [] => return None,
        [only] => *only as f64,
        [.., before, last] => last.saturating_sub(*before) as f64,
    };
    let days = by_day.len() as f64 + (units - before) / daily;
    // Beyond a year the traffic is another.
    (daily >= 1.0 && days < 366.0).then_some(days)
}

/// The days of the slowest; none where one never comes.
fn longest(needs: &[Need]) -> Option<f64> {
    needs.iter().map(|need| need.days).try_fold(0.0_f64, |longest, days| Some(longest.max(days?)))
}

fn ends_within(plan: &mut Plan, stage: &str, days: Option<f64>, ends_after_us: i64) {
    let most = ends_after_us as f64 / DAY_US;
    if let Some(days) = days.filter(|days| *days > most) {
        plan.warnings.push(format!(
            "the {stage} needs about {days:.1} days and ends after {most:.1}: raise `ends_after`, or ask for less"
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;
    use crate::sequential::bets::{Shape, Sums};
    use crate::sequential::difference::{Stratum, ln_below};
    use crate::sequential::mean;
    use crate::sequential::policy::{CanaryPolicy, Guardrail, Success};

    fn rate(events: u64, units: u64) -> Sums {
        Tally::of_events(events, units).sums()
    }

    #[test]
    fn nine_of_ten_bounds_are_shown_within_the_plan() {
        for (truth, bound) in [(0.0, 0.005), (0.002, 0.005), (0.04, 0.05)] {
            let units = units_to_bound(truth, bound, 0.05).unwrap();
            let mut random = Random::new(1);
            let shown = |units: u64, random: &mut Random| {
                let mut events = 0;
                (1..=units).any(|n| {
                    events += u64::from(random.unit() < truth);
                    n % 20 == 0 && mean::ln_below(&rate(events, n), bound, Shape::Rate) >= 20f64.ln()
                })
            };
            let runs = 60;
            let within = (0..runs).filter(|_| shown(units, &mut random)).count();
            assert!(within >= 48, "{within} of {runs} within {units} units of {truth} against {bound}");
            // And it is no idle number: a third of the units is not enough.
            let early = (0..runs).filter(|_| shown(units / 3, &mut random)).count();
            assert!(early < runs / 2, "{early} of {runs} within a third of {units}");
        }
        assert_eq!(units_to_bound(0.005, 0.005, 0.05), None);
    }

    #[test]
    fn comparisons_are_shown_within_the_plan() {
        let (level, effect) = (0.3, 0.05);
        let units = units_to_compare(level * (1.0 - level), effect, 0.25, 0.05).unwrap();
        let mut random = Random::new(2);
        let mut within = 0;
        for _ in 0..40 {
            let mut counts = [[0; 2]; 2];
            within += usize::from((1..=units).any(|n| {
                let arm = usize::from(random.unit() >= 0.25);
                let chance = if arm == 0 { level - effect } else { level };
                counts[arm][0] += u64::from(random.unit() < chance);
                counts[arm][1] += 1;
                let [challenger, champion] = counts.map(|[events, units]| rate(events, units));
                let stratum = Stratum { share: 0.25, challenger, champion, centre: level };
                n % 50 == 0 && ln_below(&[stratum], 0.0, Shape::Rate) >= 20f64.ln()
            }));
        }
        assert!(within >= 32, "{within} of 40 within {units}");
    }

    #[test]
    fn a_plan_says_what_will_never_be() {
        let canary = CanaryPolicy {
            unit: "aircraft".into(),
            steps: vec![100, 2_500, 10_000],
            bake_us: 3_600_000_000,
            min_units: 100,
            ends_after_us: 14 * 86_400_000_000,
            success: vec![Success {
                metric: "log_loss".into(),
                lower_is_better: true,
                needs: Needs::Better,
                range: (0.0, 4.6),
                centre: 0.4,
                shape: Shape::Mean,
            }],
            whole_weeks: false,
            blackouts: vec![],
        };
        let policy: Policy = Policy {
            guardrails: vec![Guardrail::declared("error_rate < 0.5%", "error_rate", Side::Below, 0.005)],
            canary: Some(canary),
            ..serde_json::from_str("{}").unwrap()
        };
        let mut values = Tally::default();
        for i in 0..1_000 {
            values.add(f64::from(i % 10) / 30.0);
        }
        let mut traffic = Traffic {
            rows_per_day: 900.0,
            units_by_day: vec![700, 1_500, 2_200, 2_700],
            guardrails: vec![Tally::of_events(0, 1_000)],
            success: vec![(values, 0.1)],
            flip_rate: 0.0,
        };
        let few = plan(&policy, &traffic);
        assert_eq!(few.needs[0].needed, Some(100));
        assert_eq!(few.needs[0].days, Some(4.0 + (10_000.0 - 2_700.0) / 500.0), "{few:?}");
        assert!(few.warnings.iter().any(|text| text.contains("ends after 14.0")), "{:?}", few.warnings);

        traffic.units_by_day = vec![2_000, 2_500, 2_700, 2_700];
        let never = plan(&policy, &traffic);
        assert_eq!((never.days, never.needs[0].days), (None, None));
        assert!(never.warnings[0].contains("2700 units are all that came within 4 days"), "{:?}", never.warnings);
        traffic.guardrails = vec![Tally::of_events(10, 1_000)];
        assert!(plan(&policy, &traffic).warnings.iter().any(|text| text.contains("cannot be met")));
    }
}
