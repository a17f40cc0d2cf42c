//! The network libraries by themselves, beside the backends made of them: the plainest loop over one endpoint, on either
//! side a thread that looks again and again. It tells which part of a read's time is the library's.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::Shape;
use crate::agent::BackendKind;
use crate::backend::fabric::driver::DriverError;
use crate::backend::{libfabric, ucx};
use crate::memory::HostMemory;

/// The backends that are made of a library.
const LIBRARIES: [BackendKind; 2] = [BackendKind::Libfabric, BackendKind::Ucx];
/// Looks of an owner between two looks whether it is to rest.
const LOOKS: usize = 64;
/// Bytes that are compared before anything is measured.
const TRIED_BYTES: usize = 4 << 10;

/// Where an owner is, and the key of its memory.
type Place = (Vec<u8>, Vec<u8>);

/// What a reader needs of an owner, or why there is none.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Shown {
    backend: String,
    owner: Result<Place, String>,
}

/// The side that reads.
pub(super) enum Reader {
    Libfabric(Box<libfabric::bare::Reader>),
    Ucx(Box<ucx::bare::Reader>),
}

impl Reader {
    /// Connects to the owner of a library; none where a backend is made of none. `into` is where blocks go.
    pub(super) fn open(
        backend: BackendKind,
        shown: &[Shown],
        into: &HostMemory,
    ) -> Option<Result<Self, String>> {
        let shown = shown.iter().find(|shown| shown.backend == backend.as_str())?;
        let open = |(address, key): &Place| {
            let span = into.span();
            match backend {
                BackendKind::Libfabric => libfabric::bare::Reader::open(&span, address, key)
                    .map(|reader| Self::Libfabric(Box::new(reader))),
                _ => ucx::bare::Reader::open(&span, address, key).map(|reader| Self::Ucx(Box::new(reader))),
            }
        };
        let owner = shown.owner.as_ref().map_err(Clone::clone);
        Some(owner.and_then(|owner| open(owner).map_err(|error| error.to_string())))
    }

    /// What it is, as rows name it.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Libfabric(_) => "fi_read",
            Self::Ucx(_) => "ucp_get_nbx",
        }
    }

    /// Whether blocks arrive: `twin` holds what the owner's memory holds.
    pub(super) fn try_out(&mut self, into: &HostMemory, twin: &HostMemory) -> io::Result<()> {
        let len = TRIED_BYTES.min(into.len());
        into.write(0, &vec![0; len]);
        self.read(&[(0, len)])?;
        let (mut came, mut expected) = (vec![0; len], vec![0; len]);
        into.read(0, &mut came);
        twin.read(0, &mut expected);
        if came == expected { Ok(()) } else { Err(io::Error::other("other bytes came than were asked for")) }
    }

    /// Reads blocks by offset and length.
    pub(super) fn read(&mut self, blocks: &[(usize, usize)]) -> io::Result<()> {
        let read = match self {
            Self::Libfabric(reader) => reader.read(blocks),
            Self::Ucx(reader) => reader.read(blocks),
        };
        read.map_err(io::Error::other)
    }
}

/// The blocks of a shape, by offset and length.
pub(super) fn blocks(shape: Shape) -> Vec<(usize, usize)> {
    (0..shape.blocks).map(|index| (shape.offset(index), shape.block_bytes as usize)).collect()
}

/// The owners of one process, each on a thread of its own that rests until it is told to look.
pub(super) struct Owners(Vec<(BackendKind, Arc<Gate>)>);

#[derive(Default)]
struct Gate {
    is_open: AtomicBool,
    told: Mutex<()>,
    opened: Condvar,
}

impl Gate {
    fn set(&self, open: bool) {
        let _told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        self.is_open.store(open, Ordering::Relaxed);
        self.opened.notify_all();
    }

    fn is_open(&self) -> bool {
        self.is_open.load(Ordering::Relaxed)
    }

    fn wait(&self) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        while !self.is_open() {
            told = self.opened.wait(told).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Owners {
    /// Shows `memory` over the libraries of `backends`, for as long as the process lives.
    pub(super) fn start(backends: &[BackendKind], memory: &HostMemory) -> (Self, Vec<Shown>) {
        let (mut owners, mut all) = (Self(Vec::new()), Vec::new());
        for backend in LIBRARIES.into_iter().filter(|kind| backends.contains(kind)) {
            let (gate, (tell, told)) = (Arc::new(Gate::default()), mpsc::sync_channel(1));
            let (own, memory) = (Arc::clone(&gate), memory.clone());
            // The library's objects stay on the thread that made them.
            std::thread::spawn(move || match backend {
                BackendKind::Libfabric => {
                    let opened = libfabric::bare::Owner::open(&memory.span());
                    let shown = |owner: &libfabric::bare::Owner| (owner.address(), owner.key());
                    serve(opened, &tell, &own, shown, libfabric::bare::Owner::turn);
                }
                _ => {
                    let opened = ucx::bare::Owner::open(&memory.span());
                    let shown = |owner: &ucx::bare::Owner| (owner.address(), owner.key());
                    serve(opened, &tell, &own, shown, ucx::bare::Owner::turn);
                }
            });
            let owner = told.recv().unwrap_or_else(|_| Err("its thread has ended".to_owned()));
            all.push(Shown { backend: backend.as_str().to_owned(), owner });
            owners.0.push((backend, gate));
        }
        (owners, all)
    }

    /// Lets the owner of one library look, or none.
    pub(super) fn wake(&self, backend: Option<&str>) {
        self.0.iter().for_each(|(kind, gate)| gate.set(backend == Some(kind.as_str())));
    }
}

fn serve<T>(
    opened: Result<T, DriverError>,
    tell: &mpsc::SyncSender<Result<Place, String>>,
    gate: &Gate,
    shown: impl Fn(&T) -> Place,
    turn: impl Fn(&mut T),
) {
    let mut owner = match opened {
        Ok(owner) => owner,
        Err(error) => {
            let _ = tell.send(Err(error.to_string()));
            return;
        }
    };
    let _ = tell.send(Ok(shown(&owner)));
    loop {
        gate.wait();
        while gate.is_open() {
            (0..LOOKS).for_each(|_| turn(&mut owner));
        }
    }
}
