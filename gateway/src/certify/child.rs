//! The process that measures: a child of the same binary, so that a model which does not fit takes down nothing but that.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use inference::memory::Footprint;

use super::{Job, Step, footprint};

/// Longer than loading takes, or three forwards of any size that one would want to serve.
const STEP_MAX: Duration = Duration::from_secs(300);
/// How often to look whether the measuring is still wanted.
const LOOK: Duration = Duration::from_millis(100);

/// What a child said, and how it ended.
#[derive(Debug)]
pub struct Measured {
    pub steps: Vec<Step>,
    pub ended: String,
}

#[derive(Debug, thiserror::Error)]
#[error("could not {what} a process to measure in")]
pub struct ChildError {
    what: &'static str,
    source: std::io::Error,
}

/// Measures in a child of `binary`, until it ends or is not wanted any more.
pub fn measure(
    binary: &Path,
    job: &Job,
    wanted: impl Fn() -> bool,
    mut seen: impl FnMut(&Step),
) -> Result<Measured, ChildError> {
    let failed = |what| move |source| ChildError { what, source };
    let text =
        serde_json::to_vec(job).map_err(|error| ChildError { what: "describe the work of", source: error.into() })?;
    let mut child = Command::new(binary)
        .args(["model", "certify-here"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed("start"))?;
    if let Some(mut stdin) = child.stdin.take()
        && let Err(source) = stdin.write_all(&text)
    {
        end(&mut child);
        return Err(failed("write to")(source));
    }
    let mut steps = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            // Ends with the child, or with whoever listens.
            BufReader::new(stdout).lines().map_while(Result::ok).all(|line| sender.send(line).is_ok())
        });
        let mut last = Instant::now();
        loop {
            match lines.recv_timeout(LOOK) {
                Ok(line) => {
                    last = Instant::now();
                    if let Ok(step) = serde_json::from_str::<Step>(&line) {
                        seen(&step);
                        steps.push(step);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) if !wanted() => {
                    end(&mut child);
                    return Ok(Measured { steps, ended: "was ended, because nobody wanted it any more".to_owned() });
                }
                Err(RecvTimeoutError::Timeout) if last.elapsed() > STEP_MAX => {
                    end(&mut child);
                    return Ok(Measured { steps, ended: format!("did not go on for {} s", STEP_MAX.as_secs()) });
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }
    let status = child.wait().map_err(failed("wait for"))?;
    Ok(Measured { steps, ended: format!("ended with {status}") })
}

/// It may have ended by itself by now, which is as good.
fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

/// What the model takes, or why that is not known, with the largest batch that worked.
pub fn verdict(job: &Job, measured: &Measured) -> Result<Footprint, String> {
    let (known, trying) = footprint(job, &measured.steps);
    let worked = match known.sizes.iter().map(|size| size.rows).max() {
        Some(rows) => format!("; the largest batch that worked has {rows} rows"),
        None => String::new(),
    };
    let ended = &measured.ended;
    match (measured.steps.last(), trying) {
        (Some(Step::Done), _) => Ok(known),
        (Some(Step::Failed { reason }), _) => Err(format!("{reason}{worked}")),
        (_, Some(rows)) => Err(format!(
            "the process that measures it {ended} while it ran a batch of {rows} rows, most likely because memory ran \
             out{worked}; lower `batching.max_rows`"
        )),
        _ => Err(format!("the process that measures it {ended} while it loaded the model")),
    }
}
