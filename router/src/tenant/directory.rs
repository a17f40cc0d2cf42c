//! All keys and tenants of one state of the file.

use std::collections::HashMap;
use std::sync::Arc;

use baton_config::keys::{HASH_BYTES, KEY_PREFIX, KeyEntry, KeysFile, SALT_BYTES, is_tenant_name};
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

use super::{Denied, Principal, Tenant};

/// Random bytes of a key's id.
const ID_BYTES: usize = 6;
/// Random bytes of a key's secret.
const SECRET_BYTES: usize = 32;

/// Finds who a key or a tenant's name belongs to.
#[derive(Debug, Default)]
pub(super) struct Directory {
    keys: HashMap<String, Record>,
    tenants: HashMap<Arc<str>, Arc<Principal>>,
}

#[derive(Debug)]
struct Record {
    salt: [u8; SALT_BYTES],
    hash: [u8; HASH_BYTES],
    expires: Option<u64>,
    principal: Arc<Principal>,
}

impl Directory {
    /// Of a file; `label` gives the name of a tenant in metrics.
    pub(super) fn new(file: &KeysFile, mut label: impl FnMut(&str) -> Arc<str>) -> Self {
        let mut directory = Self::default();
        for given in &file.tenants {
            let tenant = Arc::new(Tenant {
                name: Arc::from(given.name.as_str()),
                label: label(&given.name),
                weight: given.weight,
                priority: given.priority,
                admin: given.admin,
                max_wait: given.max_wait,
            });
            for key in &given.keys {
                let principal = Principal {
                    tenant: Arc::clone(&tenant),
                    ledger: Arc::from(format!("key {}", key.id)),
                    quota: key.limits,
                };
                let record = Record {
                    salt: key.salt,
                    hash: key.hash,
                    expires: key.expires,
                    principal: Arc::new(principal),
                };
                directory.keys.insert(key.id.clone(), record);
            }
            let ledger = Arc::from(format!("tokens of {}", given.name));
            let whole = Principal { tenant: Arc::clone(&tenant), ledger, quota: given.limits };
            directory.tenants.insert(Arc::clone(&tenant.name), Arc::new(whole));
        }
        directory
    }

    /// Whose key it is at `now`, in seconds since 1970.
    pub(super) fn of_key(&self, key: &str, now: u64) -> Result<Arc<Principal>, Denied> {
        let (id, secret) = split(key).ok_or(Denied::Malformed)?;
        // Ids are no secret: they stand in logs and in the file. The secret is compared by its hash, in constant time.
        let record = self.keys.get(id).ok_or(Denied::Unknown)?;
        let mac = keyed(&record.salt, secret).ok_or(Denied::Unknown)?;
        mac.verify_slice(&record.hash).map_err(|_| Denied::Unknown)?;
        if record.expires.is_some_and(|expires| now >= expires) {
            return Err(Denied::Expired);
        }
        Ok(Arc::clone(&record.principal))
    }

    /// The tenant of that name as a whole.
    pub(super) fn of_tenant(&self, name: &str) -> Option<Arc<Principal>> {
        self.tenants.get(name).cloned()
    }

    /// Tenants and keys.
    pub(super) fn size(&self) -> (usize, usize) {
        (self.tenants.len(), self.keys.len())
    }
}

fn split(key: &str) -> Option<(&str, &str)> {
    key.strip_prefix(KEY_PREFIX)?.split_once('-').filter(|(id, secret)| !id.is_empty() && !secret.is_empty())
}

fn keyed(salt: &[u8], secret: &str) -> Option<Hmac<Sha256>> {
    let mut mac = Hmac::<Sha256>::new_from_slice(salt).ok()?;
    mac.update(secret.as_bytes());
    Some(mac)
}

/// Why no key could be made.
#[derive(Debug, thiserror::Error)]
pub enum MintError {
    /// The name is not fit for a tenant.
    #[error("{0:?} is no name of a tenant: use 1 to 64 characters of a-z, 0-9, -, _ and .")]
    Tenant(String),
    /// The system gives no random numbers.
    #[error("the system gives no random numbers")]
    Entropy(#[from] getrandom::Error),
}

/// A new key. Whoever has `key` can use the router; it exists nowhere else.
pub struct MintedKey {
    /// What the client sends.
    pub key: String,
    /// What goes into the file of keys, below `keys:` of the tenant.
    pub line: String,
}

/// Makes a key for a tenant.
///
/// # Errors
/// When the name is no tenant's, or the system gives no random numbers.
pub fn mint(tenant: &str) -> Result<MintedKey, MintError> {
    if !is_tenant_name(tenant) {
        return Err(MintError::Tenant(tenant.chars().take(80).collect()));
    }
    let (mut id, mut salt, mut secret) = ([0; ID_BYTES], [0; SALT_BYTES], [0; SECRET_BYTES]);
    for bytes in [&mut id[..], &mut salt[..], &mut secret[..]] {
        getrandom::fill(bytes)?;
    }
    let (id, secret) = (hex(&id), hex(&secret));
    let mut hash = [0; HASH_BYTES];
    if let Some(mac) = keyed(&salt, &secret) {
        hash.copy_from_slice(&mac.finalize().into_bytes());
    }
    let line = KeyEntry::new(id.clone(), salt, hash).line();
    Ok(MintedKey { key: format!("{KEY_PREFIX}{id}-{secret}"), line })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
