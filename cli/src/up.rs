//! `baton up`: every part of a fleet as a process of its own on this machine.
//!
//! One task owns the roster (who shall run) and the children (who does). It reacts to ended children, to signals,
//! and to the conductor's view: which workers are ready, and how many an operator wants of each pool.

mod child;
mod plan;
mod ports;
mod roster;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_conductor::http::{Caller, TlsFault};
use baton_conductor::{Client, ClientOptions, View, WorkerState};
use baton_config::environment::Environment;
use reqwest::{Method, RequestBuilder};
use rustix::process::Signal;
use tokio::sync::{mpsc, watch};
use tokio_util::task::TaskTracker;

use crate::args::{LogFormat, UpArgs};
use crate::check;
use crate::failure::Failure;
use crate::logging::Logging;
use crate::output::{print, tell};
use crate::remote;
use crate::signals::Signals;
use child::{Child, Exit, Nursery};
use plan::Plan;
use roster::{Action, Ended, PartId, Roster};

/// How often a part that is starting is asked whether it is ready.
const PROBE_INTERVAL: Duration = Duration::from_millis(50);
/// Time a part has to answer a probe.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);
/// How often the launcher says whom it is still waiting for.
const PATIENCE: Duration = Duration::from_secs(10);
/// Time a part has to end once its own grace is over.
const KILL_MARGIN: Duration = Duration::from_secs(5);
/// Ends of children not yet handled; each child has at most one.
const EXITS_QUEUED: usize = 64;

pub(crate) fn run(args: UpArgs, logging: &Logging, environment: &Environment) -> Result<(), Failure> {
    let config = check::fleet_path(args.fleet.as_deref(), environment);
    let fleet = check::load(args.fleet.as_deref(), environment)?;
    fleet.startable()?;
    check::model(&fleet)?;
    // A single thread: children are killed when the thread that started them ends.
    remote::block_on(async move {
        let mut signals = Signals::listen()?;
        let (exits, ended) = mpsc::channel(EXITS_QUEUED);
        let plan = Plan::new(fleet, config, args.listen, logging)?;
        let launcher = Launcher::new(plan, logging.format, exits)?;
        let tasks = launcher.nursery.tasks.clone();
        let result = launcher.run(&mut signals, ended).await;
        tasks.close();
        tasks.wait().await;
        result
    })
}

/// How far the start has come.
#[derive(Debug)]
enum Stage {
    /// Only the conductor runs; the others are held back until it answers.
    Conductor { held: Vec<PartId> },
    /// All run; not all workers are ready.
    Workers { ready: BTreeSet<PartId> },
    /// The workers are ready; the router is not.
    Router,
    /// Requests are served.
    Serving,
    /// Everything is being stopped.
    Stopping,
}

struct Launcher {
    plan: Plan,
    nursery: Nursery,
    roster: Roster,
    children: BTreeMap<PartId, Child>,
    http: reqwest::Client,
    caller: Caller,
    stage: Stage,
    next_probe: Instant,
    next_report: Instant,
    client: Option<Client>,
}

impl Launcher {
    fn new(mut plan: Plan, format: LogFormat, exits: mpsc::Sender<Exit>) -> Result<Self, Failure> {
        let now = Instant::now();
        let executable = std::env::current_exe()
            .map_err(|error| Failure::because("cannot find the baton binary itself", &error))?;
        let roster = Roster::new(plan.pools(), plan.grace() + KILL_MARGIN, now);
        // Every address of the start is found before anything is started, so that nothing is half up.
        for worker in roster.workers() {
            plan.address(worker, true)?;
        }
        let conductor = plan.conductor_url();
        let caller = remote::caller(plan.conductor_access(), [conductor.as_str()])?;
        Ok(Self {
            http: remote::client_believing(plan.router_certificate())?,
            plan,
            nursery: Nursery { executable, format, exits, tasks: TaskTracker::new() },
            roster,
            children: BTreeMap::new(),
            caller,
            stage: Stage::Conductor { held: Vec::new() },
            next_probe: now,
            next_report: now + PATIENCE,
            client: None,
        })
    }

    async fn run(mut self, signals: &mut Signals, mut ended: mpsc::Receiver<Exit>) -> Result<(), Failure> {
        self.plan.tell_missing();
        let mut failure: Option<Failure> = None;
        let mut views: Option<watch::Receiver<Arc<View>>> = None;
        loop {
            for action in self.roster.step(Instant::now()) {
                if let Err(fault) = self.perform(action) {
                    self.give_up(fault, &mut failure);
                }
            }
            if self.roster.is_empty() {
                break;
            }
            let wake = self.roster.next_wake().into_iter().chain(self.next_tick()).min();
            tokio::select! {
                biased;
                () = signals.next() => self.signalled(),
                Some(exit) = ended.recv() => {
                    if let Some(fault) = self.exited(exit).await {
                        self.give_up(fault, &mut failure);
                    }
                }
                () = changed(&mut views) => {}
                () = sleep_until(wake) => {}
            }
            if let Err(fault) = self.advance().await {
                self.give_up(fault, &mut failure);
            }
            if views.is_none() {
                views = self.client.as_ref().map(Client::changed);
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// Ends everything because of a failure; the first one is the one to tell.
    fn give_up(&mut self, fault: Failure, failure: &mut Option<Failure>) {
        failure.get_or_insert(fault);
        self.stop();
        self.roster.kill(Instant::now());
    }

    fn signalled(&mut self) {
        if matches!(self.stage, Stage::Stopping) {
            tell("ending everything now");
            self.roster.kill(Instant::now());
        } else {
            tell("draining; Ctrl-C again ends everything now");
            self.stop();
        }
    }

    fn stop(&mut self) {
        if let Stage::Conductor { held } = std::mem::replace(&mut self.stage, Stage::Stopping) {
            for id in held {
                self.roster.ended(&id, true, Instant::now());
            }
        }
        // Nobody follows the fleet any more: losing the conductor is no news now.
        self.client = None;
        self.roster.stop();
    }

    fn perform(&mut self, action: Action) -> Result<(), Failure> {
        match action {
            Action::Start(id) => self.start(id)?,
            Action::Terminate(id) => self.signal(&id, Signal::TERM),
            Action::Kill(id) => self.signal(&id, Signal::KILL),
        }
        Ok(())
    }

    fn signal(&self, id: &PartId, signal: Signal) {
        if let Some(child) = self.children.get(id) {
            child.signal(signal);
        }
    }

    fn start(&mut self, id: PartId) -> Result<(), Failure> {
        if let Stage::Conductor { held } = &mut self.stage
            && id != PartId::Conductor
        {
            held.push(id);
            return Ok(());
        }
        let started = self.plan.address(&id, false).and_then(|address| {
            let args = self.plan.arguments(&id, address);
            self.nursery.start(&id, args)
        });
        match started {
            Ok(child) => {
                self.children.insert(id, child);
                Ok(())
            }
            Err(fault) if matches!(self.stage, Stage::Serving) => {
                tell(&format!("{id}: {fault}; trying again"));
                self.roster.ended(&id, false, Instant::now());
                Ok(())
            }
            Err(fault) => {
                self.roster.ended(&id, true, Instant::now());
                Err(fault)
            }
        }
    }

    /// Handles the end of a child; a failure is told while the fleet is not yet serving.
    async fn exited(&mut self, exit: Exit) -> Option<Failure> {
        let Exit { id, pid, status, .. } = &exit;
        let wanted = self.roster.is_wanted(id);
        let ended = self.roster.ended(id, status.success(), Instant::now());
        self.children.remove(id);
        if wanted && !matches!(self.stage, Stage::Serving | Stage::Stopping) {
            return Some(Failure::failed(format!("{id} ended while starting: {}", exit.reason())));
        }
        match ended {
            Ended::Stopped => {
                self.plan.release(id);
                if !matches!(self.stage, Stage::Stopping) {
                    tell(&format!("{id} is gone"));
                }
            }
            Ended::Left => {
                self.plan.release(id);
                tell(&format!("{id} was drained and left"));
            }
            Ended::Restarting { after } => {
                tell(&format!(
                    "{id} ended ({}); starting it again in {} ms",
                    exit.reason(),
                    after.as_millis()
                ));
                self.deregister(id, *pid).await;
            }
        }
        None
    }

    /// Takes a dead worker out of every view, and its name free for its successor, before its lease runs out.
    async fn deregister(&self, id: &PartId, pid: u32) {
        let (Some(name), Some(client)) = (id.worker(), &self.client) else { return };
        let view = client.view();
        let Some(record) = view.worker(&name).filter(|record| record.pid == pid) else { return };
        let url = format!("{}/v1/workers/{name}?epoch={}", self.plan.conductor_url(), record.epoch);
        let request = self.caller.request(Method::DELETE, &url).timeout(PROBE_TIMEOUT);
        if let Err(error) = request.send().await {
            tracing::debug!(error = &error as &dyn std::error::Error, worker = %name, "not deregistered");
        }
    }

    /// When there is something to probe or to say although nothing happens.
    fn next_tick(&self) -> Option<Instant> {
        match self.stage {
            Stage::Conductor { .. } | Stage::Router => Some(self.next_probe.min(self.next_report)),
            Stage::Workers { .. } => Some(self.next_report),
            Stage::Serving | Stage::Stopping => None,
        }
    }

    /// Goes on with the start as far as possible; once serving, follows the wanted sizes of the pools.
    async fn advance(&mut self) -> Result<(), Failure> {
        if Instant::now() >= self.next_report {
            self.next_report = Instant::now() + PATIENCE;
            self.report_waiting();
        }
        match &self.stage {
            Stage::Conductor { .. } => {
                let url = self.plan.conductor_url();
                let probe = self.caller.request(Method::GET, &format!("{url}/readyz"));
                if !self.is_up(PartId::Conductor, probe).await? {
                    return Ok(());
                }
                let access = self.plan.conductor_access();
                let options = ClientOptions { access, metadata: false, ..ClientOptions::new(vec![url]) };
                let client = Client::start(options)
                    .map_err(|error| Failure::because("cannot follow the conductor", &error))?;
                self.client = Some(client);
                let stage = Stage::Workers { ready: BTreeSet::new() };
                if let Stage::Conductor { held } = std::mem::replace(&mut self.stage, stage) {
                    self.plan.tell_start();
                    for id in held {
                        self.start(id)?;
                    }
                }
            }
            Stage::Workers { .. } => self.count_ready(),
            Stage::Router => {
                let probe = self.http.get(format!("{}/readyz", self.plan.router_url()));
                if self.is_up(PartId::Router, probe).await? {
                    self.stage = Stage::Serving;
                    self.announce_ready()?;
                }
            }
            Stage::Serving => self.follow(),
            Stage::Stopping => {}
        }
        Ok(())
    }

    /// Whether a part says that it is ready; asked again after a while, unless asking can't ever succeed.
    async fn is_up(&mut self, part: PartId, probe: RequestBuilder) -> Result<bool, Failure> {
        if Instant::now() < self.next_probe {
            return Ok(false);
        }
        let answer = probe.timeout(PROBE_TIMEOUT).send().await;
        self.next_probe = Instant::now() + PROBE_INTERVAL;
        match answer {
            Ok(answer) => Ok(answer.status().is_success()),
            Err(error) => match TlsFault::of(&error) {
                Some(fault) => {
                    let url = if part == PartId::Router {
                        self.plan.router_url()
                    } else {
                        self.plan.conductor_url()
                    };
                    Err(Failure::failed(format!("{part} {url} {fault}")))
                }
                None => Ok(false),
            },
        }
    }

    fn count_ready(&mut self) {
        let Some(view) = self.client.as_ref().map(Client::view) else { return };
        let Stage::Workers { ready } = &mut self.stage else { return };
        let total = self.roster.workers().count();
        for id in self.roster.workers() {
            let record = id.worker().and_then(|name| view.worker(&name).cloned());
            if let Some(record) = record.filter(|record| record.state == WorkerState::Ready)
                && ready.insert(id.clone())
            {
                tell(&format!("{id} is ready at {} ({} of {total})", record.address, ready.len()));
            }
        }
        if ready.len() >= total {
            self.stage = Stage::Router;
            self.next_probe = Instant::now();
        }
    }

    fn report_waiting(&self) {
        let waiting = match &self.stage {
            Stage::Conductor { .. } => vec![PartId::Conductor.to_string()],
            Stage::Workers { ready } => {
                self.roster.workers().filter(|id| !ready.contains(id)).map(ToString::to_string).collect()
            }
            Stage::Router => vec![PartId::Router.to_string()],
            Stage::Serving | Stage::Stopping => return,
        };
        tell(&format!("still waiting for {}", waiting.join(", ")));
    }

    /// Takes over the sizes that an operator or the autoscaler decided on.
    fn follow(&mut self) {
        let Some(view) = self.client.as_ref().map(Client::view) else { return };
        for (pool, target) in view.pools.iter() {
            let Some(before) = self.roster.wanted(pool) else { continue };
            if before == target.desired || !self.plan.follows(pool, target.source) {
                continue;
            }
            if let Some(reason) = &target.reason {
                tell(&format!("{pool}: {before} -> {} workers: {reason}", target.desired));
            }
            self.roster.want(pool, target.desired);
        }
    }

    fn announce_ready(&self) -> Result<(), Failure> {
        let (url, model) = (self.plan.api_url(), self.plan.model());
        let message = serde_json::json!({ "role": "user", "content": "Tell me a story." });
        let body = serde_json::json!({ "model": model, "stream": true, "messages": [message] });
        tell(&format!(
            "try it:\n  curl -N {url}/chat/completions -H 'content-type: application/json' -d '{body}'\nCtrl-C stops everything"
        ));
        print(&format!("ready {url} model={model} conductor={}\n", self.plan.conductor_url()))
    }
}

async fn changed(views: &mut Option<watch::Receiver<Arc<View>>>) {
    match views {
        Some(views) => {
            // An error means that the client ended, which it does only with the launcher.
            if views.changed().await.is_err() {
                std::future::pending().await
            }
        }
        None => std::future::pending().await,
    }
}

async fn sleep_until(wake: Option<Instant>) {
    match wake {
        Some(wake) => tokio::time::sleep_until(wake.into()).await,
        None => std::future::pending().await,
    }
}
