//! Single scenarios, step by step.

use super::*;
use crate::handoff::tests::geometry;

const BLOCK: u32 = 32;

struct Scene {
    now: Instant,
    limits: Limits,
    prefill: Prefill,
}

impl Scene {
    /// The first ticket of two blocks is posted.
    fn posted() -> Self {
        let now = Instant::now();
        let peer = PeerRef { worker: "d-0".parse().unwrap(), epoch: Epoch(2), address: "d".into() };
        let prefill = Prefill::new("p-0".parse().unwrap(), Epoch(1), peer, geometry(), 2 * BLOCK, now);
        let mut scene = Self { now, limits: Limits::default(), prefill };
        scene.event(PrefillEvent::Computed { upto: BLOCK });
        let block = TicketBlock { index: 0, region: 1, offset: 0, digest: 0 };
        assert_eq!(posts(&scene.event(PrefillEvent::Exported(Ok(vec![block])))), [0]);
        scene
    }

    fn event(&mut self, event: PrefillEvent) -> Vec<PrefillAction> {
        let mut out = Vec::new();
        self.prefill.handle(self.now, event, &self.limits, &mut out);
        out
    }

    /// Time passes until something is due.
    fn tick(&mut self) -> Vec<PrefillAction> {
        self.now = self.prefill.deadline(&self.limits).expect("it goes on").max(self.now);
        self.event(PrefillEvent::Tick)
    }
}

fn posts(out: &[PrefillAction]) -> Vec<u32> {
    let post = |action: &PrefillAction| match action {
        PrefillAction::Post { ticket } => Some(ticket.seq),
        _ => None,
    };
    out.iter().filter_map(post).collect()
}

#[test]
fn a_peer_without_room_keeps_the_blocks_as_long_as_it_answers() {
    let mut scene = Scene::posted();
    let start = scene.now;
    while scene.now < start + 3 * scene.limits.lease {
        assert_eq!(posts(&scene.tick()), [0]);
        scene.event(PrefillEvent::Answered { seq: 0, result: Err(PeerFault::Busy) });
    }
    assert_eq!(scene.prefill.ended(), None);
    let heard = scene.now;
    while scene.prefill.ended().is_none() {
        scene.tick();
    }
    assert_eq!(
        (scene.prefill.ended(), scene.now),
        (Some(HandoffOutcome::Expired), heard + scene.limits.lease)
    );
}

#[test]
fn what_was_put_off_is_posted_as_soon_as_there_is_room() {
    let mut scene = Scene::posted();
    scene.tick();
    scene.event(PrefillEvent::Answered { seq: 0, result: Err(PeerFault::Busy) });
    let put_off = scene.now;
    scene.event(PrefillEvent::Want { from_token: 0 });
    assert_eq!((posts(&scene.tick()), scene.now), (vec![0], put_off));
    // A call is under way now, which will be answered: another want changes nothing.
    scene.event(PrefillEvent::Want { from_token: 0 });
    scene.tick();
    assert!(scene.now > put_off);
}

#[test]
fn lost_posts_count_only_one_after_another() {
    let mut scene = Scene::posted();
    for _ in 0..3 * scene.limits.post_faults_max {
        scene.event(PrefillEvent::Answered { seq: 0, result: Err(PeerFault::Unreachable) });
        scene.event(PrefillEvent::Answered { seq: 0, result: Err(PeerFault::Busy) });
    }
    assert_eq!(scene.prefill.ended(), None);
    for _ in 0..scene.limits.post_faults_max {
        scene.event(PrefillEvent::Answered { seq: 0, result: Err(PeerFault::Unreachable) });
    }
    assert_eq!(scene.prefill.ended(), Some(HandoffOutcome::Expired));
}

fn fresh(prompt: u32) -> Scene {
    let Scene { now, limits, prefill } = Scene::posted();
    let prefill = Prefill::new("p-0".parse().unwrap(), Epoch(1), prefill.peer, prefill.geometry, prompt, now);
    Scene { now, limits, prefill }
}

/// First block and end of what is to be exported.
fn exports(out: &[PrefillAction]) -> Vec<(u32, u32)> {
    let export = |action: &PrefillAction| match action {
        PrefillAction::Export { blocks } => Some((blocks.start, blocks.end)),
        _ => None,
    };
    out.iter().filter_map(export).collect()
}

fn blocks(indices: Range<u32>) -> Vec<TicketBlock> {
    indices.map(|index| TicketBlock { index, region: 1, offset: 0, digest: 0 }).collect()
}

#[test]
fn a_block_is_offered_when_its_last_token_is_computed() {
    let mut scene = fresh(2 * BLOCK + 5);
    assert_eq!(exports(&scene.event(PrefillEvent::Computed { upto: BLOCK - 1 })), []);
    assert_eq!(exports(&scene.event(PrefillEvent::Computed { upto: 2 * BLOCK - 1 })), [(0, 1)]);
    scene.event(PrefillEvent::Computed { upto: 2 * BLOCK + 4 });
    assert_eq!(exports(&scene.event(PrefillEvent::Exported(Ok(blocks(0..1))))), [(1, 2)]);
    assert_eq!(
        exports(&scene.event(PrefillEvent::Exported(Ok(blocks(1..2))))),
        [],
        "the third lacks a token"
    );
    assert_eq!(exports(&scene.event(PrefillEvent::Computed { upto: 2 * BLOCK + 5 })), [(2, 3)]);
}

#[test]
fn the_block_of_the_last_token_is_offered_whatever_is_wanted() {
    for from_token in [2 * BLOCK - 1, 2 * BLOCK, u32::MAX] {
        let mut scene = fresh(2 * BLOCK);
        scene.event(PrefillEvent::Want { from_token });
        assert_eq!(exports(&scene.event(PrefillEvent::Computed { upto: 2 * BLOCK })), [(1, 2)]);
    }
}

#[test]
fn a_peer_that_is_not_reached_does_not_keep_the_blocks() {
    let mut scene = Scene::posted();
    let second = Duration::from_secs(1);
    scene.now += scene.limits.lease - second;
    scene.event(PrefillEvent::Answered { seq: 0, result: Err(PeerFault::Unreachable) });
    assert_eq!(scene.prefill.ended(), None);
    scene.now += second;
    scene.event(PrefillEvent::Tick);
    assert_eq!(scene.prefill.ended(), Some(HandoffOutcome::Expired));
}

#[test]
fn what_was_taken_makes_room_and_the_end_takes_back_the_rest() {
    let mut scene = Scene::posted();
    scene.event(PrefillEvent::Computed { upto: 2 * BLOCK });
    let out = scene.event(PrefillEvent::Answered { seq: 0, result: Ok(TicketAck::Taken) });
    assert_eq!(out, [PrefillAction::ReleaseStaged { blocks: vec![0] }, PrefillAction::Wanted]);
    let first = FirstToken { token: 1, logprob: None, logits_digest: None };
    scene.event(PrefillEvent::First(first));
    assert_eq!(posts(&scene.event(PrefillEvent::Exported(Ok(blocks(1..2))))), [1]);
    let out = scene.event(PrefillEvent::Answered { seq: 1, result: Ok(TicketAck::Taken) });
    let released = PrefillAction::ReleaseStaged { blocks: vec![1] };
    assert_eq!(out, [released, PrefillAction::Withdraw, PrefillAction::ReleaseEngine]);
    assert_eq!(scene.prefill.ended(), Some(HandoffOutcome::Done));
    // And where it is given up, the peer is told unless that is where it comes from.
    let withdrawn = [PrefillAction::Withdraw, PrefillAction::CancelEngine];
    for (event, told) in [
        (PrefillEvent::Cancel, true),
        (PrefillEvent::EngineFailed, true),
        (PrefillEvent::PeerGone, false),
        (PrefillEvent::Answered { seq: 0, result: Ok(TicketAck::Abandoned) }, false),
        (PrefillEvent::Answered { seq: 0, result: Err(PeerFault::Stale) }, false),
    ] {
        let mut scene = Scene::posted();
        let out = scene.event(event.clone());
        assert_eq!((&out[..2], out.len()), (&withdrawn[..], 2 + usize::from(told)), "{event:?}");
        assert_eq!(out.contains(&PrefillAction::DeleteAtPeer), told, "{event:?}");
    }
}
