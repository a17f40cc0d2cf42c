//! Words of one long text and their tokens: a few common ones are most of it, and are found here without a lock.

/// Places there are: a power of two. All of them take 32 KiB.
const PLACES: usize = 1024;
/// Longest word that is kept.
const WORD_BYTES: usize = 15;
/// Most tokens of a word that is kept.
const WORD_TOKENS: usize = 3;

/// The words of one text; of two that want the same place, the later has it.
#[derive(Debug)]
pub(super) struct Words(Vec<Place>);

#[derive(Debug, Clone, Copy, Default)]
struct Place {
    /// The bytes of the word and, in the last one, how many there are; no word has none.
    word: [u8; 16],
    tokens: [u32; WORD_TOKENS],
    count: u8,
}

impl Words {
    pub(super) fn new() -> Self {
        Self(vec![Place::default(); PLACES])
    }

    /// Appends the tokens of a word, if they are known.
    pub(super) fn append(&self, word: &str, out: &mut Vec<u32>) -> bool {
        let Some(key) = key(word) else { return false };
        let place = &self.0[at(key)];
        let known = place.word == key;
        if known {
            out.extend_from_slice(&place.tokens[..usize::from(place.count)]);
        }
        known
    }

    /// Keeps the tokens of a word, if they are few.
    pub(super) fn put(&mut self, word: &str, tokens: &[u32]) {
        let Some(key) = key(word) else { return };
        if tokens.len() <= WORD_TOKENS {
            let mut place = Place { word: key, count: tokens.len() as u8, ..Place::default() };
            place.tokens[..tokens.len()].copy_from_slice(tokens);
            self.0[at(key)] = place;
        }
    }
}

fn key(word: &str) -> Option<[u8; 16]> {
    let bytes = word.as_bytes();
    if bytes.is_empty() || bytes.len() > WORD_BYTES {
        return None;
    }
    let mut key = [0; 16];
    key[..bytes.len()].copy_from_slice(bytes);
    key[15] = bytes.len() as u8;
    Some(key)
}

fn at(key: [u8; 16]) -> usize {
    let number = u128::from_le_bytes(key);
    let folded =
        (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ ((number >> 64) as u64).rotate_left(32);
    (folded.wrapping_mul(0xd6e8_feb8_6659_fd93) >> 32) as usize % PLACES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_have_the_tokens_that_were_put_last() {
        let mut words = Words::new();
        let all: Vec<String> = (0..5000).map(|i| format!(" w{i}")).collect();
        for (i, word) in (0u32..).zip(&all) {
            words.put(word, &[i, i + 1][..1 + i as usize % 2]);
        }
        let mut known = 0;
        for (i, word) in (0u32..).zip(&all) {
            let mut out = vec![];
            if words.append(word, &mut out) {
                known += 1;
                assert_eq!(out, [i, i + 1][..1 + i as usize % 2]);
            }
        }
        assert!(known > PLACES / 2, "{known}");
        for word in ["", " w", " 123456789012345", " four"] {
            words.put(word, &[1, 2, 3, 4]);
            assert!(!words.append(word, &mut vec![]), "{word}");
        }
        assert!(!words.append(" w4999\0", &mut vec![]));
    }
}
