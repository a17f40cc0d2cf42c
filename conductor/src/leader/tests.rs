use super::*;

mod world;

use world::{Manner, World};

const MS: Duration = Duration::from_millis(1);

#[test]
fn one_alone_leads_at_once_and_for_good() {
    let mut world = World::new(1, 1, Manner::CALM);
    world.run(Duration::from_secs(1));
    let (first, fence) = world.leader().expect("somebody leads");
    world.run(Duration::from_secs(600));
    assert_eq!(world.leader(), Some((first, fence)), "the term never ended");
}

#[test]
fn after_a_kill_another_leads_within_the_ttl() {
    for seed in 0..50 {
        let mut world = World::new(seed, 3, Manner::CALM);
        let old = world.run_led();
        world.kill(old);
        let took = world.until_led(Duration::from_secs(20));
        assert_ne!(world.leader().map(|(who, _)| who), Some(old), "seed {seed}");
        assert!(took <= TTL, "seed {seed}: {took:?}");
    }
}

#[test]
fn who_stops_hands_over_at_once() {
    for seed in 0..50 {
        let mut world = World::new(seed, 3, Manner::CALM);
        let old = world.run_led();
        world.stop(old);
        let took = world.until_led(Duration::from_secs(20));
        assert!(took <= CLAIM_JITTER + 200 * MS, "seed {seed}: {took:?}");
    }
}

#[test]
fn a_leader_that_stood_still_changes_nothing_afterwards() {
    for seed in 0..50 {
        let mut world = World::new(seed, 2, Manner::CALM);
        world.run(Duration::from_secs(3));
        let (old, fence) = world.leader().expect("somebody leads");
        world.freeze(old, Duration::from_secs(8));
        // What was on its way arrives.
        world.run(100 * MS);
        let last = world.wrote_last[&fence.revision()];
        world.run(Duration::from_secs(7));
        let (new, _) = world.leader().expect("the other leads");
        assert_ne!(new, old, "seed {seed}");
        let refused = world.refused;
        world.run(Duration::from_secs(5));
        assert!(world.refused > refused, "seed {seed}: on its return it tried to write under its old term");
        assert_eq!(world.wrote_last[&fence.revision()], last, "seed {seed}");
        assert_eq!(world.leader().map(|(who, _)| who), Some(new), "seed {seed}: the new one stays");
    }
}

#[test]
fn an_outage_of_the_store_that_the_lease_survives_ends_the_term_and_renews_it() {
    let mut world = World::new(5, 2, Manner::CALM);
    world.run(Duration::from_secs(3));
    let (who, fence) = world.leader().expect("somebody leads");
    // As etcd does: without a majority nothing is answered, and no lease ends either.
    world.silence(Duration::from_secs(10));
    world.run(Duration::from_secs(5));
    assert_eq!(world.leader(), None, "a leader that cannot know does not lead");
    world.run(Duration::from_secs(8));
    assert_eq!(world.leader(), Some((who, fence)), "the same term goes on: nobody else can have had it");
}

#[test]
fn an_answer_that_was_lost_is_found_out() {
    let now = Instant::now();
    let mut election = Election::new(now, Dice::seeded(3));
    let lease = LeaseId(7);
    assert_eq!(election.step(now), Step::Grant);
    election.granted(now, now, Some((lease, LEASE_TTL)));
    assert_eq!(election.step(now), Step::Announce { lease });
    election.announced(now, Written::At(10));
    election.saw(now, 10, None);
    let at = now + CLAIM_JITTER;
    assert_eq!(election.step(at), Step::Claim { lease });
    election.claimed(at, Written::Unknown);
    let at = now + 500 * MS;
    assert_eq!((election.step(at), election.term(at)), (Step::Confirm, None));
    // The claim is still on its way: not there yet, then there.
    election.confirmed(at, Some(None));
    let mine = Leader { name: "a".to_owned(), lease: Some(lease), revision: 12 };
    election.saw(at, 12, Some(&mine));
    assert_eq!(election.step(at), Step::Confirm, "the mirror may be of the past, the store is asked");
    election.confirmed(at, Some(Some(mine)));
    assert_eq!(election.term(at), Some(Fence::new(12)));
}

#[test]
fn seeded_faults_never_give_two_leaders_and_always_one_in_the_end() {
    for seed in 0..400 {
        let candidates = 2 + usize::try_from(seed % 4).unwrap();
        let mut world = World::new(seed, candidates, Manner::STORMY);
        world.run(Duration::from_secs(60));
        world.calm();
        world.run(Duration::from_secs(20));
        let led = world.leader();
        assert!(led.is_some(), "seed {seed}: nobody leads");
        world.run(Duration::from_secs(10));
        assert_eq!(world.leader(), led, "seed {seed}: in calm the leader stays");
        assert!(world.writes > 0, "seed {seed}: nobody ever wrote");
    }
}

#[test]
fn a_term_counts_from_when_the_lease_was_asked_for_and_outlives_a_mirror_that_is_behind() {
    let (asked, ttl) = (Instant::now(), Duration::from_secs(2));
    let mut election = Election::new(asked, Dice::seeded(1));
    assert_eq!(election.step(asked), Step::Grant);
    let now = asked + Duration::from_millis(500);
    election.granted(asked, now, Some((LeaseId(1), ttl)));
    election.announced(now, Written::At(5));
    election.claimed(now, Written::At(6));
    assert_eq!(election.term_ends(), Some(asked + ttl), "another may lead from then on");
    let other = Leader { name: "other".to_owned(), lease: Some(LeaseId(2)), revision: 3 };
    for (revision, leader) in [(4, Some(&other)), (5, None)] {
        election.saw(now, revision, leader);
        assert_eq!(election.term(now), Some(Fence::new(6)), "that was before the claim");
    }
    election.saw(now, 6, None);
    assert_eq!(election.term(now), None);
}
