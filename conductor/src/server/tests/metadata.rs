//! Transfer metadata goes to those who want it, once for each life.

use super::*;
use crate::api::{Change, WatchLine};

/// The lines of a watch up to the first that `last` holds for.
async fn lines(server: &Server, query: &str, last: impl Fn(&Change) -> bool) -> Vec<String> {
    let mut reply =
        crate::http::client().get(format!("{}/v1/watch?{query}", server.url())).send().await.unwrap();
    let mut text = String::new();
    let read = async {
        loop {
            text.push_str(std::str::from_utf8(&reply.chunk().await.unwrap().expect("open")).unwrap());
            let done = text.lines().any(|line| match serde_json::from_str(line) {
                Ok(WatchLine::Changes { changes, .. }) => changes.iter().any(&last),
                _ => false,
            });
            if done {
                return;
            }
        }
    };
    timeout(PATIENCE, read).await.expect("the change in time");
    text.lines().filter(|line| line.contains("\"changes\"")).map(str::to_owned).collect()
}

#[tokio::test]
async fn metadata_is_sent_once_a_life_and_only_to_those_who_want_it() {
    let server = Server::fresh(Duration::from_secs(10)).await;
    server.leads().await;
    let since = server.listing().await.revision;
    let agent = server.client();
    let router =
        Client::start(ClientOptions { metadata: false, ..ClientOptions::new(vec![server.url()]) }).unwrap();
    let host = Host::new();
    let worker = join(&agent, "w", &host.address()).await.unwrap();
    let known = wait(&agent, "the worker", |view| view.workers.len() == 1).await;
    worker.set_state(WorkerState::Ready);
    let ready = wait(&agent, "it ready", |view| view.ready().count() == 1).await;
    let name: WorkerId = "w".parse().unwrap();
    let (before, after) = (known.worker(&name).unwrap(), ready.worker(&name).unwrap());
    assert_eq!(&*after.transfer, "AAEC");
    assert!(Arc::ptr_eq(&before.transfer, &after.transfer), "a change of state brought nothing else");
    let slim = wait(&router, "it ready", |view| view.ready().count() == 1).await;
    assert_eq!(&*slim.worker(&name).unwrap().transfer, "", "a router has no use for it");

    let ready = |change: &Change| matches!(change, Change::State { state: WorkerState::Ready, .. });
    let full = lines(&server, &format!("since={since}"), ready).await;
    assert_eq!(full.iter().filter(|line| line.contains("AAEC")).count(), 1, "{full:#?}");
    let none = lines(&server, &format!("since={since}&metadata=no"), ready).await;
    assert!(none.len() == full.len() && !none.iter().any(|line| line.contains("AAEC")), "{none:#?}");
    for (query, found) in [("", true), ("?metadata=no", false)] {
        let reply = crate::http::client().get(format!("{}/v1/workers{query}", server.url())).send().await;
        assert_eq!(reply.unwrap().text().await.unwrap().contains("AAEC"), found, "{query}");
    }
    let odd = crate::http::client().get(format!("{}/v1/workers?metadata=maybe", server.url())).send().await;
    assert_eq!(requests::refused(odd.unwrap(), "an odd query").await, (400, "invalid_query".to_owned()));

    // A new listing of what did not change keeps what is there.
    let again = server.client();
    let listed = wait(&again, "the listing", |view| view.ready().count() == 1).await;
    assert_eq!(listed.worker(&name).unwrap(), after);
    worker.leave().await;
    server.stop().await;
}
