//! `router.auth`: who may use the router.

use std::path::PathBuf;
use std::time::Duration;

use super::defaults;
use super::openai::is_loopback;
use crate::choice::choice;
use crate::fault::Position;
use crate::reader::{Section, Text, read_choice};

/// Longest URL of an identity provider.
const URL_MAX_BYTES: usize = 2048;

choice! {
    /// Who shares cached prefixes with whom.
    Isolation {
        /// Everybody.
        None => "none",
        /// The requests of one tenant.
        Tenant => "tenant",
        /// Nobody.
        Request => "request",
    }
}

/// Who may use the router.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct AuthSpec {
    /// File of keys, tenants and quotas.
    pub keys_file: PathBuf,
    /// Who shares cached prefixes.
    pub isolation: Isolation,
    /// Whose tokens are accepted beside keys.
    pub jwt: Option<JwtSpec>,
}

choice! {
    /// How the tokens of an identity provider are signed: with a private key, always, so that whoever can check one
    /// cannot make one.
    JwtAlgorithm {
        /// RSA, PKCS #1, SHA-256.
        Rs256 => "RS256",
        /// RSA, PKCS #1, SHA-384.
        Rs384 => "RS384",
        /// RSA, PKCS #1, SHA-512.
        Rs512 => "RS512",
        /// RSA, PSS, SHA-256.
        Ps256 => "PS256",
        /// RSA, PSS, SHA-384.
        Ps384 => "PS384",
        /// RSA, PSS, SHA-512.
        Ps512 => "PS512",
        /// P-256, SHA-256.
        Es256 => "ES256",
        /// P-384, SHA-384.
        Es384 => "ES384",
        /// Ed25519.
        EdDsa => "EdDSA",
    }
}

/// Tokens of an identity provider (OpenID Connect).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct JwtSpec {
    /// Where its public keys are.
    pub keys: JwksSource,
    /// `iss` of its tokens.
    pub issuer: String,
    /// `aud` of the tokens that are meant for this router.
    pub audience: String,
    /// How they may be signed; never empty.
    pub algorithms: Vec<JwtAlgorithm>,
    /// The claim that names the tenant.
    pub tenant_claim: String,
    /// By how much the clocks may differ.
    pub leeway: Duration,
}

/// Where the public keys of an identity provider are: a JSON Web Key Set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JwksSource {
    /// In a file, read anew when it changes.
    File(PathBuf),
    /// With the provider itself.
    Remote(RemoteJwks),
}

/// Keys that are fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RemoteJwks {
    /// From where; without it, from where the issuer says at `/.well-known/openid-configuration`.
    pub url: Option<String>,
    /// Authority that signed its certificate, and no other is believed; those of the system without.
    pub ca_file: Option<PathBuf>,
    /// Between two fetches.
    pub refresh: Duration,
    /// How long a fetch may take.
    pub timeout: Duration,
}

impl RemoteJwks {
    /// With every default; `url` as there.
    pub fn new(url: Option<String>) -> Self {
        Self { url, ca_file: None, refresh: defaults::JWKS_REFRESH, timeout: defaults::JWKS_TIMEOUT }
    }

    /// Whether what comes from this URL is what its owner sent: over TLS, or from this very host.
    pub fn is_trustworthy(url: &str) -> bool {
        let Some((scheme, rest)) = url.split_once("://") else { return false };
        let authority = rest.split(['/', '?']).next().unwrap_or_default();
        let plain = url.len() <= URL_MAX_BYTES && url.bytes().all(|b| b.is_ascii_graphic() && b != b'\\');
        // What stands before an @ may look like a host, and is none.
        if !plain || authority.is_empty() || authority.contains('@') || url.contains('#') {
            return false;
        }
        match scheme {
            "https" => true,
            "http" => is_loopback(authority),
            _ => false,
        }
    }
}

impl AuthSpec {
    /// Keys alone.
    pub fn new(keys_file: PathBuf, isolation: Isolation) -> Self {
        Self { keys_file, isolation, jwt: None }
    }

    pub(super) fn read(mut section: Section<'_, '_>) -> Option<Self> {
        let keys_file = section.file("keys_file");
        if keys_file.is_none() {
            section.missing("keys_file", "the path of the file of keys");
        }
        let isolation = section.choice("isolation", defaults::ISOLATION);
        let jwt = section.section_if_given("jwt").and_then(JwtSpec::read);
        Some(Self { keys_file: keys_file?, isolation, jwt })
    }
}

impl JwtSpec {
    /// With every default.
    pub fn new(keys: JwksSource, issuer: String, audience: String) -> Self {
        Self {
            keys,
            issuer,
            audience,
            algorithms: defaults::JWT_ALGORITHMS.to_vec(),
            tenant_claim: defaults::TENANT_CLAIM.to_owned(),
            leeway: defaults::JWT_LEEWAY,
        }
    }

    fn read(mut section: Section<'_, '_>) -> Option<Self> {
        let issuer_at = section.position("issuer");
        let issuer = section.required("issuer", "the `iss` of its tokens, as they have it", Text::words);
        let keys = JwksSource::read(&mut section, issuer.as_deref(), issuer_at);
        let audience = section.required("audience", "the `aud` of tokens for this router", Text::words);
        let mut algorithms = Vec::new();
        match section.list("algorithms") {
            None => algorithms.extend_from_slice(defaults::JWT_ALGORITHMS),
            Some(items) if items.is_empty() => {
                let name = section.child("algorithms");
                section.reader.fault(&name, section.at, "is empty", "remove it, or name RS256 or ES256");
            }
            Some(items) => {
                for (path, node) in items {
                    algorithms.extend(read_choice::<JwtAlgorithm>(section.reader, &path, node));
                }
            }
        }
        let path = section.child("tenant_claim");
        let tenant_claim = section.text("tenant_claim", "the name of a claim").unwrap_or_else(|| {
            section.reader.record(path, defaults::TENANT_CLAIM, None);
            defaults::TENANT_CLAIM.to_owned()
        });
        let leeway = section.duration("leeway_ms", 0..=600_000, defaults::JWT_LEEWAY);
        Some(Self { keys: keys?, issuer: issuer?, audience: audience?, algorithms, tenant_claim, leeway })
    }
}

impl JwksSource {
    fn read(
        section: &mut Section<'_, '_>,
        issuer: Option<&str>,
        issuer_at: Option<Position>,
    ) -> Option<Self> {
        let reader = section.reader;
        if section.has("jwks_file") {
            for key in ["jwks_url", "ca_file", "refresh_ms", "timeout_ms"] {
                if section.has(key) {
                    let (problem, remedy) = (
                        "is given beside jwks_file, from which nothing is fetched",
                        "keep jwks_file, or what says how keys are fetched",
                    );
                    reader.fault(&section.child(key), section.position(key), problem, remedy);
                }
                section.take(key);
            }
            return section.file("jwks_file").map(Self::File);
        }
        section.take("jwks_file");
        let expected = "https://HOST/PATH of its JSON Web Key Set; http:// only for a loopback address";
        let given = section.has("jwks_url");
        let url = section.optional("jwks_url", expected, |text| {
            text.words().filter(|url| RemoteJwks::is_trustworthy(url))
        });
        if !given && issuer.is_some_and(|issuer| !RemoteJwks::is_trustworthy(issuer)) {
            let problem = "is no https:// URL, and there is neither jwks_url nor jwks_file: nothing says where its keys are";
            let remedy = "write `jwks_url:` or `jwks_file:`, or the issuer's URL";
            reader.fault(&section.child("issuer"), issuer_at, problem, remedy);
        }
        let ca_file = section.file("ca_file");
        let refresh = section.duration("refresh_ms", 1_000..=86_400_000, defaults::JWKS_REFRESH);
        let timeout = section.duration("timeout_ms", 100..=60_000, defaults::JWKS_TIMEOUT);
        (url.is_some() || !given).then_some(Self::Remote(RemoteJwks { url, ca_file, refresh, timeout }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tls_and_the_own_host_are_trustworthy() {
        let trusted = RemoteJwks::is_trustworthy;
        for good in [
            "https://id.example",
            "https://id.example/realms/a/certs?x=1",
            "http://127.0.0.1:8080/keys",
            "http://[::1]/keys",
            "http://localhost/keys",
        ] {
            assert!(trusted(good), "{good}");
        }
        for bad in [
            "http://id.example/keys",
            "http://127.0.0.1:80@id.example/keys",
            "http://127.0.0.1.id.example/",
            "http://localhost\\@id.example/",
            "https://user:password@id.example/",
            "https://id.example/#keys",
            "https:///keys",
            "https://id.example/a b",
            "ftp://127.0.0.1/",
            "file:///etc/passwd",
            "id.example",
            "",
        ] {
            assert!(!trusted(bad), "{bad}");
        }
    }
}
