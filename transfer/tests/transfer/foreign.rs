//! Memory that an engine allocated itself: peers cannot map it, so the kernel copies it for them.
#![expect(unsafe_code, reason = "describes memory that this crate did not allocate")]

use std::sync::Arc;

use baton_transfer::{
    BackendKind, BlockRead, Descriptor, Destination, HostMemory, Integrity, MemoryError, MemorySpan, Place,
    RegionId,
};

use crate::support::{
    HANDOFF, Owner, assert_in_place, blocks, bytes_at, deadline, each, memory, pattern, reader, reader_with,
};

const REGION_BYTES: usize = 8 << 20;

/// Plain heap memory that holds the pattern, as an engine would have it.
fn engine_memory() -> HostMemory {
    let buffer: Arc<[u8]> = pattern(0, REGION_BYTES as u32).into();
    let address = buffer.as_ptr().expose_provenance();
    // SAFETY: the buffer is the owner of the span and never looked at again, but through it.
    let span = unsafe { MemorySpan::new(address, buffer.len(), Place::Host, None, Arc::new(buffer)) };
    HostMemory::adopt(span, "engine").unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_memory_is_read_over_every_backend() {
    let owner = Owner::start(REGION_BYTES).await;
    let foreign = owner.agent.register(engine_memory()).unwrap();
    let both = |backend| [(backend, Integrity::Digest), (backend, Integrity::Off)];
    for (backend, integrity) in each().await.into_iter().flat_map(both) {
        let reader = reader_with(backend, integrity).await;
        let session = owner.session(&reader).await.unwrap();
        for (count, len) in [(1, 1), (64, 4096), (1500, 100), (3, 1 << 20)] {
            let wanted = granted(&owner, foreign, count, len);
            let into = memory(REGION_BYTES);
            session.read(HANDOFF, &wanted, Destination::Memory(&into), deadline()).await.unwrap();
            assert_in_place(&into, &wanted);
        }
    }
}

/// Blocks of memory that is mapped and of memory that is not, in turns, to a sink.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_read_takes_mapped_and_foreign_blocks() {
    let owner = Owner::start(REGION_BYTES).await;
    let foreign = owner.agent.register(engine_memory()).unwrap();
    let mut wanted = owner.granted(50, 70_000);
    for block in wanted.iter_mut().step_by(2) {
        block.source.region = foreign;
    }
    owner.agent.grant(HANDOFF, wanted.iter().map(|block| block.source).collect());
    wanted[31].expected.as_mut().unwrap().digest ^= 1;
    wanted[32].expected.as_mut().unwrap().digest ^= 1;
    let reader = reader(BackendKind::Shm).await;
    let session = owner.session(&reader).await.unwrap();
    let into = memory(REGION_BYTES);
    let sink = |index: usize, bytes: &[u8]| into.write(wanted[index].to, bytes);
    let outcome = session.read(HANDOFF, &wanted, Destination::Sink(&sink), deadline()).await;
    match outcome {
        Err(baton_transfer::TransferError::Integrity { corrupt, .. }) => assert_eq!(corrupt, [31, 32]),
        other => panic!("{other:?}"),
    }
    for bad in [31, 32] {
        assert!(bytes_at(&into, wanted[bad].to, 70_000).iter().all(|byte| *byte == 0), "never delivered");
    }
    assert_in_place(&into, &[&wanted[..31], &wanted[33..]].concat());
}

/// Neighbours on both sides are one range; what lies between blocks that are none is left alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_beside_the_blocks_is_written() {
    let owner = Owner::start(REGION_BYTES).await;
    let foreign = owner.agent.register(engine_memory()).unwrap();
    let reader = reader_with(BackendKind::Cma, Integrity::Off).await;
    let session = owner.session(&reader).await.unwrap();
    let at = |offset: u64, to: usize| BlockRead {
        source: Descriptor { region: foreign, offset, len: 100 },
        to,
        expected: None,
    };
    let wanted = [at(0, 1000), at(100, 1100), at(200, 5000), at(700, 5100), at(300, 900)];
    owner.agent.grant(HANDOFF, wanted.iter().map(|block| block.source).collect());
    let into = memory(8192);
    session.read(HANDOFF, &wanted, Destination::Memory(&into), deadline()).await.unwrap();
    assert_in_place(&into, &wanted);
    for (offset, len) in [(0, 900), (1200, 3800), (5200, 2992)] {
        assert!(bytes_at(&into, offset, len).iter().all(|byte| *byte == 0), "{offset}");
    }
}

#[test]
fn only_host_memory_can_be_adopted() {
    let span = |address, len, place| {
        // SAFETY: nothing is accessed: the span is expected to be refused.
        unsafe { MemorySpan::new(address, len, place, None, Arc::new(())) }
    };
    for (address, len, place) in
        [(4096, 8, Place::Cuda(0)), (0, 8, Place::Host), (usize::MAX - 3, 8, Place::Host)]
    {
        let refused = HostMemory::adopt(span(address, len, place), "x");
        assert!(matches!(refused, Err(MemoryError::NotHost { .. })), "{address} {len} {place:?}");
    }
    assert!(matches!(HostMemory::adopt(span(4096, 0, Place::Host), "x"), Err(MemoryError::Empty { .. })));
    let adopted = engine_memory();
    adopted.prefault().unwrap();
    adopted.write(3, b"engine");
    assert_eq!(bytes_at(&adopted, 3, 6), b"engine");
    assert_eq!(adopted.span().len(), REGION_BYTES);
}

fn granted(owner: &Owner, region: RegionId, count: usize, len: u32) -> Vec<BlockRead> {
    let blocks = blocks(region, count, len);
    owner.agent.grant(HANDOFF, blocks.iter().map(|block| block.source).collect());
    blocks
}
