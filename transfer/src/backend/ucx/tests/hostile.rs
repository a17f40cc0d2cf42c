//! Addresses and keys of peers that are damaged, invented, or meant for others.

use baton_ucx_sys::{UCP_AM_SEND_FLAG_EAGER, UCP_AM_SEND_FLAG_REPLY, UCS_OK};

use super::*;
use crate::backend::ucx::messages::HANDLERS;
use crate::backend::ucx::peer::Reach;
use crate::backend::ucx::slots::Place;

/// The same stream of numbers every time.
struct Stream(u64);

impl Stream {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 16
    }

    fn bytes(&mut self, most: usize) -> Vec<u8> {
        let len = self.next() as usize % (most + 1);
        (0..len).map(|_| self.next() as u8).collect()
    }
}

/// What must not be taken for `good`.
fn damaged(good: &[u8], other: &[u8]) -> Vec<Vec<u8>> {
    let mut stream = Stream(7);
    let mut all: Vec<Vec<u8>> = (0..good.len()).map(|len| good[..len].to_vec()).collect();
    all.extend((0..good.len() * 8).map(|bit| {
        let mut flipped = good.to_vec();
        flipped[bit / 8] ^= 1 << (bit % 8);
        flipped
    }));
    all.extend((0..500).map(|_| stream.bytes(300)));
    all.extend((1..50).map(|more| [good, &vec![0; more]].concat()));
    all.push(vec![0; ADDRESS_MAX_BYTES + 1]);
    all.push(vec![0xff; 1 << 20]);
    all.push(other.to_vec());
    all
}

#[test]
fn damaged_addresses_and_keys_are_errors() {
    both_ways(|near, far| {
        let mut link = Linked::new(near, far, 4096, Access::RemoteRead);
        let address = link.far.driver.address();
        let (_, key) = link.far.driver.register(&link.there.span(), Access::RemoteRead).unwrap();
        for bad in damaged(&address, &key) {
            link.near.driver.connect(&bad).unwrap_err();
        }
        for bad in damaged(&key, &address) {
            link.near.driver.import(link.peer, &bad).unwrap_err();
        }
        assert!(link.near.driver.import(PeerId(999), &key).is_err());
        link.read(0, 0, 4096, 1).unwrap();
        assert_eq!(link.wait(1), Ok(4096), "the driver is none the worse");
    });
}

#[test]
fn addresses_and_keys_of_the_other_way_of_moving_bytes_are_errors() {
    let (Some(mut messages), Some(mut one_sided)) = (End::open(false), End::open(true)) else { return };
    let there = memory(64, 0);
    assert!(messages.driver.connect(&one_sided.driver.address()).is_err());
    assert!(one_sided.driver.connect(&messages.driver.address()).is_err());
    let (_, key) = one_sided.driver.register(&there.span(), Access::RemoteRead).unwrap();
    let Some(other) = End::open(false) else { return };
    let peer = messages.driver.connect(&other.driver.address()).unwrap();
    assert!(messages.driver.import(peer, &key).is_err());
}

#[test]
fn well_framed_keys_that_ucx_could_not_read_are_errors() {
    let (Some(near), Some(far)) = (End::open(true), End::open(true)) else { return };
    let mut link = Linked::new(near, far, 4096, Access::RemoteRead);
    let mut stream = Stream(11);
    let payload = |packed: &[u8]| [&0u64.to_le_bytes(), &4096u64.to_le_bytes(), packed].concat();
    // Domains without the lengths and bytes they should have; their number is in the map.
    for _ in 0..2000 {
        let mut packed = u64::MAX.to_le_bytes().to_vec();
        packed.extend(stream.bytes(200).into_iter().map(|byte| byte | 0x10));
        let key = frame::seal(frame::Kind::Key, &payload(&packed));
        assert!(link.near.driver.import(link.peer, &key).is_err());
    }
    link.read(0, 0, 4096, 1).unwrap();
    assert_eq!(link.wait(1), Ok(4096));
}

/// Who can seal a frame, which anybody can, may say anything in it.
#[test]
fn well_framed_addresses_that_ucx_would_trip_over_harm_nobody() {
    both_ways(|near, far| {
        let mut link = Linked::new(near, far, 4096, Access::RemoteRead);
        let (_, key) = link.far.driver.register(&link.there.span(), Access::RemoteRead).unwrap();
        let sealed = link.far.driver.address();
        let good = frame::open(frame::Kind::Address, &sealed, ADDRESS_MAX_BYTES).unwrap().to_vec();
        let mut all: Vec<Vec<u8>> = (0..good.len()).map(|len| good[..len].to_vec()).collect();
        for at in 0..good.len() {
            for byte in [0, 1, 0x40, 0x7f, 0x80, 0xff] {
                let mut bad = good.clone();
                bad[at] = byte;
                all.push(bad);
            }
        }
        let mut stream = Stream(23);
        for _ in 0..1000 {
            let mut bad = good.clone();
            for _ in 0..3 {
                let at = stream.next() as usize % bad.len();
                bad[at] = stream.next() as u8;
            }
            all.push(bad);
        }
        let mut refused = 0;
        for bad in all {
            match link.near.driver.connect(&frame::seal(frame::Kind::Address, &bad)) {
                Err(_) => refused += 1,
                Ok(peer) => {
                    if let Ok(remote) = link.near.driver.import(peer, &key) {
                        let range = link.near.range(link.local, 0, 1);
                        let _ = link.near.driver.read(peer, remote, 0, range, 77);
                    }
                    link.near.poll();
                    link.far.poll();
                    link.near.driver.disconnect(peer);
                }
            }
        }
        assert!(refused > good.len(), "{refused}");
        assert_eq!(link.near.driver.dead, None);
        link.near.poll();
        link.near.done.clear();
        link.read(0, 0, 4096, 1).unwrap();
        assert_eq!(link.wait(1), Ok(4096), "the driver is none the worse");
    });
}

/// A peer that knows the protocol and lies in it.
#[test]
fn answers_that_nobody_asked_for_change_nothing() {
    let (Some(near), Some(far)) = (End::open(false), End::open(false)) else { return };
    let mut link = Linked::new(near, far, 4096, Access::RemoteRead);
    let before = bytes(&link.here);
    let victim = link.far.driver.connect(&link.near.driver.address()).unwrap();
    let (source, _) = link.far.driver.register(&link.there.span(), Access::Local).unwrap();
    let ep = link.far.driver.peers[&victim.0].ep;
    let address = link.there.span().address();
    link.read(0, 0, 4096, 1).unwrap();
    // Also about pieces that were not asked for, and more than there can be.
    let pieces = |first: u64, more: u64| first << 32 | more << 40;
    let numbers = [0, 1, u64::MAX, pieces(0, 7), pieces(7, 0), pieces(7, 1), pieces(255, 255), 1 << 48];
    for (slot, nonce) in numbers.into_iter().flat_map(|slot| [(slot, 0), (slot, 1), (slot, u64::MAX)]) {
        let mut job = Job::new(Work::Serve, 0, None);
        (job.region, job.address, job.len) = (Some(source.0), address + 64, 64);
        link.far.driver.core.answer(ep, &[slot, nonce, 0, 0, 0, 0, 0], UCS_OK, job, 0);
    }
    until(&mut [&mut link.near, &mut link.far], |ends| ends[1].driver.core.slots.busy().is_empty());
    assert_eq!(link.wait(1), Ok(4096));
    assert!(before != bytes(&link.here) && bytes(&link.here) == bytes(&link.there));
}

/// Sends the peer a message of any words and bytes.
fn say(link: &mut Linked, kind: u32, header: [u64; 7], payload: &[u8]) {
    link.here.write(0, payload);
    let ep = link.near.driver.peers[&link.peer.0].ep;
    let core = &link.near.driver.core;
    let mut job = Job::new(Work::Serve, 0, None);
    (job.region, job.address, job.len) = (Some(link.local.0), link.here.span().address(), payload.len());
    let slot = core.start(job).unwrap();
    slot.header.set(header.map(u64::to_le));
    let place = Place { address: job.address, len: job.len };
    core.send(ep, kind, slot, place, UCP_AM_SEND_FLAG_REPLY | UCP_AM_SEND_FLAG_EAGER).unwrap();
    until(&mut [&mut link.near, &mut link.far], |ends| {
        let busy = |end: &End| end.driver.core.slots.busy().iter().any(|(_, job)| job.work == Work::Serve);
        !ends.iter().any(|end| busy(end))
    });
    while link.far.driver.take_request().is_some() {}
}

/// Messages of every kind whose words and bytes were good once. Who sends them may write one registration of the peer and
/// knows nothing else of it.
#[test]
fn messages_of_any_words_write_nothing_but_what_may_be_written() {
    const LEN: usize = 4096;
    let (Some(near), Some(far)) = (End::open(false), End::open(false)) else { return };
    let mut link = Linked::new(near, far, LEN, Access::RemoteWrite);
    let others = memory(LEN, 9);
    let (kept, _) = link.far.driver.register(&others.span(), Access::RemoteRead).unwrap();
    let awaited = link.far.range(kept, 0, 64);
    link.far.driver.receive(1 << 60, awaited, 7).unwrap();
    let before = bytes(&others);
    let Reach::Messages { region, secret } =
        link.near.driver.peers[&link.peer.0].remotes[&link.remote.0].reach
    else {
        panic!("by messages")
    };
    let mut stream = Stream(5);
    let edges = [
        0,
        1,
        u64::from(u32::MAX),
        1 << 32,
        7 << 40,
        9 << 40,
        1 << 48,
        u64::from(kept.0),
        LEN as u64,
        u64::MAX,
    ];
    for round in 0..4000u64 {
        let len = 1 + stream.next() % 200;
        let piece =
            [u64::from(region), secret as u64, (secret >> 64) as u64, stream.next() % LEN as u64, len];
        let mut header = [round, stream.next(), piece[0], piece[1], piece[2], piece[3], piece[4]];
        let pieces = 1 + stream.next() % 9;
        let mut words: Vec<u64> = (0..pieces).flat_map(|_| piece).collect();
        for _ in 0..stream.next() % 3 {
            let edge = edges[stream.next() as usize % edges.len()];
            let at = stream.next() as usize % header.len();
            if stream.next().is_multiple_of(2) {
                header[at] = edge;
            } else {
                words[at % (5 * pieces as usize)] = edge;
            }
        }
        let mut payload: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        payload.extend(stream.bytes(400));
        payload.truncate(1 + stream.next() as usize % payload.len());
        let kind = HANDLERS[stream.next() as usize % HANDLERS.len()].0;
        say(&mut link, kind, header, &payload);
    }
    link.write(0, 0, 1, 1).unwrap();
    assert_eq!(link.wait(1), Ok(1), "it comes behind all of them");
    assert!(bytes(&link.there) != pattern(LEN, 2), "what may be written was");
    assert!(bytes(&others) == before, "memory that is only to be read was written");
    assert!(link.far.done.is_empty() && link.far.driver.dead.is_none(), "{:?}", link.far.done);
    link.here.write(0, &pattern(LEN, 3));
    link.write(0, 0, LEN, 2).unwrap();
    assert_eq!(link.wait(2), Ok(LEN));
    assert!(bytes(&link.there) == bytes(&link.here));
}

/// A write of bytes that are not as many as it names stores none of them.
#[test]
fn writes_of_other_lengths_than_they_name_are_refused() {
    const LEN: usize = 100;
    let (Some(near), Some(far)) = (End::open(false), End::open(false)) else { return };
    let mut link = Linked::new(near, far, 4096, Access::RemoteWrite);
    let Reach::Messages { region, secret } =
        link.near.driver.peers[&link.peer.0].remotes[&link.remote.0].reach
    else {
        panic!("by messages")
    };
    let piece = [u64::from(region), secret as u64, (secret >> 64) as u64, 0, LEN as u64];
    let named: Vec<u8> = piece.iter().flat_map(|word| word.to_le_bytes()).collect();
    let before = bytes(&link.there);
    let mut store = |kind: usize, len: usize| {
        let name: &[u8] = if kind == 5 { &named } else { &[] };
        let header = [1, 2, piece[0], piece[1], piece[2], piece[3], piece[4]];
        say(&mut link, HANDLERS[kind].0, header, &[name, &vec![0xaa; len]].concat());
        // Comes behind it, and elsewhere.
        link.write(4000, 0, 1, 1).unwrap();
        assert_eq!(link.wait(1), Ok(1));
        bytes(&link.there)[..4000] != before[..4000]
    };
    for kind in [2, 5] {
        for len in [LEN - 1, LEN + 1, 1] {
            assert!(!store(kind, len), "{len} bytes instead of {LEN}");
        }
    }
    assert!(store(5, LEN) && store(2, LEN));
    // More pieces than a message may have, all of them there.
    let many = [named.repeat(9), vec![0xbb; 9 * LEN]].concat();
    say(&mut link, HANDLERS[5].0, [1 | 8 << 40, 2, 0, 0, 0, 0, 0], &many);
    link.write(4000, 0, 1, 1).unwrap();
    assert_eq!(link.wait(1), Ok(1));
    assert_eq!(bytes(&link.there)[..LEN], [0xaa; LEN]);
}
