//! What is wrong with a document, told so that it can be put right.

use std::borrow::Cow;
use std::fmt;
use std::path::Path;

/// Line and column of a document, both counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
}

/// One fault of a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Where in the document, such as `pools[1].kv.block_tokens`; empty for the document as a whole.
    pub path: String,
    /// Where in the text, if it is there at all.
    pub at: Option<Position>,
    /// What is wrong.
    pub problem: String,
    /// What to do about it.
    pub remedy: String,
}

/// Every fault of one document, in the order of the text; never empty.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Faults {
    source_name: String,
    list: Vec<Fault>,
}

/// `text` without what would move the cursor or colour of a terminal: faults quote what a file holds.
fn printable(text: &str) -> Cow<'_, str> {
    if !text.chars().any(char::is_control) {
        return Cow::Borrowed(text);
    }
    let escaped =
        text.chars().map(|c| if c.is_control() { c.escape_default().to_string() } else { c.into() });
    Cow::Owned(escaped.collect())
}

impl Faults {
    pub(crate) fn new(source_name: impl Into<String>, mut list: Vec<Fault>) -> Self {
        list.sort_by_key(|fault| (fault.at.is_none(), fault.at));
        Self { source_name: source_name.into(), list }
    }

    pub(crate) fn unreadable(path: &Path, problem: impl Into<String>) -> Self {
        let fault = Fault {
            path: String::new(),
            at: None,
            problem: problem.into(),
            remedy: "give the path of a readable fleet file".to_owned(),
        };
        Self::new(path.display().to_string(), vec![fault])
    }

    /// The faults.
    pub fn list(&self) -> &[Fault] {
        &self.list
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, fault) in self.list.iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            f.write_str(&self.source_name)?;
            if let Some(at) = fault.at {
                write!(f, ":{}:{}", at.line, at.column)?;
            }
            f.write_str(": ")?;
            if !fault.path.is_empty() {
                write!(f, "{}: ", printable(&fault.path))?;
            }
            writeln!(f, "{}", printable(&fault.problem))?;
            write!(f, "  remedy: {}", printable(&fault.remedy))?;
        }
        match self.list.len() {
            0 | 1 => Ok(()),
            count => write!(f, "\n{count} faults in {}", self.source_name),
        }
    }
}
