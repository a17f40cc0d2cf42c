use proptest::prelude::*;

use super::*;

const ABILITIES: u32 = 0x0012_3400;

fn transport(name: &[u8], len: usize) -> Transport {
    Transport {
        name: crc16(name),
        costs: [5e-5, 1e10, 1e-5],
        abilities: ABILITIES,
        address: (0..len as u8).collect(),
    }
}

fn device(domain: u8, address: &[u8], transports: Vec<Transport>) -> Device {
    Device { domain, paths: None, system_device: None, address: address.to_vec(), transports }
}

/// As UCX 1.13 (no release) and 1.22 make them on loopback.
fn parts(release: Option<u8>) -> Parts {
    let tcp = device(0x20, &[1, 2, 0, 0, 0, 0, 0, 0, 0, 9], vec![transport(b"tcp", 2)]);
    let cma = Device {
        system_device: Some(3),
        paths: Some(2),
        ..device(0x21, &[7; 8], vec![transport(b"cma", 4), transport(b"cma", 12)])
    };
    Parts { worker: 0x0123_4567_89ab_cdef, devices: vec![tcp, cma], release }
}

fn form(release: Option<u8>) -> Form {
    Form::of(&parts(release).write(), false).unwrap()
}

#[test]
fn names_are_those_of_ucx() {
    // The check value of this CRC (X.25).
    assert_eq!(crc16(b"123456789"), 0x906e);
}

#[test]
fn a_genuine_address_comes_through_as_it_is() {
    for release in [None, Some(0x86)] {
        let address = parts(release).write();
        assert_eq!(Parts::read(&address), Some(parts(release)));
        let taken = form(release).take(&address).unwrap();
        assert_eq!(taken.split_at(address.len()), (&address[..], &[0; PADDING][..]));
    }
}

#[test]
fn transports_that_are_not_ours_are_left_out() {
    let mut theirs = parts(None);
    theirs.devices[0].transports.push(transport(b"rc_mlx5", 3));
    theirs.devices.push(device(4, &[1; 20], vec![transport(b"ud_mlx5", 3)]));
    let taken = form(None).take(&theirs.write()).unwrap();
    assert_eq!(taken[..taken.len() - PADDING], parts(None).write());
    theirs.devices.drain(..2);
    assert!(form(None).take(&theirs.write()).unwrap_err().contains("no transport"));
}

type Change = fn(&mut Transport);

#[test]
fn what_ucx_would_trip_over_is_left_out() {
    let changes: [Change; 9] = [
        |transport| transport.costs[0] = f32::NAN,
        |transport| transport.costs[0] = -1.0,
        |transport| transport.costs[1] = 0.0,
        |transport| transport.costs[1] = f32::INFINITY,
        |transport| transport.costs[2] = 1e9,
        |transport| transport.abilities ^= 0x100,
        |transport| transport.abilities ^= 0x8000_0000,
        |transport| transport.address.push(0),
        |transport| transport.name ^= 1,
    ];
    for change in changes {
        let mut theirs = parts(None);
        theirs.devices.truncate(1);
        change(&mut theirs.devices[0].transports[0]);
        assert!(form(None).take(&theirs.write()).is_err(), "{theirs:?}");
    }
    let mut theirs = parts(None);
    theirs.devices.truncate(1);
    theirs.devices[0].address[0] = 0;
    assert!(form(None).take(&theirs.write()).is_err(), "another kind of IP address");
    // A priority may differ.
    let mut theirs = parts(None);
    theirs.devices[0].transports[0].abilities ^= 1;
    assert!(form(None).take(&theirs.write()).is_ok());
}

#[test]
fn other_headers_releases_and_ends_are_refused() {
    for release in [None, Some(0x86)] {
        let address = parts(release).write();
        for header in (0..=255).filter(|header| *header != HEADER) {
            assert!(form(release).take(&[&[header], &address[1..]].concat()).is_err());
        }
        for len in 0..address.len() {
            assert!(form(release).take(&address[..len]).is_err());
        }
        assert!(form(release).take(&[&address[..], &[0]].concat()).is_err());
    }
    assert!(form(None).take(&parts(Some(0x86)).write()).is_err());
    assert!(form(Some(0x86)).take(&parts(Some(0x87)).write()).is_err());
    assert!(form(Some(0x86)).take(&parts(None).write()).is_err());
    assert!(Form::of(&[0x21, 0, 0], false).is_none());
}

proptest! {
    #[test]
    fn whatever_comes_through_is_well_formed(
        changes in prop::collection::vec((0_usize..200, any::<u8>()), 1..8),
    ) {
        let mut address = parts(Some(0x86)).write();
        for (at, byte) in changes {
            let at = at % address.len();
            address[at] = byte;
        }
        if let Ok(taken) = form(Some(0x86)).take(&address) {
            let (taken, padding) = taken.split_at(taken.len() - PADDING);
            prop_assert!(padding.iter().all(|byte| *byte == 0));
            let parts = Parts::read(taken).unwrap();
            let sound = parts.devices.iter().flat_map(|device| &device.transports).all(|transport| {
                [crc16(b"tcp"), crc16(b"cma")].contains(&transport.name)
                    && transport.abilities >> 8 == ABILITIES >> 8
                    && transport.costs.iter().all(|cost| cost.is_finite() && *cost >= 0.0)
            });
            prop_assert!(sound);
        }
    }
}
