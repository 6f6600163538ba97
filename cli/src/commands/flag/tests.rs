use clap::Parser;
use registry::flags::Then;
use serde_json::json;

use super::edit::quoted;
use super::*;

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    edit: Edit,
}

fn edit(known: Option<&Flag>, words: &[&str]) -> Result<Flag, String> {
    let line = Line::try_parse_from(["flag"].iter().chain(words)).map_err(|error| error.to_string())?;
    line.edit.of("new_ranker", known).map_err(|error| error.to_string())
}

fn wanted(words: &[&str]) -> Flag {
    edit(None, words).unwrap()
}

#[test]
fn shares_are_exact() {
    for (text, of) in [("25%", 2_500), ("0.05%", 5), ("100%", 10_000), ("12.5 %", 1_250), ("0%", 0)] {
        assert_eq!(share(text), Ok(of), "{text}");
    }
    for wrong in ["25", "0.005%", "100.01%", "-1%", "%", "a%", "999999999999%"] {
        assert!(share(wrong).is_err(), "{wrong}");
    }
    assert_eq!([0, 5, 1_250, 10_000].map(percent), ["0%", "0.05%", "12.5%", "100%"]);
}

#[test]
fn words_make_a_flag() {
    let flag =
        wanted(&["--split", "on=10%", "--rule", "country = 'DE' -> on", "--rule", "a -> 3 > 2 -> on=50%,off=20%"]);
    assert_eq!((flag.kind, flag.default.as_str(), flag.enabled), (registry::flags::Kind::Boolean, "off", true));
    assert_eq!(described(&flag), "2 rules, split on=10%, else off");
    assert_eq!(flag.rules[1].when.as_deref(), Some("a -> 3 > 2"));
    assert_eq!(
        edit::lines(&flag)[2..],
        [
            "  rule 1: country = 'DE' -> on",
            "  rule 2: a -> 3 > 2 -> split on=50%,off=20% (layer new_ranker)",
            "  rule 3: everybody -> split on=10% (layer new_ranker)",
            "  else: off",
        ]
    );
    let sizes = wanted(&["--variant", "small=10", "--variant", "large=100", "--default", "small"]);
    assert_eq!((sizes.kind, &sizes.variants["large"]), (registry::flags::Kind::Integer, &json!(100)));
    let texts = wanted(&["--type", "string", "--variant", "a=10", "--variant", "b=\"x y\"", "--default", "a"]);
    assert_eq!((&texts.variants["a"], &texts.variants["b"]), (&json!("10"), &json!("x y")));
    let object = wanted(&["--variant", "a={\"k\": 3}", "--default", "a"]);
    assert_eq!(object.kind, registry::flags::Kind::Object);
}

#[test]
fn what_is_not_named_stays() {
    let flag = wanted(&["--split", "on=10%", "--rule", "country = 'DE' -> on", "--description", "ranks anew"]);
    let more = edit(Some(&flag), &["--split", "on=25%"]).unwrap();
    assert_eq!(described(&more), "1 rule, split on=25%, else off");
    assert_eq!(more.description, flag.description);
    // The units that had it keep it.
    let Then::Split(split) = &more.rules[1].then else { panic!() };
    assert_eq!((split.slices[0].from, split.slices[0].to), (0, 2_500));
    let less = edit(Some(&more), &["--split", "on=5%,off=1%", "--disable"]).unwrap();
    assert_eq!(described(&less), "disabled, 1 rule, split on=5%,off=1%, else off");
    let bare = edit(Some(&less), &["--no-rules", "--no-split", "--enable"]).unwrap();
    assert_eq!((described(&bare).as_str(), bare.rules.len()), ("else off", 0));
    let layer = edit(Some(&flag), &["--split", "on=10%", "--layer", "pages"]).unwrap();
    assert!(edit::lines(&layer).contains(&"  rule 2: everybody -> split on=10% (layer pages)".to_owned()));
}

#[test]
fn a_ramp_only_adds() {
    let mut flag = wanted(&["--split", "on=10%,off=20%"]);
    assert_eq!(edit::ramp(&mut flag, "on", 2_500, None).unwrap(), 1_000);
    assert_eq!(described(&flag), "split on=25%,off=20%, else off");
    let error = |flag: &Flag, variant: &str, share: u16, rule: Option<usize>| {
        edit::ramp(&mut flag.clone(), variant, share, rule).unwrap_err().to_string()
    };
    assert!(error(&flag, "on", 100, None).contains("only adds units"));
    assert!(error(&flag, "on", 9_000, None).contains("can have at most 80%"));
    assert!(error(&flag, "onn", 9_000, None).contains("did you mean `on`?"));
    assert!(error(&flag, "on", 9_000, Some(2)).contains("rule 2"));
    assert!(error(&wanted(&[]), "on", 100, None).contains("--split on=10%"));
    let two = wanted(&["--split", "on=10%", "--rule", "a = 'x' -> on=50%"]);
    assert!(error(&two, "on", 6_000, None).contains("rules 1 and 2"));
}

#[test]
fn words_that_are_no_flag_say_why() {
    #[track_caller]
    fn check(words: &[&str], expected: &str) {
        let error = edit(None, words).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
    check(&["--type", "bool"], "write one of boolean, string");
    check(&["--type", "string"], "name the variants");
    check(&["--variant", "a=1", "--variant", "b=true", "--default", "a"], "different types");
    check(&["--variant", "a=1"], "--default");
    check(&["--variant", "a"], "NAME=VALUE");
    check(&["--type", "integer", "--variant", "a=x", "--default", "a"], "is no integer");
    check(&["--rule", "country = 'DE'"], "CONDITION -> VARIANT");
    check(&["--split", "on=60%,off=50%"], "more than 100%");
    check(&["--split", "on=6%,on=5%"], "two shares");
    check(&["--split", "on"], "VARIANT=SHARE");
}

#[test]
fn double_quotes_are_pointed_at() {
    let flag = wanted(&["--rule", "country = \"DE\" AND note = 'say \"hi\"' -> on"]);
    assert_eq!(quoted(&flag), ["DE"]);
}
