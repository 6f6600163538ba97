//! Bytes of every stored format, kept as earlier versions wrote them, so that today's code is held to reading them.
//!
//! They lie in `tests/data/formats/v1/`, as hexadecimal text. With `COEVAL_WRITE_FORMATS=1` a test run writes those that
//! are missing; what is there is never written again, because data in the field does not change either. A format that
//! changes gets a further name, and the old one stays.

use std::fs;
use std::path::Path;

/// The kept bytes of a format. `written` is what its writer writes now, for the first time it is kept.
#[track_caller]
pub(crate) fn kept(name: &str, written: &[u8]) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/formats/v1").join(format!("{name}.hex"));
    if !path.exists() && std::env::var_os("COEVAL_WRITE_FORMATS").is_some() {
        let digits: String = written.iter().map(|byte| format!("{byte:02x}")).collect();
        let lines: Vec<&str> = (0..digits.len()).step_by(96).map(|at| &digits[at..digits.len().min(at + 96)]).collect();
        fs::write(&path, lines.join("\n") + "\n").unwrap();
    }
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let digits: Vec<u8> = text.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    digits.chunks(2).map(byte).collect()
}

/// The same, of a format that is still written.
#[track_caller]
pub(crate) fn current(name: &str, written: &[u8]) -> Vec<u8> {
    let kept = kept(name, written);
    assert!(
        kept == written,
        "what is written as {name} has changed; give the new bytes a version and a name of their own"
    );
    kept
}
