//! Ports for servers that are named before they listen, or are away for a while.

use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU16, Ordering};

/// An address of this host with a free port: below those that the system gives to who asks for any, so that nobody
/// takes it meanwhile.
///
/// # Panics
/// When all are taken.
pub fn free() -> SocketAddr {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    for _ in 0..10_000 {
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        // Test processes run side by side: each starts somewhere else.
        let port = 12_000 + (std::process::id() as u16).wrapping_mul(37).wrapping_add(step) % 20_000;
        if let Ok(listener) = TcpListener::bind(("127.0.0.1", port)) {
            return listener.local_addr().expect("an address");
        }
    }
    panic!("no free port");
}
