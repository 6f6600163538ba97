//! `coeval model certify`: what a model file takes, measured in a child process of the same binary, so that a model which
//! does not fit takes down nothing but that.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use gateway::certify::{Job, Step, capacity, footprint};
use inference::memory::{self, Footprint, Size, shown};
use serde_json::json;

use crate::error::CliError;
use crate::output::Output;
use crate::project::{Place, Project};

/// Longer than loading takes, or three forwards of any size that one would want to serve.
const STEP_MAX: Duration = Duration::from_secs(300);

pub async fn run(place: &Place, model: &str, file: &Path, output: &Output) -> Result<(), CliError> {
    let project = Project::read(place)?;
    let plan = project.checked(output).await?.plan;
    let found = plan.model(model);
    let known = || plan.models.iter().map(|model| &*model.name);
    let found = found.ok_or_else(|| CliError::unknown("model", model, known()))?;
    let job = Job::new(found, file.to_owned());
    let bar = output.progress(Some(job.sizes().len() as u64), "batch sizes");
    bar.set_message(format!("{}", file.display()));
    let measured = {
        let (job, bar) = (job.clone(), bar.clone());
        tokio::task::spawn_blocking(move || measure(&job, |step| bar.inc(u64::from(matches!(step, Step::Ran { .. })))))
            .await
    };
    bar.finish_and_clear();
    let ended_early = |why: String| CliError::Failed(format!("{} could not be measured: {why}", file.display()));
    let (steps, ended) = measured.map_err(|error| ended_early(error.to_string()))??;
    let (footprint, trying) = footprint(&job, &steps);
    show(&footprint, output);
    match (steps.last(), trying) {
        (Some(Step::Done), _) => {}
        (Some(Step::Failed { reason }), _) => return Err(ended_early(reason.clone())),
        (_, Some(rows)) => {
            return Err(ended_early(format!(
                "the process {ended} while it ran a batch of {rows} rows, most likely because memory ran out; lower \
                 `batching.max_rows`"
            )));
        }
        _ => return Err(ended_early(format!("the process {ended} while it loaded the model"))),
    }
    let capacity = capacity(&steps);
    output.json(&json!({
        "model": model,
        "file_bytes": footprint.file_bytes,
        "weight_bytes": footprint.weight_bytes,
        "executors": footprint.executors,
        "bytes": footprint.bytes(),
        "capacity_bytes": capacity,
        "sizes": footprint.sizes.iter().map(size).collect::<Vec<_>>(),
    }));
    let Some(capacity) = capacity else { return Ok(()) };
    match memory::check(&footprint, 0, capacity) {
        Ok(()) => {
            let allowed = memory::allowed(capacity);
            let (needed, percent) = (shown(footprint.bytes()), memory::PERCENT_MAX);
            let whose = if job.device == "cpu" { "this machine" } else { &job.device };
            output.line(format!("{needed} of the {} that models may take, {percent} % of {}", shown(allowed), whose));
            Ok(())
        }
        Err(error) => Err(CliError::Failed(error.to_string())),
    }
}

fn size(size: &Size) -> serde_json::Value {
    json!({"rows": size.rows, "forward_us": size.forward_micros, "bytes": size.bytes})
}

fn show(footprint: &Footprint, output: &Output) {
    let Footprint { name, file_bytes, executors, weight_bytes, sizes } = footprint;
    let (file, weights) = (shown(*file_bytes), shown(*weight_bytes));
    output.line(format!("{name}: a file of {file}, {executors} executors with {weights} of weights each"));
    let row = |size: &Size| {
        let per_second = size.rows as f64 * 1e6 / size.forward_micros.max(1) as f64;
        vec![
            size.rows.to_string(),
            format!("{:.3} ms", size.forward_micros as f64 / 1e3),
            format!("{per_second:.0}/s"),
            shown(size.bytes),
        ]
    };
    output.table(&["BATCH", "FORWARD", "ROWS", "MEMORY"], &sizes.iter().map(row).collect::<Vec<_>>());
}

/// The steps of a child process, and how it ended.
fn measure(job: &Job, mut seen: impl FnMut(&Step)) -> Result<(Vec<Step>, String), CliError> {
    let failed = |what: &str| {
        let what = format!("could not {what} a process to measure in");
        move |source| CliError::Io { what, source }
    };
    let binary = std::env::current_exe().map_err(failed("find the binary for"))?;
    let mut child = Command::new(binary)
        .args(["model", "certify-here"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed("start"))?;
    let text = serde_json::to_vec(job).map_err(|error| CliError::Failed(error.to_string()))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(&text).map_err(failed("write to"))?;
    }
    let mut steps = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            // Ends with the child, or with whoever listens.
            BufReader::new(stdout).lines().map_while(Result::ok).all(|line| sender.send(line).is_ok())
        });
        loop {
            match lines.recv_timeout(STEP_MAX) {
                Ok(line) => {
                    if let Ok(step) = serde_json::from_str::<Step>(&line) {
                        seen(&step);
                        steps.push(step);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    end(&mut child);
                    return Ok((steps, format!("did not go on for {} s", STEP_MAX.as_secs())));
                }
            }
        }
    }
    let status = child.wait().map_err(failed("wait for"))?;
    Ok((steps, format!("ended with {status}")))
}

/// It may have ended by itself by now, which is as good.
fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

/// Measures in this process. Whatever goes wrong is a step too.
pub fn here() -> Result<(), CliError> {
    let mut text = String::new();
    let read = std::io::stdin().read_to_string(&mut text);
    read.map_err(|source| CliError::Io { what: "could not read the job".to_owned(), source })?;
    let job: Job = serde_json::from_str(&text).map_err(|error| CliError::Usage(format!("not a job: {error}")))?;
    job.measure(|step| {
        let mut out = std::io::stdout().lock();
        // Nobody listens any more: then nobody needs it.
        let written = serde_json::to_writer(&mut out, &step).is_ok() && out.write_all(b"\n").is_ok();
        if !written || out.flush().is_err() {
            std::process::exit(1);
        }
    });
    Ok(())
}
