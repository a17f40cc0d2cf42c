//! A YAML document as a tree that knows where each of its parts stands.
//!
//! A deliberately small YAML: one document, no anchors or aliases, no tags, bounded size, depth and node count.
//! Nothing here recurses, so no document can exhaust the stack.

use saphyr_parser::{Event, Marker, Parser, ScalarStyle};

use crate::fault::{Fault, Position};

/// Larger documents are refused unread.
pub(crate) const MAX_DOCUMENT_BYTES: usize = 1 << 20;
/// The contract needs 6.
const MAX_DEPTH: usize = 16;
/// A fleet of a thousand pools has some 30,000.
const MAX_NODES: usize = 100_000;

/// A part of a document.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) at: Position,
    pub(crate) value: Value,
}

#[derive(Debug, Clone)]
pub(crate) enum Value {
    Null,
    Scalar { text: String, quoted: bool },
    List(Vec<Node>),
    Map(Vec<Entry>),
}

#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) key: String,
    pub(crate) at: Position,
    pub(crate) value: Node,
}

impl Node {
    /// What it is, for people.
    pub(crate) fn kind(&self) -> &'static str {
        match self.value {
            Value::Null => "empty",
            Value::Scalar { .. } => "a single value",
            Value::List(_) => "a list",
            Value::Map(_) => "a section with keys",
        }
    }
}

/// A list or map whose end was not seen yet.
enum Open {
    List(Position, Vec<Node>),
    Map(Position, Vec<Entry>, Option<(String, Position)>),
}

/// Parses a document into its tree; an empty one is [`Value::Null`].
pub(crate) fn parse(text: &str) -> Result<Node, Fault> {
    if text.len() > MAX_DOCUMENT_BYTES {
        let problem = format!("is {} bytes long; at most {MAX_DOCUMENT_BYTES} bytes are read", text.len());
        return Err(refused(
            None,
            problem,
            "split the fleet into several, or check that this is a fleet file",
        ));
    }
    if let Some(index) = text.find(|c: char| c.is_control() && !matches!(c, '\n' | '\r' | '\t')) {
        let before = &text[..index];
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().map_or(0, |last| last.chars().count()) + 1;
        let problem =
            format!("character {:?} cannot stand in YAML", text[index..].chars().next().unwrap_or(' '));
        return Err(refused(Some(Position { line, column }), problem, "remove it; is this a text file?"));
    }
    let mut open: Vec<Open> = Vec::new();
    let mut root: Option<Node> = None;
    let mut documents = 0;
    let mut nodes = 0;
    for event in Parser::new_from_str(text) {
        let (event, span) = event.map_err(|e| {
            let remedy = "correct the YAML here or just before; indentation and unclosed brackets are the usual causes";
            refused(Some(position(e.marker())), format!("is not YAML: {}", e.info()), remedy)
        })?;
        let at = position(&span.start);
        nodes += 1;
        if nodes > MAX_NODES {
            let problem = format!("has more than {MAX_NODES} values");
            return Err(refused(Some(at), problem, "split the fleet into several"));
        }
        let finished = match event {
            Event::DocumentStart(_) => {
                documents += 1;
                if documents > 1 {
                    let problem = "holds a second document".to_owned();
                    return Err(refused(
                        Some(at),
                        problem,
                        "keep one document per file: remove `---` and what follows",
                    ));
                }
                None
            }
            Event::Alias(_) => return Err(alias(at)),
            Event::Scalar(_, _, anchor, _)
            | Event::SequenceStart(anchor, _)
            | Event::MappingStart(anchor, _)
                if anchor != 0 =>
            {
                return Err(alias(at));
            }
            Event::Scalar(_, _, _, Some(_))
            | Event::SequenceStart(_, Some(_))
            | Event::MappingStart(_, Some(_)) => {
                return Err(refused(
                    Some(at),
                    "carries a YAML tag".to_owned(),
                    "remove the `!` and the word after it",
                ));
            }
            Event::Scalar(text, style, _, _) => Some(scalar(text.into_owned(), style, at)),
            Event::SequenceStart(..) => {
                open.push(Open::List(at, Vec::new()));
                None
            }
            Event::MappingStart(..) => {
                open.push(Open::Map(at, Vec::new(), None));
                None
            }
            Event::SequenceEnd | Event::MappingEnd => open.pop().map(|done| match done {
                Open::List(at, items) => Node { at, value: Value::List(items) },
                Open::Map(at, entries, _) => Node { at, value: Value::Map(entries) },
            }),
            Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentEnd => None,
        };
        if open.len() > MAX_DEPTH {
            let problem = format!("is nested more than {MAX_DEPTH} levels deep");
            return Err(refused(
                Some(at),
                problem,
                "a fleet file needs 6 levels; remove the extra brackets or indentation",
            ));
        }
        if let Some(node) = finished {
            place(node, &mut open, &mut root)?;
        }
    }
    Ok(root.unwrap_or(Node { at: Position { line: 1, column: 1 }, value: Value::Null }))
}

/// Puts a finished node into the list or map it belongs to.
fn place(node: Node, open: &mut [Open], root: &mut Option<Node>) -> Result<(), Fault> {
    match open.last_mut() {
        None => *root = Some(node),
        Some(Open::List(_, items)) => items.push(node),
        Some(Open::Map(_, entries, key)) => match key.take() {
            Some((key, at)) => entries.push(Entry { key, at, value: node }),
            None => match node.value {
                Value::Scalar { text, .. } => *key = Some((text, node.at)),
                Value::Null => *key = Some(("~".to_owned(), node.at)),
                Value::List(_) | Value::Map(_) => {
                    let problem = format!("has {} as a key", node.kind());
                    return Err(refused(Some(node.at), problem, "write `key: value` with a word as the key"));
                }
            },
        },
    }
    Ok(())
}

fn scalar(text: String, style: ScalarStyle, at: Position) -> Node {
    let quoted = style != ScalarStyle::Plain;
    let value = match text.as_str() {
        "" | "~" | "null" if !quoted => Value::Null,
        _ => Value::Scalar { text, quoted },
    };
    Node { at, value }
}

fn alias(at: Position) -> Fault {
    refused(Some(at), "uses a YAML anchor or alias".to_owned(), "write the value out where it is needed")
}

fn refused(at: Option<Position>, problem: String, remedy: &str) -> Fault {
    Fault { path: String::new(), at, problem, remedy: remedy.to_owned() }
}

fn position(marker: &Marker) -> Position {
    Position { line: marker.line(), column: marker.col() + 1 }
}
