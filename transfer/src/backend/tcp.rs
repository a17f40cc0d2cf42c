//! `tcp`: blocks gathered straight from region memory into a socket and scattered straight into place.
//!
//! A session has a few streams. A read takes one or, when it is large, several of them, asks each for its share of
//! the blocks, and receives `Data` frames: a header and then the bytes of the blocks in the order asked for. A
//! stream whose read was dropped, failed or ran out of time is closed, so no stream ever carries half an answer.

mod gather;
pub(crate) mod link;
mod receive;
pub(crate) mod serve;

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::net::sockopt;
use tokio::net::TcpStream;

/// How long the system goes on sending to a peer that acknowledges nothing before it gives the connection up.
const LOST_HOST_TIMEOUT: Duration = Duration::from_secs(15);

/// Congestion control of streams that stay on this host: every system has and allows it.
const LOCAL_CONTROL: &str = "reno";

/// Small frames at once, lost hosts noticed. Options the system does not know are no reason to fail.
pub(crate) fn tune(stream: &TcpStream) {
    let _ = stream.set_nodelay(true);
    let _ = sockopt::set_socket_keepalive(stream, true);
    let _ = sockopt::set_tcp_keepidle(stream, LOST_HOST_TIMEOUT);
    let _ = sockopt::set_tcp_user_timeout(stream, LOST_HOST_TIMEOUT.as_millis() as u32);
    tune_local(stream, stream.local_addr(), stream.peer_addr());
}

/// Takes a connection within this host, whose ends have one address, from a congestion control that paces (bbr).
///
/// Nothing is lost or queued on the way, and yet it waits for a timer between segments: a read of 64 blocks of 64 KiB
/// takes 430 instead of 275 us. Between hosts the choice is the operator's.
pub(crate) fn tune_local(stream: impl AsFd, own: io::Result<SocketAddr>, peer: io::Result<SocketAddr>) {
    if is_local(own, peer) {
        let _ = sockopt::set_tcp_congestion(stream, LOCAL_CONTROL);
    }
}

/// Whether a connection stays on this host: its ends have one address.
fn is_local(own: io::Result<SocketAddr>, peer: io::Result<SocketAddr>) -> bool {
    matches!((own, peer), (Ok(own), Ok(peer)) if own.ip() == peer.ip())
}
