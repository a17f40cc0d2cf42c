//! Carries the bytes of one connection of frames.

use std::sync::Arc;
use std::time::Duration;

use baton_config::frames::Reader;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::super::attempt::Lost;
use super::mux::{Breach, Due, Mux};

/// Streams are woken for another token no more often than this: with an engine that is quicker, several tokens share the
/// cost of a wake-up and of a write to the client. First tokens, ends and errors do not wait.
const GATHER: Duration = Duration::from_millis(4);

/// Between two ticks of the streams.
pub(super) const TICK: Duration = Duration::from_millis(250);

/// A buffer that a long prompt made larger than this is given back.
const KEPT_BYTES: usize = 256 << 10;

/// Carries until either side ends it, or nobody wants it any more.
pub(super) async fn carry<S: AsyncRead + AsyncWrite + Unpin>(mux: Arc<Mux>, io: S, stop: CancellationToken) {
    let lost = match exchange(&mux, io, &stop).await {
        Ok(()) => Lost::Broken("the connection was given up".to_owned()),
        Err(lost) => lost,
    };
    mux.end(&lost);
}

async fn exchange<S: AsyncRead + AsyncWrite + Unpin>(
    mux: &Mux,
    io: S,
    stop: &CancellationToken,
) -> Result<(), Lost> {
    let (mut input, mut output) = tokio::io::split(io);
    let mut reader = Reader::new(0);
    let (mut unsent, mut sent) = (Vec::new(), 0);
    let mut due = Due::default();
    let mut woken = Instant::now();
    let mut gathered = std::pin::pin!(tokio::time::sleep_until(woken));
    let mut tick = std::pin::pin!(tokio::time::sleep_until(woken));
    let mut ticks = false;
    loop {
        if mux.is_abandoned() {
            return Ok(());
        }
        if sent == unsent.len() {
            unsent.clear();
            unsent.shrink_to(KEPT_BYTES);
            sent = 0;
            mux.take_unsent(&mut unsent);
        }
        // Streams begin with something to send.
        if sent < unsent.len() && !std::mem::replace(&mut ticks, true) {
            tick.as_mut().reset(Instant::now() + TICK);
        }
        tokio::select! {
            biased;
            () = stop.cancelled() => return Ok(()),
            wrote = output.write(&unsent[sent..]), if sent < unsent.len() => match wrote {
                Ok(0) => return Err(Lost::Broken("the connection takes nothing".to_owned())),
                Ok(bytes) => sent += bytes,
                Err(error) => return Err(Lost::Broken(error.to_string())),
            },
            read = input.read(reader.room()) => match read {
                Ok(0) if reader.is_mid_frame() => {
                    return Err(Lost::Broken("the connection ended within a frame".to_owned()));
                }
                Ok(0) => return Err(Lost::Broken("the connection ended".to_owned())),
                Err(error) => return Err(Lost::Broken(error.to_string())),
                Ok(bytes) => {
                    reader.filled(bytes);
                    let taken = take(mux, &mut reader, &mut due);
                    due.wake_now();
                    taken.map_err(|breach| Lost::Protocol(breach.to_string()))?;
                    if due.is_later() {
                        let now = Instant::now();
                        if now.duration_since(woken) >= GATHER {
                            woken = now;
                            due.wake_later();
                        } else {
                            gathered.as_mut().reset(woken + GATHER);
                        }
                    }
                }
            },
            () = gathered.as_mut(), if due.is_later() => {
                woken = Instant::now();
                due.wake_later();
            }
            () = tick.as_mut(), if ticks => {
                ticks = mux.tick() || sent < unsent.len();
                tick.as_mut().reset(Instant::now() + TICK);
            }
            () = mux.news() => {}
        }
    }
}

/// Takes in every frame that is complete.
fn take(mux: &Mux, reader: &mut Reader, due: &mut Due) -> Result<(), Breach> {
    while let Some((kind, payload)) = reader.next_frame()? {
        mux.receive(kind, payload, due)?;
    }
    Ok(())
}
