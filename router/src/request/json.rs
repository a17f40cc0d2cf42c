//! JSON that stays text until somebody asks for a value with its type.
//!
//! A body is gone through once, from end to end; what is looked into afterwards is known to be well formed, so that finding
//! the end of a string in it is a search for its quote. Whatever that does not take for granted at once (malformed or deeply
//! nested text, keys with escapes, strings with halves of surrogates) is read once more by `serde_json`, which alone decides
//! about it and says what is wrong.

mod outline;
mod strict;

use std::borrow::Cow;

pub(super) use strict::TextError;

/// A value as it was written: well-formed JSON without white space around it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Raw<'a>(&'a str);

/// The fields of an object in their order, one that occurs twice twice.
pub(super) type Entries<'a> = Vec<(Cow<'a, str>, Raw<'a>)>;

impl<'a> Raw<'a> {
    /// Its text.
    pub(super) fn get(self) -> &'a str {
        self.0
    }

    /// What kind of value it is, for messages.
    pub(super) fn kind(self) -> &'static str {
        match self.0.as_bytes().first() {
            Some(b'"') => "a string",
            Some(b'[') => "an array",
            Some(b'{') => "an object",
            Some(b't' | b'f') => "a boolean",
            Some(b'n') => "null",
            _ => "a number",
        }
    }

    /// The fields of an object, at most `max`.
    ///
    /// # Errors
    /// When it is none, has more fields, or a key is no text.
    pub(super) fn entries(self, max: usize) -> Result<Entries<'a>, TextError> {
        outline::entries::<true>(self.0, max).map_or_else(|| strict::entries(self.0, max), Ok)
    }

    /// The elements of an array, at most `max`.
    ///
    /// # Errors
    /// When it is none, or has more of them.
    pub(super) fn items(self, max: usize) -> Result<Vec<Raw<'a>>, TextError> {
        outline::items(self.0, max).map_or_else(|| strict::items(self.0, max), Ok)
    }

    /// The text of a string.
    ///
    /// # Errors
    /// When it is none, or holds half of a surrogate pair.
    pub(super) fn string(self) -> Result<String, TextError> {
        outline::string(self.0).map_or_else(|| strict::string(self.0), Ok)
    }
}

/// The fields of the object that `text` is, at most `max`.
///
/// # Errors
/// When it is anything else, or not JSON.
pub(super) fn body(text: &str, max: usize) -> Result<Entries<'_>, TextError> {
    outline::entries::<false>(text, max).map_or_else(|| strict::entries(text, max), Ok)
}

#[cfg(test)]
mod tests;
