//! Every workload at size 1, on a stand-in that sleeps.

use std::collections::BTreeSet;
use std::time::Duration;

use super::policies::{CONTENDERS, WORKLOADS};
use super::*;
use crate::online::requests::Asked;

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

#[test]
fn every_policy_meets_the_same_arrivals_in_virtual_time() {
    let found = policies::simulated(2, Duration::from_secs(20));
    assert_eq!(found.len(), 2 * WORKLOADS.len() * CONTENDERS.len());
    for one in &found {
        let like = found.iter().filter(|other| (&other.workload, other.block) == (&one.workload, one.block));
        assert_eq!(like.map(|other| other.sent).collect::<BTreeSet<_>>().len(), 1);
        assert!(one.answered > 0 && one.answered <= one.sent, "{one:?}");
    }
    let p50 = |contender: &str| {
        let of = found.iter().find(|one| one.workload == "poisson-10" && one.contender == contender && one.block == 1);
        of.map(|one| one.millis.p50).unwrap()
    };
    // A forward of one row takes 12.1 ms, and the long window is waited for by nearly everybody.
    assert!((12.1..13.0).contains(&p50("ours")), "{}", p50("ours"));
    assert!(p50("window 200 ms") > 100.0, "{}", p50("window 200 ms"));
}

#[tokio::test]
async fn every_policy_is_driven_by_an_open_loop() {
    let subject = Subject::sleeping(ms(2));
    let found = policies::real(&subject, 1, ms(150), &[]).await.unwrap();
    assert_eq!(found.found.len(), WORKLOADS.len() * CONTENDERS.len());
    for one in found.found.iter().filter(|one| one.answered > 0) {
        // No answer comes before its forward could have ended, counted from when it was due.
        assert!(one.millis.p50 >= 2.0 && one.answered <= one.sent, "{one:?}");
    }
    let of = |contender: &str| {
        let mut of = found.found.iter().filter(|one| one.workload == "poisson-80" && one.contender == contender);
        of.next().unwrap().clone()
    };
    assert_eq!(of("ours").answered, of("ours").sent);
    assert!(of("window 200 ms").millis.p50 > of("ours").millis.p50);
}

#[tokio::test]
async fn what_could_be_answered_is_measured_beside_the_raw_forward() {
    let subject = Subject::sleeping(ms(5));
    let found = capacity::saturated(&subject, 2, ms(100)).await.unwrap();
    assert_eq!(found.len(), 2);
    for block in found {
        // 32 rows in 5 ms are 6,400 a second, and nobody is faster than that.
        assert!(block.raw_per_second <= 6_400.0 && block.per_second <= 6_400.0 * 1.4, "{block:?}");
        assert!(block.per_second > 0.0 && block.rows_per_batch > 16.0, "{block:?}");
    }
    let steady = policies::steady(&subject, 1, ms(60)).await.unwrap();
    assert_eq!(steady.found.len(), 6);
    assert!(steady.found.iter().all(|block| block.answered == 0 || block.millis.p50 >= 5.0), "{steady:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twice_the_capacity_is_partly_refused_and_accounted_for() {
    let subject = Subject::sleeping(ms(20));
    let found = overload::run(&subject, 2.0, ms(150), Duration::from_secs(1)).await.unwrap();
    let all = |tiers: [usize; 2]| tiers.iter().sum::<usize>();
    assert_eq!(all(found.answered) + all(found.refused) + all(found.late) + found.failed, found.sent);
    assert_eq!(found.failed, 0);
    assert!(all(found.answered) > 0 && all(found.refused) > 0, "{found:?}");
    assert!(found.resident.iter().all(|bytes| *bytes > 0), "{found:?}");
}

#[tokio::test]
async fn models_come_and_go() {
    let found = soak::cycles(&Subject::sleeping(Duration::from_micros(100)), 5).await.unwrap();
    assert_eq!(found.resident.len(), 5);
    assert!(found.halves.iter().all(|bytes| *bytes > 0), "{found:?}");
}

#[test]
fn the_policy_costs_something() {
    let found = policy_cost::run(3, 100);
    assert_eq!(found.iter().map(|cost| cost.rows).collect::<Vec<_>>(), [1, ROWS_MAX]);
    assert!(found.iter().all(|cost| cost.micros.len() == 3 && cost.micros.iter().all(|micros| *micros > 0.0)));
}

#[tokio::test]
async fn two_questions_take_turns() {
    let (sender, address) = tokio::sync::oneshot::channel();
    let server = tokio::spawn(async move {
        let ready = |address| sender.send(address).unwrap();
        crate::online::floor::run(None, None, 0, ready).await
    });
    let address = address.await.unwrap().to_string();
    let asked = Asked {
        project: "bench".into(),
        service: "wide".into(),
        model: Some("noop".into()),
        keys: 0,
        entities: 1,
        key: "entity".into(),
        field: vec!["x".into()],
    };
    let requests = asked.requests();
    let found = paired::run((&address, &requests), (&address, &requests), Duration::ZERO, ms(100)).await.unwrap();
    assert!(found.pairs > 0 && found.ours.p50_us > 0.0 && found.peer.p50_us > 0.0, "{found:?}");
    server.abort();
}
