//! The TCP connections that a network library made for itself, where they stay on this host: taken from a congestion
//! control that paces, as those of `tcp` are (see [`tune_local`]).
//!
//! A library tells nobody its sockets, but where they are bound and where they lead to: so they are found among all of
//! the process's.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{BorrowedFd, RawFd};

use rustix::net::{getpeername, getsockname};

use super::tcp::tune_local;

/// Where the kernel lists the descriptors of this process.
const DESCRIPTORS: &str = "/proc/self/fd";

/// Tunes what is accepted at `own` from now on: a connection begins with the settings of its listener. An address that
/// other hosts reach is left alone.
pub(crate) fn tune_listener(own: SocketAddr) {
    if own.ip().is_loopback() {
        tune(|at, to| (at == own && to.is_none()).then_some(own));
    }
}

/// Tunes connections from here to `to`.
pub(crate) fn tune_connections(to: SocketAddr) {
    tune(|_, peer| peer.filter(|peer| *peer == to));
}

/// Tunes sockets bound to an address and connected to another or to none, as if they led to where `leads` says.
fn tune(leads: impl Fn(SocketAddr, Option<SocketAddr>) -> Option<SocketAddr>) {
    let Ok(descriptors) = std::fs::read_dir(DESCRIPTORS) else { return };
    let number = |name: std::ffi::OsString| name.to_str()?.parse::<RawFd>().ok();
    for fd in descriptors.flatten().filter_map(|entry| number(entry.file_name())) {
        // SAFETY: it was open a moment ago. Should it be another by now, it is asked the same, and at the worst an option
        // is set of another connection within this host; nothing is read, written or closed.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        let Some(own) = getsockname(fd).ok().and_then(|own| SocketAddr::try_from(own).ok()) else { continue };
        let peer = getpeername(fd).ok().flatten().and_then(|peer| SocketAddr::try_from(peer).ok());
        if let Some(to) = leads(own, peer) {
            tune_local(fd, io::Result::Ok(own), io::Result::Ok(to));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    use rustix::net::sockopt::{set_tcp_congestion, tcp_congestion};

    use super::*;

    fn control(socket: impl AsFd) -> String {
        tcp_congestion(socket).unwrap()
    }

    /// Gives a socket another control than the one that tuning gives; none: there is no other, or we may not.
    fn mistune(socket: impl AsFd) -> Option<String> {
        ["cubic", "bbr"]
            .into_iter()
            .find(|other| set_tcp_congestion(&socket, other).is_ok())
            .map(str::to_owned)
    }

    #[test]
    fn what_a_listener_accepts_is_tuned_and_other_sockets_are_not() {
        let (listener, other) =
            (TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
        let (Some(control_of_other), Some(_)) = (mistune(&other), mistune(&listener)) else {
            eprintln!("skipped: this process may choose no other congestion control");
            return;
        };
        tune_listener(listener.local_addr().unwrap());
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        assert_eq!((control(&listener), control(&accepted)), ("reno".to_owned(), "reno".to_owned()));
        assert_eq!(control(&other), control_of_other);
        assert_eq!(mistune(&client).as_ref(), Some(&control_of_other));
        tune_connections(other.local_addr().unwrap());
        assert_eq!(control(&client), control_of_other, "it leads elsewhere");
        tune_connections(listener.local_addr().unwrap());
        assert_eq!(control(&client), "reno");
    }
}
