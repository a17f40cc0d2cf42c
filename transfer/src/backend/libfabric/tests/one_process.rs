//! Two drivers in one process.

use super::*;

const LEN: usize = 4 << 20;

#[test]
fn a_read_brings_the_bytes() {
    for provider in providers() {
        let mut reader = End::new(&options(provider), LEN, Access::Local, Tuning::USUAL);
        let mut owner = End::new(&options(provider), LEN, Access::RemoteRead, Tuning::USUAL);
        owner.fill(1);
        let peer = reader.driver.connect(&owner.driver.address()).unwrap();
        let remote = reader.driver.import(peer, &owner.key).unwrap();
        let to = reader.range(4096, 65536);
        let posted = post((&mut reader, &mut owner), |end| end.driver.read(peer, remote, 8192, to, 7));
        assert_eq!(posted, Ok(()), "{provider}");
        until(&mut [&mut reader, &mut owner], provider, |ends| !ends[0].done.is_empty());
        assert_eq!(reader.done, [Done { op: 7, result: Ok(65536) }], "{provider}");
        assert!(reader.bytes(4096, 65536) == pattern(1, LEN)[8192..8192 + 65536], "{provider}");
        assert!(reader.bytes(0, 4096) == vec![0; 4096], "{provider}: bytes before the range");
        println!("{provider}: {}", reader.driver.info().detail);
    }
}
