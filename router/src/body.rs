//! Reads request bodies: of the right kind, of bounded size, arriving in time.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HOST};
use http::{HeaderMap, HeaderValue, Uri};
use http_body_util::BodyExt as _;
use hyper::body::{Body as _, Incoming};

use crate::reply::Refusal;
use crate::room::{Body, Held, Room};

/// Largest head of a request, as counted by [`check_size`].
pub(crate) const HEAD_MAX_BYTES: usize = 64 << 10;

/// Most fields of a head; hyper's own limit for HTTP/1, which it has none of for HTTP/2.
const HEADERS_MAX: usize = 100;
/// Longest time a client may be ready to wait, in milliseconds.
const MAX_WAIT_MS: u64 = 3_600_000;

/// Room that is made for a body because its head says so, once some of it has come: what does not come takes no memory.
const RESERVED_MAX_BYTES: u64 = 2 << 20;

/// `x-baton-max-wait-ms`: how long the client is ready to wait for a place.
pub(crate) fn max_wait(headers: &HeaderMap) -> Result<Option<Duration>, Refusal> {
    const NAME: &str = "x-baton-max-wait-ms";
    let Some(value) = headers.get(NAME) else { return Ok(None) };
    let text = value.to_str().ok().filter(|text| text.len() <= 7 && text.bytes().all(|b| b.is_ascii_digit()));
    match text.and_then(|text| text.parse::<u64>().ok()).filter(|ms| (1..=MAX_WAIT_MS).contains(ms)) {
        Some(ms) => Ok(Some(Duration::from_millis(ms))),
        None => {
            Err(Refusal::invalid(NAME, format!("'{NAME}' must be a whole number from 1 to {MAX_WAIT_MS}.")))
        }
    }
}

/// What the head says of the length of the body.
pub(crate) fn announced(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok())
}

/// Refuses a head that is too large; hyper's own limit is on its buffer, which may overshoot.
pub(crate) fn check_size(uri: &Uri, headers: &HeaderMap) -> Result<(), Refusal> {
    let target = uri.path_and_query().map_or(0, |target| target.as_str().len());
    let fields: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
    if target + fields > HEAD_MAX_BYTES || headers.len() > HEADERS_MAX {
        return Err(Refusal::HeadTooLarge);
    }
    // Something in front may have looked at the other one.
    if headers.get_all(HOST).iter().count() > 1 {
        return Err(Refusal::malformed("The request names two hosts."));
    }
    Ok(())
}

/// Refuses by the head alone: nothing of the body is read for a request that cannot be served.
pub(crate) fn check_head(headers: &HeaderMap, limit: baton_config::Bytes) -> Result<(), Refusal> {
    if let Some(encoding) = headers.get(CONTENT_ENCODING)
        && encoding.as_bytes() != b"identity"
    {
        let message = "Content-Encoding is not supported; send the JSON as it is.".to_owned();
        return Err(Refusal::MediaType { message });
    }
    // Clients that send no type at all are common enough; one that names another type means it.
    if let Some(kind) = headers.get(CONTENT_TYPE)
        && !is_json(kind)
    {
        let message = "Content-Type must be application/json.".to_owned();
        return Err(Refusal::MediaType { message });
    }
    if announced(headers).is_some_and(|length| length > limit.0) {
        return Err(Refusal::TooLarge { limit: limit.0 });
    }
    Ok(())
}

fn is_json(value: &HeaderValue) -> bool {
    let Ok(text) = value.to_str() else { return false };
    let kind = text.split(';').next().unwrap_or_default().trim();
    kind.eq_ignore_ascii_case("application/json")
}

/// Reads a whole body, each piece within `patience` of the one before, as far as there is room for it.
pub(crate) async fn read(
    mut body: Incoming,
    limit: baton_config::Bytes,
    patience: Duration,
    room: &Room,
) -> Result<Body, Refusal> {
    let expected = body.size_hint().exact().unwrap_or(0).min(RESERVED_MAX_BYTES);
    let mut first: Option<Bytes> = None;
    let mut all = BytesMut::new();
    let mut held = Held::default();
    // A body that drips is as bad as one that stalls: all of it gets the patience of six pieces.
    let deadline = tokio::time::Instant::now() + patience * 6;
    loop {
        let piece =
            tokio::time::timeout_at(deadline.min(tokio::time::Instant::now() + patience), body.frame());
        let frame = match piece.await {
            Err(_) => return Err(Refusal::SlowBody),
            Ok(None) => break,
            Ok(Some(Ok(frame))) => frame,
            Ok(Some(Err(_))) => {
                return Err(Refusal::malformed("The request body is broken off or badly framed."));
            }
        };
        let Ok(data) = frame.into_data() else { continue };
        let so_far = first.as_ref().map_or(0, Bytes::len) + all.len();
        let length = (so_far + data.len()) as u64;
        if length > limit.0 {
            return Err(Refusal::TooLarge { limit: limit.0 });
        }
        room.grow(&mut held, length).map_err(Refusal::Overloaded)?;
        match (&first, all.is_empty()) {
            (None, true) => first = Some(data),
            (Some(head), true) => {
                all.reserve((expected as usize).max(head.len() + data.len()));
                all.extend_from_slice(head);
                all.extend_from_slice(&data);
                first = None;
            }
            _ => all.extend_from_slice(&data),
        }
    }
    Ok(Body { bytes: first.unwrap_or_else(|| all.freeze()), held })
}
