//! `router.auth`: who may use the router.

use std::path::PathBuf;
use std::time::Duration;

use super::defaults;
use crate::choice::choice;
use crate::reader::{Section, Text, read_choice};

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
    /// Its public keys: a JSON Web Key Set.
    pub jwks_file: PathBuf,
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
    pub fn new(jwks_file: PathBuf, issuer: String, audience: String) -> Self {
        Self {
            jwks_file,
            issuer,
            audience,
            algorithms: defaults::JWT_ALGORITHMS.to_vec(),
            tenant_claim: defaults::TENANT_CLAIM.to_owned(),
            leeway: defaults::JWT_LEEWAY,
        }
    }

    fn read(mut section: Section<'_, '_>) -> Option<Self> {
        let jwks_file = section.file("jwks_file");
        if jwks_file.is_none() {
            section.missing("jwks_file", "the path of the JSON Web Key Set of the identity provider");
        }
        let issuer = section.required("issuer", "the `iss` of its tokens, as they have it", Text::words);
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
        Some(Self {
            jwks_file: jwks_file?,
            issuer: issuer?,
            audience: audience?,
            algorithms,
            tenant_claim,
            leeway,
        })
    }
}
