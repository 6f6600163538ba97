//! Work that must not be felt by requests: on a thread of its own at the lowest priority, which what it begins inherits.

use tokio::sync::oneshot;

use crate::nice;

const NICE: i32 = 19;

/// Does something on a quiet thread. Where the caller goes away, so does the work, at its next wait.
pub async fn quietly<T, Work, Done>(name: &'static str, work: Work) -> Result<T, String>
where
    T: Send + 'static,
    Work: FnOnce() -> Done + Send + 'static,
    Done: Future<Output = Result<T, String>>,
{
    let (mut sender, receiver) = oneshot::channel();
    let run = move || {
        nice::lower(NICE);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let done = match runtime {
            Ok(runtime) => runtime.block_on(async {
                tokio::select! {
                    done = work() => Some(done),
                    () = sender.closed() => None,
                }
            }),
            Err(error) => Some(Err(error.to_string())),
        };
        if let Some(done) = done {
            // Nobody may be listening any more.
            let _ = sender.send(done);
        }
    };
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(run);
    thread.map_err(|error| format!("no thread for `{name}`: {error}"))?;
    receiver.await.map_err(|_| format!("`{name}` ended without a result; this is a bug"))?
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn what_nobody_waits_for_any_more_ends() {
        assert_eq!(quietly("test", || async { Ok(7) }).await, Ok(7));
        struct Ended(Arc<AtomicBool>);
        impl Drop for Ended {
            fn drop(&mut self) {
                self.0.store(true, Ordering::SeqCst);
            }
        }
        let ended = Arc::new(AtomicBool::new(false));
        let guard = Ended(ended.clone());
        let work = quietly("test", || async move {
            let _guard = guard;
            std::future::pending::<Result<(), String>>().await
        });
        assert!(tokio::time::timeout(Duration::from_millis(50), work).await.is_err());
        let gone = async {
            while !ended.load(Ordering::SeqCst) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), gone).await.expect("the work goes on");
    }
}
