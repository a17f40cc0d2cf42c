//! Crashes, restarts and new epochs.

use super::*;

impl Pair {
    pub(super) fn crash(&mut self, side: Side) {
        if !self.worker(side).alive {
            return;
        }
        self.worker(side).alive = false;
        for request in self.requests.values_mut() {
            match side {
                Side::Prefill => {
                    request.p_free = true;
                    request.staged.clear();
                }
                Side::Decode => {
                    request.seat = Seat::Free;
                    request.pulls.clear();
                    request.d_open = None;
                }
            }
        }
        let after = self.dice.micros(100_000..4_000_000);
        self.at(after, HandoffId(0), None, Event::Restart(side));
        let other = match side {
            Side::Prefill => Side::Decode,
            Side::Decode => Side::Prefill,
        };
        // The lease of the dead life ends some time after it.
        let after = self.dice.micros(500_000..12_000_000);
        self.at(after, HandoffId(0), None, Event::View { at: other, peer: None });
    }

    pub(super) fn restart(&mut self, side: Side) {
        let epoch = Epoch(self.next_epoch);
        self.next_epoch += 1;
        let now = self.now;
        let limits = self.limits.clone();
        let worker = self.worker(side);
        worker.epoch = epoch;
        worker.alive = true;
        worker.desk = Desk::new(name(side), limits);
        worker.desk.set_epoch(now, epoch, &mut Vec::new());
        let other = match side {
            Side::Prefill => Side::Decode,
            Side::Decode => Side::Prefill,
        };
        let after = self.dice.micros(1_000..300_000);
        self.at(after, HandoffId(0), None, Event::View { at: other, peer: Some(epoch) });
    }

    /// A new life of a process that goes on: everything between the two sides is void, nothing in it is lost.
    pub(super) fn rejoin(&mut self, side: Side) {
        let epoch = Epoch(self.next_epoch);
        let now = self.now;
        if !self.worker(side).alive {
            return;
        }
        self.next_epoch += 1;
        let before = self.worker(side).epoch;
        self.worker(side).epoch = epoch;
        for scheduled in self.events.values_mut().filter(|s| s.life == Some((side, before))) {
            scheduled.life = Some((side, epoch));
        }
        for call in self.calls.values_mut().filter(|call| (call.0, call.1) == (side, before)) {
            call.1 = epoch;
        }
        for request in self.requests.values_mut() {
            let open = match side {
                Side::Prefill => &mut request.p_open,
                Side::Decode => &mut request.d_open,
            };
            if *open == Some(before) {
                *open = Some(epoch);
            }
        }
        let mut out = Vec::new();
        self.worker(side).desk.set_epoch(now, epoch, &mut out);
        self.carry_out(side, out);
        let other = match side {
            Side::Prefill => Side::Decode,
            Side::Decode => Side::Prefill,
        };
        let after = self.dice.micros(1_000..300_000);
        self.at(after, HandoffId(0), None, Event::View { at: other, peer: Some(epoch) });
    }
}
