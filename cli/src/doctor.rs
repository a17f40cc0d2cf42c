//! `baton doctor`: what works on this machine, tried out where it can be, and why the rest does not.

mod nics;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::Duration;

use baton_config::Accelerator;
use baton_config::choice::Choice;
use baton_config::fleet::{BackendKind, EngineKind};
use baton_transfer::probe::{self, Probe};
use baton_transfer::{HostMemory, LibfabricOptions, PluginOptions, UcxOptions};
use serde::Serialize;

use crate::args::DoctorArgs;
use crate::failure::{Failure, chain};
use crate::output;
use crate::table::columns;

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
    let findings = examine(args);
    if args.json {
        let lines: Result<Vec<String>, _> = findings.iter().map(serde_json::to_string).collect();
        let lines =
            lines.map_err(|error| Failure::because("the findings cannot be written as JSON", &error))?;
        return output::print(&format!("{}\n", lines.join("\n")));
    }
    let mut rows = vec![["", "NAME", "WORKS", "DETAIL"].map(str::to_owned).to_vec()];
    for finding in findings {
        let works = if finding.works { "yes" } else { "no" };
        rows.push(vec![finding.kind.to_owned(), finding.name, works.to_owned(), finding.detail]);
        // In a column of its own it would be far beyond the edge of a terminal.
        let below = |remedy| vec![String::new(), String::new(), String::new(), format!("remedy: {remedy}")];
        rows.extend(finding.remedy.map(below));
    }
    output::print(&columns(&rows))
}

fn examine(args: &DoctorArgs) -> Vec<Finding> {
    let mut findings: Vec<Finding> =
        BackendKind::ALL.iter().flat_map(|(_, kind)| backend(*kind, args)).collect();
    findings.extend(nics::findings());
    findings.extend(Accelerator::ALL.iter().flat_map(|(_, kind)| accelerator(*kind)));
    findings.extend(EngineKind::ALL.iter().map(|(_, kind)| engine(*kind)));
    findings
}

impl Finding {
    fn new(kind: &'static str, probe: Probe) -> Self {
        let Probe { name, works, detail, remedy } = probe;
        Self { kind, name, works, detail, remedy: remedy.filter(|remedy| !remedy.is_empty()) }
    }
}

fn backend(kind: BackendKind, args: &DoctorArgs) -> Vec<Finding> {
    let bind = args.bind;
    let tried = |result: Result<String, String>, remedy: &str| match result {
        Ok(detail) => vec![Probe::works(kind.word(), detail)],
        Err(why) => vec![Probe::fails(kind.word(), why, remedy)],
    };
    let probes = match kind {
        BackendKind::Shm => tried(probe_shm(), "allow memfd_create, and enough locked and shared memory"),
        BackendKind::Cma => vec![probe::cma()],
        BackendKind::Tcp => tried(probe_tcp(), "bring the loopback interface up"),
        BackendKind::Libfabric => probe::libfabric(&LibfabricOptions { bind, ..LibfabricOptions::default() }),
        BackendKind::Ucx => probe::ucx(&UcxOptions { bind, ..UcxOptions::default() }),
        BackendKind::Plugin => match &args.plugin {
            Some(path) => probe::plugin(&PluginOptions { path: path.clone(), bind: Some(bind) }),
            None => tried(Err("no plugin was named".to_owned()), "baton doctor --plugin PATH tries one"),
        },
        BackendKind::File | BackendKind::Object => tried(Err(NOT_BUILT.to_owned()), "use tcp or shm"),
    };
    probes.into_iter().map(|probe| Finding::new("backend", probe)).collect()
}

fn accelerator(kind: Accelerator) -> Vec<Finding> {
    let probes = match kind {
        Accelerator::Cpu => {
            let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
            vec![Probe::works("cpu", format!("{threads} threads"))]
        }
        Accelerator::Simulated => {
            vec![Probe::works(
                "simulated",
                "an emulated device in host memory that only explicit copies reach",
            )]
        }
        Accelerator::Cuda => probe::cuda(),
        Accelerator::Trainium => probe::neuron(),
    };
    probes.into_iter().map(|probe| Finding::new("accelerator", probe)).collect()
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
