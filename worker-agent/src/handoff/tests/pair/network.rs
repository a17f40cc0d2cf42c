//! The network between the two desks: it loses, repeats and delays.

use super::*;

#[derive(Debug, Clone)]
pub(super) enum Message {
    Ticket(Ticket),
    Want(Want),
    Status,
    Delete,
}

#[derive(Debug, Clone)]
pub(super) enum Reply {
    Ticket(Result<TicketAck, PeerFault>),
    Want(Result<(), PeerFault>),
    Status(Result<HandoffStatus, PeerFault>),
}

impl Pair {
    pub(super) fn call(&mut self, from: Side, id: HandoffId, message: Message) {
        let call = self.next_call;
        self.next_call += 1;
        let epoch = self.worker(from).epoch;
        if let Message::Ticket(ticket) = &message {
            // A post replaces the one before it: its answer is heard by nobody.
            let same = |other: &Message| matches!(other, Message::Ticket(other) if other.seq == ticket.seq);
            self.calls.retain(|_, (side, _, of, other)| *side != from || *of != id || !same(other));
        }
        self.calls.insert(call, (from, epoch, id, message.clone()));
        let to = match from {
            Side::Prefill => Side::Decode,
            Side::Decode => Side::Prefill,
        };
        let timeout = match &message {
            Message::Ticket(_) => Duration::from_secs(20),
            _ => Duration::from_millis(750),
        };
        let unanswered = answer_of(&message, Err(PeerFault::Unreachable));
        if let Some(reply) = unanswered {
            self.at(timeout, id, Some(from), Event::Reply { call, reply });
        }
        let copies = if self.dice.permille(self.faults.loss) {
            0
        } else {
            1 + u32::from(self.dice.permille(self.faults.duplicate))
        };
        for _ in 0..copies {
            let after = self.delay();
            self.at(after, id, None, Event::Deliver { to, call, message: message.clone() });
        }
    }

    pub(super) fn deliver(&mut self, to: Side, call: u64, id: HandoffId, message: Message) {
        let now = self.now;
        let mut out = Vec::new();
        let worker = self.worker(to);
        if !worker.alive {
            if let Some(reply) = answer_of(&message, Err(PeerFault::Refused)) {
                self.send_reply(call, id, reply);
            }
            return;
        }
        match message {
            Message::Ticket(ticket) => worker.desk.ticket(now, id, ticket, Waiter(call), &mut out),
            Message::Want(want) => worker.desk.want(now, id, want, Waiter(call), &mut out),
            Message::Delete => worker.desk.delete(now, id, &mut out),
            Message::Status => {
                let status = worker.desk.status(now, id, &mut out).map_err(fault_of);
                self.send_reply(call, id, Reply::Status(status));
            }
        }
        self.carry_out(to, out);
    }

    fn send_reply(&mut self, call: u64, id: HandoffId, reply: Reply) {
        if self.dice.permille(self.faults.loss) {
            return;
        }
        let after = self.delay();
        self.at(after, id, None, Event::Reply { call, reply });
    }

    pub(super) fn reply(&mut self, call: u64, reply: Reply) {
        let Some((from, epoch, id, message)) = self.calls.remove(&call) else { return };
        let now = self.now;
        let mut out = Vec::new();
        let worker = self.worker(from);
        if !worker.alive || worker.epoch != epoch {
            return;
        }
        match (reply, message) {
            (Reply::Ticket(result), Message::Ticket(ticket)) => {
                let event = PrefillEvent::Answered { seq: ticket.seq, result };
                worker.desk.prefill(now, id, event, &mut out);
            }
            (Reply::Want(result), _) => {
                worker.desk.decode(now, id, DecodeEvent::WantAnswered(result), &mut out)
            }
            (Reply::Status(result), _) => {
                worker.desk.decode(now, id, DecodeEvent::StatusAnswered(result), &mut out);
            }
            (reply, message) => panic!("{reply:?} to {message:?}"),
        }
        self.carry_out(from, out);
    }

    pub(super) fn answer(&mut self, waiter: Waiter, answer: Answer) {
        if matches!(answer, Answer::Stale { .. }) {
            self.tally.stale += 1;
        }
        let Some((_, _, id, message)) = self.calls.get(&waiter.0) else { return };
        let id = *id;
        let result = match answer {
            Answer::Ack(ack) => Ok(Some(ack)),
            Answer::Noted => Ok(None),
            other => Err(fault_of(other)),
        };
        let reply = match message {
            Message::Ticket(_) => Reply::Ticket(result.map(|ack| ack.expect("an ack"))),
            Message::Want(_) => Reply::Want(result.map(|_| ())),
            Message::Status | Message::Delete => panic!("no such waiter"),
        };
        self.send_reply(waiter.0, id, reply);
    }
}

fn fault_of(answer: Answer) -> PeerFault {
    match answer {
        Answer::Stale { .. } => PeerFault::Stale,
        Answer::Unknown => PeerFault::Unknown,
        Answer::Busy => PeerFault::Busy,
        Answer::Ended | Answer::Malformed(_) => PeerFault::Ended,
        Answer::Ack(_) | Answer::Noted => panic!("not a fault"),
    }
}

fn answer_of(message: &Message, fault: Result<std::convert::Infallible, PeerFault>) -> Option<Reply> {
    let Err(fault) = fault;
    match message {
        Message::Ticket(_) => Some(Reply::Ticket(Err(fault))),
        Message::Want(_) => Some(Reply::Want(Err(fault))),
        Message::Status => Some(Reply::Status(Err(fault))),
        Message::Delete => None,
    }
}
