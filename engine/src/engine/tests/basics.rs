use std::time::{Duration, Instant};

use baton_config::prefix::block_hashes;
use baton_config::protocol::{BlockCounts, FinishReason, FirstToken, Sampling};

use super::harness::*;
use crate::engine::*;
use crate::executor::{BatchItem, ExecuteError, Executor, Forward, ModelInfo};
use crate::sampler::SampleError;
use crate::sim::{Sim, SimConfig, oracle};

fn prompt(len: u32) -> Vec<u32> {
    (0..len).map(|i| (i * 13 + i * i) % 60).collect()
}

#[test]
fn a_sequence_is_admitted_prefilled_in_chunks_decoded_and_forgotten() {
    let limits = EngineLimits { prefill_chunk_tokens: 4, ..WIDE.limits };
    let mut engine = Shape { limits, ..WIDE }.engine();
    let (id, start) = (SeqId(9), Instant::now());
    engine.submit(id, spec(prompt(10), 3), start).unwrap();
    let load = EngineLoad { waiting: 1, prefill_tokens_pending: 10, ..EngineLoad::default() };
    assert_eq!(engine.load(), load);
    let mut events = Vec::new();
    let step = engine.step(start + Duration::from_millis(5), &mut events);
    assert!(matches!(step, Step::Worked { modelled } if modelled > Duration::ZERO));
    let load = EngineLoad { running: 1, prefill_tokens_pending: 6, ..EngineLoad::default() };
    assert_eq!(engine.load(), load);
    let counts = BlockCounts { free: 253, shared: 1, reserved: 2, ..BlockCounts::default() };
    assert_eq!(engine.counts(), counts);
    events.extend(run_events(&mut engine));
    let expected = oracle(&config(), &model(), &prompt(10), 3);
    let [Admitted { cached_tokens: 0, blocks, queued, .. }, rest @ ..] = &events[..] else {
        panic!("{events:?}")
    };
    use EngineEvent::*;
    assert_eq!((blocks.len(), *queued), (3, Duration::from_millis(5)));
    let prefilled: Vec<u32> = rest
        .iter()
        .filter_map(|event| if let Prefilled { upto, .. } = event { Some(*upto) } else { None })
        .collect();
    assert_eq!(prefilled, [4, 8, 10]);
    let tokens: Vec<u32> = rest
        .iter()
        .filter_map(|event| if let Token { token, .. } = event { Some(*token) } else { None })
        .collect();
    assert_eq!(tokens, expected);
    assert_eq!(rest.last(), Some(&Finished { id, reason: FinishReason::Length }));
    assert_eq!(engine.load(), EngineLoad::default());
    // 12 tokens have KV: three full blocks stay in the cache.
    assert_eq!(engine.counts(), BlockCounts { free: 253, shared: 3, ..BlockCounts::default() });
}

#[test]
fn an_idle_step_does_nothing() {
    let mut engine = WIDE.engine();
    let mut events = Vec::new();
    assert_eq!(engine.step(Instant::now(), &mut events), Step::Idle);
    assert!(events.is_empty());
}

#[test]
fn sequences_end_where_they_are_told_to() {
    let endless = SimConfig { mean_output_tokens: None, ..config() };
    let long = oracle(&endless, &model(), &prompt(10), 50);
    let reason = |sampling: Sampling, tokens: Vec<u32>, max_tokens| {
        let output = solo(&SequenceSpec { sampling, ..spec(tokens, max_tokens) });
        (output.tokens, output.finished.unwrap())
    };
    // The prompt's own end comes from the modelled length.
    let ended = (0..60).map(|i| vec![i]).find(|p| oracle(&config(), &model(), p, 100).len() < 100).unwrap();
    let (tokens, stop) = reason(greedy(), ended.clone(), 100);
    assert_eq!((tokens.last(), stop), (Some(&7), FinishReason::Stop));
    let on = Sampling { ignore_eos: true, ..greedy() };
    let (tokens, stop) = reason(on.clone(), ended, 100);
    assert_eq!((tokens.len(), stop), (100, FinishReason::Length));
    let stop_at = Sampling { stop_tokens: vec![long[2]], ..on.clone() };
    let (tokens, stop) = reason(stop_at, prompt(10), 50);
    assert_eq!(stop, FinishReason::Stop);
    assert_eq!(tokens.last(), Some(&long[2]));
    assert!(tokens.len() <= 3);
    let (tokens, stop) = reason(on, prompt(190), 50);
    assert_eq!((tokens.len(), stop), (10, FinishReason::Length), "the context ends it");
}

#[test]
fn what_cannot_be_served_is_refused() {
    let limits = EngineLimits { max_waiting_sequences: 2, ..WIDE.limits };
    let mut engine = Shape { blocks: 10, limits, ..WIDE }.engine();
    let mut refuse = |spec: SequenceSpec| engine.submit(SeqId(1), spec, Instant::now()).unwrap_err();
    assert_eq!(refuse(spec(vec![], 1)), SubmitError::Empty("prompt"));
    assert_eq!(refuse(SequenceSpec { generated: 2, ..spec(vec![1, 2], 1) }), SubmitError::Empty("prompt"));
    assert_eq!(refuse(spec(vec![1], 0)), SubmitError::Empty("max_tokens"));
    assert_eq!(refuse(spec(prompt(40), 1)), SubmitError::TooLong { tokens: 40, limit: 40 });
    assert_eq!(refuse(spec(vec![1, VOCAB], 1)), SubmitError::BadToken { token: VOCAB, vocab: VOCAB });
    let hot = Sampling { temperature: f32::INFINITY, ..greedy() };
    let error = refuse(SequenceSpec { sampling: hot, ..spec(vec![1], 1) });
    assert_eq!(error.to_string(), "temperature is inf, must be from 0 to 100");
    engine.submit(SeqId(1), spec(vec![1], 1), Instant::now()).unwrap();
    let again = engine.submit(SeqId(1), spec(vec![1], 1), Instant::now());
    assert_eq!(again, Err(SubmitError::Duplicate(SeqId(1))));
    engine.submit(SeqId(2), spec(vec![1], 1), Instant::now()).unwrap();
    let full = engine.submit(SeqId(3), spec(vec![1], 1), Instant::now());
    assert_eq!(full, Err(SubmitError::QueueFull { waiting: 2 }));
    run(&mut engine);
    engine.submit(SeqId(1), spec(vec![1], 1), Instant::now()).unwrap();
}

#[test]
fn an_engine_needs_matching_blocks_and_nonzero_limits() {
    let limits = EngineLimits { max_batch_sequences: 0, ..WIDE.limits };
    let arena = WIDE.engine().arena().clone();
    let sim = |model| Box::new(Sim::new(config(), model));
    let error = Engine::new(sim(model()), arena.clone(), limits).err().unwrap();
    assert_eq!(error, EngineError::Zero { limit: "max_batch_sequences" });
    let wider = ModelInfo { kv_heads: 3, ..model() };
    let error = Engine::new(sim(wider), arena, WIDE.limits).err().unwrap();
    assert!(matches!(error, EngineError::Geometry { kv_heads: 3, .. }));
}

#[test]
fn a_known_prompt_starts_from_the_cache_but_computes_its_last_token() {
    let mut engine = WIDE.engine();
    engine.submit(SeqId(1), spec(prompt(12), 1), Instant::now()).unwrap();
    run(&mut engine);
    let mut cached = |tokens: Vec<u32>, salt| {
        let spec = SequenceSpec { cache_salt: salt, ..spec(tokens, 1) };
        engine.submit(SeqId(2), spec.clone(), Instant::now()).unwrap();
        let events = run_events(&mut engine);
        assert_eq!(first_token(&events, SeqId(2)).unwrap().token, solo(&spec).tokens[0]);
        admitted(&events, SeqId(2)).unwrap().0
    };
    assert_eq!(cached(prompt(12), 0), 8, "never the block of the last token");
    assert_eq!(cached(prompt(13), 0), 12);
    assert_eq!(cached(prompt(12), 5), 0, "another salt shares nothing");
    let mut other = prompt(13);
    other[5] += 1;
    assert_eq!(cached(other, 0), 4);
    engine.clear_prefix_cache();
    assert_eq!(engine.counts().free, 256);
}

/// Two prompts that differ in two tokens of their second block, and whose blocks have the same hashes: found in 0.2 s for
/// the vocabulary of Qwen. (Where the first half of a lane equals what the hash adds to it, the other half is multiplied by
/// zero.)
fn same_hashes() -> [Vec<u32>; 2] {
    let mut first = [7; 16];
    first[..2].copy_from_slice(&[137, 45086]);
    [[5, 5], [11, 12]].map(|pair| {
        let mut second = [5; 16];
        second[8..12].copy_from_slice(&[73942, 76117, pair[0], pair[1]]);
        [first, second].concat()
    })
}

#[test]
fn prompts_whose_blocks_have_the_same_hashes_share_no_more_than_their_tokens() {
    let prompts = same_hashes();
    let [one, other] = [0, 1].map(|i| block_hashes(0, 16, &prompts[i]));
    assert_eq!(one, other, "or this tests nothing");
    let model = ModelInfo { vocab: 151_936, ..model() };
    let mut engine = Shape { block_tokens: 16, ..WIDE }.over(Box::new(Sim::new(config(), model.clone())));
    for (id, prompt) in (0..).map(SeqId).zip(prompts) {
        let tokens = [prompt, vec![1]].concat();
        engine.submit(id, spec(tokens.clone(), 8), Instant::now()).unwrap();
        let events = run_events(&mut engine);
        let cached = admitted(&events, id).unwrap().0;
        assert_eq!(cached, if id == SeqId(0) { 0 } else { 16 }, "the first block is the same");
        let mut output = Output::default();
        events.into_iter().for_each(|event| output.apply(event));
        assert_eq!(output.failed, None);
        assert_eq!(output.tokens, oracle(&config(), &model, &tokens, 8));
    }
}

#[test]
fn an_export_keeps_its_blocks_until_it_is_released() {
    let mut engine = WIDE.engine();
    let spec = SequenceSpec { purpose: Purpose::Export, max_tokens: 0, ..spec(prompt(10), 0) };
    engine.submit(SeqId(1), spec, Instant::now()).unwrap();
    let events = run_events(&mut engine);
    assert!(first_token(&events, SeqId(1)).is_some());
    assert!(!events.iter().any(|event| matches!(event, EngineEvent::Finished { .. })));
    assert_eq!(engine.counts(), BlockCounts { free: 253, shared: 2, valid: 1, ..BlockCounts::default() });
    assert_eq!(engine.load(), EngineLoad { held: 1, ..EngineLoad::default() });
    engine.release(SeqId(1));
    engine.release(SeqId(1));
    engine.audit().unwrap();
    assert_eq!(engine.counts(), BlockCounts { free: 254, shared: 2, ..BlockCounts::default() });
}

/// An import of `tokens`, admitted, and its blocks.
fn importing(engine: &mut Engine, id: SeqId, tokens: u32) -> Vec<crate::BlockId> {
    let spec = SequenceSpec { purpose: Purpose::Import, ..spec(prompt(tokens), 5) };
    engine.submit(id, spec, Instant::now()).unwrap();
    admitted(&run_events(engine), id).unwrap().1
}

#[test]
fn an_import_decodes_what_another_engine_prefilled() {
    for tokens in [1, 3, 4, 10, 12] {
        let (mut p, mut d) = (Shape { block_tokens: 8, ..WIDE }.engine(), WIDE.engine());
        let export = SequenceSpec { purpose: Purpose::Export, ..spec(prompt(tokens), 5) };
        p.submit(SeqId(1), export, Instant::now()).unwrap();
        let events = run_events(&mut p);
        let (first, from) = (first_token(&events, SeqId(1)).unwrap(), admitted(&events, SeqId(1)).unwrap().1);
        let to = importing(&mut d, SeqId(2), tokens);
        assert_eq!(d.counts().filling as usize, to.len());
        copy_kv((p.arena(), &from), (d.arena(), &to), 0..tokens);
        d.imported(SeqId(2), tokens);
        d.start_decode(SeqId(2), first);
        d.audit().unwrap();
        let output = run(&mut d).remove(&SeqId(2)).unwrap();
        assert_eq!(output, solo(&spec(prompt(tokens), 5)), "{tokens} tokens");
    }
}

#[test]
fn an_import_given_up_is_computed_here_keeping_what_arrived() {
    for arrived in [0, 3, 4, 9, 12] {
        let (mut p, mut d) = (WIDE.engine(), WIDE.engine());
        p.submit(SeqId(1), SequenceSpec { purpose: Purpose::Export, ..spec(prompt(12), 5) }, Instant::now())
            .unwrap();
        let from = admitted(&run_events(&mut p), SeqId(1)).unwrap().1;
        let to = importing(&mut d, SeqId(2), 12);
        copy_kv((p.arena(), &from), (d.arena(), &to), 0..arrived);
        d.imported(SeqId(2), arrived);
        d.prefill_locally(SeqId(2));
        d.audit().unwrap();
        let events = run_events(&mut d);
        assert_eq!(events[0], EngineEvent::Prefilled { id: SeqId(2), upto: 12 });
        let mut output = Output::default();
        events.into_iter().for_each(|event| output.apply(event));
        assert_eq!(output, solo(&spec(prompt(12), 5)), "{arrived} tokens arrived");
    }
}

#[test]
fn corrupted_imports_fail_and_leave_the_cache() {
    for given_up in [false, true] {
        let mut d = WIDE.engine();
        importing(&mut d, SeqId(2), 12);
        d.imported(SeqId(2), 12);
        assert_eq!(d.counts().shared, 2);
        if given_up {
            d.prefill_locally(SeqId(2));
        } else {
            d.start_decode(SeqId(2), FirstToken { token: 1, logprob: None, logits_digest: None });
        }
        let output = run(&mut d).remove(&SeqId(2)).unwrap();
        let Some(SequenceError::Execute(ExecuteError::CorruptKv { position: 0, .. })) = output.failed else {
            panic!("{output:?}")
        };
        assert_eq!(d.counts().free, 256, "nobody else starts from damaged blocks");
        assert!(d.kv_snapshot().is_empty());
    }
}

#[test]
fn misused_imports_fail_alone() {
    let mut d = WIDE.engine();
    importing(&mut d, SeqId(1), 12);
    d.imported(SeqId(1), 8);
    let first = FirstToken { token: 1, logprob: None, logits_digest: None };
    d.start_decode(SeqId(1), first.clone());
    let failed = run(&mut d).remove(&SeqId(1)).unwrap().failed;
    assert_eq!(failed, Some(SequenceError::NotImported { imported: 8, prompt: 12 }));
    assert_eq!(d.counts().quarantined, 1, "a write may be on its way");
    d.fence(SeqId(1));
    assert_eq!(d.counts().quarantined, 0);
    importing(&mut d, SeqId(2), 3);
    d.imported(SeqId(2), 3);
    d.start_decode(SeqId(2), FirstToken { token: VOCAB, ..first.clone() });
    let failed = run(&mut d).remove(&SeqId(2)).unwrap().failed;
    assert_eq!(failed, Some(SequenceError::BadFirstToken { token: VOCAB, vocab: VOCAB }));
    for id in [SeqId(2), SeqId(77)] {
        d.imported(id, 3);
        d.start_decode(id, first.clone());
        d.prefill_locally(id);
        d.cancel(id, Writers::MayWrite);
        d.release(id);
        d.fence(id);
    }
    d.audit().unwrap();
    assert_eq!(run(&mut d).len(), 0, "unknown ids are ignored");
}

#[test]
fn cancelled_blocks_wait_for_the_fence_if_they_may_be_written() {
    let mut d = WIDE.engine();
    importing(&mut d, SeqId(1), 10);
    d.cancel(SeqId(1), Writers::MayWrite);
    d.audit().unwrap();
    assert_eq!(d.counts(), BlockCounts { free: 253, quarantined: 3, ..BlockCounts::default() });
    let again = d.submit(SeqId(1), spec(vec![1], 1), Instant::now());
    assert_eq!(again, Err(SubmitError::Duplicate(SeqId(1))));
    d.fence(SeqId(1));
    assert_eq!(d.counts().free, 256);
    importing(&mut d, SeqId(1), 10);
    d.cancel(SeqId(1), Writers::Gone);
    assert_eq!(d.counts().free, 256);
    d.submit(SeqId(1), spec(vec![1], 1), Instant::now()).unwrap();
    d.cancel(SeqId(1), Writers::Gone);
    assert_eq!(run(&mut d).len(), 0);
}

#[test]
fn admission_is_in_order_and_limited_by_batch_and_blocks() {
    let limits = EngineLimits { max_batch_sequences: 2, ..WIDE.limits };
    let mut engine = Shape { limits, blocks: 12, ..WIDE }.engine();
    for (id, tokens) in [(1, 8), (2, 30), (3, 4), (4, 4)] {
        let on = Sampling { ignore_eos: true, ..greedy() };
        let mut tokens = prompt(tokens);
        tokens[0] = id as u32;
        engine.submit(SeqId(id), SequenceSpec { sampling: on, ..spec(tokens, 6) }, Instant::now()).unwrap();
    }
    let events = run_events(&mut engine);
    assert_eq!(order_of_admission(&events), [1, 2, 3, 4]);
    let mut alive = 0i32;
    for event in &events {
        match event {
            EngineEvent::Admitted { .. } => alive += 1,
            EngineEvent::Finished { .. } => alive -= 1,
            _ => {}
        }
        assert!(alive <= 2);
    }
}

fn order_of_admission(events: &[EngineEvent]) -> Vec<u64> {
    let admitted =
        |event: &EngineEvent| if let EngineEvent::Admitted { id, .. } = event { Some(id.0) } else { None };
    events.iter().filter_map(admitted).collect()
}

/// What waits for a peer with more than half of the blocks could wait for what waits here.
#[test]
fn who_waits_for_a_peer_leaves_half_of_the_blocks_to_those_it_has_room_for() {
    let submit = |engine: &mut Engine, id: u64, purpose, len| {
        let tokens = (0..len).map(|at| (at + 7 * id as u32) % VOCAB).collect();
        engine.submit(SeqId(id), SequenceSpec { purpose, ..spec(tokens, 1) }, Instant::now()).unwrap();
    };
    let comes = |engine: &mut Engine| order_of_admission(&run_events(engine));
    // Three blocks each, and the last of them two.
    let mut engine = Shape { blocks: 20, ..WIDE }.engine();
    (1..=5).for_each(|id| submit(&mut engine, id, Purpose::Export, 12));
    submit(&mut engine, 6, Purpose::Export, 8);
    assert_eq!(comes(&mut engine), [1, 2, 3]);
    submit(&mut engine, 7, Purpose::Generate, 3);
    assert_eq!(comes(&mut engine), [7], "it waits for no peer");
    engine.wanted(SeqId(5));
    assert_eq!(comes(&mut engine), [5], "it waits for none any more");
    engine.wanted(SeqId(1));
    assert_eq!(comes(&mut engine), [4], "nor does the first; in order");
    engine.release(SeqId(2));
    assert_eq!(comes(&mut engine), [6]);
    engine.audit().unwrap();

    let limits = EngineLimits { mixed: true, ..WIDE.limits };
    let mut engine = Shape { limits, blocks: 20, ..WIDE }.engine();
    (1..=4).for_each(|id| submit(&mut engine, id, Purpose::Import, 12));
    submit(&mut engine, 5, Purpose::Import, 8);
    submit(&mut engine, 6, Purpose::Export, 12);
    assert_eq!(comes(&mut engine), [1, 2, 3]);
    engine.wanted(SeqId(6));
    assert_eq!(comes(&mut engine), [6]);
    engine.imported(SeqId(2), 4);
    assert_eq!(comes(&mut engine), [4], "one has its peer at work");
    engine.prefill_locally(SeqId(1));
    assert_eq!(comes(&mut engine), [5], "one has no peer any more");
    engine.audit().unwrap();

    // An import that is the only one may have more than half; an export that large comes when it is wanted.
    let mut engine = Shape { limits, blocks: 20, ..WIDE }.engine();
    submit(&mut engine, 1, Purpose::Import, 60);
    submit(&mut engine, 2, Purpose::Import, 4);
    assert_eq!(comes(&mut engine), [1]);
    let mut engine = Shape { blocks: 20, ..WIDE }.engine();
    submit(&mut engine, 1, Purpose::Export, 60);
    submit(&mut engine, 2, Purpose::Export, 4);
    assert!(comes(&mut engine).is_empty(), "none of its kind passes it");
    engine.wanted(SeqId(1));
    assert_eq!(comes(&mut engine), [1, 2]);

    // Where all are imports, they wait for engines that are none of theirs.
    let mut engine = Shape { blocks: 20, ..WIDE }.engine();
    (1..=6).for_each(|id| submit(&mut engine, id, Purpose::Import, 12));
    assert_eq!(comes(&mut engine), [1, 2, 3, 4, 5, 6]);
}

/// The peer keeps its blocks for it, and whoever waits for those may be what the first in line here waits for.
#[test]
fn while_nothing_is_computed_an_export_that_is_wanted_passes_whoever_has_no_room() {
    let mut engine = Shape { blocks: 20, ..WIDE }.engine();
    let submit = |engine: &mut Engine, id: u64, purpose, len| {
        let tokens = (0..len).map(|at| (at + 7 * id as u32) % VOCAB).collect();
        engine.submit(SeqId(id), SequenceSpec { purpose, ..spec(tokens, 1) }, Instant::now()).unwrap();
        engine.wanted(SeqId(id));
    };
    submit(&mut engine, 1, Purpose::Export, 48);
    submit(&mut engine, 2, Purpose::Generate, 36);
    submit(&mut engine, 3, Purpose::Generate, 4);
    submit(&mut engine, 4, Purpose::Export, 12);
    assert_eq!(order_of_admission(&run_events(&mut engine)), [1, 4]);
    engine.release(SeqId(1));
    assert_eq!(order_of_admission(&run_events(&mut engine)), [2, 3]);
    engine.audit().unwrap();
}

#[test]
fn who_is_preempted_goes_on_as_if_nothing_had_happened() {
    let mut engine = Shape { blocks: 9, ..WIDE }.engine();
    let on = Sampling { ignore_eos: true, ..greedy() };
    let specs: Vec<SequenceSpec> =
        (0..3).map(|i| SequenceSpec { sampling: on.clone(), ..spec(vec![i, 1, 2, 3, 4], 25) }).collect();
    for (id, spec) in (0..).zip(&specs) {
        engine.submit(SeqId(id), spec.clone(), Instant::now()).unwrap();
    }
    let outputs = run(&mut engine);
    assert!(engine.preemptions() > 0, "the pool is too small for all");
    for (id, spec) in (0..).zip(&specs) {
        assert_eq!(outputs[&SeqId(id)], solo(spec));
    }
    let reasons = outputs.values().filter(|output| output.finished == Some(FinishReason::Length));
    assert_eq!(reasons.count(), 3);
}

#[test]
fn who_is_paused_takes_no_room_and_goes_on_as_if_nothing_had_happened() {
    for (prefix_cache, blocks) in [(true, 256), (false, 256), (true, 12)] {
        let limits = EngineLimits { prefix_cache, max_batch_sequences: 1, ..WIDE.limits };
        let mut engine = Shape { blocks, limits, ..WIDE }.engine();
        let on = Sampling { ignore_eos: true, ..greedy() };
        let specs =
            [prompt(9), prompt(20)].map(|tokens| SequenceSpec { sampling: on.clone(), ..spec(tokens, 25) });
        engine.submit(SeqId(0), specs[0].clone(), Instant::now()).unwrap();
        let mut events = Vec::new();
        while events.iter().filter(|event| matches!(event, EngineEvent::Token { .. })).count() < 10 {
            engine.step(Instant::now(), &mut events);
        }
        engine.pause(SeqId(0));
        engine.audit().unwrap();
        let counts = engine.counts();
        assert_eq!(counts.free + engine.evictable(), blocks, "it holds none: {counts:?}");
        // The only place in the batch is somebody else's now.
        engine.submit(SeqId(1), specs[1].clone(), Instant::now()).unwrap();
        let meanwhile = run_events(&mut engine);
        assert!(meanwhile.iter().all(|event| event.id() == SeqId(1)), "{meanwhile:?}");
        assert_eq!(engine.load(), EngineLoad { running: 1, ..EngineLoad::default() });
        engine.resume(SeqId(0));
        engine.resume(SeqId(0));
        events.extend(meanwhile);
        events.extend(run_events(&mut engine));
        let mut outputs = [Output::default(), Output::default()];
        events.into_iter().for_each(|event| outputs[event.id().0 as usize].apply(event));
        assert_eq!(outputs, specs.map(|spec| solo(&spec)));
    }
}

#[test]
fn only_what_generates_can_be_paused() {
    let mut engine = WIDE.engine();
    engine
        .submit(SeqId(0), SequenceSpec { purpose: Purpose::Export, ..spec(prompt(9), 5) }, Instant::now())
        .unwrap();
    importing(&mut engine, SeqId(1), 12);
    let counts = engine.counts();
    for id in 0..3 {
        engine.pause(SeqId(id));
        engine.resume(SeqId(id));
    }
    assert_eq!(engine.counts(), counts);
    // One that waits can: it is not admitted.
    engine.submit(SeqId(2), spec(prompt(5), 5), Instant::now()).unwrap();
    engine.pause(SeqId(2));
    assert!(run_events(&mut engine).is_empty());
    engine.cancel(SeqId(2), Writers::Gone);
    engine.resume(SeqId(2));
    assert!(run_events(&mut engine).is_empty());
    engine.audit().unwrap();
}

#[test]
fn without_a_prefix_cache_nothing_is_kept() {
    let limits = EngineLimits { prefix_cache: false, ..WIDE.limits };
    let mut engine = Shape { limits, ..WIDE }.engine();
    for id in 0..2 {
        engine.submit(SeqId(id), spec(prompt(20), 4), Instant::now()).unwrap();
        let events = run_events(&mut engine);
        assert_eq!(admitted(&events, SeqId(id)).unwrap().0, 0);
    }
    assert_eq!(engine.counts().free, 256);
    assert!(engine.take_kv_events().is_empty());
}

/// An executor that gives bad logits, or breaks, when it meets certain tokens.
struct Flaky(Sim);

const NAN: u32 = 50;
const BREAKS: u32 = 51;

impl Executor for Flaky {
    fn model(&self) -> &ModelInfo {
        self.0.model()
    }

    fn forward(
        &mut self,
        arena: &crate::Arena,
        batch: &[BatchItem<'_>],
        out: &mut Forward,
    ) -> Result<(), ExecuteError> {
        if batch.iter().any(|item| item.context.first().or(item.tokens.first()) == Some(&BREAKS)) {
            return Err(ExecuteError::Broken { reason: "as asked".into() });
        }
        self.0.forward(arena, batch, out)?;
        let vocab = self.0.model().vocab as usize;
        let asking = batch.iter().filter(|item| item.logits);
        for (row, item) in out.logits.chunks_exact_mut(vocab).zip(asking) {
            if item.tokens[0] == NAN {
                row[3] = f32::NAN;
            }
        }
        Ok(())
    }
}

#[test]
fn an_export_that_fails_keeps_its_blocks_until_nobody_looks_at_them() {
    // Its digests may be made from them at this very moment: the next one must not write there.
    for (tokens, prefix_cache) in
        [(vec![BREAKS; 5], true), ([prompt(8), vec![NAN]].concat(), true), (vec![NAN; 9], false)]
    {
        let limits = EngineLimits { prefix_cache, prefill_chunk_tokens: 8, ..WIDE.limits };
        let shape = Shape { blocks: 6, limits, ..WIDE };
        let mut engine = shape.over(Box::new(Flaky(Sim::new(config(), model()))));
        let export = SequenceSpec { purpose: Purpose::Export, ..spec(tokens, 1) };
        engine.submit(SeqId(1), export, Instant::now()).unwrap();
        let events = run_events(&mut engine);
        assert!(matches!(events.last(), Some(EngineEvent::Failed { id: SeqId(1), .. })), "{events:?}");
        let (_, theirs) = admitted(&events, SeqId(1)).unwrap();
        engine.audit().unwrap();
        assert_eq!(engine.load().held, 1);
        engine.submit(SeqId(2), spec(prompt(9), 3), Instant::now()).unwrap();
        let events = run_events(&mut engine);
        let (cached, ours) = admitted(&events, SeqId(2)).unwrap();
        assert!(cached == 0 && ours.iter().all(|block| !theirs.contains(block)), "{ours:?} {theirs:?}");
        engine.cancel(SeqId(1), Writers::Gone);
        engine.audit().unwrap();
        let counts = engine.counts();
        assert_eq!((counts.free + counts.shared, engine.load()), (6, EngineLoad::default()));
    }
}

#[test]
fn a_digest_of_logits_is_of_all_of_them() {
    let asked = SequenceSpec { logits_digest: true, ..spec(prompt(9), 3) };
    let whole = solo(&asked);
    let tokens = [asked.tokens.clone(), whole.tokens[..2].to_vec()].concat();
    let last = solo(&SequenceSpec { tokens, generated: 2, max_tokens: 1, ..asked });
    assert_eq!(last.tokens, whole.tokens[2..]);
    assert!(whole.digests[2].is_some() && whole.digests[2] != last.digests[0], "{whole:?} {last:?}");
}

#[test]
fn a_broken_sequence_does_not_take_the_others_with_it() {
    let mut engine = WIDE.over(Box::new(Flaky(Sim::new(config(), model()))));
    engine.submit(SeqId(1), spec(prompt(9), 5), Instant::now()).unwrap();
    engine.submit(SeqId(2), spec(vec![NAN, 1], 5), Instant::now()).unwrap();
    let outputs = run(&mut engine);
    assert_eq!(outputs[&SeqId(1)], solo(&spec(prompt(9), 5)));
    let failed = outputs[&SeqId(2)].failed.clone().unwrap();
    assert!(matches!(failed, SequenceError::Sample(SampleError::NotFinite { token: 3, .. })));
    engine.submit(SeqId(3), spec(vec![BREAKS], 5), Instant::now()).unwrap();
    let outputs = run(&mut engine);
    let broken = ExecuteError::Broken { reason: "as asked".into() };
    assert_eq!(outputs[&SeqId(3)].failed, Some(SequenceError::Execute(broken)));
    engine.submit(SeqId(4), spec(prompt(9), 5), Instant::now()).unwrap();
    assert_eq!(run(&mut engine)[&SeqId(4)], solo(&spec(prompt(9), 5)), "the engine lives on");
}
