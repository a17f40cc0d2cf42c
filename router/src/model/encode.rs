//! Text to token ids, a piece at a time, each piece tokenized once.
//!
//! A conversation comes back with every turn, a little longer. It is cut where the tokenizer itself cuts or provably does
//! not look across, so that the ids of the whole are those of the pieces, one after the other; pieces that were seen before
//! cost a look into a table.
//!
//! - At *marks*, added tokens that are cut out of the raw text before anything else happens to it (`normalized: false`).
//!   A piece begins with its mark, so that what is true of text at the very beginning only (`prepend_scheme: first`) is not
//!   true of it. Added tokens that swallow spaces to their left, ask for word boundaries, or could be overlapped from the
//!   left by another added token are no marks.
//! - Within plain text before ` x` after `x`, where both are ASCII letters, for pre-tokenizers whose expressions are known to
//!   end a match there, whatever comes before and after ([`WORD_PATTERNS`]).
//!
//! Where none of this holds, or the tokenizer is not deterministic, nothing is cut and nothing is kept.

mod cache;
mod words;

use tokenizers::pre_tokenizers::split::SplitPattern;
use tokenizers::tokenizer::SplitDelimiterBehavior;
use tokenizers::{
    AddedToken, ModelWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, Tokenizer,
};

use cache::Cache;
use words::Words;

use crate::search::before;

/// Bytes of pieces and their tokens that are kept.
const CACHE_BYTES: usize = 16 << 20;
/// A plain text is cut at the first place after so many bytes: short enough that texts share pieces, long enough that
/// looking one up is nothing beside tokenizing it.
const CHUNK_BYTES: usize = 256;

/// Bytes that are searched together for the end of a piece.
const STRETCH_BYTES: usize = 1024;
/// Of longer texts, common words are kept at hand.
const LONG_BYTES: usize = 4 << 10;

/// Longer words are not worth keeping by themselves.
const WORD_BYTES: usize = 32;

/// Expressions in which letters, within a match, are followed by nothing but letters. All of a text is matched by them.
const WORD_PATTERNS: [&str; 2] = [
    // Llama 3, and GPT-4 without possessive quantifiers.
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    // Qwen 2 and later.
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
];

/// Texts that a piece begins with.
#[derive(Debug)]
struct Marks {
    /// By their first byte.
    all: Vec<Vec<String>>,
    /// The first bytes there are.
    first: Vec<u8>,
}

impl Marks {
    fn new<'a>(marks: impl Iterator<Item = &'a str>) -> Self {
        let mut all = vec![Vec::new(); 256];
        for mark in marks {
            all[usize::from(mark.as_bytes()[0])].push(mark.to_owned());
        }
        let first = (0..=u8::MAX).filter(|byte| !all[usize::from(*byte)].is_empty()).collect();
        Self { all, first }
    }

    /// The first place of `from..to` where one begins.
    fn find(&self, bytes: &[u8], mut from: usize, to: usize) -> Option<usize> {
        loop {
            let stretch = bytes.get(from..to)?;
            let at = from
                + match *self.first.as_slice() {
                    [] => return None,
                    [one] => before(stretch, |byte| u8::from(byte == one)),
                    [one, two] => before(stretch, |byte| u8::from(byte == one) | u8::from(byte == two)),
                    _ => before(stretch, |byte| u8::from(!self.all[usize::from(byte)].is_empty())),
                };
            if at == to {
                return None;
            }
            let begins = |mark: &String| bytes[at..].starts_with(mark.as_bytes());
            if self.all[usize::from(bytes[at])].iter().any(begins) {
                return Some(at);
            }
            from = at + 1;
        }
    }
}

/// How the texts of one tokenizer are cut, and the pieces that were seen.
#[derive(Debug)]
pub(super) struct Pieces {
    marks: Marks,
    /// Whether plain text is cut between words.
    words: bool,
    /// What the tokenizer puts around a text by itself; `None` where that is not just put around.
    around: Option<(Vec<u32>, Vec<u32>)>,
    /// Absent where nothing can be kept.
    cache: Option<Cache>,
}

impl Pieces {
    /// Finds out where texts may be cut.
    pub(super) fn of(tokenizer: &Tokenizer) -> Self {
        let mut added: Vec<&AddedToken> =
            tokenizer.get_added_vocabulary().get_added_tokens_decoder().values().collect();
        added.retain(|token| !token.content.is_empty());
        let steady = is_deterministic(tokenizer.get_model())
            && !tokenizer.get_added_vocabulary().get_encode_special_tokens();
        let raw: Vec<&AddedToken> = added.iter().copied().filter(|token| !token.normalized).collect();
        let marks =
            Marks::new(raw.iter().filter(|token| is_mark(token, &raw)).map(|mark| mark.content.as_str()));
        let words = splits_words(tokenizer.get_pre_tokenizer())
            && keeps_words(tokenizer.get_normalizer())
            && added.iter().all(|token| leaves_words_alone(token));
        Self { marks, words, around: around(tokenizer), cache: steady.then(|| Cache::new(CACHE_BYTES)) }
    }

    /// The ids of a text; pieces of texts of another `salt` are not found.
    pub(super) fn encode(
        &self,
        tokenizer: &Tokenizer,
        text: &str,
        add_special: bool,
        salt: u64,
    ) -> Result<Vec<u32>, String> {
        let around = match (&self.around, add_special) {
            (_, false) => Some((&[][..], &[][..])),
            (Some((before, after)), true) => Some((&before[..], &after[..])),
            (None, true) => None,
        };
        let (Some(cache), Some((before, after))) = (&self.cache, around) else {
            return whole(tokenizer, text, add_special);
        };
        let mut ids = Vec::with_capacity(text.len() / 3 + before.len() + after.len());
        ids.extend_from_slice(before);
        let mut words = (text.len() > LONG_BYTES).then(Words::new);
        for piece in self.cut(text) {
            if cache.append(salt, piece, &mut ids) {
                continue;
            }
            let start = ids.len();
            self.encode_words(tokenizer, cache, words.as_mut(), (piece, salt), &mut ids)?;
            cache.put(salt, piece, &ids[start..]);
        }
        ids.extend_from_slice(after);
        Ok(ids)
    }

    /// Appends the ids of a piece that was not seen before: most of its words were, where it may be cut between them.
    fn encode_words(
        &self,
        tokenizer: &Tokenizer,
        cache: &Cache,
        mut words: Option<&mut Words>,
        (piece, salt): (&str, u64),
        ids: &mut Vec<u32>,
    ) -> Result<(), String> {
        let mut rest = piece;
        while !rest.is_empty() {
            let (word, after) = rest.split_at(self.word_cut(rest.as_bytes(), 1, rest.len()));
            rest = after;
            // The piece itself is kept by its caller.
            if word.len() > WORD_BYTES || word.len() == piece.len() {
                ids.extend_from_slice(&whole(tokenizer, word, false)?);
                continue;
            }
            if words.as_ref().is_some_and(|words| words.append(word, ids)) {
                continue;
            }
            let start = ids.len();
            if !cache.append(salt, word, ids) {
                ids.extend_from_slice(&whole(tokenizer, word, false)?);
                cache.put(salt, word, &ids[start..]);
            }
            if let Some(words) = &mut words {
                words.put(word, &ids[start..]);
            }
        }
        Ok(())
    }

    /// The pieces of a text, none of them empty.
    fn cut<'a>(&'a self, text: &'a str) -> impl Iterator<Item = &'a str> {
        let mut rest = text;
        std::iter::from_fn(move || {
            let (piece, after) = rest.split_at_checked(self.next_cut(rest)?)?;
            rest = after;
            Some(piece)
        })
    }

    /// Where the first piece of a text ends.
    fn next_cut(&self, text: &str) -> Option<usize> {
        let bytes = text.as_bytes();
        if bytes.is_empty() {
            return None;
        }
        // Up to where words are looked for, and then a stretch at a time: little is looked at again for the next piece.
        let (mut from, mut to) = (1, bytes.len().min(CHUNK_BYTES + 1));
        loop {
            let word = self.word_cut(bytes, from.max(CHUNK_BYTES + 1), to);
            if let Some(mark) = self.marks.find(bytes, from, word) {
                return Some(mark);
            }
            // The end of a stretch is a place between words only if it is found to be one.
            if word < to || to == bytes.len() {
                return Some(word);
            }
            from = to;
            to = bytes.len().min(from + STRETCH_BYTES);
        }
    }

    /// The first place of `from..to` where a word ends; else `to`.
    fn word_cut(&self, bytes: &[u8], from: usize, to: usize) -> usize {
        let mut places = from..to;
        let found = if self.words { places.find(|at| parts_words(bytes, *at)) } else { None };
        found.unwrap_or(to)
    }
}

/// Whether a text may be cut before its byte `at` because a word ends there.
fn parts_words(bytes: &[u8], at: usize) -> bool {
    bytes[at] == b' '
        && bytes[at - 1].is_ascii_alphabetic()
        && bytes.get(at + 1).is_some_and(u8::is_ascii_alphabetic)
}

/// The ids of a text, as the tokenizer gives them.
pub(super) fn whole(tokenizer: &Tokenizer, text: &str, add_special: bool) -> Result<Vec<u32>, String> {
    let encoding = tokenizer.encode_fast(text, add_special).map_err(|error| error.to_string())?;
    Ok(encoding.get_ids().to_vec())
}

fn is_deterministic(model: &ModelWrapper) -> bool {
    match model {
        ModelWrapper::BPE(bpe) => bpe.dropout.is_none(),
        ModelWrapper::WordPiece(_) | ModelWrapper::WordLevel(_) | ModelWrapper::Unigram(_) => true,
    }
}

/// Whether a raw added token, wherever it occurs, begins a match of the tokenizer's own search.
fn is_mark(token: &AddedToken, raw: &[&AddedToken]) -> bool {
    let plain = !token.single_word && !token.lstrip && !token.normalized;
    // Others look at what is next to them: at words, at spaces.
    let first = token.content.chars().next();
    let aloof = first.is_some_and(|c| !c.is_whitespace() && !c.is_alphanumeric() && c != '_');
    plain && aloof && !raw.iter().any(|other| reaches_into(&other.content, &token.content))
}

/// Whether an occurrence of `other` can begin before one of `token` and end after its beginning.
fn reaches_into(other: &str, token: &str) -> bool {
    let suffixes = other.char_indices().skip(1).map(|(at, _)| &other[at..]);
    suffixes.into_iter().any(|suffix| token.starts_with(suffix) || suffix.starts_with(token))
}

/// Whether the pre-tokenizer ends a match between a letter and a space.
fn splits_words(pre_tokenizer: Option<&PreTokenizerWrapper>) -> bool {
    use PreTokenizerWrapper::{ByteLevel, Sequence, Split};
    match pre_tokenizer {
        // Its own expression is that of GPT-2, for which the same holds.
        Some(ByteLevel(bytes)) => !bytes.add_prefix_space && bytes.use_regex,
        Some(Sequence(sequence)) => match sequence.as_ref() {
            [Split(split), ByteLevel(bytes)] => {
                let known = match &split.pattern {
                    SplitPattern::Regex(pattern) => WORD_PATTERNS.contains(&pattern.as_str()),
                    SplitPattern::String(_) => false,
                };
                let isolated = split.behavior == SplitDelimiterBehavior::Isolated && !split.invert;
                known && isolated && !bytes.add_prefix_space && !bytes.use_regex
            }
            _ => false,
        },
        _ => false,
    }
}

/// Whether the normalizer does the same to two texts and to one made of both, where they meet as ASCII letter and space.
fn keeps_words(normalizer: Option<&NormalizerWrapper>) -> bool {
    // Composition needs a combining character, and there is none.
    matches!(normalizer, None | Some(NormalizerWrapper::NFC(_)))
}

/// Whether an added token neither holds a space nor takes those around it.
fn leaves_words_alone(token: &AddedToken) -> bool {
    !token.lstrip && !token.rstrip && !token.content.contains(char::is_whitespace)
}

/// What the tokenizer puts before and after any text.
fn around(tokenizer: &Tokenizer) -> Option<(Vec<u32>, Vec<u32>)> {
    fn puts_around(processor: &PostProcessorWrapper) -> bool {
        match processor {
            PostProcessorWrapper::Sequence(all) => all.as_ref().iter().all(puts_around),
            PostProcessorWrapper::Roberta(_)
            | PostProcessorWrapper::Bert(_)
            | PostProcessorWrapper::ByteLevel(_)
            | PostProcessorWrapper::Template(_) => true,
        }
    }
    if !tokenizer.get_post_processor().is_none_or(puts_around) {
        return None;
    }
    let mut found = None;
    // A template may leave the text out or put it twice; two texts tell.
    for text in ["a", "a b"] {
        let bare = whole(tokenizer, text, false).ok()?;
        let dressed = whole(tokenizer, text, true).ok()?;
        let more = dressed.len().checked_sub(bare.len())?;
        let before = (0..=more).find(|at| dressed[*at..].starts_with(&bare))?;
        let this = (dressed[..before].to_vec(), dressed[before + bare.len()..].to_vec());
        if *found.get_or_insert_with(|| this.clone()) != this {
            return None;
        }
    }
    found
}

#[cfg(test)]
mod tests;
