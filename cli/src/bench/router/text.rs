//! Prompts of random words, each of which is one token.

/// Words of three letters that stand, with a space before, in most vocabularies and in that of the tiny model: four
/// bytes, one token, for a tokenizer and for the engines' own rule of four bytes a token alike.
const WORDS: [&str; 32] = [
    " all", " and", " are", " bee", " big", " can", " car", " cat", " day", " dog", " eat", " eve", " few",
    " for", " fox", " imp", " its", " met", " old", " owl", " red", " saw", " sea", " sun", " the", " tom",
    " use", " was", " win", " you", " ham", " tow",
];

/// Random words, by a seed.
#[derive(Debug, Clone)]
pub(super) struct Words(u64);

impl Words {
    pub(super) fn new(seed: u64) -> Self {
        let mut words = Self(seed);
        // Seeds that are neighbours give texts that are not.
        words.bits();
        words
    }

    /// Words of another kind.
    pub(super) fn fork(&self, number: u64) -> Self {
        let mut base = Self(self.0 ^ number.wrapping_add(1).wrapping_mul(0xd6e8_feb8_6659_fd93));
        Self(base.bits())
    }

    /// splitmix64.
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, count: usize) -> usize {
        (self.bits() % count.max(1) as u64) as usize
    }

    /// In `[0, 1)`.
    pub(super) fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// So many words.
    pub(super) fn text(&mut self, count: usize) -> String {
        let mut text = String::with_capacity(4 * count);
        let mut bits = 0;
        for index in 0..count {
            // Five bits choose a word.
            if index % 12 == 0 {
                bits = self.bits();
            }
            text.push_str(WORDS[(bits & 31) as usize]);
            bits >>= 5;
        }
        text
    }
}
