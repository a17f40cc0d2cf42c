//! Ports for the parts whose port the fleet file does not name.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};

/// Below the range that the kernel takes the ports of outgoing connections from, so that no connection can take a
/// port between the moment it is found free and the moment its part listens, or while its part restarts.
const FIRST: u16 = 20_000;
const LAST: u16 = 31_999;

/// Finds free ports, each once.
#[derive(Debug)]
pub(super) struct Ports {
    next: u16,
    given: BTreeSet<u16>,
}

impl Ports {
    /// Starts looking at a place that differs from launcher to launcher.
    pub(super) fn new(seed: u32) -> Self {
        let span = u32::from(LAST - FIRST) + 1;
        let offset = u16::try_from(seed.wrapping_mul(2_654_435_761) % span).unwrap_or(0);
        Self { next: FIRST + offset, given: BTreeSet::new() }
    }

    /// A port of `ip` that is free now and was not given before.
    pub(super) fn free(&mut self, ip: IpAddr) -> io::Result<SocketAddr> {
        for _ in FIRST..=LAST {
            let port = self.next;
            self.next = if port == LAST { FIRST } else { port + 1 };
            let address = SocketAddr::new(ip, port);
            match is_free(address) {
                Ok(()) if self.given.insert(port) => return Ok(address),
                Err(error) if error.kind() != io::ErrorKind::AddrInUse => return Err(error),
                _ => {}
            }
        }
        Err(io::Error::new(io::ErrorKind::AddrInUse, format!("every port from {FIRST} to {LAST} is taken")))
    }
}

/// Fails as listening would.
pub(super) fn is_free(address: SocketAddr) -> io::Result<()> {
    TcpListener::bind(address).map(drop)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn ports_are_free_and_given_once() {
        let ip = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let mut ports = Ports::new(7);
        let first = ports.free(ip).unwrap();
        let _holder = TcpListener::bind(first).unwrap();
        assert_eq!(is_free(first).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        ports.next = first.port();
        let second = ports.free(ip).unwrap();
        assert_ne!(first, second);
        ports.next = second.port();
        assert_ne!(ports.free(ip).unwrap(), second, "free, but given already");
    }
}
