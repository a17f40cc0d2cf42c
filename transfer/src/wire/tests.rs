mod fuzz;

use proptest::prelude::*;

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
