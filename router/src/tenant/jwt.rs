//! Tokens of an identity provider (OpenID Connect), checked against its public keys.
//!
//! Signatures are verified with `ring`, which the rest of Baton's TLS uses, too. Only algorithms with a private key are
//! known here at all: there is no `none`, and no shared secret that a public key could be mistaken for. The algorithm of a
//! key comes from the key, not from the token: a token that names another one is refused.

use std::path::Path;
use std::sync::Once;

use baton_config::fleet::{JwtAlgorithm, JwtSpec};
use baton_config::secret::{SecretFault, read_public};
use jsonwebtoken::crypto::{CryptoProvider, JwtVerifier, KeyUtils};
use jsonwebtoken::errors::{Error, ErrorKind};
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, JwkSet, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey, DecodingKeyKind, Validation};
use ring::signature as scheme;
use signature::Verifier;

use super::Denied;

/// Most keys of a provider that are kept.
const KEYS_MAX: usize = 64;

/// Why the keys of an identity provider cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JwksError {
    /// The file cannot be read.
    #[error(transparent)]
    File(#[from] SecretFault),
    /// It holds something else.
    #[error("{origin} is no JSON Web Key Set")]
    Malformed {
        /// The file or URL.
        origin: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// None of its keys can be used.
    #[error("{origin} holds no public key for {algorithms}")]
    Empty {
        /// The file or URL.
        origin: String,
        /// What was looked for.
        algorithms: String,
    },
}

/// What is known of an identity provider.
pub(super) struct Provider {
    keys: Vec<Key>,
    spec: JwtSpec,
}

impl std::fmt::Debug for Provider {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Provider").field("keys", &self.keys.len()).field("issuer", &self.spec.issuer).finish()
    }
}

struct Key {
    id: Option<String>,
    key: DecodingKey,
    /// What it may sign with: one algorithm of elliptic curves, or those of RSA that are allowed.
    algorithms: Vec<Algorithm>,
}

impl Provider {
    /// Reads the keys of a file.
    pub(super) fn load(path: &Path, spec: &JwtSpec) -> Result<Self, JwksError> {
        Self::parse(&read_public(path)?, &path.display().to_string(), spec)
    }

    /// Takes the keys from a JSON Web Key Set that comes from `origin`.
    pub(super) fn parse(json: &[u8], origin: &str, spec: &JwtSpec) -> Result<Self, JwksError> {
        install();
        let set: JwkSet = serde_json::from_slice(json)
            .map_err(|source| JwksError::Malformed { origin: origin.to_owned(), source })?;
        let allowed: Vec<Algorithm> = spec.algorithms.iter().map(|allowed| algorithm(*allowed)).collect();
        let keys: Vec<Key> =
            set.keys.iter().filter_map(|jwk| Key::of(jwk, &allowed)).take(KEYS_MAX).collect();
        if keys.is_empty() {
            let names: Vec<String> = spec.algorithms.iter().map(ToString::to_string).collect();
            return Err(JwksError::Empty { origin: origin.to_owned(), algorithms: names.join(" or ") });
        }
        Ok(Self { keys, spec: spec.clone() })
    }

    /// Keys that tokens may be signed with.
    pub(super) fn size(&self) -> usize {
        self.keys.len()
    }

    /// The tenant that a token names, if the token is good.
    pub(super) fn tenant(&self, token: &str) -> Result<String, Denied> {
        let header = jsonwebtoken::decode_header(token).map_err(|_| Denied::Malformed)?;
        if !self.spec.algorithms.iter().any(|allowed| algorithm(*allowed) == header.alg) {
            return Err(Denied::Token);
        }
        // What a token makes a condition of its validity has to be understood (RFC 7515, section 4.1.11); nothing is here.
        if header.crit.is_some() {
            return Err(Denied::Token);
        }
        let named = |key: &Key| header.kid.is_none() || key.id.is_none() || key.id == header.kid;
        if !self.keys.iter().any(named) {
            return Err(Denied::Signer);
        }
        let fits = |key: &&Key| key.algorithms.contains(&header.alg) && named(key);
        let mut validation = Validation::new(header.alg);
        validation.set_audience(&[&self.spec.audience]);
        validation.set_issuer(&[&self.spec.issuer]);
        validation.set_required_spec_claims(&["exp", "iss", "aud"]);
        validation.validate_nbf = true;
        validation.leeway = self.spec.leeway.as_secs();
        let mut denied = Denied::Token;
        for key in self.keys.iter().filter(fits) {
            type Claims = serde_json::Map<String, serde_json::Value>;
            match jsonwebtoken::decode::<Claims>(token, &key.key, &validation) {
                Ok(good) => {
                    let named = good.claims.get(&self.spec.tenant_claim).and_then(|claim| claim.as_str());
                    return named.map(str::to_owned).ok_or(Denied::Tenant);
                }
                Err(error) if *error.kind() == ErrorKind::ExpiredSignature => denied = Denied::Expired,
                Err(_) => {}
            }
        }
        Err(denied)
    }
}

impl Key {
    /// A key that may sign and is of a kind that is allowed.
    fn of(jwk: &Jwk, allowed: &[Algorithm]) -> Option<Self> {
        if matches!(jwk.common.public_key_use, Some(PublicKeyUse::Encryption)) {
            return None;
        }
        let kind: &[Algorithm] = match &jwk.algorithm {
            AlgorithmParameters::RSA(_) => &[
                Algorithm::RS256,
                Algorithm::RS384,
                Algorithm::RS512,
                Algorithm::PS256,
                Algorithm::PS384,
                Algorithm::PS512,
            ],
            AlgorithmParameters::EllipticCurve(curve) => match curve.curve {
                EllipticCurve::P256 => &[Algorithm::ES256],
                EllipticCurve::P384 => &[Algorithm::ES384],
                _ => &[],
            },
            AlgorithmParameters::OctetKeyPair(pair) => match pair.curve {
                EllipticCurve::Ed25519 => &[Algorithm::EdDSA],
                _ => &[],
            },
            // A shared secret has no place in a set of public keys.
            _ => &[],
        };
        let says = jwk.common.key_algorithm.map(|says| says.to_string());
        let fits = |algorithm: &Algorithm| {
            allowed.contains(algorithm) && says.as_ref().is_none_or(|says| *says == format!("{algorithm:?}"))
        };
        let algorithms: Vec<Algorithm> = kind.iter().copied().filter(fits).collect();
        if algorithms.is_empty() {
            return None;
        }
        let key = DecodingKey::from_jwk(jwk).ok()?;
        Some(Self { id: jwk.common.key_id.clone(), key, algorithms })
    }
}

fn algorithm(allowed: JwtAlgorithm) -> Algorithm {
    match allowed {
        JwtAlgorithm::Rs256 => Algorithm::RS256,
        JwtAlgorithm::Rs384 => Algorithm::RS384,
        JwtAlgorithm::Rs512 => Algorithm::RS512,
        JwtAlgorithm::Ps256 => Algorithm::PS256,
        JwtAlgorithm::Ps384 => Algorithm::PS384,
        JwtAlgorithm::Ps512 => Algorithm::PS512,
        JwtAlgorithm::Es256 => Algorithm::ES256,
        JwtAlgorithm::Es384 => Algorithm::ES384,
        JwtAlgorithm::EdDsa => Algorithm::EdDSA,
    }
}

/// Tells the token library to verify with `ring`; it signs nothing here.
fn install() {
    static ONCE: Once = Once::new();
    static WITH_RING: CryptoProvider = CryptoProvider {
        signer_factory: |_, _| Err(Error::from(ErrorKind::UnsupportedAlgorithm)),
        verifier_factory: |algorithm, key| {
            Ok(Box::new(WithRing {
                algorithm: *algorithm,
                scheme: Scheme::of(*algorithm)?,
                key: key.clone(),
            }))
        },
        key_utils: KeyUtils::new_unimplemented(),
    };
    ONCE.call_once(|| {
        if WITH_RING.install_default().is_err() {
            tracing::debug!("tokens are verified by a provider that was installed before");
        }
    });
}

#[derive(Clone, Copy)]
enum Scheme {
    Rsa(&'static scheme::RsaParameters),
    Raw(&'static dyn scheme::VerificationAlgorithm),
}

impl Scheme {
    fn of(algorithm: Algorithm) -> Result<Self, Error> {
        Ok(match algorithm {
            Algorithm::RS256 => Self::Rsa(&scheme::RSA_PKCS1_2048_8192_SHA256),
            Algorithm::RS384 => Self::Rsa(&scheme::RSA_PKCS1_2048_8192_SHA384),
            Algorithm::RS512 => Self::Rsa(&scheme::RSA_PKCS1_2048_8192_SHA512),
            Algorithm::PS256 => Self::Rsa(&scheme::RSA_PSS_2048_8192_SHA256),
            Algorithm::PS384 => Self::Rsa(&scheme::RSA_PSS_2048_8192_SHA384),
            Algorithm::PS512 => Self::Rsa(&scheme::RSA_PSS_2048_8192_SHA512),
            Algorithm::ES256 => Self::Raw(&scheme::ECDSA_P256_SHA256_FIXED),
            Algorithm::ES384 => Self::Raw(&scheme::ECDSA_P384_SHA384_FIXED),
            Algorithm::EdDSA => Self::Raw(&scheme::ED25519),
            _ => return Err(Error::from(ErrorKind::UnsupportedAlgorithm)),
        })
    }
}

struct WithRing {
    algorithm: Algorithm,
    scheme: Scheme,
    key: DecodingKey,
}

impl Verifier<Vec<u8>> for WithRing {
    fn verify(&self, message: &[u8], signature: &Vec<u8>) -> Result<(), signature::Error> {
        let verified = match (self.scheme, self.key.kind()) {
            (Scheme::Rsa(parameters), DecodingKeyKind::RsaModulusExponent { n, e }) => {
                scheme::RsaPublicKeyComponents { n, e }.verify(parameters, message, signature)
            }
            (Scheme::Raw(algorithm), DecodingKeyKind::SecretOrDer(key)) => {
                scheme::UnparsedPublicKey::new(algorithm, key).verify(message, signature)
            }
            _ => return Err(signature::Error::new()),
        };
        verified.map_err(|_| signature::Error::new())
    }
}

impl JwtVerifier for WithRing {
    fn algorithm(&self) -> Algorithm {
        self.algorithm
    }
}
