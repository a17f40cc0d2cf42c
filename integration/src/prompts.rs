//! The prompts of the equality proof: every length that matters to blocks of 16, 24 and 32 tokens, text of many
//! kinds, and families that share a prefix.

use crate::client::Prompt;

/// Token ids below this exist in the tiny model's vocabulary and are not special.
const ORDINARY: std::ops::Range<u32> = 5..900;

/// `count` token ids that only depend on `seed`.
pub fn random_tokens(seed: u64, count: usize) -> Vec<u32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            ORDINARY.start + u32::try_from(state % u64::from(ORDINARY.end - ORDINARY.start)).unwrap_or(0)
        })
        .collect()
}

/// More than sixty prompts, from the empty one to 4,000 tokens.
pub fn all() -> Vec<(String, Prompt)> {
    let mut prompts = vec![("empty".to_owned(), Prompt::from(""))];
    let lengths = [
        1, 2, 3, 7, 15, 16, 17, 23, 24, 25, 31, 32, 33, 47, 48, 49, 63, 64, 65, 71, 72, 73, 95, 96, 97, 127,
        128, 129, 191, 192, 193, 255, 256, 257, 383, 384, 385, 511, 512, 513, 767, 768, 1000, 1023, 1024,
        1025, 1536, 2047, 2048, 2049, 3000, 4000,
    ];
    for length in lengths {
        prompts.push((format!("{length} tokens"), Prompt::Tokens(random_tokens(length as u64, length))));
    }
    let shared = random_tokens(77, 200);
    for tail in [0, 1, 8, 56, 57, 300] {
        let mut tokens = shared.clone();
        tokens.extend(random_tokens(1000 + tail as u64, tail));
        prompts.push((format!("200 shared and {tail} own tokens"), Prompt::Tokens(tokens)));
    }
    let texts = [
        "Hello",
        " ",
        "\n\n\n",
        "Once upon a time there was a child named Mia.",
        "Grüße aus Köln, naïve façade — œuvre",
        "日本語のテキストと한국어와中文。",
        "🦊🦉🐋 emoji 👩‍👩‍👧‍👦 and e\u{301} combining",
        "שלום עולם مرحبا بالعالم",
        "<|user|>\nWhat does the fox eat?<|end|>\n<|assistant|>\n",
        "tab\tnul-free \u{1}\u{7f} control \u{200b} zero width",
    ];
    prompts
        .extend(texts.iter().enumerate().map(|(index, text)| (format!("text {index}"), Prompt::from(*text))));
    prompts
}
