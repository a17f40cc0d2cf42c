use super::*;

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
