use serde_json::json;

use super::*;
use crate::id::Salt;
use crate::state::tests::{applied, make};
use crate::state::{Change, State};

fn name() -> FlagName {
    FlagName::try_new("new_page").unwrap()
}

/// Off for everybody, on for pilots, and for a share of the others.
fn flag(share: u16) -> Flag {
    let slices = vec![Slice { variant: "on".into(), from: 0, to: share }];
    Flag {
        name: name(),
        kind: Kind::Boolean,
        variants: BTreeMap::from([("on".to_owned(), json!(true)), ("off".to_owned(), json!(false))]),
        default: "off".into(),
        enabled: true,
        rules: vec![
            Rule { when: Some("role = 'pilot'".into()), then: Then::Variant("on".into()) },
            Rule { when: None, then: Then::Split(Split { layer: "pages".into(), seed: "1".into(), slices }) },
        ],
        description: None,
    }
}

fn set(flag: Flag, after: Option<u64>, reshuffle: bool) -> Change {
    Change::Flags(FlagChange::Set(SetFlag { flag, after: after.map(EntryNumber), reshuffle }))
}

fn flags(state: &State) -> &Flags {
    &state.project("flights").unwrap().flags
}

fn record(flag: Flag) -> FlagRecord {
    let mut state = applied();
    make(&mut state, set(flag, None, false)).unwrap();
    flags(&state).flags["new_page"].clone()
}

/// Conditions hold when they are the given one; a condition `?` is broken.
fn holds(true_one: &str) -> impl FnMut(&str) -> Result<bool, String> {
    move |when: &str| if when == "?" { Err("no such column".to_owned()) } else { Ok(when == true_one) }
}

#[test]
fn the_first_rule_that_holds_decides_and_says_why() {
    let compiled = CompiledFlag::new(&record(flag(2_500)), None);
    let unit = [KeyPart::Text("N14228")];
    let ask = |condition: &str| {
        let answer = compiled.evaluate(Kind::Boolean, Some(&unit), holds(condition));
        (answer.variant.unwrap().to_owned(), answer.reason)
    };
    assert_eq!(ask("role = 'pilot'"), ("on".to_owned(), Reason::TargetingMatch));
    let (mut split, mut default) = (0, 0);
    for unit in 0..4_000 {
        let unit = [KeyPart::Integer(unit)];
        let answer = compiled.evaluate(Kind::Boolean, Some(&unit), holds(""));
        assert_eq!(answer.value, Some(&json!(answer.reason == Reason::Split)));
        match answer.reason {
            Reason::Split => split += 1,
            Reason::Default => default += 1,
            other => panic!("{other:?}"),
        }
    }
    assert!((900..1_100).contains(&split) && split + default == 4_000, "{split}");
    let disabled = CompiledFlag::new(&record(Flag { enabled: false, ..flag(10_000) }), None);
    let answer = disabled.evaluate(Kind::Boolean, Some(&unit), holds("role = 'pilot'"));
    assert_eq!((answer.variant, answer.reason), (Some("off"), Reason::Disabled));
}

#[test]
fn questions_that_cannot_be_answered_say_so() {
    #[track_caller]
    fn check(flag: Flag, kind: Kind, unit: Option<&[KeyPart<'_>]>, code: ErrorCode, text: &str) {
        let compiled = CompiledFlag::new(&record(flag), None);
        let answer = compiled.evaluate(kind, unit, holds(""));
        assert_eq!((answer.value, answer.variant, answer.reason), (None, None, Reason::Error));
        let (found, told) = answer.error.unwrap();
        assert_eq!(found, code);
        assert!(told.contains(text), "{told}");
    }
    check(flag(1), Kind::String, None, ErrorCode::TypeMismatch, "is of type boolean, not string");
    check(flag(1), Kind::Boolean, None, ErrorCode::TargetingKeyMissing, "the question names none");
    let mut broken = flag(1);
    broken.rules[0].when = Some("?".into());
    check(broken, Kind::Boolean, Some(&[]), ErrorCode::ParseError, "`?`: no such column");
    assert_eq!(serde_json::to_value(Reason::TargetingMatch).unwrap(), json!("TARGETING_MATCH"));
    assert_eq!(serde_json::to_value(ErrorCode::TargetingKeyMissing).unwrap(), json!("TARGETING_KEY_MISSING"));
}

#[test]
fn a_ramp_adds_units_and_taking_them_away_must_be_meant() {
    let mut state = applied();
    make(&mut state, set(flag(500), None, false)).unwrap();
    assert_eq!(state.head.0, 2);
    make(&mut state, set(flag(500), None, false)).unwrap();
    assert_eq!(state.head.0, 2, "the same again is no change");
    make(&mut state, set(flag(2_500), Some(2), false)).unwrap();
    assert_eq!(
        make(&mut state, set(flag(500), Some(3), false)).unwrap_err(),
        "units that have `on` of flag `new_page` would lose it: a ramp only adds units; say `--reshuffle` if that is meant"
    );
    make(&mut state, set(flag(500), Some(3), true)).unwrap();
    // Turning it off takes nothing away for good.
    make(&mut state, set(Flag { enabled: false, ..flag(500) }, Some(4), false)).unwrap();
    assert_eq!(state.without_effect, 0);

    let split = Split { layer: "l".into(), seed: "s".into(), slices: vec![] };
    let split = split.ramp("a", 100).unwrap().ramp("b", 300).unwrap().ramp("a", 200).unwrap();
    let slices: Vec<_> = split.slices.iter().map(|slice| (slice.variant.as_str(), slice.from, slice.to)).collect();
    assert_eq!(slices, [("a", 0, 100), ("b", 100, 400), ("a", 400, 500)]);
    assert_eq!((split.ramp("a", 9_701), split.ramp("a", 199)), (None, None));
    assert!(split.ramp("a", 9_700).is_some());
}

#[test]
fn of_two_changes_to_a_flag_the_second_is_told_who_was_first() {
    let mut state = applied();
    make(&mut state, set(flag(500), None, false)).unwrap();
    make(&mut state, set(flag(600), Some(2), false)).unwrap();
    assert_eq!(
        make(&mut state, set(flag(700), Some(2), false)).unwrap_err(),
        "flag `new_page` was changed by ada with entry 3 of the control log since it was looked at; look at it and decide again"
    );
    assert!(make(&mut state, set(flag(700), None, false)).unwrap_err().contains("was changed by ada"));
    let remove = |after| Change::Flags(FlagChange::Remove(RemoveFlag { name: name(), after: EntryNumber(after) }));
    assert!(make(&mut state, remove(2)).unwrap_err().contains("with entry 3"));
    make(&mut state, remove(3)).unwrap();
    assert!(flags(&state).flags.is_empty());
    assert!(make(&mut state, remove(3)).unwrap_err().contains("there is no flag `new_page`"));
}

#[test]
fn flags_that_cannot_be_are_refused() {
    #[track_caller]
    fn check(change: impl FnOnce(&mut Flag), expected: &str) {
        let mut wrong = flag(500);
        change(&mut wrong);
        let refusal = make(&mut applied(), set(wrong, None, false)).unwrap_err();
        assert!(refusal.contains(expected), "{refusal}");
    }
    check(|flag| flag.default = "of".into(), "it has no variant `of` (there are: off, on)");
    check(|flag| flag.variants.clear(), "1 to 64 variants");
    check(|flag| flag.kind = Kind::Integer, "variant `off` is false, which is no integer");
    check(|flag| flag.rules[0].then = Then::Variant("x".into()), "no variant `x`");
    check(|flag| flag.rules[0].when = Some(" ".into()), "a condition is empty");
    check(|flag| flag.description = Some("x".repeat(FLAG_BYTES_MAX)), "more than 65536");
    let split = |slices: Vec<Slice>| Then::Split(Split { layer: "l".into(), seed: "s".into(), slices });
    let slice = |from, to| Slice { variant: "on".into(), from, to };
    check(|flag| flag.rules[1].then = split(vec![slice(0, 10), slice(5, 20)]), "may not overlap");
    check(|flag| flag.rules[1].then = split(vec![slice(0, 10_001)]), "at most 10000");
}

#[test]
fn held_out_units_are_split_by_no_flag() {
    let holdout = |digit: &str, buckets| Holdout { salt: Salt::try_new(digit.repeat(64)).unwrap(), buckets };
    let mut state = applied();
    let make_holdout = |state: &mut State, of: Holdout| make(state, Change::Flags(FlagChange::Holdout(of)));
    make_holdout(&mut state, holdout("1", 1_000)).unwrap();
    make_holdout(&mut state, holdout("1", 1_000)).unwrap();
    assert_eq!(state.head.0, 2);
    assert!(make_holdout(&mut state, holdout("2", 1_000)).unwrap_err().contains("the salt of a holdout never changes"));
    assert!(make_holdout(&mut state, holdout("1", 5_001)).unwrap_err().contains("less than half"));
    let (held, fact) = flags(&state).holdout.clone().unwrap();
    assert_eq!(fact.entry.0, 2);

    let compiled = CompiledFlag::new(&record(flag(10_000)), Some(&held));
    let default = (0..2_000)
        .filter(|unit| {
            let unit = [KeyPart::Integer(*unit)];
            compiled.evaluate(Kind::Boolean, Some(&unit), holds("")).reason == Reason::Default
        })
        .count();
    assert!((150..250).contains(&default), "{default}");
}

/// Microseconds: the bound is for a loaded machine without optimisation.
#[test]
fn a_question_takes_microseconds() {
    let compiled = CompiledFlag::new(&record(flag(5_000)), None);
    let begun = std::time::Instant::now();
    let on = (0..10_000)
        .filter(|unit| {
            let unit = [KeyPart::Integer(*unit)];
            compiled.evaluate(Kind::Boolean, Some(&unit), holds("")).variant == Some("on")
        })
        .count();
    let each = begun.elapsed() / 10_000;
    assert!((4_800..5_200).contains(&on), "{on}");
    assert!(each < std::time::Duration::from_micros(100), "{each:?}");
}
