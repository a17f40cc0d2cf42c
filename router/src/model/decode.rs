//! Token ids to text, one token at a time, never broken UTF-8, never the whole text again.
//!
//! Two ways, both equal to decoding everything at the end:
//! - Byte-level vocabularies (GPT-2, Llama 3, Qwen): every token is a run of bytes, known from a table; an incremental
//!   UTF-8 decoder holds back an unfinished character and replaces what can no longer become one.
//! - Any other decoder: a window of the last few tokens is decoded with and without the new one and the difference is
//!   emitted (the prefix-offset method), because what a token looks like may depend on those before it.

use std::sync::Arc;

use tokenizers::{DecoderWrapper, Tokenizer};

use super::encode::Pieces;

/// Most tokens a window waits for a character to be complete: UTF-8 has at most four bytes a character.
const WINDOW_MAX_TOKENS: usize = 6;

/// Token ids to bytes or text.
#[derive(Debug)]
pub(crate) struct Vocabulary {
    tokenizer: Tokenizer,
    /// Bytes of every token, for byte-level decoders.
    table: Option<ByteTable>,
    pieces: Pieces,
}

/// The bytes of all tokens, back to back.
#[derive(Debug)]
struct ByteTable {
    bytes: Vec<u8>,
    /// Token `i` is `bytes[ends[i - 1]..ends[i]]`; special and unknown tokens are empty.
    ends: Vec<u32>,
}

impl ByteTable {
    fn new(tokenizer: &Tokenizer, ids: u32) -> Self {
        let special = tokenizer.get_added_vocabulary();
        let mut table = Self { bytes: Vec::new(), ends: Vec::with_capacity(ids as usize) };
        let byte_of = byte_level_bytes();
        for id in 0..ids {
            if let Some(token) = tokenizer.id_to_token(id).filter(|token| !special.is_special_token(token)) {
                let start = table.bytes.len();
                for c in token.chars() {
                    match byte_of.get(c as usize).copied().flatten() {
                        Some(byte) => table.bytes.push(byte),
                        None => {
                            // Not written in the byte alphabet: an added token, taken literally as a whole.
                            table.bytes.truncate(start);
                            table.bytes.extend_from_slice(token.as_bytes());
                            break;
                        }
                    }
                }
            }
            table.ends.push(u32::try_from(table.bytes.len()).unwrap_or(u32::MAX));
        }
        table.bytes.shrink_to_fit();
        table
    }

    fn get(&self, id: u32) -> &[u8] {
        let at = id as usize;
        let Some(end) = self.ends.get(at) else { return &[] };
        let start = if at == 0 { 0 } else { self.ends[at - 1] };
        &self.bytes[start as usize..*end as usize]
    }
}

/// The byte that each character of the byte-level alphabet stands for, indexed by code point.
///
/// Printable Latin-1 bytes stand for themselves, the other bytes follow from U+0100 on in order (GPT-2).
fn byte_level_bytes() -> Vec<Option<u8>> {
    let mut byte_of = vec![None; 0x180];
    let mut next = 0x100;
    for byte in 0..=u8::MAX {
        let printable = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let at = if printable { usize::from(byte) } else { next };
        if !printable {
            next += 1;
        }
        byte_of[at] = Some(byte);
    }
    byte_of
}

fn is_byte_level(decoder: Option<&DecoderWrapper>) -> bool {
    match decoder {
        Some(DecoderWrapper::ByteLevel(_)) => true,
        Some(DecoderWrapper::Sequence(sequence)) => {
            matches!(sequence.get_decoders(), [DecoderWrapper::ByteLevel(_)])
        }
        _ => false,
    }
}

impl Vocabulary {
    /// Prepares the tables of a tokenizer.
    pub(crate) fn new(mut tokenizer: Tokenizer) -> Self {
        // Truncation and padding are for training: a prompt must arrive whole.
        tokenizer.with_padding(None);
        let _ = tokenizer.with_truncation(None);
        let ids = largest_id(&tokenizer).map_or(0, |id| id.saturating_add(1));
        let table = is_byte_level(tokenizer.get_decoder()).then(|| ByteTable::new(&tokenizer, ids));
        let pieces = Pieces::of(&tokenizer);
        Self { tokenizer, table, pieces }
    }

    /// The number of ids, gaps included.
    pub(crate) fn len(&self) -> u32 {
        self.largest_id().map_or(0, |id| id + 1)
    }

    /// The largest id.
    pub(crate) fn largest_id(&self) -> Option<u32> {
        match &self.table {
            Some(table) => u32::try_from(table.ends.len()).ok()?.checked_sub(1),
            None => largest_id(&self.tokenizer),
        }
    }

    /// The id of a token given by its text.
    pub(crate) fn id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// The tokens of `text`, with the special tokens the tokenizer adds by itself if asked for. That a text was seen before
    /// is felt under the same `salt` only.
    pub(crate) fn encode(&self, text: &str, add_special: bool, salt: u64) -> Result<Vec<u32>, String> {
        self.pieces.encode(&self.tokenizer, text, add_special, salt)
    }

    /// The same without cutting and without looking anything up: the tokenizer's own work.
    pub(crate) fn encode_whole(&self, text: &str) -> Result<Vec<u32>, String> {
        super::encode::whole(&self.tokenizer, text, false)
    }

    /// The text of `ids` at once, special tokens left out.
    pub(crate) fn decode(&self, ids: &[u32]) -> String {
        if let Some(table) = &self.table {
            let bytes: Vec<u8> = ids.iter().flat_map(|id| table.get(*id)).copied().collect();
            return String::from_utf8_lossy(&bytes).into_owned();
        }
        self.window(ids)
    }

    /// The text of `ids` at once, special tokens by their names: what gives these ids again when it is tokenized.
    pub(crate) fn spell(&self, ids: &[u32]) -> Result<String, String> {
        self.tokenizer.decode(ids, false).map_err(|error| error.to_string())
    }

    /// A token as the vocabulary writes it; empty where the model has an id that the tokenizer does not know.
    pub(crate) fn name(&self, id: u32) -> String {
        self.tokenizer.id_to_token(id).unwrap_or_default()
    }

    /// The bytes of one token by itself, special tokens by their name: what log-probabilities show.
    pub(crate) fn token_bytes(&self, id: u32) -> Vec<u8> {
        let plain = match &self.table {
            Some(table) => table.get(id).to_vec(),
            None => self.window(&[id]).into_bytes(),
        };
        if plain.is_empty() {
            return self.tokenizer.id_to_token(id).unwrap_or_default().into_bytes();
        }
        plain
    }

    /// Whether a token is left out of every text.
    fn is_silent(&self, id: u32) -> bool {
        let token = self.tokenizer.id_to_token(id);
        token.is_none_or(|token| self.tokenizer.get_added_vocabulary().is_special_token(&token))
    }

    fn window(&self, ids: &[u32]) -> String {
        self.tokenizer.decode(ids, true).unwrap_or_else(|error| {
            tracing::warn!(%error, tokens = ids.len(), "tokens could not be decoded");
            String::new()
        })
    }
}

fn largest_id(tokenizer: &Tokenizer) -> Option<u32> {
    tokenizer.get_vocab(true).into_values().max()
}

/// Decodes one stream of tokens.
#[derive(Debug)]
pub(crate) struct Decoder {
    vocabulary: Arc<Vocabulary>,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Bytes of a character that is not complete.
    Bytes(Vec<u8>),
    /// Tokens from `start` on; those before `read` are emitted.
    Window { ids: Vec<u32>, read: usize },
}

impl Decoder {
    /// A decoder at the start of an answer.
    pub(crate) fn new(vocabulary: Arc<Vocabulary>) -> Self {
        let state = match vocabulary.table {
            Some(_) => State::Bytes(Vec::with_capacity(4)),
            None => State::Window { ids: Vec::new(), read: 0 },
        };
        Self { vocabulary, state }
    }

    /// Appends to `out` the text that `token` completes.
    pub(crate) fn push(&mut self, token: u32, out: &mut String) {
        match &mut self.state {
            State::Bytes(pending) => {
                let bytes = self.vocabulary.table.as_ref().map_or(&[][..], |table| table.get(token));
                push_utf8(pending, bytes, out);
            }
            State::Window { ids, read } => {
                // A model that is not let end may say nothing else: the window must not grow with it.
                if self.vocabulary.is_silent(token) {
                    return;
                }
                ids.push(token);
                let before = self.vocabulary.window(&ids[..*read]);
                let after = self.vocabulary.window(ids);
                let unfinished = after.ends_with('\u{FFFD}') && ids.len() - *read < WINDOW_MAX_TOKENS;
                if unfinished || after.len() <= before.len() {
                    return;
                }
                out.push_str(difference(&before, &after));
                ids.drain(..*read);
                *read = ids.len();
            }
        }
    }

    /// Appends what was held back; the stream has ended.
    pub(crate) fn finish(&mut self, out: &mut String) {
        match &mut self.state {
            State::Bytes(pending) => {
                out.push_str(&String::from_utf8_lossy(pending));
                pending.clear();
            }
            State::Window { ids, read } => {
                let before = self.vocabulary.window(&ids[..*read]);
                let after = self.vocabulary.window(ids);
                out.push_str(difference(&before, &after));
                ids.clear();
                *read = 0;
            }
        }
    }
}

/// What `after` has beyond `before`, from a character border.
fn difference<'a>(before: &str, after: &'a str) -> &'a str {
    let mut at = before.len().min(after.len());
    while !after.is_char_boundary(at) {
        at -= 1;
    }
    &after[at..]
}

/// Decodes `bytes` after `pending`, keeping an unfinished character in `pending`.
///
/// Equal, over a whole stream, to [`String::from_utf8_lossy`] of all bytes.
fn push_utf8(pending: &mut Vec<u8>, bytes: &[u8], out: &mut String) {
    if pending.is_empty()
        && let Ok(text) = std::str::from_utf8(bytes)
    {
        out.push_str(text);
        return;
    }
    pending.extend_from_slice(bytes);
    let mut done = 0;
    loop {
        match std::str::from_utf8(&pending[done..]) {
            Ok(text) => {
                out.push_str(text);
                done = pending.len();
                break;
            }
            Err(error) => {
                let valid = done + error.valid_up_to();
                out.push_str(&String::from_utf8_lossy(&pending[done..valid]));
                done = valid;
                let Some(bad) = error.error_len() else { break };
                out.push('\u{FFFD}');
                done += bad;
            }
        }
    }
    pending.drain(..done);
}

#[cfg(test)]
mod tests;
