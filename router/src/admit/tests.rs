use super::*;

fn gate(in_flight: u32, queue: u32) -> (Arc<Gate>, Arc<Metrics>) {
    let metrics = Arc::new(Metrics::new().unwrap());
    let gate = Gate::new(in_flight, queue, Duration::from_secs(30), Arc::clone(&metrics));
    (Arc::new(gate), metrics)
}

fn somebody() -> Principal {
    Principal::without_limits("a")
}

#[tokio::test(start_paused = true)]
async fn places_then_the_queue_then_refusals() {
    let (gate, metrics) = gate(2, 1);
    let who = somebody();
    let first = gate.enter(&who, 10, None).await.unwrap();
    let _second = gate.enter(&who, 10, None).await.unwrap();
    assert!(gate.check(&who, 10, None).is_ok(), "the queue has room");
    let mut waiting = Box::pin(gate.enter(&who, 10, None));
    assert!(futures_util::poll!(waiting.as_mut()).is_pending());
    assert_eq!(metrics.queue_depth.get(), 1);
    assert!(gate.check(&who, 10, None).is_err());
    let refused = gate.enter(&who, 10, None).await.unwrap_err();
    assert_eq!(
        (refused.reason, refused.retry_after_s()),
        (Reason::QueueFull, 2),
        "the second to be sent away"
    );
    drop(first);
    let _third = waiting.await.unwrap();
    assert_eq!(metrics.queue_depth.get(), 0);
}

#[tokio::test(start_paused = true)]
async fn who_waits_too_long_is_refused_and_leaves_no_trace() {
    let (gate, metrics) = gate(1, 1);
    let who = somebody();
    let place = gate.enter(&who, 10, None).await.unwrap();
    let before = Instant::now();
    let refused = gate.enter(&who, 10, None).await.unwrap_err();
    assert_eq!(refused.reason, Reason::QueueTimeout);
    assert_eq!(before.elapsed(), Duration::from_secs(30));
    let hasty = Some(Duration::from_millis(200));
    assert_eq!(gate.enter(&who, 10, hasty).await.unwrap_err().reason, Reason::QueueTimeout);
    assert_eq!(before.elapsed(), Duration::from_millis(30_200), "the client's own patience is shorter");
    assert_eq!(metrics.queue_depth.get(), 0);
    drop(place);
    assert!(gate.enter(&who, 10, None).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_waiter_that_leaves_gives_its_turn_up() {
    let (gate, metrics) = gate(1, 2);
    let who = somebody();
    let place = gate.enter(&who, 10, None).await.unwrap();
    let mut leaves = Box::pin(gate.enter(&who, 10, None));
    let mut stays = Box::pin(gate.enter(&who, 10, None));
    assert!(futures_util::poll!(leaves.as_mut()).is_pending());
    assert!(futures_util::poll!(stays.as_mut()).is_pending());
    drop(leaves);
    assert_eq!(metrics.queue_depth.get(), 1);
    drop(place);
    let place = stays.await.unwrap();
    // One that got a place and leaves before it hears of it.
    let mut deaf = Box::pin(gate.enter(&who, 10, None));
    assert!(futures_util::poll!(deaf.as_mut()).is_pending());
    drop(place);
    drop(deaf);
    assert!(gate.enter(&who, 10, None).await.is_ok(), "the place is not lost");
}

#[tokio::test(start_paused = true)]
async fn who_has_to_give_up_its_turn_is_told_at_once() {
    let (gate, metrics) = gate(1, 2);
    let (flood, quiet) = (somebody(), Principal::without_limits("b"));
    let _place = gate.enter(&flood, 10, None).await.unwrap();
    let mut stays = Box::pin(gate.enter(&flood, 10, None));
    assert!(futures_util::poll!(stays.as_mut()).is_pending());
    tokio::time::advance(Duration::from_secs(1)).await;
    let mut gives_way = Box::pin(gate.enter(&flood, 10, None));
    assert!(futures_util::poll!(gives_way.as_mut()).is_pending());
    let mut comes = Box::pin(gate.enter(&quiet, 10, None));
    assert!(futures_util::poll!(comes.as_mut()).is_pending());
    let before = Instant::now();
    assert_eq!(gives_way.await.unwrap_err().reason, Reason::QueueFull);
    assert_eq!(before.elapsed(), Duration::ZERO);
    assert_eq!(metrics.queue_depth.get(), 2);
}

#[test]
fn retry_after_is_in_whole_seconds_rounded_up() {
    for (millis, seconds) in [(0, 1), (1, 1), (1000, 1), (1001, 2), (59_999, 60)] {
        let refused = Refused { reason: Reason::QueueFull, after: Duration::from_millis(millis) };
        assert_eq!(refused.retry_after_s(), seconds, "{millis} ms");
    }
}
