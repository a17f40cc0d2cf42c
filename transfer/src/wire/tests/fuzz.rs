//! Every decoder against bytes that were good once: a seeded loop that keeps what leads somewhere new.
//!
//! Inputs are mutated from a corpus that starts with one good input per decoder. What an input led to (the error, or
//! the shape of what was decoded) is the coverage that guides the loop: inputs that reach a new outcome join the corpus.
//! What is decoded must encode to the very bytes it came from, so nothing has two meanings.

use std::collections::HashSet;
use std::fmt::Debug;

use baton_config::HandoffId;

use super::*;
use crate::backend::frames::{FrameReader, FrameWriter};
use crate::wire::ask::{ASK_MAX_BLOCKS, ASK_MAX_BYTES, Ask, TICKET_BYTES, answer_head, decode_answer_head};
use crate::wire::control::{
    Attach, Attached, Key, KeyIs, Lend, Notify, OpenWindow, Pack, Take, Window, WindowIs, Write,
    decode_fence, encode_fence,
};

const SEED: u64 = 0x6261_746f_6e5f_6b76;
const ROUNDS: usize = 20_000;
const CORPUS_MAX: usize = 256;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }

    /// One of the values at which lengths, counts and offsets go wrong.
    fn edge(&mut self) -> u64 {
        match self.below(6) {
            0 => 0,
            1 => u64::MAX - self.next() % 3,
            2 => 1 << (self.next() % 64),
            3 => (1 << (self.next() % 64)) - 1,
            4 => MAX_READ_BYTES - 1 + self.next() % 3,
            _ => self.next() % 5000,
        }
    }

    fn mutate(&mut self, bytes: &mut Vec<u8>, other: &[u8]) {
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len() + 1);
            let len = 1 << self.below(4);
            match self.below(8) {
                0 if !bytes.is_empty() => {
                    let at = self.below(bytes.len());
                    bytes[at] ^= 1 << self.below(8);
                }
                1 => bytes.truncate(at),
                2 => bytes.extend((0..len).map(|_| self.next() as u8)),
                3 if at + 8 <= bytes.len() => {
                    let width = [1, 2, 4, 8][self.below(4)];
                    bytes[at..at + width].copy_from_slice(&self.edge().to_le_bytes()[..width]);
                }
                4 => drop(bytes.drain(at..(at + len).min(bytes.len()))),
                5 => {
                    let from = self.below(other.len() + 1);
                    let piece = other[from..(from + 8 * len).min(other.len())].to_vec();
                    bytes.splice(at..at, piece);
                }
                6 => {
                    let piece = bytes[at..(at + 4 * len).min(bytes.len())].to_vec();
                    bytes.splice(at..at, piece);
                }
                _ => bytes.splice(at..at, [self.next() as u8]).for_each(drop),
            }
        }
    }
}

/// Runs `decode`, which encodes what it decoded back, over mutations of `good`.
pub(crate) fn fuzz<T: Debug, E: Debug>(
    name: &str,
    good: &[Vec<u8>],
    decode: impl Fn(&[u8]) -> Result<T, E>,
    encode: impl Fn(&T) -> Vec<u8>,
) {
    let mut random = Random(SEED ^ XxHash3_64::oneshot(name.as_bytes()));
    let mut corpus = good.to_vec();
    let mut outcomes: HashSet<String> = HashSet::new();
    let mut decoded = 0;
    for bytes in good {
        decode(bytes).unwrap_or_else(|error| panic!("{name}: a good input: {error:?}"));
    }
    for round in 0..ROUNDS {
        let mut bytes = corpus[random.below(corpus.len())].clone();
        let other = corpus[random.below(corpus.len())].clone();
        random.mutate(&mut bytes, &other);
        let outcome = match decode(&bytes) {
            Ok(value) => {
                assert_eq!(encode(&value), bytes, "{name}, round {round}: two encodings of {value:?}");
                decoded += 1;
                // Its shape: how long it is, to the power of two, and how many parts it has.
                format!("{} {}", bytes.len().ilog2(), format!("{value:?}").matches('{').count().min(20))
            }
            Err(error) => format!("{error:?} {}", bytes.len().min(64)),
        };
        if outcomes.insert(outcome) && corpus.len() < CORPUS_MAX {
            corpus.push(bytes);
        }
    }
    assert!(outcomes.len() > 3 && decoded > 0, "{name}: the loop went nowhere: {outcomes:?}");
}

fn at(region: u32, offset: u64, len: u32) -> Descriptor {
    Descriptor { region: RegionId(region), offset, len }
}

fn write() -> Write {
    let blocks = vec![at(1, 4096, 512), at(1, 0, 77)];
    Write { handoff: HandoffId(9), first: 3, blocks, digests: vec![1, u64::MAX], windows: vec![7, 8] }
}

#[test]
fn handshakes_and_metadata() {
    let with_nonce = Hello { nonce: Some([9; NONCE_BYTES]), ..hello() };
    let good = [hello().encode(), with_nonce.encode()];
    fuzz("hello", &good, Hello::decode, Hello::encode);
    // Backends of later builds are passed over, and addresses have several spellings: only stable when encoded again.
    let again = |bytes: &[u8]| {
        let first = Metadata::decode(bytes)?;
        assert_eq!(Metadata::decode(&first.encode()).as_ref(), Ok(&first));
        assert!(first.offers.len() <= bytes.len());
        Ok::<_, WireError>((first, bytes.to_vec()))
    };
    fuzz("metadata", &[metadata().encode()], again, |(_, bytes)| bytes.clone());
}

#[test]
fn lists_of_blocks() {
    let blocks = [at(1, 0, 16), at(2, 1 << 40, 4096), at(u32::MAX, 5, 1)];
    let good = [
        encode_read(HandoffId(u128::MAX), blocks.into_iter()),
        encode_read(HandoffId(1), vec![at(1, 0, 1); MAX_READ_BLOCKS].into_iter()),
    ];
    fuzz("read", &good, Read::decode, |read| encode_read(read.handoff, read.blocks.iter().copied()));
    let unverified = Write { digests: Vec::new(), windows: Vec::new(), ..write() };
    fuzz("write", &[write().encode(), unverified.encode()], Write::decode, Write::encode);
    let lend = Lend { number: 7, has_file: true, address: 1 << 40, len: 9, witness_at: 3, witness: 1 << 99 };
    fuzz("lend", &[lend.encode()], Lend::decode, Lend::encode);
    let take = Take { number: 2, from: vec![5; write().blocks.len()], write: write() };
    fuzz("take", &[take.encode()], Take::decode, Take::encode);
}

#[test]
fn requests_of_fabrics() {
    let backend = BackendKind::Libfabric;
    let attach = Attach { backend, wire: "tcp;ofi_rxm".to_owned(), address: vec![7; 60] };
    fuzz("attach", &[attach.encode()], Attach::decode, Attach::encode);
    let attached = Attached { ticket: 1 << 99, address: vec![8; 16] };
    fuzz("attached", &[attached.encode()], Attached::decode, Attached::encode);
    fuzz("key", &[Key { backend, region: RegionId(3) }.encode()], Key::decode, Key::encode);
    let key = KeyIs { len: 1 << 30, base: 0, key: vec![1; 48] };
    fuzz("key is", &[key.encode()], KeyIs::decode, KeyIs::encode);
    let pack = Pack::encode(backend, 77, HandoffId(1), [at(1, 0, 16)].into_iter());
    fuzz("pack", &[pack], Pack::decode, |pack| {
        Pack::encode(pack.backend, pack.tag, pack.read.handoff, pack.read.blocks.iter().copied())
    });
    let again = |window: &Window| {
        Window::encode(window.backend, window.write.handoff, window.write.blocks.iter().copied())
    };
    let window = Window::encode(backend, HandoffId(4), [at(1, 16, 16), at(2, 0, 5)].into_iter());
    fuzz("window", &[window], Window::decode, again);
    let window = |window| OpenWindow { window, range: at(1, 16, 16), base: 0, key: vec![3; 16] };
    let window = WindowIs { blocks: 2, windows: vec![window(4), window(5)] };
    fuzz("window is", &[window.encode()], WindowIs::decode, WindowIs::encode);
}

#[test]
fn requests_over_fabrics() {
    let ask = |kind, blocks: usize| {
        let blocks = vec![at(1, 64, 16); blocks];
        let who = (7 << 100, kind, Epoch(4));
        Ask::encode(who, (BackendKind::Ucx, 99), HandoffId(5), blocks.into_iter())
    };
    let longest = ask(Kind::Pack, ASK_MAX_BLOCKS);
    assert!(longest.len() <= ASK_MAX_BYTES && longest.len() + DESCRIPTOR_BYTES > ASK_MAX_BYTES);
    let encode = |Ask { ticket, kind, epoch, pack }: &Ask| {
        let blocks = pack.read.blocks.iter().copied();
        Ask::encode((*ticket, *kind, *epoch), (pack.backend, pack.tag), pack.read.handoff, blocks)
    };
    let good = [ask(Kind::Pack, 3), ask(Kind::Confirm, 1), longest];
    fuzz("ask", &good, Ask::decode, encode);
    // As above: changed, and signed anew.
    let resigned = |bytes: &[u8]| {
        let mut bytes = bytes.to_vec();
        let from = TICKET_BYTES.min(bytes.len());
        if let Some((head, payload)) = bytes[from..].split_first_chunk_mut() {
            let header = Header::decode(head).map(|header| Header { len: payload.len() as u32, ..header });
            *head = header.map_or(*head, |header| header.encode(payload));
        }
        bytes
    };
    let decode = |bytes: &[u8]| Ask::decode(&resigned(bytes)).map(|ask| (ask, bytes.to_vec()));
    let again = |(ask, bytes): &(Ask, Vec<u8>)| {
        assert_eq!(encode(ask), resigned(bytes));
        bytes.clone()
    };
    fuzz("signed ask", &good, decode, again);
    let head = answer_head(Kind::Data, 4096, Epoch(4), 99);
    assert_eq!(decode_answer_head(&head, 99).map(|header| header.len), Ok(4096));
    assert_eq!(decode_answer_head(&head, 98), Err(WireError::Field), "of another request");
}

#[test]
fn messages_and_numbers() {
    let notify = Notify { handoff: HandoffId(4), payload: vec![3; 40] };
    fuzz("notify", &[notify.encode()], Notify::decode, Notify::encode);
    fuzz("fence", &[encode_fence(HandoffId(8)).to_vec()], decode_fence, |id| encode_fence(*id).to_vec());
    fuzz("map", &[vec![1, 0, 0, 0]], decode_map, |region| region.0.to_le_bytes().to_vec());
    fuzz("len", &[vec![0; 8]], decode_len, |len| len.to_le_bytes().to_vec());
}

#[test]
fn headers() {
    let head = Header { kind: Kind::Read, code: 3, len: 99, epoch: Epoch(7), seq: 8 };
    let decode = |bytes: &[u8]| {
        let head = bytes.first_chunk().filter(|_| bytes.len() == HEADER_BYTES).ok_or(WireError::Short)?;
        let header = Header::decode(head)?;
        assert!(u64::from(header.len) <= header.kind.max_len());
        header.verify(head, &[])?;
        Ok::<_, WireError>(header)
    };
    let good = Header { len: 0, ..head }.encode(&[]).to_vec();
    // A check of 32 bits is rarely met by chance: the kind, the code, the numbers are changed and signed anew.
    fuzz(
        "header",
        &[good],
        |bytes| decode(&resigned(bytes)).map(|header| (header, bytes.to_vec())),
        |(_, bytes)| bytes.clone(),
    );
}

/// The bytes with a check that fits, where they are as long as a header.
fn resigned(bytes: &[u8]) -> Vec<u8> {
    let Ok(mut head) = <[u8; HEADER_BYTES]>::try_from(bytes) else { return bytes.to_vec() };
    if let Ok(header) = Header::decode(&head) {
        head = header.encode(&[]);
    }
    head.to_vec()
}

/// Frames that come in pieces of any size, with anything behind them, are read as if they came at once.
#[tokio::test]
async fn frames_off_a_stream() {
    let mut random = Random(SEED);
    for round in 0..600 {
        let mut writer = FrameWriter::default();
        let frames: Vec<(Kind, Vec<u8>)> = (0..random.below(5))
            .map(|_| {
                let kind = [Kind::Read, Kind::Notify, Kind::Attach, Kind::Hello][random.below(4)];
                let len = random.below(kind.max_len() as usize + 1);
                (kind, (0..len).map(|_| random.next() as u8).collect())
            })
            .collect();
        let mut bytes: Vec<u8> =
            frames.iter().flat_map(|(kind, payload)| writer.frame(*kind, Epoch(1), 5, payload)).collect();
        let whole = bytes.len();
        let spoilt = random.below(3) == 0;
        if spoilt {
            bytes.extend((0..HEADER_BYTES).map(|_| random.next() as u8));
        }
        let mut pieces = in_pieces(&bytes, &mut random);
        let mut reader = FrameReader::new();
        for (kind, payload) in &frames {
            let (header, read) = reader.next(&mut pieces).await.unwrap().unwrap();
            assert_eq!((header.kind, &read[..]), (*kind, &payload[..]), "round {round}, {whole} bytes");
        }
        match reader.next(&mut pieces).await {
            Ok(None) => assert!(!spoilt, "round {round}"),
            Ok(Some(frame)) => panic!("round {round}: {frame:?}"),
            Err(_) => assert!(spoilt, "round {round}"),
        }
    }
}

/// A stream that gives `bytes` in pieces.
fn in_pieces(bytes: &[u8], random: &mut Random) -> impl tokio::io::AsyncRead + Unpin + use<> {
    use tokio::io::AsyncReadExt;

    let mut pieces: Box<dyn tokio::io::AsyncRead + Unpin + Send> = Box::new(tokio::io::empty());
    let mut cuts: Vec<usize> = (0..random.below(12)).map(|_| random.below(bytes.len() + 1)).collect();
    cuts.extend([0, bytes.len()]);
    cuts.sort_unstable();
    for cut in cuts.windows(2) {
        pieces = Box::new(pieces.chain(std::io::Cursor::new(bytes[cut[0]..cut[1]].to_vec())));
    }
    pieces
}
