//! Text to tokens and back, without a tokenizer.
//!
//! Every four bytes of a text are one token, the rest of up to three bytes another: equal beginnings of texts are equal beginnings
//! of token sequences, and so share their KV blocks. A message is the tokens of its role and those of its content, a chat
//! its messages and the role of the answer: a chat that grows begins with what it was before.

use super::request::Message;

/// Bytes of text that are one token.
const TOKEN_BYTES: usize = 4;
/// Who speaks next.
const ANSWERER: &str = "assistant";

/// The tokens of a text.
pub(super) fn of_text(text: &str, vocab: u32) -> Vec<u32> {
    let mut tokens = Vec::with_capacity(text.len() / TOKEN_BYTES + 1);
    append(text, vocab, &mut tokens);
    tokens
}

/// The tokens of a chat, up to where the answer begins.
pub(super) fn of_messages(messages: &[Message<'_>], vocab: u32) -> Vec<u32> {
    let bytes: usize = messages.iter().map(Message::content_bytes).sum();
    let mut tokens = Vec::with_capacity(bytes / TOKEN_BYTES + 8 * (messages.len() + 1));
    for message in messages {
        append(&message.role, vocab, &mut tokens);
        message.texts().for_each(|text| append(text, vocab, &mut tokens));
    }
    append(ANSWERER, vocab, &mut tokens);
    tokens
}

fn append(text: &str, vocab: u32, tokens: &mut Vec<u32>) {
    let (whole, rest) = text.as_bytes().as_chunks::<TOKEN_BYTES>();
    tokens.extend(whole.iter().map(|bytes| token(*bytes, TOKEN_BYTES, vocab)));
    if !rest.is_empty() {
        let mut bytes = [0; TOKEN_BYTES];
        bytes[..rest.len()].copy_from_slice(rest);
        tokens.push(token(bytes, rest.len(), vocab));
    }
}

/// Any token of the vocabulary, by what the bytes are.
fn token(bytes: [u8; TOKEN_BYTES], len: usize, vocab: u32) -> u32 {
    let word = u64::from(u32::from_le_bytes(bytes)) | (len as u64) << 32;
    let mixed = word.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (((mixed >> 32) * u64::from(vocab)) >> 32) as u32
}

/// Appends the word of a token: a space and three letters, nothing that JSON escapes.
pub(super) fn word(token: u32, out: &mut Vec<u8>) {
    const LETTERS: u32 = 26;
    let letter = |n: u32| b'a' + (n % LETTERS) as u8;
    out.extend_from_slice(&[
        b' ',
        letter(token / (LETTERS * LETTERS)),
        letter(token / LETTERS),
        letter(token),
    ]);
}
