//! Follows the files of keys: a new one counts within seconds, a broken one changes nothing and says so.

use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use baton_config::fleet::JwksSource;
use baton_config::keys::{KeysFile, Stamp};

use super::jwt::Provider;
use super::remote::FetchError;
use super::{Auth, AuthError, Guard, Identity, Mode};
use crate::dispatch::chain;

/// Between two looks at the files.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Between two complaints about a file that stays broken.
const COMPLAIN_EVERY: u32 = 60;

/// A file and what it was when last read.
struct Followed<'a> {
    path: &'a Path,
    seen: Option<Option<Stamp>>,
    /// Looks since it was found broken; 0 while it is good.
    broken_for: u32,
}

impl<'a> Followed<'a> {
    fn new(path: &'a Path) -> Self {
        // Read once more at the first look: it may have changed between the start and now.
        Self { path, seen: None, broken_for: 0 }
    }

    /// Whether it has to be read, now that it looks like this.
    fn due(&mut self, now: Option<Stamp>) -> bool {
        let changed = self.seen.replace(now) != Some(now);
        if !changed && self.broken_for > 0 {
            self.broken_for += 1;
            return self.broken_for.is_multiple_of(COMPLAIN_EVERY);
        }
        changed
    }

    fn read(&mut self, result: Result<(), AuthError>) {
        match result {
            Ok(()) => {
                if self.broken_for > 0 {
                    tracing::info!(path = %self.path.display(), "the file is good again");
                }
                self.broken_for = 0;
            }
            Err(error) => {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                tracing::error!(
                    path = %self.path.display(), %error, cause,
                    "KEPT THE OLD KEYS: the new file cannot be used"
                );
                self.broken_for = self.broken_for.max(1);
            }
        }
    }
}

impl Auth {
    /// Follows the files and the identity provider for as long as it is polled; at once over where there are none.
    pub(crate) async fn follow(self: Arc<Self>) {
        let Mode::Guarded(guard) = &self.mode else { return };
        tokio::join!(self.follow_files(guard), self.follow_identity(guard));
    }

    async fn follow_identity(&self, guard: &Guard) {
        let Some(identity) = &guard.identity else { return };
        let Some(remote) = &identity.remote else { return };
        let mut broken = false;
        let keep = |fetched: Result<Provider, FetchError>| {
            self.metrics.jwks_fetched(fetched.is_ok());
            match fetched {
                Ok(provider) => {
                    let keys = provider.size();
                    if broken || identity.current().is_err() {
                        tracing::info!(keys, "the keys of the identity provider are here");
                    }
                    broken = false;
                    self.metrics.jwks_keys.set(i64::try_from(keys).unwrap_or(i64::MAX));
                    identity.replace(provider);
                }
                Err(error) => {
                    let kept = identity.current().map_or(0, |provider| provider.size());
                    tracing::error!(error = chain(&error), kept, "no keys from the identity provider");
                    broken = true;
                }
            }
        };
        remote.follow(keep).await;
    }

    async fn follow_files(&self, guard: &Guard) {
        let mut keys = Followed::new(&guard.spec.keys_file);
        let mut jwks = guard.spec.jwt.as_ref().and_then(|jwt| match &jwt.keys {
            JwksSource::File(path) => Some(Followed::new(path)),
            JwksSource::Remote(_) => None,
        });
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            if look(&mut keys).await {
                let result = guard.read_keys().await;
                keys.read(result);
            }
            if let Some(jwks) = &mut jwks
                && look(jwks).await
            {
                let result = guard.read_provider().await;
                jwks.read(result);
            }
            let broken = keys.broken_for > 0 || jwks.as_ref().is_some_and(|jwks| jwks.broken_for > 0);
            self.metrics.keys_stale.set(i64::from(broken));
            if let Some(age) = guard.identity.as_ref().and_then(Identity::age) {
                self.metrics.jwks_age.set(age.as_secs_f64());
            }
        }
    }
}

async fn look(followed: &mut Followed<'_>) -> bool {
    let path = followed.path.to_owned();
    // A file system that hangs must not hang the router.
    let Ok(now) = tokio::task::spawn_blocking(move || Stamp::of(&path)).await else { return false };
    followed.due(now)
}

impl Guard {
    async fn read_keys(&self) -> Result<(), AuthError> {
        let path = self.spec.keys_file.clone();
        let Ok(file) = tokio::task::spawn_blocking(move || KeysFile::load(&path)).await else {
            return Ok(());
        };
        self.replace(&file?);
        let (tenants, keys) = self.directory.read().unwrap_or_else(PoisonError::into_inner).size();
        tracing::info!(tenants, keys, "keys read");
        Ok(())
    }

    async fn read_provider(&self) -> Result<(), AuthError> {
        let (Some(spec), Some(identity)) = (self.spec.jwt.clone(), &self.identity) else { return Ok(()) };
        let JwksSource::File(path) = spec.keys.clone() else { return Ok(()) };
        let Ok(read) = tokio::task::spawn_blocking(move || Provider::load(&path, &spec)).await else {
            return Ok(());
        };
        identity.replace(read?);
        Ok(())
    }
}
