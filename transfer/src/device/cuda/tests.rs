use super::*;
use crate::device::Unavailable;

/// Machines without a GPU are told what is missing; on those with one, this is where it is tried out.
#[test]
fn without_a_driver_there_is_a_reason_and_a_remedy() {
    match CudaDevice::open(0, 1 << 20) {
        Ok(device) => {
            println!("{device:?}: kernels for {:?}", device.kernel_target());
            let mut bytes = [1; 64];
            device.read(1 << 19, &mut bytes);
            assert_eq!(bytes, [0; 64], "a fresh arena is zeroed");
        }
        Err(Unavailable { what, remedy }) => {
            assert!(!what.is_empty() && !remedy.is_empty());
            println!("no GPU is tried out: {what} ({remedy})");
        }
    }
    for probe in probe() {
        assert!(probe.works || probe.remedy.is_some_and(|remedy| !remedy.is_empty()), "{}", probe.detail);
    }
}

/// Needs the compiler, but no GPU.
#[test]
fn the_kernels_compile_for_what_the_compiler_knows_and_for_later_gpus() {
    let known = match nvrtc::architectures() {
        Ok(known) => known,
        Err(error) => {
            println!("skipped: {}", chain(&error));
            return;
        }
    };
    println!("NVRTC {:?} knows {known:?}", nvrtc::version().unwrap());
    for architecture in [known.iter().min(), known.iter().max()].into_iter().flatten().copied() {
        let image = nvrtc::compile(architecture).unwrap_or_else(|error| panic!("{}", chain(&error)));
        assert_eq!(image.target, format!("sm_{architecture}"));
        assert!(image.bytes.starts_with(b"\x7fELF"), "machine code for sm_{architecture}");
    }
    let newest = known.iter().max().unwrap();
    let later = nvrtc::compile(newest + 1).unwrap_or_else(|error| panic!("{}", chain(&error)));
    assert_eq!(later.target, format!("compute_{newest}"));
    let ptx = String::from_utf8(later.bytes).unwrap();
    for kernel in ["digest_groups", "digest_lanes", "digest_finish", "copy_blocks", "relayout"] {
        assert!(ptx.contains(&format!(".entry baton_{kernel}")), "{kernel}");
    }
    assert!(ptx.ends_with('\0'));
}
