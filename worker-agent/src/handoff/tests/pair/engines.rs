//! The model engines: they know what is really in the blocks, and panic when a desk breaks an invariant.

use super::*;

impl Pair {
    pub(super) fn pull_done(&mut self, id: HandoffId, pull: u64, aborted: bool) {
        let now = self.now;
        let order = match self.requests.get_mut(&id).unwrap().pulls.remove(&pull) {
            Some(order) => order,
            None => return, // the other of natural end and abort came first
        };
        let request = &self.requests[&id];
        let source_live = self.prefill.alive
            && request.p_open == Some(self.prefill.epoch)
            && !request.p_free
            && order.blocks.iter().all(|b| b.index < request.exported_upto);
        let result = if aborted {
            Err(PullFault::Aborted)
        } else if !self.prefill.alive || self.dice.permille(self.faults.link) {
            Err(PullFault::Link)
        } else if request.p_open != Some(self.prefill.epoch) {
            Err(PullFault::Stale)
        } else if !source_live {
            // Withdrawn before the read: refused. During it: the bytes are somebody else's.
            if self.dice.permille(500) { Err(PullFault::Refused) } else { Err(PullFault::Integrity) }
        } else if request.corrupt_always || self.dice.permille(self.faults.corrupt_once) {
            Err(PullFault::Integrity)
        } else {
            Ok(())
        };
        if result.is_ok() {
            assert!(order.tokens.start <= self.requests[&id].pub_upto, "seed {}: a gap", self.seed);
            let end = order.blocks.last().map_or(0, |b| (b.index + 1) * P_BLOCK);
            assert!(end >= order.tokens.end, "seed {}: tokens beyond the blocks read", self.seed);
            let start = order.blocks.first().map_or(u32::MAX, |b| b.index * P_BLOCK);
            assert!(start <= order.tokens.start, "seed {}: tokens before the blocks read", self.seed);
        }
        // A read that failed may have put some of the tokens in place before.
        let fault = result.err();
        let upto = match fault {
            None => order.tokens.end,
            Some(PullFault::Aborted | PullFault::Stale | PullFault::Refused) => order.tokens.start,
            Some(_) => order.tokens.start + self.dice.below(order.tokens.len() as u64) as u32,
        };
        let request = self.requests.get_mut(&id).unwrap();
        request.pub_upto = request.pub_upto.max(upto);
        let mut out = Vec::new();
        let bytes = u64::from(upto - order.tokens.start);
        self.decode.desk.decode(now, id, DecodeEvent::Pulled { pull, upto, bytes, fault }, &mut out);
        self.carry_out(Side::Decode, out);
    }

    pub(super) fn prefill_action(&mut self, id: HandoffId, action: PrefillAction) {
        let seed = self.seed;
        let request = self.requests.get_mut(&id).unwrap();
        match action {
            PrefillAction::Wanted => assert!(!request.p_free, "seed {seed}: of a prompt that is over"),
            PrefillAction::Export { blocks } => {
                assert!(!request.p_free, "seed {seed}: export of freed blocks");
                assert!(!blocks.is_empty() && blocks.len() <= 4);
                let final_upto = request.computed.next_multiple_of(P_BLOCK);
                let whole = request.computed == request.prompt || request.computed == final_upto;
                let final_blocks = final_upto / P_BLOCK - u32::from(!whole);
                assert!(blocks.end <= final_blocks, "seed {seed}: {blocks:?} before they are computed");
                let after = self.dice.micros(100..5_000);
                self.at(after, id, Some(Side::Prefill), Event::Exported { blocks });
            }
            PrefillAction::Post { ticket } => self.call(Side::Prefill, id, Message::Ticket(ticket)),
            PrefillAction::ReleaseStaged { blocks } => {
                let was_staged = blocks.iter().all(|block| request.staged.remove(block));
                assert!(was_staged, "seed {seed}: staging of {blocks:?} released twice");
            }
            PrefillAction::Withdraw => request.staged.clear(),
            PrefillAction::ReleaseEngine | PrefillAction::CancelEngine => {
                assert!(!request.p_free, "seed {seed}: freed twice");
                assert!(request.staged.is_empty(), "seed {seed}: staging or grants outlive the handoff");
                request.p_free = true;
                // From here on the blocks are somebody else's.
                let held = self.now - request.p_since.unwrap();
                let since_contact = match request.resolved_at {
                    Some(at) => self.now.saturating_duration_since(at),
                    None => Duration::ZERO,
                };
                assert!(
                    since_contact <= self.limits.lease + Duration::from_secs(1),
                    "seed {seed}: blocks held {held:?}, {since_contact:?} after the decode side was through"
                );
            }
            PrefillAction::DeleteAtPeer => self.call(Side::Prefill, id, Message::Delete),
        }
    }

    pub(super) fn decode_action(&mut self, id: HandoffId, action: DecodeAction) {
        let (seed, now) = (self.seed, self.now);
        let (own, peer) = (self.decode.epoch, self.prefill.epoch);
        let request = self.requests.get_mut(&id).unwrap();
        match action {
            DecodeAction::SendWant { from_token } => {
                let to_epoch = peer;
                let want = Want { worker: name(Side::Decode), epoch: own, to_epoch, from_token };
                self.call(Side::Decode, id, Message::Want(want));
            }
            DecodeAction::PollStatus => self.call(Side::Decode, id, Message::Status),
            DecodeAction::Pull(order) => {
                assert_eq!(request.seat, Seat::Reserved, "seed {seed}: read into blocks not held");
                assert!(request.pulls.is_empty(), "seed {seed}: two reads at once");
                self.tally.rereads += u64::from(order.again_after.is_some());
                let pull = order.pull;
                request.pulls.insert(pull, order);
                let stuck = self.dice.permille(self.faults.stuck_read);
                let after = self.dice.micros(if stuck { 2_000_000..9_000_000 } else { 200..60_000 });
                self.at(after, id, Some(Side::Decode), Event::PullDone { pull, aborted: false });
            }
            DecodeAction::AbortPull { pull } => {
                let stuck = self.dice.permille(self.faults.stuck_read);
                let after = self.dice.micros(if stuck { 6_000_000..9_000_000 } else { 10..20_000 });
                self.at(after, id, Some(Side::Decode), Event::PullDone { pull, aborted: true });
            }
            DecodeAction::Imported { upto } => {
                assert_eq!(request.pub_upto, upto, "seed {seed}: not what was verified");
                assert_eq!(request.seat, Seat::Reserved);
            }
            DecodeAction::StartDecode { first, .. } => {
                assert_eq!(request.seat, Seat::Reserved, "seed {seed}: started twice or without blocks");
                assert!(request.pulls.is_empty(), "seed {seed}: a read may still write");
                assert_eq!(request.pub_upto, request.prompt, "seed {seed}: unverified blocks");
                assert_eq!(first, first_of(id));
                request.seat = Seat::Decoding;
                request.resolved_at = Some(now);
            }
            DecodeAction::PrefillLocally { .. } => {
                assert_eq!(request.seat, Seat::Reserved, "seed {seed}: second start");
                assert!(request.pulls.is_empty(), "seed {seed}: a read may still write");
                request.seat = Seat::Prefilling;
                request.resolved_at = Some(now);
            }
            DecodeAction::CancelEngine { writers: Writers::Gone } => {
                assert!(request.pulls.is_empty(), "seed {seed}: freed under a read");
                request.seat = Seat::Free;
                request.resolved_at.get_or_insert(now);
            }
            DecodeAction::CancelEngine { writers: Writers::MayWrite } => {
                assert_eq!(request.seat, Seat::Reserved, "seed {seed}");
                request.seat = Seat::Quarantined;
                request.resolved_at.get_or_insert(now);
            }
            DecodeAction::Fence => {
                assert_eq!(request.seat, Seat::Quarantined, "seed {seed}");
                assert!(request.pulls.is_empty(), "seed {seed}: fenced under a read");
                request.seat = Seat::Free;
                self.tally.fenced += 1;
            }
            DecodeAction::Fail => {
                request.failed = true;
                self.tally.failed += 1;
            }
            DecodeAction::DeleteAtPeer => self.call(Side::Decode, id, Message::Delete),
            DecodeAction::Answer { waiter, answer } => self.answer(waiter, answer),
        }
    }

    /// Nothing will happen any more: nobody may hold anything or wait for anything.
    pub(super) fn check_rest(&self) {
        let seed = self.seed;
        for worker in [&self.prefill, &self.decode].into_iter().filter(|w| w.alive) {
            assert_eq!(worker.desk.prefills(), 0, "seed {seed}: prefill side never ended");
            assert_eq!(worker.desk.decodes(), 0, "seed {seed}: decode side never ended");
            assert_eq!(worker.desk.parked(), 0, "seed {seed}: parked for ever");
        }
        for (id, request) in &self.requests {
            assert!(request.p_free, "seed {seed}: {id} still holds blocks at the prefill side");
            let resolved = !matches!(request.seat, Seat::Queued | Seat::Reserved | Seat::Quarantined);
            assert!(resolved, "seed {seed}: {id} hangs in {:?}", request.seat);
            if let (Some(admitted), Some(resolved)) = (request.admitted_at, request.resolved_at) {
                let took = resolved.saturating_duration_since(admitted);
                assert!(took < Duration::from_secs(40), "seed {seed}: {id} resolved only after {took:?}");
            }
        }
        assert!(self.now - self.start < Duration::from_secs(600), "seed {seed}");
    }
}
