//! Single scenarios, step by step.

use baton_config::Epoch;
use baton_config::protocol::TicketBlock;

use super::*;
use crate::handoff::tests::geometry;

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
        geometry: geometry(),
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

fn gives_up(out: &[DecodeAction]) -> Option<GiveUp> {
    out.iter().find_map(|action| match action {
        DecodeAction::PrefillLocally { why, .. } => Some(*why),
        _ => None,
    })
}

fn reads(out: &[DecodeAction]) -> bool {
    out.iter().any(|action| matches!(action, DecodeAction::Pull(_)))
}

fn blocks(indices: &[u32]) -> Vec<TicketBlock> {
    indices.iter().map(|index| TicketBlock { index: *index, region: 1, offset: 0, digest: 0 }).collect()
}

#[test]
fn tickets_that_contradict_those_before_them_are_not_read() {
    type Wrong = (&'static str, fn(&mut Ticket));
    let wrong: [Wrong; 9] = [
        ("another geometry", |t| t.geometry.layers += 1),
        ("blocks without tokens", |t| t.geometry.block_tokens = 0),
        ("more tokens than the prompt has", |t| {
            (t.tokens, t.blocks) = (PROMPT + 1, blocks(&[1, 2, 3, 4]));
        }),
        ("a first token before the last block", |t| t.first = ticket(3).first),
        ("a block that was taken", |t| t.blocks = blocks(&[0, 1])),
        ("a gap", |t| (t.tokens, t.blocks) = (3 * BLOCK, blocks(&[2]))),
        ("a gap within", |t| (t.tokens, t.blocks) = (3 * BLOCK, blocks(&[1, 3]))),
        ("more tokens than blocks", |t| t.tokens = 3 * BLOCK),
        ("tokens without blocks", |t| t.blocks = Vec::new()),
    ];
    for (what, change) in wrong {
        let mut scene = Scene::admitted();
        scene.post(0, 0);
        scene.pulled(0, None, BLOCK);
        let mut ticket = ticket(1);
        change(&mut ticket);
        let out = scene.event(DecodeEvent::Ticket { ticket, waiter: Some(Waiter(1)) });
        assert_eq!((gives_up(&out), reads(&out)), (Some(GiveUp::Protocol), false), "{what}: {out:?}");
        assert_eq!(answers(&out), [(1, Answer::Ack(TicketAck::Abandoned))], "{what}");
        assert!(out.contains(&DecodeAction::DeleteAtPeer), "{what}");
    }
}

#[test]
fn the_end_of_another_read_than_the_awaited_one_changes_nothing() {
    let mut scene = Scene::admitted();
    scene.post(0, 0);
    assert_eq!(scene.pulled(5, None, BLOCK), [], "while it is read");
    let out = scene.event(DecodeEvent::PeerGone);
    assert!(out.contains(&DecodeAction::AbortPull { pull: 0 }) && gives_up(&out).is_none());
    assert_eq!(scene.pulled(5, Some(PullFault::Aborted), 0), [], "while it is aborted");
    let out = scene.pulled(0, Some(PullFault::Aborted), 0);
    assert_eq!(gives_up(&out), Some(GiveUp::PeerGone));
    let mut scene = Scene::admitted();
    scene.post(0, 0);
    scene.event(DecodeEvent::Cancel);
    assert_eq!(scene.pulled(5, Some(PullFault::Aborted), 0), [], "while it is fenced");
    assert_eq!(scene.pulled(0, Some(PullFault::Aborted), 0), [DecodeAction::Fence]);
}

#[test]
fn what_was_read_before_a_fault_stays_and_only_the_rest_is_read_again() {
    let mut scene = Scene::admitted();
    scene.post(1, 1);
    scene.post(0, 0);
    let out = scene.pulled(0, Some(PullFault::Link), BLOCK + 8);
    assert!(out.contains(&DecodeAction::Imported { upto: BLOCK + 8 }), "{out:?}");
    let again = order(&out);
    assert_eq!((again.tokens.clone(), &again.blocks), (BLOCK + 8..2 * BLOCK, &blocks(&[1])));
}

#[test]
fn a_read_that_brought_less_than_was_ordered_is_not_built_upon() {
    let mut scene = Scene::admitted();
    scene.post(0, 0);
    let out = scene.pulled(0, None, BLOCK - 1);
    assert!(out.contains(&DecodeAction::Imported { upto: BLOCK - 1 }));
    assert_eq!(gives_up(&out), Some(GiveUp::Protocol));
    assert_eq!(answers(&out), [(0, Answer::Ack(TicketAck::Abandoned))]);
}

#[test]
fn few_missing_tokens_are_computed_here() {
    for (local_below, short) in [(10, false), (11, true)] {
        let now = Instant::now();
        let mut scene = Scene { now, limits: Limits::default(), decode: Decode::new(peer(), PROMPT, now) };
        let out = scene.event(DecodeEvent::Admitted { cached: PROMPT - 10, local_below });
        assert_eq!(gives_up(&out).is_some(), short, "{local_below}");
        let asked = out.contains(&DecodeAction::SendWant { from_token: PROMPT - 10 });
        assert_eq!((asked, out.contains(&DecodeAction::DeleteAtPeer)), (!short, short));
    }
}

#[test]
fn silence_is_asked_about_and_what_got_lost_comes_with_the_answer() {
    let status = |change: fn(&mut HandoffStatus)| {
        let (worker, epoch) = (peer().worker, peer().epoch);
        let mut status =
            HandoffStatus { worker, epoch, phase: "any".to_owned(), pending: vec![ticket(0), ticket(1)] };
        change(&mut status);
        DecodeEvent::StatusAnswered(Ok(status))
    };
    let mut scene = Scene::admitted();
    let asked = scene.now + scene.limits.poll_after;
    assert_eq!(scene.decode.deadline(&scene.limits), Some(asked));
    scene.now = asked;
    assert_eq!(scene.event(DecodeEvent::Tick), [DecodeAction::PollStatus]);
    assert_eq!(scene.event(DecodeEvent::Tick), [], "one question at a time");
    let of_another_life = scene.event(status(|s| s.pending.iter_mut().for_each(|t| t.epoch = Epoch(9))));
    assert_eq!(of_another_life, []);
    let of_another_worker =
        scene.event(status(|s| s.pending.iter_mut().for_each(|t| t.worker = "p-1".parse().unwrap())));
    assert_eq!(of_another_worker, []);
    let out = scene.event(status(|_| {}));
    assert_eq!(order(&out).tokens, 0..BLOCK, "the first is read as soon as it is there");
    // Who answers in another life, or another worker, knows nothing of it.
    for change in [(|s: &mut HandoffStatus| s.epoch = Epoch(9)) as fn(&mut HandoffStatus), |s| {
        s.worker = "p-1".parse().unwrap()
    }] {
        let mut scene = Scene::admitted();
        assert_eq!(gives_up(&scene.event(status(change))), Some(GiveUp::PeerGone));
    }
}

#[test]
fn a_peer_that_does_not_know_the_handoff_yet_gets_time_and_not_for_ever() {
    let mut scene = Scene::admitted();
    let unknown = || DecodeEvent::StatusAnswered(Err(PeerFault::Unknown));
    scene.now += scene.limits.unknown_grace - std::time::Duration::from_millis(1);
    assert_eq!(scene.event(unknown()), []);
    scene.now += std::time::Duration::from_millis(1);
    assert_eq!(gives_up(&scene.event(unknown())), Some(GiveUp::PeerUnknown));
}

#[test]
fn a_peer_that_has_ended_it_is_not_told() {
    let mut scene = Scene::admitted();
    let out = scene.event(DecodeEvent::StatusAnswered(Err(PeerFault::Ended)));
    assert_eq!(gives_up(&out), Some(GiveUp::PeerEnded));
    assert!(!out.contains(&DecodeAction::DeleteAtPeer));
}

#[test]
fn one_read_takes_so_many_blocks_and_so_many_tickets_wait() {
    let mut scene = Scene::admitted();
    scene.limits.pull_blocks_max = 2;
    scene.limits.held_max = 3;
    scene.post(2, 2);
    scene.post(1, 1);
    assert_eq!(answers(&scene.post(3, 3)), [(3, Answer::Busy)], "too far ahead");
    let large = Ticket { blocks: blocks(&[0, 1, 2, 3]), ..ticket(0) };
    let out = scene.event(DecodeEvent::Ticket { ticket: large, waiter: Some(Waiter(4)) });
    assert_eq!(answers(&out), [(4, Answer::Busy)], "too large");
    assert_eq!(order(&scene.post(0, 0)).blocks, blocks(&[0, 1]));
    assert_eq!(order(&scene.pulled(0, None, 2 * BLOCK)).blocks, blocks(&[2]));
}
