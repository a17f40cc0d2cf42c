//! UCX's context: what it may use, and what it found.

use std::ffi::{CString, c_char, c_int, c_void};

use baton_ucx_sys::{
    Api, UCP_ATTR_FIELD_MEMORY_TYPES, UCP_FEATURE_AM, UCP_FEATURE_RMA, UCP_FEATURE_WAKEUP,
    UCP_PARAM_FIELD_FEATURES, UCS_MEMORY_TYPE_CUDA, UCS_OK, Zeroed, ucp_context_attr_t, ucp_context_h,
    ucp_params_t, ucs_status_t,
};

use super::{DriverError, UcxOptions, devices};

/// Transports that can tell when a peer fails. Those over shared memory (`posix`, `sysv`) cannot, and `self` neither.
/// Names a build of UCX does not know are left out by it.
pub(super) const TRANSPORTS: &str = "rc,dc,srd,tcp,cma,cuda";
/// How UCX's names of transports with one-sided operations of their own begin.
const ONE_SIDED: [&str; 4] = ["rc_", "dc_", "srd", "gga"];
/// From where on a rendezvous beats eager messages between processes of a host: 64 blocks of 64 KiB took 340 us with
/// this and 550 with `32k`, messages of 256 KiB 35 us with this and 40 without, measured.
const LOCAL_RENDEZVOUS: &str = "128k";
/// Longest message that `tcp` sends in one piece, straight from memory: others are cut into ones that the receiver puts
/// together again. UCX believes that peers have the same.
pub(super) const TCP_PIECE: &str = "512k";
/// What `tcp` copies into one piece: UCX from 1.16 on copies messages of several blocks, and those that ask for an answer,
/// which it cuts into 8 KiB by itself. 64 blocks of 64 KiB took UCX 1.22 1.9 ms with that and 0.8 with this, measured.
const TCP_COPIED_PIECE: &str = "256k";
/// The first release whose protocols are the new ones. Before, they are an experiment that breaks the stack.
const NEW_PROTOCOLS: (u32, u32) = (1, 16);
/// What the driver uses of UCX, besides its own reads and writes where there is RDMA.
const DRIVER: u64 = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
const CUDA_REMEDY: &str =
    "install UCX built with CUDA (Debian's libucx0 is not), with its ucx/libuct_cuda.so";

unsafe extern "C" {
    fn open_memstream(text: *mut *mut c_char, len: *mut usize) -> *mut c_void;
    fn fclose(stream: *mut c_void) -> c_int;
    fn free(memory: *mut c_void);
}

/// A context of UCX, cleaned up on drop.
pub(super) struct Context {
    pub(super) api: Api,
    pub(super) handle: ucp_context_h,
    pub(super) version: (u32, u32, u32),
    /// `tcp/lo`, `cma/memory` and so on.
    pub(super) resources: Vec<String>,
    /// Whether reads and writes are UCX's own.
    pub(super) one_sided: bool,
    has_cuda: bool,
}

impl Context {
    /// Makes a context; `one_sided` decides what the transports found would decide otherwise.
    pub(super) fn open(
        api: &Api,
        options: &UcxOptions,
        one_sided: Option<bool>,
    ) -> Result<Self, DriverError> {
        let devices = devices::for_address(options.bind).ok_or_else(|| DriverError {
            what: format!("no network interface has the address {}", options.bind),
            remedy: "bind the worker to an address of this host".to_owned(),
        })?;
        let transports = options.transports.as_deref().unwrap_or(TRANSPORTS);
        let features = |one_sided| if one_sided { DRIVER | UCP_FEATURE_RMA } else { DRIVER };
        let found = Self::with(api, transports, &devices, features(one_sided.unwrap_or(false)))?;
        let wanted = one_sided.unwrap_or_else(|| found.resources.iter().any(|name| is_one_sided(name)));
        if wanted == found.one_sided {
            return Ok(found);
        }
        drop(found);
        Self::with(api, transports, &devices, features(wanted))
    }

    /// Makes a context for UCX's own reads and writes alone, to be looked at again and again, on the loopback interface.
    pub(super) fn bare(api: &Api, transports: &str) -> Result<Self, DriverError> {
        Self::with(api, transports, "lo", UCP_FEATURE_RMA)
    }

    fn with(api: &Api, transports: &str, devices: &str, features: u64) -> Result<Self, DriverError> {
        let (version, one_sided) = (api.version(), features & UCP_FEATURE_RMA != 0);
        let failed = |step: &str, status| failure(api, version, step, status);
        let mut config = std::ptr::null_mut();
        // SAFETY: null for no prefix and no file; fills in one pointer.
        let status = unsafe { (api.ucp_config_read)(std::ptr::null(), std::ptr::null(), &raw mut config) };
        if status != UCS_OK {
            return Err(failed("read its configuration", status));
        }
        let put = if one_sided { "y" } else { "n" };
        let mut settings = vec![
            ("TLS", transports),
            ("NET_DEVICES", devices),
            ("MAX_RMA_RAILS", "2"),
            // The form of addresses that `address` knows.
            ("ADDRESS_VERSION", "v1"),
            ("ADDRESS_DEBUG_INFO", "n"),
            ("UNIFIED_MODE", "n"),
            // Settings of transports have two names: UCX 1.13 takes them without the transport's.
            // Connecting must not block the thread.
            ("TCP_CONN_NB", "y"),
            ("CONN_NB", "y"),
            // `put` of the tcp transport writes wherever the peer says.
            ("TCP_PUT_ENABLE", put),
            ("PUT_ENABLE", put),
            ("TCP_RX_SEG_SIZE", TCP_PIECE),
            ("RX_SEG_SIZE", TCP_PIECE),
            ("TCP_TX_SEG_SIZE", TCP_COPIED_PIECE),
            ("TX_SEG_SIZE", TCP_COPIED_PIECE),
            // For answers to several pieces at once: the default lets 6 through.
            ("TCP_MAX_IOV", "16"),
            ("MAX_IOV", "16"),
        ];
        if (version.0, version.1) < NEW_PROTOCOLS {
            settings.push(("PROTO_ENABLE", "n"));
        }
        if !one_sided {
            // UCX takes `cma` for a rendezvous only if a sender can take its memory back, which `cma` cannot, unless it
            // is told to say so. A receiver that pulls may then see a buffer change that its sender gave up: digests
            // find that. It must never be the other way round (a sender that pushes into memory given up), hence `get`.
            settings.extend([
                ("CMA_MEMORY_INVALIDATE", "y"),
                ("MEMORY_INVALIDATE", "y"),
                ("RNDV_SCHEME", "get_zcopy"),
            ]);
            if devices == "lo" {
                settings.push(("RNDV_THRESH", LOCAL_RENDEZVOUS));
            }
        }
        let mut refused = None;
        for (name, value) in settings {
            let (Ok(name_c), Ok(value_c)) = (CString::new(name), CString::new(value)) else {
                refused = Some((name, value));
                continue;
            };
            // SAFETY: the configuration read above and two strings, copied. Names this version lacks are an error
            // status or kept for the transports, neither of which matters.
            let status = unsafe { (api.ucp_config_modify)(config, name_c.as_ptr(), value_c.as_ptr()) };
            if status != UCS_OK && name == "TLS" {
                refused = Some((name, value));
            }
        }
        let mut params = ucp_params_t::zeroed();
        params.field_mask = UCP_PARAM_FIELD_FEATURES;
        params.features = features;
        let mut handle = std::ptr::null_mut();
        // SAFETY: parameters and configuration as UCX defines them; fills in one pointer.
        let status = unsafe {
            (api.ucp_init_version)(version.0, version.1, &raw const params, config, &raw mut handle)
        };
        // SAFETY: read above, released once.
        unsafe { (api.ucp_config_release)(config) };
        if status != UCS_OK {
            let mut error = failed(&format!("use the transports {transports} on {devices}"), status);
            error.remedy = "check the transports with `ucx_info -d`; `tcp` must be among them".to_owned();
            return Err(error);
        }
        let mut context =
            Self { api: *api, handle, version, resources: Vec::new(), one_sided, has_cuda: false };
        if let Some((name, value)) = refused {
            return Err(DriverError {
                what: format!("UCX {} does not take {value:?} as {name}", context.version()),
                remedy: "correct the list of transports".to_owned(),
            });
        }
        context.resources = context.list_resources();
        context.has_cuda = context.memory_types() & (1 << UCS_MEMORY_TYPE_CUDA) != 0;
        Ok(context)
    }

    /// `1.13.1`.
    pub(super) fn version(&self) -> String {
        format!("{}.{}.{}", self.version.0, self.version.1, self.version.2)
    }

    /// Whether memory of NVIDIA GPUs can be registered, or why it cannot.
    pub(super) fn cuda(&self) -> Result<(), DriverError> {
        if self.has_cuda {
            return Ok(());
        }
        Err(DriverError {
            what: format!("UCX {} here has no CUDA module, or finds no GPU", self.version()),
            remedy: CUDA_REMEDY.to_owned(),
        })
    }

    /// That a step failed, and why.
    pub(super) fn error(&self, step: &str, status: ucs_status_t) -> DriverError {
        failure(&self.api, self.version, step, status)
    }

    fn memory_types(&self) -> u64 {
        let mut attributes = ucp_context_attr_t::zeroed();
        attributes.field_mask = UCP_ATTR_FIELD_MEMORY_TYPES;
        // SAFETY: fills in the fields asked for; the structure is at least as long as UCX's.
        let status = unsafe { (self.api.ucp_context_query)(self.handle, &raw mut attributes) };
        if status == UCS_OK { attributes.memory_types } else { 0 }
    }

    /// UCX tells its resources to people only, so this reads what it prints.
    fn list_resources(&self) -> Vec<String> {
        let (mut text, mut len) = (std::ptr::null_mut::<c_char>(), 0);
        // SAFETY: both variables live until the stream is closed.
        let stream = unsafe { open_memstream(&raw mut text, &raw mut len) };
        if stream.is_null() {
            return Vec::new();
        }
        // SAFETY: a context and an open stream.
        unsafe { (self.api.ucp_context_print_info)(self.handle, stream) };
        // SAFETY: opened above, closed once; sets `text` and `len`.
        if unsafe { fclose(stream) } != 0 || text.is_null() {
            return Vec::new();
        }
        // SAFETY: `len` bytes written by the stream.
        let bytes = unsafe { std::slice::from_raw_parts(text.cast::<u8>(), len) };
        let resources = resources_in(&String::from_utf8_lossy(bytes));
        // SAFETY: allocated by the stream, freed once, not used after.
        unsafe { free(text.cast()) };
        resources
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: made in `with`; whoever has a worker or a mapping of it holds the context and drops it last.
        unsafe { (self.api.ucp_cleanup)(self.handle) };
    }
}

fn failure(api: &Api, version: (u32, u32, u32), step: &str, status: ucs_status_t) -> DriverError {
    let (major, minor, release) = version;
    DriverError {
        what: format!("UCX {major}.{minor}.{release} cannot {step}: {}", api.describe(status)),
        remedy: String::new(),
    }
}

/// `#      resource 0  :  md 0  dev 0  flags -- tcp/lo` and the like.
fn resources_in(printed: &str) -> Vec<String> {
    let mut found: Vec<String> = printed
        .lines()
        .filter(|line| line.trim_start_matches(['#', ' ']).starts_with("resource "))
        .filter_map(|line| line.split_whitespace().last())
        .filter(|name| name.contains('/'))
        .map(str::to_owned)
        .collect();
    found.dedup();
    found
}

fn is_one_sided(resource: &str) -> bool {
    ONE_SIDED.iter().any(|prefix| resource.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resources_are_found_in_what_ucx_prints() {
        let printed = "#\n# UCP context\n#     component 1  :  tcp\n\
                       #      resource 0  :  md 0  dev 0  flags -- tcp/lo\n\
                       #      resource 1  :  md 1  dev 1  flags -- rc_mlx5/mlx5_0:1\n#\n";
        let found = resources_in(printed);
        assert_eq!(found, ["tcp/lo", "rc_mlx5/mlx5_0:1"]);
        assert_eq!(found.iter().map(|name| is_one_sided(name)).collect::<Vec<_>>(), [false, true]);
    }
}
