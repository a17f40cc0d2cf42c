//! How the parts of a fleet speak HTTP as clients: straight to the address they were given, with Baton's own TLS.
//!
//! Every `reqwest` client comes from here. It takes no proxy from the environment and follows no redirect, and its TLS
//! knows no certificate authority but those it is given: it works in an image without any. Conductors are called
//! through a [`Caller`], which shows them who is calling; nobody else is ever shown that.

use std::path::Path;

use rustls::ClientConfig;

use crate::tls::TlsError;

mod caller;
mod fault;

pub use caller::{Caller, CallerError};
pub use fault::TlsFault;

/// The start of a client; add timeouts and build it.
pub fn builder() -> reqwest::ClientBuilder {
    builder_with(crate::tls::trusting_nobody())
}

/// The same, for servers of other projects; see [`server_tls`].
pub fn builder_for_servers(tls: ClientConfig) -> reqwest::ClientBuilder {
    builder_with(tls)
}

/// The TLS of a client of `servers`: it believes `ca_file`, which `key` of the fleet document names, or the authorities
/// of the system; nobody where no server speaks TLS.
///
/// # Errors
/// When there is nobody to believe and somebody should be.
pub fn server_tls<'a>(
    servers: impl IntoIterator<Item = &'a str>,
    ca_file: Option<&Path>,
    key: &'static str,
) -> Result<ClientConfig, crate::TlsError> {
    match servers.into_iter().any(|url| url.starts_with("https:")) {
        true => crate::tls::trusting(ca_file, key),
        false => Ok(crate::tls::trusting_nobody()),
    }
}

/// A client without any timeout, for tools and tests that put their own deadlines around calls.
pub fn client() -> reqwest::Client {
    match builder().build() {
        Ok(client) => client,
        Err(error) => unreachable!("a client without options depends on nothing of the machine: {error}"),
    }
}

/// The start of a client that calls a server whose certificate is in `cert_file`, under whatever name and address: a
/// launcher asking what it started.
///
/// # Errors
/// The file is missing, or holds no certificate.
pub fn builder_believing(cert_file: &Path) -> Result<reqwest::ClientBuilder, TlsError> {
    Ok(builder_with(crate::tls::pinned(cert_file)?))
}

#[expect(clippy::disallowed_methods, reason = "this is the one place that makes clients")]
fn builder_with(tls: ClientConfig) -> reqwest::ClientBuilder {
    reqwest::Client::builder()
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .tcp_nodelay(true)
        .tls_backend_preconfigured(tls)
}
