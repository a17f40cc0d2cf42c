use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use super::*;
use crate::etcd_servers::{Etcd as Servers, EtcdOptions as ServersOptions, ServerTls};
use crate::store::{Compare, Op, suite};

const PATIENCE: Duration = Duration::from_secs(30);

fn options(servers: &Servers) -> EtcdOptions {
    EtcdOptions::new(servers.endpoints(), "/baton")
}

fn started(options: EtcdOptions) -> Etcd {
    Etcd::start(options, &TaskTracker::new()).unwrap()
}

fn write(key: &str, text: &str, compares: Vec<Compare>) -> Txn {
    let op = Op::Put { key: key.to_owned(), value: Arc::from(text.as_bytes()), lease: None };
    Txn { compares, ops: vec![op] }
}

/// What every store must do, on one real server: each part under its own keys.
#[tokio::test]
async fn does_what_every_store_must_do() {
    let servers = Servers::start(1).await;
    let store = &started(options(&servers));
    suite::transactions_compare_and_write_at_one_revision(store).await;
    suite::limits_are_refused(store).await;
    suite::listings_come_in_pages(store).await;
    suite::watches_miss_nothing(store).await;
    suite::watches_from_the_future_are_refused(store).await;
    suite::one_of_many_wins_a_name(store).await;
    suite::everything_of_a_revision_comes_together(store).await;
    suite::large_values_are_listed_and_watched(store).await;
    suite::a_lease_tells_its_time(store).await;
    suite::compaction_is_told(store, async |_: &dyn Store| servers.compact().await).await;
}

#[tokio::test]
async fn leases_end_and_take_their_keys() {
    let servers = Servers::start(1).await;
    suite::leases_end_and_take_their_keys(&started(options(&servers))).await;
}

#[tokio::test]
async fn fleets_with_different_prefixes_do_not_see_each_other() {
    let servers = Servers::start(1).await;
    let one = started(EtcdOptions::new(servers.endpoints(), "/fleets/one"));
    let two = started(EtcdOptions::new(servers.endpoints(), "/fleets/one-more/"));
    one.txn(write("workers/a", "1", vec![])).await.unwrap();
    assert_eq!(two.list("", None, 10).await.unwrap().items, []);
    assert_eq!(one.list("", None, 10).await.unwrap().items[0].key, "workers/a");
    assert_eq!(servers.keys("/fleets/").await, [("/fleets/one/workers/a".to_owned(), "1".to_owned())]);
    let (first, second) = (one.instance().await.unwrap(), two.instance().await.unwrap());
    assert!(first != second && first.ends_with("/fleets/one/"), "{first} {second}");
}

#[tokio::test]
async fn a_member_of_another_cluster_is_refused() {
    let (ours, other) = (Servers::start(1).await, Servers::start(1).await);
    let endpoints = vec![ours.endpoint(0), other.endpoint(0)];
    let store = started(EtcdOptions::new(endpoints, "/baton"));
    store.txn(write("a", "1", vec![])).await.unwrap();
    ours.kill(0);
    let deadline = Instant::now() + PATIENCE;
    while !store.health().problem.is_some_and(|problem| problem.contains("belongs to the cluster")) {
        assert!(store.txn(write("b", "1", vec![])).await.is_err(), "written elsewhere");
        assert!(Instant::now() < deadline, "{:?}", store.health());
    }
    assert!(other.keys("/baton").await.is_empty());
    ours.restart(0);
    while store.get("a").await.is_err() {
        assert!(Instant::now() < deadline, "{:?}", store.health());
    }
}

/// Writes that were under way when the server stood still are done once, or known not to be known.
#[tokio::test]
async fn a_guarded_write_that_lost_its_answer_is_done_once() {
    let servers = Servers::start(1).await;
    let store = &started(options(&servers));
    store.instance().await.unwrap();
    for round in 0..3 {
        servers.freeze(0);
        let writes = (0..20).map(|i| async move {
            let key = format!("once/{round}/{i}");
            let compares = vec![Compare::Created { key: key.clone(), revision: 0 }];
            let done = store.txn(write(&key, "x", compares)).await;
            (key, done)
        });
        let thaw = async {
            // After the first attempts were given up, before the last ones are.
            tokio::time::sleep(CALL_TIMEOUT + Duration::from_millis(100 * round)).await;
            servers.thaw(0);
        };
        let (done, ()) = tokio::join!(futures_util::future::join_all(writes), thaw);
        for (key, done) in done {
            let deadline = Instant::now() + PATIENCE;
            let stored = loop {
                match store.get(&key).await {
                    Ok(stored) => break stored,
                    Err(error) => assert!(Instant::now() < deadline, "{error}"),
                }
            };
            match done {
                Ok(reply) => {
                    assert!(reply.succeeded, "nobody else writes {key}");
                    let stored = stored.expect("written");
                    assert_eq!(
                        (stored.create_revision, stored.mod_revision),
                        (reply.revision, reply.revision)
                    );
                }
                Err(StoreError::Unavailable(_)) => {}
                Err(error) => panic!("{error}"),
            }
        }
    }
}

#[tokio::test]
async fn a_write_that_cannot_be_repeated_is_reported_as_unknown() {
    let servers = Servers::start(1).await;
    let store = started(options(&servers));
    store.instance().await.unwrap();
    servers.freeze(0);
    let asked = Instant::now();
    let done = store.txn(write("a", "1", vec![])).await;
    let Err(StoreError::Unavailable(why)) = done else { panic!("{done:?}") };
    assert!(why.contains("not known"), "{why}");
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
    servers.thaw(0);
}

#[tokio::test]
async fn a_watch_of_a_frozen_server_ends() {
    use futures_util::StreamExt;

    let servers = Servers::start(1).await;
    let store = started(options(&servers));
    let start = store.txn(write("a", "1", vec![])).await.unwrap().revision;
    let mut watch = store.watch("", start);
    // An idle watch lives on for as long as its server answers.
    let idle = tokio::time::timeout(Duration::from_secs(6), watch.next()).await;
    assert!(idle.is_err(), "{idle:?}");
    servers.freeze(0);
    let ended = tokio::time::timeout(PATIENCE, watch.next()).await.expect("in time");
    assert_eq!(ended, Some(Err(WatchError::Lost)));
    assert!(watch.next().await.is_none());
    servers.thaw(0);
}

fn openssl(folder: &Path, arguments: &str) {
    let words = arguments.split(' ');
    let output = Command::new("openssl").args(words).current_dir(folder).output().expect("openssl runs");
    assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// An authority, a server's certificate, a client's, and a stranger's.
fn certificates() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let new = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2";
    for (authority, names) in [("ca", &["server", "client"][..]), ("other-ca", &["stranger"])] {
        openssl(
            folder.path(),
            &format!("{new} -keyout {authority}.key -out {authority}.pem -subj /CN={authority}"),
        );
        for name in names {
            openssl(
                folder.path(),
                &format!(
                    "{new} -CA {authority}.pem -CAkey {authority}.key -keyout {name}.key -out {name}.pem \
                     -subj /CN={name} -addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=CA:FALSE"
                ),
            );
        }
    }
    folder
}

async fn tls_servers(folder: &Path, mutual: bool) -> Servers {
    let file = |name: &str| folder.join(name);
    let tls = ServerTls {
        ca_file: file("ca.pem"),
        cert_file: file("server.pem"),
        key_file: file("server.key"),
        client: mutual.then(|| (file("client.pem"), file("client.key"))),
    };
    Servers::with(ServersOptions { tls: Some(tls), ..ServersOptions::new(1) }).await
}

fn tls(servers: &Servers, folder: &Path, authority: &str, identity: Option<&str>) -> EtcdOptions {
    let file = |name: &str, ending: &str| folder.join(format!("{name}.{ending}"));
    let identity = identity.map(|name| (file(name, "pem"), file(name, "key")));
    let tls = EtcdTls { ca_file: file(authority, "pem"), identity };
    EtcdOptions { tls: Some(tls), ..options(servers) }
}

/// Refused within the deadline, with a reason that an operator can read.
async fn refused(options: EtcdOptions) -> String {
    let store = started(options);
    let Err(StoreError::Unavailable(why)) = store.get("a").await else { panic!("let in") };
    let health = store.health();
    assert!(!health.up && health.problem.is_some(), "{health:?}");
    why
}

#[tokio::test]
async fn speaks_tls_with_and_without_a_certificate_of_its_own() {
    let folder = certificates();
    let folder = folder.path();
    let plain = tls_servers(folder, false).await;
    let store = started(tls(&plain, folder, "ca", None));
    store.txn(write("a", "1", vec![])).await.unwrap();
    suite::watches_miss_nothing(&store).await;
    refused(tls(&plain, folder, "other-ca", None)).await;
    let http = plain.endpoint(0).replace("https", "http");
    refused(EtcdOptions::new(vec![http], "/baton")).await;

    let mutual = tls_servers(folder, true).await;
    let store = started(tls(&mutual, folder, "ca", Some("client")));
    store.txn(write("a", "1", vec![])).await.unwrap();
    suite::watches_miss_nothing(&store).await;
    refused(tls(&mutual, folder, "ca", None)).await;
    refused(tls(&mutual, folder, "ca", Some("stranger"))).await;
}

#[tokio::test]
async fn files_that_cannot_serve_are_named_at_the_start() {
    let folder = certificates();
    let folder = folder.path();
    let with = |ca: &str, identity: Option<(&str, &str)>| {
        let identity = identity.map(|(cert, key)| (folder.join(cert), folder.join(key)));
        let tls = EtcdTls { ca_file: folder.join(ca), identity };
        EtcdOptions { tls: Some(tls), ..EtcdOptions::new(vec!["https://127.0.0.1:1".to_owned()], "/baton") }
    };
    let cases = [
        (with("nothing.pem", None), "nothing.pem"),
        (with("ca.key", None), "ca.key"),
        (with("ca.pem", Some(("client.key", "client.key"))), "client.key"),
        (with("ca.pem", Some(("client.pem", "client.pem"))), "client.pem"),
    ];
    for (options, named) in cases {
        let error = Etcd::start(options, &TaskTracker::new()).unwrap_err();
        assert!(error.to_string().contains(named), "{error}");
    }
    let none = Etcd::start(EtcdOptions::new(vec![], "/baton"), &TaskTracker::new());
    assert!(matches!(none, Err(EtcdError::NoEndpoint)));
}

fn password(folder: &Path, text: &str) -> PathBuf {
    let path = folder.join(format!("{}-password", text.len()));
    let mut file = std::fs::OpenOptions::new();
    let mut file = file.write(true).create(true).truncate(true).mode(0o600).open(&path).unwrap();
    std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
    path
}

#[tokio::test]
async fn logs_in_with_a_password_and_says_when_it_is_the_wrong_one() {
    let folder = tempfile::tempdir().unwrap();
    let mut servers = Servers::start(1).await;
    let (user, right) = servers.enable_auth("a long secret").await;
    let with = |user: &str, text: &str| EtcdOptions {
        auth: Some(EtcdAuth { user: user.to_owned(), password_file: password(folder.path(), text) }),
        ..options(&servers)
    };
    let store = started(with(&user, &format!("{right}\n")));
    store.txn(write("a", "1", vec![])).await.unwrap();
    suite::watches_miss_nothing(&store).await;
    suite::a_lease_tells_its_time(&store).await;
    let why = refused(with(&user, "wrong")).await;
    assert!(why.contains("authentication failed"), "{why}");
    refused(options(&servers)).await;

    // Somebody who may log in but not write here is told so, and no other member is asked for it.
    let mut admin = servers.client(0).await;
    admin.user_add("reader", "only reads", None).await.unwrap();
    let reader = started(with("reader", "only reads"));
    let Err(StoreError::Unavailable(why)) = reader.txn(write("b", "1", vec![])).await else {
        panic!("let in")
    };
    assert!(why.contains("permission denied"), "{why}");
}
