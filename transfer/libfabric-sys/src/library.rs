//! `libfabric.so.1`, opened once for the whole process and never closed: providers leave threads and handlers behind.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

use crate::Errno;
use crate::abi::{fi_fabric_attr, fi_info, fi_version_of, fid_fabric};

/// What the dynamic loader looks for.
const NAME: &str = "libfabric.so.1";
/// The oldest whose layout these bindings were checked against.
const OLDEST: u32 = fi_version_of(1, 17);
/// The newest interface asked for: it brought dma-buf. Newer libraries still speak it.
const NEWEST: u32 = fi_version_of(1, 20);

/// Why the library cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The loader did not find it, or could not load what it needs.
    #[error("{NAME} cannot be loaded: {}", reason(.0))]
    Missing(libloading::Error),
    /// A function is not there.
    #[error("{NAME} has no function {name}: {}", reason(.source))]
    Symbol {
        /// Its name.
        name: &'static str,
        /// The loader's reason.
        source: Box<libloading::Error>,
    },
    /// It is too old.
    #[error("{NAME} is version {}.{}, needed is 1.17 or later", .0 >> 16, .0 & 0xffff)]
    Old(u32),
}

/// The loader's own words: which file it looked for, or what that one lacks.
pub fn reason(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

type GetInfo =
    unsafe extern "C" fn(u32, *const c_char, *const c_char, u64, *const fi_info, *mut *mut fi_info) -> c_int;

/// The functions that the library exports; all others are in the tables of its objects.
#[derive(Debug)]
pub struct Library {
    version: u32,
    getinfo: GetInfo,
    freeinfo: unsafe extern "C" fn(*mut fi_info),
    dupinfo: unsafe extern "C" fn(*const fi_info) -> *mut fi_info,
    fabric: unsafe extern "C" fn(*mut fi_fabric_attr, *mut *mut fid_fabric, *mut c_void) -> c_int,
    strerror: unsafe extern "C" fn(c_int) -> *const c_char,
}

impl Library {
    /// The library of this process, opened at the first call that finds it.
    ///
    /// # Errors
    /// When there is none, or it is too old.
    pub fn get() -> Result<&'static Self, OpenError> {
        static LIBRARY: OnceLock<Library> = OnceLock::new();
        if let Some(library) = LIBRARY.get() {
            return Ok(library);
        }
        let opened = Self::open()?;
        Ok(LIBRARY.get_or_init(|| opened))
    }

    fn open() -> Result<Self, OpenError> {
        // SAFETY: libfabric's initialisers only set up its own state; it is the library of the system's package.
        let loaded = unsafe { libloading::Library::new(NAME) }.map_err(OpenError::Missing)?;
        // Never unloaded: see the module.
        let loaded = Box::leak(Box::new(loaded));
        // SAFETY: `uint32_t fi_version(void)`, see fi_version(3).
        let version: unsafe extern "C" fn() -> u32 = unsafe { symbol(loaded, "fi_version") }?;
        // SAFETY: it takes nothing and touches no memory of ours.
        let version = unsafe { version() };
        if version < OLDEST {
            return Err(OpenError::Old(version));
        }
        Ok(Self {
            version,
            // SAFETY: the type is that of the C declaration, see fi_getinfo(3); the default symbol version is taken,
            // which is the same one for all functions that take a `fi_info`.
            getinfo: unsafe { symbol(loaded, "fi_getinfo") }?,
            // SAFETY: as above.
            freeinfo: unsafe { symbol(loaded, "fi_freeinfo") }?,
            // SAFETY: as above.
            dupinfo: unsafe { symbol(loaded, "fi_dupinfo") }?,
            // SAFETY: the type is that of the C declaration, see fi_fabric(3).
            fabric: unsafe { symbol(loaded, "fi_fabric") }?,
            // SAFETY: the type is that of the C declaration, see fi_errno(3).
            strerror: unsafe { symbol(loaded, "fi_strerror") }?,
        })
    }

    /// Of the library: major and minor.
    pub fn version(&self) -> (u32, u32) {
        (self.version >> 16, self.version & 0xffff)
    }

    /// The version of the interface to ask for.
    pub fn api(&self) -> u32 {
        self.version.min(NEWEST)
    }

    /// The library's words for a status.
    pub fn strerror(&self, errno: Errno) -> String {
        // SAFETY: takes any number; returns a constant string, or null never.
        let text = unsafe { (self.strerror)(errno.0) };
        if text.is_null() {
            return errno.to_string();
        }
        // SAFETY: a constant, terminated string of the library, which is never unloaded.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }

    /// A list of what matches the hints; free it with [`Library::freeinfo`].
    ///
    /// # Errors
    /// The library's status: [`Errno::NODATA`] when nothing matches.
    ///
    /// # Safety
    /// `hints` came from [`Library::dupinfo`] and is intact.
    pub unsafe fn getinfo(
        &self,
        node: Option<&CStr>,
        flags: u64,
        hints: *const fi_info,
    ) -> Result<*mut fi_info, Errno> {
        let mut info = std::ptr::null_mut();
        let node = node.map_or(std::ptr::null(), CStr::as_ptr);
        // SAFETY: `node` is null or terminated, `hints` is the library's own object (caller), `info` is ours.
        let status =
            unsafe { (self.getinfo)(self.api(), node, std::ptr::null(), flags, hints, &raw mut info) };
        Errno::check(status as isize).map(|_| info)
    }

    /// Frees a list.
    ///
    /// # Safety
    /// `info` came from [`Library::getinfo`] or [`Library::dupinfo`] and is not used again.
    pub unsafe fn freeinfo(&self, info: *mut fi_info) {
        // SAFETY: by the caller.
        unsafe { (self.freeinfo)(info) };
    }

    /// A copy of one entry, or an empty one from null; null when memory is out.
    ///
    /// # Safety
    /// `info` is null or an intact entry of the library.
    pub unsafe fn dupinfo(&self, info: *const fi_info) -> *mut fi_info {
        // SAFETY: by the caller.
        unsafe { (self.dupinfo)(info) }
    }

    /// Opens a fabric.
    ///
    /// # Errors
    /// The library's status.
    ///
    /// # Safety
    /// `attr` is that of an intact entry of [`Library::getinfo`].
    pub unsafe fn fabric(&self, attr: *mut fi_fabric_attr) -> Result<*mut fid_fabric, Errno> {
        let mut fabric = std::ptr::null_mut();
        // SAFETY: by the caller; `fabric` is ours.
        let status = unsafe { (self.fabric)(attr, &raw mut fabric, std::ptr::null_mut()) };
        Errno::check(status as isize).map(|_| fabric)
    }
}

/// One exported function.
///
/// # Safety
/// `F` is the C type of the function of that name.
unsafe fn symbol<F: Copy + 'static>(
    library: &'static libloading::Library,
    name: &'static str,
) -> Result<F, OpenError> {
    // SAFETY: the type is right (caller) and the library is never unloaded, so the copied pointer stays valid.
    let symbol = unsafe { library.get::<F>(name) };
    symbol.map(|found| *found).map_err(|source| OpenError::Symbol { name, source: Box::new(source) })
}
