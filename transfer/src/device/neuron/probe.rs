//! What of Neuron works on this machine, for `baton doctor`.

use super::raw::{self, Version};
use crate::device::Unavailable;
use crate::probe::Probe;

/// Where the kernel module shows its devices.
const DEVICES: &str = "/dev";

/// Looks for the runtime, the module and the devices. Does not initialise the runtime: that would take the devices.
pub fn probe() -> Vec<Probe> {
    let mut found = match raw::queries() {
        Ok(queries) => runtime(&queries),
        Err(Unavailable { what, remedy }) => vec![Probe::fails("neuron runtime", what, remedy)],
    };
    let devices = std::fs::read_dir(DEVICES).into_iter().flatten().flatten();
    let is_neuron = |name: &str| {
        let number = name.strip_prefix("neuron");
        number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let count = devices.filter(|entry| entry.file_name().to_str().is_some_and(is_neuron)).count();
    found.push(match count {
        0 => Probe::fails(
            "neuron devices",
            "there is no /dev/neuron0",
            "use an instance with Trainium or Inferentia 2, and install aws-neuronx-dkms",
        ),
        count => Probe::works("neuron devices", format!("{count}, as /dev/neuron0 and following")),
    });
    found
}

fn runtime(queries: &raw::Queries) -> Vec<Probe> {
    let mut version = Version::zero();
    // SAFETY: the structure is as long as it says.
    let asked = unsafe { queries.nrt_get_version(&raw mut version, size_of::<Version>()) };
    let runtime = match asked {
        Ok(()) => {
            let Version { major, minor, patch, maintenance, .. } = version;
            Probe::works("neuron runtime", format!("libnrt {major}.{minor}.{patch}.{maintenance}"))
        }
        Err(error) => Probe::fails("neuron runtime", error.to_string(), "see neuron-ls"),
    };
    let (mut total, mut visible) = (0, 0);
    // SAFETY: the pointers are valid for the calls, which may come before the runtime is initialised.
    let counted = unsafe { queries.nrt_get_total_nc_count(&raw mut total) }
        // SAFETY: as above.
        .and_then(|()| unsafe { queries.nrt_get_visible_nc_count(&raw mut visible) });
    let cores = match counted {
        Ok(()) if visible > 0 => Probe::works("neuron cores", format!("{visible} of {total} visible")),
        Ok(()) => Probe::fails(
            "neuron cores",
            format!("none of {total} is visible"),
            "check NEURON_RT_VISIBLE_CORES",
        ),
        Err(error) => Probe::fails("neuron cores", error.to_string(), "see neuron-ls"),
    };
    vec![runtime, cores]
}
