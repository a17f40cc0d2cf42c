//! Reads changes of a prefix cache. What is derived for a tagged enum keeps every value until it knows the tag, and each
//! change names up to thousands of blocks.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};

use super::KvEvent;
use crate::prefix::BlockHash;

#[derive(serde::Deserialize)]
#[serde(field_identifier, rename_all = "snake_case")]
enum Field {
    Kind,
    Parent,
    Blocks,
}

#[derive(serde::Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    Stored,
    Removed,
    Cleared,
}

impl<'de> Deserialize<'de> for KvEvent {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Fields)
    }
}

struct Fields;

impl<'de> Visitor<'de> for Fields {
    type Value = KvEvent;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a change of a prefix cache")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<KvEvent, A::Error> {
        let (mut kind, mut parent, mut blocks) = (None, None, None);
        while let Some(field) = map.next_key()? {
            match field {
                Field::Kind => once(&mut kind, "kind", map.next_value::<Kind>()?)?,
                Field::Parent => once(&mut parent, "parent", map.next_value::<BlockHash>()?)?,
                Field::Blocks => once(&mut blocks, "blocks", map.next_value::<Vec<BlockHash>>()?)?,
            }
        }
        let missing = Error::missing_field;
        match (kind.ok_or_else(|| missing("kind"))?, parent, blocks) {
            (Kind::Stored, parent, blocks) => Ok(KvEvent::Stored {
                parent: parent.ok_or_else(|| missing("parent"))?,
                blocks: blocks.ok_or_else(|| missing("blocks"))?,
            }),
            (Kind::Removed, None, blocks) => {
                Ok(KvEvent::Removed { blocks: blocks.ok_or_else(|| missing("blocks"))? })
            }
            (Kind::Cleared, None, None) => Ok(KvEvent::Cleared),
            (Kind::Removed | Kind::Cleared, Some(_), _) => {
                Err(Error::unknown_field("parent", &["kind", "blocks"]))
            }
            (Kind::Cleared, None, Some(_)) => Err(Error::unknown_field("blocks", &["kind"])),
        }
    }
}

fn once<T, E: Error>(place: &mut Option<T>, name: &'static str, value: T) -> Result<(), E> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(E::duplicate_field(name)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_read_whatever_the_order_of_their_fields() {
        let read = |text: &str| serde_json::from_str::<KvEvent>(text);
        let stored =
            KvEvent::Stored { parent: BlockHash(u64::MAX), blocks: vec![BlockHash(1), BlockHash(2)] };
        for event in [stored.clone(), KvEvent::Removed { blocks: vec![] }, KvEvent::Cleared] {
            assert_eq!(read(&serde_json::to_string(&event).unwrap()).unwrap(), event);
        }
        let text = "{\"blocks\":[1,2],\"parent\":18446744073709551615,\"kind\":\"stored\"}";
        assert_eq!(read(text).unwrap(), stored);
        for bad in [
            "{}",
            "[]",
            "{\"kind\":\"moved\"}",
            "{\"kind\":\"stored\",\"blocks\":[]}",
            "{\"kind\":\"removed\"}",
            "{\"kind\":\"removed\",\"blocks\":[],\"parent\":1}",
            "{\"kind\":\"cleared\",\"blocks\":[]}",
            "{\"kind\":\"cleared\",\"kind\":\"cleared\"}",
            "{\"kind\":\"cleared\",\"more\":1}",
            "{\"kind\":\"removed\",\"blocks\":[-1]}",
            "{\"kind\":\"removed\",\"blocks\":[1],\"blocks\":[1]}",
        ] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
