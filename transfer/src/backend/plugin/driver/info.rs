//! What a plugin says it can do: taken only where it makes sense.

use std::ops::RangeInclusive;
use std::time::Duration;

use crate::backend::fabric::driver::DriverInfo;
use crate::backend::plugin::abi::{self, RawInfo};

/// Longest message a plugin may offer: buffers of this size are made for it.
const MESSAGE_LIMIT: u64 = 1 << 30;
/// Shortest limit of one-sided operations that is of any use.
const OP_MAX_LEAST: u64 = 4096;
const RAILS: RangeInclusive<u32> = 1..=64;
const NAP_MAX_US: u32 = 100_000;
const NAP_DEFAULT: Duration = Duration::from_millis(1);

/// What a plugin can do, and how long one may sleep over it.
pub(super) struct Checked {
    pub(super) info: DriverInfo,
    pub(super) nap: Duration,
}

/// The information, or what is absurd about it.
pub(super) fn check(raw: &RawInfo) -> Result<Checked, String> {
    let has = |flag: u32| raw.flags & flag != 0;
    let (read, write) = (has(abi::CAN_READ), has(abi::CAN_WRITE));
    if !read && !write && raw.message_max == 0 {
        return Err("it has neither reads nor writes nor messages".to_owned());
    }
    if (read || write) && raw.op_max < OP_MAX_LEAST {
        return Err(format!("its longest operation is {} bytes, less than {OP_MAX_LEAST}", raw.op_max));
    }
    if raw.message_max > MESSAGE_LIMIT {
        return Err(format!("its longest message is {} bytes, more than {MESSAGE_LIMIT}", raw.message_max));
    }
    if !RAILS.contains(&raw.rails) {
        return Err(format!("it has {} rails, not {} to {}", raw.rails, RAILS.start(), RAILS.end()));
    }
    if raw.nap_us > NAP_MAX_US {
        return Err(format!("it would have others sleep for {} us, more than {NAP_MAX_US}", raw.nap_us));
    }
    let wire = wire(&raw.wire)?;
    let detail = Some(abi::text(&raw.detail)).filter(|detail| !detail.is_empty());
    let nap = if raw.nap_us == 0 { NAP_DEFAULT } else { Duration::from_micros(u64::from(raw.nap_us)) };
    let device = |flag, reason: &[u8]| {
        let why = Some(abi::text(reason)).filter(|why| !why.is_empty());
        if has(flag) { Ok(()) } else { Err(why.unwrap_or_else(|| "the plugin does not take it".to_owned())) }
    };
    let device_memory = vec![
        ("cuda", device(abi::TAKES_CUDA, &raw.no_cuda)),
        ("neuron", device(abi::TAKES_NEURON, &raw.no_neuron)),
    ];
    let info = DriverInfo {
        detail: detail.unwrap_or_else(|| wire.clone()),
        wire,
        same_host: has(abi::SAME_HOST),
        read,
        write,
        emulated: false,
        message_max: raw.message_max as usize,
        requests: false,
        op_max: raw.op_max.min(isize::MAX as u64) as usize,
        rails: raw.rails as usize,
        device_memory,
    };
    Ok(Checked { info, nap })
}

fn wire(bytes: &[u8; 64]) -> Result<String, String> {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    match std::str::from_utf8(&bytes[..end]) {
        Ok(wire) if !wire.is_empty() && wire.bytes().all(|byte| byte.is_ascii_graphic()) => {
            Ok(wire.to_owned())
        }
        _ => Err("its `wire` is not a word of printable ASCII".to_owned()),
    }
}
