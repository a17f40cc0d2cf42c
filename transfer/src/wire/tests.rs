pub(crate) mod fuzz;

use proptest::prelude::*;

use super::ask::{Ask, answer_head, decode_answer_head};
use super::control::{Attached, KeyIs, Lend, MAX_LENT, MAX_WINDOWS, OpenWindow, Pack, Take, WindowIs, Write};
use super::*;
use crate::agent::BackendKind;
use crate::session::Descriptor;
use baton_config::HandoffId;
use baton_config::names::NAME_MAX_BYTES;

fn hello() -> Hello {
    Hello {
        from: "decode-0".parse().unwrap(),
        from_epoch: Epoch(9),
        to: "prefill-1".parse().unwrap(),
        incarnation: 7 << 100,
        nonce: None,
    }
}

fn split(frame: &[u8]) -> (&[u8; HEADER_BYTES], &[u8]) {
    frame.split_first_chunk().unwrap()
}

#[test]
fn frames_survive_the_wire() {
    let payload = hello().encode();
    let frame = encode_frame(Kind::Hello, Epoch(4), 1, &payload);
    let (head, body) = split(&frame);
    let header = Header::decode(head).unwrap();
    assert_eq!(
        header,
        Header { kind: Kind::Hello, code: 0, len: body.len() as u32, epoch: Epoch(4), seq: 1 }
    );
    header.verify(head, body).unwrap();
    assert_eq!(Hello::decode(body).unwrap(), hello());
}

#[test]
fn the_longest_names_fit_a_hello() {
    let name = "x".repeat(NAME_MAX_BYTES);
    let hello = Hello {
        from: name.parse().unwrap(),
        to: name.parse().unwrap(),
        nonce: Some([3; NONCE_BYTES]),
        ..hello()
    };
    assert_eq!(hello.encode().len() as u64, Kind::Hello.max_len());
    assert_eq!(Hello::decode(&hello.encode()).unwrap(), hello);
}

#[test]
fn every_kind_has_its_own_number_and_a_bound() {
    for kind in Kind::ALL {
        assert_eq!(Kind::from_u8(kind as u8), Some(kind));
        let bound = if kind == Kind::Data { MAX_READ_BYTES } else { 64 << 10 };
        assert!(kind.max_len() <= bound, "{kind:?}");
    }
    assert_eq!((Kind::from_u8(0), Kind::from_u8(200)), (None, None));
}

#[test]
fn every_refusal_has_its_code() {
    for refusal in Refusal::ALL {
        let bytes = refusal_header(Some(refusal), Some(Epoch(3)), 8).encode(&[]);
        let header = Header::decode(&bytes).unwrap();
        header.verify(&bytes, &[]).unwrap();
        assert_eq!((header.seq, decode_refusal(&header)), (8, Ok(refusal)));
    }
    let stale = |current| decode_refusal(&refusal_header(None, current, 0));
    assert_eq!(stale(Some(Epoch(3))), Err(Some(Epoch(3))));
    assert_eq!(stale(None), Err(None));
}

#[test]
fn lengths_are_refused_before_anything_is_allocated() {
    for kind in [Kind::Hello, Kind::Read, Kind::Map, Kind::Refused, Kind::Data] {
        let len = u32::try_from(kind.max_len() + 1).unwrap();
        let header = Header { kind, code: 0, len, epoch: Epoch(1), seq: 0 };
        assert_eq!(Header::decode(&header.encode(&[])), Err(WireError::Long), "{kind:?}");
    }
}

#[test]
fn reads_that_make_no_sense_are_refused() {
    let block = Descriptor { region: RegionId(1), offset: 0, len: 16 };
    let read = |blocks: &[Descriptor]| Read::decode(&encode_read(HandoffId(1), blocks.iter().copied()));
    assert_eq!(read(&[block]).unwrap().blocks, [block]);
    assert_eq!(read(&[]), Err(WireError::Short));
    assert_eq!(read(&[Descriptor { len: 0, ..block }]), Err(WireError::Field));
    assert_eq!(read(&[Descriptor { offset: u64::MAX, ..block }]), Err(WireError::Field));
    assert_eq!(read(&[Descriptor { len: u32::MAX, ..block }]), Err(WireError::Long));
}

fn at(offset: u64, len: u32) -> Descriptor {
    Descriptor { region: RegionId(1), offset, len }
}

#[test]
fn keys_and_windows_that_reach_past_all_memory_or_are_too_many_are_refused() {
    let key = |base, len| KeyIs::decode(&KeyIs { len, base, key: vec![1; KEY_MAX_BYTES] }.encode());
    assert!(key(u64::MAX - 2, 2).is_ok());
    assert_eq!(key(u64::MAX - 1, 2), Err(WireError::Field));
    let longer = [KeyIs { len: 1, base: 0, key: vec![1; KEY_MAX_BYTES] }.encode(), vec![1]].concat();
    assert_eq!(KeyIs::decode(&longer), Err(WireError::Long));
    let longer = [Attached { ticket: 1, address: vec![1; ADDRESS_MAX_BYTES] }.encode(), vec![1]].concat();
    assert_eq!(Attached::decode(&longer), Err(WireError::Long));

    let window = |base| OpenWindow { window: 7, range: at(0, 16), base, key: vec![1; KEY_MAX_BYTES] };
    let answer = |blocks, windows| WindowIs { blocks, windows }.encode();
    assert!(WindowIs::decode(&answer(1, vec![window(u64::MAX - 16)])).is_ok());
    assert_eq!(WindowIs::decode(&answer(1, vec![window(u64::MAX - 15)])), Err(WireError::Field));
    assert_eq!(WindowIs::decode(&answer(0, vec![window(0)])), Err(WireError::Field));
    assert_eq!(WindowIs::decode(&answer(1, vec![])), Err(WireError::Field));
    let mut many = answer(1, vec![window(0); MAX_WINDOWS]);
    assert!(WindowIs::decode(&many).is_ok());
    many.extend_from_slice(&answer(1, vec![window(0)])[4..]);
    assert_eq!(WindowIs::decode(&many), Err(WireError::Long));
    let mut longer = answer(1, vec![window(0)]);
    let len_at = longer.len() - KEY_MAX_BYTES - 4;
    longer[len_at..len_at + 4].copy_from_slice(&(KEY_MAX_BYTES as u32 + 1).to_le_bytes());
    longer.push(1);
    assert_eq!(WindowIs::decode(&longer), Err(WireError::Long));
}

#[test]
fn writes_and_lendings_that_make_no_sense_are_refused() {
    let write = |first, count| Write {
        handoff: HandoffId(1),
        first,
        blocks: vec![at(64, 16); count],
        digests: vec![],
        windows: vec![],
    };
    let decode = |write: Write| Write::decode(&write.encode()).map(|_| ());
    assert_eq!(decode(write(u32::MAX - 1, 1)), Ok(()));
    assert_eq!(decode(write(u32::MAX, 1)), Err(WireError::Field), "a position that there is not");
    assert_eq!(decode(write(0, 0)), Err(WireError::Short));
    assert_eq!(decode(write(0, MAX_READ_BLOCKS)), Ok(()));
    let mut many = write(0, MAX_READ_BLOCKS).encode();
    many.extend_from_slice(&write(0, 1).encode()[22..]);
    assert_eq!(Write::decode(&many), Err(WireError::Long), "more blocks than a request may have");
    let mut windows = write(0, 1).encode();
    windows[21] = MAX_WINDOWS as u8 + 1;
    windows.splice(22..22, vec![0; 8 * (MAX_WINDOWS + 1)]);
    assert_eq!(Write::decode(&windows), Err(WireError::Long));

    let take = |number| Take { number, from: vec![0], write: write(0, 1) }.encode();
    assert!(Take::decode(&take(MAX_LENT - 1)).is_ok());
    assert_eq!(Take::decode(&take(MAX_LENT)), Err(WireError::Field));
    let lend = Lend { number: 0, has_file: false, address: 1, len: 1, witness_at: 0, witness: 5 };
    let good = Lend { number: MAX_LENT - 1, address: u64::MAX - 1, ..lend };
    assert_eq!(Lend::decode(&good.encode()), Ok(good));
    for bad in [Lend { number: MAX_LENT, ..lend }, Lend { len: 0, ..lend }, Lend { len: u64::MAX, ..lend }] {
        assert_eq!(Lend::decode(&bad.encode()), Err(WireError::Field), "{bad:?}");
    }
}

#[test]
fn requests_over_a_fabric_are_whole_and_name_one_answer() {
    let payload = Pack::encode(BackendKind::Ucx, 99, HandoffId(1), [at(0, 16)].into_iter());
    let ask = |code, seq| {
        let header = Header { kind: Kind::Pack, code, len: payload.len() as u32, epoch: Epoch(4), seq };
        [&7u128.to_le_bytes()[..], &header.encode(&payload), &payload].concat()
    };
    let good = ask(0, 99);
    assert!(Ask::decode(&good).is_ok());
    assert_eq!(Ask::decode(&ask(1, 99)), Err(WireError::Kind));
    assert_eq!(Ask::decode(&ask(0, 98)), Err(WireError::Field), "two numbers for one answer");
    let head = answer_head(Kind::Data, 4096, Epoch(4), 99);
    assert!(decode_answer_head(&head, 99).is_ok());
    // Whatever names its sender is not covered: nobody has another's.
    for at in 16..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1;
        assert!(Ask::decode(&bad).is_err(), "byte {at}");
    }
    for at in 0..HEADER_BYTES {
        let mut bad = head;
        bad[at] ^= 1;
        assert!(decode_answer_head(&bad, 99).is_err(), "byte {at}");
    }
}

fn metadata() -> Metadata {
    let fabric = Offer { backend: BackendKind::Libfabric, wire: "x".repeat(MAX_WIRE_TEXT_BYTES) };
    Metadata {
        incarnation: u128::MAX - 5,
        host: 99,
        address: "[2001:db8::1]:7501".parse().unwrap(),
        offers: vec![fabric, Offer::of(BackendKind::Tcp), Offer::of(BackendKind::Shm)],
    }
}

#[test]
fn metadata_is_small_and_passes_over_backends_of_later_builds() {
    let metadata = metadata();
    let mut bytes = metadata.encode();
    assert!(bytes.len() < 200, "{} bytes", bytes.len());
    assert_eq!(Metadata::decode(&bytes).unwrap(), metadata);
    let count = bytes.len() - 2 - 2 - 2 - MAX_WIRE_TEXT_BYTES - 1;
    assert_eq!(bytes[count], 3);
    bytes[count] = 4;
    assert_eq!(Metadata::decode(&bytes), Err(WireError::Short), "an offer that is not there");
    bytes.extend([200, 0]);
    assert_eq!(Metadata::decode(&bytes).unwrap(), metadata);
    bytes[4] = VERSION + 1;
    assert_eq!(Metadata::decode(&bytes), Err(WireError::Version(VERSION + 1)));
    assert_eq!(Metadata::decode(&[0; MAX_METADATA_BYTES + 1]), Err(WireError::Long));
}

#[test]
fn metadata_with_texts_too_long_or_bytes_too_many_is_refused() {
    let mut bytes = Metadata { offers: vec![Offer::of(BackendKind::Tcp)], ..metadata() }.encode();
    let text = bytes.len() - 1;
    bytes[text] = MAX_WIRE_TEXT_BYTES as u8 + 1;
    bytes.extend([b'x'; MAX_WIRE_TEXT_BYTES + 1]);
    assert_eq!(Metadata::decode(&bytes), Err(WireError::Long));
    bytes[text] = MAX_WIRE_TEXT_BYTES as u8;
    assert_eq!(Metadata::decode(&bytes), Err(WireError::Long), "a byte behind the end");
    bytes.pop();
    assert!(Metadata::decode(&bytes).is_ok());
}

fn descriptor() -> impl Strategy<Value = Descriptor> {
    (any::<u32>(), 0..1u64 << 40, 1..1u32 << 16).prop_map(|(region, offset, len)| Descriptor {
        region: RegionId(region),
        offset,
        len,
    })
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic_a_decoder(bytes in proptest::collection::vec(any::<u8>(), 0..700)) {
        let _ = Hello::decode(&bytes);
        let _ = Read::decode(&bytes);
        let _ = Metadata::decode(&bytes);
        let _ = decode_len(&bytes);
        let _ = decode_map(&bytes);
        if let Some(head) = bytes.first_chunk() {
            prop_assert!(Header::decode(head).is_err(), "random bytes are no frame");
        }
    }

    #[test]
    fn bytes_behind_good_starts_never_panic_a_decoder(
        tail in proptest::collection::vec(any::<u8>(), 0..200), cut in 0..100usize,
    ) {
        for good in [hello().encode(), metadata().encode(), encode_read(HandoffId(2), [].into_iter())] {
            let mut bytes = good[..cut.min(good.len())].to_vec();
            bytes.extend_from_slice(&tail);
            let _ = Hello::decode(&bytes);
            let _ = Metadata::decode(&bytes);
            let _ = Read::decode(&bytes);
        }
    }

    #[test]
    fn a_flipped_bit_in_a_control_frame_is_always_noticed(
        blocks in proptest::collection::vec(descriptor(), 1..40), at in any::<proptest::sample::Index>(), bit in 0..8u8,
    ) {
        let payload = encode_read(HandoffId(77), blocks.iter().copied());
        let mut frame = encode_frame(Kind::Read, Epoch(5), 6, &payload);
        let at = at.index(frame.len());
        frame[at] ^= 1 << bit;
        let (head, body) = split(&frame);
        let noticed = Header::decode(head).and_then(|header| header.verify(head, body));
        prop_assert!(noticed.is_err(), "byte {at} bit {bit}");
    }

    #[test]
    fn reads_round_trip(blocks in proptest::collection::vec(descriptor(), 1..MAX_READ_BLOCKS), id in any::<u128>()) {
        let bytes = encode_read(HandoffId(id), blocks.iter().copied());
        prop_assert_eq!(Read::decode(&bytes).unwrap(), Read { handoff: HandoffId(id), blocks });
    }
}
