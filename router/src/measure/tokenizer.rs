//! What tokenizing costs: the floor below whatever a router does with long prompts.

use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::model::{Model, ModelError};
use crate::options::ModelOptions;

/// Times each way is tried; the shortest counts.
const TRIES: usize = 3;

/// Microseconds that one text takes, alone on a thread; the shortest of some tries.
#[derive(Debug, Clone, Serialize)]
pub struct TokenizerFigures {
    /// Its tokens.
    pub tokens: usize,
    /// The tokenizer's own work: the text as a whole.
    pub whole_us: f64,
    /// As this router does it, none of whose pieces it has seen before.
    pub new_us: f64,
    /// The same when it has seen them.
    pub known_us: f64,
}

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The model cannot be served.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The tokenizer failed on the text.
    #[error("the tokenizer failed: {0}")]
    Text(String),
}

/// Tokenizes `text` with the tokenizer of the model in `dir`.
///
/// # Errors
/// When there is no usable model, or its tokenizer fails.
pub fn tokenizer(dir: &Path, text: &str) -> Result<TokenizerFigures, TokenizerError> {
    let options = ModelOptions {
        id: "measured".to_owned(),
        served_as: Vec::new(),
        path: dir.to_owned(),
        max_context: None,
    };
    let shortest = |times: [Duration; TRIES]| times.into_iter().min().unwrap_or_default().as_secs_f64() * 1e6;
    let (mut whole, mut new, mut known) =
        ([Duration::ZERO; TRIES], [Duration::ZERO; TRIES], [Duration::ZERO; TRIES]);
    let mut tokens = 0;
    for turn in 0..TRIES {
        // A fresh one has seen nothing.
        let vocabulary = Model::load(&options)?.vocabulary;
        let time = |work: &dyn Fn() -> Result<Vec<u32>, String>| {
            let begun = Instant::now();
            let ids = work().map_err(TokenizerError::Text)?;
            Ok::<_, TokenizerError>((begun.elapsed(), ids.len()))
        };
        (new[turn], tokens) = time(&|| vocabulary.encode(text, false, 0))?;
        (known[turn], _) = time(&|| vocabulary.encode(text, false, 0))?;
        (whole[turn], _) = time(&|| vocabulary.encode_whole(text))?;
    }
    Ok(TokenizerFigures {
        tokens,
        whole_us: shortest(whole),
        new_us: shortest(new),
        known_us: shortest(known),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_that_were_seen_cost_less_than_the_whole() {
        let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/models/tiny");
        let figures = tokenizer(&tiny, &" word and another one".repeat(4000)).unwrap();
        assert!(figures.tokens > 4000 && figures.known_us < figures.whole_us, "{figures:?}");
    }
}
