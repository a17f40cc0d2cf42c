use std::sync::atomic::AtomicUsize;

use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio_util::task::TaskTracker;

use super::*;
use crate::agent::{Agent, AgentOptions};
use crate::auth::Token;
use crate::wire::Metadata;
use crate::wire::control::Attach;

const EPOCH: Epoch = Epoch(4);
const LONG: Duration = Duration::from_secs(10);

fn refusing() -> Handler {
    Arc::new(|_, _| Box::pin(async { Err(Denial::Refused(Refusal::Unavailable)) }))
}

/// Two ends over loopback whose requests are answered by `server` and `client`.
async fn ends(server: Handler, client: Handler) -> (Control, Control) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
    let tasks = TaskTracker::new();
    let end = |socket, handler: Handler| {
        let token = CancellationToken::new();
        let (control, incoming) =
            Control::new(EPOCH, socket, FrameReader::new(), FrameWriter::default(), token, Arc::default());
        tasks.spawn(incoming.serve(handler, None));
        control
    };
    (end(near.unwrap(), client), end(far.unwrap().0, server))
}

#[tokio::test]
async fn a_slow_request_holds_up_no_other_and_both_sides_may_ask() {
    let release = Arc::new(Notify::new());
    let held = Arc::clone(&release);
    let slow_packs: Handler = Arc::new(move |header, payload| {
        let held = Arc::clone(&held);
        Box::pin(async move {
            match header.kind {
                Kind::Pack => {
                    held.notified().await;
                    Ok(Answer::done(Kind::Packed))
                }
                _ => Ok(Answer { kind: Kind::Attached, payload: payload.to_vec() }),
            }
        })
    });
    let fenced: Handler = Arc::new(|_, _| Box::pin(async { Ok(Answer::done(Kind::Fenced)) }));
    let (client, server) = ends(slow_packs, fenced).await;
    let pack = client.ask(Kind::Pack, b"x");
    tokio::pin!(pack);
    assert!(futures_util::poll!(pack.as_mut()).is_pending());
    for round in 0..100u8 {
        let (header, payload) = client.ask(Kind::Attach, &[round; 9]).await.unwrap();
        assert_eq!((header.kind, &payload[..]), (Kind::Attached, &[round; 9][..]));
    }
    assert_eq!(server.ask(Kind::Fence, &[0; 16]).await.unwrap().0.kind, Kind::Fenced);
    assert!(futures_util::poll!(pack.as_mut()).is_pending(), "it is still being answered");
    release.notify_one();
    assert_eq!(timeout(LONG, pack).await.unwrap().unwrap().0.kind, Kind::Packed);
}

#[tokio::test]
async fn more_requests_than_are_answered_at_once_all_get_their_own_answer() {
    let running = Arc::new(AtomicUsize::new(0));
    let most = Arc::new(AtomicUsize::new(0));
    let (now, top) = (Arc::clone(&running), Arc::clone(&most));
    let echo: Handler = Arc::new(move |_, payload| {
        let (now, top) = (Arc::clone(&now), Arc::clone(&top));
        Box::pin(async move {
            top.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            tokio::task::yield_now().await;
            now.fetch_sub(1, Ordering::SeqCst);
            Ok(Answer { kind: Kind::Attached, payload: payload.to_vec() })
        })
    });
    let (client, _server) = ends(echo, refusing()).await;
    let ask = |n: u32| {
        let client = client.clone();
        async move {
            let (_, payload) = client.ask(Kind::Attach, &n.to_le_bytes()).await.unwrap();
            assert_eq!(payload[..], n.to_le_bytes());
        }
    };
    let asked = futures_util::future::join_all((0..2000).map(ask));
    timeout(LONG, asked).await.unwrap();
    let most = most.load(Ordering::SeqCst);
    assert!((2..=MAX_ANSWERING).contains(&most), "{most} at once");
}

#[tokio::test]
async fn the_end_of_the_other_side_fails_who_waits_and_who_comes_later() {
    let never: Handler = Arc::new(|_, _| Box::pin(std::future::pending()));
    let (client, server) = ends(never, refusing()).await;
    let ask = client.ask(Kind::Pack, &[]);
    tokio::pin!(ask);
    assert!(futures_util::poll!(ask.as_mut()).is_pending());
    drop(server);
    assert!(matches!(timeout(LONG, ask).await.unwrap(), Err(Fault::Link(LinkError::Closed))));
    timeout(LONG, client.closed()).await.unwrap();
    assert!(!client.is_alive());
    assert!(matches!(client.ask(Kind::Pack, &[]).await, Err(Fault::Link(_))));
}

#[tokio::test]
async fn answers_nobody_asked_for_end_the_connection() {
    let (client, server) = ends(refusing(), refusing()).await;
    let header = Header { kind: Kind::Packed, code: 0, len: 0, epoch: EPOCH, seq: 77 };
    server.shared.send(header, &[]).await.unwrap();
    timeout(LONG, client.closed()).await.unwrap();
    assert_eq!(client.shared.counters.snapshot().malformed, 1);
}

fn token(text: &str) -> Option<Token> {
    Some(Token::from_file_bytes(format!("{text}-k7Jw0pQx9ZfLr2TnVb5Ys8HdMc3Ge6Ua").as_bytes()).unwrap())
}

async fn owner(auth: Option<Token>) -> (Agent, Pair) {
    let agent = Agent::start(AgentOptions { auth, ..AgentOptions::new("prefill".parse().unwrap()) }).await;
    let agent = agent.unwrap();
    agent.set_epoch(EPOCH);
    let incarnation = Metadata::decode(&agent.metadata()).unwrap().incarnation;
    let (from, to) = ("decode".parse().unwrap(), "prefill".parse().unwrap());
    (agent, Pair { from, from_epoch: Epoch(2), to, epoch: EPOCH, incarnation })
}

fn route(owner: &Agent, auth: Option<Token>) -> Route {
    Route {
        address: owner.local_address(),
        auth,
        counters: Arc::default(),
        tasks: TaskTracker::new(),
        ended: CancellationToken::new(),
    }
}

#[tokio::test]
async fn an_agent_serves_control_connections_with_and_without_a_token() {
    for auth in [None, token("ours")] {
        let (agent, pair) = owner(auth.clone()).await;
        let control = Control::open(pair, &route(&agent, auth), refusing()).await.unwrap();
        let attach = Attach { backend: crate::BackendKind::Ucx, wire: "w".into(), address: vec![1; 99] };
        for _ in 0..3 {
            let refused = control.ask(Kind::Attach, &attach.encode()).await;
            assert!(matches!(refused, Err(Fault::Refused(Refusal::Unavailable))), "{refused:?}");
        }
        let odd = control.ask(Kind::Map, &[0; 4]).await;
        assert!(matches!(odd, Err(Fault::Refused(Refusal::Malformed))), "{odd:?}");
        assert!(control.is_alive());
        agent.set_epoch(Epoch(5));
        timeout(LONG, control.closed()).await.unwrap();
        assert_eq!(agent.stats().malformed, 1);
    }
}

#[tokio::test]
async fn who_does_not_hold_the_token_is_refused_by_name_on_both_sides() {
    for (server, client, here, there) in [
        (token("ours"), token("theirs"), 1, 1),
        (token("ours"), None, 1, 1),
        // Talked down: a server without a token learns that it must have one, or says nothing of worth.
        (None, token("ours"), 1, 1),
    ] {
        let (agent, pair) = owner(server).await;
        let route = route(&agent, client);
        let refused = Control::open(pair, &route, refusing()).await.err();
        assert!(matches!(refused, Some(Fault::Refused(Refusal::Unauthenticated))), "{refused:?}");
        assert_eq!(agent.stats().auth_refused, here);
        assert_eq!(route.counters.snapshot().auth_refused, there);
    }
}
