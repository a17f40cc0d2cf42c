//! Files that hold secrets and certificates: read whole, within bounds, and secrets only if strangers cannot read them.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Fewest characters of a token.
pub const TOKEN_MIN_CHARS: usize = 32;
/// Most characters of a token.
pub const TOKEN_MAX_CHARS: usize = 1024;
/// Tokens a file may hold: the one in use, and the one before or after it.
pub const TOKENS_MAX: usize = 2;
/// Most characters of a key of another service.
const API_KEY_MAX_CHARS: usize = 4096;
/// Largest file read: a bundle of authorities.
const FILE_MAX_BYTES: u64 = 4 << 20;
/// Fewest different characters of a token: random ones have more, placeholders have fewer.
const DISTINCT_MIN: usize = 10;
/// The permission of everybody who is neither the owner nor of the group.
const OTHERS: u32 = 0o007;

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SecretFault {
    /// The system does not let us.
    #[error("{} cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A directory, a pipe, a device.
    #[error("{} is not a file", path.display())]
    NotAFile {
        /// What it is called.
        path: PathBuf,
    },
    /// Every user of the machine can read or change it.
    #[error(
        "{} holds a secret and is open to every user of this machine (mode {mode:04o}): chmod o-rwx it; of a Kubernetes secret, set defaultMode: 0440",
        path.display()
    )]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// Nothing like it is that large.
    #[error("{} has more than {FILE_MAX_BYTES} bytes", path.display())]
    Large {
        /// The file.
        path: PathBuf,
    },
    /// There is no token in it.
    #[error("{} is empty: write a token of at least {TOKEN_MIN_CHARS} random characters into it", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// More lines than tokens may be in use at once.
    #[error("{} holds {lines} tokens, at most {TOKENS_MAX} may be in use at once", path.display())]
    Many {
        /// The file.
        path: PathBuf,
        /// How many.
        lines: usize,
    },
    /// What stands there is no key of a service.
    #[error("{} holds no API key: {what}; write the key alone into it", path.display())]
    ApiKey {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// What stands there is no token.
    #[error(
        "line {line} of {} is no token: {what}; write {TOKEN_MIN_CHARS} to {TOKEN_MAX_CHARS} random letters and digits",
        path.display()
    )]
    Token {
        /// The file.
        path: PathBuf,
        /// Which line, from 1.
        line: usize,
        /// What is wrong with it.
        what: &'static str,
    },
}

/// A secret that is shown to nobody.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// The secret itself.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(secret)")
    }
}

/// The tokens of a file, one a line: the first is the one to show, each is to be accepted. Never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokens(Vec<Token>);

impl Tokens {
    /// Reads a file of one or two tokens. Empty lines and white space around a token do not count.
    ///
    /// # Errors
    /// When it cannot be read, others can read it too, or what it holds cannot be a secret.
    pub fn load(path: &Path) -> Result<Self, SecretFault> {
        let bytes = read_secret(path)?;
        let text = String::from_utf8_lossy(&bytes);
        let mut tokens: Vec<Token> = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let token = line.trim();
            if token.is_empty() {
                continue;
            }
            if let Some(what) = token_fault(token) {
                return Err(SecretFault::Token { path: path.to_owned(), line: index + 1, what });
            }
            tokens.push(Token(token.to_owned()));
        }
        match tokens.len() {
            0 => Err(SecretFault::Empty { path: path.to_owned() }),
            1..=TOKENS_MAX => Ok(Self(tokens)),
            lines => Err(SecretFault::Many { path: path.to_owned(), lines }),
        }
    }

    /// The one to show.
    pub fn shown(&self) -> &Token {
        &self.0[0]
    }

    /// All that are accepted.
    pub fn accepted(&self) -> &[Token] {
        &self.0
    }
}

fn token_fault(token: &str) -> Option<&'static str> {
    let mut seen = [false; 128];
    for byte in token.bytes() {
        // What an `authorization` header can carry.
        if !byte.is_ascii_graphic() {
            return Some("it has characters that are not printable ASCII");
        }
        seen[usize::from(byte)] = true;
    }
    match token.len() {
        0..TOKEN_MIN_CHARS => Some("it is too short"),
        TOKEN_MIN_CHARS..=TOKEN_MAX_CHARS => {
            let distinct = seen.iter().filter(|seen| **seen).count();
            (distinct < DISTINCT_MIN).then_some("it repeats few characters")
        }
        _ => Some("it is too long"),
    }
}

/// Reads a file that holds the key of somebody else's service: one line, whatever that service calls a key.
///
/// # Errors
/// When it cannot be read, others can read it too, or a header could not carry what it holds.
pub fn read_api_key(path: &Path) -> Result<Token, SecretFault> {
    let bytes = read_secret(path)?;
    let text = String::from_utf8_lossy(&bytes);
    let key = text.trim();
    let what = match key.len() {
        0 => Some("it is empty"),
        1..=API_KEY_MAX_CHARS if key.bytes().all(|byte| byte.is_ascii_graphic()) => None,
        1..=API_KEY_MAX_CHARS => Some("it has characters that are not printable ASCII"),
        _ => Some("it is too long"),
    };
    match what {
        None => Ok(Token(key.to_owned())),
        Some(what) => Err(SecretFault::ApiKey { path: path.to_owned(), what }),
    }
}

/// Reads a file that holds a secret.
///
/// # Errors
/// When it cannot be read, or every user of the machine can read it.
pub fn read_secret(path: &Path) -> Result<Vec<u8>, SecretFault> {
    read(path, true)
}

/// Reads a file that anybody may know, a certificate say.
///
/// # Errors
/// When it cannot be read.
pub fn read_public(path: &Path) -> Result<Vec<u8>, SecretFault> {
    read(path, false)
}

fn read(path: &Path, secret: bool) -> Result<Vec<u8>, SecretFault> {
    let unreadable = |source| SecretFault::Read { path: path.to_owned(), source };
    let found = std::fs::metadata(path).map_err(unreadable)?;
    // Asked before it is opened: opening a pipe waits for its other end.
    if !found.is_file() {
        return Err(SecretFault::NotAFile { path: path.to_owned() });
    }
    let file = File::open(path).map_err(unreadable)?;
    let mode = file.metadata().map_err(unreadable)?.permissions().mode() & 0o7777;
    if secret && mode & OTHERS != 0 {
        return Err(SecretFault::Exposed { path: path.to_owned(), mode });
    }
    let mut bytes = Vec::new();
    file.take(FILE_MAX_BYTES + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > FILE_MAX_BYTES {
        return Err(SecretFault::Large { path: path.to_owned() });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::fs::{Permissions, set_permissions, write};

    use super::*;

    const ONE: &str = "k7Jw0pQx9ZfLr2TnVb5Ys8HdMc3Ge6Ua";
    const TWO: &str = "Zq4Xn8Rb1Kd6Wm3Ty9Hv5Lc2Pf7Js0Ge";

    fn load(content: &str, mode: u32) -> Result<Tokens, SecretFault> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        write(&path, content).unwrap();
        set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        Tokens::load(&path)
    }

    #[test]
    fn a_file_holds_one_token_or_two() {
        let one = load(&format!("  {ONE}\r\n"), 0o600).unwrap();
        assert_eq!((one.shown().reveal(), one.accepted().len()), (ONE, 1));
        let two = load(&format!("\n{TWO}\n{ONE}"), 0o440).unwrap();
        assert_eq!((two.shown().reveal(), two.accepted()[1].reveal()), (TWO, ONE));
        assert_eq!(format!("{two:?}"), "Tokens([Token(secret), Token(secret)])");
    }

    #[test]
    fn an_api_key_is_one_word_of_any_length() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        let read = |content: &str, mode: u32| {
            write(&path, content).unwrap();
            set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            read_api_key(&path)
        };
        assert_eq!(read("EMPTY\n", 0o600).unwrap().reveal(), "EMPTY");
        for (content, mode, expected) in [
            ("", 0o600, "it is empty"),
            ("a b", 0o600, "not printable"),
            ("sk-x", 0o644, "open to every user"),
        ] {
            let error = read(content, mode).unwrap_err().to_string();
            assert!(error.contains(expected), "{expected:?} in {error}");
        }
    }

    #[test]
    fn what_cannot_be_a_secret_is_refused_and_never_shown() {
        let long = "x9".repeat(600);
        for (content, mode, expected) in [
            (ONE, 0o644, "open to every user of this machine (mode 0644): chmod o-rwx"),
            (ONE, 0o602, "mode 0602"),
            ("", 0o600, "is empty"),
            (" \n\t\n", 0o600, "is empty"),
            (&ONE[..31], 0o600, "line 1 of"),
            (&format!("{ONE}\n\n{}", "ab".repeat(20)), 0o600, "line 3 of"),
            (&format!("{ONE} {ONE}"), 0o600, "not printable ASCII"),
            ("\u{e9}\u{e9}k7Jw0pQx9ZfLr2TnVb5Ys8HdMc3Ge6Ua", 0o600, "not printable ASCII"),
            (&long, 0o600, "it is too long"),
            (&format!("{ONE}\n{TWO}\n{ONE}"), 0o600, "holds 3 tokens, at most 2"),
        ] {
            let error = load(content, mode).unwrap_err().to_string();
            assert!(error.contains(expected), "{expected:?} in {error}");
            assert!(!error.contains(&ONE[..20]), "{error}");
        }
        let missing = Tokens::load(Path::new("/nonexistent/token")).unwrap_err();
        assert_eq!(missing.to_string(), "/nonexistent/token cannot be read");
        let folder = Tokens::load(Path::new("/tmp")).unwrap_err();
        assert_eq!(folder.to_string(), "/tmp is not a file");
    }
}
