//! How much of the processor threads may claim. A thread at the lowest priority runs when no other one wants the core, and
//! leaves it at once when one does: Linux's SCHED_IDLE class, with the nice value of 19 for whoever looks at that alone.
//!
//! Any thread may go down. Going up again takes CAP_SYS_NICE, which containers rarely have; [`Lowered::restore`] says
//! whether it came to that. Elsewhere than on Linux nothing is lowered.

/// Threads that went to the lowest priority together, and where they were before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lowered {
    threads: Vec<i32>,
    before: Priority,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Priority {
    policy: i32,
    nice: i32,
}

/// Whose priority is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    /// The calling thread's.
    Thread,
    /// With those that it started, which have its name: libraries start threads of their own for the work of one.
    Team,
}

impl Priority {
    pub fn is_lowest(self) -> bool {
        self == platform::LOWEST
    }

    /// Of the calling thread.
    pub fn current() -> Priority {
        platform::priority(0)
    }
}

/// Lowers the priority of the calling thread.
pub fn lower(whose: Whose) -> Lowered {
    let before = Priority::current();
    let threads = match whose {
        Whose::Thread => vec![platform::thread()],
        Whose::Team => platform::team(),
    };
    for thread in &threads {
        platform::lower(*thread);
    }
    Lowered { threads, before }
}

impl Lowered {
    /// Gives them back what they had, from any thread. It fails where this process may not.
    pub fn restore(&self) -> Result<(), std::io::Error> {
        self.threads.iter().try_for_each(|thread| platform::set(*thread, self.before))
    }
}

/// The time that the calling thread had a core; None where nobody counts it.
pub fn processor_time() -> Option<std::time::Duration> {
    platform::processor_time()
}

#[cfg(target_os = "linux")]
mod platform {
    use std::io::Error;
    use std::time::Duration;

    use super::Priority;

    pub const LOWEST: Priority = Priority { policy: libc::SCHED_IDLE, nice: 19 };

    pub fn thread() -> i32 {
        // SAFETY: it takes nothing and cannot fail.
        unsafe { libc::gettid() }
    }

    /// Of a thread by its number, 0 for the calling one.
    pub fn priority(thread: i32) -> Priority {
        // SAFETY: plain numbers. Of a thread that has ended both are -1, which nobody has.
        unsafe {
            let nice = libc::getpriority(libc::PRIO_PROCESS, thread.unsigned_abs());
            Priority { policy: libc::sched_getscheduler(thread), nice }
        }
    }

    /// Where one of the two is refused, the other one does what it can.
    pub fn lower(thread: i32) {
        let Priority { policy, nice } = LOWEST;
        let _ = set_nice(thread, nice);
        let _ = set_policy(thread, policy);
    }

    pub fn set(thread: i32, priority: Priority) -> Result<(), Error> {
        if super::platform::priority(thread) == priority {
            return Ok(());
        }
        set_policy(thread, priority.policy)?;
        set_nice(thread, priority.nice)
    }

    fn set_nice(thread: i32, nice: i32) -> Result<(), Error> {
        // SAFETY: plain numbers.
        done(unsafe { libc::setpriority(libc::PRIO_PROCESS, thread.unsigned_abs(), nice) })
    }

    fn set_policy(thread: i32, policy: i32) -> Result<(), Error> {
        // SAFETY: of plain numbers too; the classes for which this one would matter are not used here.
        let parameters: libc::sched_param = unsafe { std::mem::zeroed() };
        // SAFETY: it only reads from the pointer.
        done(unsafe { libc::sched_setscheduler(thread, policy, &raw const parameters) })
    }

    fn done(result: i32) -> Result<(), Error> {
        // A thread that has ended needs no priority.
        match (result, Error::last_os_error()) {
            (0, _) => Ok(()),
            (_, error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            (_, error) => Err(error),
        }
    }

    /// The calling thread, and those of its name.
    pub fn team() -> Vec<i32> {
        let own = thread();
        let name = |thread: i32| std::fs::read(format!("/proc/self/task/{thread}/comm")).ok();
        let Some(wanted) = name(own) else { return vec![own] };
        let all = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
        let others = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let others = others.filter(|thread| *thread != own && name(*thread).as_ref() == Some(&wanted));
        std::iter::once(own).chain(others).collect()
    }

    pub fn processor_time() -> Option<Duration> {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: it only writes to the pointer.
        let result = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
        let (seconds, nanos) = (u64::try_from(time.tv_sec).ok()?, u32::try_from(time.tv_nsec).ok()?);
        (result == 0).then(|| Duration::new(seconds, nanos))
    }
}

#[cfg(not(target_os = "linux"))]
mod platform {
    use super::Priority;

    pub const LOWEST: Priority = Priority { policy: 0, nice: 19 };

    pub fn thread() -> i32 {
        0
    }

    pub fn priority(_: i32) -> Priority {
        Priority { policy: 0, nice: 0 }
    }

    pub fn lower(_: i32) {}

    pub fn set(_: i32, _: Priority) -> Result<(), std::io::Error> {
        Ok(())
    }

    pub fn team() -> Vec<i32> {
        vec![0]
    }

    pub fn processor_time() -> Option<std::time::Duration> {
        None
    }
}

#[cfg(all(test, target_os = "linux"))]
pub mod tests {
    use super::*;

    /// Takes from the calling thread, and from those that it starts, the right to raise a priority again.
    pub fn forbid_raising() {
        const SYS_NICE: u32 = 23;
        #[repr(C)]
        struct Header {
            version: u32,
            thread: i32,
        }
        let mut header = Header { version: 0x2008_0522, thread: 0 };
        // Effective, permitted and inheritable, the lower 32 first.
        let mut sets = [0_u32; 6];
        // SAFETY: both are laid out as the third version of this call has them.
        unsafe {
            assert_eq!(libc::syscall(libc::SYS_capget, &raw mut header, sets.as_mut_ptr()), 0);
            sets[..3].iter_mut().for_each(|set| *set &= !(1 << SYS_NICE));
            assert_eq!(libc::syscall(libc::SYS_capset, &raw mut header, sets.as_ptr()), 0);
        }
        let none = libc::rlimit { rlim_cur: 0, rlim_max: libc::RLIM_INFINITY };
        let mut nice = none;
        // SAFETY: it only writes to the pointer.
        assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_NICE, &raw mut nice) }, 0);
        assert_eq!(nice.rlim_cur, 0, "this test needs a shell without a limit for nice values");
    }

    /// The priorities of the threads of this process whose names begin so.
    pub fn of_threads(name: &str) -> Vec<Priority> {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
        let named = tasks.filter(|task| {
            std::fs::read_to_string(task.path().join("comm")).is_ok_and(|found| found.starts_with(name))
        });
        named.map(|task| platform::priority(task.file_name().to_str().unwrap().parse().unwrap())).collect()
    }

    #[test]
    fn what_was_lowered_is_restored_where_that_is_allowed() {
        std::thread::spawn(|| {
            let before = Priority::current();
            let lowered = lower(Whose::Thread);
            assert!(Priority::current().is_lowest() && !before.is_lowest());
            let is_root = lowered.restore().is_ok();
            assert_eq!(Priority::current() == before, is_root);
            forbid_raising();
            let lowered = lower(Whose::Thread);
            if is_root {
                assert!(lowered.restore().is_err() && Priority::current().is_lowest());
            }
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_team_is_lowered_together_and_nobody_else() {
        let (tell, told) = std::sync::mpsc::channel();
        let outsider = std::thread::spawn(move || {
            told.recv().unwrap();
            Priority::current()
        });
        let leader = std::thread::Builder::new().name("m/1.team".to_owned()).spawn(|| {
            let (tell, told) = std::sync::mpsc::channel();
            // A thread of the C library's begins with its starter's name; Rust's without a name does as well.
            let helper = std::thread::spawn(move || {
                told.recv().unwrap();
                Priority::current()
            });
            let lowered = lower(Whose::Team);
            assert_eq!(lowered.threads.len(), 2);
            tell.send(()).unwrap();
            helper.join().unwrap()
        });
        assert!(leader.unwrap().join().unwrap().is_lowest());
        tell.send(()).unwrap();
        assert!(!outsider.join().unwrap().is_lowest());
    }
}
