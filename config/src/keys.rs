//! The file of keys: tenants, what they may use, and their API keys by hash.
//!
//! A key is `bk-ID-SECRET`. The file holds the id, by which a key is found, and a keyed hash of the secret: whoever reads
//! the file learns no key. The file is read anew when it changes, so it has no `${NAME}` and no includes: what stands there
//! is all there is.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use crate::fault::Faults;
use crate::reader::{Reader, Section, Text};
use crate::secret::read_public;
use crate::yaml;

/// How a key begins.
pub const KEY_PREFIX: &str = "bk-";
/// How a hash begins: HMAC-SHA-256 of the secret, keyed with a salt of its own.
pub const HASH_SCHEME: &str = "hmac-sha256";
/// Bytes of a salt.
pub const SALT_BYTES: usize = 16;
/// Bytes of a hash.
pub const HASH_BYTES: usize = 32;
/// Largest weight of a tenant.
pub const WEIGHT_MAX: u32 = 1000;
/// Highest priority of a tenant.
pub const PRIORITY_MAX: u32 = 9;

/// Largest rate and count.
const RATE_MAX: u64 = 1_000_000_000_000;

/// A whole file of keys; ids and names of tenants are unique in it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct KeysFile {
    /// In the order of the file.
    pub tenants: Vec<Tenant>,
}

/// Somebody who shares the fleet with others.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Tenant {
    /// 1 to 64 characters of a-z, 0-9, `-`, `_` and `.`; a label of metrics.
    pub name: String,
    /// Its share of the fleet, in tokens, beside the weights of the others.
    pub weight: u32,
    /// Requests of a higher one go first.
    pub priority: u32,
    /// Whether its keys may ask for what is meant for operators.
    pub admin: bool,
    /// Longest time its requests wait for a place; the router's own limit without.
    pub max_wait: Option<Duration>,
    /// Limits of each of its keys that has none of its own, and of its tokens of an identity provider together.
    pub limits: Quota,
    /// Its keys; may be empty where an identity provider vouches for it.
    pub keys: Vec<KeyEntry>,
}

/// What one key may use; nothing is limited where it says nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Quota {
    /// Requests in a minute.
    pub requests_per_min: Option<u64>,
    /// Tokens of prompts and answers in a minute.
    pub tokens_per_min: Option<u64>,
    /// Requests at once, waiting ones included.
    pub concurrency: Option<u32>,
}

/// One key.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct KeyEntry {
    /// By which it is found; 4 to 32 characters of a-z and 0-9.
    pub id: String,
    /// Keys the hash.
    pub salt: [u8; SALT_BYTES],
    /// Of the secret.
    pub hash: [u8; HASH_BYTES],
    /// Seconds since 1970 after which it is refused.
    pub expires: Option<u64>,
    /// What it may use.
    pub limits: Quota,
}

/// Tells one state of a file from another without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    changed: (i64, i64),
    bytes: u64,
    inode: (u64, u64),
}

impl Stamp {
    /// The stamp of a file; `None` when it cannot be looked at.
    pub fn of(path: &Path) -> Option<Self> {
        let found = fs::metadata(path).ok()?;
        Some(Self {
            changed: (found.mtime(), found.mtime_nsec()),
            bytes: found.len(),
            inode: (found.dev(), found.ino()),
        })
    }
}

impl KeysFile {
    /// Reads a file of keys and checks all of it.
    ///
    /// # Errors
    /// Every fault of the file, together. No message repeats a hash or what may be a key.
    pub fn load(path: &Path) -> Result<Self, Faults> {
        let bytes = read_public(path).map_err(|error| {
            let mut problem = error.to_string();
            let mut cause = std::error::Error::source(&error);
            while let Some(error) = cause {
                problem.push_str(": ");
                problem.push_str(&error.to_string());
                cause = error.source();
            }
            Faults::unreadable(path, problem)
        })?;
        let Ok(text) = String::from_utf8(bytes) else {
            return Err(Faults::unreadable(path, "is not text (UTF-8)"));
        };
        Self::parse(&text, &path.display().to_string())
    }

    /// Reads a file of keys from text; `name` is how faults name it.
    ///
    /// # Errors
    /// As [`KeysFile::load`].
    pub fn parse(text: &str, name: &str) -> Result<Self, Faults> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let root = yaml::parse(text).map_err(|fault| Faults::new(name, vec![fault]))?;
        let reader = Reader::new(&|_| None, None);
        let mut document = Section::open(&reader, String::new(), root);
        let version = "1, the only version there is";
        document.required("version", version, |text| text.integer().filter(|version| *version == 1));
        let tenants = document.list("tenants").unwrap_or_default();
        let tenants: Vec<(String, Tenant)> = tenants
            .into_iter()
            .filter_map(|(path, node)| {
                let section = Section::open(&reader, path.clone(), node);
                Some((path, Tenant::read(section)?))
            })
            .collect();
        drop(document);
        unique(&reader, &tenants);
        let (faults, _) = reader.finish();
        if faults.is_empty() {
            Ok(Self { tenants: tenants.into_iter().map(|(_, tenant)| tenant).collect() })
        } else {
            Err(Faults::new(name, faults))
        }
    }
}

fn unique(reader: &Reader<'_>, tenants: &[(String, Tenant)]) {
    let mut names = HashSet::new();
    let mut ids: HashMap<&str, &str> = HashMap::new();
    for (path, tenant) in tenants {
        if !names.insert(tenant.name.as_str()) {
            let name = format!("{path}.name");
            let problem = format!("{} occurs a second time", tenant.name);
            reader.fault(&name, reader.position(&name), problem, "put all keys of a tenant into one entry");
        }
        for (i, key) in tenant.keys.iter().enumerate() {
            if let Some(owner) = ids.insert(&key.id, &tenant.name) {
                let name = format!("{path}.keys[{i}].id");
                let problem = format!("{} is a key of {owner} already", key.id);
                let remedy = "make another key with `baton key new`";
                reader.fault(&name, reader.position(&name), problem, remedy);
            }
        }
    }
}

impl Tenant {
    fn read(mut section: Section<'_, '_>) -> Option<Self> {
        let name = section.required("name", "1 to 64 characters of a-z, 0-9, -, _ and .", tenant_name);
        let weight = section.count("weight", 1..=WEIGHT_MAX, 1);
        let priority = section.count("priority", 0..=PRIORITY_MAX, 0);
        let admin = section.flag("admin", false);
        let max_wait = section
            .optional("max_wait_ms", "a whole number from 1 to 3600000", |text| {
                text.integer().filter(|ms| (1..=3_600_000).contains(ms))
            })
            .map(Duration::from_millis);
        let limits = Quota::read(section.section("limits"));
        let keys = section.list("keys").unwrap_or_default();
        let reader = section.reader;
        let keys = keys
            .into_iter()
            .filter_map(|(path, node)| KeyEntry::read(Section::open(reader, path, node), limits))
            .collect();
        Some(Self { name: name?, weight, priority, admin, max_wait, limits, keys })
    }
}

impl Quota {
    fn read(mut section: Section<'_, '_>) -> Self {
        let rate = "a whole number from 1 to 1000000000000";
        let number = |text: &Text| text.integer().filter(|n| (1..=RATE_MAX).contains(n));
        let requests_per_min = section.optional("requests_per_min", rate, number);
        let tokens_per_min = section.optional("tokens_per_min", rate, number);
        let concurrency = section.optional("concurrency", "a whole number from 1 to 1000000", |text| {
            text.integer().filter(|n| (1..=1_000_000).contains(n)).and_then(|n| u32::try_from(n).ok())
        });
        Self { requests_per_min, tokens_per_min, concurrency }
    }

    /// This, and where it says nothing what `other` says.
    fn or(self, other: Self) -> Self {
        Self {
            requests_per_min: self.requests_per_min.or(other.requests_per_min),
            tokens_per_min: self.tokens_per_min.or(other.tokens_per_min),
            concurrency: self.concurrency.or(other.concurrency),
        }
    }
}

impl KeyEntry {
    fn read(mut section: Section<'_, '_>, of_tenant: Quota) -> Option<Self> {
        // Both are read whatever they are, so that no message shows what may be a key that was pasted by mistake.
        let at = section.position("id");
        let id = section.required("id", "4 to 32 characters of a-z and 0-9", |text| Some(key_id(text)));
        if let Some(None) = id {
            let (name, remedy) = (section.child("id"), "paste the line that `baton key new` prints");
            section.reader.fault(&name, at, "is not 4 to 32 characters of a-z and 0-9", remedy);
        }
        let at = section.position("hash");
        let hash = section.required("hash", "the hash that `baton key new` prints", |text| {
            Some(parse_hash(text.text.trim()))
        });
        if let Some(None) = hash {
            let (name, remedy) = (section.child("hash"), "paste the line that `baton key new` prints");
            section.reader.fault(&name, at, format!("is not {HASH_SCHEME}:SALT:HASH"), remedy);
        }
        let expected = "a day like 2027-12-31, or a time like 2027-12-31T18:00:00Z";
        let expires = section.optional("expires", expected, |text| parse_time(text.text.trim()));
        let limits = Quota::read(section.section("limits")).or(of_tenant);
        let (salt, hash) = hash??;
        Some(Self { id: id??, salt, hash, expires, limits })
    }

    /// The entry as a line of the file.
    pub fn line(&self) -> String {
        let (salt, hash) = (Hex(&self.salt), Hex(&self.hash));
        format!("- {{ id: {}, hash: \"{HASH_SCHEME}:{salt}:{hash}\" }}", self.id)
    }

    /// An entry without an end and without limits of its own.
    pub fn new(id: String, salt: [u8; SALT_BYTES], hash: [u8; HASH_BYTES]) -> Self {
        Self { id, salt, hash, expires: None, limits: Quota::default() }
    }
}

struct Hex<'a>(&'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A name fit for a tenant.
pub fn is_tenant_name(name: &str) -> bool {
    let fits = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_' | b'.');
    (1..=64).contains(&name.len()) && name.bytes().all(fits)
}

fn tenant_name(text: &Text) -> Option<String> {
    is_tenant_name(&text.text).then(|| text.text.clone())
}

fn key_id(text: &Text) -> Option<String> {
    let id = &text.text;
    let fits =
        (4..=32).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    fits.then(|| id.clone())
}

fn parse_hash(text: &str) -> Option<([u8; SALT_BYTES], [u8; HASH_BYTES])> {
    let mut parts = text.split(':');
    let (scheme, salt, hash) = (parts.next()?, parts.next()?, parts.next()?);
    if scheme != HASH_SCHEME || parts.next().is_some() {
        return None;
    }
    Some((parse_hex(salt)?, parse_hex(hash)?))
}

fn parse_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    if text.len() != 2 * N || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    let mut out = [0; N];
    for (i, byte) in out.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).ok()?;
    }
    Some(out)
}

/// Seconds since 1970 of a day (its end) or of a time in UTC.
fn parse_time(text: &str) -> Option<u64> {
    let (day, time) = match text.split_once('T') {
        Some((day, time)) => (day, Some(time.strip_suffix('Z')?)),
        None => (text, None),
    };
    let number = |text: &str, digits: usize| {
        (text.len() == digits && text.bytes().all(|b| b.is_ascii_digit()))
            .then(|| text.parse::<i64>().ok())?
    };
    let mut parts = day.split('-');
    let (year, month, of_month) =
        (number(parts.next()?, 4)?, number(parts.next()?, 2)?, number(parts.next()?, 2)?);
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let longest = match month {
        4 | 6 | 9 | 11 => 30,
        2 => 28 + i64::from(leap),
        1..=12 => 31,
        _ => return None,
    };
    if parts.next().is_some() || year < 1970 || !(1..=longest).contains(&of_month) {
        return None;
    }
    let seconds = match time {
        // Good until the day is over.
        None => 86_400,
        Some(time) => {
            let mut parts = time.split(':');
            let (hour, minute, second) =
                (number(parts.next()?, 2)?, number(parts.next()?, 2)?, number(parts.next()?, 2)?);
            if parts.next().is_some() || hour > 23 || minute > 59 || second > 59 {
                return None;
            }
            hour * 3600 + minute * 60 + second
        }
    };
    u64::try_from(days_since_1970(year, month, of_month) * 86_400 + seconds).ok()
}

/// Days from 1970-01-01 to a day of the Gregorian calendar, counted from March so that leap days come last.
fn days_since_1970(year: i64, month: i64, of_month: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + of_month - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

#[cfg(test)]
mod tests;
