//! A part started by `baton up` ends when the launcher does, however that ended.

use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};

use crate::failure::Failure;

/// Asks the kernel to kill this process when its parent ends.
///
/// The signal cannot be caught: whoever could wait for a drain is gone.
pub(crate) fn die_with(parent: u32) -> Result<(), Failure> {
    set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|error| Failure::because("cannot follow the launcher's end", &error))?;
    // The launcher may have ended before the line above.
    let expected = i32::try_from(parent).ok().and_then(Pid::from_raw);
    if getppid() == expected {
        Ok(())
    } else {
        Err(Failure::failed(format!("the launcher (process {parent}) is gone")))
    }
}
