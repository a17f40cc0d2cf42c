//! The conductor restarted, frozen, gone: no view is emptied, and all agree again afterwards.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::io::copy_bidirectional;
use tokio::net::TcpStream;
use tokio::sync::watch;

use super::*;

pub(super) async fn held(membership: &Membership, after: Epoch) -> Epoch {
    let mut standing = membership.standing();
    let held =
        timeout(PATIENCE, standing.wait_for(|s| matches!(s, Standing::Held { epoch } if *epoch > after)));
    match *held.await.expect("rejoins in time").unwrap() {
        Standing::Held { epoch } => epoch,
        other => panic!("{other:?}"),
    }
}

async fn agrees(server: &Server, client: &Client) {
    let listing = server.listing().await;
    let stored: BTreeMap<_, _> =
        listing.workers.iter().map(|w| (w.record.worker.clone(), w.record.clone())).collect();
    let view = wait(client, "what is stored", |v| v.revision == listing.revision).await;
    assert_eq!(*view.workers, stored);
    assert_eq!(view.instance, listing.instance);
}

#[tokio::test]
async fn a_restart_of_the_conductor_empties_no_view_and_gives_higher_epochs() {
    let ttl = Duration::from_secs(3);
    let server = Server::fresh(ttl).await;
    let (one, two) = (server.client(), server.client());
    let hosts: Vec<Host> = (0..4).map(|_| Host::new()).collect();
    let mut workers = Vec::new();
    for (i, host) in hosts.iter().enumerate() {
        workers.push(join(&one, &format!("w{i}"), &host.address()).await.unwrap());
    }
    let lost = workers.pop().unwrap();
    let before: Vec<Epoch> = workers.iter().map(|w| w.epoch().borrow().unwrap()).collect();
    let newest = lost.epoch().borrow().unwrap();
    wait(&two, "all four", |v| v.workers.len() == 4).await;

    // From here on, no view of the second client may ever lack one of the living.
    let emptied = Arc::new(AtomicBool::new(false));
    let seen = emptied.clone();
    let mut views = two.changed();
    TaskTracker::new().spawn(async move {
        while views.changed().await.is_ok() {
            let view = views.borrow_and_update().clone();
            let lacks = (0..3).any(|i| view.worker(&format!("w{i}").parse().unwrap()).is_none());
            seen.fetch_or(lacks, Ordering::SeqCst);
        }
    });

    let address = server.stop().await;
    let stale = wait(&two, "staleness", |v| v.stale).await;
    assert_eq!(stale.workers.len(), 4, "stale, not empty");
    drop(lost);
    let server = Server::start(address, ttl).await;
    let returned = Instant::now();
    for (worker, before) in workers.iter().zip(before) {
        assert!(held(worker, before).await > newest, "above every epoch of the former life");
    }
    assert!(returned.elapsed() < Duration::from_secs(10), "rejoined after {:?}", returned.elapsed());
    for client in [&one, &two] {
        wait(client, "the dead worker to be forgotten", |v| !v.stale && v.workers.len() == 3).await;
        agrees(&server, client).await;
    }
    assert!(!emptied.load(Ordering::SeqCst), "a living worker was missing from a view");
    for worker in workers {
        worker.leave().await;
    }
    server.stop().await;
}

/// A TCP proxy that can stand still with all its connections open, like a process under SIGSTOP.
pub(super) struct Proxy {
    pub(super) address: SocketAddr,
    pub(super) frozen: watch::Sender<bool>,
    _stop: tokio_util::sync::DropGuard,
}

impl Proxy {
    pub(super) async fn start(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (frozen, state) = watch::channel(false);
        let stop = CancellationToken::new();
        let accept = async move {
            let tasks = TaskTracker::new();
            loop {
                let (mut inbound, _) = listener.accept().await.unwrap();
                let state = state.clone();
                tasks.spawn(async move {
                    let mut outbound = TcpStream::connect(target).await.unwrap();
                    let mut state = state;
                    loop {
                        if state.wait_for(|frozen| !frozen).await.is_err() {
                            return;
                        }
                        let mut change = state.clone();
                        tokio::select! {
                            _ = copy_bidirectional(&mut inbound, &mut outbound) => return,
                            _ = change.wait_for(|frozen| *frozen) => {}
                        }
                    }
                });
            }
        };
        let guard = stop.clone().drop_guard();
        TaskTracker::new().spawn(stop.run_until_cancelled_owned(accept));
        Self { address, frozen, _stop: guard }
    }
}

#[tokio::test]
async fn a_frozen_conductor_is_noticed_and_survived() {
    let server = Server::fresh(Duration::from_secs(3)).await;
    let proxy = Proxy::start(server.address).await;
    let client = Client::start(ClientOptions::new(vec![format!("http://{}", proxy.address)])).unwrap();
    let direct = server.client();
    let (host, second) = (Host::new(), Host::new());
    let worker = join(&direct, "w", &host.address()).await.unwrap();
    let victim = join(&client, "victim", &second.address()).await.unwrap();
    wait(&client, "the workers", |v| v.workers.len() == 2 && !v.stale).await;

    proxy.frozen.send_replace(true);
    let froze = Instant::now();
    let view = wait(&client, "staleness", |v| v.stale).await;
    let noticed = froze.elapsed();
    assert!(noticed < Duration::from_millis(4500), "noticed after {noticed:?}");
    assert!(view.age() >= Duration::from_secs(2), "{:?}", view.age());
    assert_eq!(view.workers.len(), 2, "stale, not empty");

    // The victim's lease runs out for lack of answers; it says so, and keeps its epoch for the work it has.
    let epoch = victim.epoch().borrow().unwrap();
    let mut standing = victim.standing();
    timeout(PATIENCE, standing.wait_for(|s| matches!(s, Standing::Lost { .. })))
        .await
        .expect("noticed")
        .unwrap();
    assert_eq!(*victim.epoch().borrow(), Some(epoch));

    proxy.frozen.send_replace(false);
    let again = held(&victim, epoch).await;
    assert!(again > epoch);
    wait(&client, "freshness", |v| !v.stale && v.workers.values().any(|w| w.epoch == again)).await;
    agrees(&server, &client).await;
    worker.leave().await;
    victim.leave().await;
    server.stop().await;
}

#[tokio::test]
async fn a_client_goes_on_at_another_endpoint() {
    let server = Server::fresh(Duration::from_secs(10)).await;
    let closed = { std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap() };
    let endpoints = vec![format!("http://{closed}"), server.url()];
    let client = Client::start(ClientOptions::new(endpoints)).unwrap();
    wait(&client, "the second endpoint", |v| !v.stale).await;
    let host = Host::new();
    let worker = join(&client, "w", &host.address()).await.expect("joins at the second endpoint");
    wait(&client, "the worker", |v| v.workers.len() == 1).await;
    worker.leave().await;
    server.stop().await;
}

#[tokio::test]
async fn a_first_join_without_a_conductor_ends_with_a_reason() {
    let closed = { std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap() };
    let client = Client::start(ClientOptions::new(vec![format!("http://{closed}")])).unwrap();
    let options =
        MembershipOptions { join_timeout: Duration::from_millis(300), ..MembershipOptions::default() };
    let refused = Membership::join(&client, registration("w", "127.0.0.1:1"), options).await;
    let Err(error @ JoinError::Unreachable { .. }) = refused else { panic!("{refused:?}") };
    assert!(error.to_string().contains(&closed.to_string()), "{error}");
    assert!(client.view().stale && client.view().workers.is_empty() && !client.view().known());
}

#[tokio::test]
async fn a_client_that_comes_from_another_store_with_a_longer_history_lists_anew() {
    let ttl = Duration::from_secs(10);
    // Revisions begin with the clock: those of the first are lower for ever.
    let (behind, ahead) = (Server::fresh(ttl).await, Server::fresh(ttl).await);
    let host = Host::new();
    let worker = join(&behind.client(), "w", &host.address()).await.unwrap();
    let client = Client::start(ClientOptions::new(vec![ahead.url(), behind.url()])).unwrap();
    let seen = wait(&client, "the first conductor", |v| !v.stale).await;
    ahead.stop().await;
    let view = wait(&client, "the second conductor", |v| v.workers.len() == 1 && !v.stale).await;
    assert!(view.instance != seen.instance && view.revision < seen.revision);
    worker.leave().await;
    wait(&client, "its changes, too", |v| v.workers.is_empty()).await;
    behind.stop().await;
}
