//! Executors in the background, and on their way back. What the kernel has to do with it is Linux's.

use std::sync::Mutex;

use super::*;
use crate::model::Runtime;
use crate::priority::Priority;

/// Where forwards and loads ran: the thread and its priority.
type Seen = Arc<Mutex<Vec<(std::thread::ThreadId, Priority)>>>;

fn seen_here() -> (std::thread::ThreadId, Priority) {
    (std::thread::current().id(), Priority::current())
}

/// Notes where every forward runs, and then passes through the gate.
fn noting(gate: &Arc<Gate>) -> (EchoRuntime, Seen) {
    let seen = Seen::default();
    let (note, gate) = (seen.clone(), gate.clone());
    let runtime = EchoRuntime::new().with_hook(move |_| {
        note.lock().unwrap().push(seen_here());
        gate.pass();
        Ok(())
    });
    (runtime, seen)
}

fn last(seen: &Seen) -> (std::thread::ThreadId, Priority) {
    *seen.lock().unwrap().last().unwrap()
}

/// Runs a test on a thread that may not raise priorities, as in most containers.
#[cfg(target_os = "linux")]
fn without_raising(test: impl Future<Output = ()> + Send + 'static) {
    let run = || {
        crate::priority::tests::forbid_raising();
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
    };
    std::thread::spawn(run).join().unwrap();
}

#[tokio::test]
async fn what_runs_in_the_background_holds_no_turn_and_begins_where_one_is_spare() {
    let devices = SharedDevices::with_cpu(SharedDevice::new(1, None));
    let (front_gate, back_gate) = (Gate::new(), Gate::new());
    let front = start_on(&devices, EchoRuntime::new().with_gate(front_gate.clone()), 1).await;
    let back = start_on(&devices, EchoRuntime::new().with_gate(back_gate.clone()), 1).await;
    back.set_background(true);
    assert!(back.is_background() && !front.is_background());

    // The only core is taken: it does not begin.
    front_gate.close();
    let running = submit(&front);
    until_held(&front_gate).await;
    let behind = submit(&back);
    until_queued(&back, 1).await;
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert_eq!(back.metrics().queue_rows, 1);
    front_gate.open();
    running.await.unwrap().unwrap();
    behind.await.unwrap().unwrap();

    // One that has begun keeps nobody waiting, however long it takes.
    back_gate.close();
    let behind = submit(&back);
    until_held(&back_gate).await;
    for _ in 0..20 {
        assert_eq!(submit(&front).await.unwrap().unwrap().waited.reason(), WaitReason::None);
    }
    back_gate.open();
    behind.await.unwrap().unwrap();

    // In the foreground it would have.
    back.set_background(false);
    until(|| !back.is_background()).await;
    back_gate.close();
    let beside = submit(&back);
    until_held(&back_gate).await;
    let waiting = submit(&front);
    until_queued(&front, 1).await;
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert_eq!(front.metrics().queue_rows, 1);
    back_gate.open();
    beside.await.unwrap().unwrap();
    waiting.await.unwrap().unwrap();
}

#[tokio::test]
async fn no_core_is_left_for_a_model_in_the_background() {
    let devices = SharedDevices::with_cpu(SharedDevice::new(2, None));
    let gate = Gate::new();
    let front = start_on(&devices, EchoRuntime::new().with_gate(gate.clone()), 2).await;
    let back = start_on(&devices, EchoRuntime::new(), 1).await;
    back.set_background(true);
    gate.close();
    let requests: Vec<_> = (0..2).map(|_| submit(&front)).collect();
    until(|| gate.held() == 2).await;
    gate.open();
    for request in requests {
        request.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_server_is_busy_while_something_is_queued_or_runs() {
    let gate = Gate::new();
    let server = start(EchoRuntime::new().with_gate(gate.clone()), 1, 1, 64).await;
    until(|| !server.is_busy()).await;
    gate.close();
    let running = spawn(&server, &[1.0], LONG);
    until_held(&gate).await;
    let queued = spawn(&server, &[2.0], LONG);
    until_queued(&server, 1).await;
    assert!(server.is_busy());
    queued.abort();
    let _ = queued.await;
    until_queued(&server, 0).await;
    assert!(server.is_busy(), "one runs");
    gate.open();
    running.await.unwrap().unwrap();
    until(|| !server.is_busy()).await;
}

#[tokio::test]
async fn nothing_is_learned_from_how_long_it_takes_in_the_background() {
    let slow = Arc::new(AtomicBool::new(false));
    let is_slow = slow.clone();
    let runtime = EchoRuntime::new().with_hook(move |_| {
        if is_slow.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    });
    let limits = BatchLimits::new(4, 64).with_deadline(Some(Duration::from_millis(30)));
    let server = start_with(runtime, ServerOptions::new(limits)).await;
    let known = || (server.forward_time(1), server.metrics().rows_cap);
    let before = known();
    slow.store(true, Ordering::SeqCst);
    server.set_background(true);
    for _ in 0..5 {
        let outcome = server.submit(request(&[1.0]), Instant::now() + LONG).await.unwrap();
        // It slept, and had no core for that time.
        assert!(!cfg!(target_os = "linux") || outcome.forward_micros < 10_000, "{outcome:?}");
    }
    assert_eq!(known(), before);
    server.set_background(false);
    until(|| !server.is_background()).await;
    let outcome = server.submit(request(&[1.0; 4]), Instant::now() + LONG).await.unwrap();
    assert!(outcome.forward_micros >= 20_000);
    assert_ne!(known(), before);
}

#[tokio::test]
async fn want_of_memory_in_the_background_closes_the_device_to_nobody() {
    let devices = SharedDevices::with_cpu(SharedDevice::new(2, None));
    let warm = Arc::new(AtomicBool::new(false));
    let is_warm = warm.clone();
    let short = EchoRuntime::new().with_hook(move |_| match is_warm.load(Ordering::SeqCst) {
        true => Err(ModelError::OutOfMemory("no room".to_owned())),
        false => Ok(()),
    });
    let short = start_on(&devices, short, 1).await;
    let front = start_on(&devices, EchoRuntime::new(), 1).await;
    warm.store(true, Ordering::SeqCst);
    short.set_background(true);
    let mut refused = 0;
    for _ in 0..20 {
        match submit(&short).await.unwrap() {
            Err(InferError::Model(ModelError::OutOfMemory(_))) => {}
            // Its own breaker.
            Err(InferError::BreakerOpen { .. }) => refused += 1,
            other => panic!("{other:?}"),
        }
        submit(&front).await.unwrap().unwrap();
    }
    assert!(refused > 0);
    assert_eq!(devices.cpu().unwrap().open(), None);
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn executors_go_down_and_come_up_again_between_two_forwards() {
    let (runtime, seen) = noting(&Gate::new());
    let server = start_with(runtime, ServerOptions::new(BatchLimits::new(4, 64))).await;
    let normal = last(&seen);
    for _ in 0..3 {
        server.set_background(true);
        server.set_background(true);
        server.submit(request(&[1.0]), Instant::now() + LONG).await.unwrap();
        let (thread, priority) = last(&seen);
        assert!(priority.is_lowest());
        server.set_background(false);
        until(|| !server.is_background()).await;
        server.submit(request(&[1.0]), Instant::now() + LONG).await.unwrap();
        let (risen, priority) = last(&seen);
        assert_eq!(priority, normal.1);
        // Where raising is allowed, it is the same one.
        let may_raise = std::thread::spawn(|| crate::priority::lower(crate::priority::Whose::Thread).restore().is_ok());
        assert_eq!(risen == thread, may_raise.join().unwrap());
    }
}

#[cfg(target_os = "linux")]
#[test]
fn one_that_may_not_come_up_is_replaced_and_somebody_answers_all_the_time() {
    without_raising(async {
        let gate = Gate::new();
        let (runtime, seen) = noting(&gate);
        let server =
            start_with(runtime, ServerOptions { executors: 2, ..ServerOptions::new(BatchLimits::new(1, 64)) }).await;
        let normal = last(&seen).1;
        server.set_background(true);
        // One sleeps, and one is in the middle of a forward.
        gate.close();
        let under_way = spawn(&server, &[1.0], LONG);
        until_held(&gate).await;
        assert!(last(&seen).1.is_lowest());
        server.set_background(false);
        // A fresh one is warmed up before anything of the old ones is taken away.
        until(|| gate.held() == 2).await;
        assert_eq!((server.metrics().executors_ready, server.is_background()), (2, true));
        gate.open();
        assert_eq!(under_way.await.unwrap().unwrap().outputs, answer(&[1.0]));
        for round in 0_u8.. {
            let done = !server.is_background();
            let outcome = server.submit(request(&[f32::from(round)]), Instant::now() + LONG).await.unwrap();
            assert_eq!(outcome.outputs, answer(&[f32::from(round)]));
            if done {
                break;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        seen.lock().unwrap().clear();
        gate.close();
        let both: Vec<_> = (0..2).map(|_| spawn(&server, &[1.0], LONG)).collect();
        until(|| gate.held() == 2).await;
        gate.open();
        for one in both {
            one.await.unwrap().unwrap();
        }
        assert!(seen.lock().unwrap().iter().all(|(_, priority)| *priority == normal));
        assert_eq!(server.metrics().executors_ready, 2);
        // None of those that were replaced keeps the end waiting.
        tokio::time::timeout(LONG, server.shutdown()).await.unwrap();
    });
}

#[cfg(target_os = "linux")]
#[test]
fn the_copy_of_who_takes_over_is_accounted_for_and_without_room_the_old_one_ends_first() {
    // The file of 4 bytes, the weights of 1,000, and a row of 100; 80 % of the memory may be taken.
    for (capacity, most) in [(10_000, 2_204), (1_500, 1_104)] {
        without_raising(async move {
            let device = SharedDevice::new(2, Some(capacity));
            let devices = SharedDevices::with_cpu(device);
            let cpu = devices.cpu().unwrap();
            let reserved = Arc::new(Mutex::new(Vec::new()));
            let (note, watched) = (reserved.clone(), cpu.clone());
            let runtime = EchoRuntime::new().with_memory(1_000, 100).with_hook(move |_| {
                note.lock().unwrap().push(watched.reserved());
                Ok(())
            });
            let server = start_on(&devices, runtime, 1).await;
            assert_eq!(cpu.reserved(), 1_104);
            server.set_background(true);
            submit(&server).await.unwrap().unwrap();
            reserved.lock().unwrap().clear();
            server.set_background(false);
            // What is queued meanwhile is answered, by whoever it is.
            let mut answered = 0;
            while server.is_background() {
                submit(&server).await.unwrap().unwrap();
                answered += 1;
            }
            assert!(answered > 0 || most == 1_104);
            submit(&server).await.unwrap().unwrap();
            until(|| cpu.reserved() == 1_104).await;
            assert_eq!(reserved.lock().unwrap().iter().copied().max(), Some(most));
            tokio::time::timeout(LONG, server.shutdown()).await.unwrap();
        });
    }
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_broken_model_is_loaded_again_by_a_thread_that_nobody_waits_behind() {
    struct Loads(EchoRuntime, Seen);
    impl Runtime for Loads {
        fn load(
            &self,
            artefact: &Artefact,
            spec: &ModelSpec,
            options: &LoadOptions,
        ) -> Result<Box<dyn crate::model::Model>, LoadError> {
            self.1.lock().unwrap().push(seen_here());
            self.0.load(artefact, spec, options)
        }
    }
    let loads = Seen::default();
    let echo = EchoRuntime::new().with_hook(|inputs| match inputs[0].data() {
        TensorData::Float32(values) if values.contains(&666.0) => panic!("a bug of the model"),
        _ => Ok(()),
    });
    let options = ServerOptions::new(BatchLimits::new(4, 64));
    let artefact = Artefact::new("echo", *b"echo");
    let runtime = Arc::new(Loads(echo, loads.clone()));
    let server = ModelServer::start("echo", runtime, artefact, spec(), options).await.unwrap();
    server.set_background(true);
    server.submit(request(&[1.0]), Instant::now() + LONG).await.unwrap();
    let broken = server.submit(request(&[666.0]), Instant::now() + LONG).await;
    assert!(matches!(broken, Err(InferError::Model(ModelError::Panicked(_)))), "{broken:?}");
    let after = server.submit(request(&[2.0]), Instant::now() + LONG).await.unwrap();
    assert_eq!(after.outputs, answer(&[2.0]));
    let loads = loads.lock().unwrap().clone();
    assert_eq!(loads.len(), 2);
    assert!(loads[0].0 != loads[1].0 && !loads[1].1.is_lowest());
    assert_eq!(server.metrics().executors_ready, 1);
    tokio::time::timeout(LONG, server.shutdown()).await.unwrap();
}

/// Puts a server down and up while it is asked: whatever the threads do, every request is answered, and with its own rows.
#[cfg(target_os = "linux")]
#[test]
fn nothing_is_lost_however_often_it_goes_down_and_up() {
    without_raising(async {
        let server = start(EchoRuntime::new().with_delay(Duration::from_micros(300)), 2, 4, 256).await;
        let asking: Vec<_> = (0..4_u8)
            .map(|caller| {
                let server = server.clone();
                tokio::spawn(async move {
                    for round in 0..150_u8 {
                        let value = f32::from(caller) * 1_000.0 + f32::from(round);
                        let outcome = server.submit(request(&[value]), Instant::now() + LONG).await.unwrap();
                        assert_eq!(outcome.outputs, answer(&[value]));
                    }
                })
            })
            .collect();
        let mut background = false;
        while !asking.iter().all(tokio::task::JoinHandle::is_finished) {
            background = !background;
            server.set_background(background);
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
        for asked in asking {
            asked.await.unwrap();
        }
        server.set_background(false);
        until(|| !server.is_background()).await;
        assert_eq!(server.metrics().executors_ready, 2);
        tokio::time::timeout(LONG, server.shutdown()).await.unwrap();
    });
}
