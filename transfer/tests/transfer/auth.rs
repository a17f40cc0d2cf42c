//! A shared token: who holds none or another is refused by name, and what is forged or sent again is noticed.

use std::net::SocketAddr;

use baton_transfer::wire::{HEADER_BYTES, Header, Kind, MAC_BYTES};
use baton_transfer::{
    Agent, AgentOptions, BackendKind, ConnectError, Destination, Refusal, Session, Token, TransferError,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::task::TaskTracker;

use crate::support::{EPOCH, HANDOFF, OWNER, Owner, assert_in_place, deadline, memory, name};

const LEN: u32 = 20_000;

fn token(text: &str) -> Option<Token> {
    Some(Token::from_file_bytes(format!("{text}:k7Jw0pQx9ZfLr2TnVb5Ys8HdMc3Ge6Ua").as_bytes()).unwrap())
}

fn options(worker: &str, auth: Option<Token>) -> AgentOptions {
    let backends = vec![BackendKind::Tcp];
    AgentOptions { auth, backends, ..AgentOptions::new(name(worker)) }
}

async fn reader(auth: Option<Token>) -> Agent {
    let agent = Agent::start(options("decode-0", auth)).await.unwrap();
    agent.set_epoch(baton_config::Epoch(6));
    agent
}

async fn read(session: &Session, blocks: &[baton_transfer::BlockRead]) -> Result<(), TransferError> {
    let into = memory(64 << 20);
    session.read(HANDOFF, blocks, Destination::Memory(&into), deadline()).await?;
    assert_in_place(&into, blocks);
    Ok(())
}

#[tokio::test]
async fn agents_that_share_a_token_read_as_ever() {
    let owner = Owner::start_with(options(OWNER, token("fleet")), 64 << 20).await;
    let reader = reader(token("fleet")).await;
    let session = owner.session(&reader).await.unwrap();
    read(&session, &owner.granted(3, LEN)).await.unwrap();
    // Several streams, several requests each.
    read(&session, &owner.granted(28, 1 << 20)).await.unwrap();
    owner.agent.revoke(HANDOFF);
    let blocks = crate::support::blocks(owner.region, 2, LEN);
    match read(&session, &blocks).await {
        Err(TransferError::Refused { refusal: Refusal::NotGranted, .. }) => {}
        other => panic!("{other:?}"),
    }
    assert_eq!((owner.agent.stats().auth_refused, reader.stats().auth_refused), (0, 0));
}

#[tokio::test]
async fn without_the_same_token_on_both_sides_there_is_no_session() {
    for (here, there) in [("fleet", Some("other")), ("fleet", None), ("", Some("fleet"))] {
        let owner =
            Owner::start_with(options(OWNER, token(here).filter(|_| !here.is_empty())), 1 << 20).await;
        let reader = reader(there.and_then(token)).await;
        match owner.session(&reader).await {
            Err(ConnectError::Refused { refusal: Refusal::Unauthenticated, .. }) => {}
            other => panic!("{here:?} and {there:?}: {other:?}"),
        }
        assert_eq!((owner.agent.stats().auth_refused, reader.stats().auth_refused), (1, 1));
    }
}

/// Who cannot prove anything must not be able to make an agent believe in a newer life of a peer.
#[tokio::test]
async fn a_stranger_changes_nothing_in_an_agent() {
    let owner = Owner::start_with(options(OWNER, token("fleet")), 1 << 20).await;
    let stranger = reader(token("other")).await;
    stranger.set_epoch(baton_config::Epoch(1000));
    assert!(owner.session(&stranger).await.is_err());
    let reader = reader(token("fleet")).await;
    let session = owner.session(&reader).await.unwrap();
    read(&session, &owner.granted(3, LEN)).await.unwrap();
}

/// One whole frame; `signed` ones have a code behind the header.
async fn frame(stream: &mut TcpStream, signed: bool) -> (Header, Vec<u8>, Vec<u8>) {
    let mut head = [0; HEADER_BYTES];
    stream.read_exact(&mut head).await.unwrap();
    let header = Header::decode(&head).unwrap();
    let mut code = vec![0; if signed { MAC_BYTES } else { 0 }];
    stream.read_exact(&mut code).await.unwrap();
    let mut payload = vec![0; header.len as usize];
    stream.read_exact(&mut payload).await.unwrap();
    (header, code, payload)
}

fn bytes((header, code, payload): &(Header, Vec<u8>, Vec<u8>)) -> Vec<u8> {
    [&header.encode(payload)[..], code, payload].concat()
}

/// What somebody on the way does with the first request of a connection.
#[derive(Clone, Copy, Debug)]
enum Meddle {
    /// Another length is asked for, with a check that fits.
    Change,
    /// It is sent twice.
    Repeat,
    /// The code is cut off and replaced.
    Replace,
}

/// Relays handshakes, meddles with the first request, and hands over what the client sent.
async fn meddler(target: SocketAddr, meddle: Meddle, tasks: &TaskTracker) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tasks.spawn(async move {
        let (mut near, _) = listener.accept().await.unwrap();
        let mut far = TcpStream::connect(target).await.unwrap();
        for _ in 0..2 {
            far.write_all(&bytes(&frame(&mut near, false).await)).await.unwrap();
            near.write_all(&bytes(&frame(&mut far, false).await)).await.unwrap();
        }
        let mut request = frame(&mut near, true).await;
        assert_eq!(request.0.kind, Kind::Read);
        match meddle {
            Meddle::Change => request.2[20] ^= 1,
            Meddle::Replace => request.1 = vec![7; MAC_BYTES],
            Meddle::Repeat => far.write_all(&bytes(&request)).await.unwrap(),
        }
        far.write_all(&bytes(&request)).await.unwrap();
        let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
    });
    address
}

#[tokio::test]
async fn what_is_changed_or_repeated_on_the_way_is_noticed_and_not_served() {
    for meddle in [Meddle::Change, Meddle::Replace, Meddle::Repeat] {
        let tasks = TaskTracker::new();
        let owner = Owner::start_with(options(OWNER, token("fleet")), 1 << 20).await;
        let address = meddler(owner.agent.local_address(), meddle, &tasks).await;
        let mut metadata = baton_transfer::wire::Metadata::decode(&owner.metadata).unwrap();
        metadata.address = address;
        let reader = reader(token("fleet")).await;
        let session = reader.connect(&name(OWNER), EPOCH, &metadata.encode()).await.unwrap();
        let blocks = owner.granted(1, LEN);
        let outcome = read(&session, &blocks).await;
        let served = owner.agent.stats().served_bytes().0;
        match meddle {
            // The first one is good and answered before the second is seen.
            Meddle::Repeat => assert!(outcome.is_ok() && served == u64::from(LEN), "{outcome:?}"),
            _ => assert!(outcome.is_err() && served == 0, "{meddle:?}: {outcome:?}"),
        }
        let deadline = deadline();
        while owner.agent.stats().auth_refused == 0 {
            assert!(tokio::time::Instant::now() < deadline, "{meddle:?} was not counted");
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test]
async fn a_handshake_that_was_listened_to_opens_nothing_later() {
    let owner = Owner::start_with(options(OWNER, token("fleet")), 1 << 20).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut metadata = baton_transfer::wire::Metadata::decode(&owner.metadata).unwrap();
    metadata.address = listener.local_addr().unwrap();
    let target = owner.agent.local_address();
    let listening = async {
        let (mut near, _) = listener.accept().await.unwrap();
        let mut far = TcpStream::connect(target).await.unwrap();
        let mut heard = Vec::new();
        for _ in 0..2 {
            heard.push(bytes(&frame(&mut near, false).await));
            far.write_all(&heard[heard.len() - 1]).await.unwrap();
            near.write_all(&bytes(&frame(&mut far, false).await)).await.unwrap();
        }
        heard
    };
    let reader = reader(token("fleet")).await;
    let metadata = metadata.encode();
    let owner_name = name(OWNER);
    let (session, heard) = tokio::join!(reader.connect(&owner_name, EPOCH, &metadata), listening);
    session.unwrap();
    let mut again = TcpStream::connect(target).await.unwrap();
    again.write_all(&heard[0]).await.unwrap();
    assert_eq!(frame(&mut again, false).await.0.kind, Kind::Challenge);
    again.write_all(&heard[1]).await.unwrap();
    let (header, ..) = frame(&mut again, false).await;
    assert_eq!(header.kind, Kind::Refused);
    assert_eq!(baton_transfer::wire::decode_refusal(&header), Ok(Refusal::Unauthenticated));
    assert_eq!(owner.agent.stats().auth_refused, 1);
}

/// More connections than an agent serves at all, which say nothing: whoever says something is heard.
#[tokio::test]
async fn connections_that_say_nothing_keep_nobody_out() {
    const SILENT: usize = 4200;
    let files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    if files.is_some_and(|files| files < 2 * SILENT as u64 + 2000) {
        println!("skipped: {files:?} open files are too few for {SILENT} connections (ulimit -n)");
        return;
    }
    let owner = Owner::start_with(options(OWNER, token("fleet")), 1 << 20).await;
    let reader = reader(token("fleet")).await;
    let blocks = owner.granted(3, LEN);
    let mut silent = Vec::with_capacity(SILENT);
    for _ in 0..SILENT {
        silent.push(TcpStream::connect(owner.agent.local_address()).await.unwrap());
    }
    let session = owner.session(&reader).await.unwrap();
    read(&session, &blocks).await.unwrap();
    drop(silent);
}
