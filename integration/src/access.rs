//! Keys, secrets and certificates for fleets that ask for them.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

use crate::binary;

/// Writes a file that nobody else can read.
///
/// # Panics
/// When it cannot be written.
pub fn write_secret(path: &Path, text: &str) {
    fs::write(path, text).expect("written");
    fs::set_permissions(path, Permissions::from_mode(0o600)).expect("closed to others");
}

/// A key for `tenant` of the command line, and its line for the file of keys.
///
/// # Panics
/// When the command line makes none.
pub fn new_key(tenant: &str) -> (String, String) {
    let made = Command::new(binary::baton())
        .args(["key", "new", "--tenant", tenant, "--json"])
        .output()
        .expect("baton key new");
    let made: serde_json::Value = serde_json::from_slice(&made.stdout).expect("JSON");
    let text = |name: &str| made[name].as_str().expect("text").to_owned();
    (text("key"), text("line"))
}

/// An authority, `ca.pem`, and `NAME.pem` with `NAME.key` of it for each name and host.
///
/// # Panics
/// When they cannot be made or written.
pub fn certificates(folder: &Path, of: &[(&str, &str)]) {
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let own = params.self_signed(&key).expect("a certificate");
    fs::write(folder.join("ca.pem"), own.pem()).expect("written");
    let authority = Issuer::new(params, key);
    for (name, host) in of {
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(vec![(*host).to_owned()]).expect("a name");
        let certificate = params.signed_by(&key, &authority).expect("a certificate");
        fs::write(folder.join(format!("{name}.pem")), certificate.pem()).expect("written");
        write_secret(&folder.join(format!("{name}.key")), &key.serialize_pem());
    }
}
