//! Passes a stream of events on in whole events, so that it can be broken off, or bridged by a comment, at any moment.

use bytes::{Bytes, BytesMut};

/// An event of which more than this has come is passed on as it comes.
const PARTIAL_MAX_BYTES: usize = 1 << 20;

/// What came of an event that has not ended.
#[derive(Debug, Default)]
pub(super) struct Cutter {
    partial: BytesMut,
    /// Part of an event was passed on, and its end was not.
    within: bool,
}

impl Cutter {
    /// Takes in what came; what of it can go on.
    pub(super) fn push(&mut self, mut data: Bytes) -> Option<Bytes> {
        if self.partial.is_empty() && !self.within {
            let whole = last_end(&data).map(|end| data.split_to(end));
            self.partial.extend_from_slice(&data);
            return whole.or_else(|| self.too_much());
        }
        // What was kept holds no end, but perhaps the beginning of one.
        let from = self.partial.len().saturating_sub(END_MAX_BYTES);
        self.partial.extend_from_slice(&data);
        match last_end(&self.partial[from..]).map(|end| from + end) {
            Some(end) => {
                self.within = false;
                Some(self.partial.split_to(end).freeze())
            }
            None => self.too_much(),
        }
    }

    fn too_much(&mut self) -> Option<Bytes> {
        if self.partial.len() <= PARTIAL_MAX_BYTES {
            return None;
        }
        // The last bytes stay: an end of the event may be among them and what follows.
        let kept = self.partial.split_off(self.partial.len() - END_MAX_BYTES);
        self.within = true;
        Some(std::mem::replace(&mut self.partial, kept).freeze())
    }

    /// Whether nothing of an event was passed on without its end.
    pub(super) fn is_between(&self) -> bool {
        !self.within
    }

    /// What is left at the end.
    pub(super) fn rest(&mut self) -> Bytes {
        self.partial.split().freeze()
    }
}

/// Bytes of the longest end of an event, less one.
const END_MAX_BYTES: usize = 3;

/// Where the last event in `bytes` that is complete ends: an empty line does it.
fn last_end(bytes: &[u8]) -> Option<usize> {
    (1..bytes.len())
        .rev()
        .find(|at| bytes[*at] == b'\n' && (bytes[*at - 1] == b'\n' || bytes[..*at].ends_with(b"\r\n\r")))
        .map(|at| at + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(pieces: &[&str]) -> Vec<String> {
        let mut cutter = Cutter::default();
        let mut out: Vec<String> = Vec::new();
        for piece in pieces {
            let bytes = Bytes::copy_from_slice(piece.as_bytes());
            out.extend(cutter.push(bytes).map(|bytes| String::from_utf8(bytes.to_vec()).unwrap()));
        }
        assert!(cutter.is_between());
        out.push(String::from_utf8(cutter.rest().to_vec()).unwrap());
        out
    }

    #[test]
    fn only_whole_events_go_on() {
        assert_eq!(cut(&["data: a\n\n"]), ["data: a\n\n", ""]);
        assert_eq!(
            cut(&["data: a\n\ndata: b\n\nda", "ta: c\n", "\n"]),
            ["data: a\n\ndata: b\n\n", "data: c\n\n", ""]
        );
        assert_eq!(cut(&["data: a\r\n\r", "\ndata: b\r\n"]), ["data: a\r\n\r\n", "data: b\r\n"]);
        assert_eq!(cut(&["data: a\n", "\n"]), ["data: a\n\n", ""]);
        assert_eq!(cut(&["data: [DONE]\n"]), ["data: [DONE]\n"]);
    }

    #[test]
    fn however_a_stream_is_cut_it_arrives_whole() {
        let text = "data: {\"a\":1}\r\n\r\n: ping\n\nevent: x\ndata: y\n\ndata: [DONE]\n\n";
        for step in 1..text.len() {
            let pieces: Vec<&str> =
                text.as_bytes().chunks(step).map(|c| std::str::from_utf8(c).unwrap()).collect();
            let out = cut(&pieces);
            assert_eq!(out.concat(), text, "{step}");
            assert!(
                out.iter()
                    .all(|piece| piece.is_empty() || piece.ends_with("\n\n") || piece.ends_with("\n\r\n"))
            );
        }
    }

    #[test]
    fn an_event_without_end_takes_no_memory_without_end() {
        let mut cutter = Cutter::default();
        let mut out = 0;
        for _ in 0..40 {
            out += cutter.push(Bytes::from(vec![b'x'; 100_000])).map_or(0, |bytes| bytes.len());
        }
        assert!(out >= 2_900_000 && !cutter.is_between());
        let end = cutter.push(Bytes::from_static(b"\n\ndata: b")).unwrap();
        assert!(end.ends_with(b"x\n\n") && cutter.is_between());
        assert_eq!(cutter.rest(), "data: b");
    }
}
