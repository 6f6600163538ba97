use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const NEVER: Duration = Duration::MAX;

fn us(micros: u64) -> Duration {
    Duration::from_micros(micros)
}

fn batcher(rows_max: usize, queue_rows_max: usize, executors: usize) -> Batcher<char> {
    let mut batcher = Batcher::new(BatchLimits::new(rows_max, queue_rows_max), executors);
    for _ in 0..executors {
        batcher.executor_idle();
    }
    batcher
}

/// Polls and shows who runs: payload, waiting time, and `!` where an executor was busy.
fn poll(batcher: &mut Batcher<char>, now: u64) -> String {
    let poll = batcher.poll(us(now));
    let show = |members: &[Member<char>]| -> String {
        let busy = |member: &Member<char>| if member.reason == WaitReason::ExecutorBusy { "!" } else { "" };
        members
            .iter()
            .map(|m| format!("{}{}{}", m.payload, m.waited.as_micros(), busy(m)))
            .collect::<Vec<_>>()
            .join(" ")
    };
    let mut text = match &poll.decision {
        Decision::Run { members, rows, padded_rows } => format!("{} = {rows}/{padded_rows}", show(members)),
        Decision::Wait => "-".to_owned(),
    };
    if !poll.expired.is_empty() {
        text += &format!(" expired {}", show(&poll.expired));
    }
    text
}

#[test]
fn an_idle_executor_takes_a_lone_request_at_once() {
    let mut batcher = batcher(8, 64, 1);
    assert_eq!(poll(&mut batcher, 0), "-");
    batcher.push(us(5), 1, NEVER, 'a').unwrap();
    assert_eq!(poll(&mut batcher, 5), "a0 = 1/1");
}

#[test]
fn what_gathers_while_busy_is_the_next_batch() {
    let mut batcher = batcher(8, 64, 1);
    batcher.push(us(0), 1, NEVER, 'a').unwrap();
    assert_eq!(poll(&mut batcher, 1), "a1 = 1/1");
    for (at, name) in [(10, 'b'), (20, 'c'), (30, 'd')] {
        batcher.push(us(at), 1, NEVER, name).unwrap();
    }
    batcher.executor_idle();
    assert_eq!(poll(&mut batcher, 100), "b90! c80! d70! = 3/4");
    assert_eq!(batcher.queue_rows(), 0);
}

#[test]
fn order_is_first_in_first_out_and_batches_are_bounded() {
    let mut batcher = batcher(8, 64, 2);
    for (rows, name) in [(3, 'a'), (4, 'b'), (5, 'c'), (1, 'd')] {
        batcher.push(us(0), rows, NEVER, name).unwrap();
    }
    // `d` would fit beside `a` and `b`, but may not overtake `c`. The second executor is idle, so nobody waits yet.
    assert_eq!(poll(&mut batcher, 0), "a0 b0 = 7/8");
    assert_eq!(poll(&mut batcher, 0), "c0 d0 = 6/8");
}

#[test]
fn entries_passed_over_by_the_last_idle_executor_waited_for_it() {
    let mut batcher = batcher(4, 64, 1);
    batcher.push(us(0), 4, NEVER, 'a').unwrap();
    batcher.push(us(0), 4, NEVER, 'b').unwrap();
    assert_eq!(poll(&mut batcher, 0), "a0 = 4/4");
    batcher.executor_idle();
    assert_eq!(poll(&mut batcher, 50), "b50! = 4/4");
    batcher.executor_idle();
    batcher.push(us(60), 4, NEVER, 'c').unwrap();
    assert_eq!(poll(&mut batcher, 61), "c1 = 4/4");
}

#[test]
fn expired_entries_leave_early_wherever_they_stand() {
    let mut batcher = batcher(2, 64, 1);
    batcher.push(us(0), 2, NEVER, 'a').unwrap();
    batcher.push(us(0), 2, us(50), 'b').unwrap();
    batcher.push(us(0), 2, us(90), 'c').unwrap();
    assert_eq!(poll(&mut batcher, 50), "a50 = 2/2 expired b50");
    batcher.executor_idle();
    assert_eq!(poll(&mut batcher, 89), "c89! = 2/2");
    assert_eq!(batcher.push(us(90), 1, us(90), 'd'), Err(Rejected::Expired));
}

#[test]
fn a_full_queue_rejects_and_says_how_full() {
    let mut batcher = batcher(4, 6, 1);
    batcher.push(us(0), 4, NEVER, 'a').unwrap();
    let full = Rejected::QueueFull { queue_rows: 4, queue_rows_max: 6 };
    assert_eq!(batcher.push(us(0), 3, NEVER, 'b'), Err(full));
    assert_eq!(full.to_string(), "the queue is full: 4 of at most 6 rows are waiting");
    assert_eq!(batcher.push(us(0), 5, NEVER, 'b'), Err(Rejected::TooLarge { rows: 5, rows_max: 4 }));
    assert_eq!(batcher.admit(us(0), 7, NEVER), Err(Rejected::TooLarge { rows: 7, rows_max: 6 }));
    batcher.push(us(0), 2, NEVER, 'b').unwrap();
    assert_eq!(batcher.queue_rows(), 6);
}

#[test]
fn cancelling_makes_room() {
    let mut batcher = batcher(4, 4, 1);
    let a = batcher.push(us(0), 3, NEVER, 'a').unwrap();
    let b = batcher.push(us(0), 1, NEVER, 'b').unwrap();
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
        assert!((1..=rows_max).all(|rows| limits.padded_rows(rows) >= rows));
        assert!((1..=rows_max).all(|rows| sizes.contains(&limits.padded_rows(rows))));
        assert!(limits.queue_rows_max() >= limits.rows_max());
    };
    check(1, &[1]);
    check(2, &[1, 2]);
    check(6, &[1, 2, 4, 6]);
    check(8, &[1, 2, 4, 8]);
    assert_eq!(BatchLimits::new(0, 0).padded_sizes(), [1]);
}

/// One thing that happens, `after` microseconds after the one before.
#[derive(Debug, Clone)]
enum Event {
    Arrive { rows: usize, patience: u64 },
    Finish,
    Cancel { nth: usize },
}

fn events() -> impl Strategy<Value = Vec<(u64, Event)>> {
    let event = prop_oneof![
        6 => (1..=9_usize, prop_oneof![Just(u64::MAX), 1..200_u64])
            .prop_map(|(rows, patience)| Event::Arrive { rows, patience }),
        3 => Just(Event::Finish),
        1 => (0..8_usize).prop_map(|nth| Event::Cancel { nth }),
    ];
    prop::collection::vec((0..40_u64, event), 1..200)
}

proptest! {
    /// For any arrival order: every accepted request ends exactly once, as run, expired or cancelled; in order;
    /// within the bounds; none runs past its deadline; and none waits while an executor is idle.
    #[test]
    fn never_loses_doubles_or_over_holds(
        events in events(), rows_max in 1..12_usize, queue_rows_max in 1..40_usize, executors in 1..4_usize,
    ) {
        let limits = BatchLimits::new(rows_max, queue_rows_max);
        let mut batcher: Batcher<u64> = Batcher::new(limits, executors);
        for _ in 0..executors {
            batcher.executor_idle();
        }
        // The model: who waits, with rows and deadline; how many executors run.
        let mut waiting: BTreeMap<u64, (Ticket, usize, Duration, Duration)> = BTreeMap::new();
        let mut running = 0;
        let mut last_run = None;
        let mut now = 0;
        for (serial, (after, event)) in events.into_iter().enumerate() {
            let serial = serial as u64;
            now += after;
            match event {
                Event::Arrive { rows, patience } => {
                    let deadline = us(now.saturating_add(patience));
                    let queued: usize = waiting.values().map(|entry| entry.1).sum();
                    match batcher.push(us(now), rows, deadline, serial) {
                        Ok(ticket) => {
                            prop_assert!(rows <= rows_max && queued + rows <= limits.queue_rows_max());
                            waiting.insert(serial, (ticket, rows, deadline, us(now)));
                        }
                        Err(Rejected::TooLarge { .. }) => prop_assert!(rows > rows_max),
                        Err(Rejected::QueueFull { queue_rows, .. }) => {
                            prop_assert_eq!(queue_rows, queued);
                            prop_assert!(queued + rows > limits.queue_rows_max());
                        }
                        Err(Rejected::Expired) => prop_assert!(false, "a deadline in the future is not expired"),
                    }
                }
                Event::Finish if running > 0 => {
                    running -= 1;
                    batcher.executor_idle();
                }
                Event::Finish => {}
                Event::Cancel { nth } => {
                    if let Some((&serial, &(ticket, ..))) = waiting.iter().nth(nth) {
                        prop_assert_eq!(batcher.cancel(ticket), Some(serial));
                        prop_assert_eq!(batcher.cancel(ticket), None);
                        waiting.remove(&serial);
                    }
                }
            }
            // Idle executors ask at once, as the threads do.
            while running < executors {
                let poll = batcher.poll(us(now));
                for member in poll.expired {
                    let (_, _, deadline, _) = waiting.remove(&member.payload).expect("it was waiting");
                    prop_assert!(deadline <= us(now));
                }
                let Decision::Run { members, rows, padded_rows } = poll.decision else {
                    prop_assert!(waiting.is_empty(), "over-held: {:?}", waiting);
                    break;
                };
                running += 1;
                prop_assert!(!members.is_empty() && rows <= rows_max);
                prop_assert_eq!(rows, members.iter().map(|member| member.rows).sum::<usize>());
                prop_assert!(limits.padded_sizes().contains(&padded_rows) && padded_rows >= rows);
                for member in members {
                    prop_assert!(last_run < Some(member.payload), "out of order");
                    last_run = Some(member.payload);
                    let (_, rows, deadline, arrived) = waiting.remove(&member.payload).expect("it was waiting");
                    prop_assert_eq!(member.rows, rows);
                    prop_assert!(us(now) < deadline);
                    prop_assert_eq!(member.waited, us(now) - arrived);
                    let waited = member.waited > Duration::ZERO;
                    prop_assert!(!waited || member.reason == WaitReason::ExecutorBusy);
                }
                // The batch is as full as the order allows.
                if let Some((_, next_rows, ..)) = waiting.values().next() {
                    prop_assert!(rows + next_rows > rows_max);
                }
            }
            prop_assert_eq!(batcher.queue_rows(), waiting.values().map(|entry| entry.1).sum::<usize>());
        }
        let left = batcher.drain(us(now)).into_iter().map(|member| member.payload).collect::<Vec<_>>();
        prop_assert_eq!(left, waiting.into_keys().collect::<Vec<_>>());
        prop_assert_eq!(batcher.queue_rows(), 0);
    }
}
