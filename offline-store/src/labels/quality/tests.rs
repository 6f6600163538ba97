use proptest::prelude::*;

use super::*;

fn close(a: f64, b: f64) {
    assert!((a - b).abs() < 1e-12, "{a} {b}");
}

#[test]
fn classes_of_a_worked_example() {
    // scikit-learn 1.x: roc_auc_score 0.75, log_loss 0.4722879..., brier_score_loss 0.158125.
    let pairs = vec![(0.1, false), (0.4, false), (0.35, true), (0.8, true)];
    let found = classes(pairs);
    assert_eq!((found.positives, found.auc), (2, Some(0.75)));
    let by_hand = -(0.9f64.ln() + 0.6f64.ln() + 0.35f64.ln() + 0.8f64.ln()) / 4.0;
    close(found.log_loss.unwrap(), by_hand);
    close(found.brier.unwrap(), (0.01 + 0.16 + 0.4225 + 0.04) / 4.0);
    close(found.calibration_error.unwrap(), (0.1 + 0.4 + 0.65 + 0.2) / 4.0);
    let bins: Vec<(f64, u64)> = found.calibration.iter().map(|bin| (bin.low, bin.rows)).collect();
    assert_eq!(bins, [(0.1, 1), (0.3, 1), (0.4, 1), (0.8, 1)]);
}

#[test]
fn what_cannot_be_said_is_not_said() {
    assert_eq!(classes(vec![(0.5, true)]).auc, None);
    let logits = classes(vec![(-2.0, false), (3.0, true)]);
    assert_eq!((logits.auc, logits.log_loss, logits.brier), (Some(1.0), None, None));
    assert_eq!(errors(Vec::new()), None);
    assert_eq!(classes(Vec::new()).log_loss, None);
    // A certain prediction that was wrong is bad, not infinite.
    assert!(classes(vec![(0.0, true), (1.0, true)]).log_loss.unwrap().is_finite());
}

#[test]
fn ties_count_half() {
    assert_eq!(classes(vec![(0.5, true), (0.5, false), (0.5, true)]).auc, Some(0.5));
}

#[test]
fn diversity_of_what_is_shown() {
    let mut counter = ShownCounter::default();
    for entity in 0..20 {
        counter.add(entity, entity < 10);
    }
    let even = counter.finish();
    assert_eq!((even.asked, even.shown, even.rows), (20, 10, 10));
    close(even.coverage, 0.5);
    close(even.effective, 10.0);
    // One entity is shown again and again: less diverse by what it takes.
    (0..90).for_each(|_| counter.add(3, true));
    let uneven = counter.finish();
    assert!(uneven.effective < 2.0, "{uneven:?}");
    assert_eq!(uneven.coverage, even.coverage);
    assert_eq!(ShownCounter::default().finish(), Shown::default());
}

proptest! {
    #[test]
    fn auc_is_the_share_of_pairs_in_order(pairs in prop::collection::vec((0u8..10, any::<bool>()), 0..60)) {
        let pairs: Vec<(f64, bool)> = pairs.iter().map(|(score, label)| (f64::from(*score) / 10.0, *label)).collect();
        let mut wins = 0.0;
        let mut all = 0.0;
        for (positive, _) in pairs.iter().filter(|(_, label)| *label) {
            for (negative, _) in pairs.iter().filter(|(_, label)| !*label) {
                all += 1.0;
                wins += if positive > negative { 1.0 } else if positive == negative { 0.5 } else { 0.0 };
            }
        }
        let expected = (all > 0.0).then(|| wins / all);
        let mut turned = pairs.clone();
        turned.reverse();
        prop_assert_eq!(classes(pairs.clone()).auc, expected);
        prop_assert_eq!(classes(pairs), classes(turned));
    }
}
