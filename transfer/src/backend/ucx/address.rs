//! Addresses of peers, taken apart and put together again before UCX sees them.
//!
//! UCX walks through an address without looking where it ends, and aborts the process at what it does not know. So
//! it only gets addresses made here, of parts that are in their place and that one of our own transports has, too.
//!
//! ```text
//! 0x20 │ worker u64 │ devices … │ release of UCX (empty device, from 1.16 on)
//! device:     memory domain u8 │ flags, length u8 │ paths u8? │ system device u8? │ address │ transports …
//! transport:  crc of its name u16 │ overhead, bandwidth, latency 3 × f32 │ priority, abilities u32 │ flags, length u8 │
//!             address
//! ```

use std::net::{IpAddr, SocketAddr};

use super::frame::Fields;

/// Version 1, with the number of the worker and nothing else.
const HEADER: u8 = 0x20;
/// Of a memory domain: a device without transports.
const EMPTY: u8 = 0x80;
/// Of a length: the last device, or the last transport of a device.
const LAST: u8 = 0x80;
/// Of a device's length.
const HAS_PATHS: u8 = 0x40;
const HAS_SYSTEM_DEVICE: u8 = 0x20;
const DEVICE_LENGTH: u8 = 0x1f;
/// Of a transport's length: addresses of endpoints follow, which those of workers do not have.
const HAS_ENDPOINTS: u8 = 0x40;
const TRANSPORT_LENGTH: u8 = 0x3f;
/// Most transports of an address; more devices than that there are none either.
const TRANSPORTS_MAX: usize = 64;
/// Bytes after an address for what UCX reads of the last part without asking for its length.
const PADDING: usize = 64;

/// A transport of a worker.
#[derive(Debug, Clone, PartialEq)]
struct Transport {
    name: u16,
    costs: [f32; 3],
    abilities: u32,
    address: Vec<u8>,
}

/// A network interface, with the transports over it.
#[derive(Debug, Clone, PartialEq)]
struct Device {
    domain: u8,
    paths: Option<u8>,
    system_device: Option<u8>,
    address: Vec<u8>,
    transports: Vec<Transport>,
}

/// An address in parts.
#[derive(Debug, Clone, PartialEq)]
struct Parts {
    worker: u64,
    devices: Vec<Device>,
    /// What comes last, from UCX 1.16 on.
    release: Option<u8>,
}

/// What the addresses of our peers look like: our own.
#[derive(Debug)]
pub(super) struct Form {
    own: Parts,
    /// Whether all transports are those whose abilities are the same everywhere.
    plain: bool,
}

impl Form {
    /// None: this build of UCX makes addresses of another form.
    pub(super) fn of(own: &[u8], one_sided: bool) -> Option<Self> {
        let parts = Parts::read(own)?;
        (parts.write() == own && !parts.devices.is_empty()).then_some(Self { own: parts, plain: !one_sided })
    }

    /// What of a peer's address can be given to UCX: the transports that we have, too.
    pub(super) fn take(&self, address: &[u8]) -> Result<Vec<u8>, &'static str> {
        let mut parts = Parts::read(address).ok_or("its parts are not in their places")?;
        if parts.release != self.own.release {
            return Err("it is of another release");
        }
        for device in &mut parts.devices {
            let (domain, place) = (device.domain, device.address.clone());
            device.transports.retain(|transport| self.knows(domain, &place, transport));
        }
        parts.devices.retain(|device| !device.transports.is_empty());
        if parts.devices.is_empty() {
            return Err("it names no transport that is used here, too");
        }
        let mut address = parts.write();
        address.resize(address.len() + PADDING, 0);
        Ok(address)
    }

    /// Where our transport over TCP listens on the interface of `ip`.
    pub(super) fn listens_at(&self, ip: IpAddr) -> Vec<SocketAddr> {
        self.own.listen_at(ip)
    }

    fn knows(&self, domain: u8, place: &[u8], transport: &Transport) -> bool {
        let [overhead, bandwidth, latency] = transport.costs;
        let costs = (0.0..=1.0).contains(&overhead)
            && (1.0..=1e15).contains(&bandwidth)
            && (0.0..=1.0).contains(&latency);
        let (tcp, cma) = (crc16(b"tcp"), crc16(b"cma"));
        let alike = |device: &Device, own: &Transport| {
            own.name == transport.name
                && own.address.len() == transport.address.len()
                && device.address.len() == place.len()
                // Loopback or not, and which IP.
                && (own.name != tcp || place.get(..2) == device.address.get(..2))
                // All but the priority. Network cards differ in what they can do, these do not.
                && (!self.plain && ![tcp, cma].contains(&own.name)
                    || own.abilities >> 8 == transport.abilities >> 8)
        };
        let mut ours = self.own.devices.iter();
        costs
            && is_domain(domain, self.own.release)
            && ours.any(|device| device.transports.iter().any(|own| alike(device, own)))
    }
}

/// Where the worker of an address listens, if it is on the interface of `ip`.
pub(super) fn listens_at(address: &[u8], ip: IpAddr) -> Vec<SocketAddr> {
    Parts::read(address).map(|parts| parts.listen_at(ip)).unwrap_or_default()
}

/// UCX counts at most 64 memory domains; until 1.18 two of the bits were flags.
fn is_domain(domain: u8, release: Option<u8>) -> bool {
    release.is_none() || domain & 0x40 == 0
}

impl Parts {
    fn read(address: &[u8]) -> Option<Self> {
        let mut fields = Fields(address);
        if fields.u8()? != HEADER {
            return None;
        }
        let worker = fields.u64()?;
        let (mut devices, mut release, mut transports) = (Vec::new(), None, 0);
        loop {
            let (domain, flags) = (fields.u8()?, fields.u8()?);
            if domain & EMPTY != 0 {
                // The only one, at the end: UCX's release.
                if flags != LAST || !fields.0.is_empty() {
                    return None;
                }
                release = Some(domain);
                break;
            }
            let device = Device::read(&mut fields, domain, flags)?;
            transports += device.transports.len();
            if transports > TRANSPORTS_MAX {
                return None;
            }
            devices.push(device);
            if flags & LAST != 0 {
                break;
            }
        }
        fields.0.is_empty().then_some(Self { worker, devices, release })
    }

    fn listen_at(&self, ip: IpAddr) -> Vec<SocketAddr> {
        let transports = self.devices.iter().flat_map(|device| &device.transports);
        let tcp = transports.filter(|transport| transport.name == crc16(b"tcp"));
        // The address of this transport is its port.
        let ports = tcp.filter_map(|transport| transport.address.first_chunk().copied());
        ports.map(|port| SocketAddr::new(ip, u16::from_be_bytes(port))).collect()
    }

    fn write(&self) -> Vec<u8> {
        let mut out = vec![HEADER];
        out.extend_from_slice(&self.worker.to_le_bytes());
        for (at, device) in self.devices.iter().enumerate() {
            let last = at + 1 == self.devices.len() && self.release.is_none();
            device.write(last, &mut out);
        }
        out.extend(self.release.into_iter().flat_map(|release| [release, LAST]));
        out
    }
}

impl Device {
    fn read(fields: &mut Fields<'_>, domain: u8, flags: u8) -> Option<Self> {
        let mut optional = |flag| if flags & flag == 0 { Some(None) } else { fields.u8().map(Some) };
        let (paths, system_device) = (optional(HAS_PATHS)?, optional(HAS_SYSTEM_DEVICE)?);
        let address = fields.bytes(usize::from(flags & DEVICE_LENGTH))?.to_vec();
        let mut transports = Vec::new();
        loop {
            let (transport, last) = Transport::read(fields)?;
            transports.push(transport);
            if transports.len() > TRANSPORTS_MAX {
                return None;
            }
            if last {
                break;
            }
        }
        Some(Self { domain, paths, system_device, address, transports })
    }

    fn write(&self, last: bool, out: &mut Vec<u8>) {
        let mut flags = self.address.len() as u8;
        flags |= if last { LAST } else { 0 };
        flags |= self.paths.map_or(0, |_| HAS_PATHS) | self.system_device.map_or(0, |_| HAS_SYSTEM_DEVICE);
        out.extend([self.domain, flags]);
        out.extend(self.paths.into_iter().chain(self.system_device));
        out.extend_from_slice(&self.address);
        for (at, transport) in self.transports.iter().enumerate() {
            transport.write(at + 1 == self.transports.len(), out);
        }
    }
}

impl Transport {
    fn read(fields: &mut Fields<'_>) -> Option<(Self, bool)> {
        let name = fields.u16()?;
        let costs = [fields.u32()?, fields.u32()?, fields.u32()?].map(f32::from_bits);
        let (abilities, flags) = (fields.u32()?, fields.u8()?);
        if flags & HAS_ENDPOINTS != 0 {
            return None;
        }
        let address = fields.bytes(usize::from(flags & TRANSPORT_LENGTH))?.to_vec();
        Some((Self { name, costs, abilities, address }, flags & LAST != 0))
    }

    fn write(&self, last: bool, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.name.to_le_bytes());
        out.extend(self.costs.iter().flat_map(|cost| cost.to_le_bytes()));
        out.extend_from_slice(&self.abilities.to_le_bytes());
        out.push(self.address.len() as u8 | if last { LAST } else { 0 });
        out.extend_from_slice(&self.address);
    }
}

/// As UCX names transports in addresses.
fn crc16(name: &[u8]) -> u16 {
    let step = |crc: u16, _| crc >> 1 ^ if crc & 1 == 1 { 0x8408 } else { 0 };
    !name.iter().fold(u16::MAX, |crc, byte| (0..8).fold(crc ^ u16::from(*byte), step))
}

#[cfg(test)]
mod tests;
