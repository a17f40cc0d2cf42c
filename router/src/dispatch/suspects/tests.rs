use baton_config::{Epoch, Role};

use super::*;
use crate::fleet::Member;

const PRINT: u64 = 7;

fn worker(name: &str, epoch: u64, server: Option<&str>) -> Arc<Worker> {
    let member = Member {
        worker: name.parse().unwrap(),
        epoch: Epoch(epoch),
        pool: "pool".parse().unwrap(),
        role: Role::Decode,
        address: "127.0.0.1:9".to_owned(),
        server: server.map(str::to_owned),
        kv: None,
        ready: true,
    };
    Arc::new(Worker::new(member).unwrap())
}

fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

fn doubts(suspects: &Suspects, now: Instant) -> usize {
    match suspects.verdict(PRINT, now) {
        Verdict::Doubtful(deaths) => deaths.len(),
        Verdict::Free => 0,
        Verdict::Barred => panic!("nothing is certain"),
    }
}

/// Two workers that died with it.
fn barred(suspects: &Suspects, now: Instant) {
    for name in ["a", "b"] {
        let death = Death::of(&worker(name, 1, None), now, now);
        suspects.broke(PRINT, death.clone());
        suspects.settle(PRINT, &death, true);
    }
}

#[tokio::test(start_paused = true)]
async fn one_life_ends_once() {
    let now = Instant::now();
    let suspects = Suspects::default();
    // Several choices of one request are lost with one worker.
    for _ in 0..3 {
        suspects.broke(PRINT, Death::of(&worker("a", 1, None), now, now));
    }
    assert_eq!(doubts(&suspects, now), 0);
    suspects.broke(PRINT, Death::of(&worker("a", 2, None), now, now));
    assert_eq!(doubts(&suspects, now), 2, "its next life is another one");
    // The server beside a worker has no epoch: what was sent before it broke was sent to the same life.
    let suspects = Suspects::default();
    let beside = worker("a", 1, Some("http://127.0.0.1:9"));
    suspects.broke(PRINT, Death::of(&beside, now, now + secs(2)));
    suspects.broke(PRINT, Death::of(&beside, now + secs(1), now + secs(3)));
    assert_eq!(doubts(&suspects, now + secs(3)), 0);
    // Neither is the connection that one takes while it dies another life of it.
    suspects.broke(PRINT, Death::of(&beside, now + Duration::from_millis(2999), now + secs(4)));
    assert_eq!(doubts(&suspects, now + secs(4)), 0);
    suspects.broke(PRINT, Death::of(&beside, now + secs(3), now + secs(5)));
    assert_eq!(doubts(&suspects, now + secs(5)), 2);
    // Whoever finds it dead then has found out about its life.
    let suspects = Suspects::default();
    suspects.broke(PRINT, Death::of(&beside, now, now + secs(2)));
    let dying = Death::of(&beside, now + secs(2), now + secs(2));
    suspects.broke(PRINT, dying.clone());
    suspects.settle(PRINT, &dying, true);
    suspects.broke(PRINT, Death::of(&worker("b", 1, None), now + secs(4), now + secs(5)));
    assert_eq!(doubts(&suspects, now + secs(5)), 1);
    // One that is back at once, and has answered, is another life.
    let suspects = Suspects::default();
    suspects.broke(PRINT, Death::of(&beside, now, now + secs(2)));
    beside.answers(now + secs(2));
    suspects.broke(PRINT, Death::of(&beside, now + secs(2), now + secs(3)));
    assert_eq!(doubts(&suspects, now + secs(3)), 2);
}

#[tokio::test(start_paused = true)]
async fn only_deaths_bar_and_what_barred_a_request_does_so_for_its_time() {
    let now = Instant::now();
    let suspects = Suspects::default();
    let deaths = ["a", "b"].map(|name| Death::of(&worker(name, 1, None), now, now));
    deaths.iter().for_each(|death| suspects.broke(PRINT, death.clone()));
    suspects.settle(PRINT, &deaths[0], true);
    assert_eq!(doubts(&suspects, now), 1);
    suspects.settle(PRINT, &deaths[1], false);
    assert_eq!(doubts(&suspects, now), 0, "one of them lives");
    barred(&suspects, now);
    assert!(matches!(suspects.verdict(PRINT, now + BARRED_FOR - secs(1)), Verdict::Barred));
    // One that was still under way is no proof of the opposite, and another death changes nothing.
    suspects.survived(PRINT);
    suspects.broke(PRINT, Death::of(&worker("c", 1, None), now, now + secs(300)));
    assert!(matches!(suspects.verdict(PRINT, now + BARRED_FOR - secs(1)), Verdict::Barred));
    assert!(matches!(suspects.verdict(PRINT, now + BARRED_FOR), Verdict::Free));
}

#[tokio::test(start_paused = true)]
async fn deaths_are_forgotten_and_there_are_never_too_many() {
    let now = Instant::now();
    let suspects = Suspects::default();
    suspects.broke(PRINT, Death::of(&worker("a", 1, None), now, now));
    // The time begins anew with the latest.
    let later = now + BARRED_FOR - secs(1);
    suspects.broke(PRINT, Death::of(&worker("b", 1, None), later, later));
    assert_eq!(doubts(&suspects, now + BARRED_FOR), 2);
    let end = later + BARRED_FOR;
    assert_eq!(doubts(&suspects, end), 0);
    suspects.broke(PRINT, Death::of(&worker("c", 1, None), end, end));
    assert_eq!(doubts(&suspects, end), 0, "what is forgotten is no part of it");
    for print in 0..2 * CASES_MAX as u64 {
        suspects
            .broke(1000 + print, Death::of(&worker("a", 1, None), end, end + Duration::from_nanos(print)));
    }
    assert_eq!((suspects.cases().len(), suspects.count.load(Ordering::Relaxed)), (CASES_MAX, CASES_MAX));
    assert!(suspects.cases().contains_key(&(1000 + 2 * CASES_MAX as u64 - 1)), "the oldest made room");
    assert!(!suspects.cases().contains_key(&PRINT));
}

#[test]
fn a_request_is_named_by_whose_it_is_and_by_what_an_engine_sees_of_it() {
    let suspects = Suspects::default();
    let plain = Sampling::default();
    let print = |owner: u64, sampling: &Sampling| suspects.print(&[1, 2, 3], owner, sampling);
    assert_eq!(print(1, &plain), print(1, &Sampling { seed: 9, ..plain.clone() }));
    assert_ne!(print(1, &plain), print(2, &plain));
    assert_ne!(print(1, &plain), print(1, &Sampling { temperature: 0.25, ..plain.clone() }));
    assert_ne!(print(1, &plain), print(1, &Sampling { stop_tokens: vec![4], ..plain.clone() }));
    assert_ne!(print(1, &plain), suspects.print(&[1, 2], 1, &plain));
    assert_ne!(suspects.print_of_body("/a", b"x", 1), suspects.print_of_body("/a", b"x", 2));
}
