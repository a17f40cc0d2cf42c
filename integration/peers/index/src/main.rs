//! The default index of Dynamo's router (`ConcurrentRadixTreeCompressed`, one thread for events) and its plain radix tree, under the
//! load of `baton bench index`; one JSON object a row, with the names of that.
//!
//! Usage: peer-index [WORKERS...]. Time of events is that of the thread that applies them.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Instant;

use dynamo_kv_router::indexer::{SyncIndexer, WorkerTask};
use dynamo_kv_router::protocols::{
    ExternalSequenceBlockHash, KvCacheEvent, KvCacheEventData, KvCacheRemoveData, KvCacheStoreData,
    KvCacheStoredBlockData, LocalBlockHash, OverlapScores, RouterEvent,
};
use dynamo_kv_router::{ConcurrentRadixTreeCompressed, RadixTree};

#[path = "../../../../router/src/measure/index/workload.rs"]
mod workload;

use workload::{Dice, Event, workload};

const LOOKUPS: usize = 200_000;
const MEMBERSHIPS: usize = 1_000_000;

/// Bytes that are allocated.
struct Counting;
static BYTES: AtomicI64 = AtomicI64::new(0);

// SAFETY: every call is passed on unchanged to the system's allocator, which keeps the contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        BYTES.fetch_add(layout.size() as i64, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        BYTES.fetch_sub(layout.size() as i64, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn cpu_ns() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0)
}

fn stored(event: &Event, id: usize) -> RouterEvent {
    let block = |hash: &u64| KvCacheStoredBlockData {
        block_hash: ExternalSequenceBlockHash(*hash),
        tokens_hash: LocalBlockHash(*hash),
        mm_extra_info: None,
    };
    let data = KvCacheStoreData {
        parent_hash: event.parent.map(ExternalSequenceBlockHash),
        start_position: None,
        blocks: event.blocks.iter().map(block).collect(),
    };
    of(event, id, KvCacheEventData::Stored(data))
}

fn removed(event: &Event, id: usize) -> RouterEvent {
    let block_hashes = event.blocks.iter().copied().map(ExternalSequenceBlockHash).collect();
    of(event, id, KvCacheEventData::Removed(KvCacheRemoveData { block_hashes }))
}

fn of(event: &Event, id: usize, data: KvCacheEventData) -> RouterEvent {
    RouterEvent::new(event.worker as u64, KvCacheEvent { event_id: id as u64, data, dp_rank: 0 })
}

trait Index {
    fn name(&self) -> &'static str;
    /// Applies all events; nanoseconds on the processor.
    fn apply(&mut self, events: Vec<RouterEvent>) -> u64;
    fn find(&self, prompt: Vec<LocalBlockHash>) -> OverlapScores;
}

struct Radix(RadixTree);

impl Index for Radix {
    fn name(&self) -> &'static str {
        "radix"
    }

    fn apply(&mut self, events: Vec<RouterEvent>) -> u64 {
        let begun = cpu_ns();
        for event in events {
            self.0.apply_event(event).expect("a good event");
        }
        cpu_ns() - begun
    }

    fn find(&self, prompt: Vec<LocalBlockHash>) -> OverlapScores {
        self.0.find_matches(prompt, false)
    }
}

/// Its thread keeps what it knows of workers, and so lives as long as the index.
struct Compressed {
    tree: Arc<ConcurrentRadixTreeCompressed>,
    tasks: flume::Sender<WorkerTask>,
    thread: std::path::PathBuf,
}

impl Compressed {
    fn start() -> Self {
        let tree = Arc::new(ConcurrentRadixTreeCompressed::new());
        let (tasks, receiver) = flume::unbounded();
        let (say, hear) = flume::bounded(1);
        let ours = Arc::clone(&tree);
        std::thread::spawn(move || {
            let thread = std::fs::read_link("/proc/thread-self").expect("a thread has a number");
            say.send(std::path::Path::new("/proc").join(thread).join("schedstat")).expect("somebody listens");
            ours.worker(receiver, None)
        });
        Self { tree, tasks, thread: hear.recv().expect("the thread started") }
    }

    fn cpu_ns(&self) -> u64 {
        let text = std::fs::read_to_string(&self.thread).unwrap_or_default();
        text.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0)
    }
}

impl Index for Compressed {
    fn name(&self) -> &'static str {
        "concurrent_radix_compressed"
    }

    fn apply(&mut self, events: Vec<RouterEvent>) -> u64 {
        let begun = self.cpu_ns();
        for event in events {
            self.tasks.send(WorkerTask::Event(event)).expect("the thread lives");
        }
        // It is done when it sleeps again: time on the processor no longer grows.
        let mut before = self.cpu_ns();
        loop {
            std::thread::sleep(std::time::Duration::from_millis(50));
            let now = self.cpu_ns();
            if self.tasks.is_empty() && now == before {
                return now - begun;
            }
            before = now;
        }
    }

    fn find(&self, prompt: Vec<LocalBlockHash>) -> OverlapScores {
        self.tree.find_matches(&prompt, false)
    }
}

fn measure(mut index: Box<dyn Index>, workers: usize, replicas: usize) {
    let mut dice = Dice(7);
    let (events, prompts) = workload(workers, replicas, MEMBERSHIPS, &mut dice);
    let memberships: usize = events.iter().map(|event| event.blocks.len()).sum();
    let all = |make: fn(&Event, usize) -> RouterEvent| -> Vec<RouterEvent> {
        events.iter().enumerate().map(|(id, event)| make(event, id)).collect()
    };
    let before = BYTES.load(Ordering::Relaxed);
    let store_ns = index.apply(all(stored));
    let bytes = BYTES.load(Ordering::Relaxed) - before;
    let hashes = |prompt: &Vec<u64>| prompt.iter().copied().map(LocalBlockHash).collect::<Vec<_>>();
    let prompts: Vec<Vec<LocalBlockHash>> = prompts.iter().map(hashes).collect();
    // The copies that its interface asks for are made before.
    let asked: Vec<Vec<LocalBlockHash>> =
        (0..LOOKUPS / 10).map(|_| prompts[dice.below(prompts.len())].clone()).collect();
    let mut times = Vec::with_capacity(asked.len());
    let mut depths = 0;
    let begun = cpu_ns();
    let lookups = asked.len() as u64;
    for prompt in asked {
        let from = Instant::now();
        let found = index.find(prompt);
        times.push(from.elapsed().as_nanos() as u64);
        depths += found
            .scores
            .iter()
            .filter(|(worker, _)| worker.worker_id == 0)
            .map(|(_, depth)| u64::from(*depth))
            .sum::<u64>();
    }
    let find_ns = (cpu_ns() - begun) / lookups;
    times.sort_unstable();
    let remove_ns = index.apply(all(removed));
    let count = events.len() as u64;
    println!(
        "{}",
        serde_json::json!({
            "index": index.name(), "workers": workers, "replicas": replicas, "memberships": memberships,
            "bytes_per_membership": bytes as f64 / memberships as f64, "stored_ns": store_ns / count,
            "removed_ns": remove_ns / count, "find_ns": find_ns, "find_p50_ns": times[times.len() / 2],
            "find_p99_ns": times[times.len() * 99 / 100], "depths": depths,
        })
    );
}

fn main() {
    let named: Vec<usize> = std::env::args().skip(1).filter_map(|word| word.parse().ok()).collect();
    let workers = if named.is_empty() { vec![8, 64, 512] } else { named };
    let most = workers.iter().copied().max().unwrap_or(8);
    let shapes =
        workers.iter().map(|workers| (*workers, 8.min(*workers))).chain((most > 8).then_some((most, most)));
    for (workers, replicas) in shapes {
        measure(Box::new(Radix(RadixTree::new())), workers, replicas);
        measure(Box::new(Compressed::start()), workers, replicas);
    }
}
