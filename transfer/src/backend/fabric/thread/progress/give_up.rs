//! Ends what does not end by itself: batches that were given up, peers that failed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Progress;
use super::job::Job;
use crate::backend::fabric::batch::{Batch, Verb};
use crate::backend::fabric::driver::Driver;

/// How often jobs that should have ended long ago are looked for.
const SWEEP: Duration = Duration::from_millis(250);
/// How long what was given up may stay posted. Then its peer is disconnected, and its buffers are free.
const GIVEN_UP_MAX: Duration = Duration::from_secs(2);
/// How long a message may take: the peer is there, or it is disconnected.
const SEND_MAX: Duration = Duration::from_secs(15);

impl<D: Driver + ?Sized> Progress<D> {
    pub(super) fn abort(&mut self, batch: &Arc<Batch>) {
        let found = self.jobs.iter().find(|(_, job)| Arc::ptr_eq(&job.batch, batch)).map(|(key, _)| key);
        match found {
            Some(job) => self.give_up(job, &"given up".into()),
            // It ended already, or was never taken.
            None => batch.refuse(&"given up".into()),
        }
    }

    /// Posts nothing more of a job and stops awaiting its messages.
    pub(super) fn give_up(&mut self, key: u64, why: &Arc<str>) {
        let Some(job) = self.jobs.get_mut(key) else { return };
        if job.failed.is_none() {
            job.failed = Some(Arc::clone(why));
            job.since = Instant::now();
        }
        let (peer, receives) = (job.peer, job.batch.receives());
        if receives {
            self.receives.retain(|(job, _)| *job != key);
            let posted: Vec<u64> =
                self.ops.iter().filter(|(_, op)| op.job == key).map(|(op, _)| op).collect();
            for op in posted {
                self.driver().cancel_receive(op);
            }
        } else if let Some(peer) = self.peers.get_mut(peer) {
            peer.window.withdraw(|posting| posting.job == key);
        }
        self.touch(key);
    }

    /// Ends everything with a peer: its first failure is its last.
    pub(super) fn sever(&mut self, key: u64, why: &Arc<str>) {
        let Some(peer) = self.peers.get_mut(key) else { return };
        if peer.failed.is_some() {
            return;
        }
        peer.failed = Some(Arc::clone(why));
        if let Some(handle) = peer.handle.upgrade() {
            let _ = handle.failed.set(Arc::clone(why));
        }
        for job in self.jobs_of(key) {
            self.give_up(job, why);
        }
        match self.may_block {
            true => self.close(key),
            false => self.closing.push(key),
        }
    }

    fn jobs_of(&self, peer: u64) -> Vec<u64> {
        self.jobs.iter().filter(|(_, job)| job.peer == peer).map(|(key, _)| key).collect()
    }

    /// Closes the connection to a peer that has failed.
    pub(super) fn close(&mut self, key: u64) {
        let Some(id) = self.peers.get_mut(key).map(|peer| peer.id) else { return };
        self.driver().disconnect(id);
        // What lingers is settled by its reports.
        let cut = !self.driver().lingers(id);
        for job in self.jobs_of(key) {
            if let Some(job) = self.jobs.get_mut(job) {
                // A message that is awaited is nobody's until it comes: its buffer is free when it was reported.
                job.cut = cut && job.posted > 0 && !job.batch.receives();
            }
            self.touch(job);
        }
    }

    /// Disconnects the peers of jobs that do not end.
    pub(super) fn sweep(&mut self) {
        if self.swept.elapsed() < SWEEP {
            return;
        }
        self.swept = Instant::now();
        let is_stuck = |job: &Job| {
            let sends = matches!(job.batch.transfer(0).verb, Verb::Send { .. } | Verb::Ask);
            let age = job.since.elapsed();
            !job.batch.receives() && (age > GIVEN_UP_MAX && job.failed.is_some() || age > SEND_MAX && sends)
        };
        let stuck: Vec<u64> =
            self.jobs.iter().filter(|(_, job)| is_stuck(job)).map(|(_, job)| job.peer).collect();
        for peer in stuck {
            self.sever(peer, &"its operations do not end".into());
        }
    }
}
