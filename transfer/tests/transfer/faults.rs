//! What breaks on the way, and what must not come of it.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::time::Duration;

use baton_config::Epoch;
use baton_transfer::wire::{HEADER_BYTES, Header, Kind};
use baton_transfer::{
    Agent, AgentOptions, BackendKind, BlockRead, BlockWrite, Destination, LinkError, Refusal, Session,
    TransferError,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::proxy::{Mode, Proxy};
use crate::support::{
    EPOCH, HANDOFF, OWNER, Owner, assert_in_place, byte, bytes_at, deadline, memory, name, reader,
};

const LEN: u32 = 64 << 10;
const BLOCKS: usize = 40;
/// Bytes of the handshake's answer, which come before the bytes of the first read.
const WELCOME_BYTES: usize = HEADER_BYTES;

struct Broken {
    proxy: Proxy,
    owner: Owner,
    reader: Agent,
    session: Session,
}

async fn broken() -> Broken {
    let proxy = Proxy::start().await;
    let mut options = AgentOptions::new(name(OWNER));
    options.advertise = Some(proxy.address);
    let owner = Owner::start_with(options, 16 << 20).await;
    proxy.lead_to(owner.agent.local_address());
    let reader = reader(BackendKind::Tcp).await;
    let session = owner.session(&reader).await.unwrap();
    Broken { proxy, owner, reader, session }
}

#[tokio::test]
async fn a_flipped_bit_is_noticed_never_delivered_and_gone_at_the_next_read() {
    let Broken { proxy, owner, reader, session } = broken().await;
    let blocks = owner.granted(BLOCKS, LEN);
    let at = WELCOME_BYTES + HEADER_BYTES + 7 * LEN as usize + 100;
    proxy.set(Mode::FlipOnce(at));
    let seen = Mutex::new(BTreeSet::new());
    let sink = |index: usize, bytes: &[u8]| {
        assert_eq!(bytes[100], byte(blocks[index].source.offset as usize + 100), "block {index}");
        seen.lock().unwrap().insert(index);
    };
    match session.read(HANDOFF, &blocks, Destination::Sink(&sink), deadline()).await {
        Err(TransferError::Integrity { index: 7, corrupt, .. }) => assert_eq!(corrupt, [7]),
        other => panic!("{other:?}"),
    }
    assert_eq!((seen.lock().unwrap().len(), proxy.flips()), (BLOCKS - 1, 1));
    session.read(HANDOFF, &blocks[7..8], Destination::Memory(&memory(16 << 20)), deadline()).await.unwrap();
    assert_eq!(reader.stats().checksum_mismatches, 1);
}

#[tokio::test]
async fn a_flipped_bit_in_a_header_breaks_the_link_and_nothing_else() {
    let Broken { proxy, owner, session, .. } = broken().await;
    let blocks = owner.granted(BLOCKS, LEN);
    proxy.set(Mode::FlipOnce(WELCOME_BYTES + 9));
    let into = memory(16 << 20);
    let outcome = session.read(HANDOFF, &blocks, Destination::Memory(&into), deadline()).await;
    // The header is read before any byte is counted, so the read was tried again on a new stream.
    assert!(outcome.is_ok(), "{outcome:?}");
    assert_eq!(proxy.flips(), 1);
    assert_in_place(&into, &blocks);
}

#[tokio::test]
async fn a_peer_that_falls_silent_costs_the_deadline_and_writes_nothing_afterwards() {
    let Broken { proxy, owner, session, .. } = broken().await;
    let blocks = owner.granted(BLOCKS, LEN);
    proxy.set(Mode::Hold(WELCOME_BYTES + HEADER_BYTES + 3 * LEN as usize + 5));
    let into = memory(16 << 20);
    let start = Instant::now();
    let until = start + Duration::from_millis(300);
    match session.read(HANDOFF, &blocks, Destination::Memory(&into), until).await {
        Err(TransferError::Deadline { moved, .. }) => assert_eq!(moved.0, 3 * u64::from(LEN) + 5),
        other => panic!("{other:?}"),
    }
    assert!(start.elapsed() >= Duration::from_millis(300));
    assert_silent_after(&proxy, &into).await;
    session.read(HANDOFF, &blocks, Destination::Memory(&into), deadline()).await.unwrap();
    assert_in_place(&into, &blocks);
}

#[tokio::test]
async fn a_dropped_read_writes_nothing_afterwards() {
    let Broken { proxy, owner, session, .. } = broken().await;
    let blocks = owner.granted(BLOCKS, LEN);
    proxy.set(Mode::Hold(WELCOME_BYTES + HEADER_BYTES + 2 * LEN as usize));
    let into = memory(16 << 20);
    let last = blocks[1];
    {
        let read = session.read(HANDOFF, &blocks, Destination::Memory(&into), deadline());
        tokio::pin!(read);
        // Polled until the second block is in place: in the middle of the read.
        let end = last.to + LEN as usize - 1;
        let wanted = byte(last.source.offset as usize + LEN as usize - 1);
        let started = async {
            while bytes_at(&into, end, 1) != [wanted] {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::select! {
            biased;
            outcome = &mut read => panic!("it was held back: {outcome:?}"),
            () = started => {}
        }
    }
    assert_silent_after(&proxy, &into).await;
    session.read(HANDOFF, &blocks, Destination::Memory(&into), deadline()).await.unwrap();
    assert_in_place(&into, &blocks);
}

/// Reuses the destination, lets the held bytes go, and sees that none of them lands there.
async fn assert_silent_after(proxy: &Proxy, into: &baton_transfer::HostMemory) {
    into.write(0, &vec![0xee; into.len()]);
    proxy.set(Mode::Relay);
    // The reader has closed the stream: the proxy finds that out, whatever it still had to deliver.
    tokio::time::timeout(Duration::from_secs(20), proxy.until_open(|open| *open == 0)).await.unwrap();
    assert!(bytes_at(into, 0, into.len() as u32).iter().all(|byte| *byte == 0xee), "written after the end");
}

#[tokio::test]
async fn a_cut_link_says_how_far_it_came() {
    let Broken { proxy, owner, session, .. } = broken().await;
    let blocks = owner.granted(BLOCKS, LEN);
    proxy.set(Mode::Cut(WELCOME_BYTES + HEADER_BYTES + LEN as usize));
    match session.read(HANDOFF, &blocks, Destination::Memory(&memory(16 << 20)), deadline()).await {
        Err(TransferError::Link { moved, source: LinkError::Closed | LinkError::Io { .. }, .. }) => {
            assert_eq!(moved.0, u64::from(LEN));
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_stalled_reader_does_not_hold_up_another() {
    let Broken { proxy, owner, session, .. } = broken().await;
    let blocks = owner.granted(3, 4 << 20 >> 1);
    proxy.set(Mode::Hold(WELCOME_BYTES + HEADER_BYTES + 10));
    let (stuck, fine) = (memory(16 << 20), memory(16 << 20));
    let stalled = session.read(HANDOFF, &blocks, Destination::Memory(&stuck), deadline());
    tokio::pin!(stalled);
    assert!(futures_util::poll!(stalled.as_mut()).is_pending());
    let other = Agent::start(AgentOptions::new(name("decode-7"))).await.unwrap();
    let mut direct = baton_transfer::wire::Metadata::decode(&owner.metadata).unwrap();
    direct.address = owner.agent.local_address();
    direct.host ^= 1;
    let second = other.connect(&name(OWNER), EPOCH, &direct.encode()).await.unwrap();
    assert_eq!(second.path().backend, BackendKind::Tcp);
    for _ in 0..20 {
        tokio::select! {
            biased;
            outcome = &mut stalled => panic!("it was held back: {outcome:?}"),
            outcome = second.read(HANDOFF, &blocks, Destination::Memory(&fine), deadline()) => outcome.unwrap(),
        };
    }
    assert_in_place(&fine, &blocks);
}

#[tokio::test]
async fn revoking_ends_a_read_that_is_being_served() {
    let Broken { proxy, owner, session, .. } = broken().await;
    // More than the sockets in between can hold, so that the owner is in the middle of sending.
    let blocks = owner.granted(2, 3 << 20);
    let place = |(at, block): (usize, &BlockRead)| BlockRead { to: at * (3 << 20), ..*block };
    let many: Vec<_> = blocks.iter().cycle().take(32).enumerate().map(place).collect();
    proxy.set(Mode::Hold(WELCOME_BYTES + HEADER_BYTES + 10));
    let into = memory(32 * (3 << 20));
    let read = session.read(HANDOFF, &many, Destination::Memory(&into), deadline());
    tokio::pin!(read);
    let started = async {
        while bytes_at(&into, 0, 1) != [byte(blocks[0].source.offset as usize)] {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::select! {
        biased;
        outcome = &mut read => panic!("it was held back: {outcome:?}"),
        () = started => {}
    }
    tokio::time::timeout(Duration::from_secs(10), owner.agent.revoke(HANDOFF).settled()).await.unwrap();
    proxy.set(Mode::Relay);
    let outcome = read.await;
    // Of the streams that share the read, one may have been asked for its blocks only after the grant had ended.
    let is_ended = |error: &TransferError| match error {
        TransferError::Link { .. } => true,
        TransferError::Refused { refusal, .. } => *refusal == Refusal::NotGranted,
        _ => false,
    };
    assert!(outcome.as_ref().is_err_and(is_ended), "{outcome:?}");
}

#[tokio::test]
async fn the_end_of_a_life_ends_what_waits_for_a_peer() {
    let Broken { proxy, owner, reader, session } = broken().await;
    let blocks = owner.granted(BLOCKS, LEN);
    let to = blocks[0].source;
    owner.agent.grant_write(HANDOFF, &[to]);
    let (into, from, written) = (memory(16 << 20), memory(LEN as usize), [BlockWrite { from: 0, to }]);
    proxy.set(Mode::Hold(WELCOME_BYTES));
    let read = session.read(HANDOFF, &blocks, Destination::Memory(&into), deadline());
    let write = session.write(HANDOFF, &written, &from, deadline());
    let waiting = futures_util::future::join(read, write);
    tokio::pin!(waiting);
    let until = Instant::now() + Duration::from_millis(100);
    assert!(tokio::time::timeout_at(until, waiting.as_mut()).await.is_err(), "nothing comes back");
    reader.set_epoch(Epoch(7));
    let (read, write) = tokio::time::timeout(Duration::from_secs(10), waiting).await.unwrap();
    for outcome in [read, write] {
        assert!(matches!(outcome, Err(TransferError::Link { source: LinkError::Closed, .. })), "{outcome:?}");
    }
}

#[tokio::test]
async fn garbage_at_the_listener_harms_nobody() {
    let owner = Owner::start(1 << 20).await;
    let mut seed = 42u64;
    let mut garbage = |len: usize| -> Vec<u8> {
        let mut next = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) as u8
        };
        (0..len).map(|_| next()).collect()
    };
    let header = |kind, len| Header { kind, code: 0, len, epoch: EPOCH, seq: 1 }.encode(&[]).to_vec();
    let mut inputs = vec![
        garbage(1),
        garbage(31),
        garbage(32),
        garbage(100_000),
        b"GET / HTTP/1.1\r\nhost: somewhere\r\n\r\n".to_vec(),
        header(Kind::Data, 1 << 30),
        header(Kind::Hello, 100),
        header(Kind::Read, 0),
        header(Kind::Welcome, 8),
    ];
    for bad in [4, 5, 8, 20] {
        let mut hello = header(Kind::Hello, 20);
        hello[bad] ^= 0xff;
        hello.extend(garbage(20));
        inputs.push(hello);
    }
    for input in inputs {
        let mut stream = TcpStream::connect(owner.agent.local_address()).await.unwrap();
        stream.write_all(&input).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        let end = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut answer)).await;
        assert!(end.is_ok(), "the listener neither answers nor closes after {} bytes", input.len());
        assert!(answer.is_empty(), "{answer:?}");
    }
    let reader = reader(BackendKind::Tcp).await;
    let session = owner.session(&reader).await.unwrap();
    let blocks = owner.granted(3, 1000);
    let into = memory(1 << 20);
    session.read(HANDOFF, &blocks, Destination::Memory(&into), deadline()).await.unwrap();
    assert_in_place(&into, &blocks);
}

#[tokio::test]
async fn a_listener_that_never_answers_is_no_session() {
    let proxy = Proxy::start().await;
    proxy.set(Mode::Hold(0));
    let mut options = AgentOptions::new(name(OWNER));
    options.advertise = Some(proxy.address);
    let owner = Owner::start_with(options, 1 << 20).await;
    proxy.lead_to(owner.agent.local_address());
    let reader = reader(BackendKind::Tcp).await;
    let outcome = tokio::time::timeout(Duration::from_secs(10), owner.session(&reader)).await.unwrap();
    assert!(matches!(outcome, Err(baton_transfer::ConnectError::Link { .. })), "{outcome:?}");
    reader.set_epoch(Epoch(7));
}
