use super::*;

#[test]
fn unknown_names_come_with_the_nearest() {
    let check = |name: &str, known: &[&str], expected: &str| {
        let failure = Failure::unknown("service", name, known.iter().copied());
        assert_eq!((failure.kind, failure.message.as_str()), (Kind::Unknown, expected));
    };
    check("delay_input", &["delay_inputs", "other"], "there is no service `delay_input`; did you mean `delay_inputs`?");
    check("zzz", &["delay_inputs", "other"], "there is no service `zzz`; there are: delay_inputs, other");
    check("zzz", &[], "there is no service `zzz`; there are none; apply definitions that have one");
}

#[test]
fn what_is_internal_stays_in_the_log() {
    let error = std::io::Error::other("/secret/path is gone");
    let status = Status::from(Failure::internal("the features could not be computed", &error));
    assert_eq!(status.code(), Code::Internal);
    assert!(status.message().starts_with("the features could not be computed; the server's log says why under "));
    assert!(!status.message().contains("secret"));
}
