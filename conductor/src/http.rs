//! How the parts of a fleet speak HTTP as clients: straight to the address they were given, with Baton's own TLS.
//!
//! Every `reqwest` client comes from here. It takes no proxy from the environment and follows no redirect, and its TLS
//! knows no certificate authority but those it is given: it works in an image without any.

use std::sync::Arc;

use rustls::crypto::ring;
use rustls::{ClientConfig, RootCertStore};

/// The start of a client; add timeouts and build it.
#[expect(clippy::disallowed_methods, reason = "this is the one place that makes clients")]
pub fn builder() -> reqwest::ClientBuilder {
    reqwest::Client::builder()
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .tcp_nodelay(true)
        .tls_backend_preconfigured(trusting(RootCertStore::empty()))
}

/// A client without any timeout, for tools and tests that put their own deadlines around calls.
pub fn client() -> reqwest::Client {
    match builder().build() {
        Ok(client) => client,
        Err(error) => unreachable!("a client without options depends on nothing of the machine: {error}"),
    }
}

/// TLS that trusts servers of these authorities and shows no certificate of its own.
fn trusting(roots: RootCertStore) -> ClientConfig {
    let versions = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions();
    match versions {
        Ok(builder) => builder.with_root_certificates(roots).with_no_client_auth(),
        Err(error) => unreachable!("the provider speaks the default versions of TLS: {error}"),
    }
}
