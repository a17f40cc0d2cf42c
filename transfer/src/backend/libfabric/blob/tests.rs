use proptest::prelude::*;

use super::*;
use crate::wire::tests::fuzz::fuzz;

fn socket(ip: [u8; 4], port: u16) -> Vec<u8> {
    let mut address = vec![0; 16];
    address[..2].copy_from_slice(&AF_INET.to_ne_bytes());
    address[2..4].copy_from_slice(&port.to_be_bytes());
    address[4..8].copy_from_slice(&ip);
    address
}

fn decode(blob: &[u8], format: u32, own: &[u8], loopback: bool) -> Result<Vec<Vec<u8>>, BlobError> {
    decode_address(blob, Expected { format, own, loopback })
}

#[test]
fn addresses_come_back_as_they_were() {
    let rails = vec![socket([127, 0, 0, 1], 1), socket([127, 0, 0, 2], 65535)];
    let blob = encode_address(&rails);
    assert_eq!(decode(&blob, FI_SOCKADDR_IN, &rails[0], true), Ok(rails.clone()));
    let most = vec![vec![7; ENDPOINT_ADDRESS_MAX_BYTES]; RAILS_MAX];
    assert!(encode_address(&most).len() <= ADDRESS_MAX_BYTES);
}

#[test]
fn socket_addresses_of_another_kind_are_refused() {
    let own = socket([127, 0, 0, 1], 9);
    let refused = |address: &[u8], loopback| {
        decode(&encode_address(&[address.to_vec()]), FI_SOCKADDR_IN, &own, loopback).unwrap_err()
    };
    let other_machine = socket([192, 0, 2, 7], 9);
    assert_eq!(refused(&other_machine, true), BlobError::NotLoopback(IpAddr::from([192, 0, 2, 7])));
    let blob = encode_address(std::slice::from_ref(&other_machine));
    assert_eq!(decode(&blob, FI_SOCKADDR_IN, &own, false), Ok(vec![other_machine]));
    assert_eq!(refused(&socket([0, 0, 0, 0], 9), false), BlobError::Endpoint);
    assert_eq!(refused(&socket([224, 0, 0, 1], 9), false), BlobError::Endpoint);
    assert_eq!(refused(&socket([127, 0, 0, 1], 0), true), BlobError::Endpoint);
    assert_eq!(refused(&own[..15], true), BlobError::Endpoint);
    let mut of_six = own.clone();
    of_six[..2].copy_from_slice(&AF_INET6.to_ne_bytes());
    assert_eq!(refused(&of_six, true), BlobError::Endpoint);
    of_six.resize(28, 0);
    assert_eq!(refused(&of_six, true), BlobError::Endpoint);
    assert_eq!(refused(&[], true), BlobError::Endpoint);
}

#[test]
fn names_in_shared_memory_have_no_paths_in_them() {
    let check = |name: &[u8]| decode(&encode_address(&[name.to_vec()]), FI_ADDR_STR, b"fi_shm://1\0", false);
    assert!(check(b"fi_shm://12:0:3\0").is_ok());
    for hostile in
        [&b"fi_shm://12"[..], b"fi_shm://../../x\0", b"fi_shm://a\0b\0", b"shm://1\0", b"fi_shm://%s\0"]
    {
        assert_eq!(check(hostile), Err(BlobError::Endpoint), "{hostile:?}");
    }
}

#[test]
fn an_efa_address_is_as_long_as_ours_and_has_a_gid() {
    let own = [1; 32];
    let check = |address: &[u8]| decode(&encode_address(&[address.to_vec()]), FI_ADDR_EFA, &own, false);
    assert!(check(&[2; 32]).is_ok());
    assert_eq!(check(&[2; 31]), Err(BlobError::Endpoint));
    assert_eq!(check(&[0; 32]), Err(BlobError::Endpoint));
}

#[test]
fn keys_come_back_as_they_were_and_say_where_offsets_are() {
    let key =
        Key { len: 250, base: 0, segment: 100, virtual_addresses: false, rails: 2, keys: (10..16).collect() };
    assert_eq!(Key::decode(&key.encode()), Ok(key.clone()));
    assert_eq!((key.address(205), key.of(1, 205), key.of(0, 99)), (5, 15, 10));
    let fixed = Key { base: 1 << 40, virtual_addresses: true, ..key };
    assert_eq!((fixed.address(205), fixed.of(0, 205)), ((1 << 40) + 205, 12));
    let most = Key { len: KEYS_MAX as u64, segment: 1, rails: 1, keys: vec![9; KEYS_MAX], ..fixed };
    assert!(most.encode().len() <= KEY_MAX_BYTES);
    assert_eq!(Key::decode(&most.encode()), Ok(most));
}

#[test]
fn impossible_keys_are_refused() {
    let good = Key { len: 64, base: 5, segment: 64, virtual_addresses: true, rails: 1, keys: vec![1] };
    let mut blob = good.encode();
    blob[0] = 2;
    assert_eq!(Key::decode(&blob), Err(BlobError::Version(2)));
    assert_eq!(Key::decode(&Key { len: 0, ..good.clone() }.encode()), Err(BlobError::Sizes));
    assert_eq!(Key::decode(&Key { segment: 0, ..good.clone() }.encode()), Err(BlobError::Sizes));
    assert_eq!(Key::decode(&Key { base: u64::MAX - 3, ..good.clone() }.encode()), Err(BlobError::Sizes));
    let endless = Key { len: u64::MAX - 9, segment: 1, ..good.clone() };
    assert_eq!(Key::decode(&endless.encode()), Err(BlobError::Sizes));
    assert_eq!(Key::decode(&Key { rails: 0, ..good.clone() }.encode()), Err(BlobError::Rails(0)));
    let mut long = good.encode();
    long.push(0);
    assert_eq!(Key::decode(&long), Err(BlobError::Length));
    assert_eq!(Key::decode(&vec![1; KEY_MAX_BYTES + 1]), Err(BlobError::Length));
}

#[test]
fn whatever_becomes_of_good_blobs_is_refused_or_means_one_thing() {
    let key = |rails: usize, keys: u64, virtual_addresses| {
        let keys = (0..keys * rails as u64).collect::<Vec<_>>();
        let len = keys.len() as u64 / rails as u64 * 100 - 30;
        Key { len, base: 1 << 40, segment: 100, virtual_addresses, rails, keys }
    };
    let decode_key = |bytes: &[u8]| {
        let key = Key::decode(bytes)?;
        assert_eq!(key.keys.len(), key.segments() * key.rails);
        for offset in [0, key.len / 2, key.len - 1] {
            key.address(offset);
            key.of(key.rails - 1, offset);
        }
        Ok::<_, BlobError>(key)
    };
    let good = [key(1, 1, false), key(2, 3, true), key(RAILS_MAX, 1, true)].map(|key| key.encode());
    fuzz("libfabric key", &good, decode_key, Key::encode);
    let of_six = [&AF_INET6.to_ne_bytes()[..], &[0, 9, 0, 0, 0, 0, 0x20, 1], &[7; 18]].concat();
    for (format, own) in [
        (FI_SOCKADDR_IN, socket([127, 0, 0, 1], 9)),
        (FI_SOCKADDR_IN6, of_six),
        (FI_ADDR_STR, b"fi_shm://12:0:3\0".to_vec()),
        (FI_ADDR_EFA, vec![1; 32]),
        (77, vec![5; 7]),
    ] {
        let good = [encode_address(std::slice::from_ref(&own)), encode_address(&vec![own.clone(); 3])];
        let take = |bytes: &[u8]| decode(bytes, format, &own, false);
        fuzz("libfabric address", &good, take, |rails| encode_address(rails));
    }
}

proptest! {
    #[test]
    fn truncated_blobs_are_refused(cut in 0_usize..60, flip in 0_usize..60) {
        let key = Key { len: 64, base: 0, segment: 32, virtual_addresses: false, rails: 2, keys: vec![1, 2, 3, 4] };
        let blob = key.encode();
        prop_assert!(Key::decode(&blob[..cut.min(blob.len() - 1)]).is_err());
        let mut flipped = blob.clone();
        flipped[flip % blob.len()] ^= 0x81;
        if let Ok(other) = Key::decode(&flipped) {
            prop_assert_eq!(other.keys.len(), other.segments() * other.rails);
        }
    }
}
