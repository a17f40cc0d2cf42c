use std::time::Duration;

use super::*;

#[tokio::test(start_paused = true)]
async fn many_callers_that_fail_together_move_on_once() {
    let now = Instant::now();
    let mut pin = Pin::new(3, now, Dice::seeded(1));
    let first = pin.place();
    assert!(pin.failed(now, first.generation));
    let second = pin.place();
    assert_eq!(second.endpoint, 1);
    for _ in 0..100 {
        assert!(!pin.failed(now, first.generation), "an old failure is no news");
        pin.good(first.generation);
    }
    assert_eq!(pin.place(), second);
}

#[tokio::test(start_paused = true)]
async fn every_member_gets_its_turn_and_the_pause_grows_by_rounds_to_a_bound() {
    for seed in 0..50 {
        let mut now = Instant::now();
        let mut pin = Pin::new(3, now, Dice::seeded(seed));
        for failure in 0..60_u32 {
            assert_eq!(pin.place().endpoint, (failure % 3) as usize, "seed {seed}");
            assert!(pin.failed(now, pin.place().generation));
            let pause = pin.not_before() - now;
            let most = Duration::from_millis(50 << (failure / 3).min(6)).min(Duration::from_secs(1));
            assert!(pause <= most, "seed {seed}: {pause:?} after {failure} failures");
            now = pin.not_before();
        }
        let place = pin.place();
        pin.good(place.generation);
        assert!(pin.failed(now, place.generation));
        assert!(pin.not_before() - now <= Duration::from_millis(50), "an answer resets the pause");
    }
}
