//! Single scenarios, step by step.

use baton_config::protocol::TicketBlock;
use baton_config::{Dtype, Epoch, KvLayout};

use super::*;

const BLOCK: u32 = 32;
const PROMPT: u32 = 4 * BLOCK;

struct Scene {
    now: Instant,
    limits: Limits,
    decode: Decode,
}

fn peer() -> PeerRef {
    PeerRef { worker: "p-0".parse().unwrap(), epoch: Epoch(1), address: "p".into() }
}

/// The ticket of block `seq`; the last one has the first token.
fn ticket(seq: u32) -> Ticket {
    let tokens = (seq + 1) * BLOCK;
    Ticket {
        worker: peer().worker,
        epoch: Epoch(1),
        to_epoch: Epoch(2),
        seq,
        geometry: KvGeometry {
            layers: 1,
            kv_heads: 1,
            head_dim: 8,
            block_tokens: BLOCK,
            layout: KvLayout::Nhd,
            dtype: Dtype::Bf16,
            ..KvGeometry::PLAIN
        },
        tokens,
        blocks: vec![TicketBlock { index: seq, region: 1, offset: 0, digest: 0 }],
        first: (tokens == PROMPT).then_some(FirstToken { token: 7, logprob: None, logits_digest: None }),
    }
}

impl Scene {
    /// Admitted, nothing cached.
    fn admitted() -> Self {
        let now = Instant::now();
        let mut scene = Self { now, limits: Limits::default(), decode: Decode::new(peer(), PROMPT, now) };
        let out = scene.event(DecodeEvent::Admitted { cached: 0, local_below: 0 });
        assert_eq!(out, [DecodeAction::SendWant { from_token: 0 }]);
        scene
    }

    fn event(&mut self, event: DecodeEvent) -> Vec<DecodeAction> {
        let mut out = Vec::new();
        self.decode.handle(self.now, event, &self.limits, &mut out);
        out
    }

    fn post(&mut self, seq: u32, waiter: u64) -> Vec<DecodeAction> {
        self.event(DecodeEvent::Ticket { ticket: ticket(seq), waiter: Some(Waiter(waiter)) })
    }

    fn pulled(&mut self, pull: u64, fault: Option<PullFault>, upto: u32) -> Vec<DecodeAction> {
        self.event(DecodeEvent::Pulled { pull, upto, bytes: 0, fault })
    }
}

fn answers(out: &[DecodeAction]) -> Vec<(u64, Answer)> {
    let answer = |action: &DecodeAction| match action {
        DecodeAction::Answer { waiter, answer } => Some((waiter.0, *answer)),
        _ => None,
    };
    out.iter().filter_map(answer).collect()
}

fn order(out: &[DecodeAction]) -> &PullOrder {
    let order = out.iter().find_map(|action| match action {
        DecodeAction::Pull(order) => Some(order),
        _ => None,
    });
    order.expect("a read")
}

const TAKEN: Answer = Answer::Ack(TicketAck::Taken);

#[test]
fn a_ticket_posted_again_after_it_was_taken_is_answered_at_once() {
    let mut scene = Scene::admitted();
    scene.post(0, 10);
    assert_eq!(answers(&scene.pulled(0, None, BLOCK)), [(10, TAKEN)]);
    // Its answer got lost. While nothing is read, and while the next block is.
    assert_eq!(answers(&scene.post(0, 11)), [(11, TAKEN)]);
    let next = scene.post(1, 12);
    assert_eq!(order(&next).tokens, BLOCK..2 * BLOCK);
    let again = scene.post(0, 13);
    assert_eq!(again, [DecodeAction::Answer { waiter: Waiter(13), answer: TAKEN }], "nor is it read again");
}

#[test]
fn a_ticket_posted_again_while_it_is_read_is_answered_with_the_read() {
    let mut scene = Scene::admitted();
    scene.post(0, 0);
    for waiter in 1..TICKET_WAITERS_MAX as u64 {
        assert_eq!(scene.post(0, waiter), [], "not read twice");
    }
    let over = TICKET_WAITERS_MAX as u64;
    assert_eq!(answers(&scene.post(0, over)), [(0, Answer::Busy)], "the oldest makes room");
    let all: Vec<_> = (1..=over).map(|waiter| (waiter, TAKEN)).collect();
    assert_eq!(answers(&scene.pulled(0, None, BLOCK)), all);
}

#[test]
fn a_ticket_posted_again_while_there_is_no_room_is_put_off_and_kept() {
    let now = Instant::now();
    let mut scene = Scene { now, limits: Limits::default(), decode: Decode::new(peer(), PROMPT, now) };
    assert_eq!(scene.post(0, 0), []);
    for waiter in 1..10 {
        assert_eq!(answers(&scene.post(0, waiter)), [(waiter, Answer::Busy)], "who listens hears it");
    }
    let out = scene.event(DecodeEvent::Admitted { cached: 0, local_below: 0 });
    assert_eq!(order(&out).tokens, 0..BLOCK, "as it came first");
    assert_eq!(scene.post(0, 10), []);
    assert_eq!(answers(&scene.pulled(0, None, BLOCK)), [(0, TAKEN), (10, TAKEN)]);
}

#[test]
fn a_ticket_that_came_before_its_turn_is_answered_in_its_turn() {
    let mut scene = Scene::admitted();
    assert_eq!(scene.post(1, 21), []);
    assert_eq!(scene.post(1, 22), []);
    let out = scene.post(0, 20);
    assert_eq!((order(&out).tokens.clone(), order(&out).blocks.len()), (0..2 * BLOCK, 2));
    let out = scene.pulled(0, None, 2 * BLOCK);
    assert_eq!(answers(&out), [(20, TAKEN), (21, TAKEN), (22, TAKEN)]);
}

#[test]
fn a_damaged_block_is_ordered_again_once_and_says_so() {
    for fault in [PullFault::Integrity, PullFault::Link] {
        let mut scene = Scene::admitted();
        scene.post(0, 0);
        let out = scene.pulled(0, Some(fault), 0);
        assert_eq!((order(&out).pull, order(&out).again_after), (1, Some(fault)));
        assert_eq!(answers(&out), []);
        let out = scene.pulled(1, Some(fault), 0);
        assert!(matches!(scene.decode.ended(), Some(DecodeEnd::Local(_))), "{out:?}");
        assert_eq!(answers(&out), [(0, Answer::Ack(TicketAck::Abandoned))]);
        // One good read between, and the next block has its own second try.
        let mut scene = Scene::admitted();
        scene.post(0, 0);
        scene.pulled(0, Some(fault), 0);
        scene.pulled(1, None, BLOCK);
        assert_eq!(order(&scene.post(1, 1)).again_after, None);
        assert_eq!(order(&scene.pulled(2, Some(fault), BLOCK)).again_after, Some(fault));
    }
}
