//! Tells a web hook what was decided.
//!
//! `POST` of `{"pool", "role", "desired", "ready", "reason", "id"}`; any 2xx accepts it. Repeated until accepted or
//! overtaken by another decision: the same `id` is the same decision, also from another conductor.

use std::sync::Arc;

use baton_config::fleet::{WebhookAuth, WebhookSpec};
use baton_config::secret::{read_public, read_secret};
use baton_config::{PoolName, Role};
use hmac::{Hmac, KeyInit, Mac};
use http::header::{AUTHORIZATION, CONTENT_TYPE};
use rustls::crypto::ring;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use serde::Serialize;
use sha2::Sha256;

use super::ScalerError;

/// Where the signature of the body stands.
const SIGNATURE_HEADER: &str = "x-baton-signature";
/// Longest part of an answer that is told.
const MESSAGE_MAX_CHARS: usize = 200;

/// What is told. Fields may be added.
#[derive(Debug, Serialize)]
pub(super) struct Notice<'a> {
    pub(super) pool: &'a PoolName,
    pub(super) role: Role,
    pub(super) desired: u32,
    pub(super) ready: u32,
    pub(super) reason: &'a str,
    pub(super) id: &'a str,
}

/// One receiver.
pub(super) struct Webhook {
    spec: WebhookSpec,
    http: Option<reqwest::Client>,
}

impl Webhook {
    pub(super) fn new(spec: WebhookSpec) -> Self {
        Self { spec, http: None }
    }

    /// One attempt.
    pub(super) async fn tell(&mut self, notice: &Notice<'_>) -> Result<(), ScalerError> {
        let body = serde_json::to_vec(notice).map_err(|error| ScalerError(error.to_string()))?;
        let http = match &self.http {
            Some(http) => http.clone(),
            None => self.http.insert(client(&self.spec)?).clone(),
        };
        let url = &self.spec.url;
        let mut request = http.post(url).header(CONTENT_TYPE, "application/json");
        // Read each time: secrets are renewed.
        if let Some(path) = &self.spec.secret_file {
            let secret = read_secret(path).map_err(|error| ScalerError(format!("no secret: {error}")))?;
            request = match self.spec.auth {
                WebhookAuth::Hmac => request.header(SIGNATURE_HEADER, signature(secret.trim_ascii(), &body)),
                WebhookAuth::Bearer => {
                    let token = String::from_utf8_lossy(secret.trim_ascii()).into_owned();
                    request.header(AUTHORIZATION, format!("Bearer {token}"))
                }
            };
        }
        match request.body(body).send().await {
            Ok(answer) if answer.status().is_success() => Ok(()),
            Ok(mut answer) => {
                let said = answer.chunk().await.ok().flatten().unwrap_or_default();
                let said: String =
                    String::from_utf8_lossy(&said).trim().chars().take(MESSAGE_MAX_CHARS).collect();
                Err(ScalerError(format!("{url} answers {}: {said}", answer.status())))
            }
            Err(error) if error.is_timeout() => {
                let within = self.spec.timeout.as_millis();
                Err(ScalerError(format!("{url} does not answer within {within} ms")))
            }
            Err(error) => Err(ScalerError(format!("{url} can't be reached: {}", last_cause(&error)))),
        }
    }
}

/// `sha256=` and the HMAC of the body in hex.
pub(super) fn signature(secret: &[u8], body: &[u8]) -> String {
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(secret) else {
        unreachable!("an HMAC takes keys of any length");
    };
    mac.update(body);
    let digest = mac.finalize().into_bytes();
    digest.iter().fold("sha256=".to_owned(), |text, byte| format!("{text}{byte:02x}"))
}

fn client(spec: &WebhookSpec) -> Result<reqwest::Client, ScalerError> {
    let mut builder = crate::http::builder().timeout(spec.timeout);
    if spec.url.starts_with("https://") {
        builder = builder.tls_backend_preconfigured(tls(spec)?);
    }
    builder.build().map_err(|error| ScalerError(format!("no HTTP client: {error}")))
}

/// TLS that trusts the authorities of `ca_file`, or else those of the system.
fn tls(spec: &WebhookSpec) -> Result<ClientConfig, ScalerError> {
    let mut roots = RootCertStore::empty();
    match &spec.ca_file {
        Some(path) => {
            let pem = read_public(path).map_err(|error| ScalerError(format!("no ca_file: {error}")))?;
            roots.add_parsable_certificates(CertificateDer::pem_slice_iter(&pem).filter_map(Result::ok));
            if roots.is_empty() {
                return Err(ScalerError(format!("{} holds no certificate", path.display())));
            }
        }
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if roots.is_empty() {
                let text = "the system trusts no authority: install ca-certificates, or set autoscale.webhook.ca_file";
                return Err(ScalerError(text.to_owned()));
            }
        }
    }
    let versions = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| ScalerError(error.to_string()))?;
    Ok(versions.with_root_certificates(roots).with_no_client_auth())
}

/// The innermost reason, which is the one that helps.
fn last_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
