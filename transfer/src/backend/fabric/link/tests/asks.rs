//! Requests over the fabric itself: used where there are some, refused to strangers, bounded.

use super::*;
use crate::device::{Device, EmulatedDevice};
use crate::wire::ask::Ask;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_are_asked_for_over_the_fabric_where_it_has_requests() {
    for integrity in [Integrity::Digest, Integrity::Off] {
        for requests in [true, false] {
            let pair = pair(Faults { requests, ..Faults::default() }, integrity).await;
            let session = pair.session().await;
            // Packed; straight into place, to be confirmed without digests; and too many for one request.
            for (lens, asks) in [(vec![2000; 5], true), (vec![40_000; 5], integrity == Integrity::Off)] {
                let before = pair.world.asked(OWNER);
                read(&session, &pair.blocks(&lens)).await.unwrap();
                assert_eq!(pair.world.asked(OWNER) > before, requests && asks, "{integrity:?} {}", lens[0]);
            }
            let before = pair.world.asked(OWNER);
            read(&session, &pair.blocks(&[50; ASK_MAX_BLOCKS + 1])).await.unwrap();
            assert_eq!(pair.world.asked(OWNER), before);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_no_ticket_gets_no_answer_and_holds_up_nobody() {
    let pair = pair(Faults { descriptor: true, ..Faults::default() }, Integrity::Digest).await;
    let session = pair.session().await;
    let blocks = pair.blocks(&[2000; 3]);
    read(&session, &blocks).await.unwrap();
    let before = pair.owner.agent.stats();
    let sources = || blocks.iter().map(|block| block.source);
    let guess =
        |ticket| Ask::encode((ticket, Kind::Pack, EPOCH), (BackendKind::Plugin, 7), HANDOFF, sources());
    let strangers = [guess(0), guess(1), guess(u128::MAX)];
    let broken = [vec![], vec![0; 47], vec![7; 4096], guess(2)[..60].to_vec()];
    for request in strangers.iter().chain(&broken) {
        pair.world.inject(OWNER, request);
    }
    let refused = async {
        loop {
            let now = pair.owner.agent.stats();
            let strangers_refused = now.auth_refused - before.auth_refused == strangers.len() as u64;
            if strangers_refused && now.malformed - before.malformed == broken.len() as u64 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), refused).await.expect("each is refused and counted");
    read(&session, &blocks).await.unwrap();
    assert_eq!(pair.owner.agent.stats().served_bytes().0 - before.served_bytes().0, 6000, "nothing else");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_requests_than_there_are_buffers_are_answered_by_and_by() {
    let faults = Faults { delay: Duration::from_millis(20), ..Faults::default() };
    let pair = pair(faults, Integrity::Digest).await;
    let session = pair.session().await;
    let blocks = pair.blocks(&[9000; 4]);
    let reads = (0..200).map(|_| read(&session, &blocks));
    for outcome in futures_util::future::join_all(reads).await {
        outcome.unwrap();
    }
    pair.owner.settle().await;
    pair.reader.settle().await;
}

/// A reader that takes nothing has its share of the owner's buffers, and no more: those of messages, and of short answers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_takes_nothing_leaves_others_their_buffers() {
    for (requests, integrity) in
        [(true, Integrity::Digest), (false, Integrity::Digest), (true, Integrity::Off)]
    {
        let faults = Faults { requests, ..Faults::default() };
        let pair = pair(faults, integrity).await;
        let packed = integrity == Integrity::Digest;
        let blocks = if packed { pair.blocks(&[4096; 60]) } else { pair.blocks(&[40_000; 5]) };
        let other = side("decode-1", &pair.world, 3, faults, FabricLimits::default(), integrity).await;
        let owner = &pair.owner.agent;
        let theirs = other.agent.connect(owner.worker(), EPOCH, &owner.metadata()).await.unwrap();
        let session = pair.session().await;
        read(&session, &blocks).await.unwrap();
        let fabric = pair.owner.fabrics.get(BackendKind::Plugin).unwrap();
        let (slab, reads) = if packed { (fabric.sending(), 60) } else { (fabric.answers(), 200) };
        let share = slab.slots() / 4;
        pair.world.freeze(READER, true);
        let stuck = futures_util::future::join_all((0..reads).map(|_| read(&session, &blocks)));
        let reading = async {
            // It takes all of its share.
            while slab.counts().free > slab.slots() - share {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            for _ in 0..20 {
                read(&theirs, &blocks).await.unwrap();
            }
            // Those of the others come back, the last of them by and by.
            while slab.counts().free < slab.slots() - share {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::select! {
            biased;
            () = reading => {}
            outcomes = stuck => panic!("{outcomes:?}"),
        }
        pair.world.freeze(READER, false);
    }
}

/// An owner that does not answer has its share of the reader's buffers, and of its places for requests, and no more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_owner_that_does_not_answer_leaves_others_the_readers_buffers() {
    for integrity in [Integrity::Digest, Integrity::Off] {
        let pair = pair(Faults::default(), integrity).await;
        let other =
            side("prefill-1", &pair.world, 3, Faults::default(), FabricLimits::default(), integrity).await;
        let region = other.agent.register(pair.source.clone()).unwrap();
        let packed = integrity == Integrity::Digest;
        // Without digests two questions each, once the blocks are there.
        let blocks = if packed { pair.blocks(&[4096; 60]) } else { pair.blocks(&[40_000; 20]) };
        let mut theirs = blocks.clone();
        theirs.iter_mut().for_each(|block| block.source.region = region);
        other.agent.grant(HANDOFF, theirs.iter().map(|block| block.source).collect());
        let owner = &other.agent;
        let well = pair.reader.agent.connect(owner.worker(), EPOCH, &owner.metadata()).await.unwrap();
        let session = pair.session().await;
        let fabric = pair.reader.fabrics.get(BackendKind::Plugin).unwrap();
        let slab = if packed { fabric.landing() } else { fabric.asking() };
        let share = slab.slots() / 4;
        pair.world.freeze(OWNER, true);
        let mut stuck =
            std::pin::pin!(futures_util::future::join_all((0..70).map(|_| read(&session, &blocks))));
        let reading = async {
            while slab.counts().free > slab.slots() - share {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            for _ in 0..20 {
                read(&well, &theirs).await.unwrap();
            }
            assert!(slab.counts().free <= slab.slots() - share, "the others still wait");
        };
        tokio::select! {
            biased;
            () = reading => {}
            outcomes = &mut stuck => panic!("{outcomes:?}"),
        }
        pair.world.freeze(OWNER, false);
        stuck.await.into_iter().for_each(|outcome| assert!(outcome.is_ok(), "{outcome:?}"));
        pair.reader.settle().await;
    }
}

/// Those that wait for buffers learn that the path broke from the first that stood still, not each for itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_that_wait_behind_an_owner_that_does_not_answer_leave_the_path_together() {
    let pair = pair(Faults::default(), Integrity::Digest).await;
    let options = AgentOptions::new("decode-1".parse().unwrap());
    let (backends, stall) = (vec![BackendKind::Plugin, BackendKind::Tcp], Duration::from_millis(500));
    let options = AgentOptions { backends, stall, choose: Choose::Listed, ..options };
    let reader = Agent::start_with(options, pair.reader.fabrics.clone()).await.unwrap();
    reader.set_epoch(EPOCH);
    let owner = &pair.owner.agent;
    let mut metadata = Metadata::decode(&owner.metadata()).unwrap();
    metadata.offers.push(Offer::of(BackendKind::Tcp));
    let session = reader.connect(owner.worker(), EPOCH, &metadata.encode()).await.unwrap();
    assert_eq!(session.path().backend, BackendKind::Plugin);
    let blocks = pair.blocks(&[4096; 60]);
    pair.world.freeze(OWNER, true);
    let begun = Instant::now();
    let reads = (0..320).map(|_| read(&session, &blocks));
    for outcome in futures_util::future::join_all(reads).await {
        outcome.unwrap();
    }
    let share = pair.reader.fabrics.get(BackendKind::Plugin).unwrap().landing().slots() / 4;
    let took = begun.elapsed();
    assert!(took < stall * (320 / share as u32) / 2, "{took:?}, as if each share had found out by itself");
    pair.world.freeze(OWNER, false);
    pair.reader.settle().await;
}

/// Requests that only tasks can answer, of a reader that takes no answer, leave the owner tasks for those of others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_tasks_answer_have_shares_too() {
    let pair = pair(Faults::default(), Integrity::Off).await;
    let device: Arc<dyn Device> = Arc::new(EmulatedDevice::new(1 << 20, None).unwrap().reachable());
    let region = pair.owner.agent.register_device(DeviceMemory::new(device).unwrap()).unwrap();
    let source = Descriptor { region, offset: 0, len: 2000 };
    let block = BlockRead { source, to: 0, expected: None };
    pair.owner.agent.grant(HANDOFF, vec![source]);
    let other =
        side("decode-1", &pair.world, 3, Faults::default(), FabricLimits::default(), Integrity::Off).await;
    let owner = &pair.owner.agent;
    let theirs = other.agent.connect(owner.worker(), EPOCH, &owner.metadata()).await.unwrap();
    let into = memory(4096);
    let read = async |session: &Session| {
        session.read(HANDOFF, &[block], Destination::Memory(&into), soon()).await.unwrap();
    };
    read(&pair.session().await).await;
    let ask = Ask::decode(&pair.world.last_asked(OWNER)).unwrap();
    assert_eq!((ask.kind, ask.pack.read.blocks.as_slice()), (Kind::Pack, &[source][..]));
    pair.world.freeze(READER, true);
    for tag in 0..400 {
        let about = (BackendKind::Plugin, tag);
        let one = Ask::encode((ask.ticket, Kind::Pack, EPOCH), about, HANDOFF, [source].into_iter());
        pair.world.inject(OWNER, &one);
    }
    for _ in 0..20 {
        read(&theirs).await;
    }
    assert!(pair.owner.agent.stats().refused(Refusal::Overloaded) > 0, "those are too many");
    pair.world.freeze(READER, false);
}

/// The end of a long read is asked about by itself, after what comes before it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_read_is_confirmed_in_two_parts() {
    let pair = pair(Faults::default(), Integrity::Off).await;
    let session = pair.session().await;
    let late = LATE_BYTES as u32;
    for (lens, asks) in [
        (vec![40_000; 5], 1),
        (vec![late / 4; 4], 1),
        (vec![late / 4; 5], 2),
        (vec![late], 1),
        (vec![late; 2], 2),
        (vec![100_000, late - 1], 1),
        (vec![100_000, late], 2),
    ] {
        let before = pair.world.asked(OWNER);
        read(&session, &pair.blocks(&lens)).await.unwrap();
        assert_eq!(pair.world.asked(OWNER) - before, asks, "{lens:?}");
    }
}

/// A question says nothing about bytes that come after its answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_are_asked_about_when_they_are_there() {
    let faults = Faults { delay: Duration::from_millis(4), ..Faults::default() };
    let limits = FabricLimits { ops_per_peer: 1, ..FabricLimits::default() };
    let pair = pair_with(1, faults, limits, Integrity::Off).await;
    let (session, into) = (pair.session().await, memory(LEN));
    // One after the other, each of them an operation.
    let blocks = pair.blocks(&[LATE_BYTES as u32 / 8; 20]);
    let (early, before) = (blocks.len() - 8, pair.world.asked(OWNER));
    let reading = async { session.read(HANDOFF, &blocks, Destination::Memory(&into), soon()).await.unwrap() };
    let watching = async {
        for (asked, there) in [(1, early), (2, blocks.len())] {
            while pair.world.asked(OWNER) < before + asked {
                tokio::task::yield_now().await;
            }
            assert!(blocks[..there].iter().all(|block| in_place(&into, block)), "question {asked}");
        }
    };
    tokio::join!(reading, watching);
}

/// What was to be asked about it is never answered then, and nobody waits for that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_whose_operations_fail_ends_with_them() {
    for integrity in [Integrity::Digest, Integrity::Off] {
        let pair = pair(Faults { failed: 1000, ..Faults::default() }, integrity).await;
        let outcome = read(&pair.session().await, &pair.blocks(&[LATE_BYTES as u32; 3])).await;
        assert!(matches!(outcome, Err(TransferError::Link { .. })), "{outcome:?}");
    }
}

/// Without digests only the owner's word keeps bytes from being delivered that are others by the time they are read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_delivered_of_memory_that_is_reused_once_its_grant_has_ended() {
    let (mut delivered, mut refused) = (0, 0);
    for seed in 0..4 {
        let mut rng = Rng::new(seed);
        let faults = Faults {
            delay: Duration::from_micros(100 + rng.below(3000)),
            descriptor: seed % 2 == 0,
            ..Faults::default()
        };
        let pair = pair_with(seed, faults, FabricLimits::default(), Integrity::Off).await;
        let session = pair.session().await;
        let into = memory(LEN);
        for _ in 0..60 {
            pair.owner.agent.revoke(HANDOFF).settled().await;
            let blocks = pair.blocks(&[40_000; 30]);
            for Descriptor { offset, len, .. } in blocks.iter().map(|block| block.source) {
                pair.source.write(offset as usize, &pattern(offset as usize, len as usize));
            }
            // The whole grant, or one block of it: at any time, or when the owner is asked first.
            let reused = match rng.below(30) as usize {
                0..10 => &blocks[..],
                one => &blocks[one - 10..=one - 10],
            };
            let (asked, asks) = (pair.world.asked(OWNER), rng.below(2) == 0);
            let (from, wait) = (Instant::now(), Duration::from_micros(rng.below(4000)));
            let reuse = async {
                while if asks { pair.world.asked(OWNER) == asked } else { from.elapsed() < wait } {
                    tokio::task::yield_now().await;
                }
                match reused {
                    [one] => pair.owner.agent.ungrant(HANDOFF, &[one.source]),
                    _ => pair.owner.agent.revoke(HANDOFF).settled().await,
                }
                for Descriptor { offset, len, .. } in reused.iter().map(|block| block.source) {
                    pair.source.write(offset as usize, &vec![0x55; len as usize]);
                }
            };
            let reading = session.read(HANDOFF, &blocks, Destination::Memory(&into), soon());
            match tokio::join!(reading, reuse).0 {
                Ok(_) => {
                    assert!(blocks.iter().all(|block| in_place(&into, block)));
                    delivered += 1;
                }
                Err(TransferError::Refused {
                    refusal: Refusal::NotGranted | Refusal::OutsideGrant, ..
                }) => refused += 1,
                other => panic!("{other:?}"),
            }
        }
    }
    assert!(delivered > 20 && refused > 20, "{delivered} delivered, {refused} refused");
}
