//! Two drivers in one process.

use std::cell::Cell;

use super::super::blob;
use super::super::object::{REFUSALS, Rail, close};
use super::super::requests::REQUESTS_MAX;
use super::*;
use crate::backend::fabric::testing::{longest_call, silent_host};
use crate::backend::handlers;

const LEN: usize = 4 << 20;
/// Odd, so that operations lie across the pieces of registrations.
const SEGMENT: usize = 1_000_003;

/// A reader, an owner, and the reader's connection to it.
fn pair(provider: &str, len: usize, access: Access, tuning: Tuning) -> (End, End, PeerId, RemoteId) {
    let mut reader = End::new(&options(provider), len, Access::Local, tuning);
    let owner = End::new(&options(provider), len, access, tuning);
    let peer = reader.driver.connect(&owner.driver.address()).unwrap();
    let remote = reader.driver.import(peer, &owner.key).unwrap();
    (reader, owner, peer, remote)
}

/// Every provider, plain; and over several rails with memory registered in odd pieces.
fn setups() -> impl Iterator<Item = (&'static str, Tuning)> {
    let tuned = Tuning { segment: Some(SEGMENT as u64), per_interface: 3 };
    providers().into_iter().flat_map(move |provider| [(provider, Tuning::USUAL), (provider, tuned)])
}

fn setups_and_shm() -> impl Iterator<Item = (&'static str, Tuning)> {
    let shm = providers_and_shm().into_iter().filter(|provider| *provider == "shm");
    setups().chain(shm.map(|provider| (provider, Tuning { segment: Some(SEGMENT as u64), per_interface: 2 })))
}

/// Blocks all over the memory, none beside another: (our offset, their offset).
fn scattered(count: usize, block: usize, len: usize) -> Vec<(usize, usize)> {
    let places = len / block;
    assert!(places >= count);
    (0..count).map(|at| ((at * 7 + 3) % places * block, (at * 11 + 5) % places * block)).collect()
}

fn finished(end: &End, count: usize) -> bool {
    if let Some(failed) = end.done.iter().find(|done| done.result.is_err()) {
        panic!("{failed:?}");
    }
    end.done.len() >= count
}

#[test]
fn reads_bring_scattered_and_long_blocks() {
    for (provider, tuning) in setups_and_shm() {
        for (count, block, len) in [(1, 17, LEN), (64, 4096, LEN), (61, 65536, LEN), (31, 1 << 20, 32 << 20)]
        {
            let what = format!("{provider}: {count} x {block}, {tuning:?}");
            let (mut reader, mut owner, peer, remote) = pair(provider, len, Access::RemoteRead, tuning);
            owner.fill(1);
            let theirs = pattern(1, len);
            let places = scattered(count, block, len);
            for (op, (ours, from)) in places.iter().enumerate() {
                let (to, from) = (reader.range(*ours, block), *from as u64);
                let posted =
                    post((&mut reader, &mut owner), |end| end.driver.read(peer, remote, from, to, op as u64));
                assert_eq!(posted, Ok(()), "{what}");
            }
            until(&mut [&mut reader, &mut owner], &what, |ends| finished(ends[0], count));
            let mut expected = vec![0; len];
            for (ours, from) in places {
                expected[ours..ours + block].copy_from_slice(&theirs[from..from + block]);
            }
            assert!(reader.bytes(0, len) == expected, "{what}: other bytes");
            let mut ops: Vec<_> = reader.done.iter().map(|done| done.op).collect();
            ops.sort_unstable();
            assert_eq!(ops, (0..count as u64).collect::<Vec<_>>(), "{what}: each once");
            assert!(reader.done.iter().all(|done| done.result == Ok(block)), "{what}");
        }
    }
}

#[test]
fn writes_are_there_when_they_are_done() {
    for (provider, tuning) in setups() {
        for (count, block, len) in [(1, 17, LEN), (64, 4096, LEN), (31, 1 << 20, 32 << 20)] {
            let what = format!("{provider}: {count} x {block}, {tuning:?}");
            let (mut writer, mut owner, peer, remote) = pair(provider, len, Access::RemoteWrite, tuning);
            writer.fill(2);
            let ours = pattern(2, len);
            let places = scattered(count, block, len);
            for (op, (from, to)) in places.iter().enumerate() {
                let (from, to) = (writer.range(*from, block), *to as u64);
                let posted = post((&mut writer, &mut owner), |end| {
                    end.driver.write(peer, remote, to, from, op as u64)
                });
                assert_eq!(posted, Ok(()), "{what}");
            }
            until(&mut [&mut writer, &mut owner], &what, |ends| {
                finished(ends[0], 0);
                // Whatever is reported is delivered, also while others are under way.
                for done in &ends[0].done {
                    let (from, to) = places[done.op as usize];
                    assert!(ends[1].bytes(to, block) == ours[from..from + block], "{what}: not delivered");
                }
                ends[0].done.len() == count
            });
        }
    }
}

#[test]
fn messages_land_where_their_tag_is_awaited() {
    for (provider, tuning) in setups_and_shm() {
        let (mut sender, mut receiver, peer, _) = pair(provider, LEN, Access::RemoteRead, tuning);
        sender.fill(3);
        receiver.memory.write(0, &vec![0; LEN]);
        // In another order than they are sent; the last one is sent before it is awaited.
        let tags = [u64::MAX - 1, 5, 1 << 63];
        let lens = [40_000, 1, 290_000];
        for at in [1, 0] {
            receiver
                .driver
                .receive(tags[at], receiver.range(at * SEGMENT, lens[at] + 10), at as u64)
                .unwrap();
        }
        for at in [0, 1, 2] {
            let from = sender.range(at * SEGMENT, lens[at]);
            let posted = post((&mut sender, &mut receiver), |end| {
                end.driver.send(peer, tags[at], from, 10 + at as u64)
            });
            assert_eq!(posted, Ok(()), "{provider}");
        }
        until(&mut [&mut sender, &mut receiver], provider, |ends| finished(ends[1], 2));
        receiver.driver.receive(tags[2], receiver.range(2 * SEGMENT, lens[2]), 2).unwrap();
        until(&mut [&mut sender, &mut receiver], provider, |ends| {
            finished(ends[0], 3) && finished(ends[1], 3)
        });
        for at in 0..3 {
            assert!(receiver.done.contains(&Done { op: at, result: Ok(lens[at as usize]) }), "{provider}");
            let (begin, len) = (at as usize * SEGMENT, lens[at as usize]);
            assert!(receiver.bytes(begin, len) == sender.bytes(begin, len), "{provider}: message {at}");
            assert_eq!(receiver.bytes(begin + len, 10), [0; 10], "{provider}: beyond the message");
        }
    }
}

#[test]
fn a_cancelled_receive_is_reported_once_and_its_memory_left_alone() {
    for provider in providers_and_shm() {
        let (mut sender, mut receiver, peer, _) = pair(provider, LEN, Access::RemoteRead, Tuning::USUAL);
        receiver.driver.receive(11, receiver.range(0, 4096), 1).unwrap();
        receiver.driver.receive(12, receiver.range(4096, 4096), 2).unwrap();
        receiver.driver.cancel_receive(1);
        receiver.driver.cancel_receive(77);
        until(&mut [&mut receiver, &mut sender], provider, |ends| !ends[0].done.is_empty());
        assert!(
            matches!(&receiver.done[..], [Done { op: 1, result: Err(_) }]),
            "{provider}: {:?}",
            receiver.done
        );
        receiver.driver.cancel_receive(1);
        sender.fill(4);
        receiver.memory.write(0, &[9; 8192]);
        let from = sender.range(0, 4096);
        assert_eq!(post((&mut sender, &mut receiver), |end| end.driver.send(peer, 12, from, 12)), Ok(()));
        until(&mut [&mut receiver, &mut sender], provider, |ends| ends[0].done.len() == 2);
        assert_eq!(receiver.done[1], Done { op: 2, result: Ok(4096) }, "{provider}");
        assert!(receiver.bytes(0, 4096) == [9; 4096], "{provider}: written after it was cancelled");
        assert!(receiver.bytes(4096, 4096) == sender.bytes(0, 4096), "{provider}");
    }
}

#[test]
fn requests_come_without_being_awaited_however_many() {
    for provider in providers_and_shm() {
        let (mut sender, mut receiver, peer, _) = pair(provider, LEN, Access::RemoteRead, Tuning::USUAL);
        sender.fill(6);
        let (count, mut came) = (100, Vec::new());
        let len = |op: usize| 1 + op * 41 % REQUEST_MAX_BYTES;
        for op in 0..count {
            let from = sender.range(op, len(op));
            let posted = post((&mut sender, &mut receiver), |end| end.driver.ask(peer, from, op as u64));
            assert_eq!(posted, Ok(()), "{provider}");
        }
        until(&mut [&mut sender, &mut receiver], provider, |ends| {
            came.extend(std::iter::from_fn(|| ends[1].driver.take_request()));
            finished(ends[0], count) && came.len() >= count
        });
        let sent: std::collections::BTreeSet<_> = (0..count).map(|op| sender.bytes(op, len(op))).collect();
        assert_eq!(
            (came.len(), came.into_iter().collect()),
            (count, sent),
            "{provider}: each once, unchanged"
        );
        let long = sender.range(0, REQUEST_MAX_BYTES + 1);
        assert_eq!(sender.driver.ask(peer, long, 1000), Err(PostError::Range), "{provider}");
        assert!(receiver.done.is_empty(), "{provider}: nobody's operation");
    }
}

/// As many registrations, keys and peers as there are numbers: those in use are not given again.
#[test]
fn numbers_that_come_round_are_not_given_twice() {
    for provider in providers().into_iter().take(1) {
        let (mut reader, mut owner, peer, remote) = pair(provider, LEN, Access::RemoteRead, Tuning::USUAL);
        owner.fill(1);
        let used = [reader.id.0, peer.0, remote.0];
        reader.driver.next_id = 0;
        for _ in 0..5 {
            let (made, _) = reader.driver.register(&reader.memory.span(), Access::Local).unwrap();
            let taken = reader.driver.import(peer, &owner.key).unwrap();
            assert!(!used.contains(&made.0) && !used.contains(&taken.0) && made.0 != taken.0);
        }
        let to = reader.range(0, 4096);
        post((&mut reader, &mut owner), |end| end.driver.read(peer, remote, 0, to, 1)).unwrap();
        until(&mut [&mut reader, &mut owner], provider, |ends| finished(ends[0], 1));
        assert!(reader.bytes(0, 4096) == owner.bytes(0, 4096));
    }
}

/// A peer that asks and asks, without a look at what comes of it.
#[test]
fn requests_that_nobody_takes_do_not_add_up() {
    for provider in providers() {
        let (mut sender, mut receiver, peer, _) = pair(provider, LEN, Access::RemoteRead, Tuning::USUAL);
        let most = REQUESTS_MAX + 500;
        for op in 0..most {
            let from = sender.range(op, 64);
            let posted = post((&mut sender, &mut receiver), |end| end.driver.ask(peer, from, op as u64));
            assert_eq!(posted, Ok(()), "{provider}");
        }
        until(&mut [&mut sender, &mut receiver], provider, |ends| finished(ends[0], most));
        let came = std::iter::from_fn(|| receiver.driver.take_request()).count();
        assert!(came > 0 && came <= REQUESTS_MAX, "{provider}: {came} are kept");
        // Whoever asks next is heard.
        let from = sender.range(0, 100);
        post((&mut sender, &mut receiver), |end| end.driver.ask(peer, from, 1 << 40)).unwrap();
        until(&mut [&mut sender, &mut receiver], provider, |ends| {
            std::iter::from_fn(|| ends[1].driver.take_request()).any(|request| request.len() == 100)
        });
    }
}

#[test]
fn a_message_that_nobody_awaits_any_more_holds_up_no_other() {
    for provider in providers_and_shm() {
        let (mut sender, mut receiver, peer, _) = pair(provider, LEN, Access::RemoteRead, Tuning::USUAL);
        sender.fill(4);
        for round in 0..200 {
            // More than are kept in mind; long enough that a provider would not send it before it is awaited.
            let (late, next) = (1000 + round, 5000 + round);
            receiver.driver.receive(late, receiver.range(0, 100_000), late).unwrap();
            receiver.driver.cancel_receive(late);
            receiver.driver.receive(next, receiver.range(200_000, 100_000), next).unwrap();
            until(&mut [&mut receiver, &mut sender], provider, |ends| !ends[0].done.is_empty());
            for tag in [late, next] {
                let from = sender.range(tag as usize % 1000, 100_000);
                let posted = post((&mut sender, &mut receiver), |end| end.driver.send(peer, tag, from, tag));
                assert_eq!(posted, Ok(()), "{provider}");
            }
            until(&mut [&mut receiver, &mut sender], provider, |ends| {
                ends[0].done.len() == 2 && finished(ends[1], 2)
            });
            assert!(matches!(&receiver.done[0], Done { op, result: Err(_) } if *op == late), "{provider}");
            assert_eq!(receiver.done[1], Done { op: next, result: Ok(100_000) }, "{provider}");
            let sent = sender.bytes(next as usize % 1000, 100_000);
            assert!(receiver.bytes(200_000, 100_000) == sent, "{provider}");
            assert_eq!(receiver.bytes(0, 4096), [0; 4096], "{provider}: written after it was cancelled");
            receiver.done.clear();
            sender.done.clear();
        }
        // Cancelled receives whose messages never come do not add up.
        for tag in 10_000..10_300 {
            receiver.driver.receive(tag, receiver.range(0, 4096), tag).unwrap();
            receiver.driver.cancel_receive(tag);
        }
        until(&mut [&mut receiver, &mut sender], provider, |ends| ends[0].done.len() == 300);
        assert!(receiver.driver.slots_in_use() <= 300, "{provider}");
        until(&mut [&mut receiver, &mut sender], provider, |ends| ends[0].driver.slots_in_use() <= 129);
    }
}

#[test]
fn ranges_outside_registrations_are_not_posted() {
    for provider in providers().into_iter().take(1) {
        let (mut reader, owner, peer, remote) = pair(provider, 8192, Access::RemoteRead, Tuning::USUAL);
        let mut read = |from, offset, len| {
            let to = LocalRange { id: reader.id, offset, len };
            reader.driver.read(peer, remote, from, to, 1)
        };
        for (from, offset, len) in [
            (0, 0, 0),
            (0, 0, 8193),
            (0, 8192, 1),
            (0, usize::MAX, 2),
            (8192, 0, 1),
            (8191, 0, 2),
            (u64::MAX, 0, 2),
        ] {
            assert_eq!(read(from, offset, len), Err(PostError::Range), "{from} {offset} {len}");
        }
        let to = reader.range(0, 1);
        let unknown = LocalRange { id: LocalId(9999), ..to };
        assert_eq!(reader.driver.read(peer, remote, 0, unknown, 1), Err(PostError::Range));
        assert_eq!(reader.driver.read(peer, RemoteId(9999), 0, to, 1), Err(PostError::Range));
        let nobody = reader.driver.read(PeerId(9999), remote, 0, to, 1);
        assert!(matches!(nobody, Err(PostError::Failed(_))));
        reader.driver.forget(peer, remote);
        assert_eq!(reader.driver.read(peer, remote, 0, to, 1), Err(PostError::Range));
        reader.driver.deregister(reader.id);
        reader.driver.deregister(reader.id);
        assert_eq!(reader.driver.send(peer, 1, to, 1), Err(PostError::Range));
        assert_eq!(reader.driver.receive(1, to, 1), Err(PostError::Range));
        drop(owner);
    }
}

#[test]
fn a_key_ends_with_its_registration() {
    for (provider, tuning) in setups() {
        let (mut reader, mut owner, peer, remote) = pair(provider, LEN, Access::RemoteRead, tuning);
        owner.fill(5);
        let to = reader.range(0, 4096);
        assert_eq!(post((&mut reader, &mut owner), |end| end.driver.read(peer, remote, 0, to, 1)), Ok(()));
        until(&mut [&mut reader, &mut owner], provider, |ends| finished(ends[0], 1));
        reader.memory.write(0, &[0; 4096]);
        owner.driver.deregister(owner.id);
        // A refused request may break the connection: then the next one fails.
        let posted = post((&mut reader, &mut owner), |end| end.driver.read(peer, remote, 0, to, 2));
        if posted.is_ok() {
            until(&mut [&mut reader, &mut owner], provider, |ends| ends[0].done.len() == 2);
            assert!(reader.done[1].result.is_err(), "{provider}: {:?}", reader.done[1]);
        }
        println!(
            "{provider}: a read with the key of an ended registration: {posted:?} {:?}",
            reader.done.get(1)
        );
        assert_eq!(reader.bytes(0, 4096), [0; 4096], "{provider}: bytes came all the same");
        // The owner serves others as before.
        let (id, key) = owner.driver.register(&owner.memory.span(), Access::RemoteRead).unwrap();
        (owner.id, owner.key) = (id, key);
        let again = reader.driver.connect(&owner.driver.address()).unwrap();
        let remote = reader.driver.import(again, &owner.key).unwrap();
        assert_eq!(post((&mut reader, &mut owner), |end| end.driver.read(again, remote, 0, to, 3)), Ok(()));
        let op = 3;
        until(&mut [&mut reader, &mut owner], provider, |ends| ends[0].done.iter().any(|done| done.op == op));
        assert!(reader.bytes(0, 4096) == owner.bytes(0, 4096), "{provider}");
    }
}

#[test]
fn only_what_was_granted_can_be_done_with_a_key() {
    for provider in providers() {
        let (mut writer, mut owner, peer, remote) = pair(provider, LEN, Access::RemoteRead, Tuning::USUAL);
        writer.fill(6);
        let from = writer.range(0, 4096);
        let posted = post((&mut writer, &mut owner), |end| end.driver.write(peer, remote, 0, from, 1));
        if posted.is_ok() {
            until(&mut [&mut writer, &mut owner], provider, |ends| !ends[0].done.is_empty());
            assert!(writer.done[0].result.is_err(), "{provider}: written with a key for reading");
        }
        assert_eq!(owner.bytes(0, 4096), [0; 4096], "{provider}: written with a key for reading");
    }
}

#[test]
fn nothing_is_written_where_that_could_not_be_revoked() {
    for provider in providers_and_shm().into_iter().filter(|provider| *provider == "shm") {
        let (mut writer, owner, peer, remote) = pair(provider, LEN, Access::RemoteWrite, Tuning::USUAL);
        assert!(!writer.driver.info().write);
        let refused = writer.driver.write(peer, remote, 0, writer.range(0, 4096), 1);
        assert!(matches!(refused, Err(PostError::Failed(_))), "{refused:?}");
        assert_eq!(owner.bytes(0, 4096), [0; 4096]);
    }
}

#[test]
fn guessed_keys_and_wild_offsets_harm_nobody() {
    for provider in providers() {
        let (mut reader, mut owner, ..) = pair(provider, LEN, Access::RemoteRead, Tuning::USUAL);
        owner.fill(7);
        let real = Key::decode(&owner.key).unwrap();
        let wild = [
            Key { keys: vec![real.keys[0] ^ 1], ..real.clone() },
            Key { keys: vec![0], ..real.clone() },
            Key { keys: vec![u64::MAX], ..real.clone() },
            // A reader that believes the memory to be longer than it is.
            Key { len: 1 << 40, segment: 1 << 41, ..real.clone() },
            Key { base: 0x1234_5678, virtual_addresses: true, ..real.clone() },
        ];
        for (number, key) in wild.iter().enumerate() {
            let peer = reader.driver.connect(&owner.driver.address()).unwrap();
            let remote = reader.driver.import(peer, &key.encode()).unwrap();
            let offset = if key.len > LEN as u64 { (1 << 40) - 4096 } else { 0 };
            let (to, op) = (reader.range(0, 4096), number as u64);
            reader.done.clear();
            let posted = post((&mut reader, &mut owner), |end| end.driver.read(peer, remote, offset, to, op));
            if posted.is_ok() {
                until(&mut [&mut reader, &mut owner], provider, |ends| !ends[0].done.is_empty());
                assert!(reader.done[0].result.is_err(), "{provider}: {key:?} was taken");
            }
            reader.driver.disconnect(peer);
        }
        assert_eq!(reader.bytes(0, 4096), [0; 4096], "{provider}");
        let peer = reader.driver.connect(&owner.driver.address()).unwrap();
        let remote = reader.driver.import(peer, &owner.key).unwrap();
        let to = reader.range(0, LEN);
        reader.done.clear();
        assert_eq!(post((&mut reader, &mut owner), |end| end.driver.read(peer, remote, 0, to, 99)), Ok(()));
        until(&mut [&mut reader, &mut owner], provider, |ends| finished(ends[0], 1));
        assert!(reader.bytes(0, LEN) == pattern(7, LEN), "{provider}");
    }
}

#[test]
fn addresses_nobody_is_at_fail_and_hostile_ones_are_refused() {
    for provider in providers() {
        let mut reader = End::new(&options(provider), LEN, Access::Local, Tuning::USUAL);
        let mut owner = End::new(&options(provider), LEN, Access::RemoteRead, Tuning::USUAL);
        let real = owner.driver.address();
        for cut in 0..real.len() {
            assert!(reader.driver.connect(&real[..cut]).is_err(), "{provider}: {cut} bytes");
        }
        let mut elsewhere = real.clone();
        // The port of the only rail: version, rails, length, family.
        elsewhere[5..7].copy_from_slice(&1_u16.to_be_bytes());
        let peer = reader.driver.connect(&elsewhere).unwrap();
        let remote = reader.driver.import(peer, &owner.key).unwrap();
        let to = reader.range(0, 4096);
        let posted = reader.driver.read(peer, remote, 0, to, 1);
        let begun = Instant::now();
        while posted.is_ok() && reader.done.is_empty() && begun.elapsed() < Duration::from_secs(2) {
            reader.poll();
            owner.poll();
        }
        println!("{provider}: nobody at the port: {posted:?} {:?} after {:?}", reader.done, begun.elapsed());
        reader.driver.disconnect(peer);
        reader.poll();
        if posted.is_ok() {
            assert!(
                matches!(&reader.done[..], [Done { op: 1, result: Err(_) }]),
                "{provider}: {:?}",
                reader.done
            );
        }
        reader.driver.disconnect(peer);
    }
}

#[test]
fn disconnecting_reports_what_is_under_way_and_nothing_lands_after_it() {
    for (provider, tuning) in setups_and_shm() {
        let (mut reader, mut owner, peer, remote) = pair(provider, 32 << 20, Access::RemoteRead, tuning);
        owner.fill(8);
        let to = reader.range(0, 4096);
        assert_eq!(post((&mut reader, &mut owner), |end| end.driver.read(peer, remote, 0, to, 100)), Ok(()));
        until(&mut [&mut reader, &mut owner], provider, |ends| finished(ends[0], 1));
        reader.done.clear();
        let mut posted = 0;
        for op in 0..32 {
            let to = reader.range(op << 20, 1 << 20);
            posted += usize::from(reader.driver.read(peer, remote, 0, to, op as u64).is_ok());
        }
        assert!(posted > 0, "{provider}");
        // The owner answers some of it, so that bytes are on their way.
        owner.poll();
        let begun = Instant::now();
        reader.driver.disconnect(peer);
        assert!(
            begun.elapsed() < crate::backend::fabric::driver::CALL_MAX,
            "{provider}: {:?}",
            begun.elapsed()
        );
        let quiet = vec![0xee; 32 << 20];
        reader.memory.write(0, &quiet);
        reader.poll();
        assert_eq!(reader.done.len(), posted, "{provider}: each once");
        for _ in 0..2000 {
            owner.poll();
            reader.poll();
        }
        assert_eq!(reader.done.len(), posted, "{provider}: each once");
        assert!(reader.bytes(0, 32 << 20) == quiet, "{provider}: written after it was disconnected");
        let nothing = reader.driver.read(peer, remote, 0, reader.range(0, 1), 1);
        assert!(matches!(nothing, Err(PostError::Failed(_))));
        // And both are as good as new.
        let again = reader.driver.connect(&owner.driver.address()).unwrap();
        let remote = reader.driver.import(again, &owner.key).unwrap();
        reader.done.clear();
        let to = reader.range(0, 1 << 20);
        assert_eq!(post((&mut reader, &mut owner), |end| end.driver.read(again, remote, 0, to, 7)), Ok(()));
        until(&mut [&mut reader, &mut owner], provider, |ends| finished(ends[0], 1));
        assert!(reader.bytes(0, 1 << 20) == owner.bytes(0, 1 << 20), "{provider}");
    }
}

#[test]
fn memory_stays_until_nothing_can_touch_it() {
    for provider in providers_and_shm() {
        let (mut reader, mut owner, peer, remote) =
            pair(provider, 8 << 20, Access::RemoteRead, Tuning::USUAL);
        let memory = HostMemory::allocate(8 << 20, "short-lived").unwrap();
        let witness = memory.clone();
        let (id, _) = reader.driver.register(&memory.span(), Access::Local).unwrap();
        drop(memory);
        owner.fill(9);
        let to = LocalRange { id, offset: 0, len: 8 << 20 };
        assert_eq!(post((&mut reader, &mut owner), |end| end.driver.read(peer, remote, 0, to, 1)), Ok(()));
        reader.driver.deregister(id);
        assert_eq!(reader.driver.read(peer, remote, 0, to, 2), Err(PostError::Range), "{provider}");
        until(&mut [&mut reader, &mut owner], provider, |ends| finished(ends[0], 1));
        let mut bytes = vec![0; 8 << 20];
        witness.read(0, &mut bytes);
        assert!(bytes == pattern(9, 8 << 20), "{provider}");
        assert!(
            reader
                .driver
                .registrations
                .values()
                .all(|registration| !registration.span.is_same(&witness.span()))
        );
    }
}

#[test]
fn too_many_pieces_are_refused_with_the_limit() {
    for provider in providers().into_iter().take(1) {
        let tuning = Tuning { segment: Some(4096), per_interface: 2 };
        let mut driver = open_with(&options(provider), tuning).unwrap();
        let memory = HostMemory::allocate(4 << 20, "long").unwrap();
        let error = driver.register(&memory.span(), Access::RemoteRead).unwrap_err();
        assert!(error.what.contains(&(4096 * 126).to_string()), "{error}");
        assert!(error.remedy.contains("fewer rails"), "{error:?}");
    }
}

#[test]
fn what_does_not_close_is_not_reported_until_it_does() {
    for provider in providers_and_shm() {
        let (mut reader, mut owner, peer, remote) =
            pair(provider, 1 << 20, Access::RemoteRead, Tuning::USUAL);
        // What waits for a connection is not with the library yet.
        let first = reader.range(0, 1);
        assert_eq!(post((&mut reader, &mut owner), |end| end.driver.read(peer, remote, 0, first, 0)), Ok(()));
        until(&mut [&mut reader, &mut owner], provider, |ends| finished(ends[0], 1));
        reader.done.clear();
        let to = reader.range(0, 1 << 20);
        assert_eq!(post((&mut reader, &mut owner), |end| end.driver.read(peer, remote, 0, to, 1)), Ok(()));
        REFUSALS.set(3);
        reader.driver.disconnect(peer);
        for _ in 0..2 {
            assert!(reader.driver.lingers(peer), "{provider}");
            reader.poll();
            assert!(reader.done.is_empty(), "{provider}: it may still be written");
        }
        until(&mut [&mut reader, &mut owner], provider, |ends| finished_badly(ends[0], 1));
        assert!(!reader.driver.lingers(peer) && REFUSALS.get() == 0, "{provider}");
        reader.memory.write(0, &[0xee; 1 << 20]);
        for _ in 0..200 {
            owner.poll();
            reader.poll();
        }
        assert!(reader.done.len() == 1 && reader.bytes(0, 1 << 20) == [0xee; 1 << 20], "{provider}");
    }
}

fn finished_badly(end: &End, op: u64) -> bool {
    end.done.iter().any(|done| done.op == op && done.result.is_err())
}

/// Marks the argument that turns the test below into a process that ends badly: `libfabric-unclosed:PROVIDER`.
const UNCLOSED: &str = "libfabric-unclosed:";

#[test]
fn the_process_whose_connection_does_not_close() {
    let Some(provider) = std::env::args().find_map(|arg| arg.strip_prefix(UNCLOSED).map(str::to_owned))
    else {
        assert!(std::env::args().all(|argument| !argument.contains(UNCLOSED)));
        return;
    };
    // Libfabric's own libraries catch the signal otherwise.
    let opened = handlers::keep(|| pair(&provider, 1 << 20, Access::RemoteRead, Tuning::USUAL));
    let (mut reader, mut owner, peer, remote) = opened;
    let to = reader.range(0, 1 << 20);
    assert_eq!(post((&mut reader, &mut owner), |end| end.driver.read(peer, remote, 0, to, 1)), Ok(()));
    REFUSALS.set(1000);
    drop(reader.driver);
    // The memory would be somebody else's from here on.
    REFUSALS.set(0);
}

#[test]
fn memory_that_is_not_let_go_of_is_never_anybody_elses() {
    for provider in providers().into_iter().take(1) {
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "backend::libfabric::tests::one_process::the_process_whose_connection_does_not_close",
            ])
            .arg(format!("{UNCLOSED}{provider}"))
            .status()
            .unwrap();
        let signal = std::os::unix::process::ExitStatusExt::signal(&status);
        assert_eq!(signal, Some(rustix::process::Signal::ABORT.as_raw()), "{status}");
    }
}

/// Drops an endpoint that does not close, on another thread.
struct Elsewhere(&'static str);

impl Drop for Elsewhere {
    fn drop(&mut self) {
        let provider = self.0;
        let other = std::thread::spawn(move || {
            let mut driver = open_with(&options(provider), Tuning::USUAL).unwrap();
            let Rail { passive, domain, fabric, .. } = driver.rails.pop().unwrap();
            REFUSALS.set(1);
            let closed = close(passive);
            std::mem::forget((domain, fabric));
            closed
        });
        assert!(!other.join().unwrap());
    }
}

#[test]
fn what_another_driver_does_not_close_is_its_own_affair() {
    for provider in providers().into_iter().take(1) {
        assert!(close(Elsewhere(provider)));
    }
}

#[test]
fn memory_that_was_shown_again_and_again_is_kept_once() {
    for provider in providers().into_iter().take(1) {
        let mut end = End::new(&options(provider), 4096, Access::Local, Tuning::USUAL);
        for _ in 0..5 {
            // As the registry lends it, and as it is.
            for span in [end.memory.span().lent(), end.memory.span()] {
                let (id, _) = end.driver.register(&span, Access::RemoteRead).unwrap();
                end.driver.deregister(id);
            }
        }
        assert_eq!(end.driver.retired.bytes(), 4096);
        let other = HostMemory::allocate(8192, "other").unwrap();
        let (id, _) = end.driver.register(&other.span(), Access::RemoteWrite).unwrap();
        end.driver.deregister(id);
        assert_eq!(end.driver.retired.bytes(), 4096 + 8192);
    }
}

/// `sockets` waits in its call: documented, and used where nothing else works.
#[test]
fn a_host_that_does_not_answer_holds_up_no_call() {
    for provider in providers().into_iter().filter(|provider| *provider != "sockets") {
        let mut end = End::new(&options(provider), 4096, Access::Local, Tuning::USUAL);
        let (silent, _kept) = silent_host();
        let mut theirs = end.driver.address();
        let own = end.driver.rails[0].name.clone();
        let port = blob::socket_address(&own).unwrap().port().to_be_bytes();
        for at in (0..theirs.len() - 1).filter(|at| theirs[*at..*at + 2] == port).collect::<Vec<_>>() {
            theirs[at..at + 2].copy_from_slice(&silent.port().to_be_bytes());
        }
        let range = end.range(0, 100);
        let peer = Cell::new(PeerId(0));
        let calls: [&mut dyn FnMut(&mut LibfabricDriver); 3] = [
            &mut |driver| peer.set(driver.connect(&theirs).unwrap()),
            &mut |driver| drop(driver.ask(peer.get(), range, 5)),
            &mut |driver| driver.disconnect(peer.get()),
        ];
        let longest = longest_call(&mut end.driver, calls);
        assert!(longest < Duration::from_secs(1), "{provider}: {longest:?}");
    }
}
