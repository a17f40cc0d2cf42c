use super::*;
use crate::etcd_servers::Etcd as Servers;
use crate::store::suite;

fn options(servers: &Servers) -> EtcdOptions {
    EtcdOptions::new(servers.endpoints(), "/baton")
}

fn store(servers: &Servers) -> Etcd {
    Etcd::start(options(servers), &TaskTracker::new()).unwrap()
}

/// What every store must do, on one real server: each part under its own keys.
#[tokio::test]
async fn does_what_every_store_must_do() {
    let servers = Servers::start(1).await;
    let store = &store(&servers);
    suite::transactions_compare_and_write_at_one_revision(store).await;
    suite::limits_are_refused(store).await;
    suite::listings_come_in_pages(store).await;
    suite::watches_miss_nothing(store).await;
    suite::watches_from_the_future_are_refused(store).await;
    suite::one_of_many_wins_a_name(store).await;
    suite::compaction_is_told(store, async |_: &dyn Store| servers.compact().await).await;
}

#[tokio::test]
async fn leases_end_and_take_their_keys() {
    let servers = Servers::start(1).await;
    suite::leases_end_and_take_their_keys(&store(&servers)).await;
}
