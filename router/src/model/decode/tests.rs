use std::sync::Arc;

use proptest::prelude::*;
use serde_json::{Value, json};
use tokenizers::Tokenizer;

use super::*;
use crate::model::tests::model_dir::{EOS, VOCAB, byte_level_tokenizer};

fn special(id: u32, content: &str) -> Value {
    json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true })
}

/// A vocabulary of the Llama 2 kind: spaces are `▁`, unknown characters fall back to bytes, the first space is cut.
fn metaspace_tokenizer() -> Value {
    let mut vocab = serde_json::Map::new();
    for (id, token) in ["<unk>", "<s>", "</s>"].iter().enumerate() {
        vocab.insert((*token).to_owned(), json!(id));
    }
    for byte in 0..256 {
        vocab.insert(format!("<0x{byte:02X}>"), json!(3 + byte));
    }
    let pieces = ["▁", "a", "b", "c", "▁a", "▁b", "ab", "▁ab", "é", "▁▁"];
    for (i, piece) in pieces.iter().enumerate() {
        vocab.insert((*piece).to_owned(), json!(259 + i));
    }
    json!({
        "version": "1.0", "truncation": null, "padding": null, "post_processor": null, "pre_tokenizer": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": { "type": "Sequence", "normalizers": [
            { "type": "Prepend", "prepend": "▁" },
            { "type": "Replace", "pattern": { "String": " " }, "content": "▁" } ] },
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "▁" }, "content": " " },
            { "type": "ByteFallback" }, { "type": "Fuse" },
            { "type": "Strip", "content": " ", "start": 1, "stop": 0 } ] },
        "model": { "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": [["▁", "a"], ["▁", "b"], ["a", "b"], ["▁a", "b"], ["▁", "▁"]] }
    })
}

fn tokenizer(json: &Value) -> Tokenizer {
    Tokenizer::from_bytes(json.to_string()).unwrap()
}

fn byte_level() -> Arc<Vocabulary> {
    Arc::new(Vocabulary::new(tokenizer(&byte_level_tokenizer())))
}

fn metaspace() -> Arc<Vocabulary> {
    Arc::new(Vocabulary::new(tokenizer(&metaspace_tokenizer())))
}

/// The pieces a stream of `ids` is shown in.
fn pieces(vocabulary: &Arc<Vocabulary>, ids: &[u32]) -> Vec<String> {
    let mut decoder = Decoder::new(Arc::clone(vocabulary));
    let mut pieces = Vec::new();
    for id in ids {
        let mut piece = String::new();
        decoder.push(*id, &mut piece);
        pieces.push(piece);
    }
    let mut rest = String::new();
    decoder.finish(&mut rest);
    pieces.push(rest);
    pieces
}

#[test]
fn the_byte_table_decodes_as_the_tokenizer_does() {
    let vocabulary = byte_level();
    assert!(vocabulary.table.is_some());
    for id in 0..VOCAB + 5 {
        assert_eq!(vocabulary.decode(&[id]), vocabulary.window(&[id]), "token {id}");
    }
}

#[test]
fn a_character_is_shown_when_its_last_byte_is_there() {
    assert_eq!(pieces(&byte_level(), &[0xF0, 0x9F, 0x98, 0x80, 33]), ["", "", "", "😀", "!", ""]);
    assert_eq!(pieces(&byte_level(), &[120, 0xC3]), ["x", "", "\u{FFFD}"], "an unfinished one at the end");
    let bytes = [0xF0u32, 0x9F, 0x98, 0x80].map(|byte| 3 + byte);
    assert_eq!(pieces(&metaspace(), &bytes), ["", "", "", "😀", ""]);
}

#[test]
fn special_tokens_are_not_shown() {
    assert_eq!(pieces(&byte_level(), &[104, EOS, 105]).concat(), "hi");
    assert_eq!(pieces(&metaspace(), &[1, 263, 2]).concat(), "a");
}

#[test]
fn the_first_space_is_cut_and_later_ones_are_not() {
    // "▁a" twice: the decoder strips the space of a text's first token only.
    assert_eq!(pieces(&metaspace(), &[263, 263]), ["a", " a", ""]);
}

#[test]
fn bytes_of_single_tokens_are_exact() {
    let vocabulary = byte_level();
    assert_eq!(vocabulary.token_bytes(0xC3), [0xC3]);
    assert_eq!(vocabulary.token_bytes(EOS), b"<|eos|>");
    assert_eq!(vocabulary.token_bytes(VOCAB + 7), b"");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn a_stream_of_any_bytes_equals_decoding_all_at_once(ids in prop::collection::vec(0..VOCAB, 0..80)) {
        let vocabulary = byte_level();
        let shown = pieces(&vocabulary, &ids);
        prop_assert_eq!(shown.concat(), vocabulary.tokenizer.decode(&ids, true).unwrap());
    }

    #[test]
    fn any_text_comes_through_both_vocabularies(text in "[a-c é😀\u{4e00}\u{0301}]{0,40}") {
        for vocabulary in [byte_level(), metaspace()] {
            let ids = vocabulary.encode(&text, true, 0).unwrap();
            let shown = pieces(&vocabulary, &ids);
            prop_assert_eq!(shown.concat(), vocabulary.decode(&ids));
            prop_assert!(!shown.iter().any(|piece| piece.contains('\u{FFFD}')), "{:?}", shown);
        }
    }

    #[test]
    fn nothing_waits_longer_than_a_character(ids in prop::collection::vec(0..VOCAB, 0..80)) {
        // What is held back is always less than one character, so the text shown is never far behind.
        let vocabulary = byte_level();
        let mut decoder = Decoder::new(Arc::clone(&vocabulary));
        for id in ids {
            decoder.push(id, &mut String::new());
            let State::Bytes(pending) = &decoder.state else { unreachable!("byte-level") };
            prop_assert!(pending.len() < 4);
        }
    }
}

#[test]
fn tokens_without_text_cost_nothing_that_stays() {
    let vocabulary = metaspace();
    let mut decoder = Decoder::new(Arc::clone(&vocabulary));
    let (mut text, mut ids) = (String::new(), Vec::new());
    for round in 0..2_000 {
        // The end of a text, an id that no token has, and now and then a word.
        let silent = [2, 100_000];
        let said = if round % 500 == 0 { &[2, 263, 100_000][..] } else { &silent };
        for id in said {
            decoder.push(*id, &mut text);
            ids.push(*id);
        }
        let State::Window { ids: window, .. } = &decoder.state else { panic!("not of this kind") };
        assert!(window.len() <= WINDOW_MAX_TOKENS, "{} tokens after {round} rounds", window.len());
    }
    decoder.finish(&mut text);
    assert_eq!(text, vocabulary.decode(&ids));
    assert_eq!(text, "a a a a");
}
