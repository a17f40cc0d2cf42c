//! `tcp`: blocks gathered straight from region memory into a socket and scattered straight into place.
//!
//! A session has a few streams. A read takes one or, when it is large, several of them, asks each for its share of
//! the blocks, and receives `Data` frames: a header and then the bytes of the blocks in the order asked for. A
//! stream whose read was dropped, failed or ran out of time is closed, so no stream ever carries half an answer.

pub(crate) mod link;
mod receive;
pub(crate) mod serve;

use std::time::Duration;

use rustix::net::sockopt;
use tokio::net::TcpStream;

/// How long the system goes on sending to a peer that acknowledges nothing before it gives the connection up.
const LOST_HOST_TIMEOUT: Duration = Duration::from_secs(15);

/// Small frames at once, lost hosts noticed. Options the system does not know are no reason to fail.
fn tune(stream: &TcpStream) {
    let _ = stream.set_nodelay(true);
    let _ = sockopt::set_socket_keepalive(stream, true);
    let _ = sockopt::set_tcp_keepidle(stream, LOST_HOST_TIMEOUT);
    let _ = sockopt::set_tcp_user_timeout(stream, LOST_HOST_TIMEOUT.as_millis() as u32);
}
