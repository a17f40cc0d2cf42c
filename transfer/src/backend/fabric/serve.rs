//! What the owner of blocks answers on control connections about its fabrics.

use std::sync::Arc;

use bytes::Bytes;

use crate::agent::server::{Denial, Server};
use crate::backend::control::{Answer, Peer};
use crate::error::Refusal;
use crate::wire::Header;

/// What fabrics keep for one control connection.
#[derive(Default)]
pub(crate) struct Attachments {}

/// Answers `Attach`, `Key`, `Pack`, `Confirm` and `Window`.
pub(crate) async fn answer(
    _server: Arc<Server>,
    _peer: Arc<Peer>,
    _header: Header,
    _payload: Bytes,
) -> Result<Answer, Denial> {
    Err(Denial::Refused(Refusal::Unavailable))
}

/// The connection of `peer` has ended.
pub(crate) fn gone(_server: &Arc<Server>, _peer: &Peer) {}
