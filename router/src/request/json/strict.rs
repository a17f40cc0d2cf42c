//! What `serde_json` says of a text: the judge of everything that is not plain.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserialize, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::{Entries, Raw};

/// Why a text is not what was asked for.
pub(in super::super) type TextError = serde_json::Error;

/// A key, borrowed where it holds no escapes.
struct Key<'a>(Cow<'a, str>);

impl<'de> Deserialize<'de> for Key<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct KeyVisitor;
        impl<'de> Visitor<'de> for KeyVisitor {
            type Value = Key<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }
            fn visit_borrowed_str<E>(self, v: &'de str) -> Result<Key<'de>, E> {
                Ok(Key(Cow::Borrowed(v)))
            }
            fn visit_str<E>(self, v: &str) -> Result<Key<'de>, E> {
                Ok(Key(Cow::Owned(v.to_owned())))
            }
        }
        deserializer.deserialize_str(KeyVisitor)
    }
}

/// Reads an object of at most so many fields, so that many of them cost no memory before they are refused.
struct EntriesUpTo(usize);

impl<'de> DeserializeSeed<'de> for EntriesUpTo {
    type Value = Entries<'de>;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Entries<'de>, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for EntriesUpTo {
    type Value = Entries<'de>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries<'de>, A::Error> {
        let mut entries = Vec::new();
        while let Some(Key(key)) = map.next_key::<Key<'de>>()? {
            if entries.len() == self.0 {
                return Err(serde::de::Error::custom(format_args!("more than {} fields", self.0)));
            }
            entries.push((key, Raw(map.next_value::<&'de RawValue>()?.get())));
        }
        Ok(entries)
    }
}

/// Reads an array of at most so many values.
struct ItemsUpTo(usize);

impl<'de> DeserializeSeed<'de> for ItemsUpTo {
    type Value = Vec<Raw<'de>>;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Vec<Raw<'de>>, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for ItemsUpTo {
    type Value = Vec<Raw<'de>>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array")
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<Raw<'de>>, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element::<&'de RawValue>()? {
            if items.len() == self.0 {
                return Err(serde::de::Error::custom(format_args!("more than {} elements", self.0)));
            }
            items.push(Raw(item.get()));
        }
        Ok(items)
    }
}

pub(super) fn entries(text: &str, max: usize) -> Result<Entries<'_>, TextError> {
    all(text, EntriesUpTo(max))
}

pub(super) fn items(text: &str, max: usize) -> Result<Vec<Raw<'_>>, TextError> {
    all(text, ItemsUpTo(max))
}

pub(super) fn string(text: &str) -> Result<String, TextError> {
    serde_json::from_str(text)
}

/// Reads all of a text.
fn all<'a, S: DeserializeSeed<'a>>(text: &'a str, seed: S) -> Result<S::Value, TextError> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let value = seed.deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok(value)
}
