//! Shared libraries of other projects: whether the dynamic linker would find them, without loading them.

use std::path::Path;

/// A shared library.
#[derive(Debug, Clone, Copy)]
pub(super) struct Library {
    /// Its file name with the version that would be opened.
    pub(super) file: &'static str,
    /// How to get it.
    pub(super) remedy: &'static str,
    /// Where its own installer puts it, besides the linker's directories.
    places: &'static [&'static str],
}

/// Read no more of the linker's cache than this; a large system's takes 200 KiB.
const CACHE_MAX_BYTES: usize = 16 << 20;

impl Library {
    pub(super) const LIBFABRIC: Self = Self {
        file: "libfabric.so.1",
        remedy: "apt install libfabric1; for EFA, the AWS EFA installer",
        places: &["/opt/amazon/efa/lib", "/opt/amazon/efa/lib64"],
    };
    pub(super) const UCX: Self =
        Self { file: "libucp.so.0", remedy: "apt install libucx0", places: &["/opt/ucx/lib"] };
    pub(super) const CUDA: Self = Self {
        file: "libcuda.so.1",
        remedy: "install the NVIDIA driver (Debian non-free: apt install libcuda1)",
        places: &["/usr/local/cuda/compat"],
    };
    pub(super) const NEURON: Self = Self {
        file: "libnrt.so.1",
        remedy: "install aws-neuronx-runtime-lib from the AWS Neuron repository (Debian has no package)",
        places: &["/opt/aws/neuron/lib"],
    };

    /// Where it is, if the linker or a look at the usual places finds it.
    pub(super) fn find(self) -> Option<String> {
        let usual = [
            "/usr/local/lib",
            "/usr/lib",
            "/lib",
            "/usr/lib64",
            "/usr/lib/x86_64-linux-gnu",
            "/usr/lib/aarch64-linux-gnu",
        ];
        let directories = self.places.iter().chain(&usual);
        let beside = directories.map(|dir| Path::new(dir).join(self.file)).find(|path| path.exists());
        beside.map(|path| path.display().to_string()).or_else(|| in_cache(self.file))
    }
}

/// Looks a library up in the dynamic linker's cache, which holds NUL-terminated names and paths.
fn in_cache(file: &str) -> Option<String> {
    let cache = std::fs::read("/etc/ld.so.cache").ok().filter(|cache| cache.len() <= CACHE_MAX_BYTES)?;
    path_in_cache(&cache, file)
}

fn path_in_cache(cache: &[u8], file: &str) -> Option<String> {
    let suffix = format!("/{file}");
    let found = cache.split(|byte| *byte == 0).find(|text| text.ends_with(suffix.as_bytes()))?;
    Some(String::from_utf8_lossy(found).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_is_searched_for_whole_names() {
        let cache = b"glibc-ld.so.cache1.1\0libucp.so.0\0/opt/x/notlibucp.so.0\0/opt/ucx/libucp.so.0\0";
        assert_eq!(path_in_cache(cache, "libucp.so.0").as_deref(), Some("/opt/ucx/libucp.so.0"));
        assert_eq!(path_in_cache(cache, "libcuda.so.1"), None);
    }
}
