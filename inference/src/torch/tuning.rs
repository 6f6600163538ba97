//! Which form of a module is run. Freezing makes most modules faster, some slower, and may change the last bits of what they
//! return, so it is tried: a form is taken only if it returns the same within the tolerance of `torch.testing.assert_close`,
//! on zeros and on seeded random inputs, and is not slower.
//!
//! All copies of a model in a process run in the same form, or a row would depend on the executor that it met.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::ffi::{Error, Form, Module};
use crate::model::{Device, ModelSpec, Trial, TrialOutcome, Tuning};
use crate::tensor::{Dtype, Tensor, TensorData};

/// A lone request, and a batch.
const SIZES: [usize; 2] = [1, 32];
/// A module this slow is run as it was loaded: trying it would hold up its start, and others', for seconds.
const FORWARD_MAX: Duration = Duration::from_millis(100);
const ROUNDS_MIN: usize = 5;
const ROUNDS_MAX: usize = 30;
/// For the rounds of one size, all forms together.
const ROUNDS_TIME: Duration = Duration::from_millis(150);
/// What stands for the time of a form that failed.
const NEVER: Duration = Duration::from_secs(3600);
/// Of how much of the time of the form before it a form may take. The second changes more bits, and has to earn it.
const FROZEN_PERCENT_MAX: u128 = 102;
const OPTIMISED_PERCENT_MAX: u128 = 95;

const FORMS: [(Form, &str, u128); 2] =
    [(Form::Frozen, "frozen", FROZEN_PERCENT_MAX), (Form::Optimised, "optimised", OPTIMISED_PERCENT_MAX)];
const AS_LOADED: &str = "as loaded";

struct Chosen {
    /// Ends with the model. As long as it is there, no other artefact has this address.
    artefact: Weak<[u8]>,
    device: Device,
    tuning: Tuning,
}

/// As many as there are models loaded.
static CHOSEN: Mutex<Vec<Chosen>> = Mutex::new(Vec::new());

/// The module in the form that was chosen for this artefact, or is now.
///
/// It is loaded once more for that: as long as one form of a module lives, libtorch keeps the weights of all the others that
/// were made from it.
pub fn tuned(
    load: impl Fn() -> Result<Module, Error>,
    artefact: &Arc<[u8]>,
    spec: &ModelSpec,
    device: Device,
) -> Result<(Module, Tuning), Error> {
    let mut chosen = CHOSEN.lock().unwrap_or_else(PoisonError::into_inner);
    chosen.retain(|chosen| chosen.artefact.strong_count() > 0);
    let same = |chosen: &&Chosen| std::ptr::addr_eq(chosen.artefact.as_ptr(), Arc::as_ptr(artefact));
    if let Some(known) = chosen.iter().filter(same).find(|known| known.device == device) {
        return Ok((in_form(load()?, known.tuning.form), known.tuning.clone()));
    }
    let (untouched, tuning) = choose(load()?, spec);
    chosen.push(Chosen { artefact: Arc::downgrade(artefact), device, tuning: tuning.clone() });
    let module = match untouched {
        Some(module) => module,
        None => in_form(load()?, tuning.form),
    };
    Ok((module, tuning))
}

/// What could be prepared once can be again, unless memory has become short; then the plain form is as good.
fn in_form(loaded: Module, form: &str) -> Module {
    let form = FORMS.iter().find(|(_, name, _)| *name == form);
    form.and_then(|(form, ..)| loaded.prepare(*form).ok()).unwrap_or(loaded)
}

/// An input on which the module works, and what it returns.
struct Sample {
    inputs: Vec<Tensor>,
    outputs: Vec<Tensor>,
}

struct Candidate {
    module: Module,
    name: &'static str,
    percent_max: u128,
    /// The fastest forward of every size.
    best: Vec<Duration>,
}

/// The best form; and the module again if it was not made into others.
fn choose(mut loaded: Module, spec: &ModelSpec) -> (Option<Module>, Tuning) {
    let as_loaded = |module| (Some(module), Tuning { form: AS_LOADED, trials: Vec::new() });
    let started = Instant::now();
    if loaded.forward(&spec.zeros(1)).is_err() || started.elapsed() > FORWARD_MAX {
        // Warm-up says why it fails.
        return as_loaded(loaded);
    }
    let samples = samples(&mut loaded, spec);
    if samples.is_empty() || !samples.iter().all(|sample| agrees(&mut loaded, sample)) {
        return as_loaded(loaded);
    }
    let mut trials = Vec::new();
    let mut candidates = vec![Candidate { module: loaded, name: AS_LOADED, percent_max: 100, best: Vec::new() }];
    for (form, name, percent_max) in FORMS {
        match candidates[0].module.prepare(form) {
            Err(error) => {
                let reason = super::clean(&error.text);
                trials.push(Trial { form: name, outcome: TrialOutcome::Failed(reason) });
            }
            Ok(mut module) => {
                if samples.iter().all(|sample| agrees(&mut module, sample)) {
                    candidates.push(Candidate { module, name, percent_max, best: Vec::new() });
                } else {
                    trials.push(Trial { form: name, outcome: TrialOutcome::Differs });
                }
            }
        }
    }
    race(&mut candidates, &samples);
    let took = |candidate: &Candidate| candidate.best.iter().sum::<Duration>();
    trials.extend(candidates.iter().map(|candidate| {
        let outcome = TrialOutcome::Took(took(candidate));
        Trial { form: candidate.name, outcome }
    }));
    let winner = candidates.into_iter().reduce(|best, next| {
        let fast_enough = took(&next).as_nanos() * 100 <= took(&best).as_nanos() * next.percent_max;
        if fast_enough { next } else { best }
    });
    (None, Tuning { form: winner.map_or(AS_LOADED, |winner| winner.name), trials })
}

/// Runs all in turn, so that what disturbs one of them disturbs the others too.
fn race(candidates: &mut [Candidate], samples: &[Sample]) {
    for sample in samples {
        let started = Instant::now();
        let mut best = vec![NEVER; candidates.len()];
        for round in 0..ROUNDS_MAX {
            if round >= ROUNDS_MIN && started.elapsed() > ROUNDS_TIME {
                break;
            }
            for (candidate, best) in candidates.iter_mut().zip(&mut best) {
                let started = Instant::now();
                // One that fails now and then is not fast.
                if candidate.module.forward(&sample.inputs).is_ok() {
                    *best = started.elapsed().min(*best);
                }
            }
        }
        for (candidate, best) in candidates.iter_mut().zip(best) {
            candidate.best.push(best);
        }
    }
}

/// What the module returns on zeros and on seeded numbers, as far as it works on them: an embedding may be too small for
/// the numbers.
fn samples(module: &mut Module, spec: &ModelSpec) -> Vec<Sample> {
    let all = SIZES.iter().flat_map(|&rows| [spec.zeros(rows), seeded(spec, rows)]);
    let works = all.filter_map(|inputs| {
        let outputs = module.forward(&inputs).ok()?;
        Some(Sample { inputs, outputs })
    });
    works.collect()
}

/// Twice, because a form may be specialised on its first call.
fn agrees(module: &mut Module, sample: &Sample) -> bool {
    (0..2).all(|_| module.forward(&sample.inputs).is_ok_and(|outputs| all_close(&outputs, &sample.outputs)))
}

fn all_close(outputs: &[Tensor], expected: &[Tensor]) -> bool {
    outputs.len() == expected.len() && outputs.iter().zip(expected).all(|(output, expected)| close(output, expected))
}

/// By the tolerances of `torch.testing.assert_close`; NaN is close to NaN.
fn close(output: &Tensor, expected: &Tensor) -> bool {
    let within = |a: f64, b: f64, relative: f64, absolute: f64| {
        a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= absolute + relative * b.abs()
    };
    output.shape() == expected.shape()
        && match (output.data(), expected.data()) {
            (TensorData::Float32(values), TensorData::Float32(expected)) => {
                values.iter().zip(expected).all(|(&a, &b)| within(a.into(), b.into(), 1.3e-6, 1e-5))
            }
            (TensorData::Float64(values), TensorData::Float64(expected)) => {
                values.iter().zip(expected).all(|(&a, &b)| within(a, b, 1e-7, 1e-7))
            }
            (values, expected) => values == expected,
        }
}

/// Inputs that are the same every time: floats around 0, whole numbers that even a small embedding has.
fn seeded(spec: &ModelSpec, rows: usize) -> Vec<Tensor> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut next = move || {
        // splitmix64
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    };
    let inputs = spec.inputs.iter().map(|input| {
        let mut shape = vec![rows];
        shape.extend(&input.row_shape);
        let len = shape.iter().product();
        let mut float = || (next() >> 11) as f64 / (1_u64 << 51) as f64 - 2.0;
        let data = match input.dtype {
            Dtype::Float32 => TensorData::Float32((0..len).map(|_| float() as f32).collect()),
            Dtype::Float64 => TensorData::Float64((0..len).map(|_| float()).collect()),
            Dtype::Int64 => TensorData::Int64((0..len).map(|_| i64::from(next() % 2 == 1)).collect()),
            Dtype::Int32 => TensorData::Int32((0..len).map(|_| i32::from(next() % 2 == 1)).collect()),
            Dtype::Bool => TensorData::Bool((0..len).map(|_| next() % 2 == 1).collect()),
        };
        Tensor::try_new(shape, data).unwrap_or_else(|_| Tensor::zeros(input.dtype, rows, &input.row_shape))
    });
    inputs.collect()
}

#[cfg(test)]
mod tests;
