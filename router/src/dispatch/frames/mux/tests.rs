use std::sync::atomic::AtomicUsize;
use std::task::Wake;

use baton_config::frames::{Command, Reader, TokenFrame};
use baton_config::protocol::{FailureCode, FinishReason, Sampling};
use proptest::prelude::*;

use super::*;

/// Counts how often it is woken.
#[derive(Default)]
struct Alarm(AtomicUsize);

impl Wake for Alarm {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl Alarm {
    fn rung(&self) -> usize {
        self.0.swap(0, Ordering::SeqCst)
    }
}

fn link() -> Arc<Link> {
    Arc::new(Link(Arc::new(Mux::new())))
}

fn request() -> GenerateRequest {
    GenerateRequest {
        request_id: "r".to_owned(),
        tokens: vec![1, 2, 3],
        generated: 0,
        max_tokens: 5,
        sampling: Sampling::default(),
        cache_salt: 0,
        logits_digest: false,
        whole: false,
        handoff: None,
    }
}

/// What was said to the worker since the last time.
#[derive(Debug, PartialEq)]
enum Said {
    Open(StreamId, u32),
    Cancel(StreamId),
    Credit(StreamId, u32),
}

fn said(link: &Link) -> Vec<Said> {
    let mut bytes = Vec::new();
    link.0.take_unsent(&mut bytes);
    let mut reader = Reader::new(1 << 20);
    reader.push(&bytes);
    let mut said = Vec::new();
    while let Some((kind, payload)) = reader.next_frame().unwrap() {
        said.push(match Command::decode(kind, payload).unwrap() {
            Command::Open(open) => {
                assert_eq!(open.request().unwrap().tokens, request().tokens);
                Said::Open(open.id, open.credit)
            }
            Command::Cancel(id) => Said::Cancel(id),
            Command::Credit(id, tokens) => Said::Credit(id, tokens),
        });
    }
    said
}

fn tokens(tokens: &[(u32, u32)]) -> Vec<u8> {
    let (mut out, mut frame) = (Vec::new(), TokenFrame::default());
    for (id, token) in tokens {
        frame.push(&mut out, StreamId(*id), *token);
    }
    frame.close(&mut out);
    out
}

fn event(id: u32, event: &GenerateEvent) -> Vec<u8> {
    let mut out = Vec::new();
    frames::event(&mut out, StreamId(id), event).unwrap();
    out
}

/// Takes in bytes as the carrier does.
fn hear(link: &Link, bytes: &[u8], due: &mut Due) -> Result<(), Breach> {
    let mut reader = Reader::new(0);
    reader.push(bytes);
    while let Some((kind, payload)) = reader.next_frame()? {
        link.0.receive(kind, payload, due)?;
    }
    due.wake_now();
    Ok(())
}

fn poll(stream: &mut Stream, alarm: &Arc<Alarm>) -> Poll<Result<Item, Lost>> {
    let waker = Waker::from(Arc::clone(alarm));
    stream.poll_next(&mut Context::from_waker(&waker))
}

fn token(poll: Poll<Result<Item, Lost>>) -> u32 {
    match poll {
        Poll::Ready(Ok(Item::Token(token))) => token,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_first_token_wakes_at_once_and_the_next_ones_together() {
    let (link, alarm, mut due) = (link(), Arc::new(Alarm::default()), Due::default());
    let mut stream = Stream::open(&link, &request()).unwrap();
    assert_eq!(said(&link), [Said::Open(StreamId(0), WINDOW)]);
    assert!(poll(&mut stream, &alarm).is_pending());
    hear(&link, &tokens(&[(0, 7)]), &mut due).unwrap();
    assert_eq!((alarm.rung(), due.is_later()), (1, false), "the first");
    assert_eq!(token(poll(&mut stream, &alarm)), 7);
    assert!(poll(&mut stream, &alarm).is_pending());
    for next in 8..11 {
        hear(&link, &tokens(&[(0, next)]), &mut due).unwrap();
        assert_eq!((alarm.rung(), due.is_later()), (0, true));
    }
    due.wake_later();
    assert_eq!(alarm.rung(), 1, "one wake-up for three tokens");
    assert_eq!([8, 9, 10].map(|_| token(poll(&mut stream, &alarm))), [8, 9, 10]);
    assert!(poll(&mut stream, &alarm).is_pending());
    hear(&link, &tokens(&[(0, 11)]), &mut due).unwrap();
    hear(&link, &event(0, &GenerateEvent::Finished { reason: FinishReason::Stop }), &mut due).unwrap();
    assert_eq!(alarm.rung(), 1, "an end does not wait");
    assert_eq!(token(poll(&mut stream, &alarm)), 11);
    assert!(matches!(poll(&mut stream, &alarm), Poll::Ready(Ok(Item::Event(_)))));
    drop(stream);
    assert_eq!(said(&link), [], "what has ended is not cancelled");
}

#[test]
fn who_waits_for_the_end_is_woken_for_the_first_token_and_the_end_but_before_the_credit_is_used_up() {
    let (link, alarm, mut due) = (link(), Arc::new(Alarm::default()), Due::default());
    let whole = GenerateRequest { whole: true, ..request() };
    let mut stream = Stream::open(&link, &whole).unwrap();
    assert!(poll(&mut stream, &alarm).is_pending());
    hear(&link, &tokens(&[(0, 7)]), &mut due).unwrap();
    assert_eq!(alarm.rung(), 1, "the first");
    assert_eq!(token(poll(&mut stream, &alarm)), 7);
    assert!(poll(&mut stream, &alarm).is_pending());
    for next in 0..WHOLE_BACKLOG as u32 {
        hear(&link, &tokens(&[(0, next)]), &mut due).unwrap();
        assert_eq!((alarm.rung(), due.is_later()), (0, false), "token {next}");
    }
    hear(&link, &tokens(&[(0, 9)]), &mut due).unwrap();
    assert_eq!(alarm.rung(), 1, "so many do not wait");
    while let Poll::Ready(Ok(_)) = poll(&mut stream, &alarm) {}
    hear(&link, &tokens(&[(0, 9)]), &mut due).unwrap();
    assert_eq!(alarm.rung(), 0);
    hear(&link, &event(0, &GenerateEvent::Finished { reason: FinishReason::Stop }), &mut due).unwrap();
    assert_eq!(alarm.rung(), 1, "an end does not wait");
}

#[test]
fn a_worker_that_takes_nothing_is_given_no_more_requests() {
    let link = link();
    let large = GenerateRequest { tokens: vec![1; UNSENT_MAX_BYTES / 4], ..request() };
    let _first = Stream::open(&link, &large).unwrap();
    assert!(matches!(Stream::open(&link, &request()), Err(Lost::Overloaded)));
    assert_eq!(link.0.table().slots.len(), 1, "nothing is kept of what was turned away");
    link.0.take_unsent(&mut Vec::new());
    assert!(Stream::open(&link, &request()).is_ok(), "it takes something again");
}

#[test]
fn a_connection_whose_numbers_are_used_up_is_left_to_those_on_it() {
    let (link, alarm, mut due) = (link(), Arc::new(Alarm::default()), Due::default());
    let last = u32::MAX - 1;
    link.0.table().next = last;
    let mut stream = Stream::open(&link, &request()).unwrap();
    assert!(!link.0.is_over());
    assert!(matches!(Stream::open(&link, &request()), Err(Lost::Overloaded)));
    assert!(link.0.is_over(), "the next one gets another connection");
    hear(&link, &tokens(&[(last, 7)]), &mut due).unwrap();
    assert_eq!(token(poll(&mut stream, &alarm)), 7);
}

#[test]
fn a_tick_wakes_those_to_whom_nothing_came_and_is_seen_by_all() {
    let (link, alarm, mut due) = (link(), Arc::new(Alarm::default()), Due::default());
    assert!(!link.0.tick(), "nobody is there");
    let mut streams: Vec<Stream> = (0..2).map(|_| Stream::open(&link, &request()).unwrap()).collect();
    for stream in &mut streams {
        assert!(poll(stream, &alarm).is_pending() && !stream.take_tick());
    }
    hear(&link, &tokens(&[(0, 7)]), &mut due).unwrap();
    assert_eq!(token(poll(&mut streams[0], &alarm)), 7);
    assert!(poll(&mut streams[0], &alarm).is_pending());
    alarm.rung();
    assert!(link.0.tick());
    assert_eq!(alarm.rung(), 1, "the one that is quiet");
    for stream in &mut streams {
        assert!(poll(stream, &alarm).is_pending() && stream.take_tick() && !stream.take_tick());
    }
    assert!(link.0.tick());
    assert_eq!(alarm.rung(), 2, "both are quiet now");
}

#[test]
fn who_does_not_read_gives_no_credit_and_who_reads_does() {
    let (link, alarm, mut due) = (link(), Arc::new(Alarm::default()), Due::default());
    let (mut reads, mut sleeps) =
        (Stream::open(&link, &request()).unwrap(), Stream::open(&link, &request()).unwrap());
    said(&link);
    for n in 0..WINDOW {
        hear(&link, &tokens(&[(0, n), (1, n)]), &mut due).unwrap();
        assert_eq!(token(poll(&mut reads, &alarm)), n);
    }
    let half = WINDOW / 2;
    assert_eq!(said(&link), [Said::Credit(StreamId(0), half), Said::Credit(StreamId(0), half)]);
    hear(&link, &tokens(&[(0, 1)]), &mut due).unwrap();
    let over = hear(&link, &tokens(&[(1, 1)]), &mut due);
    assert!(matches!(over, Err(Breach::Credit(StreamId(1)))), "more than it was allowed");
    // Even so nothing is lost of what came before.
    assert_eq!(token(poll(&mut sleeps, &alarm)), 0);
}

#[test]
fn fewer_tokens_are_under_way_where_each_carries_much() {
    let plain = request();
    let digests = GenerateRequest { logits_digest: true, ..request() };
    let mut logprobs = request();
    logprobs.sampling.logprobs = Some(20);
    for (asked, window) in [(plain, WINDOW), (digests, RICH_WINDOW), (logprobs, RICH_WINDOW)] {
        let link = link();
        let _stream = Stream::open(&link, &asked).unwrap();
        assert_eq!(said(&link), [Said::Open(StreamId(0), window)]);
    }
}

#[test]
fn who_leaves_is_cancelled_and_what_still_comes_means_nothing() {
    let (link, mut due) = (link(), Due::default());
    let stream = Stream::open(&link, &request()).unwrap();
    said(&link);
    drop(stream);
    assert_eq!(said(&link), [Said::Cancel(StreamId(0))]);
    hear(&link, &tokens(&[(0, 1), (77, 2)]), &mut due).unwrap();
    hear(&link, &event(0, &GenerateEvent::Finished { reason: FinishReason::Stop }), &mut due).unwrap();
}

#[test]
fn the_end_of_the_connection_is_the_end_of_all_after_what_came() {
    let (link, alarm, mut due) = (link(), Arc::new(Alarm::default()), Due::default());
    let mut streams: Vec<Stream> = (0..3).map(|_| Stream::open(&link, &request()).unwrap()).collect();
    for stream in &mut streams {
        assert!(poll(stream, &alarm).is_pending());
    }
    hear(&link, &tokens(&[(1, 9)]), &mut due).unwrap();
    alarm.rung();
    link.0.end(&Lost::Broken("as told".to_owned()));
    assert_eq!(alarm.rung(), 2, "those who wait hear of it");
    assert_eq!(token(poll(&mut streams[1], &alarm)), 9);
    for stream in &mut streams {
        assert!(matches!(poll(stream, &alarm), Poll::Ready(Err(Lost::Broken(_)))));
    }
    assert!(link.0.is_over() && Stream::open(&link, &request()).is_err());
    let mux = Arc::clone(&link.0);
    drop(streams);
    assert!(!mux.is_abandoned());
    drop(link);
    assert!(mux.is_abandoned(), "nobody has it any more");
}

#[test]
fn events_without_credit_are_bounded_too() {
    let (link, mut due) = (link(), Due::default());
    let _stream = Stream::open(&link, &request()).unwrap();
    let report = r#"{"event":"prefilled","cached_tokens":0,"imported_tokens":0,"imported_bytes":0,
        "queue_ms":0.0,"prefill_ms":0.0,"transfer_tail_ms":0.0,"fallback":null}"#;
    let frame = event(0, &serde_json::from_str(report).unwrap());
    let refused = (0..WINDOW as usize + 20).find_map(|_| hear(&link, &frame, &mut due).err());
    assert!(matches!(refused, Some(Breach::Credit(_))));
}

/// One thing that happens to a connection.
#[derive(Debug, Clone)]
enum Act {
    Open,
    /// So many tokens for the stream, if it is open and allowed them.
    Tokens(usize, u32),
    Finish(usize),
    Fail(usize),
    Read(usize, u32),
    Leave(usize),
    WakeLater,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        2 => Just(Act::Open),
        8 => (0..6usize, 1..300u32).prop_map(|(at, n)| Act::Tokens(at, n)),
        1 => (0..6usize).prop_map(Act::Finish),
        1 => (0..6usize).prop_map(Act::Fail),
        8 => (0..6usize, 1..400u32).prop_map(|(at, n)| Act::Read(at, n)),
        1 => (0..6usize).prop_map(Act::Leave),
        2 => Just(Act::WakeLater),
    ]
}

/// A stream and what a worker that keeps to the rules knows of it.
struct Known {
    stream: Stream,
    id: u32,
    alarm: Arc<Alarm>,
    credit: u32,
    sent: Vec<u32>,
    read: Vec<u32>,
    over: bool,
    /// It waits to be woken.
    waits: bool,
}

proptest! {
    /// Against a worker that keeps to the rules nothing is refused, lost or reordered, and nobody sleeps on what came.
    #[test]
    fn any_course_of_events_brings_every_token_once(acts in proptest::collection::vec(act(), 1..120)) {
        let (link, mut due) = (link(), Due::default());
        let mut open: Vec<Known> = Vec::new();
        let mut next = 0;
        for act in acts {
            match act {
                Act::Open => {
                    let stream = Stream::open(&link, &request()).unwrap();
                    open.push(Known {
                        stream, id: next, alarm: Arc::default(), credit: 0, sent: vec![], read: vec![],
                        over: false, waits: false,
                    });
                    next += 1;
                }
                Act::Tokens(at, n) => {
                    let Some(one) = open.get_mut(at).filter(|one| !one.over) else { continue };
                    let some: Vec<(u32, u32)> = (0..n.min(one.credit)).map(|i| (one.id, i)).collect();
                    one.credit -= u32::try_from(some.len()).unwrap();
                    one.sent.extend(some.iter().map(|(_, token)| *token));
                    hear(&link, &tokens(&some), &mut due).unwrap();
                }
                Act::Finish(at) | Act::Fail(at) => {
                    let Some(one) = open.get_mut(at).filter(|one| !one.over) else { continue };
                    one.over = true;
                    let last = match act {
                        Act::Fail(_) => GenerateEvent::Failed { code: FailureCode::Engine, message: String::new() },
                        _ => GenerateEvent::Finished { reason: FinishReason::Stop },
                    };
                    hear(&link, &event(one.id, &last), &mut due).unwrap();
                    prop_assert!(!one.waits || one.alarm.rung() > 0, "an end wakes at once");
                    one.waits = false;
                }
                Act::Read(at, n) => {
                    let Some(one) = open.get_mut(at) else { continue };
                    one.waits = false;
                    for _ in 0..n {
                        match poll(&mut one.stream, &one.alarm) {
                            Poll::Ready(Ok(Item::Token(token))) => one.read.push(token),
                            Poll::Ready(Ok(Item::Event(_))) => {
                                prop_assert!(one.over);
                                break;
                            }
                            Poll::Ready(Err(lost)) => prop_assert!(false, "{lost}"),
                            Poll::Pending => {
                                one.alarm.rung();
                                one.waits = !one.over;
                                break;
                            }
                        }
                    }
                    prop_assert!(one.sent.starts_with(&one.read));
                }
                Act::Leave(at) => if at < open.len() {
                    drop(open.remove(at));
                },
                Act::WakeLater => {
                    due.wake_later();
                    for one in open.iter_mut().filter(|one| one.waits && one.read.len() < one.sent.len()) {
                        prop_assert!(one.alarm.rung() > 0, "who waits is woken");
                        one.waits = false;
                    }
                }
            }
            for said in said(&link) {
                match said {
                    Said::Open(id, credit) | Said::Credit(id, credit) => {
                        if let Some(one) = open.iter_mut().find(|one| one.id == id.0) {
                            one.credit += credit;
                        }
                    }
                    Said::Cancel(id) => prop_assert!(open.iter().all(|one| one.id != id.0)),
                }
            }
        }
        for one in &mut open {
            while let Poll::Ready(Ok(Item::Token(token))) = poll(&mut one.stream, &one.alarm) {
                one.read.push(token);
            }
            prop_assert_eq!(&one.read, &one.sent);
        }
    }
}
