//! Peers: their endpoint, and the keys they gave us.

use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::c_void;
use std::net::{IpAddr, SocketAddr};

use baton_ucx_sys::{
    UCP_EP_CLOSE_FLAG_FORCE, UCP_EP_PARAM_FIELD_ERR_HANDLER, UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE,
    UCP_EP_PARAM_FIELD_REMOTE_ADDRESS, UCP_ERR_HANDLING_MODE_PEER, UCP_OP_ATTR_FIELD_FLAGS, UCS_OK, Zeroed,
    is_request, status_of, ucp_ep_h, ucp_ep_params_t, ucp_rkey_h, ucs_status_t,
};

use super::address::{self, Form};
use super::core::Core;
use super::frame::{self, Fields};
use super::messages::Target;
use super::region::Region;
use super::slots::{Job, Work};
use super::{ADDRESS_MAX_BYTES, DriverError, KEY_MAX_BYTES};
use crate::backend::sockets;

/// Reachable by the error callback for as long as the endpoint.
#[derive(Default)]
struct Alarm {
    status: Cell<ucs_status_t>,
}

/// A peer this driver is connected to.
pub(super) struct Peer {
    pub(super) ep: ucp_ep_h,
    alarm: Box<Alarm>,
    /// Whether the failure was acted on.
    pub(super) mourned: bool,
    pub(super) remotes: HashMap<u32, Remote>,
    /// Slots in use for this peer.
    pub(super) posted: usize,
    /// Writes that are out but perhaps not delivered.
    pub(super) unflushed: Vec<u32>,
    /// Those that the flush under way covers.
    pub(super) flushing: Option<Vec<u32>>,
    /// Where it listens, if that is this host, and as long as nothing has arrived from there.
    untuned: Vec<SocketAddr>,
}

impl Peer {
    /// Makes an endpoint for what a peer says is its address.
    ///
    /// `local` is the address that both have where peers are on this host.
    pub(super) fn connect(
        core: &Core,
        form: &Form,
        address: &[u8],
        local: Option<IpAddr>,
    ) -> Result<Self, DriverError> {
        let payload = frame::open(frame::Kind::Address, address, ADDRESS_MAX_BYTES)?;
        let mut fields = Fields(payload);
        let (Some(major), Some(minor), Some(one_sided)) = (fields.u32(), fields.u32(), fields.u8()) else {
            return Err(misfit("address"));
        };
        let context = &core.context;
        let theirs = (major, minor, one_sided != 0);
        if theirs != (context.version.0, context.version.1, context.one_sided) {
            return Err(misfit("address"));
        }
        let untuned = local.map(|ip| address::listens_at(fields.0, ip)).unwrap_or_default();
        let address = form.take(fields.0).map_err(|why| DriverError {
            what: format!("the peer's UCX address is not one: {why}"),
            remedy: String::new(),
        })?;
        let alarm = Box::<Alarm>::default();
        let mut params = ucp_ep_params_t::zeroed();
        params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS
            | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE
            | UCP_EP_PARAM_FIELD_ERR_HANDLER;
        params.address = address.as_ptr().cast();
        params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
        params.err_handler_cb = Some(failed);
        params.err_handler_arg = std::ptr::from_ref(&*alarm).cast_mut().cast();
        let mut ep = std::ptr::null_mut();
        // SAFETY: the worker lives; the address is whole and of the form UCX reads (`Form`), and is copied; the alarm
        // stays in its box until the endpoint is closed.
        let status =
            unsafe { (context.api.ucp_ep_create)(core.worker.get(), &raw const params, &raw mut ep) };
        if status != UCS_OK {
            return Err(context.error("connect", status));
        }
        Ok(Self {
            ep,
            alarm,
            mourned: false,
            remotes: HashMap::new(),
            posted: 0,
            unflushed: Vec::new(),
            flushing: None,
            untuned,
        })
    }

    /// Something has succeeded: it is connected.
    pub(super) fn tune(&mut self) {
        if !self.untuned.is_empty() {
            std::mem::take(&mut self.untuned).into_iter().for_each(sockets::tune_connections);
        }
    }

    /// Why nothing can be posted any more.
    pub(super) fn failure(&self) -> Option<ucs_status_t> {
        Some(self.alarm.status.get()).filter(|status| *status != UCS_OK)
    }

    /// Starts to close the endpoint. A job of the peer counts until that is done. False: UCX does not close it, so
    /// that only the end of the worker makes sure that nothing comes of it any more.
    pub(super) fn close(&mut self, core: &Core, id: u32) -> bool {
        let ep = std::mem::replace(&mut self.ep, std::ptr::null_mut());
        if ep.is_null() {
            return true;
        }
        // UCX gives the same endpoint for answers.
        core.forget_replies(ep);
        let Some(slot) = core.start(Job::new(Work::Close, 0, Some(id))) else { return false };
        let mut params = core.params(slot, None);
        params.op_attr_mask |= UCP_OP_ATTR_FIELD_FLAGS;
        params.flags = UCP_EP_CLOSE_FLAG_FORCE;
        self.posted += 1;
        // SAFETY: made in `connect`, closed once (taken out above), not used after.
        let result = unsafe { (core.context.api.ucp_ep_close_nbx)(ep, &raw const params) };
        if is_request(result) {
            return true;
        }
        core.part_done(slot.index, UCS_OK, None);
        status_of(result) == UCS_OK
    }

    /// Forgets all keys before the worker goes, which they are of. Those in use are left to it.
    pub(super) fn abandon_keys(&mut self, core: &Core) {
        for (_, remote) in self.remotes.drain().filter(|(_, remote)| remote.in_use == 0) {
            remote.destroy(core);
        }
    }

    /// Forgets all keys, once no operation uses them.
    pub(super) fn forget_all(&mut self, core: &Core) {
        for (_, remote) in self.remotes.drain() {
            remote.destroy(core);
        }
    }

    /// Counts an operation off a key, and forgets a key that was to be forgotten.
    pub(super) fn release(&mut self, core: &Core, id: u32) {
        let Some(remote) = self.remotes.get_mut(&id) else { return };
        remote.in_use -= 1;
        if remote.gone && remote.in_use == 0 {
            self.forget(core, id);
        }
    }

    /// Forgets a key, now or when the last operation on it is over.
    pub(super) fn forget(&mut self, core: &Core, id: u32) {
        let Some(remote) = self.remotes.get_mut(&id) else { return };
        remote.gone = true;
        if remote.in_use == 0
            && let Some(remote) = self.remotes.remove(&id)
        {
            remote.destroy(core);
        }
    }
}

impl Core {
    /// Closes an endpoint that UCX made to answer on.
    pub(super) fn close_reply(&self, ep: ucp_ep_h) {
        let Some(slot) = self.start(Job::new(Work::Close, 0, None)) else { return };
        let mut params = self.params(slot, None);
        params.op_attr_mask |= UCP_OP_ATTR_FIELD_FLAGS;
        params.flags = UCP_EP_CLOSE_FLAG_FORCE;
        // SAFETY: an answer is under way on it, so it lives; closed once, since the answer forgot it.
        let result = unsafe { (self.context.api.ucp_ep_close_nbx)(ep, &raw const params) };
        if !is_request(result) {
            self.part_done(slot.index, UCS_OK, None);
        }
    }
}

/// UCX found that the peer is gone.
unsafe extern "C" fn failed(alarm: *mut c_void, _ep: ucp_ep_h, status: ucs_status_t) {
    // SAFETY: given as the argument of the handler; the peer keeps it until its endpoint is closed.
    let alarm = unsafe { &*alarm.cast::<Alarm>() };
    alarm.status.set(if status == UCS_OK { baton_ucx_sys::UCS_ERR_CANCELED } else { status });
}

/// How a peer's registration is reached.
#[derive(Clone, Copy)]
pub(super) enum Reach {
    /// By UCX's one-sided operations: the address it has there, and UCX's key.
    OneSided { base: u64, key: ucp_rkey_h },
    /// By messages.
    Messages { region: u32, secret: u128 },
}

/// A peer's registration.
pub(super) struct Remote {
    pub(super) len: u64,
    pub(super) reach: Reach,
    pub(super) in_use: usize,
    gone: bool,
}

impl Remote {
    /// Takes what a peer says is a key.
    pub(super) fn import(core: &Core, peer: &Peer, key: &[u8]) -> Result<Self, DriverError> {
        let payload = frame::open(frame::Kind::Key, key, KEY_MAX_BYTES)?;
        let mut fields = Fields(payload);
        let reach = if core.context.one_sided {
            let base = fields.u64();
            let len = fields.u64();
            base.zip(len).and_then(|(base, len)| {
                base.checked_add(len)?;
                is_packed_key(fields.0).then_some(())?;
                Some((len, unpack(core, peer, base, fields.0)))
            })
        } else {
            let region = fields.u32();
            let len = fields.u64();
            let secret = fields.u128();
            let whole = region.zip(secret).zip(len).filter(|_| fields.0.is_empty());
            whole.map(|((region, secret), len)| (len, Ok(Reach::Messages { region, secret })))
        };
        let Some((len, reach)) = reach else { return Err(misfit("key")) };
        Ok(Self { len, reach: reach?, in_use: 0, gone: false })
    }

    /// Whether `[offset, offset + len)` is within it.
    pub(super) fn fits(&self, offset: u64, len: usize) -> bool {
        offset.checked_add(len as u64).is_some_and(|end| end <= self.len) && !self.gone
    }

    fn destroy(self, core: &Core) {
        if let Reach::OneSided { key, .. } = self.reach {
            // SAFETY: unpacked in `import`, destroyed once, and no operation uses it (`in_use`).
            unsafe { (core.context.api.ucp_rkey_destroy)(key) };
        }
    }
}

impl Reach {
    /// For messages: what to name to the owner.
    pub(super) fn target(self, offset: u64) -> Option<Target> {
        match self {
            Self::Messages { region, secret } => Some(Target { region, secret, offset }),
            Self::OneSided { .. } => None,
        }
    }
}

/// The key of a registration, for peers.
pub(super) fn export(core: &Core, id: u32, region: &Region) -> Result<Vec<u8>, DriverError> {
    let mut payload = Vec::new();
    if core.context.one_sided {
        let (mut packed, mut len) = (std::ptr::null_mut(), 0);
        // SAFETY: a mapping of this context; fills in a pointer and a length.
        let status = unsafe {
            (core.context.api.ucp_rkey_pack)(
                core.context.handle,
                region.memory,
                &raw mut packed,
                &raw mut len,
            )
        };
        if status != UCS_OK {
            return Err(core.context.error("make a key", status));
        }
        payload.extend_from_slice(&(region.span.address() as u64).to_le_bytes());
        payload.extend_from_slice(&(region.span.len() as u64).to_le_bytes());
        // SAFETY: `len` bytes, until released below.
        payload.extend_from_slice(unsafe { std::slice::from_raw_parts(packed.cast::<u8>(), len) });
        // SAFETY: packed above, released once, not used after.
        unsafe { (core.context.api.ucp_rkey_buffer_release)(packed) };
    } else {
        payload.extend_from_slice(&id.to_le_bytes());
        payload.extend_from_slice(&(region.span.len() as u64).to_le_bytes());
        payload.extend_from_slice(&region.secret.to_le_bytes());
    }
    let key = frame::seal(frame::Kind::Key, &payload);
    if key.len() > KEY_MAX_BYTES {
        return Err(DriverError {
            what: format!("a key of UCX has {} bytes, more than {KEY_MAX_BYTES}", key.len()),
            remedy: "name fewer transports".to_owned(),
        });
    }
    Ok(key)
}

fn unpack(core: &Core, peer: &Peer, base: u64, packed: &[u8]) -> Result<Reach, DriverError> {
    let mut key = std::ptr::null_mut();
    // SAFETY: the endpoint lives; the bytes are whole (checksum) and of the form UCX reads (`is_packed_key`).
    let status =
        unsafe { (core.context.api.ucp_ep_rkey_unpack)(peer.ep, packed.as_ptr().cast(), &raw mut key) };
    if status != UCS_OK {
        return Err(core.context.error("take a key", status));
    }
    Ok(Reach::OneSided { base, key })
}

/// Whether UCX can read a packed key to its end: a map of memory domains, a memory type, then for each domain a length
/// and that many bytes.
fn is_packed_key(packed: &[u8]) -> bool {
    let mut fields = Fields(packed);
    let (Some(domains), Some(_)) = (fields.u64(), fields.u8()) else { return false };
    (0..domains.count_ones()).all(|_| {
        let len = fields.u8().map_or(usize::MAX, usize::from);
        fields.0.split_at_checked(len).map(|(_, rest)| fields.0 = rest).is_some()
    })
}

fn misfit(what: &str) -> DriverError {
    DriverError {
        what: format!("the peer's UCX {what} is of another kind or version"),
        remedy: String::new(),
    }
}
