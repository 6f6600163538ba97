use super::super::ffi::Torch;
use super::*;
use crate::model::{Artefact, InputSpec, OutputSpec};

fn artefact(name: &str) -> Artefact {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    Artefact::read(&folder.join(name)).expect("the module is committed")
}

fn spec(width: usize) -> ModelSpec {
    let output = OutputSpec { name: "p".to_owned(), dtype: Dtype::Float32 };
    ModelSpec { inputs: vec![InputSpec::features("x", Dtype::Float32, width)], outputs: vec![output] }
}

fn load(artefact: &Artefact) -> Module {
    Module::load(Torch::get().unwrap(), &artefact.bytes, Device::Cpu).unwrap()
}

fn tune(artefact: &Artefact, width: usize) -> (Module, Tuning) {
    let load = || Module::load(Torch::get().unwrap(), &artefact.bytes, Device::Cpu);
    tuned(load, &artefact.bytes, &spec(width), Device::Cpu).unwrap()
}

fn floats(values: &[f32]) -> Tensor {
    Tensor::try_new(vec![values.len()], TensorData::Float32(values.to_vec())).unwrap()
}

#[test]
fn every_form_returns_what_the_module_returned_as_it_was_loaded() {
    let mut loaded = load(&artefact("layers.pt"));
    let samples = samples(&mut loaded, &spec(16));
    assert_eq!(samples.len(), 4);
    for form in [Form::Frozen, Form::Optimised] {
        let mut prepared = loaded.prepare(form).unwrap();
        assert!(samples.iter().all(|sample| agrees(&mut prepared, sample)), "{form:?}");
    }
    // And stays as it was.
    assert!(samples.iter().all(|sample| agrees(&mut loaded, sample)));
}

#[test]
fn a_form_that_was_tried_is_told_and_kept_for_all_copies() {
    let artefact = artefact("layers.pt");
    let (mut module, tuning) = tune(&artefact, 16);
    let took: Vec<&str> = tuning
        .trials
        .iter()
        .filter(|trial| matches!(trial.outcome, TrialOutcome::Took(time) if time < NEVER))
        .map(|trial| trial.form)
        .collect();
    assert_eq!(took, ["as loaded", "frozen", "optimised"], "{tuning}");
    assert!(took.contains(&tuning.form));
    // The times would not be the same ones if it had been measured again.
    let (mut copy, again) = tune(&artefact, 16);
    assert_eq!(again, tuning);
    let inputs = seeded(&spec(16), 5);
    assert_eq!(module.forward(&inputs).unwrap(), copy.forward(&inputs).unwrap());
    let known = || CHOSEN.lock().unwrap().iter().filter(|chosen| chosen.artefact.strong_count() > 0).count();
    let before = known();
    drop(artefact);
    assert_eq!(known(), before - 1, "what is not loaded any more is forgotten");
}

#[test]
fn a_module_that_is_never_the_same_runs_as_it_was_loaded() {
    let counter = artefact("counter.pt");
    let (_, tuning) = tune(&counter, 2);
    assert_eq!(tuning, Tuning { form: AS_LOADED, trials: Vec::new() });
    // As does one that fails on inputs of its declaration; warm-up says why.
    let layers = artefact("layers.pt");
    let (_, tuning) = tune(&layers, 15);
    assert_eq!(tuning, Tuning { form: AS_LOADED, trials: Vec::new() });
}

#[test]
fn closeness_is_that_of_assert_close() {
    let check = |a: f32, b: f32, expected: bool| assert_eq!(close(&floats(&[1.0, a]), &floats(&[1.0, b])), expected);
    check(0.5, 0.5, true);
    check(0.500_01, 0.5, true);
    check(0.500_02, 0.5, false);
    check(1_000_001.0, 1_000_000.0, true);
    check(1_000_002.0, 1_000_000.0, false);
    check(f32::NAN, f32::NAN, true);
    check(f32::NAN, 0.0, false);
    check(f32::INFINITY, f32::INFINITY, true);
    check(f32::INFINITY, f32::MAX, false);
    assert!(!close(&floats(&[1.0]), &floats(&[1.0, 1.0])));
}

#[test]
fn seeded_inputs_are_the_same_every_time_and_fit_small_embeddings() {
    let mut spec = spec(3);
    spec.inputs.push(InputSpec::features("carrier", Dtype::Int64, 1));
    let inputs = seeded(&spec, 32);
    assert_eq!(inputs, seeded(&spec, 32));
    let TensorData::Float32(values) = inputs[0].data() else { panic!("floats") };
    assert!(values.len() == 96 && values.iter().all(|value| (-2.0..2.0).contains(value)));
    assert!(values.iter().any(|value| *value < -1.0) && values.iter().any(|value| *value > 1.0));
    let TensorData::Int64(values) = inputs[1].data() else { panic!("whole numbers") };
    assert!(values.contains(&0) && values.contains(&1) && values.iter().all(|value| [0, 1].contains(value)));
}

#[test]
fn what_was_tried_and_not_taken_leaves_no_weights_behind() {
    let artefact = artefact("layers.pt");
    let held = || Torch::get().unwrap().memory(Device::Cpu).unwrap().allocated;
    let before = held();
    let (module, tuning) = tune(&artefact, 16);
    let tuned = held() - before;
    drop(module);
    assert_eq!(held(), before);
    let module = in_form(load(&artefact), tuning.form);
    // malloc rounds as it likes, from one time to the next.
    let untried = held() - before;
    assert!(tuned.abs_diff(untried) < 1024, "{tuned} bytes against {untried}: {tuning}");
    drop(module);
    assert_eq!(held(), before);
}
