//! Memory of a device as a region: what network libraries cannot reach in place is copied for the peer.

use std::sync::Arc;
use std::time::Duration;

use baton_transfer::wire::HEADER_BYTES;
use baton_transfer::{
    Agent, AgentOptions, BackendKind, Destination, Device, DeviceMemory, EmulatedDevice, Expected, LinkError,
    Refusal, RegionId, TransferError,
};

use crate::proxy::{Mode, Proxy};
use crate::support::{
    EPOCH, HANDOFF, OWNER, assert_in_place, blocks, bytes_at, deadline, each, memory, name, pattern, reader,
};

/// An owner whose blocks are in the memory of a device, with every backend that works here.
async fn owner(len: usize) -> (Agent, RegionId) {
    owner_with(AgentOptions { backends: each().await, ..AgentOptions::new(name(OWNER)) }, len).await
}

async fn owner_with(options: AgentOptions, len: usize) -> (Agent, RegionId) {
    let agent = Agent::start(options).await.unwrap();
    agent.set_epoch(EPOCH);
    let device = EmulatedDevice::new(len, None).unwrap().reachable();
    device.write(0, &pattern(0, len as u32));
    let region = agent.register_device(DeviceMemory::new(Arc::new(device)).unwrap()).unwrap();
    (agent, region)
}

/// What can read memory that no other process may map: all but shared memory.
async fn networks() -> Vec<BackendKind> {
    each().await.into_iter().filter(|kind| !kind.copies_in_host_memory()).collect()
}

const SHAPES: [(usize, u32); 5] = [(1, 1), (64, 4096), (33, 65_537), (6, 3 << 20), (2500, 100)];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_of_a_device_arrive_over_every_network() {
    let (owner, region) = owner(40 << 20).await;
    for backend in networks().await {
        let reader = reader(backend).await;
        let session = reader.connect(&name(OWNER), EPOCH, &owner.metadata()).await.unwrap();
        for (count, len) in SHAPES {
            let blocks = blocks(region, count, len);
            owner.grant(HANDOFF, blocks.iter().map(|block| block.source).collect());
            let into = memory(32 << 20);
            let report =
                session.read(HANDOFF, &blocks, Destination::Memory(&into), deadline()).await.unwrap();
            assert_eq!(report.bytes.0, count as u64 * u64::from(len), "over {backend}");
            assert_in_place(&into, &blocks);
            owner.revoke(HANDOFF).settled().await;
        }
        reader.close().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fabrics_read_straight_from_one_device_into_another() {
    let (owner, region) = owner(40 << 20).await;
    for backend in networks().await.into_iter().filter(|kind| *kind != BackendKind::Tcp) {
        let reader = reader(backend).await;
        let session = reader.connect(&name(OWNER), EPOCH, &owner.metadata()).await.unwrap();
        for (count, len) in SHAPES {
            let mut blocks = blocks(region, count, len);
            for block in &mut blocks {
                // Digests are for who asks the device; a wrong one changes nothing here.
                block.expected = block.expected.map(|expected| Expected { digest: 1, ..expected });
            }
            owner.grant(HANDOFF, blocks.iter().map(|block| block.source).collect());
            let device = Arc::new(EmulatedDevice::new(32 << 20, None).unwrap().reachable());
            let into = DeviceMemory::new(device.clone()).unwrap();
            session.reaches(&into).await.unwrap();
            let report =
                session.read(HANDOFF, &blocks, Destination::Device(&into), deadline()).await.unwrap();
            assert_eq!(report.bytes.0, count as u64 * u64::from(len), "over {backend}");
            let mut all = vec![0; device.len()];
            device.read(0, &mut all);
            for (index, block) in blocks.iter().enumerate() {
                let expected = pattern(block.source.offset as usize, len);
                assert!(
                    all[block.to..][..len as usize] == expected,
                    "{backend}: block {index} of {count} x {len}"
                );
                all[block.to..][..len as usize].fill(0);
            }
            assert!(all.iter().all(|byte| *byte == 0), "{backend}: something else was written");
            owner.revoke(HANDOFF).settled().await;
        }
        reader.close().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn revoking_ends_a_read_of_a_device_that_is_being_served() {
    // More than the sockets in between can hold, in one request.
    const LEN: u32 = 48 << 20;
    let proxy = Proxy::start().await;
    let (backends, advertise) = (vec![BackendKind::Tcp], Some(proxy.address));
    let (owner, region) =
        owner_with(AgentOptions { backends, advertise, ..AgentOptions::new(name(OWNER)) }, LEN as usize + 1)
            .await;
    proxy.lead_to(owner.local_address());
    let reader = reader(BackendKind::Tcp).await;
    let session = reader.connect(&name(OWNER), EPOCH, &owner.metadata()).await.unwrap();
    let blocks = blocks(region, 1, LEN);
    owner.grant(HANDOFF, vec![blocks[0].source]);
    proxy.set(Mode::Hold(2 * HEADER_BYTES + 10));
    let into = memory(LEN as usize);
    let read = session.read(HANDOFF, &blocks, Destination::Memory(&into), deadline());
    tokio::pin!(read);
    let started = async {
        while bytes_at(&into, 0, 1) != pattern(1, 1) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::select! {
        biased;
        outcome = &mut read => panic!("it was held back: {outcome:?}"),
        () = started => {}
    }
    tokio::time::timeout(Duration::from_secs(10), owner.revoke(HANDOFF).settled()).await.unwrap();
    proxy.set(Mode::Relay);
    let outcome = read.await;
    assert!(matches!(outcome, Err(TransferError::Link { .. })), "{outcome:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_outside_a_device_region_or_not_host_memory_is_refused() {
    let (owner, region) = owner(1 << 20).await;
    for (backend, block_at) in [(BackendKind::Tcp, 1 << 20), (BackendKind::Shm, 0)] {
        let reader = reader(backend).await;
        let session = reader.connect(&name(OWNER), EPOCH, &owner.metadata()).await.unwrap();
        let mut blocks = blocks(region, 1, 4096);
        blocks[0].source.offset = block_at;
        owner.grant(HANDOFF, vec![blocks[0].source]);
        let into = memory(4096);
        let outcome = session.read(HANDOFF, &blocks, Destination::Memory(&into), deadline()).await;
        let Err(TransferError::Refused { refusal, .. }) = outcome else { panic!("{outcome:?}") };
        assert_eq!(refusal, Refusal::OutsideRegion, "{backend}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn paths_that_copy_in_host_memory_say_that_they_do_not_reach_a_device() {
    let (owner, region) = owner(1 << 20).await;
    let device = EmulatedDevice::new(4096, None).unwrap().reachable();
    let into = DeviceMemory::new(Arc::new(device)).unwrap();
    for (backend, why) in [
        (BackendKind::Tcp, "tcp receives into host memory only"),
        (BackendKind::Shm, "shm copies to host memory only"),
    ] {
        let reader = reader(backend).await;
        let session = reader.connect(&name(OWNER), EPOCH, &owner.metadata()).await.unwrap();
        assert_eq!(session.reaches(&into).await.unwrap_err(), why);
        let blocks = blocks(region, 1, 4096);
        owner.grant(HANDOFF, vec![blocks[0].source]);
        let outcome = session.read(HANDOFF, &blocks, Destination::Device(&into), deadline()).await;
        let Err(TransferError::Link { source: LinkError::Device(reason), .. }) = outcome else {
            panic!("{outcome:?}")
        };
        assert_eq!(reason, why);
        assert!(session.is_usable(), "host memory is reached as before: {:?}", session.path());
    }
}

#[test]
fn a_device_that_networks_cannot_reach_says_so() {
    let device = Arc::new(EmulatedDevice::new(4096, None).unwrap());
    let why = DeviceMemory::new(device).unwrap_err();
    assert_eq!(why, "the network cannot reach the memory of an emulated device");
}
