//! `coeval model certify`: what a model file takes, measured in a child process of the same binary, so that a model which
//! does not fit takes down nothing but that.

use std::io::{Read, Write};
use std::path::Path;

use gateway::certify::{Job, Step, capacity, child, footprint};
use inference::memory::{self, Footprint, Size, shown};
use serde_json::json;

use crate::error::{CliError, chain};
use crate::output::Output;
use crate::project::{Place, Project};

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
        let binary = std::env::current_exe()
            .map_err(|source| CliError::Io { what: "could not find the binary to measure with".to_owned(), source })?;
        let seen = move |step: &Step| bar.inc(u64::from(matches!(step, Step::Ran { .. })));
        tokio::task::spawn_blocking(move || child::measure(&binary, &job, || true, seen)).await
    };
    bar.finish_and_clear();
    let ended_early = |why: String| CliError::Failed(format!("{} could not be measured: {why}", file.display()));
    let measured = measured.map_err(|error| ended_early(error.to_string()))?;
    let measured = measured.map_err(|error| ended_early(chain(&error)))?;
    let (footprint, _) = footprint(&job, &measured.steps);
    show(&footprint, output);
    child::verdict(&job, &measured).map_err(ended_early)?;
    let capacity = capacity(&measured.steps);
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

/// Measuring has time; what the same machine serves has not. libtorch's own threads inherit it.
fn give_way() {
    // SAFETY: plain numbers; 0 is the calling thread. Where it is refused, nothing changes.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 19) };
}

/// Measures in this process. Whatever goes wrong is a step too.
pub fn here() -> Result<(), CliError> {
    let mut text = String::new();
    let read = std::io::stdin().read_to_string(&mut text);
    read.map_err(|source| CliError::Io { what: "could not read the job".to_owned(), source })?;
    // If memory runs out, it is this process that the kernel is to end, whatever server it belongs to. Where that may not be
    // said, it is the largest process, which is this one most often.
    let _ = std::fs::write("/proc/self/oom_score_adj", "1000");
    give_way();
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
