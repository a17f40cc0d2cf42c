//! Frames with a file descriptor beside them, over a Unix socket.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use tokio::io::Interest;
use tokio::net::UnixStream;

use crate::backend::Fault;
use crate::error::LinkError;
use crate::memory::RemoteRange;
use crate::wire::{HEADER_BYTES, Header, Kind, WireError, decode_len};

/// Sends a whole frame and `file` beside it.
pub(crate) async fn send(stream: &UnixStream, frame: &[u8], file: BorrowedFd<'_>) -> io::Result<()> {
    let mut sent = 0;
    while sent < frame.len() {
        let send = || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let files = [file];
            // The descriptor goes with the first bytes; what a full buffer left over goes without.
            if sent == 0 {
                control.push(SendAncillaryMessage::ScmRights(&files));
            }
            let bytes = [IoSlice::new(&frame[sent..])];
            sendmsg(stream.as_fd(), &bytes, &mut control, SendFlags::NOSIGNAL).map_err(io::Error::from)
        };
        sent += stream.async_io(Interest::WRITABLE, send).await?;
    }
    Ok(())
}

/// What answers a handshake or a question about memory.
pub(crate) enum Passed {
    /// A memory file and its length.
    File(OwnedFd, usize),
    /// Where the memory is in its owner.
    Place(RemoteRange),
    /// What was asked for is done: an answer that says no more.
    Done(Kind),
}

/// Bytes of the longest answer.
const ANSWER_MAX_BYTES: usize = HEADER_BYTES + 16;

/// Receives the answer to a handshake or a question about memory, which is a refusal or of one of the kinds `wanted`.
pub(crate) async fn receive(
    stream: &UnixStream,
    wanted: &[Kind],
) -> Result<(Header, Result<Passed, Fault>), Fault> {
    let mut bytes = [0; ANSWER_MAX_BYTES];
    let mut file = None;
    let (mut received, mut needed) = (0, HEADER_BYTES);
    while received < needed {
        let receive = || receive_once(stream.as_fd(), &mut bytes[received..needed], &mut file);
        match stream.async_io(Interest::READABLE, receive).await {
            Ok(0) => return Err(LinkError::Closed.into()),
            Ok(count) => received += count,
            Err(error) => return Err(LinkError::io("receiving a descriptor")(error).into()),
        }
        if received == HEADER_BYTES {
            let header = header_of(&bytes)?;
            if header.kind == Kind::Refused {
                return Ok((header, Err(Fault::refused(&header))));
            }
            let len = match header.kind {
                Kind::Located => 16,
                Kind::Lent | Kind::Written => 0,
                _ => 8,
            };
            if !wanted.contains(&header.kind) || header.len != len {
                return Err(Fault::protocol(WireError::Kind));
            }
            needed = HEADER_BYTES + header.len as usize;
        }
    }
    let (head, payload) = bytes[..needed].split_at(HEADER_BYTES);
    let header = header_of(&bytes)?;
    let head = head.first_chunk().ok_or(LinkError::Closed)?;
    header.verify(head, payload).map_err(Fault::protocol)?;
    if header.kind == Kind::Located {
        return Ok((header, Ok(Passed::Place(decode_place(payload).map_err(Fault::protocol)?))));
    }
    if matches!(header.kind, Kind::Lent | Kind::Written) {
        return Ok((header, Ok(Passed::Done(header.kind))));
    }
    let len = decode_len(payload).map_err(Fault::protocol)?;
    let len = usize::try_from(len).map_err(|_| Fault::protocol(WireError::Field))?;
    let file = file.ok_or(Fault::protocol(WireError::Short))?;
    Ok((header, Ok(Passed::File(file, len))))
}

/// The payload of a [`Kind::Located`].
pub(crate) fn encode_place(place: RemoteRange) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&(place.address as u64).to_le_bytes());
    bytes[8..].copy_from_slice(&(place.len as u64).to_le_bytes());
    bytes
}

fn decode_place(payload: &[u8]) -> Result<RemoteRange, WireError> {
    let (address, len) = payload.split_at_checked(8).ok_or(WireError::Short)?;
    let number = |bytes| usize::try_from(decode_len(bytes)?).map_err(|_| WireError::Field);
    let place = RemoteRange { address: number(address)?, len: number(len)? };
    place.address.checked_add(place.len).ok_or(WireError::Field)?;
    Ok(place)
}

fn header_of(bytes: &[u8]) -> Result<Header, Fault> {
    let head = bytes.first_chunk().ok_or(LinkError::Closed)?;
    Header::decode(head).map_err(Fault::protocol)
}

fn receive_once(socket: BorrowedFd<'_>, bytes: &mut [u8], file: &mut Option<OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [IoSliceMut::new(bytes)];
    let message = recvmsg(socket, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(files) = message {
            // At most one fits the buffer; any other was closed by the kernel.
            *file = files.last().or(file.take());
        }
    }
    Ok(message.bytes)
}

#[cfg(test)]
mod tests {
    use baton_config::Epoch;
    use tokio::io::AsyncWriteExt;

    use super::*;
    use crate::memory::HostMemory;
    use crate::wire::encode_frame;
    use crate::wire::tests::fuzz::fuzz;

    /// What comes of an answer that is sent with or without a file.
    async fn hear(frame: &[u8], file: Option<&HostMemory>) -> Result<Passed, WireError> {
        let (mut owner, reader) = UnixStream::pair().unwrap();
        match file.and_then(HostMemory::file) {
            Some(file) => send(&owner, frame, file).await.unwrap(),
            None => owner.write_all(frame).await.unwrap(),
        }
        match receive(&reader, &[Kind::Welcome, Kind::Mapped, Kind::Located]).await.map(|(_, passed)| passed)
        {
            Ok(Ok(passed)) => Ok(passed),
            Err(Fault::Link(LinkError::Protocol(error))) => Err(error),
            Ok(Err(fault)) | Err(fault) => panic!("{fault:?}"),
        }
    }

    #[test]
    fn places_of_any_bytes_are_refused_or_end_within_all_memory() {
        let decode = |bytes: &[u8]| {
            decode_place(bytes).inspect(|place| assert!(place.address <= usize::MAX - place.len))
        };
        let good =
            [RemoteRange { address: 1 << 40, len: 4096 }, RemoteRange { address: usize::MAX - 16, len: 16 }];
        fuzz("place", &good.map(|place| encode_place(place).to_vec()), decode, |place| {
            encode_place(*place).to_vec()
        });
    }

    #[tokio::test]
    async fn answers_that_lie_are_not_believed() {
        let memory = HostMemory::allocate(4096, "passed").unwrap();
        let say = |kind, payload: &[u8]| encode_frame(kind, Epoch(1), 5, payload);
        let mapped = say(Kind::Mapped, &4096u64.to_le_bytes());
        assert!(matches!(hear(&mapped, Some(&memory)).await, Ok(Passed::File(_, 4096))));
        assert_eq!(hear(&mapped, None).await.err(), Some(WireError::Short), "the file is missing");
        let place = |address, len| say(Kind::Located, &encode_place(RemoteRange { address, len }));
        let last = RemoteRange { address: usize::MAX - 16, len: 16 };
        let heard = hear(&place(last.address, last.len), None).await;
        assert!(matches!(heard, Ok(Passed::Place(place)) if place == last));
        assert_eq!(hear(&place(usize::MAX - 15, 16), None).await.err(), Some(WireError::Field));
        assert_eq!(hear(&say(Kind::Written, &[]), None).await.err(), Some(WireError::Kind), "not asked for");
        assert_eq!(hear(&say(Kind::Welcome, &[0; 32]), None).await.err(), Some(WireError::Kind));
        for at in [12, 16, 24, HEADER_BYTES] {
            let mut changed = mapped.clone();
            changed[at] ^= 1;
            assert_eq!(hear(&changed, Some(&memory)).await.err(), Some(WireError::Check), "byte {at}");
        }
    }
}
