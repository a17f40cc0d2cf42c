//! Two agents in one process: what a read gives, what is refused, and by which name.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use baton_config::{Bytes, Epoch, HandoffId};
use baton_transfer::wire::{MAX_METADATA_BYTES, Metadata, Offer};
use baton_transfer::{
    Agent, AgentOptions, BackendKind, BlockRead, ConnectError, Descriptor, Destination, ErrorKind, Integrity,
    LinkError, PluginOptions, Refusal, RegionId, RegisterError, Session, StartError, Token, TransferError,
};

use crate::support::{
    EPOCH, HANDOFF, OWNER, Owner, assert_in_place, bytes_at, deadline, each, ends_first, memory, name,
    pattern, reader, reader_with,
};

async fn read(session: &Session, blocks: &[BlockRead]) -> Result<u64, TransferError> {
    let into = memory(32 << 20);
    let report = session.read(HANDOFF, blocks, Destination::Memory(&into), deadline()).await?;
    assert_in_place(&into, blocks);
    Ok(report.bytes.0)
}

fn is_fabric(backend: BackendKind) -> bool {
    matches!(backend, BackendKind::Libfabric | BackendKind::Ucx)
}

fn refusal(outcome: Result<u64, TransferError>) -> Refusal {
    match outcome {
        Err(TransferError::Refused { refusal, .. }) => refusal,
        other => panic!("not refused: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scattered_blocks_arrive_in_their_places() {
    for backend in each().await {
        let owner = Owner::start(40 << 20).await;
        let reader = reader(backend).await;
        let session = owner.session(&reader).await.unwrap();
        assert_eq!(session.path().backend, backend);
        for (count, len) in [(1, 1), (1, 4096), (64, 4096), (33, 65_537), (6, 3 << 20), (2500, 100)] {
            let blocks = owner.granted(count, len);
            let bytes = read(&session, &blocks).await.unwrap();
            assert_eq!(bytes, count as u64 * u64::from(len), "{count} x {len} over {backend}");
            owner.agent.revoke(HANDOFF).settled().await;
        }
        assert_eq!(read(&session, &[]).await.unwrap(), 0);
        let stats = session.stats();
        assert!(stats.bytes_per_second.is_some_and(|bandwidth| bandwidth > 0.0) && stats.latency.is_some());
        assert_eq!(reader.stats().read_bytes(backend), stats.bytes);
        reader.close().await;
        owner.agent.close().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sink_gets_every_block_once_and_whole() {
    for backend in each().await {
        let owner = Owner::start(40 << 20).await;
        let reader = reader(backend).await;
        let session = owner.session(&reader).await.unwrap();
        for (count, len) in [(1, 5), (300, 3000), (9, 200_000), (18, 1 << 20)] {
            let blocks = owner.granted(count, len);
            let seen = Mutex::new(BTreeSet::new());
            let sink = |index: usize, bytes: &[u8]| {
                let source = blocks[index].source;
                assert!(
                    bytes == pattern(source.offset as usize, source.len),
                    "block {index} of {count} x {len}"
                );
                assert!(seen.lock().unwrap().insert(index), "block {index} came twice");
            };
            session.read(HANDOFF, &blocks, Destination::Sink(&sink), deadline()).await.unwrap();
            assert_eq!(seen.into_inner().unwrap().len(), count);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_reads_share_a_session() {
    for backend in each().await {
        let owner = Owner::start(8 << 20).await;
        let reader = reader(backend).await;
        let session = owner.session(&reader).await.unwrap();
        let blocks = owner.granted(16, 10_000);
        let reads = (0..64).map(|_| read(&session, &blocks));
        for outcome in futures_util::future::join_all(reads).await {
            assert_eq!(outcome.unwrap(), 160_000);
        }
        assert_eq!(session.stats().bytes.0, 64 * 160_000);
    }
}

/// Two handoffs at once: one block of the one does not wait for all the blocks of the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_short_read_does_not_wait_behind_a_long_one() {
    const LONG_LEN: u32 = 2 << 20;
    const SHORT: HandoffId = HandoffId(5);
    let into = memory(64 * LONG_LEN as usize);
    for backend in each().await {
        let owner = Owner::start(8 << 20).await;
        let reader = reader_with(backend, Integrity::Off).await;
        let session = owner.session(&reader).await.unwrap();
        let source = owner.granted(1, LONG_LEN)[0];
        let long: Vec<_> = (0..64).map(|at| BlockRead { to: at * LONG_LEN as usize, ..source }).collect();
        let short = crate::support::blocks(owner.region, 1, 4096);
        owner.agent.grant(SHORT, vec![short[0].source]);
        let place = memory(4096);
        let was_first = ends_first(
            || session.read(SHORT, &short, Destination::Memory(&place), deadline()),
            || session.read(HANDOFF, &long, Destination::Memory(&into), deadline()),
        );
        assert!(was_first.await, "over {backend} it waited");
        assert_in_place(&place, &short);
    }
}

#[tokio::test]
async fn descriptors_outside_region_and_grant_are_refused_by_name() {
    for backend in each().await {
        let owner = Owner::start(1 << 20).await;
        let reader = reader(backend).await;
        let session = owner.session(&reader).await.unwrap();
        let blocks = owner.granted(4, 4096);
        let with = |source: Descriptor| [blocks[0], BlockRead { source, ..blocks[1] }];
        let region = owner.region;
        let past = Descriptor { region, offset: (1 << 20) - 10, len: 11 };
        let none = Descriptor { region: RegionId(77), offset: 0, len: 10 };
        assert_eq!(refusal(read(&session, &with(past)).await), Refusal::OutsideRegion);
        assert_eq!(refusal(read(&session, &with(none)).await), Refusal::OutsideRegion);
        if backend == BackendKind::Tcp {
            let beside = Descriptor { region, offset: (1 << 20) - 10, len: 10 };
            assert_eq!(refusal(read(&session, &with(beside)).await), Refusal::OutsideGrant);
        }
        assert_eq!(
            reader.stats().errors(ErrorKind::Refused),
            if backend == BackendKind::Tcp { 3 } else { 2 }
        );
        assert_eq!(read(&session, &blocks).await.unwrap(), 4 * 4096, "the session goes on");
    }
}

#[tokio::test]
async fn nothing_is_read_without_a_live_grant() {
    for backend in each().await {
        let owner = Owner::start(1 << 20).await;
        let reader = reader(backend).await;
        let session = owner.session(&reader).await.unwrap();
        let blocks = owner.granted(4, 4096);
        assert!(read(&session, &blocks).await.is_ok());
        owner.agent.revoke(HANDOFF).settled().await;
        assert_eq!(refusal(read(&session, &blocks).await), Refusal::NotGranted, "{backend}");
        owner.agent.grant(HandoffId(HANDOFF.0 + 2), blocks.iter().map(|block| block.source).collect());
        assert_eq!(refusal(read(&session, &blocks).await), Refusal::NotGranted, "another handoff's grant");
    }
}

#[tokio::test]
async fn another_life_of_the_owner_is_stale() {
    for backend in each().await {
        let owner = Owner::start(1 << 20).await;
        let reader = reader(backend).await;
        let session = owner.session(&reader).await.unwrap();
        let blocks = owner.granted(4, 4096);
        owner.agent.set_epoch(Epoch(9));
        match read(&session, &blocks).await {
            Err(TransferError::Stale { ticket: EPOCH, current: Some(Epoch(9)), .. }) => {}
            // The owner closes the connections of its last life: the next one tells why.
            Err(TransferError::Link { .. }) if is_fabric(backend) => {}
            other => panic!("{backend}: {other:?}"),
        }
        reader.disconnect(&name(OWNER));
        match owner.session(&reader).await {
            Err(ConnectError::Stale { asked: EPOCH, current: Some(Epoch(9)), .. }) => {}
            other => panic!("{backend}: {other:?}"),
        }
        assert!(owner.agent.stats().stale_refused > 0);
        assert!(is_fabric(backend) || reader.stats().errors(ErrorKind::Stale) == 1);
        let session = reader.connect(&name(OWNER), Epoch(9), &owner.metadata).await.unwrap();
        assert_eq!(refusal(read(&session, &blocks).await), Refusal::NotGranted, "grants end with their life");
        let blocks = owner.granted(4, 4096);
        assert!(read(&session, &blocks).await.is_ok());
    }
}

#[tokio::test]
async fn an_older_life_of_the_reader_is_refused_and_its_sessions_close() {
    for backend in each().await {
        let owner = Owner::start(1 << 20).await;
        let reader = reader(backend).await;
        let zombie = self::reader(backend).await;
        let session = owner.session(&reader).await.unwrap();
        let blocks = owner.granted(4, 4096);
        assert!(read(&session, &blocks).await.is_ok(), "what is mapped is at hand afterwards");
        reader.set_epoch(Epoch(8));
        let closed = read(&session, &blocks).await;
        assert!(matches!(closed, Err(TransferError::Link { source: LinkError::Closed, .. })), "{closed:?}");
        let session = owner.session(&reader).await.unwrap();
        assert!(read(&session, &blocks).await.is_ok());
        let refused = owner.session(&zombie).await;
        assert!(matches!(refused, Err(ConnectError::Stale { .. })), "{refused:?}");
    }
}

#[tokio::test]
async fn another_worker_or_process_at_the_address_is_refused() {
    let owner = Owner::start(1 << 20).await;
    let reader = reader(BackendKind::Tcp).await;
    let refused = reader.connect(&name("prefill-9"), EPOCH, &owner.metadata).await;
    assert!(
        matches!(refused, Err(ConnectError::Refused { refusal: Refusal::WrongWorker, .. })),
        "{refused:?}"
    );
    let mut other = Metadata::decode(&owner.metadata).unwrap();
    other.incarnation += 1;
    let refused = reader.connect(&name(OWNER), EPOCH, &other.encode()).await;
    assert!(
        matches!(refused, Err(ConnectError::Refused { refusal: Refusal::WrongIncarnation, .. })),
        "{refused:?}"
    );
    let unready = Agent::start(AgentOptions::new(name("joining"))).await.unwrap();
    let refused = reader.connect(&name("joining"), Epoch(1), &unready.metadata()).await;
    assert!(
        matches!(refused, Err(ConnectError::Refused { refusal: Refusal::Unavailable, .. })),
        "{refused:?}"
    );
    let cut = &owner.metadata[..owner.metadata.len() - 1];
    for (junk, count) in [(&b"junk"[..], 1), (cut, 2), (&[0; MAX_METADATA_BYTES + 1], 3)] {
        let refused = reader.connect(&name(OWNER), EPOCH, junk).await;
        assert!(matches!(refused, Err(ConnectError::Metadata { .. })), "{refused:?}");
        assert_eq!(reader.stats().malformed, count);
    }
}

#[tokio::test]
async fn the_path_is_chosen_by_both_sides_and_says_why() {
    let owner = Owner::start(1 << 20).await;
    let metadata = Metadata::decode(&owner.metadata).unwrap();
    let path = async |alter: &dyn Fn(&mut Metadata)| {
        let reader = Agent::start(AgentOptions::new(name("decode-1"))).await.unwrap();
        let mut metadata = metadata.clone();
        alter(&mut metadata);
        let session = reader.connect(&name(OWNER), EPOCH, &metadata.encode()).await;
        session.map(|session| session.path().clone())
    };
    let same_host = path(&|_| {}).await.unwrap();
    assert_eq!(
        (same_host.backend, same_host.reason.as_str()),
        (BackendKind::Shm, "shm: same host, the peer's memory is mapped")
    );
    let far = path(&|metadata| metadata.host ^= 1).await.unwrap();
    assert_eq!(far.backend, BackendKind::Tcp);
    assert_eq!(far.reason, "tcp: reached by address; shm: the peer is on another host");
    let tcp_only = path(&|metadata| metadata.offers = vec![Offer::of(BackendKind::Tcp)]).await.unwrap();
    assert_eq!(tcp_only.reason, "tcp: reached by address; shm: not offered by the peer");
    let mut options = AgentOptions::new(name("decode-2"));
    options.backends = vec![BackendKind::Plugin, BackendKind::Tcp];
    options.plugin = Some(PluginOptions { path: "/nowhere/libnone.so".into(), bind: None });
    let lacking = owner.session(&Agent::start(options).await.unwrap()).await.unwrap().path();
    let [(BackendKind::Plugin, why)] = &lacking.rejected[..] else { panic!("{lacking:?}") };
    assert!(why.starts_with("there is no plugin at /nowhere/libnone.so: "), "neither side has one: {why}");
    match path(&|metadata| metadata.offers.clear()).await {
        Err(ConnectError::Link { tried, .. }) => {
            assert_eq!(tried, "shm: not offered by the peer; tcp: not offered by the peer");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_session_is_kept_until_it_breaks_and_another_path_can_be_asked_for() {
    let owner = Owner::start(1 << 20).await;
    let reader = Agent::start(AgentOptions::new(name("decode-1"))).await.unwrap();
    let blocks = owner.granted(2, 4096);
    let session = owner.session(&reader).await.unwrap();
    read(&session, &blocks).await.unwrap();
    let again = owner.session(&reader).await.unwrap();
    assert_eq!(again.stats().bytes.0, 8192, "the same session");
    let other =
        reader.connect_avoiding(&name(OWNER), EPOCH, &owner.metadata, BackendKind::Shm).await.unwrap();
    assert_eq!(other.path().backend, BackendKind::Tcp);
    assert_eq!(other.path().reason, "tcp: reached by address; shm: avoided");
    assert_eq!(reader.sessions().len(), 2);
    read(&other, &blocks).await.unwrap();
    let over = |backend| reader.stats().read_bytes(backend).0;
    assert_eq!((over(BackendKind::Shm), over(BackendKind::Tcp)), (8192, 8192));
    owner.agent.close().await;
    let gone = read(&session, &blocks).await;
    assert!(matches!(gone, Err(TransferError::Link { .. })), "{gone:?}");
    assert!(!session.is_usable());
}

#[tokio::test]
async fn wrong_bytes_are_named_and_never_delivered() {
    for backend in each().await {
        let owner = Owner::start(4 << 20).await;
        let mut blocks = owner.granted(40, 20_000);
        for bad in [3, 39] {
            blocks[bad].expected.as_mut().unwrap().digest ^= 1;
        }
        let strict = reader(backend).await;
        let session = owner.session(&strict).await.unwrap();
        let seen = Mutex::new(BTreeSet::new());
        let sink = |index: usize, _: &[u8]| {
            seen.lock().unwrap().insert(index);
        };
        match session.read(HANDOFF, &blocks, Destination::Sink(&sink), deadline()).await {
            Err(TransferError::Integrity { index: 3, corrupt, .. }) => assert_eq!(corrupt, [3, 39]),
            other => panic!("{other:?}"),
        }
        let seen = seen.into_inner().unwrap();
        assert!(seen.len() == 38 && !seen.contains(&3) && !seen.contains(&39), "{seen:?}");
        match read(&session, &blocks).await {
            Err(TransferError::Integrity { index: 3, corrupt, .. }) => assert_eq!(corrupt, [3, 39]),
            other => panic!("{other:?}"),
        }
        // Long ones are digested as they come, piece by piece.
        let mut long = owner.granted(2, 1 << 20);
        long[1].expected.as_mut().unwrap().digest ^= 1;
        for read_of in [&long[..], &long[1..]] {
            match read(&session, read_of).await {
                Err(TransferError::Integrity { corrupt, .. }) => assert_eq!(corrupt, [read_of.len() - 1]),
                other => panic!("{backend}: {other:?}"),
            }
        }
        // Short ones and long ones travel apart, and are named in the order of the read.
        let mut mixed: Vec<_> =
            [4096, 1 << 20, 4096].map(|len| crate::support::blocks(owner.region, 1, len)[0]).into();
        for (block, to) in mixed.iter_mut().zip([0, 8192, 2 << 20]) {
            block.to = to;
            block.expected.as_mut().unwrap().digest ^= 1;
        }
        owner.agent.grant(HANDOFF, mixed.iter().map(|block| block.source).collect());
        match read(&session, &mixed).await {
            Err(TransferError::Integrity { corrupt, .. }) => assert_eq!(corrupt, [0, 1, 2], "over {backend}"),
            other => panic!("{backend}: {other:?}"),
        }
        assert_eq!(strict.stats().checksum_mismatches, 9);
        let trusting = reader_with(backend, Integrity::Off).await;
        let session = owner.session(&trusting).await.unwrap();
        assert_eq!(read(&session, &blocks).await.unwrap(), 800_000);
    }
}

/// Mapped memory is copied without a word with its owner: what ends in the meantime ends the read.
#[tokio::test]
async fn what_is_copied_after_its_grant_or_its_life_has_ended_is_not_delivered() {
    for backend in [BackendKind::Shm, BackendKind::Cma] {
        let owner = Owner::start(4 << 20).await;
        let reader = reader(backend).await;
        let session = owner.session(&reader).await.unwrap();
        for is_life in [false, true] {
            // So long that each is copied by itself.
            let blocks = owner.granted(3, 300_000);
            let seen = AtomicUsize::new(0);
            let sink = |_: usize, _: &[u8]| {
                seen.fetch_add(1, Ordering::SeqCst);
                match is_life {
                    false => drop(owner.agent.revoke(HANDOFF)),
                    true => owner.agent.set_epoch(Epoch(9)),
                }
            };
            let outcome = session.read(HANDOFF, &blocks, Destination::Sink(&sink), deadline()).await;
            match outcome {
                Err(TransferError::Refused { refusal: Refusal::NotGranted, .. }) if !is_life => {}
                Err(TransferError::Stale { current: Some(Epoch(9)), .. }) if is_life => {}
                other => panic!("{backend}: {other:?}"),
            }
            assert_eq!(seen.into_inner(), 1, "{backend}");
        }
    }
}

/// The same without anybody to see when: the owner reuses its memory the moment a grant has ended, again and again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_that_is_reused_while_it_is_copied_is_not_delivered() {
    const BYTES: usize = 256 << 10;
    const GRANTS: u64 = 1000;
    for backend in [BackendKind::Shm, BackendKind::Cma] {
        let owner = Owner::start(4096).await;
        let reused = memory(BYTES);
        let region = owner.agent.register(reused.clone()).unwrap();
        let source = Descriptor { region, offset: 0, len: BYTES as u32 };
        let reader = reader_with(backend, Integrity::Off).await;
        let session = owner.session(&reader).await.unwrap();
        let (agent, granted) = (owner.agent.clone(), Arc::new(AtomicU64::new(0)));
        let now = Arc::clone(&granted);
        let reuse = tokio::task::spawn_blocking(move || {
            for id in 1..=GRANTS {
                reused.write(0, &[1; BYTES]);
                agent.grant(HandoffId(id.into()), vec![source]);
                now.store(id, Ordering::SeqCst);
                // From nothing to more than a copy takes.
                let end = Instant::now() + Duration::from_micros(id % 8 * 10);
                while Instant::now() < end {
                    std::hint::spin_loop();
                }
                drop(agent.revoke(HandoffId(id.into())));
                reused.write(0, &[2; BYTES]);
            }
        });
        let (into, mut outcomes) = (memory(BYTES), [0; 2]);
        while !reuse.is_finished() {
            let handoff = HandoffId(granted.load(Ordering::SeqCst).into());
            let blocks = [BlockRead { source, to: 0, expected: None }];
            match session.read(handoff, &blocks, Destination::Memory(&into), deadline()).await {
                Ok(_) => {
                    let bytes = bytes_at(&into, 0, BYTES as u32);
                    assert!(bytes.iter().all(|byte| *byte == 1), "{backend}: {handoff}");
                    outcomes[0] += 1;
                }
                Err(TransferError::Refused { refusal: Refusal::NotGranted, .. }) => outcomes[1] += 1,
                Err(error) => panic!("{backend}: {error}"),
            }
        }
        reuse.await.unwrap();
        assert!(outcomes.iter().all(|count| *count > 0), "{backend}: {outcomes:?}");
    }
}

#[tokio::test]
async fn the_answer_to_a_read_that_was_given_up_is_not_taken_for_that_to_the_next() {
    for backend in [BackendKind::Shm, BackendKind::Cma] {
        let owner = Owner::start(1 << 16).await;
        let other = memory(1 << 16);
        other.write(0, &[0xee; 1 << 16]);
        let region = owner.agent.register(other).unwrap();
        let first = owner.granted(1, 4096);
        let second =
            [BlockRead { source: Descriptor { region, offset: 1, len: 4096 }, to: 0, expected: None }];
        owner.agent.grant(HANDOFF, vec![second[0].source]);
        let reader = reader(backend).await;
        let session = owner.session(&reader).await.unwrap();
        let into = memory(4096);
        {
            let given_up = session.read(HANDOFF, &first, Destination::Memory(&into), deadline());
            assert!(futures_util::poll!(std::pin::pin!(given_up)).is_pending(), "it asks for the region");
        }
        session.read(HANDOFF, &second, Destination::Memory(&into), deadline()).await.unwrap();
        assert!(bytes_at(&into, 0, 4096).iter().all(|byte| *byte == 0xee), "{backend}");
        assert_eq!(read(&session, &first).await.unwrap(), 4096);
    }
}

#[tokio::test]
async fn an_agent_nobody_could_reach_does_not_start() {
    let mut options = AgentOptions::new(name("w"));
    options.bind = "0.0.0.0".parse().unwrap();
    let unprotected = Agent::start(options.clone()).await.err().unwrap();
    assert!(matches!(unprotected, StartError::Unprotected { .. }));
    assert!(unprotected.to_string().contains("the same token"), "{unprotected}");
    options.auth = Some(Token::from_file_bytes(b"k7Jw0pQx9ZfLr2TnVb5Ys8HdMc3Ge6Ua").unwrap());
    assert!(matches!(Agent::start(options.clone()).await, Err(StartError::Advertise { .. })));
    options.advertise = Some("10.1.2.3:7700".parse().unwrap());
    let agent = Agent::start(options.clone()).await.unwrap();
    assert_eq!(Metadata::decode(&agent.metadata()).unwrap().address, "10.1.2.3:7700".parse().unwrap());
    options.port = agent.local_address().port();
    assert!(matches!(Agent::start(options.clone()).await, Err(StartError::Bind { .. })));
    options.backends.clear();
    assert!(matches!(Agent::start(options).await, Err(StartError::NoBackend)));
}

/// What a peer needs to find an agent says nothing of its memory, however much there is.
#[tokio::test]
async fn registered_memory_is_bounded_and_not_published() {
    let mut options = AgentOptions::new(name(OWNER));
    options.limits.regions = 3;
    options.limits.registered_bytes = Bytes(3 * 4096);
    let agent = Agent::start(options).await.unwrap();
    let published = agent.metadata();
    assert!(published.len() <= MAX_METADATA_BYTES / 4, "{} bytes", published.len());
    let region = agent.register(memory(8192)).unwrap();
    let refused = agent.register(memory(8192)).unwrap_err();
    let (wanted, registered, limit) = (Bytes(8192), Bytes(8192), Bytes(3 * 4096));
    assert!(
        matches!(refused, RegisterError::Bytes { wanted: w, registered: r, limit: l } if (w, r, l) == (wanted, registered, limit)),
        "{refused:?}"
    );
    assert!(refused.to_string().contains("transfer.limits.registered"), "{refused}");
    agent.register(memory(2048)).unwrap();
    agent.register(memory(2048)).unwrap();
    let refused = agent.register(memory(1)).unwrap_err();
    assert!(matches!(refused, RegisterError::Full { limit: 3 }), "{refused:?}");
    assert!(refused.to_string().contains("transfer.limits.regions"), "{refused}");
    let one = |at: u64| Descriptor { region, offset: at % 8192, len: 1 };
    agent.grant(HANDOFF, (0..100_000).map(one).collect());
    assert_eq!(agent.metadata(), published);
}
