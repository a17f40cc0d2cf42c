use super::*;

fn sample() -> Durable {
    let intents = [("intents/replicas/decode", "4"), ("intents/drain/w-0", "{\"ü\":1}")];
    let intents = intents.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
    Durable { ceiling: 1_795_226_400_000_000, intents }
}

#[test]
fn what_is_written_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a/b/state");
    let (file, none) = StateFile::open(&path, "me").unwrap();
    assert_eq!(none, None);
    file.write(&Durable { ceiling: 1, intents: BTreeMap::new() }).unwrap();
    file.write(&sample()).unwrap();
    drop(file);
    assert_eq!(StateFile::open(&path, "me").unwrap().1, Some(sample()));
}

#[test]
fn every_damage_is_refused_with_the_file_and_the_way_out() {
    let good = encode(&sample()).unwrap();
    assert_eq!(decode(&good), Ok(sample()));
    let mut damaged: Vec<Vec<u8>> = (0..good.len()).map(|cut| good[..cut].to_vec()).collect();
    for at in 0..good.len() {
        for bit in [0x01, 0x80] {
            let mut bytes = good.clone();
            bytes[at] ^= bit;
            damaged.push(bytes);
        }
    }
    damaged.push([good.as_slice(), b"junk"].concat());
    damaged.push(vec![b'x'; 100]);
    for bytes in damaged {
        assert!(decode(&bytes).is_err(), "accepted {:?}", String::from_utf8_lossy(&bytes));
    }

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    std::fs::write(&path, &good[..good.len() - 3]).unwrap();
    let message = StateFile::open(&path, "me").unwrap_err().to_string();
    assert!(message.contains(path.to_str().unwrap()) && message.contains("move it away"), "{message}");
    assert_eq!(std::fs::read(&path).unwrap(), &good[..good.len() - 3], "the evidence is left alone");
}
