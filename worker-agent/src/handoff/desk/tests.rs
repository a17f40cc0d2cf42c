//! Which handoff a message is for, of which life, and what is remembered of those that ended.

use baton_config::protocol::{FirstToken, TicketBlock};
use std::time::Duration;

use super::*;
use crate::handoff::GiveUp;
use crate::handoff::tests::geometry;

const BLOCK: u32 = 32;
const PROMPT: u32 = 2 * BLOCK;
const ID: HandoffId = HandoffId(7);
const P: (&str, Epoch) = ("p-0", Epoch(1));
const D: (&str, Epoch) = ("d-0", Epoch(2));

fn name(worker: &str) -> WorkerId {
    worker.parse().unwrap()
}

fn opening(own_epoch: Epoch, peer: (&str, Epoch)) -> Opening {
    let peer = PeerRef { worker: name(peer.0), epoch: peer.1, address: "there".into() };
    Opening { id: ID, own_epoch, peer, prompt: PROMPT }
}

/// The whole prompt with its first token.
fn ticket() -> Ticket {
    Ticket {
        worker: name(P.0),
        epoch: P.1,
        to_epoch: D.1,
        seq: 0,
        geometry: geometry(),
        tokens: PROMPT,
        blocks: (0..2).map(|index| TicketBlock { index, region: 1, offset: 0, digest: 0 }).collect(),
        first: Some(FirstToken { token: 7, logprob: None, logits_digest: None }),
    }
}

fn want() -> Want {
    Want { worker: name(D.0), epoch: D.1, to_epoch: P.1, from_token: BLOCK }
}

struct Scene {
    now: Instant,
    desk: Desk,
    out: Vec<Action>,
}

impl Scene {
    fn new((own, epoch): (&str, Epoch), limits: Limits) -> Self {
        let now = Instant::now();
        let mut scene = Self { now, desk: Desk::new(name(own), limits), out: Vec::new() };
        scene.desk.set_epoch(now, epoch, &mut scene.out);
        scene
    }

    fn decode() -> Self {
        Self::new(D, Limits::default())
    }

    fn prefill() -> Self {
        Self::new(P, Limits::default())
    }

    fn open_decode(&mut self) -> Result<(), OpenError> {
        self.desk.open_decode(self.now, opening(D.1, P), &mut self.out)
    }

    fn admit(&mut self) {
        let event = DecodeEvent::Admitted { cached: 0, local_below: 0 };
        self.desk.decode(self.now, ID, event, &mut self.out);
    }

    fn open_prefill(&mut self) -> Result<(), OpenError> {
        self.desk.open_prefill(self.now, opening(P.1, D), geometry(), &mut self.out)
    }

    /// What a ticket leads to; its waiter is 1.
    fn post(&mut self, ticket: Ticket) -> Vec<Action> {
        self.out.clear();
        self.desk.ticket(self.now, ID, ticket, Waiter(1), &mut self.out);
        std::mem::take(&mut self.out)
    }

    /// The same of a want, whose waiter is 2.
    fn ask(&mut self, want: Want) -> Vec<Action> {
        self.out.clear();
        self.desk.want(self.now, ID, want, Waiter(2), &mut self.out);
        std::mem::take(&mut self.out)
    }

    fn tick(&mut self, after: Duration) -> Vec<Action> {
        self.now += after;
        self.out.clear();
        self.desk.tick(self.now, &mut self.out);
        std::mem::take(&mut self.out)
    }

    fn take(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.out)
    }
}

fn answer(waiter: u64, answer: Answer) -> Action {
    Action::Answer { waiter: Waiter(waiter), answer }
}

fn is_read(action: &Action) -> bool {
    matches!(action, Action::Decode(_, DecodeAction::Pull(_)))
}

fn ended(out: &[Action]) -> Vec<&Action> {
    let is_end = |action: &&Action| matches!(action, Action::PrefillEnded(..) | Action::DecodeEnded(..));
    out.iter().filter(is_end).collect()
}

const ABANDONED: Answer = Answer::Ack(TicketAck::Abandoned);

#[test]
fn tickets_of_another_life_or_worker_change_nothing() {
    let stale = |current| Answer::Stale { current: Some(current) };
    let wrong: [(Ticket, Answer); 4] = [
        (Ticket { to_epoch: Epoch(1), ..ticket() }, stale(D.1)),
        (Ticket { to_epoch: Epoch(3), ..ticket() }, stale(D.1)),
        (Ticket { epoch: Epoch(9), ..ticket() }, stale(D.1)),
        (Ticket { worker: name("p-1"), ..ticket() }, Answer::Malformed("the ticket is from another worker")),
    ];
    let mut scene = Scene::decode();
    for (ticket, expected) in &wrong[..2] {
        assert_eq!(scene.post(ticket.clone()), [answer(1, *expected)]);
        assert_eq!(scene.desk.parked(), 0, "there is nothing to wait for");
    }
    scene.open_decode().unwrap();
    scene.admit();
    for (ticket, expected) in wrong {
        assert_eq!(scene.post(ticket.clone()), [answer(1, expected)], "{ticket:?}");
    }
    assert!(scene.post(ticket()).iter().any(is_read), "the right one is read");
}

#[test]
fn wants_of_another_life_or_worker_change_nothing() {
    let stale = Answer::Stale { current: Some(P.1) };
    let wrong: [(Want, Answer); 4] = [
        (Want { to_epoch: Epoch(0), ..want() }, stale),
        (Want { to_epoch: Epoch(2), ..want() }, stale),
        (Want { epoch: Epoch(9), ..want() }, stale),
        (Want { worker: name("d-1"), ..want() }, Answer::Malformed("the want is from another worker")),
    ];
    let mut scene = Scene::prefill();
    for (want, expected) in &wrong[..2] {
        assert_eq!(scene.ask(want.clone()), [answer(2, *expected)]);
        assert_eq!(scene.desk.parked(), 0, "there is nothing to wait for");
    }
    scene.open_prefill().unwrap();
    for (want, expected) in wrong {
        assert_eq!(scene.ask(want.clone()), [answer(2, expected)], "{want:?}");
    }
    scene.desk.prefill(scene.now, ID, PrefillEvent::Computed { upto: PROMPT }, &mut scene.out);
    assert_eq!(scene.take(), [Action::Prefill(ID, PrefillAction::Export { blocks: 0..2 })]);
}

#[test]
fn a_handoff_is_opened_once_and_in_its_own_life() {
    let mut scene = Scene::decode();
    for other in [Epoch(1), Epoch(3)] {
        let stale = OpenError::Stale { asked: other, current: Some(D.1) };
        assert_eq!(scene.desk.open_decode(scene.now, opening(other, P), &mut scene.out), Err(stale));
        let opened = scene.desk.open_prefill(scene.now, opening(other, P), geometry(), &mut scene.out);
        assert_eq!(opened, Err(stale));
    }
    let itself = scene.desk.open_decode(scene.now, opening(D.1, D), &mut scene.out);
    assert_eq!(itself, Err(OpenError::Itself));
    scene.open_decode().unwrap();
    assert_eq!(scene.open_decode(), Err(OpenError::Duplicate));
    let both = scene.desk.open_prefill(scene.now, opening(D.1, P), geometry(), &mut scene.out);
    assert_eq!(both, Err(OpenError::Duplicate), "neither is it both sides of one");
    scene.desk.close_decode(scene.now, ID, &mut scene.out);
    assert_eq!(scene.open_decode(), Err(OpenError::Ended));
    let mut scene = Scene::prefill();
    scene.open_prefill().unwrap();
    scene.desk.prefill(scene.now, ID, PrefillEvent::Cancel, &mut scene.out);
    assert_eq!(scene.open_prefill(), Err(OpenError::Ended));
}

#[test]
fn a_new_epoch_ends_what_is_open_and_the_same_one_nothing() {
    let mut scene = Scene::prefill();
    scene.open_prefill().unwrap();
    scene.take();
    scene.desk.set_epoch(scene.now, P.1, &mut scene.out);
    assert_eq!(scene.take(), []);
    scene.desk.set_epoch(scene.now, Epoch(8), &mut scene.out);
    assert_eq!(ended(&scene.out), [&Action::PrefillEnded(ID, HandoffOutcome::Cancelled)]);
    assert_eq!(scene.desk.prefills(), 0);
    let mut scene = Scene::decode();
    scene.open_decode().unwrap();
    scene.admit();
    scene.desk.set_epoch(scene.now, Epoch(8), &mut scene.out);
    assert_eq!(ended(&scene.out), [&Action::DecodeEnded(ID, DecodeEnd::Local(GiveUp::OwnEpoch))]);
}

#[test]
fn a_peer_that_is_no_longer_in_view_in_its_life_ends_the_handoff() {
    let mut scene = Scene::prefill();
    scene.open_prefill().unwrap();
    scene.desk.view_changed(scene.now, |worker, epoch| *worker == name(D.0) && epoch == D.1, &mut scene.out);
    assert_eq!(scene.take(), [], "it is there");
    scene.desk.view_changed(scene.now, |_, epoch| epoch != D.1, &mut scene.out);
    assert_eq!(ended(&scene.out), [&Action::PrefillEnded(ID, HandoffOutcome::Cancelled)]);
    let mut scene = Scene::decode();
    scene.open_decode().unwrap();
    scene.admit();
    scene.take();
    scene.desk.view_changed(scene.now, |worker, epoch| *worker == name(P.0) && epoch == P.1, &mut scene.out);
    assert_eq!(scene.take(), [], "it is there");
    scene.desk.view_changed(scene.now, |_, epoch| epoch != P.1, &mut scene.out);
    assert_eq!(ended(&scene.out), [&Action::DecodeEnded(ID, DecodeEnd::Local(GiveUp::PeerGone))]);
}

#[test]
fn what_came_too_early_is_taken_by_the_request_it_belongs_to() {
    let mut scene = Scene::decode();
    assert_eq!(scene.post(ticket()), []);
    assert_eq!(scene.desk.parked(), 1);
    scene.open_decode().unwrap();
    assert_eq!(scene.desk.parked(), 0);
    scene.admit();
    assert!(scene.take().iter().any(is_read));
    let mut scene = Scene::prefill();
    assert_eq!(scene.ask(want()), []);
    scene.open_prefill().unwrap();
    let wanted = Action::Prefill(ID, PrefillAction::Wanted);
    assert_eq!((scene.take(), scene.desk.parked()), (vec![wanted, answer(2, Answer::Noted)], 0));
    scene.desk.prefill(scene.now, ID, PrefillEvent::Computed { upto: PROMPT }, &mut scene.out);
    assert_eq!(
        scene.take(),
        [Action::Prefill(ID, PrefillAction::Export { blocks: 1..2 })],
        "from what it wants on"
    );
}

#[test]
fn what_nobody_comes_for_is_told_so_and_posting_again_buys_no_time() {
    let mut scene = Scene::decode();
    let wait = scene.desk.limits().parked_for;
    assert_eq!(scene.post(ticket()), []);
    assert_eq!(scene.tick(wait / 2), []);
    assert_eq!(scene.post(ticket()), []);
    assert_eq!(scene.desk.deadline(), Some(scene.now + wait / 2));
    assert_eq!(scene.tick(wait / 2), [answer(1, Answer::Unknown), answer(1, Answer::Unknown)]);
    assert_eq!((scene.desk.parked(), scene.desk.deadline()), (0, None));
    // The places are free again, and there is a bound for each handoff and for all.
    let (each, all) = (scene.desk.limits().parked_per_handoff_max, scene.desk.limits().parked_max);
    for _ in 0..each {
        assert_eq!(scene.post(ticket()), []);
    }
    assert_eq!(scene.post(ticket()), [answer(1, Answer::Busy)]);
    for other in each..all {
        let id = HandoffId(1000 + other as u128);
        scene.desk.ticket(scene.now, id, ticket(), Waiter(3), &mut scene.out);
    }
    assert_eq!((scene.take(), scene.desk.parked()), (vec![], all));
    scene.desk.ticket(scene.now, HandoffId(9999), ticket(), Waiter(3), &mut scene.out);
    assert_eq!(scene.take(), [answer(3, Answer::Busy)]);
}

#[test]
fn a_handoff_deleted_before_its_request_comes_is_not_opened() {
    for parked in [false, true] {
        let mut scene = Scene::decode();
        if parked {
            scene.post(ticket());
        }
        scene.desk.delete(scene.now, ID, &mut scene.out);
        let expected = if parked { vec![answer(1, ABANDONED)] } else { vec![] };
        assert_eq!((scene.take(), scene.desk.parked()), (expected, 0));
        assert_eq!(scene.open_decode(), Err(OpenError::Ended));
        assert_eq!(scene.post(ticket()), [answer(1, ABANDONED)]);
        let mut scene = Scene::prefill();
        if parked {
            scene.ask(want());
        }
        scene.desk.delete(scene.now, ID, &mut scene.out);
        let expected = if parked { vec![answer(2, Answer::Ended)] } else { vec![] };
        assert_eq!(scene.take(), expected);
        assert_eq!(scene.open_prefill(), Err(OpenError::Ended));
        assert_eq!(scene.ask(want()), [answer(2, Answer::Ended)]);
    }
}

#[test]
fn late_messages_hear_how_it_ended_for_as_long_as_it_is_remembered() {
    let mut scene = Scene::new(P, Limits { ended_max: 2, ..Limits::default() });
    scene.open_prefill().unwrap();
    scene.desk.prefill(scene.now, ID, PrefillEvent::Cancel, &mut scene.out);
    assert_eq!(scene.ask(want()), [answer(2, Answer::Ended)]);
    assert_eq!(scene.desk.status(scene.now, ID, &mut scene.out).err(), Some(Answer::Ended));
    // Two more ends push it out.
    scene.desk.delete(scene.now, HandoffId(8), &mut scene.out);
    assert_eq!(scene.desk.status(scene.now, ID, &mut scene.out).err(), Some(Answer::Unknown));
    let mut scene = Scene::decode();
    scene.open_decode().unwrap();
    scene.admit();
    scene.desk.delete(scene.now, ID, &mut scene.out);
    assert_eq!(scene.post(ticket()), [answer(1, ABANDONED)]);
    let mut scene = Scene::decode();
    scene.open_decode().unwrap();
    scene.admit();
    scene.post(ticket());
    let pulled = DecodeEvent::Pulled { pull: 0, upto: PROMPT, bytes: 1, fault: None };
    scene.desk.decode(scene.now, ID, pulled, &mut scene.out);
    assert_eq!(ended(&scene.out), [&Action::DecodeEnded(ID, DecodeEnd::Imported)]);
    assert_eq!(scene.post(ticket()), [answer(1, Answer::Ack(TicketAck::Taken))], "its answer got lost");
}

/// An engine whose blocks are full of what waits for a peer, which may wait for this very engine.
#[test]
fn an_engine_that_is_blocked_ends_one_wait_after_the_other() {
    fn blocked(scene: &mut Scene) -> Vec<Action> {
        scene.take();
        scene.desk.blocked(scene.now, &mut scene.out);
        scene.take()
    }
    let mut scene = Scene::decode();
    for id in 1..=4 {
        let opening = Opening { id: HandoffId(id), ..opening(D.1, P) };
        scene.desk.open_decode(scene.now, opening, &mut scene.out).unwrap();
    }
    // The one that was admitted first has its blocks coming, the last has no room.
    for id in [3, 2, 1] {
        let admitted = DecodeEvent::Admitted { cached: 0, local_below: 0 };
        scene.desk.decode(scene.now, HandoffId(id), admitted, &mut scene.out);
        scene.now += Duration::from_millis(1);
    }
    scene.desk.ticket(scene.now, HandoffId(3), ticket(), Waiter(1), &mut scene.out);
    for id in [2, 1] {
        let out = blocked(&mut scene);
        let local = Action::DecodeEnded(HandoffId(id), DecodeEnd::Local(GiveUp::Stalled));
        assert_eq!(ended(&out), [&local], "the oldest for which nothing came");
        assert!(out.contains(&Action::Decode(HandoffId(id), DecodeAction::DeleteAtPeer)));
    }
    assert_eq!(blocked(&mut scene), []);
    // Exports: of one that is being computed, one that the peer wants, and two that it has no room for.
    for (id, prompt) in [(11, BLOCK), (12, 3 * BLOCK), (13, 9 * BLOCK), (14, 9 * BLOCK)] {
        let opening = Opening { id: HandoffId(id), prompt, ..opening(D.1, P) };
        scene.desk.open_prefill(scene.now, opening, geometry(), &mut scene.out).unwrap();
        let computed = PrefillEvent::Computed { upto: if id == 13 { BLOCK } else { prompt } };
        scene.desk.prefill(scene.now, HandoffId(id), computed, &mut scene.out);
    }
    let want = PrefillEvent::Want { from_token: 0 };
    scene.desk.prefill(scene.now, HandoffId(14), want, &mut scene.out);
    for id in [12, 11] {
        let out = blocked(&mut scene);
        let cancelled = Action::PrefillEnded(HandoffId(id), HandoffOutcome::Cancelled);
        assert_eq!(ended(&out), [&cancelled], "the largest that nobody has room for");
        assert!(out.contains(&Action::Prefill(HandoffId(id), PrefillAction::DeleteAtPeer)));
    }
    assert_eq!(blocked(&mut scene), []);
    // Without imports that wait here, peers may take their time.
    let mut scene = Scene::prefill();
    scene.open_prefill().unwrap();
    scene.desk.prefill(scene.now, ID, PrefillEvent::Computed { upto: PROMPT }, &mut scene.out);
    assert_eq!(blocked(&mut scene), []);
}

#[test]
fn who_asks_for_the_state_is_there() {
    let mut scene = Scene::prefill();
    let lease = scene.desk.limits().lease;
    scene.open_prefill().unwrap();
    assert_eq!(scene.tick(lease - Duration::from_secs(1)), []);
    let status = scene.desk.status(scene.now, ID, &mut scene.out).unwrap();
    assert_eq!((status.worker, status.epoch), (name(P.0), P.1));
    assert_eq!(ended(&scene.tick(lease - Duration::from_secs(1))).len(), 0);
    let out = scene.tick(Duration::from_secs(1));
    assert_eq!(ended(&out), [&Action::PrefillEnded(ID, HandoffOutcome::Expired)]);
}
