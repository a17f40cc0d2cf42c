//! The token that the agents of a fleet share, and what it proves: who connects, and that frames are theirs.
//!
//! The token itself never travels. A handshake exchanges nonces; each side proves that it knows the token by a code
//! (HMAC-SHA256) over both nonces, both names, the epochs and the process meant. Both derive one key per direction
//! from the same, and every later frame carries a code (16 bytes of HMAC-SHA256) over its number, header and payload:
//! nothing can be forged, replayed, reordered or left out unnoticed. Nothing is encrypted.

use std::fmt;
use std::sync::Arc;

use baton_config::Epoch;
use hmac::{Hmac, KeyInit, Mac as _};
use sha2::{Digest, Sha256};

use crate::wire::{HEADER_BYTES, Hello, MAC_BYTES, NONCE_BYTES, PROOF_BYTES};

/// Fewest characters of a token.
pub const TOKEN_MIN_CHARS: usize = 32;
/// Most bytes of a token's file.
pub const TOKEN_MAX_BYTES: usize = 4096;
/// Fewest different characters of a token: random ones have more, placeholders have fewer.
const DISTINCT_MIN: usize = 10;
const KEY_BYTES: usize = 32;

/// Why bytes are no token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Too few characters, white space at the ends not counted.
    #[error("the token has {chars} characters, at least {TOKEN_MIN_CHARS} random ones are needed")]
    Short {
        /// Characters there are.
        chars: usize,
    },
    /// No token is that long.
    #[error("the token is longer than {TOKEN_MAX_BYTES} bytes")]
    Long,
    /// Too few different characters to be random.
    #[error("the token repeats few characters, at least {TOKEN_MIN_CHARS} random ones are needed")]
    Guessable,
}

/// A secret shared by all agents of a fleet. Clones share it; it is never shown.
#[derive(Clone)]
pub struct Token(Arc<Secret>);

struct Secret([u8; KEY_BYTES]);

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.fill(0);
        // Looked at, so that the zeros are written.
        std::hint::black_box(&self.0);
    }
}

impl Token {
    /// Takes the bytes of a token's file; white space around the token does not belong to it.
    ///
    /// # Errors
    /// When it is too short or too uniform to be a secret.
    pub fn from_file_bytes(bytes: &[u8]) -> Result<Self, TokenError> {
        if bytes.len() > TOKEN_MAX_BYTES {
            return Err(TokenError::Long);
        }
        let token = bytes.trim_ascii();
        let chars = std::str::from_utf8(token).map_or(token.len(), |text| text.chars().count());
        if chars < TOKEN_MIN_CHARS {
            return Err(TokenError::Short { chars });
        }
        let mut seen = [false; 256];
        token.iter().for_each(|byte| seen[usize::from(*byte)] = true);
        if seen.iter().filter(|seen| **seen).count() < DISTINCT_MIN {
            return Err(TokenError::Guessable);
        }
        let mut hash = Sha256::new();
        hash.update(b"baton transfer token");
        hash.update(token);
        Ok(Self(Arc::new(Secret(hash.finalize().into()))))
    }

    fn code(&self, label: &[u8]) -> Hmac<Sha256> {
        let mut code = keyed(&self.0.0);
        code.update(label);
        code
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(secret)")
    }
}

fn keyed(key: &[u8; KEY_BYTES]) -> Hmac<Sha256> {
    // A key of a whole block; shorter ones are filled up with zeros, as HMAC does.
    let mut block = [0; 64];
    block[..KEY_BYTES].copy_from_slice(key);
    Hmac::new(&block.into())
}

/// What both sides of a handshake know and nobody can make equal to another handshake's.
pub(crate) struct Transcript<'a> {
    token: &'a Token,
    bytes: Vec<u8>,
}

impl<'a> Transcript<'a> {
    /// Of a hello (which holds the client's nonce) meant for `epoch`, answered with the server's nonce.
    pub(crate) fn new(token: &'a Token, epoch: Epoch, hello: &Hello, server: &[u8; NONCE_BYTES]) -> Self {
        let mut bytes = Vec::with_capacity(256);
        bytes.extend_from_slice(&epoch.0.to_le_bytes());
        bytes.extend_from_slice(server);
        bytes.extend(hello.encode());
        Self { token, bytes }
    }

    fn code(&self, label: &[u8]) -> Hmac<Sha256> {
        let mut code = self.token.code(label);
        code.update(&self.bytes);
        code
    }

    pub(crate) fn client_proof(&self) -> [u8; PROOF_BYTES] {
        self.code(b"client proof").finalize().into_bytes().into()
    }

    pub(crate) fn server_proof(&self) -> [u8; PROOF_BYTES] {
        self.code(b"server proof").finalize().into_bytes().into()
    }

    /// Compares in constant time.
    pub(crate) fn is_client_proof(&self, proof: &[u8]) -> bool {
        self.code(b"client proof").verify_slice(proof).is_ok()
    }

    /// Compares in constant time.
    pub(crate) fn is_server_proof(&self, proof: &[u8]) -> bool {
        self.code(b"server proof").verify_slice(proof).is_ok()
    }

    /// What signs frames to the server.
    pub(crate) fn to_server(&self) -> Mac {
        Mac::new(self.code(b"frames to the server"))
    }

    /// What signs frames to the client.
    pub(crate) fn to_client(&self) -> Mac {
        Mac::new(self.code(b"frames to the client"))
    }
}

/// Signs or checks the frames of one direction of a connection, in order.
pub(crate) struct Mac {
    keyed: Hmac<Sha256>,
    next: u64,
}

impl Mac {
    fn new(key: Hmac<Sha256>) -> Self {
        Self { keyed: keyed(&key.finalize().into_bytes().into()), next: 0 }
    }

    fn code(&mut self, head: &[u8; HEADER_BYTES], payload: &[u8]) -> Hmac<Sha256> {
        let mut code = self.keyed.clone();
        code.update(&self.next.to_le_bytes());
        code.update(head);
        code.update(payload);
        self.next += 1;
        code
    }

    /// The code of the next frame.
    pub(crate) fn sign(&mut self, head: &[u8; HEADER_BYTES], payload: &[u8]) -> [u8; MAC_BYTES] {
        let code: [u8; PROOF_BYTES] = self.code(head, payload).finalize().into_bytes().into();
        let mut short = [0; MAC_BYTES];
        short.copy_from_slice(&code[..MAC_BYTES]);
        short
    }

    /// Whether the next frame is the one its sender signed. Compares in constant time.
    pub(crate) fn check(&mut self, head: &[u8; HEADER_BYTES], payload: &[u8], mac: &[u8; MAC_BYTES]) -> bool {
        self.code(head, payload).verify_truncated_left(mac).is_ok()
    }
}

/// Random bytes nobody can foresee.
pub(crate) fn nonce() -> std::io::Result<[u8; NONCE_BYTES]> {
    let mut bytes = [0; NONCE_BYTES];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &[u8] = b"  k7Jw0pQx9ZfLr2TnVb5Ys8HdMc3Ge6Ua\n";

    #[test]
    fn tokens_are_long_random_and_never_shown() {
        let token = Token::from_file_bytes(GOOD).unwrap();
        assert_eq!(format!("{token:?}"), "Token(secret)");
        assert_eq!(token.0.0, Token::from_file_bytes(GOOD.trim_ascii()).unwrap().0.0);
        assert_eq!(Token::from_file_bytes(&GOOD[..30]).unwrap_err(), TokenError::Short { chars: 28 });
        assert_eq!(Token::from_file_bytes(&[b'x'; 64]).unwrap_err(), TokenError::Guessable);
        assert_eq!(Token::from_file_bytes(&[b'x'; 5000]).unwrap_err(), TokenError::Long);
    }

    #[test]
    fn codes_hold_for_one_frame_at_one_place_in_one_direction() {
        let token = Token::from_file_bytes(GOOD).unwrap();
        let hello = Hello {
            from: "a".parse().unwrap(),
            from_epoch: Epoch(1),
            to: "b".parse().unwrap(),
            incarnation: 3,
            nonce: Some([7; NONCE_BYTES]),
        };
        let transcript = Transcript::new(&token, Epoch(2), &hello, &[9; NONCE_BYTES]);
        let head = [5; HEADER_BYTES];
        let signed = transcript.to_server().sign(&head, b"payload");
        assert!(transcript.to_server().check(&head, b"payload", &signed));
        assert!(!transcript.to_server().check(&head, b"paylord", &signed));
        assert!(!transcript.to_server().check(&[6; HEADER_BYTES], b"payload", &signed));
        assert!(!transcript.to_client().check(&head, b"payload", &signed), "the other direction");
        let mut later = transcript.to_server();
        later.sign(&head, b"first");
        assert!(!later.check(&head, b"payload", &signed), "another place in the stream");
        for (epoch, hello, nonce) in [
            (Epoch(3), hello.clone(), [9; NONCE_BYTES]),
            (Epoch(2), hello.clone(), [8; NONCE_BYTES]),
            (Epoch(2), Hello { incarnation: 4, ..hello.clone() }, [9; NONCE_BYTES]),
            (Epoch(2), Hello { from: "c".parse().unwrap(), ..hello.clone() }, [9; NONCE_BYTES]),
        ] {
            let other = Transcript::new(&token, epoch, &hello, &nonce);
            assert!(!other.is_client_proof(&transcript.client_proof()));
            assert!(!other.to_server().check(&head, b"payload", &signed));
        }
        assert!(transcript.is_client_proof(&transcript.client_proof()));
        assert!(transcript.is_server_proof(&transcript.server_proof()));
        assert!(!transcript.is_server_proof(&transcript.client_proof()), "a proof cannot be sent back");
    }
}
