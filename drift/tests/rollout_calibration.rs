//! False stops and power of rollouts, at sizes that a test can afford; `examples/rollout_calibration.rs` runs the large ones.

mod rollouts;

use drift::sequential::judge::Decision;
use drift::sequential::policy::Needs;
use rollouts::{Course, Same, Worse, bent_split, same_model, worse_model};

#[track_caller]
fn check_same(units: u64, runs: u64) {
    let case = Same { units, rows_per_unit: 5, flushes: 40, runs, alpha: 0.05 };
    let wrong = same_model(case, 11);
    for (what, found) in
        [("stopped", wrong.stopped), ("met", wrong.met), ("better", wrong.better), ("split", wrong.split)]
    {
        assert!(found.at_least() <= case.alpha, "{units} units, {what}: {found:?}");
    }
    // What it guards against, so that a simulation without any noise would not pass for calibration.
    assert!(wrong.row_test.share() > 0.1, "{units} units: {:?}", wrong.row_test);
}

#[test]
fn the_same_model_is_not_stopped() {
    check_same(30, 400);
    check_same(300, 300);
    check_same(2_000, 60);
}

#[test]
fn half_a_point_of_errors_is_caught_in_a_hundred_thousand_rows() {
    let case = Worse {
        champion: 0.05,
        challenger: 0.055,
        rows_per_arm: 100_000,
        rows_per_unit: 1,
        looks: 50,
        runs: 40,
        alpha: 0.05,
    };
    let caught = worse_model(case, 12);
    assert!(caught.by_champion.share() >= 0.9, "{caught:?}");
    assert!(caught.by_bound.share() >= 0.95, "{caught:?}");
    // What does not differ is not caught.
    let same = worse_model(Worse { challenger: 0.05, ..case }, 13);
    assert!(same.by_champion.events <= 4 && same.by_bound.events <= 4, "{same:?}");
}

#[test]
fn a_bent_split_is_caught_within_half_a_million_units() {
    let (found, _) = bent_split(0.505, 500_000, 25, 0.001, 14);
    assert!(found.events >= 24, "{found:?}");
    let (found, _) = bent_split(0.5, 200_000, 25, 0.001, 15);
    assert_eq!(found.events, 0);
}

fn courses(needs: Needs, failing: [f64; 2], loss: [f64; 2]) -> Vec<Course> {
    (0..4).map(|seed| rollouts::canary(&rollouts::flights(needs), failing, loss, 180, seed)).collect()
}

#[test]
fn a_good_model_is_promoted() {
    let courses = courses(Needs::NotWorseBy(0.05), [0.0005, 0.0005], [0.5, 0.5]);
    let promoted = courses.iter().filter(|course| course.decision == Decision::Promote).count();
    assert!(promoted >= 3, "{courses:#?}");
    assert!(courses.iter().all(|course| course.flushes >= 90), "each step bakes for half an hour");
    assert!(courses.iter().all(|course| course.decision != Decision::RollBack), "{courses:#?}");
}

#[test]
fn a_model_that_fails_more_or_loses_more_is_taken_back_early() {
    for (failing, loss, name) in
        [([0.0005, 0.03], [0.5, 0.5], "error_rate"), ([0.0005, 0.0005], [0.5, 0.6], "log_loss")]
    {
        for course in courses(Needs::Better, failing, loss) {
            assert_eq!(course.decision, Decision::RollBack, "{course:#?}");
            assert!(course.step <= 1 && course.judgement.reasons[0].contains(name), "{course:#?}");
        }
    }
}

#[test]
fn a_model_that_is_no_better_is_neither_promoted_nor_taken_back() {
    for course in courses(Needs::Better, [0.0005, 0.0005], [0.5, 0.5]) {
        assert_eq!((course.decision, course.step), (Decision::Hold, 2), "{course:#?}");
    }
    let better = courses(Needs::Better, [0.0005, 0.0005], [0.5, 0.45]);
    let promoted = better.iter().filter(|course| course.decision == Decision::Promote).count();
    assert!(promoted >= 3, "{better:#?}");
}
