//! Real etcd servers for tests: one member or three, killed, frozen, cut off, filled up, at will.
//!
//! ```no_run
//! # async fn example() {
//! let etcd = baton_integration::etcd::Etcd::start(3).await;
//! let leader = etcd.leader().await;
//! etcd.kill(leader);            // SIGKILL; `restart(i)` brings it back on the same ports and data
//! etcd.freeze((leader + 1) % 3);   // SIGSTOP; `thaw(i)`
//! etcd.cut((leader + 2) % 3);   // from its peers, both ways; clients still reach it; `heal(i)`
//! # }
//! ```
//! A fleet document uses it with `conductor: { store: { etcd: { endpoints: [...] } } }` and the URLs of
//! [`Etcd::endpoints`] (a conductor of this process: `StoreOptions::Etcd`). The servers keep their data in memory
//! (`/dev/shm`) and end with the [`Etcd`], also when the test process is killed. Peers reach each other through proxies
//! of this process: run three members on a runtime whose threads are not blocked by the test.
//!
//! This file and `ports` know nothing of Baton, so that the conductor's own tests include them by their paths.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use etcd_client::{
    AlarmAction, AlarmOptions, AlarmType, Certificate, Client, ConnectOptions, GetOptions, GetResponse,
    Identity, TlsOptions,
};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::ports;

/// How long servers may take to come up or to agree on a leader, on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// PEM files of a server that speaks TLS.
#[derive(Debug, Clone)]
pub struct ServerTls {
    /// Authority of all certificates.
    pub ca_file: PathBuf,
    /// The server's certificate, for 127.0.0.1.
    pub cert_file: PathBuf,
    /// Its key.
    pub key_file: PathBuf,
    /// A client certificate and its key: the server then takes no client without one.
    pub client: Option<(PathBuf, PathBuf)>,
}

/// What to start.
#[derive(Debug, Clone)]
pub struct EtcdOptions {
    /// 1 or 3.
    pub members: usize,
    /// Size at which the alarm NOSPACE is raised.
    pub quota_bytes: Option<u64>,
    /// Whether clients speak TLS.
    pub tls: Option<ServerTls>,
}

impl EtcdOptions {
    /// So many members without anything special.
    pub fn new(members: usize) -> Self {
        Self { members, quota_bytes: None, tls: None }
    }
}

/// A running cluster.
#[derive(Debug)]
pub struct Etcd {
    options: EtcdOptions,
    members: Vec<Member>,
    links: Option<Links>,
    user: Option<(String, String)>,
    directory: TempDir,
}

#[derive(Debug)]
struct Member {
    name: String,
    client: SocketAddr,
    peer: SocketAddr,
    advertised: SocketAddr,
    process: Mutex<Option<Child>>,
}

impl Etcd {
    /// Starts 1 or 3 members and waits until they have a leader.
    ///
    /// # Panics
    /// When etcd is not installed or does not come up.
    pub async fn start(members: usize) -> Self {
        Self::with(EtcdOptions::new(members)).await
    }

    /// Starts what the options say.
    ///
    /// # Panics
    /// When etcd is not installed or does not come up.
    pub async fn with(options: EtcdOptions) -> Self {
        for _ in 0..5 {
            if let Some(etcd) = Self::attempt(options.clone()).await {
                return etcd;
            }
        }
        panic!("etcd does not come up on any ports");
    }

    /// Whether the ports were really free is known only once the servers run.
    async fn attempt(options: EtcdOptions) -> Option<Self> {
        let shm = Path::new("/dev/shm");
        let mut builder = tempfile::Builder::new();
        let builder = builder.prefix("etcd-");
        let directory = if shm.is_dir() { builder.tempdir_in(shm) } else { builder.tempdir() };
        let directory = directory.expect("a directory");
        let mut members = Vec::new();
        for i in 0..options.members {
            let (client, peer) = (ports::free(), ports::free());
            let name = format!("m{i}");
            members.push(Member { name, client, peer, advertised: peer, process: Mutex::new(None) });
        }
        let mut links = None;
        if options.members > 1 {
            let proxies = Links::start(&members.iter().map(|m| m.peer).collect::<Vec<_>>()).await;
            for (member, proxy) in members.iter_mut().zip(&proxies.addresses) {
                member.advertised = *proxy;
            }
            links = Some(proxies);
        }
        let etcd = Self { options, members, links, user: None, directory };
        for i in 0..etcd.members.len() {
            etcd.restart(i);
        }
        let deadline = Instant::now() + PATIENCE;
        while etcd.find_leader().await.is_none() {
            let ended =
                |member: &Member| !matches!(member.lock().as_mut().map(Child::try_wait), Some(Ok(None)));
            if etcd.members.iter().any(ended) || Instant::now() > deadline {
                let log = std::fs::read_to_string(etcd.log(0)).unwrap_or_default();
                assert!(log.contains("address already in use"), "etcd does not come up:\n{log}");
                return None;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        if let Some(links) = &etcd.links {
            let listed =
                etcd.client(0).await.cluster_client().member_list().await.expect("a list of members");
            let ids = listed.members().iter().map(|member| (member.id(), etcd.index(member.name())));
            links.shared.lock().members = ids.collect();
        }
        Some(etcd)
    }

    fn index(&self, name: &str) -> usize {
        self.members.iter().position(|member| member.name == name).expect("a member of this name")
    }

    fn log(&self, member: usize) -> PathBuf {
        self.directory.path().join(format!("m{member}.log"))
    }

    /// URLs of all members, for clients.
    pub fn endpoints(&self) -> Vec<String> {
        (0..self.members.len()).map(|i| self.endpoint(i)).collect()
    }

    /// URL of one member, for clients.
    ///
    /// # Panics
    /// When there is no such member.
    pub fn endpoint(&self, member: usize) -> String {
        let scheme = if self.options.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.members[member].client)
    }

    /// Ends a member as a power cut would.
    ///
    /// # Panics
    /// When it does not run.
    pub fn kill(&self, member: usize) {
        let mut child = self.members[member].lock().take().expect("the member runs");
        child.kill().expect("killed");
        child.wait().expect("ended");
    }

    /// Starts a member that was killed, on the same ports and data. It is not up when this returns.
    ///
    /// # Panics
    /// When it still runs, or etcd is not installed.
    pub fn restart(&self, member: usize) {
        let mut process = self.members[member].lock();
        assert!(process.is_none(), "the member still runs");
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.log(member));
        let log = log.expect("a log file");
        let errors = log.try_clone().expect("a log file");
        let started = self.command(member).stdin(Stdio::null()).stdout(log).stderr(errors).spawn();
        *process = Some(started.expect("etcd starts (Debian has it in the package etcd-server)"));
    }

    fn command(&self, index: usize) -> Command {
        let member = &self.members[index];
        let scheme = if self.options.tls.is_some() { "https" } else { "http" };
        let client = format!("{scheme}://{}", member.client);
        let cluster: Vec<String> =
            self.members.iter().map(|m| format!("{}=http://{}", m.name, m.advertised)).collect();
        // The servers end with the thread that started them, whatever happens to it.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "etcd", "--name", &member.name]);
        command.arg("--data-dir").arg(self.directory.path().join(&member.name));
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &format!("http://{}", member.peer)]);
        command.args(["--initial-advertise-peer-urls", &format!("http://{}", member.advertised)]);
        command.args(["--initial-cluster", &cluster.join(","), "--initial-cluster-state", "new"]);
        // Passwords are checked quickly: these are not secret.
        command.args(["--bcrypt-cost", "4", "--logger", "zap"]);
        if let Some(bytes) = self.options.quota_bytes {
            command.args(["--quota-backend-bytes", &bytes.to_string()]);
        }
        if let Some(tls) = &self.options.tls {
            command.arg("--cert-file").arg(&tls.cert_file).arg("--key-file").arg(&tls.key_file);
            if tls.client.is_some() {
                command.arg("--trusted-ca-file").arg(&tls.ca_file).arg("--client-cert-auth");
            }
        }
        command
    }

    /// Stops a member in its tracks; its connections stay open.
    ///
    /// # Panics
    /// When it does not run.
    #[expect(clippy::disallowed_methods, reason = "a test has nothing else to do in these milliseconds")]
    pub fn freeze(&self, member: usize) {
        let pid = self.signal(member, Signal::STOP);
        // Its threads stop one after another, and one that runs may still answer.
        let stands = |stat: String| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'));
        for _ in 0..1000 {
            let threads = std::fs::read_dir(format!("/proc/{pid}/task")).expect("the member runs");
            let mut stats =
                threads.flatten().map(|thread| std::fs::read_to_string(thread.path().join("stat")));
            if stats.all(|stat| stat.is_ok_and(stands)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("the member does not stand still");
    }

    /// Lets a frozen member go on.
    ///
    /// # Panics
    /// When it does not run.
    pub fn thaw(&self, member: usize) {
        self.signal(member, Signal::CONT);
    }

    fn signal(&self, member: usize, signal: Signal) -> u32 {
        let process = self.members[member].lock();
        let id = process.as_ref().expect("the member runs").id();
        let pid = i32::try_from(id).ok().and_then(Pid::from_raw).expect("a process id");
        kill_process(pid, signal).expect("signalled");
        id
    }

    /// Cuts a member off from its peers in both directions; clients reach it as before.
    ///
    /// # Panics
    /// With one member.
    pub fn cut(&self, member: usize) {
        self.links.as_ref().expect("more than one member").cut(member, true);
    }

    /// Ends a cut.
    ///
    /// # Panics
    /// With one member.
    pub fn heal(&self, member: usize) {
        self.links.as_ref().expect("more than one member").cut(member, false);
    }

    /// The leader, once the members that answer agree on one that answers.
    ///
    /// # Panics
    /// When there is none within a minute.
    pub async fn leader(&self) -> usize {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(leader) = self.find_leader().await {
                return leader;
            }
            assert!(Instant::now() < deadline, "no leader of etcd");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn find_leader(&self) -> Option<usize> {
        for i in 0..self.members.len() {
            let Some(client) = self.try_client(i).await else { continue };
            let mut maintenance = client.maintenance_client();
            let status = tokio::time::timeout(Duration::from_secs(1), maintenance.status()).await;
            let Ok(Ok(status)) = status else { continue };
            let me = status.header().map(etcd_client::ResponseHeader::member_id);
            if status.leader() != 0 && me == Some(status.leader()) {
                return Some(i);
            }
        }
        None
    }

    /// A plain client of one member, with what TLS and password it takes.
    ///
    /// # Panics
    /// When it takes no connection.
    pub async fn client(&self, member: usize) -> Client {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(client) = self.try_client(member).await {
                return client;
            }
            assert!(Instant::now() < deadline, "member {member} of etcd takes no client");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn try_client(&self, member: usize) -> Option<Client> {
        let mut options = ConnectOptions::new()
            .with_connect_timeout(Duration::from_secs(1))
            .with_timeout(Duration::from_secs(10))
            .with_auto_token_refresh(true);
        if let Some(tls) = &self.options.tls {
            let read = |path: &Path| std::fs::read(path).expect("a PEM file");
            let mut with = TlsOptions::new().ca_certificate(Certificate::from_pem(read(&tls.ca_file)));
            if let Some((cert, key)) = &tls.client {
                with = with.identity(Identity::from_pem(read(cert), read(key)));
            }
            options = options.with_tls(with);
        }
        if let Some((user, password)) = &self.user {
            options = options.with_user(user, password);
        }
        Client::connect([self.endpoint(member)], Some(options)).await.ok()
    }

    /// A client of a member that answers.
    async fn any_client(&self) -> Client {
        let leader = self.leader().await;
        self.client(leader).await
    }

    /// The latest revision: the number of writes so far, and one more.
    ///
    /// # Panics
    /// When no member answers.
    pub async fn revision(&self) -> i64 {
        self.read("x", None).await.header().expect("a header").revision()
    }

    /// Keys with a prefix, with their values.
    ///
    /// # Panics
    /// When no member answers.
    pub async fn keys(&self, prefix: &str) -> Vec<(String, String)> {
        let reply = self.read(prefix, Some(GetOptions::new().with_prefix())).await;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        reply.kvs().iter().map(|kv| (text(kv.key()), text(kv.value()))).collect()
    }

    /// A read, again and again while the members look for a leader.
    async fn read(&self, key: &str, options: Option<GetOptions>) -> GetResponse {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.any_client().await.get(key, options.clone()).await {
                Ok(reply) => return reply,
                Err(error) => assert!(Instant::now() < deadline, "no read: {error}"),
            }
        }
    }

    /// Forgets the history up to now, after two more writes: watches from before this call can't go on.
    ///
    /// # Panics
    /// When etcd refuses.
    pub async fn compact(&self) {
        let mut client = self.any_client().await;
        // A watch may still begin at the very revision that the history was compacted to.
        client.put("compacted", "1", None).await.expect("a write");
        let put = client.put("compacted", "2", None).await.expect("a write");
        let revision = put.header().expect("a header").revision();
        client.compact(revision, None).await.expect("compacted");
    }

    /// Writes until etcd raises the alarm NOSPACE (see [`EtcdOptions::quota_bytes`]).
    ///
    /// # Panics
    /// When it does not.
    pub async fn fill(&self) {
        let mut client = self.any_client().await;
        let block = vec![b'x'; 1 << 20];
        for i in 0..1000 {
            if client.put(format!("fill/{i}"), block.clone(), None).await.is_err() {
                return;
            }
        }
        panic!("etcd took a gigabyte; was a quota set?");
    }

    /// What its operator does about NOSPACE: delete, compact, defragment, disarm.
    ///
    /// # Panics
    /// When etcd refuses.
    pub async fn make_space(&self) {
        let mut client = self.any_client().await;
        let prefix = Some(etcd_client::DeleteOptions::new().with_prefix());
        let deleted = client.delete("fill/", prefix).await.expect("deleted");
        let revision = deleted.header().expect("a header").revision();
        let physical = Some(etcd_client::CompactionOptions::new().with_physical());
        client.compact(revision, physical).await.expect("compacted");
        for i in 0..self.members.len() {
            self.client(i).await.maintenance_client().defragment().await.expect("defragmented");
        }
        // An alarm is the member's that raised it.
        let alarms = client.alarm(AlarmAction::Get, AlarmType::None, None).await.expect("alarms");
        for raised in alarms.alarms() {
            let mut of = AlarmOptions::new();
            of.with_member(raised.member_id());
            client.alarm(AlarmAction::Deactivate, raised.alarm(), Some(of)).await.expect("disarmed");
        }
    }

    /// Demands a user and password from now on, of a user who may do everything.
    ///
    /// # Panics
    /// When etcd refuses.
    pub async fn enable_auth(&mut self, password: &str) -> (String, String) {
        let mut client = self.any_client().await;
        client.user_add("root", password, None).await.expect("a user");
        client.role_add("root").await.expect("a role");
        client.user_grant_role("root", "root").await.expect("granted");
        client.auth_enable().await.expect("enabled");
        let user = ("root".to_owned(), password.to_owned());
        self.user = Some(user.clone());
        user
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        for member in &self.members {
            if let Some(mut child) = member.lock().take() {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}

impl Member {
    fn lock(&self) -> MutexGuard<'_, Option<Child>> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Proxies before the members' peer ports. Who dials is read from the request, so that a member can be cut off.
#[derive(Debug)]
struct Links {
    addresses: Vec<SocketAddr>,
    shared: Arc<Shared>,
    _tasks: JoinSet<()>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<LinkState>,
    changed: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct LinkState {
    /// Members by their ids in etcd.
    members: HashMap<u64, usize>,
    cut: BTreeSet<usize>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, LinkState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_cut(&self, target: usize, dialer: Option<u64>) -> bool {
        let state = self.lock();
        let dialer = dialer.and_then(|id| state.members.get(&id));
        state.cut.contains(&target) || dialer.is_some_and(|dialer| state.cut.contains(dialer))
    }
}

impl Links {
    async fn start(targets: &[SocketAddr]) -> Self {
        let shared = Arc::new(Shared { state: Mutex::default(), changed: watch::channel(0).0 });
        let (mut addresses, mut tasks) = (Vec::new(), JoinSet::new());
        for (index, target) in targets.iter().enumerate() {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
            addresses.push(listener.local_addr().expect("an address"));
            tasks.spawn(accept(listener, index, *target, shared.clone()));
        }
        Self { addresses, shared, _tasks: tasks }
    }

    fn cut(&self, member: usize, cut: bool) {
        let mut state = self.shared.lock();
        if cut {
            state.cut.insert(member);
        } else {
            state.cut.remove(&member);
        }
        drop(state);
        self.shared.changed.send_modify(|count| *count += 1);
    }
}

async fn accept(listener: TcpListener, index: usize, target: SocketAddr, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    while let Ok((inbound, _)) = listener.accept().await {
        while connections.try_join_next().is_some() {}
        let shared = shared.clone();
        connections.spawn(async move {
            // A broken connection between members is none of the test's concern.
            let _ = relay(inbound, index, target, &shared).await;
        });
    }
}

async fn relay(
    mut inbound: TcpStream,
    index: usize,
    target: SocketAddr,
    shared: &Shared,
) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.windows(4).any(|end| end == b"\r\n\r\n") && head.len() < 16 << 10 {
        if inbound.read_buf(&mut head).await? == 0 {
            return Ok(());
        }
    }
    let dialer = dialer(&head);
    let mut changed = shared.changed.subscribe();
    if shared.is_cut(index, dialer) {
        return Ok(());
    }
    let mut outbound = TcpStream::connect(target).await?;
    outbound.write_all(&head).await?;
    let cut = async {
        while !shared.is_cut(index, dialer) {
            if changed.changed().await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        copied = copy_bidirectional(&mut inbound, &mut outbound) => copied.map(drop),
        () = cut => Ok(()),
    }
}

/// The id of the member that sent a request.
fn dialer(head: &[u8]) -> Option<u64> {
    let text = String::from_utf8_lossy(head);
    let line = text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("x-server-from").then(|| value.trim().to_owned())
    })?;
    u64::from_str_radix(&line, 16).ok()
}
