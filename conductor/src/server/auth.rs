//! Who may ask for what: a token, a certificate, or both, as the fleet document asks.
//!
//! Everything below `/v1` is guarded; health and metrics are open, since probes have no secrets.

use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use baton_config::fleet::ConductorGuard;
use baton_config::secret::{SecretFault, Tokens};
use http::header::AUTHORIZATION;
use http::{HeaderMap, StatusCode};
use subtle::ConstantTimeEq;

use super::answer::Refusal;
use super::tls::Certificates;

/// What is known about the other end of a connection; part of every request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Peer {
    /// Whether it showed a certificate of the authority that clients must have.
    pub(super) certified: bool,
}

/// Decides who is let in.
#[derive(Debug)]
pub(super) struct Guard {
    options: ConductorGuard,
    tokens: RwLock<Option<Tokens>>,
}

impl Guard {
    /// Reads the tokens.
    pub(super) fn load(options: ConductorGuard) -> Result<Self, SecretFault> {
        let tokens = options.token_file.as_deref().map(Tokens::load).transpose()?;
        Ok(Self { options, tokens: RwLock::new(tokens) })
    }

    /// Whether the sender of such a request may be answered.
    pub(super) fn admit(&self, peer: Option<&Peer>, headers: &HeaderMap) -> Result<(), Refusal> {
        let wants_certificate = self.options.tls.as_ref().is_some_and(|tls| tls.client_ca_file.is_some());
        if wants_certificate && !peer.is_some_and(|peer| peer.certified) {
            let message = "this conductor asks for a client certificate: set conductor.tls.client_cert_file and client_key_file";
            return Err(Refusal::new(StatusCode::FORBIDDEN, "certificate_required", message));
        }
        let tokens = self.tokens.read().unwrap_or_else(PoisonError::into_inner);
        let Some(tokens) = &*tokens else { return Ok(()) };
        let unauthenticated = |message| {
            let (status, code) = (StatusCode::UNAUTHORIZED, "unauthenticated");
            Err(Refusal::new(status, code, message))
        };
        let mut given = headers.get_all(AUTHORIZATION).iter();
        let shown = match (given.next(), given.next()) {
            (Some(value), None) => value.as_bytes(),
            (None, _) => {
                return unauthenticated("this conductor asks for a token: set conductor.auth.token_file");
            }
            (Some(_), Some(_)) => return unauthenticated("there is more than one authorization header"),
        };
        let token = match shown.split_at_checked(7) {
            Some((scheme, token)) if scheme.eq_ignore_ascii_case(b"bearer ") => token,
            _ => return unauthenticated("the authorization header must be `Bearer TOKEN`"),
        };
        // Every token is compared, and each in a time that does not depend on where it differs.
        let known = tokens
            .accepted()
            .iter()
            .map(|good| good.reveal().as_bytes().ct_eq(token))
            .fold(0, |any, same| any | same.unwrap_u8());
        if known == 1 {
            return Ok(());
        }
        let message =
            "the token is not this conductor's: compare the files that conductor.auth.token_file names";
        Err(Refusal::new(StatusCode::UNAUTHORIZED, "wrong_token", message))
    }

    /// Takes over other tokens if the file holds some; keeps those in use when it can't be used.
    fn reload(&self) -> Result<bool, SecretFault> {
        let Some(path) = self.options.token_file.as_deref() else { return Ok(false) };
        let fresh = Some(Tokens::load(path)?);
        let mut tokens = self.tokens.write().unwrap_or_else(PoisonError::into_inner);
        let news = *tokens != fresh;
        *tokens = fresh;
        Ok(news)
    }
}

/// Follows the files of tokens and certificates for ever; what can't be used is said once and changes nothing.
pub(super) async fn rotate(
    guard: std::sync::Arc<Guard>,
    certificates: Option<Certificates>,
    every: Duration,
) {
    let mut said = [String::new(), String::new()];
    loop {
        tokio::time::sleep(every).await;
        let (guard, certificates) = (guard.clone(), certificates.clone());
        let work = move || {
            let tokens = guard.reload().map_err(|error| error.to_string());
            let tls = certificates.map_or(Ok(false), |c| c.reload().map_err(|error| error.to_string()));
            [tokens, tls]
        };
        let Ok(outcomes) = tokio::task::spawn_blocking(work).await else { return };
        for ((outcome, said), what) in outcomes.into_iter().zip(&mut said).zip(["tokens", "certificates"]) {
            match outcome {
                Ok(news) => {
                    said.clear();
                    if news {
                        tracing::info!(what, "changed files are in use");
                    }
                }
                Err(error) if error != *said => {
                    tracing::error!(
                        what,
                        error,
                        "a changed file can't be used: going on with what it held before"
                    );
                    *said = error;
                }
                Err(_) => {}
            }
        }
    }
}
