use super::*;
use crate::dice::Dice;

/// Runs a watch whose peer answers each question after a random time, or falls silent for good at some moment.
#[tokio::test(start_paused = true)]
async fn silence_is_noticed_in_bounded_time_and_an_answering_peer_never_given_up() {
    for seed in 0..200 {
        let mut dice = Dice::seeded(seed);
        let start = Instant::now();
        let silent_from = start + dice.up_to(Duration::from_secs(30));
        let mut live = Liveness::new(start);
        let mut heard = start;
        let dead = loop {
            let now = live.wake();
            match live.tick(now) {
                Silence::Wait => panic!("seed {seed}: woken too early"),
                Silence::Dead => break now,
                // Late, but in time for one of the questions.
                Silence::Ask => {
                    let answer = now + dice.up_to(Duration::from_millis(2900));
                    if answer < silent_from && answer < live.wake() {
                        live.heard(answer);
                        heard = answer;
                    }
                }
            }
            assert!(now < start + Duration::from_secs(60), "seed {seed}: never given up");
        };
        let silence = dead - heard;
        assert_eq!(silence, ASK_EVERY * (UNANSWERED_MAX + 1), "seed {seed}");
    }
}
