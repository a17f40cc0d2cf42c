//! What of the embedded store survives a restart: how far revisions were given out, and operators' wishes.
//!
//! ```text
//! baton-conductor-state 1 <xxh3 of the rest, 16 hex digits> <length of the rest>\n
//! {"ceiling":1795226400000000,"intents":{"intents/replicas/gpu-decode":"4"}}
//! ```
//! Written to a temporary name, synced, renamed, and the directory synced: a crash leaves the old file or the new.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_64;

const MAGIC: &str = "baton-conductor-state 1";
/// Far above any real file: what is larger is not ours.
const FILE_MAX_BYTES: u64 = 16 << 20;

/// The durable part of the state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Durable {
    /// No revision above this one was ever given out.
    pub(crate) ceiling: u64,
    /// Operators' wishes by key.
    pub(crate) intents: BTreeMap<String, String>,
}

/// Why the state of an earlier life can't be used.
#[derive(Debug, thiserror::Error)]
pub enum StateFileError {
    /// Another conductor works with it.
    #[error("the conductor state {} is in use by {holder}: one conductor a file", path.display())]
    InUse {
        /// The state file.
        path: PathBuf,
        /// What the other process wrote about itself.
        holder: String,
    },
    /// The content is not what was written.
    #[error(
        "the conductor state {} is damaged ({fault}): move it away to start without it; wishes of operators (drains, replicas) are then lost, epochs go on from the clock",
        path.display()
    )]
    Damaged {
        /// The state file.
        path: PathBuf,
        /// What does not fit.
        fault: String,
    },
    /// The file system said no.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// The state file of a running conductor, locked against others.
#[derive(Debug)]
pub(crate) struct StateFile {
    path: PathBuf,
    /// Held for its lock, which the kernel drops with the process.
    _lock: File,
}

impl StateFile {
    /// Locks and reads the file. `holder` is what a second conductor is told about this one.
    pub(crate) fn open(path: &Path, holder: &str) -> Result<(Self, Option<Durable>), StateFileError> {
        if let Some(folder) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
            fs::create_dir_all(folder).map_err(|source| failed("create", folder, source))?;
        }
        let lock = lock(path, holder)?;
        let durable = match File::open(path) {
            Ok(file) => Some(read(path, file)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(source) => return Err(failed("open", path, source)),
        };
        Ok((Self { path: path.to_owned(), _lock: lock }, durable))
    }

    /// Replaces the content; on return it is on the disk.
    pub(crate) fn write(&self, durable: &Durable) -> Result<(), StateFileError> {
        let temporary = with_suffix(&self.path, ".new");
        let replace = || -> io::Result<()> {
            let mut file = File::create(&temporary)?;
            file.write_all(&encode(durable)?)?;
            file.sync_all()?;
            fs::rename(&temporary, &self.path)?;
            let folder = self.path.parent().filter(|p| !p.as_os_str().is_empty());
            File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
        };
        replace().map_err(|source| failed("write", &self.path, source))
    }
}

fn lock(path: &Path, holder: &str) -> Result<File, StateFileError> {
    let lock_path = with_suffix(path, ".lock");
    let io_failed = |source| failed("lock", &lock_path, source);
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&lock_path)
        .map_err(io_failed)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut other = String::new();
            // The other's note is a courtesy: without it the refusal stands all the same.
            let read = (&file).take(256).read_to_string(&mut other);
            let known = read.is_ok() && !other.trim().is_empty();
            let holder = if known { other.trim().to_owned() } else { "another process".to_owned() };
            return Err(StateFileError::InUse { path: path.to_owned(), holder });
        }
        Err(TryLockError::Error(source)) => return Err(io_failed(source)),
    }
    let note = || -> io::Result<()> {
        let mut writer = &file;
        file.set_len(0)?;
        writer.rewind()?;
        writer.write_all(holder.as_bytes())
    };
    note().map_err(io_failed)?;
    file.rewind().map_err(io_failed)?;
    Ok(file)
}

fn encode(durable: &Durable) -> io::Result<Vec<u8>> {
    let body = serde_json::to_vec(durable)?;
    let mut bytes = format!("{MAGIC} {:016x} {}\n", XxHash3_64::oneshot(&body), body.len()).into_bytes();
    bytes.extend_from_slice(&body);
    Ok(bytes)
}

fn read(path: &Path, file: File) -> Result<Durable, StateFileError> {
    let mut bytes = Vec::new();
    file.take(FILE_MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|source| failed("read", path, source))?;
    decode(&bytes).map_err(|fault| StateFileError::Damaged { path: path.to_owned(), fault })
}

fn decode(bytes: &[u8]) -> Result<Durable, String> {
    if bytes.len() as u64 > FILE_MAX_BYTES {
        return Err(format!("it has more than {FILE_MAX_BYTES} bytes"));
    }
    let end = bytes.iter().take(80).position(|b| *b == b'\n').ok_or("it has no header line")?;
    let header = std::str::from_utf8(&bytes[..end]).map_err(|_| "its header is not text")?;
    let rest = header.strip_prefix(MAGIC).ok_or_else(|| format!("its header is {header:?}"))?;
    let body = &bytes[end + 1..];
    let expected = format!(" {:016x} {}", XxHash3_64::oneshot(body), body.len());
    if rest != expected {
        return Err(format!("checksum and length are{expected}, its header says{rest}"));
    }
    serde_json::from_slice(body).map_err(|error| format!("its content is not understood: {error}"))
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

fn failed(action: &'static str, path: &Path, source: io::Error) -> StateFileError {
    StateFileError::Io { action, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests;
