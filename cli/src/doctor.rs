//! `baton doctor`: what works on this machine, tried out where it can be, and why the rest does not.

mod libraries;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;

use baton_config::Accelerator;
use baton_config::choice::Choice;
use baton_config::fleet::{BackendKind, EngineKind, accelerator_is_available};
use baton_transfer::HostMemory;
use serde::Serialize;

use crate::args::DoctorArgs;
use crate::failure::{Failure, chain};
use crate::output;
use crate::table::columns;
use libraries::Library;

/// Bytes sent through each probed path.
const PROBE_BYTES: usize = 64 << 10;
/// Loopback answers well within this.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// What a library that is there is still good for.
const NOT_BUILT: &str = "not built into this version yet";

/// One thing that a fleet may use.
#[derive(Debug, Serialize)]
struct Finding {
    kind: &'static str,
    name: String,
    works: bool,
    detail: String,
    remedy: Option<String>,
}

pub(crate) fn run(args: &DoctorArgs) -> Result<(), Failure> {
    let findings = examine();
    if args.json {
        let lines: Result<Vec<String>, _> = findings.iter().map(serde_json::to_string).collect();
        let lines =
            lines.map_err(|error| Failure::because("the findings cannot be written as JSON", &error))?;
        return output::print(&format!("{}\n", lines.join("\n")));
    }
    let head = ["", "NAME", "WORKS", "DETAIL", "REMEDY"].map(str::to_owned);
    let mut rows = vec![Vec::from(head)];
    rows.extend(findings.into_iter().map(|finding| {
        let works = if finding.works { "yes" } else { "no" };
        let remedy = finding.remedy.unwrap_or_default();
        vec![finding.kind.to_owned(), finding.name, works.to_owned(), finding.detail, remedy]
    }));
    output::print(&columns(&rows))
}

fn examine() -> Vec<Finding> {
    let mut findings: Vec<Finding> = BackendKind::ALL.iter().map(|(_, kind)| backend(*kind)).collect();
    findings.extend(Accelerator::ALL.iter().map(|(_, kind)| accelerator(*kind)));
    findings.extend(EngineKind::ALL.iter().map(|(_, kind)| engine(*kind)));
    findings
}

fn backend(kind: BackendKind) -> Finding {
    let name = kind.to_string();
    let probed = |result: Result<String, String>, remedy: &str| match result {
        Ok(detail) => Finding { kind: "backend", name: name.clone(), works: true, detail, remedy: None },
        Err(detail) => {
            let remedy = Some(remedy.to_owned());
            Finding { kind: "backend", name: name.clone(), works: false, detail, remedy }
        }
    };
    match kind {
        BackendKind::Shm => probed(probe_shm(), "allow memfd_create, and enough locked and shared memory"),
        BackendKind::Tcp => probed(probe_tcp(), "bring the loopback interface up"),
        BackendKind::Libfabric => from_library("backend", &name, Library::LIBFABRIC),
        BackendKind::Ucx => from_library("backend", &name, Library::UCX),
        BackendKind::Cma | BackendKind::Plugin | BackendKind::File | BackendKind::Object => {
            probed(Err(NOT_BUILT.to_owned()), "use tcp or shm")
        }
    }
}

fn accelerator(kind: Accelerator) -> Finding {
    let name = kind.to_string();
    let works = accelerator_is_available(kind);
    match kind {
        Accelerator::Cpu => {
            let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
            let detail = format!("{threads} threads");
            Finding { kind: "accelerator", name, works, detail, remedy: None }
        }
        Accelerator::Simulated => {
            let detail = "an emulated device in host memory that only explicit copies reach".to_owned();
            Finding { kind: "accelerator", name, works, detail, remedy: None }
        }
        Accelerator::Cuda => with_device(from_library("accelerator", &name, Library::CUDA), "/dev/nvidia0"),
        Accelerator::Trainium => {
            with_device(from_library("accelerator", &name, Library::NEURON), "/dev/neuron0")
        }
    }
}

fn engine(kind: EngineKind) -> Finding {
    let name = kind.word().to_owned();
    if kind.is_available() {
        let detail = "part of this binary".to_owned();
        return Finding { kind: "engine", name, works: true, detail, remedy: None };
    }
    let remedy = Some("use reference or sim".to_owned());
    Finding { kind: "engine", name, works: false, detail: NOT_BUILT.to_owned(), remedy }
}

/// What is known of something that needs a shared library, and that this build could not use in any case.
fn from_library(kind: &'static str, name: &str, library: Library) -> Finding {
    let (detail, remedy) = match library.find() {
        Some(place) => (format!("{NOT_BUILT}; {} is here: {place}", library.file), None),
        None => (
            format!("{NOT_BUILT}; {} is not installed either", library.file),
            Some(library.remedy.to_owned()),
        ),
    };
    Finding { kind, name: name.to_owned(), works: false, detail, remedy }
}

fn with_device(mut finding: Finding, device: &str) -> Finding {
    let there = if Path::new(device).exists() { "is there" } else { "is not there" };
    finding.detail.push_str(&format!("; {device} {there}"));
    finding
}

/// Writes and reads shared memory as workers of one host share it.
fn probe_shm() -> Result<String, String> {
    let memory = HostMemory::allocate(PROBE_BYTES, "doctor").map_err(|error| chain(&error))?;
    let sent = vec![0xA5; PROBE_BYTES];
    memory.write(0, &sent);
    let mut received = vec![0; PROBE_BYTES];
    memory.read(0, &mut received);
    if received == sent {
        Ok("memfd memory written and read".to_owned())
    } else {
        Err("memory lost its bytes".to_owned())
    }
}

/// Sends bytes through loopback.
fn probe_tcp() -> Result<String, String> {
    let exchange = || -> std::io::Result<bool> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let mut sender = TcpStream::connect_timeout(&listener.local_addr()?, PROBE_TIMEOUT)?;
        let (mut receiver, _) = listener.accept()?;
        receiver.set_read_timeout(Some(PROBE_TIMEOUT))?;
        // Small enough for the socket buffers: nobody has to read meanwhile.
        let sent = vec![0x5A; PROBE_BYTES];
        sender.set_write_timeout(Some(PROBE_TIMEOUT))?;
        sender.write_all(&sent)?;
        let mut received = vec![0; PROBE_BYTES];
        receiver.read_exact(&mut received)?;
        Ok(received == sent)
    };
    match exchange() {
        Ok(true) => Ok("loopback carried bytes".to_owned()),
        Ok(false) => Err("loopback changed bytes".to_owned()),
        Err(error) => Err(format!("loopback failed: {error}")),
    }
}
