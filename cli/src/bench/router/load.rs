//! Requests sent, answers timed.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Barrier, Mutex, Semaphore};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::client::{Broken, Connection, Seen};
use super::workload::{Pace, Requests, Workload};
use crate::failure::chain;

/// Connections that are made at a time.
const OPENING: usize = 64;

/// Whom to ask, and how.
#[derive(Debug, Clone)]
pub(super) struct Load {
    pub(super) workload: Workload,
    /// Connections take turns with them.
    pub(super) targets: Vec<SocketAddr>,
    pub(super) concurrency: usize,
    pub(super) pace: Pace,
    /// Chats that requests are turns of, if they are.
    pub(super) chats: Option<usize>,
    pub(super) time: Duration,
}

/// What came of it.
#[derive(Debug, Default)]
pub(super) struct Sample {
    pub(super) answers: Vec<Seen>,
    pub(super) failed: u64,
    /// Of [`Pace::Open`]: streams that were open until the end.
    pub(super) opened: u64,
    /// What one of those that failed said.
    pub(super) failure: Option<String>,
    /// From the first request to the end of the last answer.
    pub(super) wall: Duration,
}

impl Sample {
    fn add(&mut self, answer: Result<Seen, Broken>) {
        match answer {
            Ok(seen) => self.answers.push(seen),
            Err(broken) => {
                self.failed += 1;
                self.failure.get_or_insert_with(|| chain(&broken));
            }
        }
    }

    /// Adds another one, that ran after this one or beside it.
    pub(super) fn join(&mut self, other: Self) {
        self.wall += other.wall;
        self.answers.extend(other.answers);
        self.failed += other.failed;
        self.opened += other.opened;
        self.failure = self.failure.take().or(other.failure);
    }

    pub(super) fn tokens(&self) -> u64 {
        self.answers.iter().map(|seen| seen.tokens).sum()
    }
}

impl Load {
    /// Runs it. `begin` is called when all connections are warm, right before what counts; of [`Pace::Open`], when all are open.
    pub(super) async fn run(&self, requests: &Requests, begin: impl FnOnce() + Send) -> Sample {
        match self.pace {
            Pace::Closed => self.closed(requests, begin).await,
            Pace::Open => self.open(requests, begin).await,
            Pace::Arrivals { per_s, count } => self.arrivals(requests, per_s, count, begin).await,
        }
    }

    async fn closed(&self, requests: &Requests, begin: impl FnOnce() + Send) -> Sample {
        let gate = Arc::new(Barrier::new(self.concurrency + 1));
        let mut clients = JoinSet::new();
        for number in 0..self.concurrency {
            let mut connection = Connection::new(self.targets[number % self.targets.len()]);
            let mut requests = requests.fork(number as u64);
            let (gate, time, streamed) = (Arc::clone(&gate), self.time, self.workload.streams());
            clients.spawn(async move {
                let (mut sample, mut request) = (Sample::default(), Vec::new());
                requests.next(&mut request);
                // A gateway that cannot answer even this will show below.
                let _ = connection.exchange(&request, streamed).await;
                gate.wait().await;
                gate.wait().await;
                let start = Instant::now();
                while start.elapsed() < time {
                    requests.next(&mut request);
                    sample.add(connection.exchange(&request, streamed).await);
                }
                sample
            });
        }
        gate.wait().await;
        begin();
        let start = Instant::now();
        gate.wait().await;
        let mut sample = gather(clients).await;
        sample.wall = start.elapsed();
        sample
    }

    /// Opens all streams, a few at a time, and leaves them when `time` is over; one that ends before has failed.
    async fn open(&self, requests: &Requests, begin: impl FnOnce() + Send) -> Sample {
        let mut clients = JoinSet::new();
        let (open, leave) = (Arc::new(Semaphore::new(OPENING)), CancellationToken::new());
        let start = Instant::now();
        for number in 0..self.concurrency {
            let mut connection = Connection::new(self.targets[number % self.targets.len()]);
            let mut requests = requests.fork(number as u64);
            let (open, leave) = (Arc::clone(&open), leave.clone());
            clients.spawn(async move {
                let mut request = Vec::new();
                requests.next(&mut request);
                let opened = {
                    let _turn = open.acquire().await;
                    connection.open().await
                };
                if let Err(broken) = opened {
                    return Some(broken);
                }
                match leave.run_until_cancelled(connection.exchange(&request, true)).await {
                    None => None,
                    Some(Ok(_)) => Some(Broken::Cut),
                    Some(Err(broken)) => Some(broken),
                }
            });
        }
        tokio::time::sleep_until(start + self.time).await;
        begin();
        leave.cancel();
        let mut sample = Sample::default();
        while let Some(ended) = clients.join_next().await {
            if let Ok(Some(broken)) = ended {
                sample.add(Err(broken));
            }
        }
        sample.opened = self.concurrency as u64 - sample.failed;
        sample.wall = start.elapsed();
        sample
    }

    async fn arrivals(
        &self,
        requests: &Requests,
        per_s: f64,
        count: u32,
        begin: impl FnOnce() + Send,
    ) -> Sample {
        let desk = Arc::new(Desk::new(self.chats, requests));
        begin();
        let start = Instant::now();
        let mut clients = JoinSet::new();
        let mut idle: Vec<Connection> = Vec::new();
        let mut sample = Sample::default();
        for number in 0..count {
            tokio::time::sleep_until(start + Duration::from_secs_f64(f64::from(number) / per_s)).await;
            while let Some(ended) = clients.try_join_next() {
                settle(ended, &mut idle, &mut sample);
            }
            let target = self.targets[number as usize % self.targets.len()];
            let kept = idle.iter().rposition(|connection| connection.target() == target);
            let mut connection = kept.map_or_else(|| Connection::new(target), |at| idle.swap_remove(at));
            let (desk, streamed) = (Arc::clone(&desk), self.workload.streams());
            clients.spawn(async move {
                let answer = desk.ask(&mut connection, streamed).await;
                (connection, answer)
            });
        }
        while let Some(ended) = clients.join_next().await {
            settle(ended, &mut idle, &mut sample);
        }
        sample.wall = start.elapsed();
        sample
    }
}

type Ended = Result<(Connection, Result<Seen, Broken>), tokio::task::JoinError>;

fn settle(ended: Ended, idle: &mut Vec<Connection>, sample: &mut Sample) {
    // A client that panicked is a bug: it is shown by the runtime, and its request missing.
    let Ok((connection, answer)) = ended else { return };
    idle.push(connection);
    sample.add(answer);
}

async fn gather(mut clients: JoinSet<Sample>) -> Sample {
    let mut all = Sample::default();
    while let Some(Ok(sample)) = clients.join_next().await {
        all.join(sample);
    }
    all
}

/// Hands out requests to those who arrive: any of a workload, or the next turn of one of the chats that wait.
struct Desk {
    requests: Mutex<Requests>,
    chats: Option<Chats>,
}

struct Chats {
    waiting: Mutex<Vec<String>>,
    there: Semaphore,
}

impl Desk {
    fn new(chats: Option<usize>, requests: &Requests) -> Self {
        let chats = chats.map(|count| Chats {
            waiting: Mutex::new(vec![String::new(); count]),
            there: Semaphore::new(count),
        });
        Self { requests: Mutex::new(requests.clone()), chats }
    }

    async fn ask(&self, connection: &mut Connection, streamed: bool) -> Result<Seen, Broken> {
        let mut request = Vec::new();
        let Some(chats) = &self.chats else {
            self.requests.lock().await.next(&mut request);
            return connection.exchange(&request, streamed).await;
        };
        // Who speaks waits for the answer before: the time is taken from when it may be asked.
        let Ok(_turn) = chats.there.acquire().await else { return Err(Broken::Cut) };
        let chat = {
            let (mut waiting, mut requests) = (chats.waiting.lock().await, self.requests.lock().await);
            // Any of them: in turns they would come back to the same worker by themselves.
            let at = requests.below(waiting.len());
            let mut chat = if waiting.is_empty() { String::new() } else { waiting.swap_remove(at) };
            requests.turn(&mut chat, &mut request);
            chat
        };
        let answer = connection.exchange(&request, streamed).await;
        chats.waiting.lock().await.push(chat);
        answer
    }
}
