//! A thousand workers lose their conductor and find back.

use futures_util::StreamExt;
use futures_util::stream;

use super::*;

const WORKERS: usize = 1000;
/// The bound is 5 s; this leaves room for a machine that does other things.
const REJOINED_WITHIN: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_workers_rejoin_after_an_outage() {
    let ttl = Duration::from_secs(30);
    let server = Server::fresh(ttl).await;
    let client = server.client();
    let start = Instant::now();
    let workers: Vec<Membership> = stream::iter(0..WORKERS)
        .map(|i| {
            let (client, address) = (client.clone(), format!("127.0.0.1:{}", i + 1));
            async move {
                let mut registration = registration(&format!("w{i}"), &address);
                registration.state = WorkerState::Ready;
                let joined = Membership::join(&client, registration, MembershipOptions::default()).await;
                joined.unwrap_or_else(|error| panic!("w{i}: {error:?}"))
            }
        })
        .buffer_unordered(64)
        .collect()
        .await;
    eprintln!("{WORKERS} workers joined in {:.2?}", start.elapsed());
    let view = wait(&client, "all of them", |view| view.workers.len() == WORKERS).await;
    let lives = epochs(&view);
    let name: WorkerId = "w500".parse().unwrap();
    let (start, lookups) = (Instant::now(), 100_000);
    for _ in 0..lookups {
        assert!(std::hint::black_box(client.view()).worker(&name).is_some());
    }
    eprintln!("a lookup among {WORKERS} takes {} ns", start.elapsed().as_nanos() / lookups);

    let address = server.stop().await;
    wait(&client, "staleness", |view| view.stale && view.workers.len() == WORKERS).await;
    let back = Instant::now();
    let server = Server::start(address, ttl).await;
    let deadline = back + REJOINED_WITHIN;
    for worker in &workers {
        let former = lives.values().copied().max().unwrap();
        let mut epoch = worker.epoch();
        let rejoined = epoch.wait_for(|epoch| epoch.is_some_and(|epoch| epoch > former));
        tokio::time::timeout_at(deadline, rejoined).await.expect("rejoined in time").unwrap();
    }
    eprintln!("{WORKERS} workers rejoined in {:.2?}", back.elapsed());
    let view = wait(&client, "all of them anew", |view| {
        !view.stale
            && view.workers.len() == WORKERS
            && view.workers.iter().all(|(name, w)| w.epoch > lives[name])
    })
    .await;
    assert_eq!(view.ready().count(), WORKERS);
    drop(workers);
    server.stop().await;
}
