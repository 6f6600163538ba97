//! Text to document tree, with the place of every node.
//!
//! The dialect is YAML 1.2 with the core schema: `NO`, `on` and `9E` are strings, `1e3` is a float, `~` and nothing are
//! null. One document per file. Keys are strings and unique. The input is anybody's, so everything is bounded: the size
//! of a file, the depth, and the number of nodes, those that aliases repeat included (no billion laughs).
//!
//! The parser underneath counts characters; [`Span`]s count bytes. The conversion is made here and nowhere else.

use std::collections::HashMap;

use saphyr_parser::{Event, Parser, ScalarStyle, Tag};

use crate::diagnose::{Diagnostic, Span, Spanned, shown};

/// A definition file is written by hand; a larger one is data in the wrong place.
pub const FILE_BYTES_MAX: usize = 4 << 20;
/// The deepest construct has about ten levels. Later passes recurse, so this also bounds their stack.
pub const DEPTH_MAX: usize = 64;
/// Nodes per file, counting again what an alias repeats.
pub const NODES_MAX: usize = 200_000;

#[derive(Debug, Clone)]
pub struct Node {
    pub span: Span,
    pub kind: Kind,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Kind {
    Null,
    Bool(bool),
    Int(i64),
    Float(f64),
    String(String),
    Sequence(Vec<Node>),
    /// In the order written; keys are unique.
    Mapping(Vec<(Spanned<String>, Node)>),
}

impl PartialEq for Node {
    fn eq(&self, other: &Node) -> bool {
        self.kind == other.kind
    }
}

impl Node {
    /// "the integer 60", for messages that say what was found.
    pub fn describe(&self) -> String {
        match &self.kind {
            Kind::Null => "nothing".to_string(),
            Kind::Bool(x) => format!("the boolean {x}"),
            Kind::Int(x) => format!("the integer {x}"),
            Kind::Float(x) => format!("the number {x}"),
            Kind::String(x) => format!("the string `{}`", shown(x)),
            Kind::Sequence(_) => "a list".to_string(),
            Kind::Mapping(_) => "a mapping".to_string(),
        }
    }

    pub fn get(&self, key: &str) -> Option<&Node> {
        match &self.kind {
            Kind::Mapping(entries) => entries.iter().find(|(name, _)| **name == key).map(|(_, node)| node),
            _ => None,
        }
    }
}

/// Reads one file. `file` is its index, for the spans. The node is what could be understood; it is absent only when the
/// text is not YAML at all. A file with nothing in it is a null.
pub fn parse(file: u32, text: &str) -> (Option<Node>, Vec<Diagnostic>) {
    let start = Span { file, start: 0, end: 0 };
    if text.len() > FILE_BYTES_MAX {
        let message = format!("this file has {} bytes; at most {FILE_BYTES_MAX} are read", text.len());
        return (None, vec![Diagnostic::error(message, start).help("split the definitions into several files")]);
    }
    if let Some(nul) = text.find('\0') {
        // The scanner would take it for the end of the text and silently drop the rest.
        let span = Span { file, start: nul as u32, end: nul as u32 + 1 };
        return (None, vec![Diagnostic::error("a NUL character is not allowed in YAML", span)]);
    }
    let offsets = Offsets::new(file, text);
    let mut builder = Builder {
        text,
        offsets,
        frames: Vec::new(),
        anchors: HashMap::new(),
        root: None,
        nodes: 0,
        diagnostics: Vec::new(),
    };
    let ended = builder.run();
    let root = match ended {
        Ok(()) => Some(builder.root.take().unwrap_or(Node { span: start, kind: Kind::Null })),
        Err(diagnostic) => {
            builder.diagnostics.push(diagnostic);
            None
        }
    };
    (root, builder.diagnostics)
}

/// Character index to byte offset.
struct Offsets {
    file: u32,
    bytes: u32,
    /// Empty for ASCII, where both are the same.
    of_char: Vec<u32>,
}

impl Offsets {
    fn new(file: u32, text: &str) -> Offsets {
        let of_char =
            if text.is_ascii() { Vec::new() } else { text.char_indices().map(|(offset, _)| offset as u32).collect() };
        Offsets { file, bytes: text.len() as u32, of_char }
    }

    fn byte(&self, index: usize) -> u32 {
        if self.of_char.is_empty() {
            (index as u32).min(self.bytes)
        } else {
            self.of_char.get(index).copied().unwrap_or(self.bytes)
        }
    }

    fn span(&self, span: saphyr_parser::Span) -> Span {
        let start = self.byte(span.start.index());
        Span { file: self.file, start, end: self.byte(span.end.index()).max(start) }
    }
}

/// A collection whose end has not been seen.
struct Frame {
    anchor: usize,
    span: Span,
    content: Content,
}

enum Content {
    Sequence(Vec<Node>),
    Mapping { entries: Vec<(Spanned<String>, Node)>, seen: HashMap<String, Span>, key: Key },
}

enum Key {
    /// The next node is a key.
    Awaited,
    Read(Spanned<String>),
    /// The key was reported; its value is read and dropped.
    Refused,
}

struct Builder<'a> {
    text: &'a str,
    offsets: Offsets,
    frames: Vec<Frame>,
    /// Only finished nodes, so that an alias can never contain itself.
    anchors: HashMap<usize, (Node, usize)>,
    root: Option<Node>,
    nodes: usize,
    diagnostics: Vec<Diagnostic>,
}

impl Builder<'_> {
    /// The parser is a state machine over its own stack, and so is this: depth costs no call stack.
    fn run(&mut self) -> Result<(), Diagnostic> {
        let mut parser = Parser::new_from_str(self.text);
        let mut documents = 0;
        while let Some(event) = parser.next_event() {
            let (event, span) = event.map_err(|error| {
                let start = self.offsets.byte(error.marker().index());
                let next = self.text[start as usize..].chars().next().map_or(0, char::len_utf8) as u32;
                let span = Span { file: self.offsets.file, start, end: start + next };
                let help = error.info().contains("tab").then(|| "indent with spaces".to_string());
                Diagnostic { help, ..Diagnostic::error(format!("not valid YAML: {}", shown(error.info())), span) }
            })?;
            let span = self.offsets.span(span);
            match event {
                Event::DocumentStart(_) => {
                    documents += 1;
                    if documents > 1 {
                        return Err(Diagnostic::error("a second document in one file", span)
                            .help("remove `---`, or move what follows into its own file"));
                    }
                }
                Event::Scalar(text, style, anchor, tag) => {
                    self.count(1, span)?;
                    let kind = self.resolve(&text, style, tag.as_deref(), span);
                    self.place(Node { span: self.trimmed(span), kind }, anchor)?;
                }
                Event::SequenceStart(anchor, tag) => {
                    self.open(Content::Sequence(Vec::new()), anchor, tag.as_deref(), span)?;
                }
                Event::MappingStart(anchor, tag) => {
                    let content = Content::Mapping { entries: Vec::new(), seen: HashMap::new(), key: Key::Awaited };
                    self.open(content, anchor, tag.as_deref(), span)?;
                }
                Event::SequenceEnd | Event::MappingEnd => {
                    if let Some(frame) = self.frames.pop() {
                        let (last, kind) = match frame.content {
                            Content::Sequence(items) => (items.last().map(|item| item.span.end), Kind::Sequence(items)),
                            Content::Mapping { entries, .. } => (
                                entries.last().map(|(key, node)| node.span.end.max(key.span.end)),
                                Kind::Mapping(entries),
                            ),
                        };
                        // The end of a block collection is noticed only at what follows it, lines later.
                        let closed = span.end > span.start;
                        let end = if closed { span.end } else { last.unwrap_or(frame.span.end) };
                        let span = Span { end: end.max(frame.span.end), ..frame.span };
                        self.place(Node { span, kind }, frame.anchor)?;
                    }
                }
                Event::Alias(anchor) => {
                    let Some((node, size)) = self.anchors.get(&anchor).cloned() else {
                        return Err(Diagnostic::error("this alias names an anchor that contains it", span));
                    };
                    self.count(size, span)?;
                    self.place(node, 0)?;
                }
                Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentEnd => {}
            }
        }
        Ok(())
    }

    fn count(&mut self, nodes: usize, span: Span) -> Result<(), Diagnostic> {
        self.nodes = self.nodes.saturating_add(nodes);
        if self.nodes <= NODES_MAX {
            return Ok(());
        }
        Err(Diagnostic::error(format!("more than {NODES_MAX} values in one file, counting what aliases repeat"), span)
            .help("split the definitions into several files"))
    }

    fn open(&mut self, content: Content, anchor: usize, tag: Option<&Tag>, span: Span) -> Result<(), Diagnostic> {
        self.count(1, span)?;
        if self.frames.len() >= DEPTH_MAX {
            return Err(Diagnostic::error(format!("nested more than {DEPTH_MAX} levels deep"), span));
        }
        let allowed = match content {
            Content::Sequence(_) => "seq",
            Content::Mapping { .. } => "map",
        };
        if let Some(tag) = tag.filter(|tag| !(tag.is_yaml_core_schema() && tag.suffix == allowed)) {
            self.diagnostics.push(unknown_tag(tag, span));
        }
        self.frames.push(Frame { anchor, span, content });
        Ok(())
    }

    /// Puts a finished node where it belongs: into the open collection, or at the root.
    fn place(&mut self, node: Node, anchor: usize) -> Result<(), Diagnostic> {
        if anchor != 0 {
            // The copy is counted like any other node, so that nested anchors cannot multiply memory either.
            let size = size(&node);
            self.count(size, node.span)?;
            self.anchors.insert(anchor, (node.clone(), size));
        }
        match self.frames.last_mut().map(|frame| &mut frame.content) {
            None => self.root = Some(node),
            Some(Content::Sequence(items)) => items.push(node),
            Some(Content::Mapping { entries, seen, key }) => match std::mem::replace(key, Key::Awaited) {
                Key::Awaited => {
                    *key = match node.kind {
                        Kind::String(name) => match seen.get(&name) {
                            Some(first) => {
                                let message = format!("the key `{}` is given twice", shown(&name));
                                let diagnostic = Diagnostic::error(message, node.span);
                                self.diagnostics.push(diagnostic.related("the first is here", *first));
                                Key::Refused
                            }
                            None => {
                                seen.insert(name.clone(), node.span);
                                Key::Read(Spanned::new(name, node.span))
                            }
                        },
                        _ => {
                            let written = &self.text[node.span.start as usize..node.span.end as usize];
                            let diagnostic = Diagnostic::error(
                                format!("a key must be a string, not {}", node.describe()),
                                node.span,
                            );
                            let scalar = !matches!(node.kind, Kind::Sequence(_) | Kind::Mapping(_) | Kind::Null);
                            let help = scalar.then(|| format!("quote it: \"{}\"", shown(written)));
                            self.diagnostics.push(Diagnostic { help, ..diagnostic });
                            Key::Refused
                        }
                    }
                }
                Key::Read(name) => {
                    // Nothing has no place of its own: it is missing behind its key.
                    let nothing = node.kind == Kind::Null && node.span.start == node.span.end;
                    let span = if nothing { name.span } else { node.span };
                    entries.push((name, Node { span, ..node }));
                }
                Key::Refused => {}
            },
        }
        Ok(())
    }

    fn trimmed(&self, span: Span) -> Span {
        let text = &self.text[span.start as usize..span.end as usize];
        Span { end: span.start + text.trim_end().len() as u32, ..span }
    }

    fn resolve(&mut self, text: &str, style: ScalarStyle, tag: Option<&Tag>, span: Span) -> Kind {
        if style != ScalarStyle::Plain {
            if let Some(tag) = tag.filter(|tag| !(tag.is_yaml_core_schema() && tag.suffix == "str")) {
                self.diagnostics.push(unknown_tag(tag, span));
            }
            return Kind::String(text.to_string());
        }
        if tag.is_some_and(|tag| tag.is_yaml_core_schema() && tag.suffix == "str") {
            return Kind::String(text.to_string());
        }
        let kind = resolve_plain(text).unwrap_or_else(|| {
            let message = format!("the integer {} does not fit into 64 bits", shown(text));
            self.diagnostics.push(Diagnostic::error(message, self.trimmed(span)).help("quote it if it is a name"));
            Kind::String(text.to_string())
        });
        if let Some(tag) = tag {
            let wanted = if tag.is_yaml_core_schema() { tag.suffix.as_str() } else { "" };
            let fits = match &kind {
                Kind::Null => wanted == "null",
                Kind::Bool(_) => wanted == "bool",
                Kind::Int(_) => matches!(wanted, "int" | "float"),
                Kind::Float(_) => wanted == "float",
                _ => false,
            };
            if !fits {
                self.diagnostics.push(unknown_tag(tag, span));
            }
            if let (Kind::Int(x), "float") = (&kind, wanted) {
                return Kind::Float(*x as f64);
            }
        }
        kind
    }
}

fn unknown_tag(tag: &Tag, span: Span) -> Diagnostic {
    Diagnostic::error(format!("the tag `{}` is not understood here", shown(&tag.to_string())), span)
        .help("leave the tag out")
}

fn size(node: &Node) -> usize {
    match &node.kind {
        Kind::Sequence(items) => 1 + items.iter().map(size).sum::<usize>(),
        Kind::Mapping(entries) => 1 + entries.iter().map(|(_, node)| 1 + size(node)).sum::<usize>(),
        _ => 1,
    }
}

/// The core schema of YAML 1.2. None for an integer out of range.
pub fn resolve_plain(text: &str) -> Option<Kind> {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Some(Kind::Null),
        "true" | "True" | "TRUE" => return Some(Kind::Bool(true)),
        "false" | "False" | "FALSE" => return Some(Kind::Bool(false)),
        ".nan" | ".NaN" | ".NAN" => return Some(Kind::Float(f64::NAN)),
        _ => {}
    }
    for (prefix, radix) in [("0o", 8), ("0x", 16)] {
        if let Some(digits) = text.strip_prefix(prefix)
            && !digits.is_empty()
            && digits.chars().all(|c| c.is_digit(radix))
        {
            return i64::from_str_radix(digits, radix).ok().map(Kind::Int);
        }
    }
    let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
    if matches!(unsigned, ".inf" | ".Inf" | ".INF") {
        return Some(Kind::Float(if text.starts_with('-') { f64::NEG_INFINITY } else { f64::INFINITY }));
    }
    if !unsigned.is_empty() && unsigned.bytes().all(|b| b.is_ascii_digit()) {
        return text.parse().ok().map(Kind::Int);
    }
    if is_core_float(unsigned)
        && let Ok(x) = text.parse()
    {
        return Some(Kind::Float(x));
    }
    Some(Kind::String(text.to_string()))
}

/// `( \. [0-9]+ | [0-9]+ ( \. [0-9]* )? ) ( [eE] [-+]? [0-9]+ )?`
fn is_core_float(text: &str) -> bool {
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    let (mantissa, exponent) = match text.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, Some(exponent.strip_prefix(['+', '-']).unwrap_or(exponent))),
        None => (text, None),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    digits(whole)
        && digits(fraction)
        && !(whole.is_empty() && fraction.is_empty())
        && exponent.is_none_or(|exponent| !exponent.is_empty() && digits(exponent))
}

#[cfg(test)]
mod tests;
