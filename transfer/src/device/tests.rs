use std::time::{Duration, Instant};

use super::emulated::{BURST, CopyEngine};
use super::*;
use crate::digest::block_digest;

#[test]
fn copies_carry_exactly_the_range_they_name() {
    let device = EmulatedDevice::new(4096, None).unwrap();
    let host = HostMemory::allocate(4096, "host").unwrap();
    device.write(100, b"keys and values");
    device.copy_to_host(100, &host, 7, 15).unwrap();
    let mut out = [0; 17];
    host.read(6, &mut out);
    assert_eq!(&out, b"\0keys and values\0");
    host.write(2000, b"back");
    device.copy_from_host(0, &host, 2000, 4).unwrap();
    let mut out = [0; 5];
    device.read(0, &mut out);
    assert_eq!(&out, b"back\0");
}

#[test]
#[should_panic(expected = "outside")]
fn a_copy_past_the_end_is_a_bug() {
    let device = EmulatedDevice::new(4096, None).unwrap();
    let host = HostMemory::allocate(8192, "host").unwrap();
    let _ = device.copy_to_host(4000, &host, 0, 97);
}

#[test]
fn the_copy_engine_serialises_copies_at_its_bandwidth() {
    let engine = CopyEngine::new(1_000_000);
    let start = Instant::now();
    let ms = Duration::from_millis;
    assert_eq!(engine.reserve(10_000, start), start + ms(10));
    assert_eq!(engine.reserve(10_000, start), start + ms(20), "the second waits for the first");
    assert_eq!(engine.reserve(5_000, start + ms(15)), start + ms(25), "one that comes later queues as well");
}

#[test]
fn an_idle_copy_engine_saves_up_one_burst_at_most() {
    let engine = CopyEngine::new(1_000_000);
    let start = Instant::now();
    let ms = Duration::from_millis;
    assert_eq!(engine.reserve(1_000, start), start + ms(1));
    let later = start + ms(500);
    assert_eq!(engine.reserve(10_000, later), later + ms(10) - BURST);
}

#[test]
fn a_paced_copy_returns_no_earlier_than_its_bandwidth_allows() {
    let device = EmulatedDevice::new(1 << 16, Some(1 << 22)).unwrap();
    let host = HostMemory::allocate(1 << 16, "host").unwrap();
    let start = Instant::now();
    device.copy_to_host(0, &host, 0, 1 << 16).unwrap();
    assert!(start.elapsed() >= Duration::from_secs_f64(1.0 / 64.0));
}

#[test]
fn a_submitted_copy_moves_its_bytes_when_it_is_finished_or_dropped() {
    let device = EmulatedDevice::new(4096, None).unwrap();
    let host = HostMemory::allocate(4096, "host").unwrap();
    device.write(0, b"new");
    let mut seen = [0; 3];
    let copy = device.submit_to_host(0, &host, 0, 3).unwrap();
    host.read(0, &mut seen);
    assert_eq!(&seen, b"\0\0\0", "whoever does not wait sees what was there before");
    copy.finish().unwrap();
    host.read(0, &mut seen);
    assert_eq!(&seen, b"new");
    drop(device.submit_from_host(8, &host, 0, 3).unwrap());
    device.read(8, &mut seen);
    assert_eq!(&seen, b"new");
}

#[test]
fn copies_submitted_together_take_their_time_together_with_other_work() {
    let device = EmulatedDevice::new(1 << 16, Some(1 << 22)).unwrap();
    let host = HostMemory::allocate(1 << 16, "host").unwrap();
    let start = Instant::now();
    let copies: Vec<Submitted> =
        (0..4).map(|i| device.submit_to_host(i << 14, &host, i << 14, 1 << 14).unwrap()).collect();
    for copy in copies {
        copy.finish().unwrap();
    }
    assert!(start.elapsed() >= Duration::from_secs_f64(1.0 / 64.0) - BURST, "one engine serves them all");
}

#[test]
fn a_reachable_device_digests_and_moves_its_own_blocks() {
    let device = EmulatedDevice::new(1 << 16, None).unwrap().reachable();
    assert!(EmulatedDevice::new(4096, None).unwrap().kernels().is_err());
    let bytes: Vec<u8> = (0..1u32 << 16).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    device.write(0, &bytes);
    let seed =
        |index| DigestSeed { handoff: baton_config::HandoffId(9), epoch: baton_config::Epoch(2), index };
    let kernels = device.kernels().unwrap();
    let digests = kernels.digest_blocks(&[(512, seed(0)), (40_000, seed(1))], 1024).unwrap();
    let expected =
        [block_digest(seed(0), &bytes[512..][..1024]), block_digest(seed(1), &bytes[40_000..][..1024])];
    assert_eq!(digests, expected);
    // Two rows of three runs of 4 bytes, transposed.
    let loops =
        [MoveLoop { count: 3, from: 4, to: 8 }, MoveLoop { count: 2, from: 12, to: 4 }, MoveLoop::ONCE];
    let transpose = Move { from: 0, to: 1024, run: 4, loops };
    assert_eq!(transpose.ends(), (24, 1048));
    kernels.relayout(&[transpose]).unwrap();
    let mut moved = [0; 24];
    device.read(1024, &mut moved);
    let runs: Vec<u8> = [0, 12, 4, 16, 8, 20].iter().flat_map(|at| bytes[*at..][..4].to_vec()).collect();
    assert_eq!(moved[..], runs[..]);
}
