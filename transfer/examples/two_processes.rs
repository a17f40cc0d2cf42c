//! Two processes move blocks between them: a tour of `baton-transfer`, to be read from top to bottom.
//!
//! ```text
//! cargo run --release -p baton-transfer --example two_processes -- --backend tcp
//! cargo run --release -p baton-transfer --example two_processes -- --backend plugin:/path/to/libdriver.so
//! ```
//!
//! Backends: `shm`, `cma`, `libfabric`, `ucx`, `tcp`, `plugin:PATH`. What each one needs is in `docs/transfer.md`.
//!
//! The program starts itself a second time. The second process is the *owner*: it has computed blocks and lets others
//! read them. The first one is the *user*: it reads them, changes a few and writes those back.
//!
//! ```text
//! user                                                owner
//!   │──────────── start it, tell our metadata ────────────►│  register, digest, grant
//!   │◄─────────── its metadata; notification: ticket ──────│
//!   │═════════════════════ READ blocks ═══════════════════►│  (takes no part in it, where the backend is one-sided)
//!   │═════════════════════ WRITE blocks ══════════════════►│
//!   │──────────── notification: written ──────────────────►│  looks at them, revokes the grant
//!   │◄─────────── notification: revoked ───────────────────│
//!   │──────────── READ again: refused, or found wrong ────►│
//! ```
#![expect(clippy::print_stdout, reason = "an example talks to its user")]

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use baton_transfer::{
    Agent, AgentOptions, BackendKind, BlockRead, BlockWrite, Choose, Descriptor, DigestSeed, Epoch, Expected,
    HandoffId, HostMemory, Notification, PluginOptions, Refusal, Session, Target, TransferError,
    block_digest,
};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::{Instant, timeout};

/// Names are for people, logs and metrics. What makes a process unmistakable is its metadata.
const OWNER: &str = "owner-0";
const USER: &str = "user-0";

/// A worker lives in *epochs*: whoever assigns names (in Baton the conductor) gives a new one to every life. Each
/// request names the epoch it means; one that means an earlier life is refused as stale, never answered with the wrong
/// bytes.
const OWNER_EPOCH: Epoch = Epoch(7);
const USER_EPOCH: Epoch = Epoch(3);

/// What is granted is granted *under a handoff*: a random number that both sides know, minted for one purpose. Ending
/// the handoff ends all that was granted under it.
const HANDOFF: HandoffId = HandoffId(0x6c1f_90a4_02f7_4b11_9d38_5e02_77ab_c4d1);

/// The blocks of this example: more than one in flight, large enough to see a bandwidth.
const BLOCKS: usize = 32;
const BLOCK_BYTES: usize = 256 << 10;
/// How often the same prepared read is posted.
const POSTS: usize = 10;
/// Blocks that are written back.
const WRITTEN: usize = 4;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--backend", backend] => use_blocks(backend).await,
        ["--own-for", backend] => own_blocks(backend).await,
        _ => bail!("usage: two_processes --backend shm|cma|libfabric|ucx|tcp|plugin:PATH"),
    }
}

/// How an agent of this example runs.
fn options(name: &str, backend: &str) -> anyhow::Result<AgentOptions> {
    let mut options = AgentOptions::new(name.parse()?);
    let (kind, plugin) = match backend.split_once(':') {
        Some(("plugin", path)) => ("plugin", Some(path)),
        _ => (backend, None),
    };
    let known = BackendKind::ALL.into_iter().find(|known| known.as_str() == kind);
    let kind = known.with_context(|| format!("there is no backend {kind}"))?;
    options.plugin = plugin.map(|path| PluginOptions { path: path.into(), ..PluginOptions::default() });
    // In order of preference. `tcp` is there as in real life: for what the first cannot do, and for when it breaks.
    options.backends = vec![kind, BackendKind::Tcp];
    options.backends.dedup();
    // `Choose::Measured`, the default, would try both and take the quicker one. We want to see the one asked for.
    options.choose = Choose::Listed;
    // The defaults do the rest: digests on, a free port of the loopback address. On any other address, agents must
    // share a secret: `options.auth = Some(Token::from_file_bytes(..)?)`.
    Ok(options)
}

/// What the owner tells about its blocks. In Baton this is a ticket; here it is JSON in a notification.
#[derive(Serialize, Deserialize)]
struct Ticket {
    region: u32,
    /// In the order of the blocks.
    digests: Vec<u64>,
    /// Where blocks may be written back.
    mailbox: u32,
}

// ---- the owner ----------------------------------------------------------------------------------------------------

async fn own_blocks(backend: &str) -> anyhow::Result<()> {
    // An agent is a worker's end of all transfers: it listens, serves and connects. It serves nobody before it knows
    // in which epoch it lives.
    let agent = Agent::start(options(OWNER, backend)?).await?;
    agent.set_epoch(OWNER_EPOCH);

    // Memory to move is registered once, in few large regions. `HostMemory` can be used by every backend; memory that
    // somebody else allocated comes in through `HostMemory::adopt`, memory of a GPU through a `Device`.
    let arena = HostMemory::allocate(BLOCKS * BLOCK_BYTES, "blocks")?;
    let region = agent.register(arena.clone())?;
    let mailbox = HostMemory::allocate(WRITTEN * BLOCK_BYTES, "mailbox")?;
    let mailbox_region = agent.register(mailbox.clone())?;

    // "Compute" the blocks, and digest each. The digest is bound to the handoff, the epoch and the index of the block:
    // the right bytes in the wrong place fail it, too.
    let mut digests = Vec::new();
    for index in 0..BLOCKS {
        let block = bytes_of_block(index);
        arena.write(index * BLOCK_BYTES, &block);
        digests.push(block_digest(seed(index), &block));
    }

    // Registered is not readable: a peer reads what was granted, under the handoff that it was granted for.
    let place = |region, index: usize| Descriptor {
        region,
        offset: (index * BLOCK_BYTES) as u64,
        len: BLOCK_BYTES as u32,
    };
    agent.grant(HANDOFF, (0..BLOCKS).map(|index| place(region, index)).collect());
    let writable: Vec<Descriptor> = (0..WRITTEN).map(|index| place(mailbox_region, index)).collect();
    agent.grant_write(HANDOFF, &writable);

    // Metadata is all that a peer needs to find this agent: small, opaque, without keys or secrets. Publish it any way
    // you like. Ours goes to the parent on standard output, and the parent's came on standard input.
    let mut input = BufReader::new(tokio::io::stdin()).lines();
    println!("{}", hex(&agent.metadata()));
    let metadata = unhex(&input.next_line().await?.context("the user tells its metadata")?)?;

    // A notification is a short message to the user of the peer's agent: here the ticket.
    let session = agent.connect(&USER.parse()?, USER_EPOCH, &metadata).await?;
    let ticket = Ticket { region: region.0, digests, mailbox: mailbox_region.0 };
    session.notify(HANDOFF, &serde_json::to_vec(&ticket)?, soon()).await?;

    // Notifications of a session come after the writes that were started before them: "written" means it.
    let written = next(&agent).await?;
    ensure!(written.payload == b"written", "the user says what it did");
    for index in 0..WRITTEN {
        let mut block = vec![0; BLOCK_BYTES];
        mailbox.read(index * BLOCK_BYTES, &mut block);
        ensure!(block == answer_to(&bytes_of_block(index)), "block {index} came back as something else");
    }

    // The end of a grant. New requests are refused at once; once `settled` returns, nobody writes the memory under this
    // handoff any more, and it may be used for something else. A network card may still serve a reader that is late:
    // it finds other bytes than those digested.
    agent.revoke(HANDOFF).settled().await;
    arena.write(0, &vec![0; arena.len()]);
    session.notify(HANDOFF, b"revoked", soon()).await?;

    // Until the user is done with us.
    while input.next_line().await?.is_some() {}
    agent.close().await;
    Ok(())
}

// ---- the user -----------------------------------------------------------------------------------------------------

async fn use_blocks(backend: &str) -> anyhow::Result<()> {
    let agent = Agent::start(options(USER, backend)?).await?;
    agent.set_epoch(USER_EPOCH);
    let (mut owner, metadata) = start_owner(backend, &agent).await?;
    let ticket: Ticket = serde_json::from_slice(&next(&agent).await?.payload)?;

    // A session is with one peer in one epoch. It has a path, and knows why it has this one.
    let session = agent.connect(&OWNER.parse()?, OWNER_EPOCH, &metadata).await?;
    let path = session.path();
    println!("path {}: {}", path.backend, path.reason);
    let wanted = backend.split(':').next().unwrap_or_default();
    // Why not the others; `baton doctor` knows what would help.
    ensure!(path.backend.as_str() == wanted, "{wanted} was asked for: {:?}", path.rejected);

    // Where blocks go need not be registered with the agent: nobody is granted anything of it. A backend whose library
    // wants it registered sees to that at the first read.
    let memory = HostMemory::allocate(BLOCKS * BLOCK_BYTES, "copies")?;
    read_blocks(&session, &ticket, &memory).await?;
    write_blocks(&session, &ticket, &memory).await?;

    let revoked = next(&agent).await?;
    ensure!(revoked.payload == b"revoked", "the owner ends the handoff");
    match prepared_read(&session, &ticket, &memory)?.run(soon()).await {
        // The owner was asked, and looked its grant up.
        Err(TransferError::Refused { refusal: Refusal::NotGranted, .. }) => {}
        // It was not asked (a one-sided read), but the digests tell. This error names every block that is wrong.
        Err(TransferError::Integrity { corrupt, .. }) => ensure!(corrupt.len() == BLOCKS, "none is right"),
        other => bail!("what was revoked came to {other:?}"),
    }
    println!("read after the end of the handoff: refused");

    // What was counted is there for metrics, the state of each session for status pages.
    println!("session: {:?}", session.stats());
    drop(owner.stdin.take());
    ensure!(owner.wait().await?.success(), "the owner found fault with what it got");
    agent.close().await;
    println!("ok");
    Ok(())
}

/// A read of all blocks, in reverse order.
fn prepared_read(
    session: &Session,
    ticket: &Ticket,
    memory: &HostMemory,
) -> anyhow::Result<baton_transfer::Prepared> {
    let blocks = (0..BLOCKS).map(|index| BlockRead {
        source: Descriptor {
            region: baton_transfer::RegionId(ticket.region),
            offset: (index * BLOCK_BYTES) as u64,
            len: BLOCK_BYTES as u32,
        },
        to: (BLOCKS - 1 - index) * BLOCK_BYTES,
        expected: Some(Expected { seed: seed(index), digest: ticket.digests[index] }),
    });
    // Checked here, once: blocks without bytes, outside the memory or on top of each other are refused by name.
    Ok(session.prepare_read(HANDOFF, blocks.collect(), Target::Memory(memory.clone()))?)
}

async fn read_blocks(session: &Session, ticket: &Ticket, memory: &HostMemory) -> anyhow::Result<()> {
    let read = prepared_read(session, ticket, memory)?;

    // Post, and await. Every operation has a deadline: a peer that is frozen or lost costs that much time and no more.
    // What comes back says how many bytes are in place *and verified*.
    let report = read.post(soon()).await?;
    ensure!(report.bytes.0 == (BLOCKS * BLOCK_BYTES) as u64, "all of it");
    for index in 0..BLOCKS {
        let mut block = vec![0; BLOCK_BYTES];
        memory.read((BLOCKS - 1 - index) * BLOCK_BYTES, &mut block);
        ensure!(block == bytes_of_block(index), "block {index} is not what the owner has");
    }

    // Prepare once, post many. A posted read goes on by itself; look at it when it suits you, or await it.
    let mut fastest = Duration::MAX;
    for _ in 0..POSTS {
        let mut posted = read.post(soon());
        let mut looks = 0u64;
        while !posted.is_done() {
            looks += 1;
            tokio::task::yield_now().await;
        }
        let report = posted.await?;
        fastest = fastest.min(report.elapsed);
        ensure!(looks > 0 || report.elapsed < Duration::from_secs(1), "a look does not wait");
    }
    let gigabytes = (BLOCKS * BLOCK_BYTES) as f64 / 1e9;
    println!("read {BLOCKS} blocks of {BLOCK_BYTES} bytes: {:.2} GB/s", gigabytes / fastest.as_secs_f64());

    // Given up, a read is fenced: when `cancel` returns, nothing of it writes the memory any more.
    read.post(soon()).cancel().await;
    memory.write(0, &vec![0xee; BLOCKS * BLOCK_BYTES]);
    let mut after = vec![0; BLOCKS * BLOCK_BYTES];
    memory.read(0, &mut after);
    ensure!(
        after.iter().all(|byte| *byte == 0xee),
        "something was written after the cancelled read had ended"
    );
    Ok(())
}

async fn write_blocks(session: &Session, ticket: &Ticket, memory: &HostMemory) -> anyhow::Result<()> {
    for index in 0..WRITTEN {
        memory.write(index * BLOCK_BYTES, &answer_to(&bytes_of_block(index)));
    }
    let blocks = (0..WRITTEN).map(|index| BlockWrite {
        from: index * BLOCK_BYTES,
        to: Descriptor {
            region: baton_transfer::RegionId(ticket.mailbox),
            offset: (index * BLOCK_BYTES) as u64,
            len: BLOCK_BYTES as u32,
        },
    });
    // A write is done when it is in the owner's memory: delivered, not sent.
    let write = session.prepare_write(HANDOFF, blocks.collect(), memory.clone())?;
    let report = write.post(soon()).await?;
    println!("wrote {} back in {:?}", report.bytes, report.elapsed);
    session.notify(HANDOFF, b"written", soon()).await?;
    Ok(())
}

// ---- odds and ends ------------------------------------------------------------------------------------------------

/// Starts this program as the owner and trades metadata with it.
async fn start_owner(backend: &str, agent: &Agent) -> anyhow::Result<(Child, Vec<u8>)> {
    let mut owner = Command::new(std::env::current_exe()?)
        .args(["--own-for", backend])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let output = owner.stdout.take().context("the owner's output")?;
    let line = BufReader::new(output).lines().next_line().await?.context("the owner did not start")?;
    let input = owner.stdin.as_mut().context("the owner's input")?;
    input.write_all(format!("{}\n", hex(&agent.metadata())).as_bytes()).await?;
    Ok((owner, unhex(&line)?))
}

async fn next(agent: &Agent) -> anyhow::Result<Notification> {
    timeout(Duration::from_secs(20), agent.notifications().next()).await.context("no notification came")
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn seed(index: usize) -> DigestSeed {
    DigestSeed { handoff: HANDOFF, epoch: OWNER_EPOCH, index: index as u32 }
}

/// Bytes that differ from block to block and from place to place.
fn bytes_of_block(index: usize) -> Vec<u8> {
    let mut state = index as u64 + 1;
    let word = |_| {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        state.to_le_bytes()
    };
    (0..BLOCK_BYTES / 8).flat_map(word).collect()
}

fn answer_to(block: &[u8]) -> Vec<u8> {
    block.iter().map(|byte| !byte).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> anyhow::Result<Vec<u8>> {
    let byte = |at| Ok(u8::from_str_radix(text.get(at..at + 2).context("an odd number of digits")?, 16)?);
    (0..text.len()).step_by(2).map(byte).collect()
}
