//! Which tokens a sequence holds already, for the penalties.

use std::collections::HashMap;

use baton_config::protocol::Sampling;

/// How a token occurred.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Seen {
    /// Times in the output.
    pub(super) output: u32,
}

/// The tokens of prompt and output; kept only when a penalty asks for it.
#[derive(Debug, Clone, Default)]
pub struct History {
    seen: Option<HashMap<u32, Seen>>,
}

impl History {
    /// Of a sequence that starts with `prompt` and has generated `output` so far.
    pub fn new(sampling: &Sampling, prompt: &[u32], output: &[u32]) -> Self {
        let wanted = sampling.presence_penalty != 0.0
            || sampling.frequency_penalty != 0.0
            || sampling.repetition_penalty != 1.0;
        let mut history = Self { seen: wanted.then(HashMap::new) };
        if let Some(seen) = &mut history.seen {
            seen.extend(prompt.iter().map(|token| (*token, Seen::default())));
        }
        output.iter().for_each(|token| history.push(*token));
        history
    }

    /// A token was generated.
    pub fn push(&mut self, token: u32) {
        if let Some(seen) = &mut self.seen {
            seen.entry(token).or_default().output += 1;
        }
    }

    pub(super) fn is_off(&self) -> bool {
        self.seen.is_none()
    }

    /// In no particular order: each token is adjusted by itself.
    pub(super) fn seen(&self) -> impl Iterator<Item = (u32, Seen)> {
        self.seen.iter().flatten().map(|(token, seen)| (*token, *seen))
    }
}
