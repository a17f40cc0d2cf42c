//! What a request must be before the engine sees it.

use baton_config::protocol::{GenerateRequest, HandoffRef, PrefillRequest, Sampling, Ticket};
use baton_config::{GeometryError, HandoffId};
use baton_engine::ModelInfo;

/// Longest `request_id`.
pub const REQUEST_ID_MAX_BYTES: usize = 256;
/// Longest `host:port` of a peer.
pub const ADDRESS_MAX_BYTES: usize = 261;
/// Alternatives reported per token at most.
pub const LOGPROBS_MAX: u32 = 20;
/// Tokens that end a generation, at most, besides the model's own.
pub const STOP_TOKENS_MAX: usize = 1024;
/// Blocks of one ticket at most.
pub const TICKET_BLOCKS_MAX: usize = 4096;
/// Largest of each number of a peer's geometry: no product of them overflows.
pub const GEOMETRY_MAX: u32 = 1 << 14;
/// Largest alternatives of a first token.
pub const FIRST_TOP_MAX: usize = LOGPROBS_MAX as usize;

/// What is wrong with a request; the text goes into the answer.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Invalid {
    /// No tokens, or none to generate.
    #[error("{field} must not be empty")]
    Empty {
        /// Name of the field.
        field: &'static str,
    },
    /// Too long for the model.
    #[error("{tokens} tokens do not fit a context of {context} with room for one more")]
    TooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// Of the model.
        context: u32,
    },
    /// A field has more of something than is taken.
    #[error("{field} has {len}, at most {max} are taken")]
    TooMany {
        /// Name of the field.
        field: &'static str,
        /// As sent.
        len: usize,
        /// Limit.
        max: usize,
    },
    /// A token id outside the vocabulary.
    #[error("{field} holds token {token}, the vocabulary has {vocab}")]
    Token {
        /// Name of the field.
        field: &'static str,
        /// As sent.
        token: u32,
        /// Of the model.
        vocab: u32,
    },
    /// A number out of range.
    #[error("{field} is {value}, it must be {allowed}")]
    Range {
        /// Name of the field.
        field: &'static str,
        /// As sent.
        value: f64,
        /// In words.
        allowed: &'static str,
    },
    /// More tokens count as generated than there are.
    #[error("generated is {generated}, but there are only {tokens} tokens, one of which is the prompt's")]
    Generated {
        /// As sent.
        generated: u32,
        /// Tokens.
        tokens: usize,
    },
    /// An address that cannot be called.
    #[error("{address:?} is no host:port")]
    Address {
        /// As sent, cut.
        address: String,
    },
    /// The handoff id is zero: nobody minted it.
    #[error("a handoff id of zero was not minted by a router")]
    HandoffId,
    /// A ticket whose blocks cannot be.
    #[error("the ticket has blocks that cannot be: {0}")]
    Geometry(GeometryError),
    /// A ticket that contradicts itself.
    #[error("the ticket {0}")]
    Ticket(&'static str),
}

/// Checks a generate request.
///
/// # Errors
/// The first thing found wrong.
pub fn generate(request: &GenerateRequest, model: &ModelInfo) -> Result<(), Invalid> {
    request_id(&request.request_id)?;
    tokens(&request.tokens, request.generated, model)?;
    if request.max_tokens == 0 {
        return Err(Invalid::Empty { field: "max_tokens" });
    }
    sampling(&request.sampling, model)?;
    request.handoff.as_ref().map_or(Ok(()), handoff)
}

/// Checks a prefill request.
///
/// # Errors
/// The first thing found wrong.
pub fn prefill(request: &PrefillRequest, model: &ModelInfo) -> Result<(), Invalid> {
    request_id(&request.request_id)?;
    tokens(&request.tokens, request.generated, model)?;
    sampling(&request.sampling, model)?;
    handoff(&request.handoff)
}

/// Checks a ticket by itself; whether it fits those before it is for the handoff to say.
///
/// # Errors
/// The first thing found wrong.
pub fn ticket(ticket: &Ticket, model: &ModelInfo) -> Result<(), Invalid> {
    if ticket.blocks.len() > TICKET_BLOCKS_MAX {
        let len = ticket.blocks.len();
        return Err(Invalid::TooMany { field: "blocks", len, max: TICKET_BLOCKS_MAX });
    }
    let g = &ticket.geometry;
    let numbers = [g.layers, g.kv_heads, g.head_dim, g.block_tokens];
    if numbers.iter().any(|number| *number > GEOMETRY_MAX) {
        return Err(Invalid::Ticket("has blocks larger than any memory"));
    }
    ticket.geometry.check().map_err(Invalid::Geometry)?;
    if ticket.tokens > model.max_context {
        return Err(Invalid::TooLong { tokens: ticket.tokens as usize, context: model.max_context });
    }
    if let Some(first) = &ticket.first {
        in_vocabulary("first", first.token, model)?;
        if let Some(logprob) = &first.logprob
            && logprob.top.len() > FIRST_TOP_MAX
        {
            let len = logprob.top.len();
            return Err(Invalid::TooMany { field: "first.logprob.top", len, max: FIRST_TOP_MAX });
        }
    }
    Ok(())
}

fn request_id(id: &str) -> Result<(), Invalid> {
    if id.len() > REQUEST_ID_MAX_BYTES {
        return Err(Invalid::TooMany { field: "request_id", len: id.len(), max: REQUEST_ID_MAX_BYTES });
    }
    Ok(())
}

fn tokens(tokens: &[u32], generated: u32, model: &ModelInfo) -> Result<(), Invalid> {
    if tokens.is_empty() {
        return Err(Invalid::Empty { field: "tokens" });
    }
    if tokens.len() >= model.max_context as usize {
        return Err(Invalid::TooLong { tokens: tokens.len(), context: model.max_context });
    }
    if generated as usize >= tokens.len() {
        return Err(Invalid::Generated { generated, tokens: tokens.len() });
    }
    tokens.iter().try_for_each(|token| in_vocabulary("tokens", *token, model))
}

fn in_vocabulary(field: &'static str, token: u32, model: &ModelInfo) -> Result<(), Invalid> {
    if token >= model.vocab {
        return Err(Invalid::Token { field, token, vocab: model.vocab });
    }
    Ok(())
}

fn sampling(sampling: &Sampling, model: &ModelInfo) -> Result<(), Invalid> {
    let range = |field, value: f32, ok: bool, allowed| {
        if ok { Ok(()) } else { Err(Invalid::Range { field, value: f64::from(value), allowed }) }
    };
    let s = sampling;
    range("temperature", s.temperature, (0.0..=100.0).contains(&s.temperature), "0 to 100")?;
    range("top_p", s.top_p, s.top_p > 0.0 && s.top_p <= 1.0, "over 0, at most 1")?;
    range("min_p", s.min_p, (0.0..=1.0).contains(&s.min_p), "0 to 1")?;
    let penalty = -100.0..=100.0;
    range("presence_penalty", s.presence_penalty, penalty.contains(&s.presence_penalty), "-100 to 100")?;
    range("frequency_penalty", s.frequency_penalty, penalty.contains(&s.frequency_penalty), "-100 to 100")?;
    let repetition = s.repetition_penalty > 0.0 && s.repetition_penalty <= 100.0;
    range("repetition_penalty", s.repetition_penalty, repetition, "over 0, at most 100")?;
    let logprobs = s.logprobs.unwrap_or(0);
    range("logprobs", logprobs as f32, logprobs <= LOGPROBS_MAX, "at most 20")?;
    if s.logit_bias.len() > model.vocab as usize {
        let (len, max) = (s.logit_bias.len(), model.vocab as usize);
        return Err(Invalid::TooMany { field: "logit_bias", len, max });
    }
    for (token, bias) in &s.logit_bias {
        in_vocabulary("logit_bias", *token, model)?;
        range("logit_bias", *bias, penalty.contains(bias), "-100 to 100")?;
    }
    if s.stop_tokens.len() > STOP_TOKENS_MAX {
        return Err(Invalid::TooMany {
            field: "stop_tokens",
            len: s.stop_tokens.len(),
            max: STOP_TOKENS_MAX,
        });
    }
    s.stop_tokens.iter().try_for_each(|token| in_vocabulary("stop_tokens", *token, model))
}

fn handoff(handoff: &HandoffRef) -> Result<(), Invalid> {
    if handoff.id == HandoffId(0) {
        return Err(Invalid::HandoffId);
    }
    let address = &handoff.peer.address;
    let fits = address.len() <= ADDRESS_MAX_BYTES && is_host_port(address);
    if fits { Ok(()) } else { Err(Invalid::Address { address: address.chars().take(80).collect() }) }
}

/// `host:port`, `1.2.3.4:80` or `[::1]:80`, and nothing that changes what a URL made of it means.
fn is_host_port(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let port_ok = port.parse::<u16>().is_ok_and(|p| p > 0) && port.bytes().all(|b| b.is_ascii_digit());
    let name = |b: u8| b.is_ascii_alphanumeric() || b == b'.' || b == b'-';
    let inner = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
    let host_ok = match inner {
        Some(v6) => v6.parse::<std::net::Ipv6Addr>().is_ok(),
        None => !host.is_empty() && host.bytes().all(name),
    };
    port_ok && host_ok
}

#[cfg(test)]
mod tests;
