//! Peers that speak the protocol and mean harm: requests and answers with good checks and bad contents.

use std::os::linux::net::SocketAddrExt;
use std::time::Duration;

use baton_config::{Epoch, HandoffId};
use baton_transfer::wire::control::{Attach, Lend, Notify, Take, Write};
use baton_transfer::wire::{
    HEADER_BYTES, Header, Hello, Kind, MAX_READ_BYTES, Metadata, WireError, decode_refusal, encode_frame,
    encode_read,
};
use baton_transfer::{
    BackendKind, Descriptor, Destination, LinkError, Refusal, RegionId, TransferError, block_digest,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::time::{Instant, timeout};
use tokio_util::task::TaskTracker;

use crate::support::{
    EPOCH, HANDOFF, OWNER, Owner, assert_in_place, bytes_at, deadline, memory, name, reader,
};

const LONG: Duration = Duration::from_secs(10);

/// A connection past its handshake that says what it likes.
struct Stranger<S>(S);

fn hello(owner: &Owner) -> Hello {
    let incarnation = Metadata::decode(&owner.metadata).unwrap().incarnation;
    Hello { from: name("stranger"), from_epoch: Epoch(1), to: name(OWNER), incarnation, nonce: None }
}

impl Stranger<TcpStream> {
    async fn meet(owner: &Owner) -> Self {
        Self(TcpStream::connect(owner.agent.local_address()).await.unwrap()).greet(owner).await
    }
}

impl Stranger<UnixStream> {
    /// As one who reads over shared memory.
    async fn beside(owner: &Owner) -> Self {
        let socket = format!("baton-transfer-{:032x}", hello(owner).incarnation);
        let address = std::os::unix::net::SocketAddr::from_abstract_name(socket).unwrap();
        let stream = std::os::unix::net::UnixStream::connect_addr(&address).unwrap();
        stream.set_nonblocking(true).unwrap();
        // What is passed beside the frames is not taken.
        Self(UnixStream::from_std(stream).unwrap()).greet(owner).await
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Stranger<S> {
    async fn greet(mut self, owner: &Owner) -> Self {
        self.say(Kind::Hello, 0, &hello(owner).encode()).await;
        assert_eq!(self.hear().await.unwrap().kind, Kind::Welcome);
        self
    }

    async fn say(&mut self, kind: Kind, seq: u64, payload: &[u8]) {
        self.say_in(EPOCH, kind, seq, payload).await;
    }

    async fn say_in(&mut self, epoch: Epoch, kind: Kind, seq: u64, payload: &[u8]) {
        self.0.write_all(&encode_frame(kind, epoch, seq, payload)).await.unwrap();
    }

    /// The header that comes next; nothing when the connection was closed. What follows it is skipped.
    async fn hear(&mut self) -> Option<Header> {
        let mut head = [0; HEADER_BYTES];
        timeout(LONG, self.0.read_exact(&mut head)).await.expect("neither an answer nor an end").ok()?;
        let header = Header::decode(&head).unwrap();
        let mut payload = vec![0; header.len as usize];
        self.0.read_exact(&mut payload).await.ok()?;
        Some(header)
    }

    /// What a request is refused with; nothing when the connection was closed over it.
    async fn refused(&mut self, kind: Kind, payload: &[u8]) -> Option<Refusal> {
        self.say(kind, 9, payload).await;
        let header = self.hear().await?;
        assert_eq!((header.kind, header.seq), (Kind::Refused, 9));
        Some(decode_refusal(&header).unwrap())
    }

    /// Asks for what it is refused, without taking an answer, until nothing more of it is taken.
    async fn flood(&mut self, kind: Kind, payload: &[u8]) {
        let many = encode_frame(kind, EPOCH, 1, payload).repeat(256);
        while timeout(Duration::from_millis(300), self.0.write_all(&many)).await.is_ok() {}
    }
}

fn at(region: RegionId, offset: u64, len: u32) -> Descriptor {
    Descriptor { region, offset, len }
}

fn read(blocks: &[Descriptor]) -> Vec<u8> {
    encode_read(HANDOFF, blocks.iter().copied())
}

#[tokio::test]
async fn requests_that_make_no_sense_are_refused_by_name_and_counted() {
    let owner = Owner::start(1 << 20).await;
    owner.granted(2, 4096);
    let region = owner.region;
    let good = at(region, 1, 4096);
    let mut stranger = Stranger::meet(&owner).await;
    let huge = vec![at(region, 0, MAX_READ_BYTES as u32); 1000];
    for bad in [
        read(&[]),
        read(&[at(region, 1, 0)]),
        read(&[at(region, u64::MAX - 3, 16)]),
        read(&huge),
        read(&[good])[..30].to_vec(),
        vec![],
    ] {
        assert_eq!(stranger.refused(Kind::Read, &bad).await, Some(Refusal::Malformed), "{bad:?}");
    }
    assert_eq!(owner.agent.stats().malformed, 6);
    for (bad, why) in [
        (at(region, 1 << 30, 16), Refusal::OutsideRegion),
        (at(RegionId(77), 0, 16), Refusal::OutsideRegion),
        (at(RegionId(u32::MAX), 0, 16), Refusal::OutsideRegion),
        (at(region, 4097, 4096), Refusal::OutsideGrant),
    ] {
        assert_eq!(stranger.refused(Kind::Read, &read(&[good, bad])).await, Some(why), "{bad:?}");
    }
    let counted = |reason| owner.agent.stats().refused(reason);
    assert_eq!((counted(Refusal::OutsideRegion), counted(Refusal::OutsideGrant)), (3, 1));
    assert_eq!(counted(Refusal::Malformed), 6);
    // And still it is served what it may have.
    stranger.say(Kind::Read, 3, &read(&[good])).await;
    assert_eq!(stranger.hear().await.unwrap().len, 4096);
    assert_eq!(owner.agent.stats().served_bytes().0, 4096);
}

#[tokio::test]
async fn frames_out_of_place_end_the_connection() {
    let owner = Owner::start(1 << 20).await;
    for (count, kind) in
        [Kind::Welcome, Kind::Refused, Kind::Written, Kind::Notified, Kind::Attached].into_iter().enumerate()
    {
        let mut stranger = Stranger::meet(&owner).await;
        stranger.say(kind, 1, &[]).await;
        assert!(stranger.hear().await.is_none(), "{kind:?}");
        let deadline = Instant::now() + LONG;
        while owner.agent.stats().malformed <= count as u64 {
            assert!(Instant::now() < deadline, "{kind:?} is not counted");
            tokio::task::yield_now().await;
        }
    }
    // A connection for blocks is none for control, and the other way round.
    owner.granted(1, 64);
    let mut stranger = Stranger::meet(&owner).await;
    stranger.say(Kind::Read, 1, &read(&[at(owner.region, 1, 64)])).await;
    assert_eq!(stranger.hear().await.unwrap().kind, Kind::Data);
    assert_eq!(stranger.refused(Kind::Notify, &[0; 16]).await, None);
    let mut stranger = Stranger::meet(&owner).await;
    let attach = Attach { backend: BackendKind::Ucx, wire: String::new(), address: vec![] };
    assert!(stranger.refused(Kind::Attach, &attach.encode()).await.is_some());
    assert_eq!(
        stranger.refused(Kind::Read, &read(&[at(owner.region, 1, 64)])).await,
        Some(Refusal::Malformed)
    );
    assert_eq!(stranger.refused(Kind::Notify, &[0; 3]).await, Some(Refusal::Malformed));
}

#[tokio::test]
async fn writes_that_lie_leave_nothing_outside_their_grant() {
    let owner = Owner::start(4096).await;
    let target = memory(1 << 20);
    let region = owner.agent.register(target.clone()).unwrap();
    let granted = at(region, 8192, 4096);
    let second = owner.agent.register(memory(4096)).unwrap();
    owner.agent.grant_write(HANDOFF, &[granted, at(second, 0, 4096)]);
    let announce = |blocks: Vec<Descriptor>| Write {
        handoff: HANDOFF,
        first: 0,
        blocks,
        digests: vec![],
        windows: vec![],
    };
    let data = |len: u32, seq: u64| {
        let header = Header { kind: Kind::Data, code: 0, len, epoch: EPOCH, seq };
        [&header.encode(&[])[..], &vec![0xaa; len as usize]].concat()
    };
    for (blocks, why) in [
        (vec![at(region, 8191, 4096)], Refusal::OutsideGrant),
        (vec![granted, at(region, 0, 16)], Refusal::OutsideGrant),
        (vec![at(region, 8192, 64), at(region, 8200, 64)], Refusal::Overlap),
        (vec![at(owner.region, 0, 64)], Refusal::OutsideGrant),
        // Each granted, but one frame goes to one region.
        (vec![at(second, 0, 64), at(region, 8192, 64)], Refusal::Malformed),
    ] {
        let mut stranger = Stranger::meet(&owner).await;
        let len = blocks.iter().map(|block| block.len).sum();
        let write = announce(blocks.clone()).encode();
        stranger.say(Kind::Write, 5, &write).await;
        stranger.0.write_all(&data(len, 5)).await.unwrap();
        let header = stranger.hear().await.unwrap();
        assert_eq!(decode_refusal(&header), Ok(why), "{blocks:?}");
    }
    let granted_only = announce(vec![granted]).encode();
    // Bytes that are not announced, or not those announced.
    for follows in
        [data(4095, 5), data(4097, 5), data(4096, 6), encode_frame(Kind::Read, EPOCH, 5, &read(&[granted]))]
    {
        let mut stranger = Stranger::meet(&owner).await;
        stranger.say(Kind::Write, 5, &granted_only).await;
        stranger.0.write_all(&follows).await.unwrap();
        assert!(stranger.hear().await.is_none());
    }
    // An announcement that cannot be read.
    let mut stranger = Stranger::meet(&owner).await;
    stranger.say(Kind::Write, 5, &granted_only[..25]).await;
    assert!(stranger.hear().await.is_none());
    assert!(bytes_at(&target, 0, 1 << 20).iter().all(|byte| *byte == 0), "nothing was written");
    // A digest that does not fit: the bytes are in their place, which was granted, and do not count.
    let mut stranger = Stranger::meet(&owner).await;
    let wrong = Write { digests: vec![block_digest(seed(), &[0xaa; 4096]) ^ 1], ..announce(vec![granted]) };
    stranger.say(Kind::Write, 5, &wrong.encode()).await;
    stranger.0.write_all(&data(4096, 5)).await.unwrap();
    assert_eq!(decode_refusal(&stranger.hear().await.unwrap()), Ok(Refusal::Corrupt));
    let right = Write { digests: vec![block_digest(seed(), &[0xaa; 4096])], ..announce(vec![granted]) };
    stranger.say(Kind::Write, 6, &right.encode()).await;
    stranger.0.write_all(&data(4096, 6)).await.unwrap();
    assert_eq!(stranger.hear().await.unwrap().kind, Kind::Written);
    assert!(bytes_at(&target, 0, 8192).iter().chain(&bytes_at(&target, 12_288, 4096)).all(|byte| *byte == 0));
    assert_eq!((owner.agent.stats().taken_bytes().0, owner.agent.stats().checksum_mismatches), (4096, 1));
}

/// Whoever was let in in this life is not served what it asks of another.
#[tokio::test]
async fn requests_of_another_life_are_stale_on_every_connection() {
    let owner = Owner::start(4096).await;
    let blocks: Vec<Descriptor> = owner.granted(1, 64).iter().map(|block| block.source).collect();
    let target = memory(4096);
    let place = at(owner.agent.register(target.clone()).unwrap(), 0, 64);
    owner.agent.grant_write(HANDOFF, &[place]);
    let write = Write { handoff: HANDOFF, first: 0, blocks: vec![place], digests: vec![], windows: vec![] };
    let lent = [0xaa_u8; 64];
    let witness = 77u128.to_le_bytes();
    let lend = Lend {
        number: 0,
        has_file: false,
        address: lent.as_ptr().addr() as u64,
        len: 64,
        witness_at: witness.as_ptr().addr() as u64,
        witness: 77,
    };
    let assert_stale = |heard: Option<Header>| {
        let header = heard.unwrap();
        assert_eq!((header.kind, decode_refusal(&header)), (Kind::Refused, Err(Some(EPOCH))));
    };
    for other in [Epoch(EPOCH.0 - 1), Epoch(EPOCH.0 + 1)] {
        let mut stranger = Stranger::meet(&owner).await;
        stranger.say_in(other, Kind::Read, 1, &read(&blocks)).await;
        assert_stale(stranger.hear().await);
        stranger.say_in(other, Kind::Write, 2, &write.encode()).await;
        let data = Header { kind: Kind::Data, code: 0, len: 64, epoch: other, seq: 2 };
        stranger.0.write_all(&[&data.encode(&[])[..], &lent].concat()).await.unwrap();
        assert_stale(stranger.hear().await);
        let mut beside = Stranger::beside(&owner).await;
        beside.say(Kind::Lend, 1, &lend.encode()).await;
        assert_eq!(beside.hear().await.unwrap().kind, Kind::Lent);
        let take = Take { number: 0, from: vec![0], write: write.clone() };
        beside.say_in(other, Kind::Write, 2, &take.encode()).await;
        assert_stale(beside.hear().await);
    }
    assert!(bytes_at(&target, 0, 4096).iter().all(|byte| *byte == 0), "nothing was written");
}

/// Of two blocks in one place both would have their digests when they were copied, and one would not be there.
#[tokio::test]
async fn lent_memory_is_not_copied_to_one_place_twice() {
    let owner = Owner::start(4096).await;
    let target = memory(1 << 16);
    let region = owner.agent.register(target.clone()).unwrap();
    owner.agent.grant_write(HANDOFF, &[at(region, 4096, 4096)]);
    let lent: Vec<u8> = (0..128).map(|byte| byte ^ 0x55).collect();
    let (witness, mut stranger) = (0x1234_5678_u128.to_le_bytes(), Stranger::beside(&owner).await);
    let lend = Lend {
        number: 0,
        has_file: false,
        address: lent.as_ptr().addr() as u64,
        len: 128,
        witness_at: witness.as_ptr().addr() as u64,
        witness: u128::from_le_bytes(witness),
    };
    stranger.say(Kind::Lend, 1, &lend.encode()).await;
    assert_eq!(stranger.hear().await.unwrap().kind, Kind::Lent);
    let take = |first: u64, second: u64, verify: bool| {
        let digest = |index: u32, from: usize| {
            block_digest(baton_transfer::DigestSeed { index, ..seed() }, &lent[from..from + 64])
        };
        let digests = if verify { vec![digest(0, 0), digest(1, 64)] } else { vec![] };
        let blocks = vec![at(region, first, 64), at(region, second, 64)];
        let write = Write { handoff: HANDOFF, first: 0, blocks, digests, windows: vec![] };
        Take { number: 0, from: vec![0, 64], write }.encode()
    };
    for verify in [false, true] {
        for (first, second) in [(4096, 4096), (4096, 4159), (4159, 4096)] {
            let refused = stranger.refused(Kind::Write, &take(first, second, verify)).await;
            assert_eq!(refused, Some(Refusal::Overlap), "{first} {second}");
        }
    }
    let outside = Take { from: vec![0, 65], ..Take::decode(&take(4096, 4160, false)).unwrap() };
    assert_eq!(stranger.refused(Kind::Write, &outside.encode()).await, Some(Refusal::Malformed), "not lent");
    let another = Take { number: 1, ..Take::decode(&take(4096, 4160, false)).unwrap() };
    assert_eq!(stranger.refused(Kind::Write, &another.encode()).await, Some(Refusal::Malformed), "not lent");
    assert!(bytes_at(&target, 0, 1 << 16).iter().all(|byte| *byte == 0), "nothing was written");
    assert_eq!(stranger.refused(Kind::Write, &take(0, 64, false)).await, Some(Refusal::OutsideGrant));
    let counted = |reason| owner.agent.stats().refused(reason);
    assert_eq!((counted(Refusal::Overlap), counted(Refusal::OutsideGrant)), (6, 1));
    stranger.say(Kind::Write, 2, &take(4096, 4160, true)).await;
    assert_eq!(stranger.hear().await.unwrap().kind, Kind::Written);
    assert_eq!(bytes_at(&target, 4096, 128), lent);
    // Digests are bound to the places in the whole write, and those that do not fit are said to be corrupt.
    let good = Take::decode(&take(4096, 4160, true)).unwrap();
    let later = Take { write: Write { first: 1, ..good.write.clone() }, ..good };
    assert_eq!(stranger.refused(Kind::Write, &later.encode()).await, Some(Refusal::Corrupt));
    assert_eq!(owner.agent.stats().checksum_mismatches, 2);
    // Memory that is not where it is said to be is not taken.
    let elsewhere = Lend { number: 3, witness: 1, ..lend };
    assert_eq!(stranger.refused(Kind::Lend, &elsewhere.encode()).await, Some(Refusal::Unreachable));
}

/// A peer that stops in the middle, whatever the owner waits for, does not keep it.
#[tokio::test]
async fn an_owner_that_closes_waits_for_nobody_who_stopped() {
    let owner = Owner::start(4096).await;
    let region = owner.agent.register(memory(1 << 16)).unwrap();
    owner.agent.grant_write(HANDOFF, &[at(region, 0, 4096)]);
    let write = |blocks| Write { handoff: HANDOFF, first: 0, blocks, digests: vec![], windows: vec![] };
    // Announces bytes that never come; sends half of those that are refused; takes no answer.
    let mut announces = Stranger::meet(&owner).await;
    announces.say(Kind::Write, 1, &write(vec![at(region, 0, 4096)]).encode()).await;
    let mut discarded = Stranger::meet(&owner).await;
    discarded.say(Kind::Write, 1, &write(vec![at(region, 8192, 4096)]).encode()).await;
    let data = Header { kind: Kind::Data, code: 0, len: 4096, epoch: EPOCH, seq: 1 };
    discarded.0.write_all(&data.encode(&[])).await.unwrap();
    discarded.0.write_all(&[1; 100]).await.unwrap();
    let mut deaf = Stranger::meet(&owner).await;
    deaf.flood(Kind::Read, &[]).await;
    let mut deaf_beside = Stranger::beside(&owner).await;
    deaf_beside.flood(Kind::Map, &u32::MAX.to_le_bytes()).await;
    let refused = owner.agent.stats().refused(Refusal::OutsideRegion);
    assert!(refused > 0 && owner.agent.stats().malformed > 0, "{:?}", owner.agent.stats());
    timeout(Duration::from_secs(5), owner.agent.clone().close()).await.expect("it waits for one of them");
}

fn seed() -> baton_transfer::DigestSeed {
    baton_transfer::DigestSeed { handoff: HANDOFF, epoch: EPOCH, index: 0 }
}

/// Frames of every kind with random contents and good checks, from many connections at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn well_formed_noise_harms_nobody() {
    let owner = Owner::start(1 << 20).await;
    let blocks = owner.granted(3, 1000);
    let target = memory(1 << 16);
    let region = owner.agent.register(target.clone()).unwrap();
    owner.agent.grant_write(HandoffId(3), &[at(region, 0, 1 << 16)]);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let notify = Notify { handoff: HANDOFF, payload: vec![0; 30] }.encode();
    for _ in 0..300 {
        let mut stranger = Stranger::meet(&owner).await;
        let mut bytes = Vec::new();
        for seq in 0..1 + random(6) {
            let kinds =
                [Kind::Read, Kind::Write, Kind::Notify, Kind::Attach, Kind::Key, Kind::Pack, Kind::Window];
            let kind = kinds[random(kinds.len() as u64) as usize];
            let mut payload = match random(3) {
                0 => read(&blocks.iter().map(|block| block.source).collect::<Vec<_>>()),
                1 => notify.clone(),
                _ => (0..random(200)).map(|_| random(256) as u8).collect(),
            };
            if !payload.is_empty() {
                let at = random(payload.len() as u64) as usize;
                payload[at] = random(256) as u8;
            }
            payload.truncate(kind.max_len() as usize);
            bytes.extend(encode_frame(kind, Epoch(EPOCH.0 + random(2)), seq, &payload));
        }
        let _ = stranger.0.write_all(&bytes).await;
        let _ = stranger.0.shutdown().await;
        let mut answers = Vec::new();
        let end = timeout(LONG, stranger.0.read_to_end(&mut answers)).await;
        assert!(end.is_ok(), "the connection hangs");
    }
    assert!(owner.agent.stats().malformed > 100, "{:?}", owner.agent.stats());
    assert!(bytes_at(&target, 0, 1 << 16).iter().all(|byte| *byte == 0));
    let reader = reader(BackendKind::Tcp).await;
    let session = owner.session(&reader).await.unwrap();
    let into = memory(1 << 20);
    session.read(HANDOFF, &blocks, Destination::Memory(&into), deadline()).await.unwrap();
    assert_in_place(&into, &blocks);
}

#[tokio::test]
async fn a_peer_that_connects_and_says_nothing_is_put_out() {
    let owner = Owner::start(4096).await;
    let mut silent = TcpStream::connect(owner.agent.local_address()).await.unwrap();
    let mut half = TcpStream::connect(owner.agent.local_address()).await.unwrap();
    half.write_all(&encode_frame(Kind::Hello, EPOCH, 0, &[1; 40])[..40]).await.unwrap();
    for stream in [&mut silent, &mut half] {
        let mut answer = Vec::new();
        timeout(LONG, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
        assert!(answer.is_empty());
    }
}

/// What a listener that means harm may answer to a read.
fn lies(len: u32) -> Vec<(&'static str, Vec<u8>)> {
    let data = |len: u32, epoch: Epoch, seq: u64| {
        Header { kind: Kind::Data, code: 0, len, epoch, seq }.encode(&[]).to_vec()
    };
    vec![
        ("another length", data(len + 1, EPOCH, 1)),
        ("the answer to another request", data(len, EPOCH, 2)),
        ("another life", data(len, Epoch(EPOCH.0 + 1), 1)),
        ("another kind", encode_frame(Kind::Written, EPOCH, 1, &[])),
        ("another kind of that length", {
            let read = Header { kind: Kind::Read, code: 0, len, epoch: EPOCH, seq: 1 };
            read.encode(&[]).to_vec()
        }),
        ("a head that fails its check", {
            let mut head = data(len, EPOCH, 1);
            head[12] ^= 1;
            head
        }),
        ("a hello", encode_frame(Kind::Hello, EPOCH, 1, &[0; 60])),
        ("no frame", vec![0x55; HEADER_BYTES]),
        ("a frame longer than any", {
            let mut head = data(len, EPOCH, 1);
            head[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
            head
        }),
    ]
}

#[tokio::test]
async fn a_listener_that_lies_breaks_its_own_link_only() {
    let owner = Owner::start(1 << 20).await;
    let blocks = owner.granted(1, 4096);
    for (lie, answer) in lies(4096) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut metadata = Metadata::decode(&owner.metadata).unwrap();
        metadata.address = listener.local_addr().unwrap();
        let tasks = TaskTracker::new();
        tasks.spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut head = [0; HEADER_BYTES];
                for say in
                    [encode_frame(Kind::Welcome, EPOCH, 0, &[]), [answer.clone(), vec![0xaa; 9000]].concat()]
                {
                    stream.read_exact(&mut head).await.unwrap();
                    let mut payload = vec![0; Header::decode(&head).unwrap().len as usize];
                    stream.read_exact(&mut payload).await.unwrap();
                    let _ = stream.write_all(&say).await;
                }
            }
        });
        let reader = reader(BackendKind::Tcp).await;
        let session = reader.connect(&name(OWNER), EPOCH, &metadata.encode()).await.unwrap();
        let outcome = session
            .read(HANDOFF, &blocks, Destination::Sink(&|_: usize, _: &[u8]| panic!("delivered")), deadline())
            .await;
        match outcome {
            Err(TransferError::Stale { current, .. }) if lie == "another life" => {
                assert_eq!(current, Some(Epoch(EPOCH.0 + 1)));
                continue;
            }
            Err(TransferError::Link { source: LinkError::Protocol(error), .. }) => {
                assert!(!matches!(error, WireError::Version(_) | WireError::Forged), "{lie}: {error}");
            }
            other => panic!("{lie}: {other:?}"),
        }
        assert_eq!(reader.stats().malformed, 1, "{lie}");
    }
}
