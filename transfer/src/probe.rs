//! What of this machine's network libraries and devices works, and why the rest does not: for `baton doctor`.

/// One thing that was tried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// What it is: a library, a provider, a transport, a device.
    pub name: String,
    /// Whether it can be used.
    pub works: bool,
    /// What was found, or why it cannot be used.
    pub detail: String,
    /// What would help, such as the package to install.
    pub remedy: Option<String>,
}

impl Probe {
    /// Something that works.
    pub fn works(name: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { name: name.into(), works: true, detail: detail.into(), remedy: None }
    }

    /// Something that does not, and what would help.
    pub fn fails(name: impl Into<String>, why: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name: name.into(), works: false, detail: why.into(), remedy: Some(remedy.into()) }
    }
}
