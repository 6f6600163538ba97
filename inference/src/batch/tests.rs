use std::collections::BTreeMap;

use proptest::prelude::*;

use super::queue::PASSED_OVER_MAX;
use super::simulation::Device;
use super::*;

mod policies;

const NEVER: Duration = Duration::MAX;

fn us(micros: u64) -> Duration {
    Duration::from_micros(micros)
}

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn idle(limits: BatchLimits, executors: usize) -> Batcher<char> {
    let mut batcher = Batcher::new(limits, executors);
    for _ in 0..executors {
        batcher.executor_idle();
    }
    batcher
}

fn batcher(rows_max: usize, queue_rows_max: usize, executors: usize) -> Batcher<char> {
    idle(BatchLimits::new(rows_max, queue_rows_max), executors)
}

fn asks(rows: usize, deadline: Duration) -> Request {
    Request { rows, bytes: rows, deadline, tier: 0 }
}

fn push(batcher: &mut Batcher<char>, now: u64, rows: usize, deadline: Duration, payload: char) -> Ticket {
    batcher.push(us(now), asks(rows, deadline), payload).expect("it fits").ticket
}

/// Polls and shows who runs: payload, waiting time, and a sign for what it waited for.
fn poll(batcher: &mut Batcher<char>, now: u64) -> String {
    poll_with(batcher, now, Permit::All)
}

fn poll_with(batcher: &mut Batcher<char>, now: u64, permit: Permit) -> String {
    let poll = batcher.poll(us(now), permit);
    let show = |members: &[Member<char>]| -> String {
        let sign = |member: &Member<char>| match member.waited.reason() {
            WaitReason::None => "",
            WaitReason::ExecutorBusy => "!",
            WaitReason::Linger => "~",
            WaitReason::MemoryPermit => "#",
            WaitReason::Tier => "^",
        };
        let member = |m: &Member<char>| format!("{}{}{}", m.payload, m.waited.whole.as_micros(), sign(m));
        members.iter().map(member).collect::<Vec<_>>().join(" ")
    };
    let mut text = match &poll.decision {
        Decision::Run { members, rows, padded_rows } => format!("{} = {rows}/{padded_rows}", show(members)),
        Decision::Wait { until: None } => "-".to_owned(),
        Decision::Wait { until: Some(until) } => format!("until {}", until.as_micros()),
    };
    if !poll.dropped.is_empty() {
        text += &format!(" dropped {}", show(&poll.dropped));
    }
    text
}

fn warm_up<T>(batcher: &mut Batcher<T>) {
    Device::USUAL.warm_up(batcher);
}

fn forward(rows: usize) -> Duration {
    Device::USUAL.forward(rows)
}

#[test]
fn an_idle_executor_takes_a_lone_request_at_once() {
    let mut batcher = batcher(8, 64, 1);
    assert_eq!(poll(&mut batcher, 0), "-");
    push(&mut batcher, 5, 1, NEVER, 'a');
    assert_eq!(poll(&mut batcher, 5), "a0 = 1/1");
}

#[test]
fn what_gathers_while_busy_is_the_next_batch() {
    let mut batcher = batcher(8, 64, 1);
    push(&mut batcher, 0, 1, NEVER, 'a');
    assert_eq!(poll(&mut batcher, 1), "a1 = 1/1");
    for (at, name) in [(10, 'b'), (20, 'c'), (30, 'd')] {
        let pushed = batcher.push(us(at), asks(1, NEVER), name).unwrap();
        assert!(!pushed.wake, "nobody is idle");
    }
    batcher.executor_idle();
    assert_eq!(poll(&mut batcher, 100), "b90! c80! d70! = 3/4");
    assert_eq!(batcher.queue_rows(), 0);
}

#[test]
fn order_is_first_in_first_out_and_batches_are_bounded() {
    let mut batcher = batcher(8, 64, 2);
    for (rows, name) in [(3, 'a'), (4, 'b'), (5, 'c'), (1, 'd')] {
        push(&mut batcher, 0, rows, NEVER, name);
    }
    // `d` would fit beside `a` and `b`, but may not overtake `c`. The second executor is idle, so nobody waits yet.
    assert_eq!(poll(&mut batcher, 0), "a0 b0 = 7/8");
    assert_eq!(poll(&mut batcher, 0), "c0 d0 = 6/8");
}

#[test]
fn entries_passed_over_by_the_last_idle_executor_waited_for_it() {
    let mut batcher = batcher(4, 64, 1);
    push(&mut batcher, 0, 4, NEVER, 'a');
    push(&mut batcher, 0, 4, NEVER, 'b');
    assert_eq!(poll(&mut batcher, 0), "a0 = 4/4");
    batcher.executor_idle();
    assert_eq!(poll(&mut batcher, 50), "b50! = 4/4");
    batcher.executor_idle();
    push(&mut batcher, 60, 4, NEVER, 'c');
    assert_eq!(poll(&mut batcher, 61), "c1 = 4/4");
}

#[test]
fn expired_entries_leave_early_wherever_they_stand() {
    let mut batcher = batcher(2, 64, 1);
    push(&mut batcher, 0, 2, NEVER, 'a');
    push(&mut batcher, 0, 2, us(50), 'b');
    push(&mut batcher, 0, 2, us(90), 'c');
    assert_eq!(poll(&mut batcher, 50), "c50 = 2/2 dropped b50");
    batcher.executor_idle();
    assert_eq!(poll(&mut batcher, 89), "a89! = 2/2");
    assert_eq!(batcher.push(us(90), asks(1, us(90)), 'd'), Err(Rejected::Expired));
}

#[test]
fn a_full_queue_rejects_and_says_how_full() {
    let mut batcher = batcher(4, 6, 1);
    push(&mut batcher, 0, 4, NEVER, 'a');
    let full = Rejected::QueueFull { queue_rows: 4, queue_rows_max: 6 };
    assert_eq!(batcher.push(us(0), asks(3, NEVER), 'b'), Err(full));
    assert_eq!(full.to_string(), "the queue is full: 4 of at most 6 rows are waiting");
    assert_eq!(batcher.push(us(0), asks(5, NEVER), 'b'), Err(Rejected::TooLarge { rows: 5, rows_max: 4 }));
    assert_eq!(batcher.admit(us(0), asks(7, NEVER)), Err(Rejected::TooLarge { rows: 7, rows_max: 6 }));
    push(&mut batcher, 0, 2, NEVER, 'b');
    assert_eq!(batcher.queue_rows(), 6);
}

#[test]
fn bytes_are_bounded_too() {
    let mut batcher = idle(BatchLimits::new(4, 64).with_queue_bytes_max(100), 1);
    let of = |bytes| Request { bytes, ..asks(1, NEVER) };
    // What is larger than the whole queue is taken while nothing else waits, as it could never be otherwise.
    let large = batcher.push(us(0), of(150), 'a').unwrap().ticket;
    let full = Rejected::QueueBytesFull { queue_bytes: 150, queue_bytes_max: 100 };
    assert_eq!(batcher.push(us(0), of(1), 'b'), Err(full));
    assert_eq!(batcher.cancel(large), Some('a'));
    batcher.push(us(0), of(99), 'b').unwrap();
    batcher.push(us(0), of(1), 'c').unwrap();
    assert!(batcher.push(us(0), of(1), 'd').is_err());
    assert_eq!(poll(&mut batcher, 0), "b0 c0 = 2/2");
    assert_eq!(batcher.queue_bytes(), 0);
}

#[test]
fn cancelling_makes_room() {
    let mut batcher = batcher(4, 4, 1);
    let a = push(&mut batcher, 0, 3, NEVER, 'a');
    let b = push(&mut batcher, 0, 1, NEVER, 'b');
    assert_eq!(batcher.cancel(a), Some('a'));
    assert_eq!(batcher.cancel(a), None);
    assert_eq!(batcher.queue_rows(), 1);
    assert_eq!(poll(&mut batcher, 0), "b0 = 1/1");
    assert_eq!(batcher.cancel(b), None);
}

#[test]
fn sizes_are_powers_of_two_and_the_maximum() {
    let check = |rows_max: usize, sizes: &[usize]| {
        let limits = BatchLimits::new(rows_max, 0);
        assert_eq!(limits.padded_sizes(), sizes);
        for (place, &size) in sizes.iter().enumerate() {
            assert_eq!((limits.place(size), limits.padded_rows_within(size)), (place, size));
        }
        for rows in 1..=rows_max {
            let (padded, within) = (limits.padded_rows(rows), limits.padded_rows_within(rows));
            assert!(within <= rows && rows <= padded && sizes.contains(&padded) && sizes.contains(&within));
        }
        assert_eq!(limits.padded_rows_within(usize::MAX), rows_max);
        assert!(limits.queue_rows_max() >= limits.rows_max());
    };
    check(1, &[1]);
    check(2, &[1, 2]);
    check(3, &[1, 2, 3]);
    check(6, &[1, 2, 4, 6]);
    check(8, &[1, 2, 4, 8]);
    assert_eq!(BatchLimits::new(0, 0).padded_sizes(), [1]);
}

#[test]
fn a_fixed_window_waits_even_beside_an_idle_executor() {
    let mut batcher = idle(BatchLimits::new(4, 64).with_policy(Policy::Window(us(100))), 1);
    push(&mut batcher, 0, 1, NEVER, 'a');
    assert_eq!(poll(&mut batcher, 0), "until 100");
    push(&mut batcher, 40, 1, NEVER, 'b');
    assert_eq!(poll(&mut batcher, 50), "until 100");
    assert_eq!(poll(&mut batcher, 100), "a100~ b60~ = 2/2");
    batcher.executor_idle();
    // A full batch does not wait for its window.
    push(&mut batcher, 200, 3, NEVER, 'c');
    assert_eq!(poll(&mut batcher, 200), "until 300");
    assert!(batcher.push(us(210), asks(1, NEVER), 'd').unwrap().wake);
    assert_eq!(poll(&mut batcher, 210), "c10~ d0 = 4/4");
    batcher.executor_idle();
    push(&mut batcher, 400, 1, NEVER, 'e');
    batcher.close();
    assert_eq!(poll(&mut batcher, 400), "e0 = 1/1");
}

/// So many bursts of nine requests, 100 us apart, a second after each other, each answered before the next.
fn bursts(batcher: &mut Batcher<char>, count: u64) {
    for burst in 0..count {
        for index in 0..9 {
            let now = burst * 1_000_000 + index * 100;
            push(batcher, now, 1, NEVER, 'x');
            if let Decision::Run { .. } = batcher.poll(us(now), Permit::All).decision {
                batcher.executor_idle();
            }
        }
        let now = burst * 1_000_000 + 500_000;
        if let Decision::Run { .. } = batcher.poll(us(now), Permit::All).decision {
            batcher.executor_idle();
        }
    }
}

#[test]
fn bursts_are_learned_and_then_an_idle_executor_lingers_a_little() {
    let mut batcher = batcher(16, 64, 1);
    warm_up(&mut batcher);
    push(&mut batcher, 0, 1, NEVER, 'a');
    assert_eq!(poll(&mut batcher, 0), "a0 = 1/1", "nothing is known of bursts yet");
    batcher.executor_idle();
    bursts(&mut batcher, 4);
    let at = 10_000_000;
    let first = batcher.push(us(at), asks(1, NEVER), 'a').unwrap();
    assert!(first.wake, "somebody has to look at the time");
    assert_eq!(poll(&mut batcher, at), format!("until {}", at + 1_000));
    // Every arrival starts the gap again, and wakes nobody.
    for (after, name) in [(900, 'b'), (1_700, 'c'), (2_500, 'd')] {
        assert!(!batcher.push(us(at + after), asks(1, NEVER), name).unwrap().wake);
    }
    // Three milliseconds are the end, however the burst goes on.
    assert_eq!(poll(&mut batcher, at + 1_000), format!("until {}", at + 3_000));
    assert_eq!(poll(&mut batcher, at + 3_000), "a3000~ b2100~ c1300~ d500~ = 4/4");
    batcher.executor_idle();
    // A full batch is the end as well.
    push(&mut batcher, at + 50_000, 15, NEVER, 'e');
    assert_eq!(poll(&mut batcher, at + 50_000), format!("until {}", at + 51_000));
    assert!(batcher.push(us(at + 50_100), asks(1, NEVER), 'f').unwrap().wake);
    assert_eq!(poll(&mut batcher, at + 50_100), "e100~ f0 = 16/16");
}

#[test]
fn nobody_lingers_at_the_cost_of_a_deadline() {
    let mut batcher = batcher(16, 64, 1);
    warm_up(&mut batcher);
    bursts(&mut batcher, 4);
    let at = 10_000_000;
    // A full batch takes 13.6 ms: of 14 ms, 400 us are left to linger.
    push(&mut batcher, at, 1, us(at + 14_000), 'a');
    assert_eq!(poll(&mut batcher, at), format!("until {}", at + 400));
    // And if the next one has no room at all, the executor is woken.
    assert!(batcher.push(us(at + 100), asks(1, us(at + 13_000)), 'b').unwrap().wake);
    assert_eq!(poll(&mut batcher, at + 100), "b0 a100~ = 2/2");
}

#[test]
fn random_arrivals_are_no_bursts() {
    let mut batcher = batcher(16, 64, 1);
    warm_up(&mut batcher);
    // Every tenth request is followed by another within the gap: at 80 a second, that is chance.
    for index in 0..500 {
        let now = index * 20_000;
        push(&mut batcher, now, 1, NEVER, 'x');
        assert!(poll(&mut batcher, now).ends_with("= 1/1"), "request {index} was held back");
        if index % 10 == 0 {
            push(&mut batcher, now + 300, 1, NEVER, 'y');
        }
        batcher.executor_idle();
        if batcher.queue_rows() > 0 {
            assert_eq!(poll(&mut batcher, now + 12_000), "y11700! = 1/1");
            batcher.executor_idle();
        }
    }
}

#[test]
fn batches_are_as_large_as_the_strictest_deadline_allows() {
    let mut batcher = batcher(64, 256, 1);
    warm_up(&mut batcher);
    for index in 0..40 {
        // 32 rows take 15.2 ms, 64 take 18.4.
        push(&mut batcher, 0, 1, if index == 20 { us(16_000) } else { us(60_000) }, 'x');
    }
    let Decision::Run { rows, padded_rows, members } = batcher.poll(us(0), Permit::All).decision else {
        panic!("it runs");
    };
    assert_eq!((rows, padded_rows), (32, 32));
    assert_eq!(members[0].deadline, us(16_000), "the strictest deadline is in the first batch");
}

#[test]
fn what_cannot_be_answered_in_time_is_not_run() {
    let mut batcher = batcher(8, 64, 1);
    warm_up(&mut batcher);
    push(&mut batcher, 0, 1, us(12_000), 'a');
    push(&mut batcher, 0, 1, us(30_000), 'b');
    assert_eq!(poll(&mut batcher, 0), "b0 = 1/1 dropped a0");
    batcher.executor_idle();
    // If nothing else is there, it is run after all: estimates that nothing can correct would be the last ones.
    push(&mut batcher, 50_000, 1, us(62_000), 'c');
    push(&mut batcher, 50_000, 1, us(61_000), 'd');
    assert_eq!(poll(&mut batcher, 50_000), "c0 = 1/1 dropped d0");
}

#[test]
fn in_a_backlog_the_latest_give_way_to_a_full_batch() {
    let mut batcher = batcher(8, 64, 1);
    warm_up(&mut batcher);
    // Eight rows take 12.8 ms.
    push(&mut batcher, 0, 1, us(40_000), 'a');
    for name in ['b', 'c', 'd', 'e', 'f', 'g', 'h', 'i'] {
        push(&mut batcher, 1_000, 1, us(60_000), name);
    }
    // In 12.5 ms, `a` could be answered alone, and all the others would be late for it.
    let ran = poll(&mut batcher, 27_500);
    assert!(ran.ends_with("= 8/8 dropped a27500"), "{ran}");
    batcher.executor_idle();
    // Who asked for so little time from the start gets it.
    push(&mut batcher, 100_000, 1, us(112_500), 'a');
    for name in ['b', 'c', 'd', 'e', 'f', 'g', 'h', 'i'] {
        push(&mut batcher, 100_000, 1, us(160_000), name);
    }
    assert_eq!(poll(&mut batcher, 100_000), "a0 b0 c0 d0 = 4/4");
}

#[test]
fn a_request_that_would_wait_too_long_is_refused_at_once() {
    let mut batcher = batcher(8, 1_000, 1);
    warm_up(&mut batcher);
    push(&mut batcher, 0, 8, us(100_000), 'a');
    assert!(poll(&mut batcher, 0).starts_with("a0"));
    for _ in 0..4 {
        push(&mut batcher, 0, 8, us(100_000), 'b');
    }
    // One batch runs, four wait: 64 ms, a quarter more to be sure, and its own after that.
    assert_eq!(batcher.estimated_wait(us(0), 0), us(64_000));
    let late = Rejected::TooLate { wait: us(64_000), left: us(92_000) };
    assert_eq!(batcher.push(us(0), asks(8, us(92_000)), 'c'), Err(late));
    assert_eq!(late.to_string(), "the deadline is in 92ms, but what is queued takes about 64ms");
    push(&mut batcher, 0, 8, us(93_000), 'c');
}

#[test]
fn batches_shrink_while_forwards_take_too_much_of_the_deadline() {
    let mut batcher = idle(BatchLimits::new(64, 256).with_deadline(Some(ms(32))), 1);
    for rows in batcher.limits().padded_sizes() {
        batcher.costs_mut().warmed_up(rows, forward(rows));
    }
    // Half of 32 ms is enough for 32 rows in 15.2 ms, not for 64 in 18.4.
    assert_eq!(batcher.costs().rows_cap(), 32);
    for _ in 0..8 {
        batcher.ran(32, ms(20));
    }
    assert_eq!(batcher.costs().rows_cap(), 8);
    for _ in 0..8 {
        batcher.ran(8, ms(10));
    }
    assert_eq!(batcher.costs().rows_cap(), 16);
    for _ in 0..500 {
        let cap = batcher.costs().rows_cap();
        batcher.ran(cap, forward(cap));
        assert!(batcher.costs().rows_cap() <= 64);
    }
    let one = batcher.costs().typical(1);
    assert!(one.abs_diff(forward(1)) < us(100), "what is not run is not believed slow for ever: {one:?}");
}

fn in_tier(tier: usize, rows: usize) -> Request {
    Request { tier, ..asks(rows, NEVER) }
}

#[test]
fn tiers_share_batches_by_weight_and_none_is_passed_over_for_long() {
    let mut batcher = idle(BatchLimits::new(10, 2_000).with_tiers(2), 1);
    let mut taken = [0, 0];
    for _ in 0..600 {
        batcher.push(us(0), in_tier(0, 1), 'a').unwrap();
        batcher.push(us(0), in_tier(1, 1), 'b').unwrap();
    }
    for _ in 0..50 {
        let Decision::Run { members, .. } = batcher.poll(us(0), Permit::All).decision else { panic!("it runs") };
        members.iter().for_each(|member| taken[member.tier] += 1);
        batcher.executor_idle();
    }
    assert_eq!(taken, [400, 100], "four to one");

    // A tier whose entries never fit beside those of the tier above is let in all the same.
    let mut batcher = idle(BatchLimits::new(8, 1_000).with_tiers(2), 1);
    batcher.push(us(0), in_tier(1, 8), 'b').unwrap();
    let mut passed_over = 0;
    loop {
        batcher.push(us(0), in_tier(0, 8), 'a').unwrap();
        let Decision::Run { members, .. } = batcher.poll(us(0), Permit::All).decision else { panic!("it runs") };
        batcher.executor_idle();
        if members[0].payload == 'b' {
            break;
        }
        passed_over += 1;
        assert!(passed_over <= PASSED_OVER_MAX);
    }
}

#[test]
fn an_entry_that_higher_tiers_overtook_says_so() {
    let mut batcher = idle(BatchLimits::new(4, 64).with_tiers(2), 1);
    batcher.push(us(0), in_tier(0, 4), 'a').unwrap();
    assert_eq!(poll(&mut batcher, 0), "a0 = 4/4");
    batcher.push(us(10), in_tier(1, 4), 'b').unwrap();
    batcher.push(us(20), in_tier(0, 4), 'c').unwrap();
    batcher.executor_idle();
    assert_eq!(poll(&mut batcher, 100), "c80! = 4/4");
    batcher.executor_idle();
    let Decision::Run { members, .. } = batcher.poll(us(400), Permit::All).decision else { panic!("it runs") };
    let Waited { whole, executor_busy, tier, .. } = members[0].waited;
    assert_eq!((whole, executor_busy, tier), (us(390), us(90), us(300)));
}

#[test]
fn lower_tiers_may_fill_less_of_the_queue() {
    let mut batcher = idle(BatchLimits::new(4, 100).with_tiers(2), 1);
    batcher.executor_idle();
    while batcher.push(us(0), in_tier(1, 4), 'b').is_ok() {}
    assert_eq!(batcher.queue_rows(), 72);
    while batcher.push(us(0), in_tier(0, 4), 'a').is_ok() {}
    assert_eq!(batcher.queue_rows(), 100);
}

#[test]
fn while_memory_is_short_lower_tiers_wait_and_the_first_does_not() {
    let mut batcher = idle(BatchLimits::new(8, 64).with_tiers(2), 1);
    batcher.push(us(0), in_tier(1, 1), 'b').unwrap();
    assert_eq!(poll_with(&mut batcher, 0, Permit::FirstTier), "until 50000");
    batcher.push(us(10), in_tier(0, 1), 'a').unwrap();
    assert_eq!(poll_with(&mut batcher, 10, Permit::FirstTier), "a0 = 1/1");
    batcher.executor_idle();
    assert_eq!(poll_with(&mut batcher, 20, Permit::FirstTier), "until 50020");
    assert_eq!(poll_with(&mut batcher, 320, Permit::All), "b320# = 1/1");
}

/// One thing that happens, `after` microseconds after the one before.
#[derive(Debug, Clone)]
enum Event {
    Arrive {
        rows: usize,
        patience: u64,
        tier: usize,
    },
    Finish {
        took: u64,
    },
    Cancel {
        nth: usize,
    },
    /// Nothing but time.
    Pass,
}

fn events() -> impl Strategy<Value = Vec<(u64, Event)>> {
    let event = prop_oneof![
        6 => (1..=9_usize, prop_oneof![Just(u64::MAX), 1..2_000_u64], 0..3_usize)
            .prop_map(|(rows, patience, tier)| Event::Arrive { rows, patience, tier }),
        3 => (0..3_000_u64).prop_map(|took| Event::Finish { took }),
        1 => (0..8_usize).prop_map(|nth| Event::Cancel { nth }),
        2 => Just(Event::Pass),
    ];
    prop::collection::vec((0..400_u64, event), 1..200)
}

struct Waiting {
    ticket: Ticket,
    rows: usize,
    tier: usize,
    deadline: Duration,
    arrived: Duration,
}

proptest! {
    /// For any arrival order: every accepted request ends exactly once, as run, dropped or cancelled; within the bounds;
    /// none runs past its deadline; no tier is passed over for longer than its bound; and none waits beside an idle
    /// executor but to linger, for 3 ms at most.
    #[test]
    fn never_loses_doubles_or_over_holds(
        events in events(), rows_max in 1..12_usize, queue_rows_max in 1..60_usize, executors in 1..4_usize,
        tiers in 1..4_usize, forward in 0..4_000_u64, bursty in any::<bool>(), deadline in prop::option::of(1..9_u64),
    ) {
        let limits = BatchLimits::new(rows_max, queue_rows_max).with_tiers(tiers).with_deadline(deadline.map(ms));
        let mut batcher: Batcher<u64> = Batcher::new(limits, executors);
        for _ in 0..executors {
            batcher.executor_idle();
        }
        for rows in limits.padded_sizes() {
            batcher.costs_mut().warmed_up(rows, us(forward + rows as u64));
        }
        if bursty {
            batcher.bursts = Bursts::bursty();
        }
        // The model: who waits, with rows and deadline; how many executors run.
        let mut waiting: BTreeMap<u64, Waiting> = BTreeMap::new();
        let mut running: Vec<usize> = Vec::new();
        let mut passed_over = vec![0; tiers];
        let mut lingering_since: Option<Duration> = None;
        let mut now = 0;
        for (serial, (after, event)) in events.into_iter().enumerate() {
            let serial = serial as u64;
            now += after;
            match event {
                Event::Arrive { rows, patience, tier } => {
                    let tier = tier.min(tiers - 1);
                    let deadline = us(now.saturating_add(patience));
                    let queued: usize = waiting.values().map(|entry| entry.rows).sum();
                    let request = Request { rows, bytes: rows, deadline, tier };
                    match batcher.push(us(now), request, serial) {
                        Ok(Pushed { ticket, .. }) => {
                            prop_assert!(rows <= rows_max && queued + rows <= limits.tier_rows_max(tier));
                            waiting.insert(serial, Waiting { ticket, rows, tier, deadline, arrived: us(now) });
                        }
                        Err(Rejected::TooLarge { .. }) => prop_assert!(rows > rows_max),
                        Err(Rejected::QueueFull { queue_rows, .. }) => {
                            prop_assert_eq!(queue_rows, queued);
                            prop_assert!(queued + rows > limits.tier_rows_max(tier));
                        }
                        Err(Rejected::TooLate { wait, left }) => {
                            prop_assert!(queued > 0 && left == deadline - us(now));
                            let own = batcher.costs().high(batcher.costs().rows_cap().max(rows));
                            prop_assert!(wait + wait / WAIT_MARGIN + own > left);
                        }
                        Err(error) => prop_assert!(false, "{error}"),
                    }
                }
                Event::Finish { took } => {
                    if let Some(padded_rows) = running.pop() {
                        batcher.ran(padded_rows, us(took));
                        batcher.executor_idle();
                    }
                }
                Event::Cancel { nth } => {
                    if let Some((&serial, entry)) = waiting.iter().nth(nth) {
                        let ticket = entry.ticket;
                        prop_assert_eq!(batcher.cancel(ticket), Some(serial));
                        prop_assert_eq!(batcher.cancel(ticket), None);
                        waiting.remove(&serial);
                    }
                }
                Event::Pass => {}
            }
            // Idle executors ask at once, as the threads do.
            while running.len() < executors {
                let poll = batcher.poll(us(now), Permit::All);
                for member in poll.dropped {
                    let entry = waiting.remove(&member.payload).expect("it was waiting");
                    let longest = limits.padded_sizes().into_iter().map(|rows| batcher.costs().high(rows)).max();
                    prop_assert!(entry.deadline <= us(now) + longest.unwrap_or_default(), "dropped with time left");
                }
                let (members, rows, padded_rows) = match poll.decision {
                    Decision::Run { members, rows, padded_rows } => (members, rows, padded_rows),
                    Decision::Wait { until: None } => {
                        prop_assert!(waiting.is_empty(), "over-held {} entries", waiting.len());
                        lingering_since = None;
                        break;
                    }
                    Decision::Wait { until: Some(until) } => {
                        prop_assert!(!waiting.is_empty() && until > us(now));
                        let since = *lingering_since.get_or_insert(us(now));
                        prop_assert!(until <= since + ms(3), "lingers from {since:?} to {until:?}");
                        let strictest = waiting.values().map(|entry| entry.deadline).min().expect("not empty");
                        prop_assert!(until + batcher.costs().high(batcher.costs().rows_cap()) <= strictest);
                        break;
                    }
                };
                lingering_since = None;
                running.push(padded_rows);
                prop_assert!(!members.is_empty() && rows <= rows_max);
                prop_assert!(members.len() == 1 || rows <= batcher.costs().rows_cap());
                prop_assert_eq!(rows, members.iter().map(|member| member.rows).sum::<usize>());
                prop_assert!(limits.padded_sizes().contains(&padded_rows) && padded_rows >= rows);
                let was_waiting: Vec<bool> =
                    (0..tiers).map(|tier| waiting.values().any(|entry| entry.tier == tier)).collect();
                let mut ran = vec![false; tiers];
                for member in members {
                    let entry = waiting.remove(&member.payload).expect("it was waiting");
                    prop_assert_eq!((member.rows, member.tier), (entry.rows, entry.tier));
                    ran[entry.tier] = true;
                    prop_assert!(us(now) < entry.deadline);
                    let Waited { whole, executor_busy, linger, memory_permit, tier } = member.waited;
                    prop_assert_eq!(whole, us(now) - entry.arrived);
                    prop_assert!(executor_busy + linger + memory_permit + tier <= whole);
                    prop_assert!(linger <= ms(3) && memory_permit.is_zero());
                }
                for tier in 0..tiers {
                    let still = waiting.values().any(|entry| entry.tier == tier);
                    passed_over[tier] = if was_waiting[tier] && !ran[tier] && still { passed_over[tier] + 1 } else { 0 };
                    // Several tiers may be due at once, and one batch may have room for only one of them.
                    prop_assert!(passed_over[tier] <= PASSED_OVER_MAX + tiers as u32);
                }
            }
            prop_assert_eq!(batcher.queue_rows(), waiting.values().map(|entry| entry.rows).sum::<usize>());
        }
        let left: Vec<u64> = batcher.drain(us(now)).into_iter().map(|member| member.payload).collect();
        prop_assert_eq!(left, waiting.into_keys().collect::<Vec<_>>());
        prop_assert_eq!((batcher.queue_rows(), batcher.queue_bytes()), (0, 0));
    }
}
