//! Several questions at once: e-values in, which of the claims are refuted out. 1/e is a p-value that holds at every look
//! (Vovk and Wang 2021), so both corrections may be asked at any time and under any dependence.

/// Which are refuted with a chance of at most `alpha` that any of them is true (Holm 1979).
pub fn holm(ln_evidence: &[f64], alpha: f64) -> Vec<bool> {
    let mut refuted = vec![false; ln_evidence.len()];
    for (rank, index) in strongest_first(ln_evidence).into_iter().enumerate() {
        let left = (ln_evidence.len() - rank) as f64;
        refuted[index] = ln_evidence[index] >= libm::log(left / alpha);
        if !refuted[index] {
            break;
        }
    }
    refuted
}

/// Which are refuted so that at most the share `rate` of them is true, on average (Wang and Ramdas 2022).
pub fn benjamini_hochberg(ln_evidence: &[f64], rate: f64) -> Vec<bool> {
    let order = strongest_first(ln_evidence);
    let all = ln_evidence.len() as f64;
    let passes = |rank: usize| ln_evidence[order[rank]] >= libm::log(all / (rate * (rank + 1) as f64));
    let many = (0..order.len()).rev().find(|rank| passes(*rank)).map_or(0, |rank| rank + 1);
    let mut refuted = vec![false; ln_evidence.len()];
    for index in &order[..many] {
        refuted[*index] = true;
    }
    refuted
}

fn strongest_first(ln_evidence: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..ln_evidence.len()).collect();
    order.sort_by(|a, b| ln_evidence[*b].total_cmp(&ln_evidence[*a]));
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(evidence: &[f64], by_holm: &[usize], by_rate: &[usize]) {
        let logs: Vec<f64> = evidence.iter().map(|e| e.ln()).collect();
        let indices = |refuted: Vec<bool>| -> Vec<usize> { (0..refuted.len()).filter(|i| refuted[*i]).collect() };
        assert_eq!(indices(holm(&logs, 0.05)), by_holm, "Holm, {evidence:?}");
        assert_eq!(indices(benjamini_hochberg(&logs, 0.05)), by_rate, "Benjamini and Hochberg, {evidence:?}");
    }

    #[test]
    fn more_questions_need_more_evidence() {
        check(&[], &[], &[]);
        check(&[21.0], &[0], &[0]);
        check(&[19.0], &[], &[]);
        check(&[21.0, 1.0], &[], &[]);
        check(&[41.0, 21.0], &[0, 1], &[0, 1]);
        check(&[1.0, 61.0, 39.0], &[1], &[1, 2]);
        check(&[31.0, 31.0, 1.0], &[], &[0, 1]);
        check(&[f64::INFINITY, 0.0, 1.0], &[0], &[0]);
    }
}
