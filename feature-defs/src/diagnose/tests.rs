use std::sync::Arc;

use super::*;

fn files(path: &str, text: &str) -> Files {
    Files { files: vec![Arc::new(SourceFile { path: path.to_string(), text: text.to_string() })] }
}

fn at(text: &str, words: &str) -> Span {
    let start = text.find(words).expect("the words are in the text") as u32;
    Span { file: 0, start, end: start + words.len() as u32 }
}

#[test]
fn a_diagnostic_shows_its_line_with_the_words_marked() {
    let text = "sources:\n  - name: météo\n    fils: data/*.parquet\n";
    let diagnostic = Diagnostic::error("unknown key `fils`", at(text, "fils"))
        .label("not a key of a source")
        .nearest("fils", ["files", "stream"]);
    let expected = "\
error: unknown key `fils`
 --> features/a.yaml:3:5
  |
3 |     fils: data/*.parquet
  |     ^^^^ not a key of a source
  |
  = help: did you mean `files`?
";
    assert_eq!(render(&[diagnostic], &files("features/a.yaml", text), false), expected);
}

#[test]
fn columns_count_characters() {
    let text = "a: [\"漢字é\", x]\r\nb: 1\r\n";
    let files = files("a.yaml", text);
    let located = locate(&[Diagnostic::warning("w", at(text, "x"))], &files);
    assert_eq!((located[0].line, located[0].column), (1, 12));
    assert_eq!(place(at(text, "b"), &files), "a.yaml:2:1");
    let rendered = render(&[Diagnostic::warning("w", at(text, "x"))], &files, false);
    assert!(rendered.contains("warning: w\n --> a.yaml:1:12\n"), "{rendered}");
}

#[test]
fn what_spans_lines_shows_the_first() {
    let text = "a:\n  - 1\n  - 2\nb: 3\n";
    let rendered = render(&[Diagnostic::error("wrong", at(text, "- 1\n  - 2"))], &files("a.yaml", text), false);
    assert!(rendered.contains("2 |   - 1\n  |   ^^^\n"), "{rendered}");
}

#[test]
fn no_span_breaks_rendering() {
    let text = "é: 漢\n";
    let files = files("a.yaml", text);
    for start in 0..12 {
        for end in 0..12 {
            render(&[Diagnostic::error("e", Span { file: 0, start, end })], &files, true);
        }
    }
    assert_eq!(
        render(&[Diagnostic::error("no `coeval.yaml`", Span::NOWHERE)], &files, false),
        "error: no `coeval.yaml`\n"
    );
    let empty = Files::default();
    assert_eq!(locate(&[Diagnostic::error("e", Span::default())], &empty)[0].file, None);
}

#[test]
fn diagnostics_come_in_reading_order_and_a_flood_is_cut() {
    let text = "a: 1\nb: 2\n";
    let files = files("a.yaml", text);
    let located =
        locate(&[Diagnostic::error("second", at(text, "b")), Diagnostic::error("first", at(text, "a"))], &files);
    assert_eq!(located.iter().map(|located| located.message.as_str()).collect::<Vec<_>>(), ["first", "second"]);
    let json = serde_json::to_string(&located[1]).unwrap();
    assert_eq!(json, r#"{"severity":"error","message":"second","file":"a.yaml","line":2,"column":1}"#);
    let flood = vec![Diagnostic::error("again", at(text, "a")); SHOWN_MAX + 7];
    assert!(render(&flood, &files, false).ends_with("\nand 7 more\n"));
}

#[test]
fn the_nearest_name_is_the_one_meant() {
    fn check(name: &str, expected: Option<&str>) {
        let names = ["late_share", "dep_delay_mean", "temp", "visib", "wind_chill"];
        assert_eq!(nearest(name, names), expected, "{name}");
    }
    check("tmp", Some("temp"));
    check("Temp", Some("temp"));
    check("visbi", Some("visib"));
    check("share_late", Some("late_share"));
    check("dep_delay_maen", Some("dep_delay_mean"));
    check("x", None);
    check("carrier", None);
    check("", None);
    check(&"t".repeat(100_000), None);
}
