use proptest::prelude::*;
use serde_json::Value;

use super::*;

const MAX: usize = 6;

/// What is found at once is what `serde_json` finds.
fn check(text: &str) {
    let shown = |entries: Entries<'_>| {
        entries.into_iter().map(|(key, raw)| (key.into_owned(), raw.get().to_owned())).collect::<Vec<_>>()
    };
    let strict = strict::entries(text, MAX).ok();
    if let Some(found) = outline::entries::<false>(text, MAX) {
        assert_eq!(Some(shown(found)), strict.clone().map(shown), "{text}");
    }
    for (_, raw) in strict.unwrap_or_default() {
        let known = outline::entries::<true>(raw.get(), MAX).map(shown);
        assert!(known.is_none() || known == strict::entries(raw.get(), MAX).ok().map(shown), "{raw:?}");
        let items = outline::items(raw.get(), MAX);
        assert!(items.is_none() || items == strict::items(raw.get(), MAX).ok(), "{raw:?}");
        let string = outline::string(raw.get());
        assert!(string.is_none() || string == strict::string(raw.get()).ok(), "{raw:?}");
    }
}

#[test]
fn what_is_plain_is_found_without_serde() {
    let long = "x".repeat(100);
    let text = format!(
        " {{\"a\" : [1, -2.5e+3 ,\"{long}\",{{}},[]] ,\"b\":\"é\\n\\u00e9\\ud83d\\ude00{long}\\\"\",\"c\":null,\"\":true}}\n"
    );
    let entries = outline::entries::<false>(&text, MAX).unwrap();
    let keys: Vec<&str> = entries.iter().map(|(key, _)| key.as_ref()).collect();
    assert_eq!(keys, ["a", "b", "c", ""]);
    assert_eq!(outline::items(entries[0].1.get(), MAX).unwrap().len(), 5);
    assert_eq!(outline::string(entries[1].1.get()).unwrap(), format!("é\né😀{long}\""));
    assert!(outline::entries::<true>(&text, MAX).is_some() && outline::entries::<false>("{}", 0).is_some());
    check(&text);
}

#[test]
fn what_is_not_plain_is_left_to_serde() {
    let deep = format!("{{\"a\":{}{}}}", "[".repeat(100), "]".repeat(100));
    let long = "x".repeat(70);
    for text in [
        "",
        "{",
        "[]",
        "{\"a\":1,}",
        "{\"a\":01}",
        "{\"a\":1.}",
        "{\"a\":+1}",
        "{\"a\":1e}",
        "{\"a\":tru}",
        "{\"a\":1}x",
        "{\"a\" 1}",
        "{a:1}",
        "{\"a\":\"\u{1}\"}",
        "{\"a\":\"\\x\"}",
        "{\"a\":\"\\u12\"}",
        "{\"a\":[1,]}",
        "{\"a\":[,1]}",
        "{\"a\":{\"b\"}}",
        "{\"a\":\"",
        "{\"\\u0061\":1}",
        "{\"a\":.5}",
        "{\"a\":--1}",
        "{\"a\":NaN}",
        "{\"a\":[1}",
        &deep,
        &format!("{{\"a\":\"{long}\u{1f}\"}}"),
        "{\"a\":1,\"b\":1,\"c\":1,\"d\":1,\"e\":1,\"f\":1,\"g\":1}",
        "\u{feff}{}",
        "{\"a\":\"\\",
    ] {
        assert!(outline::entries::<false>(text, MAX).is_none(), "{text}");
        check(text);
    }
    for text in ["\"\\ud800\"", "\"\\ud800\\u0041\"", "\"\\udc00\"", "\"\\ud83d\\ude0\"", "1", "\"a"] {
        assert_eq!(outline::string(text), None, "{text}");
    }
    assert!(strict::entries(&deep, MAX).is_ok() && strict::entries("{\"\\u0061\":1}", MAX).is_ok());
}

fn any_json() -> impl Strategy<Value = Value> {
    super::super::tests::any_json("[a-z\u{0}-\u{20}é😀\"\\\\]{0,80}", "[a-z\"é]{0,3}", 8)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_json_is_found_as_serde_finds_it(value in any_json(), pretty in any::<bool>()) {
        let value = serde_json::json!({ "a": value });
        let text = if pretty { format!("{value:#}") } else { value.to_string() };
        check(&text);
        prop_assert!(outline::entries::<false>(&text, MAX).is_some(), "{}", text);
    }

    #[test]
    fn damaged_json_is_not_taken_for_json(
        value in any_json(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), "[\\[\\]{}:,\"\\\\u0-9eE+.\\- a\u{1}-]|", 0..3usize), 1..4),
    ) {
        let mut chars: Vec<char> = serde_json::json!({ "a": value, "b": 1 }).to_string().chars().collect();
        for (at, put, gone) in damage {
            let at = at.index(chars.len().max(1)).min(chars.len());
            let end = (at + gone).min(chars.len());
            chars.splice(at..end, put.chars());
        }
        check(&chars.iter().collect::<String>());
    }
}
