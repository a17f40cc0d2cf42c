use proptest::prelude::*;

use super::*;
use crate::protocol::{FailureCode, FinishReason, Sampling, TokenLogprob};

fn request(tokens: Vec<u32>) -> GenerateRequest {
    GenerateRequest {
        request_id: "r-0".to_owned(),
        tokens,
        generated: 1,
        max_tokens: 7,
        sampling: Sampling { stop_tokens: vec![5], logprobs: Some(2), ..Sampling::default() },
        cache_salt: u64::MAX,
        logits_digest: true,
        whole: true,
        handoff: None,
    }
}

/// What a worker reads of the bytes.
fn commands(bytes: &[u8], piece: usize) -> Vec<(Command<'static>, Option<GenerateRequest>)> {
    let mut reader = Reader::new(1 << 20);
    let mut out = Vec::new();
    for piece in bytes.chunks(piece) {
        reader.push(piece);
        while let Some((kind, payload)) = reader.next_frame().unwrap() {
            out.push(match Command::decode(kind, payload).unwrap() {
                Command::Open(open) => {
                    let kept = Open { json: &[], tokens: &[], ..open };
                    (Command::Open(kept), Some(open.request().unwrap()))
                }
                Command::Cancel(id) => (Command::Cancel(id), None),
                Command::Credit(id, tokens) => (Command::Credit(id, tokens), None),
            });
        }
    }
    assert!(!reader.is_mid_frame());
    out
}

#[test]
fn commands_arrive_as_they_were_sent_however_they_are_cut() {
    let mut bytes = Vec::new();
    let long = request((0..40_000).collect());
    open(&mut bytes, StreamId(1), 64, &request(vec![])).unwrap();
    credit(&mut bytes, StreamId(1), 32);
    open(&mut bytes, StreamId(u32::MAX), 0, &long).unwrap();
    cancel(&mut bytes, StreamId(1));
    for piece in [1, 7, 4096, usize::MAX] {
        let got = commands(&bytes, piece.min(bytes.len()));
        let opened = |id, credit| Command::Open(Open { id: StreamId(id), credit, json: &[], tokens: &[] });
        assert_eq!(
            got,
            [
                (opened(1, 64), Some(request(vec![]))),
                (Command::Credit(StreamId(1), 32), None),
                (opened(u32::MAX, 0), Some(long.clone())),
                (Command::Cancel(StreamId(1)), None),
            ]
        );
    }
}

#[test]
fn news_arrives_as_it_was_sent() {
    let logprob = TokenLogprob { logprob: -0.5, top: vec![(1, -0.5)] };
    let rich = GenerateEvent::Token { token: 9, logprob: Some(logprob), logits_digest: Some(u64::MAX) };
    let finished = GenerateEvent::Finished { reason: FinishReason::Stop };
    let failed = GenerateEvent::Failed { code: FailureCode::Engine, message: "a \"b\"\n".to_owned() };
    let mut bytes = Vec::new();
    let mut frame = TokenFrame::default();
    // More than fit into one frame.
    for i in 0..10_000 {
        frame.push(&mut bytes, StreamId(i % 7), i);
    }
    frame.close(&mut bytes);
    for news in [&rich, &finished, &failed] {
        event(&mut bytes, StreamId(3), news).unwrap();
    }
    let mut reader = Reader::new(0);
    let (mut tokens, mut events) = (Vec::new(), Vec::new());
    for piece in bytes.chunks(1000) {
        reader.push(piece);
        while let Some((kind, payload)) = reader.next_frame().unwrap() {
            match News::decode(kind, payload).unwrap() {
                News::Tokens(some) => tokens.extend(some),
                News::Event(id, event) => events.push((id, event)),
            }
        }
    }
    assert_eq!(tokens, (0..10_000).map(|i| (StreamId(i % 7), i)).collect::<Vec<_>>());
    assert_eq!(events, [rich, finished, failed].map(|event| (StreamId(3), event)));
}

#[test]
fn frames_that_are_too_long_are_refused_by_their_head() {
    let mut reader = Reader::new(100);
    reader.push(&[101, 0, 0, 0, OPEN]);
    assert_eq!(reader.next_frame(), Err(FrameError::TooLong { bytes: 101, max: 100 }));
    let mut reader = Reader::new(100);
    reader.push(&[255, 255, 255, 255, TOKENS]);
    assert!(matches!(reader.next_frame(), Err(FrameError::TooLong { .. })));
    assert!(reader.room_bytes() <= 2 * PAYLOAD_MAX_BYTES, "nothing is allocated for what was announced");
}

#[test]
fn each_side_refuses_the_frames_of_its_own() {
    assert_eq!(Command::decode(TOKENS, &[]), Err(FrameError::Kind(TOKENS)));
    assert_eq!(News::decode(OPEN, &[]), Err(FrameError::Kind(OPEN)));
    for (kind, payload) in [(OPEN, &[0; 11][..]), (CANCEL, &[0; 5]), (CREDIT, &[0; 7])] {
        assert!(matches!(Command::decode(kind, payload), Err(FrameError::Malformed { .. })), "{kind}");
    }
    for (kind, payload) in [(TOKENS, &[0; 9][..]), (EVENT, &[0; 3])] {
        assert!(matches!(News::decode(kind, payload), Err(FrameError::Malformed { .. })), "{kind}");
    }
    // Lengths within the payload that reach beyond it, and tokens that are cut.
    let mut lying = vec![0; 12];
    lying[8] = 200;
    assert!(Command::decode(OPEN, &lying).is_err());
    lying[8] = 1;
    lying.extend([b'{', 0, 0, 0]);
    assert!(Command::decode(OPEN, &lying).is_err());
}

proptest! {
    /// Whatever comes: frames or an error, no panic, and no more memory than came.
    #[test]
    fn any_bytes_are_read_or_refused(pieces in proptest::collection::vec(any::<Vec<u8>>(), 0..20)) {
        let mut reader = Reader::new(4096);
        let total: usize = pieces.iter().map(Vec::len).sum();
        'pieces: for piece in &pieces {
            reader.push(piece);
            loop {
                match reader.next_frame() {
                    Ok(Some((kind, payload))) => {
                        prop_assert!(payload.len() <= total);
                        if let Ok(Command::Open(open)) = Command::decode(kind, payload) {
                            let _ = open.request();
                        }
                        if let Ok(News::Tokens(tokens)) = News::decode(kind, payload) {
                            prop_assert_eq!(tokens.count(), payload.len() / 8);
                        }
                    }
                    Ok(None) => break,
                    Err(_) => break 'pieces,
                }
            }
        }
        prop_assert!(reader.room_bytes() <= 2 * (total + READ_ROOM));
    }

    /// The same with heads that are right, so that payloads are looked at.
    #[test]
    fn any_payload_is_read_or_refused(kind in prop_oneof![1u8..=3, 16u8..=17], payload in any::<Vec<u8>>()) {
        let mut reader = Reader::new(4096);
        let length = u32::try_from(payload.len()).unwrap();
        reader.push(&length.to_le_bytes());
        reader.push(&[kind]);
        reader.push(&payload);
        let (got, bytes) = reader.next_frame().unwrap().unwrap();
        prop_assert_eq!((got, bytes), (kind, &payload[..]));
        if let Ok(Command::Open(open)) = Command::decode(kind, bytes) {
            let _ = open.request();
        }
        let _ = News::decode(kind, bytes);
    }
}

/// What a reader has besides what came.
const READ_ROOM: usize = 64 << 10;
