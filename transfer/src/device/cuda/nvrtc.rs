//! Compiles the kernels for a GPU.

use std::ffi::{CStr, CString, c_char, c_int};

use cudarc::nvrtc::sys::nvrtcProgram;

use super::raw::{self, CallError, Nvrtc};
use crate::device::Unavailable;

/// The source of [`super::kernels`].
pub(super) const SOURCE: &str = include_str!("kernels.cu");

/// Why the kernels were not compiled.
#[derive(Debug, thiserror::Error)]
pub(super) enum CompileError {
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    #[error("the CUDA compiler failed")]
    Call(#[from] CallError),
    #[error("the kernels do not compile for {target}: {log}")]
    Source { target: String, log: String },
}

/// What the driver loads: machine code where the compiler knows the GPU, else PTX, which the driver translates.
pub(super) struct Image {
    /// `sm_90`, `compute_89`.
    pub(super) target: String,
    /// Ends with a zero byte, as PTX must.
    pub(super) bytes: Vec<u8>,
}

/// Version of the compiler.
pub(super) fn version() -> Result<(i32, i32), CompileError> {
    let nvrtc = raw::compiler()?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both pointers are valid for the call.
    unsafe { nvrtc.nvrtcVersion(&raw mut major, &raw mut minor) }?;
    Ok((major, minor))
}

/// The architectures the compiler knows: 90 for compute capability 9.0.
pub(super) fn architectures() -> Result<Vec<i32>, CompileError> {
    let nvrtc = raw::compiler()?;
    let mut count = 0;
    // SAFETY: the pointer is valid for the call.
    unsafe { nvrtc.nvrtcGetNumSupportedArchs(&raw mut count) }?;
    let mut known = vec![0; usize::try_from(count).unwrap_or(0)];
    // SAFETY: the list has room for as many as the compiler just said.
    unsafe { nvrtc.nvrtcGetSupportedArchs(known.as_mut_ptr()) }?;
    Ok(known)
}

/// Compiles the kernels for a GPU of this architecture.
pub(super) fn compile(architecture: i32) -> Result<Image, CompileError> {
    let known = architectures()?;
    if known.contains(&architecture) {
        return compile_for(format!("sm_{architecture}"), Nvrtc::nvrtcGetCUBINSize, Nvrtc::nvrtcGetCUBIN);
    }
    // A GPU newer than the compiler runs what was made for the newest one before it.
    let nearest = known.into_iter().filter(|each| *each < architecture).max().unwrap_or(architecture);
    compile_for(format!("compute_{nearest}"), Nvrtc::nvrtcGetPTXSize, Nvrtc::nvrtcGetPTX)
}

type Size = unsafe fn(&Nvrtc, nvrtcProgram, *mut usize) -> Result<(), CallError>;
type Get = unsafe fn(&Nvrtc, nvrtcProgram, *mut c_char) -> Result<(), CallError>;

fn compile_for(target: String, size: Size, get: Get) -> Result<Image, CompileError> {
    let program = Program::new(raw::compiler()?)?;
    let compiled = program.compile(&target);
    if let Err(error) = compiled {
        let log = program.fetch(Nvrtc::nvrtcGetProgramLogSize, Nvrtc::nvrtcGetProgramLog).unwrap_or_default();
        let log = CStr::from_bytes_until_nul(&log).map(CStr::to_string_lossy).unwrap_or_default();
        return Err(match log.trim() {
            "" => error.into(),
            log => CompileError::Source { target, log: log.to_owned() },
        });
    }
    let bytes = program.fetch(size, get)?;
    Ok(Image { target, bytes })
}

/// A program of the compiler, destroyed with this value.
struct Program {
    nvrtc: &'static Nvrtc,
    handle: nvrtcProgram,
}

impl Program {
    fn new(nvrtc: &'static Nvrtc) -> Result<Self, CompileError> {
        // The source has no zero byte; were there one, the compiler would see what is before it.
        let source = CString::new(SOURCE).unwrap_or_default();
        let mut handle = std::ptr::null_mut();
        let (name, none) = (c"kernels.cu".as_ptr(), std::ptr::null());
        // SAFETY: the compiler copies source and name; there are no headers.
        unsafe { nvrtc.nvrtcCreateProgram(&raw mut handle, source.as_ptr(), name, 0, none, none) }?;
        Ok(Self { nvrtc, handle })
    }

    fn compile(&self, target: &str) -> Result<(), CallError> {
        let architecture = CString::new(format!("--gpu-architecture={target}")).unwrap_or_default();
        let options = [architecture.as_ptr()];
        // SAFETY: the program is live, the options are valid for the call.
        unsafe { self.nvrtc.nvrtcCompileProgram(self.handle, options.len() as c_int, options.as_ptr()) }
    }

    fn fetch(&self, size: Size, get: Get) -> Result<Vec<u8>, CallError> {
        let mut len = 0;
        // SAFETY: the program is live, the pointer valid for the call.
        unsafe { size(self.nvrtc, self.handle, &raw mut len) }?;
        let mut bytes = vec![0; len + 1];
        // SAFETY: there is room for as many bytes as the compiler just said.
        unsafe { get(self.nvrtc, self.handle, bytes.as_mut_ptr().cast()) }?;
        Ok(bytes)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: a live program, which nobody uses after this. It has nothing to say that would matter.
        let _ = unsafe { self.nvrtc.nvrtcDestroyProgram(&raw mut self.handle) };
    }
}
