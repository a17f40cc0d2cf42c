use proptest::prelude::*;

use super::*;
use crate::mix::Rng;

fn pick(logits: &[f32], sampling: &Sampling, position: u32) -> u32 {
    pick_after(logits, sampling, position, &[], &[])
}

fn pick_after(logits: &[f32], sampling: &Sampling, position: u32, prompt: &[u32], output: &[u32]) -> u32 {
    let history = History::new(sampling, prompt, output);
    let row = Row { logits, position, sampling, history: &history };
    Sampler::default().sample(row).unwrap().token
}

fn greedy() -> Sampling {
    Sampling { temperature: 0.0, ..Sampling::default() }
}

/// How often each token is drawn, as a fraction.
fn frequencies(logits: &[f32], sampling: &Sampling) -> Vec<f64> {
    const DRAWS: u32 = 40_000;
    let mut counts = vec![0.0; logits.len()];
    (0..DRAWS).for_each(|position| counts[pick(logits, sampling, position) as usize] += 1.0);
    counts.iter().map(|count| count / f64::from(DRAWS)).collect()
}

fn assert_near(found: &[f64], expected: &[f64]) {
    // Three standard deviations of a fraction of 40,000 draws are below 0.0075.
    let close = found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 0.0075);
    assert!(close && found.len() == expected.len(), "{found:?} should be near {expected:?}");
}

#[test]
fn greedy_takes_the_lowest_of_the_best() {
    assert_eq!(pick(&[0.0, 2.0, 1.0, 2.0], &greedy(), 0), 1);
    assert_eq!(pick(&[-0.0, 0.0], &greedy(), 0), 0, "both zeros are equal");
    let hot_but_one = Sampling { top_k: 1, temperature: 50.0, ..Sampling::default() };
    assert_eq!(pick(&[0.0, 2.0, 1.0, 2.0], &hot_but_one, 5), 1);
}

#[test]
fn damaged_logits_are_an_error() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let (sampling, history) = (greedy(), History::default());
        let row = Row { logits: &[0.0, bad, bad], position: 0, sampling: &sampling, history: &history };
        let error = Sampler::default().sample(row).unwrap_err();
        assert!(matches!(error, SampleError::NotFinite { token: 1, .. }), "{error}");
    }
    let (sampling, history) = (greedy(), History::default());
    let row = Row { logits: &[], position: 0, sampling: &sampling, history: &history };
    assert_eq!(Sampler::default().sample(row), Err(SampleError::Empty));
}

#[test]
fn draws_follow_the_softmax_at_a_temperature() {
    let logits = [0.1f32, 0.2, 0.3, 0.4].map(f32::ln);
    assert_near(&frequencies(&logits, &Sampling::default()), &[0.1, 0.2, 0.3, 0.4]);
    let cold = Sampling { temperature: 0.5, ..Sampling::default() };
    let squares = [1.0, 4.0, 9.0, 16.0].map(|x| x / 30.0);
    assert_near(&frequencies(&logits, &cold), &squares);
}

#[test]
fn cuts_keep_what_they_promise() {
    let logits = [0.1f32, 0.2, 0.3, 0.4].map(f32::ln);
    let top_k = Sampling { top_k: 2, ..Sampling::default() };
    assert_near(&frequencies(&logits, &top_k), &[0.0, 0.0, 3.0 / 7.0, 4.0 / 7.0]);
    // 0.4 is not half of the mass, 0.4 + 0.3 is.
    let top_p = Sampling { top_p: 0.5, ..Sampling::default() };
    assert_near(&frequencies(&logits, &top_p), &[0.0, 0.0, 3.0 / 7.0, 4.0 / 7.0]);
    // Half of the mass that top-k left is 0.35: the first alone has it.
    let both = Sampling { top_k: 2, top_p: 0.5, ..Sampling::default() };
    assert_near(&frequencies(&logits, &both), &[0.0, 0.0, 0.0, 1.0]);
    let min_p = Sampling { min_p: 0.45, ..Sampling::default() };
    assert_near(&frequencies(&logits, &min_p), &[0.0, 2.0 / 9.0, 3.0 / 9.0, 4.0 / 9.0]);
    let ties = Sampling { top_k: 2, ..Sampling::default() };
    assert_near(&frequencies(&[1.0; 4], &ties), &[0.5, 0.5, 0.0, 0.0]);
}

#[test]
fn the_draw_is_keyed_by_seed_and_position_alone() {
    let logits: Vec<f32> = (0..1000).map(|i| (i % 7) as f32 * 0.1).collect();
    let stream = |seed| -> Vec<u32> {
        (0..50).map(|position| pick(&logits, &Sampling { seed, ..Sampling::default() }, position)).collect()
    };
    assert_eq!(stream(1), stream(1));
    assert_ne!(stream(1), stream(2));
    let mut used = Sampler::default();
    for (position, expected) in (0..).zip(stream(1)) {
        let sampling = Sampling { seed: 1, ..Sampling::default() };
        let row = Row { logits: &logits, position, sampling: &sampling, history: &History::default() };
        assert_eq!(used.sample(row).unwrap().token, expected, "a used sampler is as good as a new one");
    }
    // Neighbouring seeds and positions must not shift into each other.
    assert_ne!(stream(1)[1..], stream(2)[..49]);
}

#[test]
fn penalties_and_bias_move_the_choice() {
    let logits = [1.0, 0.9, -1.0];
    let presence = Sampling { presence_penalty: 0.2, ..greedy() };
    assert_eq!(pick_after(&logits, &presence, 9, &[0], &[]), 0, "the prompt is no output");
    assert_eq!(pick_after(&logits, &presence, 9, &[], &[0]), 1);
    let frequency = Sampling { frequency_penalty: 0.06, ..greedy() };
    assert_eq!(pick_after(&logits, &frequency, 9, &[], &[0]), 0, "once costs 0.06");
    assert_eq!(pick_after(&logits, &frequency, 9, &[], &[0, 0]), 1, "twice costs 0.12");
    let repetition = Sampling { repetition_penalty: 1.2, ..greedy() };
    assert_eq!(pick_after(&logits, &repetition, 9, &[0], &[]), 1, "the prompt repeats too");
    assert_eq!(pick_after(&[-1.0, -1.1], &repetition, 9, &[0], &[]), 1, "a negative logit is multiplied");
    let bias = Sampling { logit_bias: vec![(2, 3.0), (0, -1.0)], ..greedy() };
    assert_eq!(pick(&logits, &bias, 9), 2);
    let mut pushed = History::new(&frequency, &[], &[0]);
    pushed.push(0);
    let row = Row { logits: &logits, position: 9, sampling: &frequency, history: &pushed };
    assert_eq!(Sampler::default().sample(row).unwrap().token, 1, "push counts like the constructor");
}

#[test]
fn huge_logits_stay_finite_under_penalties() {
    let sampling = Sampling { repetition_penalty: 100.0, temperature: 1e-30, ..Sampling::default() };
    assert_eq!(pick_after(&[f32::MIN, f32::MIN, 0.0], &sampling, 0, &[0], &[1]), 2);
    let bias = Sampling { logit_bias: vec![(0, 1000.0), (0, 1000.0)], ..Sampling::default() };
    assert_eq!(pick(&[f32::MAX, f32::MIN], &bias, 0), 0);
}

#[test]
fn logprobs_are_of_the_models_own_distribution() {
    let logits = [0.1f32, 0.2, 0.3, 0.4].map(f32::ln);
    let sampling = Sampling { logprobs: Some(2), logit_bias: vec![(0, 100.0)], ..greedy() };
    let history = History::default();
    let row = Row { logits: &logits, position: 0, sampling: &sampling, history: &history };
    let sampled = Sampler::default().sample(row).unwrap();
    assert_eq!(sampled.token, 0);
    let logprob = sampled.logprob.unwrap();
    assert!((logprob.logprob - 0.1f32.ln()).abs() < 1e-6);
    assert_eq!(logprob.top.iter().map(|(token, _)| *token).collect::<Vec<_>>(), [3, 2]);
    assert!((logprob.top[0].1 - 0.4f32.ln()).abs() < 1e-6);
    let none = Sampling { logprobs: Some(0), ..greedy() };
    let row = Row { logits: &logits, position: 0, sampling: &none, history: &history };
    assert!(Sampler::default().sample(row).unwrap().logprob.unwrap().top.is_empty());
}

#[test]
fn impossible_values_are_named() {
    let cases: [(&str, Sampling); 9] = [
        ("temperature", Sampling { temperature: -1.0, ..greedy() }),
        ("temperature", Sampling { temperature: f32::NAN, ..greedy() }),
        ("top_p", Sampling { top_p: 0.0, ..greedy() }),
        ("min_p", Sampling { min_p: 1.5, ..greedy() }),
        ("repetition_penalty", Sampling { repetition_penalty: 0.0, ..greedy() }),
        ("logit_bias", Sampling { logit_bias: vec![(0, f32::INFINITY)], ..greedy() }),
        ("logit_bias token", Sampling { logit_bias: vec![(10, 0.0)], ..greedy() }),
        ("stop token", Sampling { stop_tokens: vec![10], ..greedy() }),
        ("logprobs", Sampling { logprobs: Some(129), ..greedy() }),
    ];
    for (field, sampling) in cases {
        assert_eq!(check(&sampling, 10).unwrap_err().field, field);
    }
    check(&Sampling::default(), 10).unwrap();
}

#[test]
fn our_exponential_is_accurate() {
    let mut rng = Rng(1);
    for _ in 0..200_000 {
        let x = -unit(rng.next()) * 10f64.powi(rng.between(0, 5) as i32 - 3);
        let (ours, theirs) = (exp::exp(x), x.exp());
        assert!((ours - theirs).abs() <= 1e-15 * theirs, "exp({x}) = {ours}, should be {theirs}");
    }
    assert_eq!(exp::exp(0.0), 1.0);
    assert_eq!(exp::exp(f64::NEG_INFINITY), 0.0);
    assert!(exp::exp(-708.0) > 0.0);
}

/// The same choice made by sorting everything and cutting one by one.
fn plain(logits: &[f32], sampling: &Sampling, position: u32) -> u32 {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    order.sort_by(|a, b| logits[*b as usize].partial_cmp(&logits[*a as usize]).unwrap().then(a.cmp(b)));
    let max = f64::from(logits[order[0] as usize]);
    let weight = |id: u32| exp::exp((f64::from(logits[id as usize]) - max) / f64::from(sampling.temperature));
    order.retain(|id| weight(*id) >= f64::from(sampling.min_p));
    let (by_id, mut kept) = (
        {
            let mut ids = order.clone();
            ids.sort_unstable();
            ids
        },
        order.clone(),
    );
    let cut_k = sampling.top_k > 0 && (sampling.top_k as usize) < order.len();
    if cut_k {
        kept.truncate(sampling.top_k as usize);
    }
    let summed = if cut_k { kept.clone() } else { by_id };
    let enough = summed.iter().map(|id| weight(*id)).sum::<f64>() * f64::from(sampling.top_p);
    let mut masses = kept.iter().scan(0.0, |mass, id| {
        *mass += weight(*id);
        Some(*mass)
    });
    let nucleus = masses.position(|mass| mass >= enough).map_or(kept.len(), |at| at + 1);
    kept.truncate(nucleus);
    let total: f64 = kept.iter().map(|id| weight(*id)).sum();
    let bits = mix(mix(sampling.seed ^ GOLDEN).wrapping_add((u64::from(position) + 1).wrapping_mul(GOLDEN)));
    let mut left = unit(bits) * total;
    for id in &kept {
        if left < weight(*id) {
            return *id;
        }
        left -= weight(*id);
    }
    order[0]
}

proptest! {
    #[test]
    fn partial_sorting_chooses_what_full_sorting_chooses(
        seed: u64, position in 0u32..1000, vocab in 1u64..3000, levels in 1u64..2000,
        top_k in 0u32..200, top_p in 0.01f32..0.999, min_p in 0.0f32..0.2, temperature in 0.1f32..3.0,
    ) {
        let mut rng = Rng(seed);
        let logits: Vec<f32> = (0..vocab).map(|_| rng.below(levels) as f32 / levels as f32 * 9.0).collect();
        let sampling = Sampling { top_k, top_p, min_p, temperature, seed, ..Sampling::default() };
        prop_assert_eq!(pick(&logits, &sampling, position), plain(&logits, &sampling, position));
    }
}
