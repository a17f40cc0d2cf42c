//! Signs tokens as an identity provider does.

use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _};
use serde_json::{Value, json};

/// Signed by OpenSSL with the private key of [`RSA_MODULUS`]: RS256, good until 2100.
pub(crate) const RSA_TOKEN: &str = "eyJhbGciOiJSUzI1NiIsInR5cCI6IkpXVCIsImtpZCI6InJzYSJ9.eyJpc3MiOiJodHRwczovL2lkLmV4YW1wbGUiLCJhdWQiOiJiYXRvbiIsImV4cCI6NDEwMjQ0NDgwMCwidGVuYW50IjoiYWNtZSJ9.sF-meOisJeDDfhiIruAhh5TitsUBF18NJMqTPqeRfSmh-3duVyx7LuONmUO-Ldjz5-wMF8dJZA9MNXFQvQkIXwp1lHKxkHjR3n6yzoquLDigLdsIQ_Qg3x5Ob_E3icvcpiRj7_a7vRxUWKGP1wU59JyJ4wcWO2u8VUvfUamrmxoemR3Fr-i8G1Fgq92XRkTPE4bzWQwG-JIwzaqHkew1l-_E_uC0LcXSdbY52_zVclrRQb9RXzkgjfXVdJylxLFmHg1eqx-osEMN-Fnmlv0AZ5mV_CMuwZ2XO-iKwRZ2b2yFWNal87uhrYf7CtPjrZx1vA77nfzgQG1VMdJhqjbF1A";
const RSA_MODULUS: &str = "vOGPasAfELUFOuuvwuX1agdalx0lWvhjWYBljhIPpWk6V2B7kHQB5jD1uYE3BaHRa1KRgOW9d2cs73vC6164uAqLHGCFXk94-LHS8bPgo7UElPlRcodVkMZROGrMBoskxMOjXE_rj2ZFwp4HsGYhPqKrZJw2or1QpqvWJCOwRubLQFUnwxaUPwaVsVyS-cMxXbqMZt-j87r5aiNJRaWASE-T-FWKXplxRTufGR-RFyIRlnFw7dwfnvMLQvQdlBj1evJnM34A_51l43RlIOHeAr-Z7yRWXwjIz5X-LXWIEyzrBicvnlOC7v-reqz1wj-ebcZYJs-JJjscsTdU6yp8pw";

pub(crate) fn b64(bytes: &[u8]) -> String {
    const LETTERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let bits =
            chunk.iter().fold(0u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for place in 0..=chunk.len() {
            out.push(LETTERS[(bits >> (18 - 6 * place)) as usize & 63] as char);
        }
    }
    out
}

/// An identity provider with a key of each kind.
pub(crate) struct Issuer {
    ec: EcdsaKeyPair,
    ed: Ed25519KeyPair,
    random: SystemRandom,
}

impl Issuer {
    pub(crate) fn new() -> Self {
        let random = SystemRandom::new();
        let algorithm = &ECDSA_P256_SHA256_FIXED_SIGNING;
        let ec = EcdsaKeyPair::generate_pkcs8(algorithm, &random).unwrap();
        let ec = EcdsaKeyPair::from_pkcs8(algorithm, ec.as_ref(), &random).unwrap();
        let ed =
            Ed25519KeyPair::from_pkcs8(Ed25519KeyPair::generate_pkcs8(&random).unwrap().as_ref()).unwrap();
        Self { ec, ed, random }
    }

    pub(crate) fn jwks(&self) -> String {
        let point = self.ec.public_key().as_ref();
        json!({ "keys": [
            { "kty": "RSA", "kid": "rsa", "use": "sig", "n": RSA_MODULUS, "e": "AQAB" },
            { "kty": "EC", "kid": "ec", "crv": "P-256", "x": b64(&point[1..33]), "y": b64(&point[33..]) },
            { "kty": "OKP", "kid": "ed", "crv": "Ed25519", "x": b64(self.ed.public_key().as_ref()) },
            { "kty": "oct", "kid": "shared", "alg": "HS256", "k": b64(b"a shared secret in a public place") },
        ] })
        .to_string()
    }

    pub(crate) fn token(&self, header: &Value, claims: &Value) -> String {
        let message =
            format!("{}.{}", b64(header.to_string().as_bytes()), b64(claims.to_string().as_bytes()));
        let signature = match header["alg"].as_str() {
            Some("ES256") => self.ec.sign(&self.random, message.as_bytes()).unwrap().as_ref().to_vec(),
            Some("EdDSA") => self.ed.sign(message.as_bytes()).as_ref().to_vec(),
            Some("HS256") => {
                let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, b"a shared secret in a public place");
                ring::hmac::sign(&key, message.as_bytes()).as_ref().to_vec()
            }
            _ => Vec::new(),
        };
        format!("{message}.{}", b64(&signature))
    }
}
