//! Tables of functions of vendors' libraries, which are opened at run time.

/// Says of a library that none of its `names` loads: that it is not there, or else why it does not load.
pub(crate) fn not_loaded(what: &str, tried: &[(&str, libloading::Error)]) -> String {
    let reason = tried.iter().find_map(|(name, error)| {
        let reason = baton_libfabric_sys::reason(error);
        // In these words the loader says that it found no file of that name; any other words are about one that it found.
        let is_absent =
            reason.strip_prefix(name).is_some_and(|rest| rest.ends_with(": No such file or directory"));
        (!is_absent).then_some(reason)
    });
    match reason {
        Some(reason) => format!("{what}, cannot be loaded: {reason}"),
        None => format!("{what}, is not on this machine"),
    }
}

/// A call of a vendor's library failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{call}: {reason}")]
pub(crate) struct CallError {
    /// The C function.
    pub(crate) call: &'static str,
    /// Its status, for people.
    pub(crate) reason: String,
}

/// Declares a table of C functions that return a status, and calls that turn it into a [`Result`].
macro_rules! table {
    ($(#[$doc:meta])* $table:ident $(#[$lint:meta])* { $($name:ident($($arg:ident: $type:ty),*);)* }) => {
        $(#[$doc])*
        pub(super) struct $table {
            $($name: unsafe extern "C" fn($($type),*) -> std::ffi::c_int,)*
        }

        $(#[$lint])*
        impl $table {
            fn load(symbol: impl Fn(&'static str) -> Result<*mut std::ffi::c_void, String>) -> Result<Self, String> {
                Ok(Self {
                    $($name: {
                        let found = symbol(stringify!($name))?;
                        // SAFETY: a function of this name has this signature in every version of the library: new
                        // signatures get new names. Data and function pointers have one size where it exists.
                        unsafe {
                            std::mem::transmute::<*mut std::ffi::c_void, unsafe extern "C" fn($($type),*) -> std::ffi::c_int>(found)
                        }
                    },)*
                })
            }

            $(
                /// The C function of this name.
                ///
                /// # Safety
                /// As its documentation says; pointers must be valid for the call, handles live.
                pub(super) unsafe fn $name(&self, $($arg: $type),*) -> Result<(), $crate::device::calls::CallError> {
                    // SAFETY: handed on to the caller.
                    let status = unsafe { (self.$name)($($arg),*) };
                    match status {
                        0 => Ok(()),
                        status => Err($crate::device::calls::CallError { call: stringify!($name), reason: self.reason(status) }),
                    }
                }
            )*
        }
    };
}

pub(crate) use table;
