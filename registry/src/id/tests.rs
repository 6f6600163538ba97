use super::*;

#[track_caller]
fn check(text: &str, expected: Result<(), &str>) {
    let actual = ModelName::try_new(text).map(|_| ()).map_err(|error| error.problem);
    assert_eq!(actual, expected, "{text:?}");
}

#[test]
fn names_are_safe_parts_of_paths() {
    check("delay", Ok(()));
    check("delay_small-2.1", Ok(()));
    check("9E", Ok(()));
    check("", Err("it is empty"));
    check("../etc", Err("it holds a character that is not allowed"));
    check("..", Err("it begins with `-` or `.`"));
    check("a b", Err("it holds a character that is not allowed"));
    check("größe", Err("it holds a character that is not allowed"));
    check(&"x".repeat(129), Err("it is longer than 128 bytes"));
}

#[test]
fn a_name_error_says_what_to_use() {
    let error = ProjectName::try_new("nyc flights").unwrap_err();
    assert_eq!(
        error.to_string(),
        "`nyc flights` cannot be a project name: it holds a character that is not allowed; \
         use letters, digits, `_`, `-` and `.`, beginning with a letter, a digit or `_`"
    );
}

#[test]
fn sha256_is_the_known_one() {
    let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    assert_eq!(Sha256::of(b"").as_str(), empty);
    assert!(Sha256::try_new(empty.to_uppercase()).is_err());
}

#[test]
fn names_are_checked_when_they_are_read_back() {
    assert_eq!(serde_json::from_str::<ModelName>("\"delay\"").unwrap().as_str(), "delay");
    assert!(serde_json::from_str::<ModelName>("\"a/b\"").is_err());
}
