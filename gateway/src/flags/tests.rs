use feature_defs::window::{DAY, HOUR, SECOND};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use registry::assignment::{KeyPart, place};
use registry::flags::{Flag, FlagRecord, Slice, Split, Then};
use registry::state::Fact;
use serde_json::{Map, Value as Json, json};

use super::*;

fn object(value: Json) -> Map<String, Json> {
    serde_json::from_value(value).unwrap()
}

/// What a condition says for some contexts.
#[track_caller]
fn check(condition: &str, expected: &[(Json, bool)]) {
    let compiled = Condition::compile(condition).unwrap();
    for (attributes, holds) in expected {
        let attributes = object(attributes.clone());
        let context = Context::new(Some("N14228"), &attributes).unwrap();
        assert_eq!(compiled.holds(&context), Ok(*holds), "{condition} of {attributes:?}");
    }
}

#[track_caller]
fn check_reads(condition: &str, expected: &str) {
    let compiled = Condition::compile(condition).unwrap();
    let reads: Vec<String> =
        compiled.attributes().map(|(name, types)| format!("{name}: {}", types.join(" or "))).collect();
    assert_eq!(reads.join(", "), expected, "{condition}");
}

#[track_caller]
fn check_error(condition: &str, expected: &str) {
    assert_eq!(Condition::compile(condition).unwrap_err().to_string(), expected);
}

#[test]
fn conditions_take_their_types_from_what_they_say() {
    check("country = 'DE'", &[(json!({"country": "DE"}), true), (json!({"country": "AT"}), false)]);
    check("age >= 18", &[(json!({"age": 18}), true), (json!({"age": 17.5}), false), (json!({"age": 99.5}), true)]);
    check("beta", &[(json!({"beta": true}), true), (json!({"beta": false}), false), (json!({"beta": "yes"}), false)]);
    check("NOT beta", &[(json!({"beta": false}), true), (json!({}), false)]);
    check(
        "signed_up < TIMESTAMP '2024-01-01T00:00:00Z'",
        &[
            (json!({"signed_up": "2023-12-31T23:30:00Z"}), true),
            (json!({"signed_up": "2024-01-01T00:30:00+01:00"}), true),
            (json!({"signed_up": "2024-01-01T00:00:00Z"}), false),
            (json!({"signed_up": "yesterday"}), false),
        ],
    );
    check(
        "account.plan IN ('pro', 'team')",
        &[(json!({"account": {"plan": "pro"}}), true), (json!({"account": "pro"}), false)],
    );
    check(
        "email LIKE '%@example.com'",
        &[(json!({"email": "a@example.com"}), true), (json!({"email": "a@example.org"}), false)],
    );
    check("targetingKey = 'N14228'", &[(json!({}), true), (json!({"targetingKey": "other"}), false)]);
    check("1 = 1", &[(json!({}), true)]);
    check("substr(code, n) = 'c' AND score > 0.5", &[(json!({"code": "abc", "n": 3, "score": 0.7}), true)]);
    check_reads("country = 'DE' AND age > 3 AND beta", "country: string, age: number, beta: bool");
    check_reads("substr(code, n) = 'c'", "code: string, n: integer");
    check_reads("date_part('hour', seen) < 6", "seen: timestamp");
    check_reads("plan IS NULL", "plan: string or number or bool or timestamp");
}

/// What is missing, null or of another type is null, and null does not hold.
#[test]
fn nothing_that_a_caller_sends_fails() {
    let strange =
        [json!(null), json!(3), json!("x"), json!(true), json!([1]), json!({"a": 1}), json!(1e300), json!(u64::MAX)];
    for condition in
        ["a = 'DE'", "a > 17", "a", "a IN (1, 2)", "a < TIMESTAMP '2024-01-01T00:00:00Z'", "a = b", "a.b = 'x'"]
    {
        let compiled = Condition::compile(condition).unwrap();
        for value in &strange {
            let attributes = object(json!({"a": value}));
            let context = Context::new(None, &attributes).unwrap();
            let holds = compiled.holds(&context).unwrap();
            let expected = match condition {
                "a > 17" => *value == json!(1e300),
                "a" => *value == json!(true),
                _ => false,
            };
            assert_eq!(holds, expected, "{condition} of {value}");
        }
    }
}

/// Where more than one type fits, the values decide; large integers stay apart.
#[test]
fn values_choose_between_readings() {
    check(
        "a = b",
        &[
            (json!({"a": "x", "b": "x"}), true),
            (json!({"a": 1, "b": 1.0}), true),
            (json!({"a": true, "b": true}), true),
            (json!({"a": "1", "b": 1}), false),
            (json!({"a": 1, "b": 2}), false),
        ],
    );
    check(
        "plan IS NOT NULL",
        &[
            (json!({"plan": 5}), true),
            (json!({"plan": "pro"}), true),
            (json!({"plan": null}), false),
            (json!({}), false),
        ],
    );
    check(
        "id = 9007199254740993",
        &[
            (json!({"id": 9007199254740993_i64}), true),
            (json!({"id": 9007199254740992_i64}), false),
            (json!({"id": 9007199254740994_i64}), false),
        ],
    );
    check("hash_bucket(id, 1000) >= 0", &[(json!({"id": 7}), true), (json!({"id": "7"}), true)]);
}

#[test]
fn what_is_no_condition_is_refused_with_the_compilers_words() {
    check_error("country =", "condition `country =`: expected: an expression, found: the end");
    check_error(
        "upper(country) > 3",
        "condition `upper(country) > 3`: cannot compare string with int64; CAST(... AS int64) makes a number of a string",
    );
    check_error(
        "uper(country) = 'DE'",
        "condition `uper(country) = 'DE'`: no function `uper`, at `uper`; did you mean `upper`?",
    );
    let no_clock = Condition::compile("now() > seen").unwrap_err().to_string();
    assert!(no_clock.contains("`now` is not allowed"), "{no_clock}");
    let no_bool = Condition::compile("length(country)").unwrap_err().to_string();
    assert!(no_bool.contains("the expression is int64"), "{no_bool}");
    let many: Vec<String> = (0..33).map(|n| format!("a{n} = 1")).collect();
    let many = Condition::compile(&many.join(" OR ")).unwrap_err().to_string();
    assert!(many.contains("reads 33 attributes, more than 32"), "{many}");
}

fn flag(name: &str, when: Option<&str>, share: u16) -> Flag {
    let slices = vec![Slice { variant: "on".into(), from: 0, to: share }];
    let split = Split { layer: "pages".into(), seed: name.into(), slices };
    let mut rules = vec![Rule { when: None, then: Then::Split(split) }];
    if let Some(when) = when {
        rules.insert(0, Rule { when: Some(when.to_owned()), then: Then::Variant("on".into()) });
    }
    Flag {
        name: FlagName::try_new(name).unwrap(),
        kind: Kind::Boolean,
        variants: [("on".to_owned(), json!(true)), ("off".to_owned(), json!(false))].into(),
        default: "off".into(),
        enabled: true,
        rules,
        description: None,
    }
}

fn flags(all: impl IntoIterator<Item = (Flag, u64)>) -> Flags {
    let record = |(flag, entry): (Flag, u64)| {
        let changed =
            Fact { entry: EntryNumber(entry), at: chrono::DateTime::UNIX_EPOCH, who: "ada".into(), why: None };
        (flag.name.clone(), FlagRecord { flag, changed })
    };
    Flags { flags: all.into_iter().map(record).collect(), holdout: None }
}

#[test]
fn a_change_compiles_what_it_touches_and_a_broken_condition_is_told() {
    let first = flags([(flag("a", Some("role = 'pilot'"), 0), 1), (flag("b", Some("nothing("), 10_000), 2)]);
    let served = ServedFlags::new(&first, &ServedFlags::default());
    let attributes = object(json!({"role": "pilot"}));
    let context = Context::new(Some("N14228"), &attributes).unwrap();
    let mut asking = served.ask(&context);
    let answer = served.evaluate("a", Some(Kind::Boolean), &mut asking);
    assert_eq!((answer.evaluation.value, answer.evaluation.reason), (Some(&json!(true)), Reason::TargetingMatch));
    let (code, text) = served.evaluate("b", None, &mut asking).evaluation.error.unwrap();
    assert!(code == ErrorCode::ParseError && text.contains("nothing("), "{text}");
    let code = |name: &str, kind: Option<Kind>, asking: &mut Asking<'_>| {
        let (code, _) = served.evaluate(name, kind, asking).evaluation.error.unwrap();
        code
    };
    assert_eq!(code("c", None, &mut asking), ErrorCode::FlagNotFound);
    assert_eq!(code("a", Some(Kind::String), &mut asking), ErrorCode::TypeMismatch);
    let nobody = Context::new(None, &attributes).unwrap();
    assert_eq!(served.evaluate("a", None, &mut served.ask(&nobody)).evaluation.reason, Reason::TargetingMatch);
    let empty = Map::new();
    let nobody = Context::new(None, &empty).unwrap();
    assert_eq!(code("a", None, &mut served.ask(&nobody)), ErrorCode::TargetingKeyMissing);

    assert!(served.is_of(&first));
    let second = flags([(flag("a", Some("role = 'pilot'"), 0), 1), (flag("b", None, 10_000), 3)]);
    assert!(!served.is_of(&second));
    let next = ServedFlags::new(&second, &served);
    assert!(Arc::ptr_eq(&served.flags["a"], &next.flags["a"]) && !Arc::ptr_eq(&served.flags["b"], &next.flags["b"]));
    assert_eq!(next.evaluate("b", None, &mut next.ask(&context)).evaluation.reason, Reason::Split);
    assert_eq!(next.conditions.len(), 1);
}

fn exposures(store: &Arc<dyn ObjectStore>) -> Arc<Exposures> {
    let (root, gateway, metrics) = (Path::from("flights"), "127.0.0.1:7400".to_owned(), FlagMetrics::default());
    Exposures::new(ExposureParts { store: store.clone(), root, gateway, settings: None, metrics })
}

fn given(flag: &str, variant: &str) -> Vec<(String, String, EntryNumber)> {
    vec![(flag.to_owned(), variant.to_owned(), EntryNumber(7))]
}

#[tokio::test]
async fn exposures_are_written_once_per_unit_without_its_key() {
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    store.put(&Path::from("flights/serving_log/key"), "".into()).await.unwrap();
    let (one, two) = (exposures(&store), exposures(&store));
    let noon = 19_700 * DAY + 12 * HOUR;
    // Before the key is known nothing can be written down, and that is counted.
    one.exposed("early", given("new_page", "on"), noon);
    one.flush(noon).await.unwrap();
    one.learn_key().await.unwrap();
    two.learn_key().await.unwrap();
    for second in 0..3 {
        one.exposed("ada@example.com", given("new_page", "on"), noon + second * SECOND);
    }
    one.exposed("bob@example.com", given("new_page", "off"), noon);
    one.exposed("bob@example.com", given("other", "off"), noon);
    one.flush(noon + 30 * SECOND).await.unwrap();
    // Nothing new, no object.
    one.flush(noon + 60 * SECOND).await.unwrap();
    // Another gateway sees one unit again, and a torn one.
    two.exposed("ada@example.com", given("new_page", "on"), noon);
    two.exposed("eve@example.com", given("new_page", "on"), noon);
    two.flush(noon + HOUR).await.unwrap();
    one.exposed("eve@example.com", given("new_page", "off"), noon);
    one.flush(noon + HOUR).await.unwrap();

    use futures::TryStreamExt as _;
    let mut objects: Vec<_> = store.list(Some(&Path::from("flights/exposures"))).try_collect().await.unwrap();
    objects.sort_by(|a, b| a.location.cmp(&b.location));
    assert_eq!(objects.len(), 3);
    assert!(
        objects[0].location.as_ref().starts_with("flights/exposures/2023-12-09/12/127-0-0-1-7400-"),
        "{}",
        objects[0].location
    );
    let bytes = store.get(&objects[0].location).await.unwrap().bytes().await.unwrap();
    let text = String::from_utf8(zstd::bulk::decompress(&bytes, 1 << 20).unwrap()).unwrap();
    assert!(!text.contains("ada") && !text.contains("example"), "{text}");
    let lines: Vec<Line> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 3);
    let ada = lines.iter().find(|line| line.variant == "on").unwrap();
    assert_eq!((ada.entry, ada.count), (7, 3));
    assert_eq!((ada.first.as_str(), ada.last.as_str()), ("2023-12-09T12:00:00.000Z", "2023-12-09T12:00:02.000Z"));

    let told = two.report("new_page", noon - HOUR, noon + 2 * HOUR).await.unwrap();
    let of = |variant: &str| (told.entries[&7][variant].units, told.entries[&7][variant].evaluations);
    assert_eq!((of("on"), of("off")), ((2, 5), (2, 2)));
    assert_eq!((told.torn_units, told.objects, told.damaged.len()), (1, 3, 0));
    let day = two.report("new_page", noon - 12 * HOUR, noon + 12 * HOUR).await.unwrap();
    assert_eq!(day, told);
    assert_eq!(two.report("new_page", noon + 2 * HOUR, noon + 3 * HOUR).await.unwrap().objects, 0);
    assert!(two.report("new_page", noon, noon).await.is_err());
}

/// A store that is away for as long as it is told to be.
#[tokio::test]
async fn while_the_store_is_away_exposures_wait_and_too_many_are_counted() {
    let inner: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("store");
    std::fs::create_dir(&place).unwrap();
    let store: Arc<dyn ObjectStore> = Arc::new(object_store::local::LocalFileSystem::new_with_prefix(&place).unwrap());
    drop(inner);
    let log = exposures(&store);
    log.learn_key().await.unwrap();
    log.exposed("ada", given("new_page", "on"), 12 * HOUR);
    // A file stands where the folder should be.
    std::fs::remove_dir_all(&place).unwrap();
    std::fs::write(&place, "").unwrap();
    assert!(log.flush(12 * HOUR).await.is_err());
    log.exposed("bob", given("new_page", "on"), 12 * HOUR);
    assert!(log.flush(12 * HOUR).await.is_err());
    std::fs::remove_file(&place).unwrap();
    std::fs::create_dir(&place).unwrap();
    log.flush(12 * HOUR).await.unwrap();
    let told = log.report("new_page", 0, DAY).await.unwrap();
    assert_eq!((told.objects, told.entries[&7]["on"].units), (2, 2));
}

/// The vectors of the design note, as a client would compute them.
#[test]
fn a_targeting_key_is_one_text_part() {
    let attributes = Map::new();
    let context = Context::new(Some("N14228"), &attributes).unwrap();
    assert_eq!(place("delay", &context.unit().unwrap()).bucket, 6835);
    assert_eq!(context.unit().unwrap(), [KeyPart::Text("N14228")]);
}
