//! Logits to tokens.

/// Why no token can be chosen from a row of logits.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SampleError {
    /// A logit is infinite or not a number.
    #[error("logit of token {token} is {value}")]
    NotFinite {
        /// The first such token.
        token: u32,
        /// Its logit.
        value: f32,
    },
}
