//! Single scenarios, step by step.

use baton_config::{Dtype, KvLayout};

use super::*;

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
        let geometry = KvGeometry {
            layers: 1,
            kv_heads: 1,
            head_dim: 8,
            block_tokens: BLOCK,
            layout: KvLayout::Nhd,
            dtype: Dtype::Bf16,
            ..KvGeometry::PLAIN
        };
        let peer = PeerRef { worker: "d-0".parse().unwrap(), epoch: Epoch(2), address: "d".into() };
        let prefill = Prefill::new("p-0".parse().unwrap(), Epoch(1), peer, geometry, 2 * BLOCK, now);
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
