use proptest::prelude::*;

use super::*;

fn root(text: &str) -> Node {
    let (node, diagnostics) = parse(0, text);
    assert!(diagnostics.is_empty(), "{text}: {diagnostics:?}");
    node.expect("a text without diagnostics is a document")
}

fn check_scalar(text: &str, expected: Kind) {
    let node = root(&format!("k: {text}"));
    assert_eq!(node.get("k").map(|node| &node.kind), Some(&expected), "{text}");
}

fn check_error(text: &str, expected: &str, marked: &str) {
    let (_, diagnostics) = parse(0, text);
    let [diagnostic] = &diagnostics[..] else { panic!("{text:?} gave {diagnostics:?}") };
    assert_eq!(diagnostic.message, expected);
    assert_eq!(&text[diagnostic.span.start as usize..diagnostic.span.end as usize], marked);
}

#[test]
fn the_core_schema_decides_what_a_scalar_is() {
    for text in [
        "9E", "AA", "NO", "no", "on", "yes", "off", "10m", "1h30m", "1.2.3", "e3", ".", "-a", "+", "1e", "0xg", "0o8",
        "1_000", "'1'", "\"true\"", "!!str 12",
    ] {
        let node = root(&format!("[{text}]"));
        let Kind::Sequence(items) = &node.kind else { panic!("{text} is in a list") };
        assert!(matches!(items[0].kind, Kind::String(_)), "{text} is {:?}", items[0].kind);
    }
    check_scalar("1e3", Kind::Float(1000.0));
    check_scalar("-.5", Kind::Float(-0.5));
    check_scalar("12.", Kind::Float(12.0));
    check_scalar("-.inf", Kind::Float(f64::NEG_INFINITY));
    check_scalar("-12", Kind::Int(-12));
    check_scalar("0o17", Kind::Int(15));
    check_scalar("0x1F", Kind::Int(31));
    check_scalar("9223372036854775807", Kind::Int(i64::MAX));
    check_scalar("~", Kind::Null);
    check_scalar("", Kind::Null);
    check_scalar("True", Kind::Bool(true));
    check_scalar("!!float 1", Kind::Float(1.0));
    let Kind::Float(x) = resolve_plain(".nan").unwrap() else { panic!(".nan is a float") };
    assert!(x.is_nan());
}

#[test]
fn what_is_refused_says_where() {
    check_error("a: 1\nb: 2\na: 3\n", "the key `a` is given twice", "a");
    check_error("1: x\n", "a key must be a string, not the integer 1", "1");
    check_error("true: x\n", "a key must be a string, not the boolean true", "true");
    check_error("? [a, b]\n: x\n", "a key must be a string, not a list", "[a, b]");
    check_error("a: 1\n---\nb: 2\n", "a second document in one file", "---");
    check_error(
        "k: 9223372036854775808\n",
        "the integer 9223372036854775808 does not fit into 64 bits",
        "9223372036854775808",
    );
    check_error("k: !thing x\n", "the tag `!thing` is not understood here", "!thing x");
    check_error("ä: 1\nk: \0\n", "a NUL character is not allowed in YAML", "\0");
    let (node, diagnostics) = parse(0, "é: [1, 2\nb: 3\n");
    assert!(node.is_none());
    assert!(diagnostics[0].message.starts_with("not valid YAML: "), "{diagnostics:?}");
}

#[test]
fn everything_is_bounded() {
    let deep = "[".repeat(DEPTH_MAX + 1);
    check_error(&deep, "nested more than 64 levels deep", "[");
    let blocks = "- ".repeat(1_000_000);
    assert_eq!(parse(0, &blocks).1.len(), 1);
    let large = " ".repeat(FILE_BYTES_MAX + 1);
    assert_eq!(parse(0, &large).1.len(), 1);

    let mut laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_string();
    for i in 1..12 {
        laughs += &format!("a{i}: &a{i} [{}]\n", vec![format!("*a{}", i - 1); 9].join(", "));
    }
    let (_, diagnostics) = parse(0, &laughs);
    assert_eq!(diagnostics[0].message, "more than 200000 values in one file, counting what aliases repeat");
    assert_eq!(parse(0, "a: &a [*a]").1[0].message, "this alias names an anchor that contains it");
}

#[test]
fn aliases_repeat_their_anchor() {
    let node = root("a: &x {k: [1, 2]}\nb: *x\n");
    assert_eq!(node.get("a"), node.get("b"));
}

#[test]
fn spans_count_bytes_whatever_the_text() {
    for newline in ["\n", "\r\n"] {
        let lines = [
            "\u{feff}# Ünïcödé 漢字 🛫",
            "näme: wörld # ← comment",
            "list:",
            "  - {ключ: \"знач\\u0065ние\", b: 'ü'}",
            "  - 漢字",
            "last: ende",
        ];
        let text = lines.join(newline);
        let node = root(&text);
        let at = |span: Span| &text[span.start as usize..span.end as usize];
        let Kind::Mapping(entries) = &node.kind else { panic!("the root is a mapping") };
        let keys: Vec<&str> = entries.iter().map(|(key, _)| at(key.span)).collect();
        assert_eq!(keys, ["näme", "list", "last"]);
        assert_eq!(at(entries[0].1.span), "wörld");
        let Kind::Sequence(items) = &entries[1].1.kind else { panic!("list is a list") };
        assert_eq!(at(items[0].span), "{ключ: \"знач\\u0065ние\", b: 'ü'}");
        assert_eq!(at(items[0].get("ключ").unwrap().span), "\"знач\\u0065ние\"");
        assert_eq!(at(items[1].span), "漢字");
        assert_eq!(at(entries[2].1.span), "ende");
    }
}

#[test]
fn nothing_is_placed_at_its_key() {
    let text = "entities:\n\n# a comment\nsources: []\n";
    let node = root(text);
    assert_eq!(node.get("entities").unwrap().span, Span { file: 0, start: 0, end: 8 });
    assert_eq!(root("").kind, Kind::Null);
    assert_eq!(root("# only a comment\n").kind, Kind::Null);
}

/// Every span is inside the text, at character boundaries, and inside its parent's.
fn check_spans(text: &str, node: &Node) {
    let slice = text.get(node.span.start as usize..node.span.end as usize);
    assert!(slice.is_some(), "{:?} is no part of {text:?}", node.span);
    match &node.kind {
        Kind::Sequence(items) => items.iter().for_each(|item| check_spans(text, item)),
        Kind::Mapping(entries) => {
            for (key, value) in entries {
                assert!(text.get(key.span.start as usize..key.span.end as usize).is_some());
                check_spans(text, value);
            }
        }
        _ => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_text_is_answered(text in "[-a-c0-9ä漢:{}\\[\\],&*!|>'\"%#?~ \t\r\n.\u{feff}\u{85}\u{2028}]{0,60}") {
        let (node, diagnostics) = parse(0, &text);
        prop_assert!(node.is_some() || !diagnostics.is_empty());
        if let Some(node) = node {
            check_spans(&text, &node);
        }
        for diagnostic in diagnostics {
            prop_assert!(text.get(diagnostic.span.start as usize..diagnostic.span.end as usize).is_some());
        }
    }

    #[test]
    fn a_plain_word_is_found_where_it_was_written(before in "[a-zé漢 ]{0,12}", word in "[a-zé漢]{1,8}") {
        prop_assume!(!matches!(word.as_str(), "null" | "true" | "false"));
        let text = format!("# {before}\nk{before}x: \"{before}\" # {before}\nkey: [{word}, 'é{word}']\n");
        let node = root(&text);
        let Some(Node { kind: Kind::Sequence(items), .. }) = node.get("key") else { panic!("key is a list") };
        prop_assert_eq!(&text[items[0].span.start as usize..items[0].span.end as usize], word.as_str());
    }
}
