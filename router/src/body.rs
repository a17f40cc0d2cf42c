//! Reads request bodies: of the right kind, of bounded size, arriving in time.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue, Uri};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;

use crate::reply::Refusal;

/// Largest head of a request, as counted by [`check_size`].
pub(crate) const HEAD_MAX_BYTES: usize = 64 << 10;

/// Refuses a head that is too large; hyper's own limit is on its buffer, which may overshoot.
pub(crate) fn check_size(uri: &Uri, headers: &HeaderMap) -> Result<(), Refusal> {
    let target = uri.path_and_query().map_or(0, |target| target.as_str().len());
    let fields: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
    if target + fields > HEAD_MAX_BYTES { Err(Refusal::HeadTooLarge) } else { Ok(()) }
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
    let length = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|length| length > limit.0) {
        return Err(Refusal::TooLarge { limit: limit.0 });
    }
    Ok(())
}

fn is_json(value: &HeaderValue) -> bool {
    let Ok(text) = value.to_str() else { return false };
    let kind = text.split(';').next().unwrap_or_default().trim();
    kind.eq_ignore_ascii_case("application/json")
}

/// Reads a whole body, each piece within `patience` of the one before.
pub(crate) async fn read(
    mut body: Incoming,
    limit: baton_config::Bytes,
    patience: Duration,
) -> Result<Bytes, Refusal> {
    let mut first: Option<Bytes> = None;
    let mut all = BytesMut::new();
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
        if (so_far + data.len()) as u64 > limit.0 {
            return Err(Refusal::TooLarge { limit: limit.0 });
        }
        match (&first, all.is_empty()) {
            (None, true) => first = Some(data),
            (Some(head), true) => {
                all.extend_from_slice(head);
                all.extend_from_slice(&data);
                first = None;
            }
            _ => all.extend_from_slice(&data),
        }
    }
    Ok(first.unwrap_or_else(|| all.freeze()))
}
