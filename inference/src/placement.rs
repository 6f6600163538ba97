//! Whether models fit beside each other on the cores of one device. Pure: the numbers come from warm-up.
//!
//! Every executor is a thread that uses so many cores while a forward runs. As long as all of them fit the cores, models
//! do not feel each other. Beyond that, a forward of one may hold up a forward of another for as long as it takes, and
//! that is only good if the other's deadline has the room.

use std::time::Duration;

/// A model on a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    pub name: String,
    pub executors: usize,
    pub threads: usize,
    /// The longest that one of its batches takes.
    pub batch: Duration,
    /// The declared deadline of its requests.
    pub deadline: Option<Duration>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    #[error(
        "{executors} executors of {threads} threads each need {} cores, but there are {cores}; lower \
         `placement.executors` or `placement.threads`", executors * threads
    )]
    TooManyThreads { executors: usize, threads: usize, cores: usize },
    #[error(
        "a batch of model `{slow}` takes {batch:.1?}, but beside its own forward of {own:.1?}, model `{fast}` has {slack:.1?} \
         of its deadline to spare, and the two share {cores} cores; lower `batching.max_rows` of `{slow}`, raise the \
         deadline of `{fast}`, or give one of them a process of its own"
    )]
    TooSlow { slow: String, fast: String, batch: Duration, own: Duration, slack: Duration, cores: usize },
}

impl Placed {
    fn cores(&self) -> usize {
        self.executors * self.threads
    }

    /// What is left of the deadline when one batch of its own has run.
    fn slack(&self) -> Option<Duration> {
        self.deadline.map(|deadline| deadline.saturating_sub(self.batch))
    }

    /// Whether forwards of `self` may hold up those of `other`.
    fn beside(&self, other: &Placed, cores: usize) -> Result<(), PlacementError> {
        match other.slack() {
            Some(slack) if self.batch > slack => Err(PlacementError::TooSlow {
                slow: self.name.clone(),
                fast: other.name.clone(),
                batch: self.batch,
                own: other.batch,
                slack,
                cores,
            }),
            _ => Ok(()),
        }
    }
}

/// Whether the executors of a model fit the cores at all. To be asked before it is loaded.
pub fn check_threads(executors: usize, threads: usize, cores: usize) -> Result<(), PlacementError> {
    if executors * threads > cores {
        return Err(PlacementError::TooManyThreads { executors, threads, cores });
    }
    Ok(())
}

/// Whether a model may join those that are there.
pub fn check(new: &Placed, others: &[Placed], cores: usize) -> Result<(), PlacementError> {
    check_threads(new.executors, new.threads, cores)?;
    let used: usize = others.iter().map(Placed::cores).sum();
    if used + new.cores() <= cores {
        return Ok(());
    }
    others.iter().try_for_each(|other| {
        new.beside(other, cores)?;
        other.beside(new, cores)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placed(name: &str, executors: usize, threads: usize, batch: u64, deadline: Option<u64>) -> Placed {
        let (batch, deadline) = (Duration::from_millis(batch), deadline.map(Duration::from_millis));
        Placed { name: name.to_owned(), executors, threads, batch, deadline }
    }

    #[test]
    fn what_fits_the_cores_may_be_as_slow_as_it_likes() {
        let fast = placed("fast", 1, 1, 5, Some(20));
        assert_eq!(check(&placed("slow", 3, 1, 900, None), &[fast], 4), Ok(()));
    }

    #[test]
    fn executors_that_do_not_fit_alone_are_refused_with_the_arithmetic() {
        let error = check(&placed("wide", 2, 4, 5, None), &[], 4).unwrap_err();
        assert_eq!(
            error.to_string(),
            "2 executors of 4 threads each need 8 cores, but there are 4; lower `placement.executors` or `placement.threads`"
        );
    }

    #[test]
    fn beyond_the_cores_each_must_leave_the_other_its_slack() {
        let fast = placed("fast", 1, 1, 5, Some(20));
        assert_eq!(check(&placed("b", 1, 1, 15, None), std::slice::from_ref(&fast), 1), Ok(()));
        let error = check(&placed("b", 1, 1, 16, None), std::slice::from_ref(&fast), 1).unwrap_err();
        assert_eq!(
            error.to_string(),
            "a batch of model `b` takes 16.0ms, but beside its own forward of 5.0ms, model `fast` has 15.0ms of its deadline \
             to spare, and the two share 1 cores; lower `batching.max_rows` of `b`, raise the deadline of `fast`, or give one \
             of them a process of its own"
        );
        // It is the same whoever came first.
        assert!(check(&fast, &[placed("b", 1, 1, 16, None)], 1).is_err());
    }
}
