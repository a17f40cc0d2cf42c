use std::net::{Ipv4Addr, SocketAddr};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use super::*;

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\n\r\n";

/// Answers each connection with these pieces, one write each.
async fn served(pieces: &'static [&'static [u8]], streamed: bool) -> Result<Seen, Broken> {
    let listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).await.unwrap();
    let mut connection = Connection::new(listener.local_addr().unwrap());
    let server = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        // What was not read would turn the end of the connection into a fault of it.
        let mut request = [0; REQUEST.len()];
        stream.read_exact(&mut request).await.unwrap();
        for piece in pieces {
            stream.write_all(piece).await.unwrap();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::join!(server, connection.exchange(REQUEST, streamed)).1
}

#[tokio::test]
async fn a_chunked_stream_is_read_however_it_is_cut() {
    let seen = served(
        &[
            b"HTTP/1.1 200 OK\r\nTransfer-",
            b"Encoding: chunked\r\n\r\n1E\r\ndata: {\"delta\":{\"content\":\"\"}}\r",
            b"\n1",
            b"c\r\ndata: {\"delta\":{\"content\": \"",
            b"\r\n",
            b"5\r\n x\"}}\r\n30\r\ndata: {\"usage\":{\"completion_tokens\": 12,\"x\":1}}\n\r\nE\r\ndata: [DONE]\n\n\r\n0\r\n\r\n",
        ],
        true,
    )
    .await
    .unwrap();
    assert_eq!(seen.tokens, 12);
    assert!(seen.first >= Duration::from_millis(20) && seen.first <= seen.whole, "{seen:?}");
}

#[tokio::test]
async fn an_answer_of_known_length_ends_there() {
    let whole: &[&[u8]] =
        &[b"HTTP/1.1 200 OK\r\ncontent-length: 33\r\n\r\n{\"usage\":{\"completion_t", b"okens\":4}}\n"];
    assert_eq!(served(whole, false).await.unwrap().tokens, 4);
}

#[tokio::test]
async fn bad_answers_are_told_apart() {
    let busy: &[&[u8]] = &[b"HTTP/1.1 429 Busy\r\ncontent-length: 4\r\n\r\nbusy"];
    assert!(matches!(served(busy, false).await, Err(Broken::Status { status: 429, body }) if body == "busy"));
    let cut: &[&[u8]] = &[b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nb"];
    assert!(matches!(served(cut, false).await, Err(Broken::Cut)));
    let unfinished: &[&[u8]] = &[b"HTTP/1.1 200 OK\r\ncontent-length: 22\r\n\r\n{\"completion_tokens\":1}"];
    assert!(matches!(served(unfinished, true).await, Err(Broken::Unfinished(_))));
    assert!(matches!(served(&[b"hello\r\n\r\n"], true).await, Err(Broken::Http(_))));
}
