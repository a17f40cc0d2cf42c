use super::*;

fn gate(in_flight: u32, queue: u32) -> (Arc<Gate>, Arc<Metrics>) {
    let metrics = Arc::new(Metrics::new().unwrap());
    let gate = Gate::new(in_flight, queue, Duration::from_secs(30), Arc::clone(&metrics));
    (Arc::new(gate), metrics)
}

#[tokio::test(start_paused = true)]
async fn places_then_the_queue_then_refusals() {
    let (gate, metrics) = gate(2, 1);
    let first = gate.enter().await.unwrap();
    let _second = gate.enter().await.unwrap();
    assert!(gate.check().is_ok(), "the queue has room");
    let mut waiting = Box::pin(gate.enter());
    assert!(futures_util::poll!(waiting.as_mut()).is_pending());
    assert_eq!(metrics.queue_depth.get(), 1);
    assert!(gate.check().is_err());
    assert_eq!(gate.enter().await.unwrap_err(), Refusal::Overloaded { retry_after_s: 1 });
    drop(first);
    let _third = waiting.await.unwrap();
    assert_eq!(metrics.queue_depth.get(), 0);
}

#[tokio::test(start_paused = true)]
async fn who_waits_too_long_is_refused_and_leaves_no_trace() {
    let (gate, metrics) = gate(1, 1);
    let place = gate.enter().await.unwrap();
    let before = tokio::time::Instant::now();
    assert!(gate.enter().await.is_err());
    assert_eq!(before.elapsed(), Duration::from_secs(30));
    assert_eq!(metrics.queue_depth.get(), 0);
    drop(place);
    assert!(gate.enter().await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_waiter_that_leaves_gives_its_turn_up() {
    let (gate, metrics) = gate(1, 2);
    let place = gate.enter().await.unwrap();
    let mut leaves = Box::pin(gate.enter());
    let mut stays = Box::pin(gate.enter());
    assert!(futures_util::poll!(leaves.as_mut()).is_pending());
    assert!(futures_util::poll!(stays.as_mut()).is_pending());
    drop(leaves);
    assert_eq!(metrics.queue_depth.get(), 1);
    drop(place);
    assert!(stays.await.is_ok());
}
