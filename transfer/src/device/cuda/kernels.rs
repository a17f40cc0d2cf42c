//! Launches the kernels: digests, gathers and re-layouts of blocks in the memory of a GPU.

use std::ffi::{CStr, c_void};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{CUdevice_attribute, CUdeviceptr};

use super::nvrtc::{self, CompileError};
use super::owners::{Area, Context, Event, Function, Memory, Module, Stream};
use super::raw::CallError;
use crate::device::Move;

const THREADS: u64 = 256;
/// Thread groups per multiprocessor: enough to hide the latency of memory.
const GROUPS_PER_PROCESSOR: u64 = 16;
/// Most thread groups in the second dimension of a launch.
const GRID_Y_MAX: usize = 65_535;
/// Words of parameters and results of one launch: 2048 digests, or 472 moves.
const AREA_WORDS: usize = 6 << 10;
/// Blocks of one launch: three words each.
const BLOCKS_MAX: usize = AREA_WORDS / 3;
/// Words of one move: the structure `piece` of the source.
const MOVE_WORDS: usize = 13;
/// Scratch memory for digests that is kept: a sixteenth of the blocks of one launch.
const SCRATCH_BYTES: usize = 4 << 20;

/// As in the source.
const STRIPE: u64 = 64;
const STRIPES_PER_GROUP: u64 = 16;
const LANES: u64 = 8;
const SHORT_BYTES: u64 = 240;

/// Why there are no kernels.
#[derive(Debug, thiserror::Error)]
pub(super) enum KernelsError {
    #[error(transparent)]
    Compile(#[from] CompileError),
    #[error("the driver does not take the kernels for {target}")]
    Load {
        target: String,
        #[source]
        source: CallError,
    },
    #[error("the kernels cannot be set up")]
    Call(#[from] CallError),
}

/// The kernels of one GPU.
pub(super) struct Kernels {
    context: Arc<Context>,
    /// What they were compiled for.
    pub(super) target: String,
    groups: Function,
    lanes: Function,
    finish: Function,
    copy: Function,
    relayout: Function,
    stream: Stream,
    most_groups: u64,
    scratch: Mutex<Memory>,
    areas: Mutex<Vec<(Area, Event)>>,
    /// Keeps the functions.
    _module: Module,
}

/// A launch under way.
pub(super) struct Launched {
    area: Option<(Area, Event)>,
    kernels: Arc<Kernels>,
}

impl Launched {
    /// Waits for its end.
    pub(super) fn wait(mut self) -> Result<(), CallError> {
        let Some((area, event)) = self.area.take() else { return Ok(()) };
        event.wait()?;
        self.kernels.give_back(area, event);
        Ok(())
    }
}

impl Drop for Launched {
    fn drop(&mut self) {
        if let Some((_, event)) = &self.area {
            // The kernel reads the area until its end, whatever came of it.
            let _ = event.wait();
        }
    }
}

/// Bytes to copy, at most a launch's worth.
pub(super) struct Copies<'a> {
    /// Addresses that both columns of `places` count from.
    pub(super) from: CUdeviceptr,
    pub(super) to: CUdeviceptr,
    /// Where each block is, and where it goes.
    pub(super) places: &'a [(usize, usize)],
    pub(super) len: usize,
}

impl Kernels {
    /// Compiles and loads them.
    pub(super) fn open(context: &Arc<Context>) -> Result<Self, KernelsError> {
        let image = nvrtc::compile(context.gpu.architecture()?)?;
        let module = Module::load(context, &image.bytes)
            .map_err(|source| KernelsError::Load { target: image.target.clone(), source })?;
        let function = |name: &CStr| module.function(name);
        let processors =
            context.gpu.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        Ok(Self {
            context: Arc::clone(context),
            target: image.target,
            groups: function(c"baton_digest_groups")?,
            lanes: function(c"baton_digest_lanes")?,
            finish: function(c"baton_digest_finish")?,
            copy: function(c"baton_copy_blocks")?,
            relayout: function(c"baton_relayout")?,
            stream: Stream::new(context)?,
            most_groups: u64::try_from(processors).unwrap_or(1).max(1) * GROUPS_PER_PROCESSOR,
            scratch: Mutex::new(Memory::allocate(context, SCRATCH_BYTES)?),
            areas: Mutex::default(),
            _module: module,
        })
    }

    /// Most blocks of one [`Copies`].
    pub(super) const COPIES_MAX: usize = AREA_WORDS / 2;

    /// Digests of blocks of `len` bytes at offsets from `base`, with their folded seeds.
    pub(super) fn digest(
        &self,
        base: CUdeviceptr,
        blocks: &[(usize, u64)],
        len: usize,
    ) -> Result<Vec<u64>, CallError> {
        // Launches of one stream come one after the other, and so they may share the scratch memory; the lock is for
        // its size.
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let need = scratch_bytes(len as u64);
        if need > scratch.len as u64 {
            *scratch = Memory::allocate(&self.context, need as usize)?;
        }
        let at_once = (scratch.len as u64 / need.max(1)).clamp(1, BLOCKS_MAX as u64) as usize;
        let mut digests = Vec::with_capacity(blocks.len());
        for batch in blocks.chunks(at_once) {
            digests.extend(self.digest_batch(base, batch, len as u64, scratch.address)?);
        }
        if scratch.len > SCRATCH_BYTES {
            *scratch = Memory::allocate(&self.context, SCRATCH_BYTES)?;
        }
        Ok(digests)
    }

    fn digest_batch(
        &self,
        base: CUdeviceptr,
        blocks: &[(usize, u64)],
        len: u64,
        sums: CUdeviceptr,
    ) -> Result<Vec<u64>, CallError> {
        let count = blocks.len() as u64;
        let (mut area, event) = self.area()?;
        area.put(0, blocks.iter().map(|(at, _)| *at as u64));
        area.put(BLOCKS_MAX, blocks.iter().map(|(_, seed)| *seed));
        let (at, seeds, digests) = (area.at(0), area.at(BLOCKS_MAX), area.at(2 * BLOCKS_MAX));
        let groups = groups_of(len);
        let lanes = sums + count * groups * LANES * 8;
        if len > SHORT_BYTES {
            let parameters = [base, at, seeds, len, count, sums];
            self.launch(self.groups, count * groups * LANES, 1, &parameters)?;
            self.launch(self.lanes, count * LANES, 1, &[sums, seeds, len, count, lanes])?;
        }
        self.launch(self.finish, count, 1, &[base, at, seeds, len, count, lanes, digests])?;
        event.record(&self.stream)?;
        event.wait()?;
        let found = area.get(2 * BLOCKS_MAX, blocks.len());
        self.give_back(area, event);
        Ok(found)
    }

    /// Starts copies. Both sides must stay until the result was waited for.
    pub(super) fn copy(self: &Arc<Self>, copies: &Copies<'_>) -> Result<Launched, CallError> {
        let Copies { from, to, places, len } = *copies;
        let (mut area, event) = self.area()?;
        area.put(0, places.iter().map(|(from, _)| *from as u64));
        area.put(Self::COPIES_MAX, places.iter().map(|(_, to)| *to as u64));
        let all = places.iter().flat_map(|(from, to)| [*from as u64, *to as u64]);
        let unit = unit_of([from, to, len as u64].into_iter().chain(all));
        let count = places.len() as u64;
        let (from_at, to_at) = (area.at(0), area.at(Self::COPIES_MAX));
        let parameters = [from, from_at, to, to_at, len as u64, count, unit];
        self.launch(self.copy, count * (len as u64 / unit), 1, &parameters)?;
        event.record(&self.stream)?;
        Ok(Launched { area: Some((area, event)), kernels: Arc::clone(self) })
    }

    /// Carries runs of bytes from places counted from `base` to others.
    pub(super) fn relayout(&self, base: CUdeviceptr, moves: &[Move]) -> Result<(), CallError> {
        for batch in moves.chunks((AREA_WORDS / MOVE_WORDS).min(GRID_Y_MAX)) {
            let (mut area, event) = self.area()?;
            for (i, each) in batch.iter().enumerate() {
                area.put(i * MOVE_WORDS, move_words(each).into_iter());
            }
            let threads = batch.iter().map(|each| {
                let runs: usize = each.loops.iter().map(|each| each.count).product();
                (runs * each.run) as u64 / unit_of_move(each)
            });
            let most = threads.max().unwrap_or(0);
            let parameters = [base, base, area.at(0), batch.len() as u64];
            self.launch(self.relayout, most, batch.len() as u32, &parameters)?;
            event.record(&self.stream)?;
            event.wait()?;
            self.give_back(area, event);
        }
        Ok(())
    }

    /// Launches a kernel, all of whose parameters are 64 bits wide or read as their low half.
    fn launch(
        &self,
        function: Function,
        threads: u64,
        rows: u32,
        parameters: &[u64],
    ) -> Result<(), CallError> {
        let cuda = self.context.enter()?;
        let columns = threads.div_ceil(THREADS).clamp(1, self.most_groups) as u32;
        let mut pointers: Vec<*mut c_void> =
            parameters.iter().map(|each| std::ptr::from_ref(each).cast_mut().cast()).collect();
        // SAFETY: the driver copies as many bytes per parameter as the kernel declares, at most eight; the kernel only
        // touches what its parameters name, which this module checks or owns.
        unsafe {
            cuda.cuLaunchKernel(
                function.0,
                columns,
                rows,
                1,
                THREADS as u32,
                1,
                1,
                0,
                self.stream.handle,
                pointers.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
    }

    fn area(&self) -> Result<(Area, Event), CallError> {
        if let Some(free) = self.areas.lock().unwrap_or_else(PoisonError::into_inner).pop() {
            return Ok(free);
        }
        Ok((Area::allocate(&self.context, AREA_WORDS)?, Event::new(&self.context)?))
    }

    /// Keeps an area for the next launch. One whose launch failed is not given back but freed.
    fn give_back(&self, area: Area, event: Event) {
        self.areas.lock().unwrap_or_else(PoisonError::into_inner).push((area, event));
    }
}

/// Groups of stripes of a block, the last of which may be cut.
fn groups_of(len: u64) -> u64 {
    (len.saturating_sub(1) / STRIPE).div_ceil(STRIPES_PER_GROUP)
}

/// Scratch memory that the digest of one block takes: sums of its groups, and its lanes.
fn scratch_bytes(len: u64) -> u64 {
    (groups_of(len) + 1) * LANES * 8
}

/// The widest unit that all of these are multiples of, among those the kernels copy.
fn unit_of(numbers: impl Iterator<Item = u64>) -> u64 {
    let bits = numbers.fold(16, |bits, number| bits | number);
    match bits.trailing_zeros() {
        0 => 1,
        1 => 2,
        2 | 3 => 4,
        _ => 16,
    }
}

fn unit_of_move(each: &Move) -> u64 {
    let steps = each.loops.iter().filter(|each| each.count > 1).flat_map(|each| [each.from, each.to]);
    // Arenas start at multiples of 256.
    unit_of([each.from, each.to, each.run].into_iter().chain(steps).map(|number| number as u64))
}

/// A move as the structure of the source.
fn move_words(each: &Move) -> [u64; MOVE_WORDS] {
    let [inner, middle, outer] = each.loops;
    let column = |of: fn(&crate::device::MoveLoop) -> usize| [of(&inner), of(&middle), of(&outer)];
    let (counts, from, to) = (column(|l| l.count), column(|l| l.from), column(|l| l.to));
    let mut words = [each.from as u64, each.to as u64, each.run as u64, unit_of_move(each)]
        .into_iter()
        .chain([counts, from, to].into_iter().flatten().map(|number| number as u64));
    std::array::from_fn(|_| words.next().unwrap_or(0))
}
