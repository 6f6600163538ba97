//! A circuit breaker: after several failures in a row, it is better to say no at once than to try. Pure; time is an
//! argument, as in [`crate::batch`].
//!
//! What counts as a failure is what no other input would have prevented: no memory, a panic, a forward that does not end,
//! a batch of which no member could be answered.

use std::time::Duration;

/// So many failures in a row open it: one may be bad luck, and two the same bad luck again.
const FAILURES_MAX: u32 = 3;
/// It stays open for so long at first, twice as long after every trial that fails, and this long at most.
const OPEN_MIN: Duration = Duration::from_secs(1);
const OPEN_MAX: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
pub struct Breaker {
    state: State,
    /// In a row.
    failures: u32,
    opened: u64,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum State {
    #[default]
    Closed,
    Open {
        since: Duration,
        until: Duration,
    },
    /// One request is under way to see whether it works again. If it comes to nothing (its caller went away), another one
    /// is let through at `again`.
    Trying {
        pause: Duration,
        again: Duration,
    },
}

/// It is open: for how long still, and after how many failures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Open {
    pub left: Duration,
    pub failures: u32,
}

impl Breaker {
    /// Whether a request may go on.
    pub fn admit(&mut self, now: Duration) -> Result<(), Open> {
        let (until, pause) = match self.state {
            State::Closed => return Ok(()),
            State::Open { since, until } => (until, until - since),
            State::Trying { pause, again } => (again, pause),
        };
        if now < until {
            return Err(Open { left: until - now, failures: self.failures });
        }
        self.state = State::Trying { pause, again: now + pause };
        Ok(())
    }

    pub fn succeeded(&mut self) {
        (self.state, self.failures) = (State::Closed, 0);
    }

    pub fn failed(&mut self, now: Duration) {
        self.failures = self.failures.saturating_add(1);
        let pause = match self.state {
            State::Closed if self.failures < FAILURES_MAX => return,
            State::Closed => OPEN_MIN,
            State::Trying { pause, .. } => (pause * 2).min(OPEN_MAX),
            // What was under way when it opened.
            State::Open { .. } => return,
        };
        self.opened += 1;
        self.state = State::Open { since: now, until: now + pause };
    }

    /// Until when and why it refuses requests, if it does.
    pub fn open(&self, now: Duration) -> Option<Open> {
        let until = match self.state {
            State::Closed => return None,
            State::Open { until, .. } => until,
            State::Trying { again, .. } => again,
        };
        Some(Open { left: until.saturating_sub(now), failures: self.failures })
    }

    /// How often it opened.
    pub fn opened(&self) -> u64 {
        self.opened
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn failures_in_a_row_open_it_and_a_success_between_them_does_not() {
        let mut breaker = Breaker::default();
        for _ in 0..10 {
            breaker.failed(ms(0));
            breaker.failed(ms(0));
            breaker.succeeded();
        }
        assert_eq!(breaker.admit(ms(0)), Ok(()));
        (0..3).for_each(|_| breaker.failed(ms(0)));
        assert_eq!(breaker.admit(ms(400)), Err(Open { left: ms(600), failures: 3 }));
        assert!(breaker.open(ms(400)).is_some() && breaker.opened() == 1);
    }

    #[test]
    fn one_request_tries_again_and_the_pause_grows_to_its_bound() {
        let mut breaker = Breaker::default();
        (0..3).for_each(|_| breaker.failed(ms(0)));
        let (mut now, mut pause) = (ms(0), ms(1_000));
        for _ in 0..8 {
            now += pause;
            assert_eq!(breaker.admit(now), Ok(()), "after {pause:?}");
            assert!(breaker.admit(now).is_err(), "only one tries");
            breaker.failed(now);
            pause = (pause * 2).min(ms(60_000));
            assert!(breaker.admit(now + pause - ms(1)).is_err());
        }
        now += pause;
        assert_eq!(breaker.admit(now), Ok(()));
        breaker.succeeded();
        assert_eq!((breaker.admit(now), breaker.open(now)), (Ok(()), None));
    }

    #[test]
    fn a_trial_that_comes_to_nothing_is_not_the_last() {
        let mut breaker = Breaker::default();
        (0..3).for_each(|_| breaker.failed(ms(0)));
        assert_eq!(breaker.admit(ms(1_000)), Ok(()));
        assert!(breaker.admit(ms(1_500)).is_err());
        assert_eq!(breaker.admit(ms(2_000)), Ok(()));
    }
}
