//! The C ABI of `plugin/baton_driver.h`, word for word; a test compares sizes and offsets with the header's.

use std::ffi::c_char;

pub(super) const ABI_VERSION: u32 = 1;
/// Symbol of the only function that a plugin exports.
pub(super) const ENTRY: &str = "baton_driver_v1";

pub(super) const OK: i32 = 0;
pub(super) const FAILED: i32 = 1;
pub(super) const AGAIN: i32 = 2;
pub(super) const RANGE: i32 = 3;

pub(super) const SAME_HOST: u32 = 1 << 0;
pub(super) const CAN_READ: u32 = 1 << 1;
pub(super) const CAN_WRITE: u32 = 1 << 2;
pub(super) const TAKES_CUDA: u32 = 1 << 4;
pub(super) const TAKES_NEURON: u32 = 1 << 5;

pub(super) const PLACE_HOST: u32 = 0;
pub(super) const PLACE_CUDA: u32 = 1;
pub(super) const PLACE_NEURON: u32 = 2;

pub(super) const ACCESS_LOCAL: u32 = 0;
pub(super) const ACCESS_REMOTE_READ: u32 = 1;
pub(super) const ACCESS_REMOTE_WRITE: u32 = 2;

/// An opened driver, behind a pointer only.
#[repr(C)]
pub(super) struct RawDriver {
    _opaque: [u8; 0],
}

#[repr(C)]
pub(super) struct RawError {
    pub(super) what: [u8; 512],
    pub(super) remedy: [u8; 256],
}

impl RawError {
    pub(super) fn zeroed() -> Self {
        Self { what: [0; 512], remedy: [0; 256] }
    }
}

#[repr(C)]
pub(super) struct RawOpenOptions {
    pub(super) size: u32,
    pub(super) reserved: u32,
    pub(super) bind: *const c_char,
}

#[repr(C)]
pub(super) struct RawInfo {
    pub(super) flags: u32,
    pub(super) rails: u32,
    pub(super) message_max: u64,
    pub(super) op_max: u64,
    pub(super) nap_us: u32,
    pub(super) reserved: u32,
    pub(super) wire: [u8; 64],
    pub(super) detail: [u8; 256],
    pub(super) no_cuda: [u8; 128],
    pub(super) no_neuron: [u8; 128],
}

impl RawInfo {
    pub(super) fn zeroed() -> Self {
        Self {
            flags: 0,
            rails: 0,
            message_max: 0,
            op_max: 0,
            nap_us: 0,
            reserved: 0,
            wire: [0; 64],
            detail: [0; 256],
            no_cuda: [0; 128],
            no_neuron: [0; 128],
        }
    }
}

#[repr(C)]
pub(super) struct RawMemory {
    pub(super) address: u64,
    pub(super) len: u64,
    pub(super) place: u32,
    pub(super) device: u32,
    pub(super) dmabuf: i32,
    pub(super) reserved: u32,
    pub(super) dmabuf_offset: u64,
}

#[repr(C)]
pub(super) struct RawBlob {
    pub(super) bytes: *mut u8,
    pub(super) room: u64,
    pub(super) len: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct RawLocal {
    pub(super) registration: u64,
    pub(super) offset: u64,
    pub(super) len: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct RawRemote {
    pub(super) peer: u64,
    pub(super) key: u64,
    pub(super) offset: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct RawDone {
    pub(super) op: u64,
    pub(super) bytes: u64,
    pub(super) status: i32,
    pub(super) reserved: u32,
    pub(super) why: [u8; 104],
}

impl RawDone {
    pub(super) const ZEROED: Self = Self { op: 0, bytes: 0, status: 0, reserved: 0, why: [0; 104] };
}

/// Declares the table as it comes, where a function may be missing, and as it is used, where none is.
macro_rules! table {
    ($($name:ident($($argument:ty),*) $(-> $result:ty)?;)*) => {
        #[repr(C)]
        #[derive(Clone, Copy)]
        pub(super) struct RawTable {
            pub(super) abi_version: u32,
            pub(super) size: u32,
            $(pub(super) $name: Option<unsafe extern "C" fn($($argument),*) $(-> $result)?>,)*
        }

        /// A table in which every function is there.
        #[derive(Clone, Copy)]
        pub(super) struct Table {
            $(pub(super) $name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
        }

        impl RawTable {
            /// The table, or the name of the first function that is missing.
            pub(super) fn complete(&self) -> Result<Table, &'static str> {
                Ok(Table { $($name: self.$name.ok_or(stringify!($name))?,)* })
            }
        }
    };
}

table! {
    open(*const RawOpenOptions, *mut *mut RawDriver, *mut RawError) -> i32;
    close(*mut RawDriver);
    info(*mut RawDriver, *mut RawInfo, *mut RawError) -> i32;
    address(*mut RawDriver, *mut RawBlob, *mut RawError) -> i32;
    register_memory(*mut RawDriver, *const RawMemory, u32, *mut u64, *mut RawBlob, *mut RawError) -> i32;
    deregister(*mut RawDriver, u64);
    connect(*mut RawDriver, *const u8, u64, *mut u64, *mut RawError) -> i32;
    disconnect(*mut RawDriver, u64);
    import_key(*mut RawDriver, u64, *const u8, u64, *mut u64, *mut RawError) -> i32;
    forget(*mut RawDriver, u64, u64);
    read(*mut RawDriver, *const RawRemote, *const RawLocal, u64, *mut RawError) -> i32;
    write(*mut RawDriver, *const RawRemote, *const RawLocal, u64, *mut RawError) -> i32;
    send(*mut RawDriver, u64, u64, *const RawLocal, u64, *mut RawError) -> i32;
    receive(*mut RawDriver, u64, *const RawLocal, u64, *mut RawError) -> i32;
    cancel_receive(*mut RawDriver, u64);
    poll(*mut RawDriver, *mut RawDone, u32, *mut u32) -> i32;
    arm(*mut RawDriver) -> i32;
    wait_fd(*mut RawDriver) -> i32;
}

/// What a table's entry function looks like.
pub(super) type Entry = unsafe extern "C" fn() -> *const RawTable;

/// Text of a plugin: up to its NUL or the end of its room, without control characters.
pub(super) fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let text = String::from_utf8_lossy(&bytes[..end]);
    let clean: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    clean.trim().to_owned()
}
