use std::future;
use std::sync::Condvar;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;

use baton_config::{Dtype, KvLayout, Scales, Shard};

use super::*;
use crate::agent::AgentOptions;
use crate::device::{Device, EmulatedDevice, Submitted};
use crate::digest::block_digest;
use crate::memory::HostMemory;
use crate::plan::reference;

const HANDOFF: HandoffId = HandoffId(7);
const EPOCH: Epoch = Epoch(3);
const GEOMETRY: KvGeometry = KvGeometry {
    layers: 2,
    kv_heads: 2,
    head_dim: 8,
    block_tokens: 8,
    layout: KvLayout::Nhd,
    dtype: Dtype::Bf16,
    ..KvGeometry::PLAIN
};

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

async fn agent() -> Agent {
    let agent = Agent::start(AgentOptions::new("prefill".parse().unwrap())).await.unwrap();
    agent.set_epoch(EPOCH);
    agent
}

/// A device whose copies to the host wait while the gate is shut.
#[derive(Debug)]
struct GatedDevice {
    inner: EmulatedDevice,
    shut: Mutex<bool>,
    changed: Condvar,
    waiting: AtomicUsize,
    fails: bool,
}

impl GatedDevice {
    fn new(len: usize, shut: bool, fails: bool) -> Arc<Self> {
        let inner = EmulatedDevice::new(len, None).unwrap();
        let (shut, changed, waiting) = (Mutex::new(shut), Condvar::new(), AtomicUsize::new(0));
        Arc::new(Self { inner, shut, changed, waiting, fails })
    }

    fn open(&self) {
        *self.shut.lock().unwrap() = false;
        self.changed.notify_all();
    }
}

impl Device for GatedDevice {
    fn kind(&self) -> &'static str {
        "gated"
    }

    fn len(&self) -> usize {
        self.inner.len()
    }

    fn read(&self, offset: usize, into: &mut [u8]) {
        self.inner.read(offset, into);
    }

    fn write(&self, offset: usize, from: &[u8]) {
        self.inner.write(offset, from);
    }

    fn submit_to_host(
        &self,
        offset: usize,
        host: &HostMemory,
        to: usize,
        len: usize,
    ) -> Result<Submitted, DeviceError> {
        if self.fails {
            let source = "the copy engine is on fire".into();
            return Err(DeviceError::Copy { kind: "gated", direction: "from", offset, len, source });
        }
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let shut = self.shut.lock().unwrap();
        let limit = Duration::from_secs(20);
        let (_shut, timeout) = self.changed.wait_timeout_while(shut, limit, |shut| *shut).unwrap();
        assert!(!timeout.timed_out(), "nobody opened the gate");
        self.inner.submit_to_host(offset, host, to, len)
    }

    fn submit_from_host(
        &self,
        at: usize,
        host: &HostMemory,
        from: usize,
        len: usize,
    ) -> Result<Submitted, DeviceError> {
        self.inner.submit_from_host(at, host, from, len)
    }
}

/// An exporter of an arena of 32 blocks of noise.
async fn exporter(memory: ArenaMemory, slots: usize) -> (Exporter, Vec<Vec<u8>>) {
    let noise = reference::blocks(&GEOMETRY, 32, 5);
    memory.write(0, &noise.concat());
    let options = ExportOptions { slots, ..ExportOptions::default() };
    (Exporter::new(agent().await, memory, GEOMETRY, options).unwrap(), noise)
}

fn arena_len() -> usize {
    32 * GEOMETRY.block_bytes()
}

async fn staged(slots: usize) -> (Exporter, Vec<Vec<u8>>) {
    exporter(ArenaMemory::Device(Arc::new(EmulatedDevice::new(arena_len(), None).unwrap())), slots).await
}

fn blocks(range: std::ops::Range<u32>) -> Vec<ExportBlock> {
    // Blocks lie anywhere in the arena.
    range.map(|index| ExportBlock { index, block: index * 7 % 32 }).collect()
}

/// What a peer would read and digest.
fn check(memory: &HostMemory, handoff: HandoffId, tickets: &[TicketBlock], noise: &[Vec<u8>]) {
    for ticket in tickets {
        let mut bytes = vec![0; GEOMETRY.block_bytes()];
        memory.read(ticket.offset as usize, &mut bytes);
        assert!(bytes == noise[(ticket.index * 7 % 32) as usize], "block {}", ticket.index);
        let seed = DigestSeed { handoff, epoch: EPOCH, index: ticket.index };
        assert_eq!(ticket.digest, block_digest(seed, &bytes));
    }
}

fn slab_memory(exporter: &Exporter) -> HostMemory {
    match &exporter.0.source {
        Source::Packed { slab, .. } | Source::Staged { slab, .. } => slab.memory().clone(),
        Source::InPlace(_) | Source::Direct(_) => panic!("this arena is staged"),
    }
}

#[tokio::test]
async fn blocks_of_a_host_arena_are_published_where_they_are() {
    let memory = HostMemory::allocate(arena_len(), "arena").unwrap();
    let (exporter, noise) = exporter(ArenaMemory::Host(memory.clone()), 0).await;
    let tickets = exporter.publish(HANDOFF, EPOCH, &blocks(0..20), soon()).await.unwrap();
    let offsets: Vec<u64> = tickets.iter().map(|ticket| ticket.offset).collect();
    let places = blocks(0..20).iter().map(|b| u64::from(b.block) * GEOMETRY.block_bytes() as u64).collect();
    assert_eq!((offsets, exporter.published()), (places, 20));
    check(&memory, HANDOFF, &tickets, &noise);
    exporter.acked(HANDOFF, 0..5);
    assert_eq!(exporter.published(), 15);
    exporter.release(HANDOFF).await;
    assert_eq!(exporter.published(), 0);
}

#[tokio::test]
async fn blocks_of_a_device_are_published_from_slots_in_the_order_asked() {
    let (exporter, noise) = staged(16).await;
    let tickets = exporter.publish(HANDOFF, EPOCH, &blocks(3..11), soon()).await.unwrap();
    assert_eq!(tickets.iter().map(|ticket| ticket.index).collect::<Vec<_>>(), (3..11).collect::<Vec<_>>());
    check(&slab_memory(&exporter), HANDOFF, &tickets, &noise);
    assert_eq!(exporter.audit().unwrap(), SlabCounts { free: 8, published: 8, ..SlabCounts::default() });
    exporter.acked(HANDOFF, [3, 4, 3, 99]);
    exporter.acked(HandoffId(8), [5]);
    assert_eq!(exporter.audit().unwrap(), SlabCounts { free: 10, published: 6, ..SlabCounts::default() });
    exporter.release(HANDOFF).await;
    exporter.release(HANDOFF).await;
    exporter.close().await;
    assert_eq!(exporter.audit().unwrap().free, 16);
}

#[tokio::test(start_paused = true)]
async fn a_full_slab_holds_publishing_back_until_blocks_are_acknowledged() {
    let (exporter, noise) = staged(8).await;
    assert_eq!(exporter.max_blocks(), 4);
    let error = exporter.publish(HANDOFF, EPOCH, &blocks(0..5), soon()).await.unwrap_err();
    assert!(matches!(error, ExportError::Staging(SlabError::TooMany { asked: 5, slots: 4 })), "{error:?}");
    exporter.publish(HANDOFF, EPOCH, &blocks(0..4), soon()).await.unwrap();
    exporter.publish(HANDOFF, EPOCH, &blocks(4..8), soon()).await.unwrap();

    let other = HandoffId(8);
    let error = exporter.publish(other, EPOCH, &blocks(0..2), soon()).await.unwrap_err();
    assert!(matches!(error, ExportError::Staging(SlabError::Exhausted { .. })), "{error:?}");

    let asked = blocks(8..10);
    let next = exporter.publish(other, EPOCH, &asked, soon());
    tokio::pin!(next);
    assert!(futures_util::poll!(next.as_mut()).is_pending());
    exporter.acked(HANDOFF, [1]);
    assert!(futures_util::poll!(next.as_mut()).is_pending(), "two slots are asked for, one is free");
    exporter.acked(HANDOFF, [6]);
    let tickets = next.await.unwrap();
    check(&slab_memory(&exporter), other, &tickets, &noise);
    exporter.close().await;
    assert_eq!(exporter.audit().unwrap().free, 8);
}

/// Polls `publishing` until the device was asked for a copy.
async fn until_copying<T>(device: &GatedDevice, mut publishing: std::pin::Pin<&mut impl Future<Output = T>>) {
    future::poll_fn(|context| {
        assert!(publishing.as_mut().poll(context).is_pending());
        if device.waiting.load(Ordering::SeqCst) > 0 {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

#[tokio::test]
async fn a_handoff_released_while_it_is_exported_publishes_nothing() {
    let device = GatedDevice::new(arena_len(), true, false);
    let (exporter, _) = exporter(ArenaMemory::Device(device.clone()), 8).await;
    let asked = blocks(0..4);
    let publishing = exporter.publish(HANDOFF, EPOCH, &asked, soon());
    tokio::pin!(publishing);
    until_copying(&device, publishing.as_mut()).await;
    exporter.release(HANDOFF).await;
    // The same name again is another life: nothing of the one before is granted in it.
    let others = blocks(4..6);
    let again = exporter.publish(HANDOFF, EPOCH, &others, soon());
    tokio::pin!(again);
    assert!(futures_util::poll!(again.as_mut()).is_pending());
    device.open();
    assert!(matches!(publishing.await, Err(ExportError::Released)));
    assert_eq!(exporter.published(), 0);
    assert_eq!(again.await.unwrap().len(), 2);
    assert_eq!((exporter.published(), exporter.audit().unwrap().free), (2, 6));
    exporter.close().await;
}

#[tokio::test]
async fn a_handoff_released_before_its_export_was_first_polled_publishes_nothing() {
    let memory = HostMemory::allocate(arena_len(), "arena").unwrap();
    let (exporter, _) = exporter(ArenaMemory::Host(memory), 0).await;
    let publishing = exporter.publish(HANDOFF, EPOCH, &blocks(0..4), soon());
    exporter.release(HANDOFF).await;
    assert!(matches!(publishing.await, Err(ExportError::Released)));
    assert_eq!(exporter.published(), 0);
    exporter.close().await;
}

#[tokio::test]
async fn a_publish_that_is_dropped_publishes_nothing_and_gives_its_slots_back() {
    let device = GatedDevice::new(arena_len(), true, false);
    let (exporter, _) = exporter(ArenaMemory::Device(device.clone()), 8).await;
    {
        let asked = blocks(0..4);
        let publishing = exporter.publish(HANDOFF, EPOCH, &asked, soon());
        tokio::pin!(publishing);
        until_copying(&device, publishing.as_mut()).await;
    }
    assert!(exporter.audit().unwrap().filling > 0, "a slot that is being written is not free");
    assert!(exporter.0.books().handoffs.is_empty(), "nothing is kept of it");
    device.open();
    exporter.close().await;
    assert_eq!((exporter.published(), exporter.audit().unwrap().free), (0, 8));
}

#[tokio::test]
async fn a_publish_ends_at_its_deadline_though_the_device_hangs() {
    let device = GatedDevice::new(arena_len(), true, false);
    let (exporter, _) = exporter(ArenaMemory::Device(device.clone()), 8).await;
    let error = exporter.publish(HANDOFF, EPOCH, &blocks(0..4), Instant::now()).await.unwrap_err();
    assert!(matches!(error, ExportError::Deadline), "{error:?}");
    device.open();
    exporter.close().await;
    assert_eq!(exporter.audit().unwrap().free, 8);
}

#[tokio::test]
async fn a_device_that_fails_publishes_nothing() {
    let device = GatedDevice::new(arena_len(), false, true);
    let (exporter, _) = exporter(ArenaMemory::Device(device), 8).await;
    let error = exporter.publish(HANDOFF, EPOCH, &blocks(0..4), soon()).await.unwrap_err();
    assert!(matches!(error, ExportError::Device(_)), "{error:?}");
    exporter.close().await;
    assert_eq!((exporter.published(), exporter.audit().unwrap().free), (0, 8));
}

#[tokio::test(start_paused = true)]
async fn a_lease_without_a_sign_of_life_ends() {
    let (exporter, _) = staged(8).await;
    let lease = exporter.0.options.lease;
    let other = HandoffId(8);
    exporter.publish(HANDOFF, EPOCH, &blocks(0..2), soon()).await.unwrap();
    exporter.publish(other, EPOCH, &blocks(2..4), soon()).await.unwrap();
    tokio::time::advance(lease / 2).await;
    assert!(exporter.sweep(Instant::now()).await.is_empty());
    exporter.touch(other);
    tokio::time::advance(lease / 2).await;
    assert_eq!(exporter.sweep(Instant::now()).await, [HANDOFF]);
    assert_eq!(exporter.published(), 2);
    tokio::time::advance(lease / 4).await;
    exporter.acked(other, [2]);
    tokio::time::advance(lease * 3 / 4).await;
    assert!(exporter.sweep(Instant::now()).await.is_empty(), "an acknowledgement is a sign of life");
    tokio::time::advance(lease / 4).await;
    assert_eq!(exporter.sweep(Instant::now()).await, [other]);
    exporter.close().await;
    assert_eq!(exporter.audit().unwrap().free, 8);
}

#[tokio::test(start_paused = true)]
async fn an_export_that_takes_longer_than_the_lease_is_not_swept() {
    let device = GatedDevice::new(arena_len(), true, false);
    let (exporter, _) = exporter(ArenaMemory::Device(device.clone()), 8).await;
    let lease = exporter.0.options.lease;
    let asked = blocks(0..4);
    let publishing = exporter.publish(HANDOFF, EPOCH, &asked, Instant::now() + lease * 10);
    tokio::pin!(publishing);
    until_copying(&device, publishing.as_mut()).await;
    tokio::time::advance(lease * 2).await;
    assert!(exporter.sweep(Instant::now()).await.is_empty());
    device.open();
    assert_eq!(publishing.await.unwrap().len(), 4);
    // Nobody can have shown life before there was anything to ask for.
    assert!(exporter.sweep(Instant::now()).await.is_empty());
    assert_eq!(exporter.published(), 4);
    exporter.close().await;
}

#[tokio::test]
async fn a_block_published_again_takes_the_place_of_the_first() {
    let (exporter, noise) = staged(8).await;
    let first = exporter.publish(HANDOFF, EPOCH, &blocks(0..2), soon()).await.unwrap();
    let again = exporter.publish(HANDOFF, EPOCH, &blocks(1..3), soon()).await.unwrap();
    assert_ne!(first[1].offset, again[0].offset);
    check(&slab_memory(&exporter), HANDOFF, &again, &noise);
    assert_eq!((exporter.published(), exporter.audit().unwrap().free), (3, 5));
    let serving = |ticket| exporter.0.agent.serving(HANDOFF, &[descriptor(ticket)]);
    assert!(serving(&first[0]).is_ok() && serving(&again[0]).is_ok());
    assert!(serving(&first[1]).is_err(), "its slot is another's from here on");
    exporter.release(HANDOFF).await;
    assert_eq!(exporter.audit().unwrap().free, 8);
}

fn descriptor(ticket: &TicketBlock) -> Descriptor {
    let (region, offset) = (RegionId(ticket.region), ticket.offset);
    Descriptor { region, offset, len: GEOMETRY.block_bytes() as u32 }
}

/// The slot of the first is free for others.
#[tokio::test]
async fn of_a_block_named_twice_the_last_is_granted() {
    let (exporter, _) = staged(16).await;
    let twice = [ExportBlock { index: 3, block: 1 }, ExportBlock { index: 3, block: 2 }];
    let tickets = exporter.publish(HANDOFF, EPOCH, &twice, soon()).await.unwrap();
    assert_eq!((exporter.published(), exporter.audit().unwrap().free), (1, 15));
    assert!(exporter.0.agent.serving(HANDOFF, &[descriptor(&tickets[1])]).is_ok());
    assert!(exporter.0.agent.serving(HANDOFF, &[descriptor(&tickets[0])]).is_err());
}

#[tokio::test]
async fn whoever_releases_a_handoff_waits_for_who_is_served_from_it() {
    let memory = HostMemory::allocate(arena_len(), "arena").unwrap();
    let (exporter, _) = exporter(ArenaMemory::Host(memory), 0).await;
    let ticket = exporter.publish(HANDOFF, EPOCH, &blocks(0..1), soon()).await.unwrap()[0].clone();
    let len = GEOMETRY.block_bytes() as u32;
    let place = Descriptor { region: RegionId(ticket.region), offset: ticket.offset, len };
    let served = exporter.0.agent.serving(HANDOFF, &[place]).unwrap();
    let (first, second) = (exporter.release(HANDOFF), exporter.release(HANDOFF));
    tokio::pin!(first, second);
    for _ in 0..10 {
        assert!(futures_util::poll!(first.as_mut()).is_pending());
        assert!(futures_util::poll!(second.as_mut()).is_pending(), "it is still read");
        tokio::task::yield_now().await;
    }
    drop(served);
    tokio::join!(first, second);
}

#[tokio::test]
async fn an_acknowledged_block_leaves_the_grant() {
    let (exporter, _) = staged(8).await;
    let tickets = exporter.publish(HANDOFF, EPOCH, &blocks(0..2), soon()).await.unwrap();
    let serving = |ticket| exporter.0.agent.serving(HANDOFF, &[descriptor(ticket)]);
    assert!(serving(&tickets[0]).is_ok() && serving(&tickets[1]).is_ok());
    exporter.acked(HANDOFF, [0]);
    assert!(serving(&tickets[0]).is_err() && serving(&tickets[1]).is_ok());
    exporter.release(HANDOFF).await;
    assert!(serving(&tickets[1]).is_err());
}

#[tokio::test]
async fn slots_stay_in_quarantine_until_nothing_is_served_from_them() {
    let (exporter, _) = staged(8).await;
    let tickets = exporter.publish(HANDOFF, EPOCH, &blocks(0..4), soon()).await.unwrap();
    let serving = exporter.0.agent.serving(HANDOFF, &[descriptor(&tickets[0])]).unwrap();
    {
        let release = exporter.release(HANDOFF);
        tokio::pin!(release);
        assert!(futures_util::poll!(release.as_mut()).is_pending());
        assert!(serving.revoked.is_cancelled(), "who serves is told to stop");
    }
    // Nobody waits for the release any more: the slots still do.
    tokio::task::yield_now().await;
    let counts = exporter.audit().unwrap();
    assert_eq!((exporter.published(), counts.quarantined, counts.free), (0, 4, 4));
    drop(serving);
    exporter.close().await;
    assert_eq!(exporter.audit().unwrap().free, 8);
}

/// Workers run both as tasks: the compiler must see that their futures can be sent between threads.
#[test]
fn exports_and_imports_can_be_sent_between_threads() {
    fn sent<T: Send>(_: impl FnOnce() -> T) {}
    let exporter = || -> &Exporter { unreachable!("never called") };
    let importer = || -> &crate::import::Importer { unreachable!("never called") };
    let session = || -> &crate::session::Session { unreachable!("never called") };
    let pull = || -> crate::import::Pull { unreachable!("never called") };
    sent(move || exporter().publish(HANDOFF, EPOCH, &[], soon()));
    sent(move || exporter().release(HANDOFF));
    sent(move || importer().pull(session(), pull(), soon()));
}

#[tokio::test]
async fn blocks_of_many_chunks_and_many_blocks_of_a_chunk_are_staged_whole() {
    let large = KvGeometry { layers: 24, kv_heads: 4, head_dim: 64, ..GEOMETRY };
    assert!(large.block_bytes() > 128 << 10 && !large.block_bytes().is_multiple_of(128 << 10));
    for geometry in [large, GEOMETRY] {
        let noise = reference::blocks(&geometry, 40, 5);
        let memory = EmulatedDevice::new(40 * geometry.block_bytes(), None).unwrap();
        memory.write(0, &noise.concat());
        let options = ExportOptions { slots: 80, ..ExportOptions::default() };
        let memory = ArenaMemory::Device(Arc::new(memory));
        let exporter = Exporter::new(agent().await, memory, geometry, options).unwrap();
        assert_eq!(exporter.why_staged(), Some("blocks are to be host-buffered"));
        let blocks: Vec<ExportBlock> =
            (0..40).map(|index| ExportBlock { index, block: index * 7 % 40 }).collect();
        let tickets = exporter.publish(HANDOFF, EPOCH, &blocks, soon()).await.unwrap();
        let Source::Staged { slab, .. } = &exporter.0.source else { panic!("not staged") };
        for ticket in &tickets {
            let mut bytes = vec![0; geometry.block_bytes()];
            slab.memory().read(ticket.offset as usize, &mut bytes);
            assert!(bytes == noise[(ticket.index * 7 % 40) as usize], "block {}", ticket.index);
            let seed = DigestSeed { handoff: HANDOFF, epoch: EPOCH, index: ticket.index };
            assert_eq!(ticket.digest, block_digest(seed, &bytes));
        }
        exporter.close().await;
    }
}

/// Who reads a block digests all of it.
#[tokio::test]
async fn what_pads_the_numbers_of_a_scattered_block_is_digested_too() {
    let fp8 = KvGeometry { dtype: Dtype::Fp8E4m3, scales: Scales::Head, layers: 1, kv_heads: 1, ..GEOMETRY };
    let geometry = KvGeometry { head_dim: 3, block_tokens: 1, layout: KvLayout::L2bNhd, ..fp8 };
    assert_ne!(geometry.numbers_bytes(), geometry.scales_offset());
    let memory = EmulatedDevice::new(4 * geometry.block_bytes(), None).unwrap();
    memory.write(0, &reference::blocks(&geometry, 4, 5).concat());
    let options = ExportOptions { slots: 8, ..ExportOptions::default() };
    let memory = ArenaMemory::Device(Arc::new(memory));
    let exporter = Exporter::new(agent().await, memory, geometry, options).unwrap();
    slab_memory(&exporter).write(0, &vec![0xaa; slab_memory(&exporter).len()]);
    let all: Vec<ExportBlock> = (0..4).map(|index| ExportBlock { index, block: 3 - index }).collect();
    for ticket in exporter.publish(HANDOFF, EPOCH, &all, soon()).await.unwrap() {
        let mut bytes = vec![0; geometry.block_bytes()];
        slab_memory(&exporter).read(ticket.offset as usize, &mut bytes);
        let seed = DigestSeed { handoff: HANDOFF, epoch: EPOCH, index: ticket.index };
        assert_eq!(ticket.digest, block_digest(seed, &bytes));
    }
    exporter.close().await;
}

/// Packing costs a copy and a slot: only who needs little pays for it.
#[tokio::test]
async fn blocks_are_packed_for_who_needs_little_and_in_half_of_the_slots() {
    let memory = || ArenaMemory::Host(HostMemory::allocate(arena_len(), "arena").unwrap());
    let (exporter, _) = exporter(memory(), 8).await;
    let reader = KvGeometry { layout: KvLayout::Hnd, ..GEOMETRY };
    let (wire, tickets) = exporter.publish_for(reader, HANDOFF, EPOCH, &blocks(0..20), soon()).await.unwrap();
    assert_eq!((wire, exporter.audit().unwrap().total()), (GEOMETRY, 0), "they are where they were");
    assert_eq!(tickets[1].offset, u64::from(blocks(1..2)[0].block) * GEOMETRY.block_bytes() as u64);
    let shard = Shard::Tensor { rank: 1, degree: 2, heads: 2 };
    let reader = KvGeometry { kv_heads: 1, shard, ..reader };
    let error = exporter.publish_for(reader, HANDOFF, EPOCH, &blocks(0..5), soon()).await.unwrap_err();
    assert!(matches!(error, ExportError::Staging(SlabError::TooMany { asked: 5, slots: 4 })), "{error:?}");
    let (wire, _) = exporter.publish_for(reader, HANDOFF, EPOCH, &blocks(0..4), soon()).await.unwrap();
    assert_eq!((wire, exporter.audit().unwrap().published), (reader, 4));
    exporter.close().await;

    // Long runs are packed only where they are verified: without, they are read straight to their places.
    let long = KvGeometry { block_tokens: 64, layout: KvLayout::Hnd, head_dim: 256, kv_heads: 4, ..GEOMETRY };
    let reader = KvGeometry { kv_heads: 2, shard: Shard::Tensor { rank: 1, degree: 2, heads: 4 }, ..long };
    for (integrity, expected) in [(Integrity::Off, long), (Integrity::Digest, reader)] {
        let memory = HostMemory::allocate(2 * long.block_bytes(), "arena").unwrap();
        let options = ExportOptions { slots: 8, integrity, ..ExportOptions::default() };
        let exporter = Exporter::new(agent().await, ArenaMemory::Host(memory), long, options).unwrap();
        let one = [ExportBlock { index: 0, block: 1 }];
        let (wire, _) = exporter.publish_for(reader, HANDOFF, EPOCH, &one, soon()).await.unwrap();
        assert_eq!(wire, expected, "{integrity:?}");
        exporter.close().await;
    }
}

#[tokio::test]
async fn blocks_of_a_device_that_networks_reach_are_granted_where_they_are() {
    let device = Arc::new(EmulatedDevice::new(arena_len(), None).unwrap().reachable());
    let noise = reference::blocks(&GEOMETRY, 32, 5);
    device.write(0, &noise.concat());
    let (agent, memory) = (agent().await, ArenaMemory::Device(device));
    let options = ExportOptions { direct: true, ..ExportOptions::default() };
    let exporter = Exporter::new(agent.clone(), memory, GEOMETRY, options).unwrap();
    assert_eq!((exporter.why_staged(), exporter.max_blocks()), (None, usize::MAX));
    let tickets = exporter.publish(HANDOFF, EPOCH, &blocks(0..20), soon()).await.unwrap();
    for (ticket, block) in tickets.iter().zip(blocks(0..20)) {
        assert_eq!(ticket.offset, u64::from(block.block) * GEOMETRY.block_bytes() as u64);
        let seed = DigestSeed { handoff: HANDOFF, epoch: EPOCH, index: ticket.index };
        assert_eq!(ticket.digest, block_digest(seed, &noise[block.block as usize]));
    }
    let place = Descriptor {
        region: RegionId(tickets[0].region),
        offset: tickets[0].offset,
        len: GEOMETRY.block_bytes() as u32,
    };
    assert!(agent.serving(HANDOFF, &[place]).is_ok());
    exporter.release(HANDOFF).await;
    assert!(agent.serving(HANDOFF, &[place]).is_err(), "a released block may be reused");
    assert_eq!(exporter.published(), 0);
}

#[tokio::test]
async fn a_device_that_networks_do_not_reach_is_staged_and_says_why() {
    let device = Arc::new(EmulatedDevice::new(arena_len(), None).unwrap());
    let options = |integrity| ExportOptions { direct: true, integrity, ..ExportOptions::default() };
    let why = async |integrity| {
        let memory = ArenaMemory::Device(device.clone());
        let exporter = Exporter::new(agent().await, memory, GEOMETRY, options(integrity)).unwrap();
        exporter.why_staged().unwrap().to_owned()
    };
    assert_eq!(
        why(Integrity::Digest).await,
        "digests take a copy in host memory: an emulated device has no kernels for blocks"
    );
    assert_eq!(why(Integrity::Off).await, "the network cannot reach the memory of an emulated device");
}
