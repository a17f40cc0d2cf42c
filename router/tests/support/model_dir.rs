//! Small model directories, written by code: no weights, real tokenizers.

use std::path::Path;

use serde_json::{Value, json};

/// Tokens of the byte-level vocabulary, special ones included.
pub(crate) const VOCAB: u32 = 300;
/// Context of the fixture model.
pub(crate) const CONTEXT: u32 = 512;
/// Ids of the special tokens, right after the bytes and the merges.
pub(crate) const BOS: u32 = 296;
pub(crate) const EOS: u32 = 297;

const MERGES: [(&str, &str); 40] = [
    ("h", "e"),
    ("l", "l"),
    ("he", "ll"),
    ("hell", "o"),
    ("Ġ", "w"),
    ("o", "r"),
    ("Ġw", "or"),
    ("l", "d"),
    ("Ġwor", "ld"),
    ("i", "n"),
    ("in", "g"),
    ("Ġ", "t"),
    ("Ġt", "he"),
    ("e", "r"),
    ("a", "t"),
    ("o", "n"),
    ("e", "n"),
    ("u", "s"),
    ("us", "er"),
    ("s", "y"),
    ("sy", "s"),
    ("t", "e"),
    ("te", "m"),
    ("sys", "tem"),
    // The bytes of an emoji, in two halves; the first half is no character.
    ("ð", "Ł"),
    ("ĺ", "Ģ"),
    // An e with an acute accent.
    ("Ã", "©"),
    // A lead byte glued to the letter before it.
    ("x", "Ã"),
    ("Ġ", "a"),
    ("Ġ", "s"),
    ("Ġs", "t"),
    ("Ġst", "o"),
    ("Ġsto", "p"),
    ("S", "T"),
    ("O", "P"),
    ("ST", "OP"),
    ("E", "N"),
    ("EN", "D"),
    ("Ġ", "Ġ"),
    ("Ċ", "Ċ"),
];

/// The characters that stand for the 256 bytes (GPT-2), by byte.
fn byte_alphabet() -> Vec<char> {
    let mut next = 0x100;
    let letter = |byte: u32| {
        let printable = (0x21..=0x7E).contains(&byte) || (0xA1..=0xAC).contains(&byte) || byte >= 0xAE;
        let code = if printable { byte } else { next };
        next += u32::from(!printable);
        char::from_u32(code).expect("a character")
    };
    (0..256).map(letter).collect()
}

fn special(id: u32, content: &str) -> Value {
    json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true })
}

/// A byte-level BPE: every byte is a token (id = byte), then the merges, then special tokens.
pub(crate) fn byte_level_tokenizer() -> Value {
    let mut vocab = serde_json::Map::new();
    for (byte, letter) in byte_alphabet().into_iter().enumerate() {
        vocab.insert(letter.to_string(), json!(byte));
    }
    for (i, (left, right)) in MERGES.iter().enumerate() {
        vocab.insert(format!("{left}{right}"), json!(256 + i));
    }
    let merges: Vec<Value> = MERGES.iter().map(|(left, right)| json!([left, right])).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [special(BOS, "<|bos|>"), special(EOS, "<|eos|>"), special(298, "<|end|>")],
        "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
        "decoder": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": merges }
    })
}

/// The template of the fixture: a marker per message, `raise_exception` for an assistant that speaks first.
pub(crate) const TEMPLATE: &str = "{{ bos_token }}{% for message in messages %}{% if loop.first and message.role == 'assistant' %}{{ raise_exception('the assistant must not speak first') }}{% endif %}{{ message.role }}: {{ message.content | trim }}<|end|>\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";

/// Writes a whole model directory.
pub(crate) fn write(dir: &Path) {
    let put =
        |name: &str, value: &Value| std::fs::write(dir.join(name), value.to_string()).expect("writable");
    put("tokenizer.json", &byte_level_tokenizer());
    put(
        "config.json",
        &json!({
            "model_type": "llama", "vocab_size": VOCAB, "max_position_embeddings": CONTEXT,
            "eos_token_id": EOS, "bos_token_id": BOS
        }),
    );
    put(
        "tokenizer_config.json",
        &json!({
            "bos_token": "<|bos|>", "eos_token": { "content": "<|eos|>" }, "chat_template": TEMPLATE
        }),
    );
}
