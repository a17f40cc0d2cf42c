//! Answers of one JSON object a line, each sent as soon as it is there.

use axum::body::{Body, Bytes};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::Serialize;
use tokio::sync::mpsc;

/// The media type.
const NDJSON: &str = "application/x-ndjson";

/// One line.
pub(super) fn line<T: Serialize>(value: &T) -> Bytes {
    let mut line = match serde_json::to_vec(value) {
        Ok(line) => line,
        Err(error) => {
            // Only maps with other keys than strings fail, and there are none.
            tracing::error!(%error, "a line could not be written");
            Vec::new()
        }
    };
    line.push(b'\n');
    line.into()
}

/// An answer made of the lines that come through a channel; the sender sees when the client has left.
pub(super) fn response(mut lines: mpsc::Receiver<Bytes>) -> Response {
    let lines = stream::poll_fn(move |context| {
        lines.poll_recv(context).map(|line| line.map(Ok::<_, std::convert::Infallible>))
    });
    ([(http::header::CONTENT_TYPE, NDJSON)], Body::from_stream(lines)).into_response()
}
