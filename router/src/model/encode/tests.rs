use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn added(id: u32, content: &str) -> Value {
    json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true })
}

fn with(mut token: Value, flag: &str) -> Value {
    token[flag] = json!(true);
    token
}

/// The characters that stand for the 256 bytes (GPT-2), by byte.
fn alphabet() -> Vec<char> {
    let mut next = 0x100;
    let letter = |byte: u32| {
        let printable = (0x21..=0x7E).contains(&byte) || (0xA1..=0xAC).contains(&byte) || byte >= 0xAE;
        let code = if printable { byte } else { next };
        next += u32::from(!printable);
        char::from_u32(code).unwrap()
    };
    (0..256).map(letter).collect()
}

/// A byte-level BPE with merges across whatever a wrong cut would part.
fn bytes(pre_tokenizer: &Value, normalizer: &Value, tokens: &[Value]) -> Tokenizer {
    let mut vocab: serde_json::Map<String, Value> =
        alphabet().into_iter().enumerate().map(|(id, letter)| (letter.to_string(), json!(id))).collect();
    let merges = [
        ("h", "e"),
        ("l", "l"),
        ("he", "ll"),
        ("Ġ", "w"),
        ("Ġ", "Ġ"),
        ("ĠĠ", "Ġ"),
        ("Ċ", "Ċ"),
        ("o", "Ġ"),
        ("i", "n"),
        ("1", "2"),
        ("12", "3"),
        ("Ġ", "1"),
        ("'", "s"),
        ("Ġw", "o"),
        ("<", "|"),
        ("|", ">"),
        ("é", "x"),
        ("Ã", "©"),
        ("e", "Ì"),
        ("a", "Ġ"),
        ("Ġ", "a"),
        (".", "Ċ"),
        (">", "a"),
    ];
    for (at, (left, right)) in merges.iter().enumerate() {
        vocab.entry(format!("{left}{right}")).or_insert(json!(256 + at));
    }
    vocab.insert("é".to_owned(), json!(256 + merges.len()));
    let merges: Vec<Value> = merges.iter().map(|(left, right)| json!([left, right])).collect();
    let model = json!({ "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
        "vocab": vocab, "merges": merges });
    parsed(&json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": normalizer, "post_processor": null,
        "added_tokens": tokens, "pre_tokenizer": pre_tokenizer, "decoder": null, "model": model
    }))
}

fn parsed(file: &Value) -> Tokenizer {
    Tokenizer::from_bytes(file.to_string()).unwrap()
}

fn gpt2() -> Value {
    json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true })
}

fn split(pattern: &str) -> Value {
    json!({ "type": "Sequence", "pretokenizers": [
        { "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false },
        { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false }
    ] })
}

/// Marks as chat templates have them, and added tokens that look at what is next to them.
fn tokens() -> Vec<Value> {
    vec![
        added(400, "<|a|>"),
        added(401, "<|b|>"),
        added(402, "<|b|>\n"),
        with(added(403, "<|left|>"), "lstrip"),
        with(added(404, "<|right|>"), "rstrip"),
        with(added(405, "word"), "single_word"),
        with(added(406, "<|norm|>"), "normalized"),
    ]
}

/// Added tokens that overlap each other.
fn overlapping() -> Vec<Value> {
    vec![
        added(400, "<|a|>"),
        added(401, "|><|"),
        added(402, "<|a|><|b"),
        added(403, "<|b|>"),
        added(404, "hello <|"),
        added(405, "[INST]"),
    ]
}

/// As of Llama 2: no pre-tokenizer, spaces are letters of the model.
fn sentence_piece() -> Tokenizer {
    let normalizer = json!({ "type": "Sequence", "normalizers": [
        { "type": "Prepend", "prepend": "▁" },
        { "type": "Replace", "pattern": { "String": " " }, "content": "▁" }
    ] });
    letters(
        &normalizer,
        &Value::Null,
        &[added(1, "<s>"), added(2, "</s>"), with(added(3, "[INST]"), "rstrip")],
    )
}

/// As of newer ones: a prefix at the very beginning only.
fn metaspace(scheme: &str) -> Tokenizer {
    let pre_tokenizer = json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": scheme == "first" });
    letters(&Value::Null, &pre_tokenizer, &[added(1, "<s>"), added(2, "</s>"), added(3, "[INST]")])
}

/// A BPE over characters, with bytes for the rest.
fn letters(normalizer: &Value, pre_tokenizer: &Value, tokens: &[Value]) -> Tokenizer {
    let mut vocab = serde_json::Map::new();
    vocab.insert("<unk>".to_owned(), json!(0));
    for token in tokens {
        vocab.insert(token["content"].as_str().unwrap().to_owned(), token["id"].clone());
    }
    for byte in 0..256 {
        vocab.insert(format!("<0x{byte:02X}>"), json!(10 + byte));
    }
    let plain = "▁abdefhilnorstuwx12'.\n|<>[]ANST/é";
    for (at, letter) in plain.chars().enumerate() {
        vocab.insert(letter.to_string(), json!(300 + at));
    }
    let merges =
        [("▁", "h"), ("▁", "w"), ("h", "e"), ("l", "l"), ("▁", "▁"), ("o", "▁"), ("▁h", "e"), ("i", "n")];
    for (at, (left, right)) in merges.iter().enumerate() {
        vocab.insert(format!("{left}{right}"), json!(400 + at));
    }
    let merges: Vec<Value> = merges.iter().map(|(left, right)| json!([left, right])).collect();
    let post_processor = json!({ "type": "TemplateProcessing",
        "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
        "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 0 } }],
        "special_tokens": { "<s>": { "id": "<s>", "ids": [1], "tokens": ["<s>"] } } });
    let model = json!({ "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
        "vocab": vocab, "merges": merges });
    parsed(&json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer, "post_processor": post_processor, "added_tokens": tokens, "decoder": null,
        "model": model
    }))
}

/// As of BERT: lower case, punctuation apart, pieces of words.
fn word_piece() -> Tokenizer {
    let vocab: serde_json::Map<String, Value> = [
        "[UNK]", "[CLS]", "[SEP]", "hell", "##o", "w", "##or", "##ld", "a", "##a", "1", "##2", "'", "s", "<",
        "|", ">",
    ]
    .iter()
    .enumerate()
    .map(|(id, word)| ((*word).to_owned(), json!(id)))
    .collect();
    parsed(&json!({
        "version": "1.0", "truncation": null, "padding": null,
        "normalizer": { "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
            "strip_accents": null, "lowercase": true },
        "pre_tokenizer": { "type": "BertPreTokenizer" },
        "post_processor": { "type": "BertProcessing", "sep": ["[SEP]", 2], "cls": ["[CLS]", 1] },
        "added_tokens": [added(1, "[CLS]"), added(2, "[SEP]"), added(40, "<|a|>")], "decoder": null,
        "model": { "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": vocab }
    }))
}

fn shapes() -> Vec<(&'static str, Tokenizer)> {
    let nfc = json!({ "type": "NFC" });
    let prefixed =
        json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true });
    vec![
        ("GPT-2", bytes(&gpt2(), &Value::Null, &[added(400, "<|a|>"), added(401, "<|b|>")])),
        ("GPT-2 with a prefix", bytes(&prefixed, &Value::Null, &tokens())),
        (
            "Llama 3",
            bytes(&split(WORD_PATTERNS[0]), &Value::Null, &[added(400, "<|a|>"), added(401, "<|b|>")]),
        ),
        ("Qwen", bytes(&split(WORD_PATTERNS[1]), &nfc, &[added(400, "<|a|>"), added(401, "<|b|>")])),
        ("odd added tokens", bytes(&gpt2(), &nfc, &tokens())),
        ("overlapping added tokens", bytes(&gpt2(), &Value::Null, &overlapping())),
        ("SentencePiece", sentence_piece()),
        ("Metaspace, first", metaspace("first")),
        ("Metaspace, always", metaspace("always")),
        ("WordPiece", word_piece()),
    ]
}

fn pieces_of_text() -> impl Strategy<Value = String> {
    let known = prop_oneof![
        Just("<|a|>"),
        Just("<|b|>"),
        Just("<|b|>\n"),
        Just("<|left|>"),
        Just("<|right|>"),
        Just("<|norm|>"),
        Just("word"),
        Just("<s>"),
        Just("</s>"),
        Just("[INST]"),
        Just("[CLS]"),
        Just("<|"),
        Just("|>"),
        Just("|><|"),
        Just("<"),
        Just(" "),
        Just("  "),
        Just("\n"),
        Just("\n\n  "),
        Just("hello"),
        Just(" world"),
        Just(" a"),
        Just("a"),
        Just("e\u{301}"),
        Just("\u{301}"),
        Just(" \u{301}"),
        Just("é"),
        Just("123"),
        Just(" 12"),
        Just("'s"),
        Just("'S "),
        Just("世界"),
        Just("😀"),
        Just("\u{200d}"),
        Just("."),
        Just("\t"),
        Just("\u{a0}"),
        Just(
            "a long run of words that is longer than what is cut at once and has \n\n  spaces and 1234 numbers in it, \
              don't you see? "
        ),
    ];
    let part = prop_oneof![8 => known.prop_map(str::to_owned), 1 => any::<String>(), 1 => "[a-z ]{0,400}"];
    proptest::collection::vec(part, 0..14).prop_map(|parts| parts.concat())
}

#[test]
fn cuts_are_made_where_they_should_be() {
    let shapes = shapes();
    let of = |name: &str| {
        let (_, tokenizer) = shapes.iter().find(|(known, _)| *known == name).unwrap();
        Pieces::of(tokenizer)
    };
    let marks = |pieces: &Pieces| {
        let mut marks: Vec<String> = pieces.marks.all.iter().flatten().cloned().collect();
        marks.sort();
        marks
    };
    let (plain, odd, overlapping) = (of("GPT-2"), of("odd added tokens"), of("overlapping added tokens"));
    assert_eq!(marks(&plain), ["<|a|>", "<|b|>"]);
    assert_eq!(marks(&odd), ["<|a|>", "<|b|>", "<|b|>\n", "<|right|>"]);
    assert_eq!(marks(&overlapping), ["[INST]", "|><|"].map(str::to_owned).to_vec().split_off(0)[..1]);
    assert!(plain.words && of("Llama 3").words && of("Qwen").words);
    assert!(!odd.words && !of("SentencePiece").words && !of("GPT-2 with a prefix").words);
    let words = "word ".repeat(200);
    let text = format!("{words}<|a|>user<|b|>{words}");
    let cut: Vec<&str> = plain.cut(&text).collect();
    assert_eq!(cut.concat(), text);
    assert!(cut.iter().filter(|piece| piece.starts_with("<|")).count() == 2 && cut.len() > 6, "{cut:?}");
    assert!(cut.iter().all(|piece| piece.len() <= CHUNK_BYTES + 8), "{cut:?}");
    // A text that goes on is cut as before.
    let longer = format!("{text}and more");
    assert!(plain.cut(&longer).zip(&cut).filter(|(new, old)| new == *old).count() >= cut.len() - 1);
}

#[test]
fn what_is_not_deterministic_is_not_kept() {
    let mut file: Value =
        serde_json::from_str(&bytes(&gpt2(), &Value::Null, &[]).to_string(false).unwrap()).unwrap();
    file["model"]["dropout"] = json!(0.5);
    assert!(Pieces::of(&parsed(&file)).cache.is_none());
}

#[test]
fn growing_conversations_are_tokenized_once() {
    let (_, tokenizer) = shapes().swap_remove(0);
    let pieces = Pieces::of(&tokenizer);
    let mut text = String::new();
    for turn in 0..50 {
        text.push_str(&format!("<|a|>hello number {turn}<|b|>\n{}", "the answer to this ".repeat(turn)));
        let known = pieces
            .cut(&text)
            .filter(|piece| pieces.cache.as_ref().unwrap().append(1, piece, &mut Vec::new()))
            .count();
        let all = pieces.cut(&text).count();
        // The last piece of the turn before may have gone on; the new turn has a mark or two and its text.
        assert!(all - known <= 3 + turn * 19 / CHUNK_BYTES + 1, "turn {turn}: {known} of {all}");
        assert_eq!(
            pieces.encode(&tokenizer, &text, false, 1).unwrap(),
            whole(&tokenizer, &text, false).unwrap()
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Cut and kept, or as a whole: the same ids, for every shape of tokenizer, the first and the second time.
    #[test]
    fn any_text_has_the_ids_it_has_as_a_whole(texts in proptest::collection::vec(pieces_of_text(), 1..4)) {
        for (name, tokenizer) in shapes() {
            let pieces = Pieces::of(&tokenizer);
            for text in texts.iter().chain(&texts) {
                for special in [false, true] {
                    let wanted = whole(&tokenizer, text, special).unwrap();
                    let got = pieces.encode(&tokenizer, text, special, 0).unwrap();
                    prop_assert_eq!(got, wanted, "{}: {:?}", name, text);
                }
            }
        }
    }
}
