use baton_config::frames::{News, Reader};
use baton_config::protocol::{FinishReason, TokenLogprob};

use super::*;

/// Numbers that depend on a seed alone.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((mixed ^ (mixed >> 31)) % n as u64) as usize
    }
}

/// What a router has of one generation.
#[derive(Debug, Default)]
struct Model {
    pushed: Vec<Out>,
    got: Vec<Out>,
    credit: usize,
    over: bool,
}

impl Model {
    fn tokens(&self) -> usize {
        self.got.iter().filter(|out| matches!(out, Out::Token(_) | Out::Rich(_))).count()
    }
}

fn rich(token: u32) -> Out {
    let logprob = Some(TokenLogprob { logprob: -1.0, top: vec![] });
    Out::Rich(Box::new(GenerateEvent::Token { token, logprob, logits_digest: None }))
}

fn last() -> Out {
    Out::Last(Box::new(GenerateEvent::Finished { reason: FinishReason::Length }))
}

fn report() -> Out {
    let report = serde_json::json!({
        "event": "prefilled", "cached_tokens": 0, "imported_tokens": 0, "imported_bytes": 0, "queue_ms": 0.0,
        "prefill_ms": 0.0, "transfer_tail_ms": 0.0, "fallback": null
    });
    Out::Aside(Box::new(serde_json::from_value(report).unwrap()))
}

/// Takes in what was written, as a router does.
fn read(bytes: &[u8], model: &mut HashMap<StreamId, Model>) {
    let mut reader = Reader::new(0);
    reader.push(bytes);
    while let Some((kind, payload)) = reader.next_frame().unwrap() {
        let mut got = |id: StreamId, out: Out| {
            let one = model.get_mut(&id).expect("only what is open is written");
            assert!(!one.over, "nothing follows the last event");
            one.over = matches!(out, Out::Last(_));
            one.got.push(out);
            assert!(one.tokens() <= one.credit, "no token without credit");
        };
        match News::decode(kind, payload).unwrap() {
            News::Tokens(tokens) => tokens.for_each(|(id, token)| got(id, Out::Token(token))),
            News::Event(id, event) => got(
                id,
                match &event {
                    GenerateEvent::Token { .. } => Out::Rich(Box::new(event)),
                    GenerateEvent::Prefilled(_) => Out::Aside(Box::new(event)),
                    GenerateEvent::Finished { .. } | GenerateEvent::Failed { .. } => {
                        Out::Last(Box::new(event))
                    }
                },
            ),
        }
    }
    assert!(!reader.is_mid_frame());
}

fn run(seed: u64) {
    let mut random = Random(seed);
    let mut streams: Streams<StreamId> = Streams::new();
    let mut model: HashMap<StreamId, Model> = HashMap::new();
    let mut cancelled = HashMap::new();
    let now = Instant::now();
    let (mut next, mut ended) = (0, Vec::new());
    for _ in 0..400 {
        let id = StreamId(random.below(next as usize + 1) as u32);
        match random.below(10) {
            0 => {
                let credit = random.below(20);
                let id = StreamId(next);
                next += 1;
                let reading = if random.below(2) == 0 { Reading::Each } else { Reading::Together };
                streams.open(id, credit as u32, reading, id).unwrap();
                model.insert(id, Model { credit, ..Model::default() });
            }
            1 => {
                let credit = random.below(20);
                streams.credit(id, credit as u32).unwrap();
                if let Some(one) = model.get_mut(&id) {
                    one.credit += credit;
                }
            }
            2 if random.below(4) == 0 => {
                if let Some(kept) = streams.remove(id) {
                    assert_eq!(kept, id);
                    cancelled.insert(id, model.remove(&id).unwrap());
                }
            }
            3..=6 => {
                let Some(one) = model.get_mut(&id) else { continue };
                if matches!(one.pushed.last(), Some(Out::Last(_))) {
                    continue;
                }
                for i in 0..random.below(8) {
                    let out = match random.below(40) {
                        0 => last(),
                        1 => report(),
                        2 => rich(i as u32),
                        _ => Out::Token(random.below(1000) as u32),
                    };
                    one.pushed.push(out.clone());
                    streams.push(id, out);
                    if matches!(one.pushed.last(), Some(Out::Last(_))) {
                        break;
                    }
                }
            }
            7 => streams.release(),
            _ => {
                let mut out = Vec::new();
                streams.write(now, &mut out, 1 + random.below(200), &mut ended);
                read(&out, &mut model);
            }
        }
    }
    // With credit for everything, everything arrives, in order.
    let open: Vec<StreamId> = streams.ids();
    for id in open {
        streams.credit(id, 10_000).unwrap();
        model.get_mut(&id).unwrap().credit += 10_000;
    }
    streams.release();
    assert!(!streams.is_holding());
    let mut out = Vec::new();
    streams.write(now, &mut out, usize::MAX, &mut ended);
    read(&out, &mut model);
    for (id, one) in &model {
        assert_eq!(one.got, one.pushed, "stream {}", id.0);
        assert_eq!(one.over, ended.contains(id));
    }
    assert!(cancelled.keys().all(|id| !ended.contains(id)), "what was given up does not end");
    let mut once = ended.clone();
    once.sort();
    once.dedup();
    assert_eq!(once.len(), ended.len(), "each ends once");
    assert_eq!(streams.ids().len(), model.values().filter(|one| !one.over).count());
}

#[test]
fn any_course_of_events_sends_each_stream_in_order_within_its_credit() {
    for seed in 0..300 {
        if let Err(panic) = std::panic::catch_unwind(|| run(seed)) {
            eprintln!("seed {seed}");
            std::panic::resume_unwind(panic);
        }
    }
}

#[test]
fn one_without_credit_holds_up_nobody_and_is_found_later() {
    let mut streams: Streams<()> = Streams::new();
    let begun = Instant::now();
    streams.open(StreamId(1), 0, Reading::Each, ()).unwrap();
    streams.open(StreamId(2), 10, Reading::Each, ()).unwrap();
    streams.push(StreamId(1), Out::Token(5));
    streams.push(StreamId(2), Out::Token(6));
    let (mut out, mut ended) = (Vec::new(), Vec::new());
    streams.write(begun, &mut out, 1000, &mut ended);
    let mut model = HashMap::from([(StreamId(2), Model { credit: 10, ..Model::default() })]);
    read(&out, &mut model);
    assert_eq!(model[&StreamId(2)].got, [Out::Token(6)]);
    let minute = Duration::from_secs(60);
    assert_eq!(streams.blocked_for(begun + minute / 2, minute), []);
    assert_eq!(streams.blocked_for(begun + minute, minute), [StreamId(1)]);
    streams.credit(StreamId(1), 1).unwrap();
    assert_eq!(streams.blocked_for(begun + minute, minute), [], "it is taken up again");
}

#[test]
fn an_engine_that_is_told_to_stop_leaves_little_here_and_all_of_it_arrives() {
    for (what, credit, at_once) in [(Out::Token(7), 1024, 1), (Out::Token(7), 1, 1), (rich(7), 64, 5)] {
        let mut streams: Streams<()> = Streams::new();
        let (id, now) = (StreamId(1), Instant::now());
        streams.open(id, credit, Reading::Each, ()).unwrap();
        let mut model = HashMap::from([(id, Model { credit: credit as usize, ..Model::default() })]);
        let (mut runs, mut pauses, mut pushed, mut most) = (true, 0, 0, 0);
        let (mut out, mut ended) = (Vec::new(), Vec::new());
        for step in 0..40_000 {
            if runs {
                (0..at_once).for_each(|_| streams.push(id, what.clone()));
                pushed += at_once;
            }
            out.clear();
            streams.write(now, &mut out, 1 << 20, &mut ended);
            read(&out, &mut model);
            let waiting = pushed - model[&id].got.len();
            most = most.max(waiting);
            for pace in streams.take_paces() {
                assert_eq!(pace, if runs { Pace::Pause(id) } else { Pace::Resume(id) }, "in turns");
                assert_eq!(runs, waiting * what.weight() >= FULL);
                runs = !runs;
                pauses += usize::from(!runs);
            }
            // A reader that is four times slower than the engine, and rests for long in between.
            if step % 16 == 0 && step % 10_000 > 5_000 {
                streams.credit(id, 4).unwrap();
                model.get_mut(&id).unwrap().credit += 4;
            }
        }
        assert!(pauses > 2, "{pauses} pauses");
        assert!(most < FULL / what.weight() + at_once, "{most} waited");
        streams.credit(id, 10_000).unwrap();
        model.get_mut(&id).unwrap().credit += 10_000;
        out.clear();
        streams.write(now, &mut out, usize::MAX, &mut ended);
        read(&out, &mut model);
        assert_eq!(model[&id].got, vec![what; pushed]);
        assert_eq!(streams.take_paces().len(), usize::from(!runs));
    }
}

#[test]
fn tokens_that_nobody_reads_yet_wait_for_each_other_but_not_the_first_nor_the_end() {
    let mut streams: Streams<()> = Streams::new();
    let id = StreamId(1);
    streams.open(id, 1000, Reading::Together, ()).unwrap();
    let written = |streams: &mut Streams<()>| {
        let (mut out, mut ended) = (Vec::new(), Vec::new());
        streams.write(Instant::now(), &mut out, usize::MAX, &mut ended);
        let mut model = HashMap::from([(id, Model { credit: 1000, ..Model::default() })]);
        read(&out, &mut model);
        model.remove(&id).unwrap().got.len()
    };
    streams.push(id, report());
    streams.push(id, Out::Token(0));
    assert_eq!((written(&mut streams), streams.is_holding()), (2, false), "the first");
    streams.push(id, Out::Token(1));
    streams.push(id, Out::Token(2));
    assert_eq!((written(&mut streams), streams.is_holding()), (0, true));
    streams.release();
    assert_eq!((written(&mut streams), streams.is_holding()), (2, false));
    for token in 0..HELD_TOKENS as u32 {
        assert_eq!(written(&mut streams), 0);
        streams.push(id, Out::Token(token));
    }
    assert_eq!(written(&mut streams), HELD_TOKENS, "no more of them wait");
    streams.push(id, Out::Token(3));
    streams.push(id, last());
    assert_eq!(written(&mut streams), 2, "the end takes them along");
    streams.release();
    assert_eq!(written(&mut streams), 0);
}

#[test]
fn what_a_router_must_not_do_is_refused() {
    let mut streams: Streams<()> = Streams::new();
    streams.open(StreamId(1), CREDIT_MAX, Reading::Each, ()).unwrap();
    assert_eq!(streams.open(StreamId(1), 1, Reading::Each, ()), Err(Breach::Twice(StreamId(1))));
    assert_eq!(streams.credit(StreamId(1), 1), Err(Breach::Credit(StreamId(1))));
    assert_eq!(
        streams.open(StreamId(2), CREDIT_MAX + 1, Reading::Each, ()),
        Err(Breach::Credit(StreamId(2)))
    );
    assert_eq!(streams.credit(StreamId(9), u32::MAX), Ok(()), "it has ended");
}
