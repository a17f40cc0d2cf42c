//! The side of a worker of a connection of frames, for a worker that misbehaves as told.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use baton_config::frames::{self, Command, PROTOCOL, Reader, StreamId, TokenFrame};
use baton_config::protocol::{GenerateEvent, GenerateRequest};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{AbortHandle, JoinSet};

use super::fake_worker::{Act, Answer, Open, Script, Seen, Step, steps};

/// Frames on their way to the socket.
const FRAMES_MAX: usize = 16;

/// What the task of a generation has written.
enum Out {
    Frame(Vec<u8>),
    /// The connection ends: cut off, or after what was written.
    End {
        cut: bool,
    },
}

/// Answers the request for frames and serves them until the router leaves.
pub(super) fn upgrade(mut request: Request<Incoming>, script: Arc<Script>, seen: Arc<Seen>) -> Answer {
    assert_eq!(request.headers()["upgrade"], PROTOCOL);
    assert!(request.uri().query().is_some_and(|query| query.starts_with("epoch=")), "{}", request.uri());
    let upgrade = hyper::upgrade::on(&mut request);
    #[expect(clippy::disallowed_methods, reason = "ends with its connection, which the test's router owns")]
    tokio::spawn(async move {
        let Ok(upgraded) = upgrade.await else { return };
        seen.connections.fetch_add(1, Ordering::SeqCst);
        let life = script.life.clone();
        life.run_until_cancelled(serve(TokioIo::new(upgraded), script, seen)).await;
    });
    let body = Full::new(Bytes::new()).map_err(|never| match never {}).boxed_unsync();
    let head = Response::builder().status(101).header("connection", "upgrade").header("upgrade", PROTOCOL);
    head.body(body).expect("a response")
}

async fn serve<S>(io: S, script: Arc<Script>, seen: Arc<Seen>)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let (mut input, mut output) = tokio::io::split(io);
    let (out, mut outs) = mpsc::channel::<Out>(FRAMES_MAX);
    let mut tasks = JoinSet::new();
    let mut open: HashMap<StreamId, (AbortHandle, Arc<Semaphore>)> = HashMap::new();
    let mut reader = Reader::new(64 << 20);
    loop {
        tokio::select! {
            Some(what) = outs.recv() => match what {
                Out::Frame(bytes) => if output.write_all(&bytes).await.is_err() { return },
                Out::End { cut: false } => {
                    let _ = output.shutdown().await;
                    return;
                }
                Out::End { cut: true } => return,
            },
            read = input.read(reader.room()) => match read {
                Ok(0) | Err(_) => return,
                Ok(bytes) => reader.filled(bytes),
            },
        }
        while let Some((kind, payload)) = reader.next_frame().expect("frames of the protocol") {
            match Command::decode(kind, payload).expect("a command") {
                Command::Open(asked) => {
                    let request = asked.request().expect("a request of the protocol");
                    let act = script.next(&request, &seen);
                    let credit = Arc::new(Semaphore::new(asked.credit as usize));
                    let running =
                        generate(asked.id, request, act, Arc::clone(&credit), out.clone(), Arc::clone(&seen));
                    open.insert(asked.id, (tasks.spawn(running), credit));
                }
                Command::Cancel(id) => open.remove(&id).expect("it was opened").0.abort(),
                Command::Credit(id, tokens) => {
                    if let Some((_, credit)) = open.get(&id) {
                        credit.add_permits(tokens as usize);
                    }
                }
            }
        }
    }
}

/// One generation; nothing is shared with others but the way out.
async fn generate(
    id: StreamId,
    request: GenerateRequest,
    act: Act,
    credit: Arc<Semaphore>,
    out: mpsc::Sender<Out>,
    seen: Arc<Seen>,
) {
    if let Act::Status(_, code) = act {
        let failed = GenerateEvent::Failed { code, message: "as told".to_owned() };
        let _ = out.send(Out::Frame(frame(id, &failed))).await;
        return;
    }
    let closes = matches!(act, Act::CloseAfter(_));
    let rest = match act {
        Act::Lazy(rest) => Some(rest),
        _ => None,
    };
    let open = Open::begin(&seen);
    for step in steps(request, act) {
        let what = match step {
            Step::Send(event) => {
                if matches!(event, GenerateEvent::Token { .. }) {
                    let out_of_credit = credit.available_permits() == 0;
                    credit.acquire().await.expect("never closed").forget();
                    if let Some(rest) = rest.filter(|_| out_of_credit) {
                        tokio::time::sleep(rest).await;
                    }
                }
                Out::Frame(frame(id, &event))
            }
            Step::Garbage => Out::Frame(vec![1, 0, 0, 0, 99, 0]),
            Step::Hang => std::future::pending().await,
            Step::Break => {
                // Lets what was sent before reach the other side first.
                tokio::time::sleep(Duration::from_millis(20)).await;
                Out::End { cut: true }
            }
            Step::Wait(pause) => {
                tokio::time::sleep(pause).await;
                continue;
            }
        };
        if let Out::Frame(bytes) = &what {
            open.0.sent.fetch_add(bytes.len(), Ordering::SeqCst);
        }
        if out.send(what).await.is_err() {
            return;
        }
    }
    if closes {
        let _ = out.send(Out::End { cut: false }).await;
    }
}

fn frame(id: StreamId, event: &GenerateEvent) -> Vec<u8> {
    let mut out = Vec::new();
    match event {
        GenerateEvent::Token { token, logprob: None, logits_digest: None } => {
            let mut tokens = TokenFrame::default();
            tokens.push(&mut out, id, *token);
            tokens.close(&mut out);
        }
        event => frames::event(&mut out, id, event).expect("serializable"),
    }
    out
}
