//! Numbers that nobody can guess, without a system call for each.

use std::cell::RefCell;
use std::io;

use rustix::rand::{GetRandomFlags, getrandom};

/// Bytes that the system gives at once, and without being interrupted.
const DRAWN_BYTES: usize = 256;

thread_local! {
    /// What was drawn and not yet given to anybody.
    static DRAWN: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
}

/// A number that was never given before and that nobody can guess.
///
/// # Errors
/// The system's.
pub(crate) fn random_u64() -> io::Result<u64> {
    DRAWN.with_borrow_mut(|drawn| {
        if let Some(number) = drawn.pop() {
            return Ok(number);
        }
        let mut bytes = [0; DRAWN_BYTES];
        let filled = getrandom(&mut bytes, GetRandomFlags::empty())?;
        let (words, _) = bytes[..filled].as_chunks::<8>();
        drawn.extend(words.iter().map(|word| u64::from_le_bytes(*word)));
        drawn.pop().ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_number_comes_twice() {
        let draw = || (0..1000).map(|_| random_u64().unwrap()).collect::<Vec<_>>();
        let elsewhere = std::thread::scope(|scope| scope.spawn(draw).join().unwrap());
        let all: std::collections::HashSet<u64> = draw().into_iter().chain(elsewhere).collect();
        assert_eq!(all.len(), 2000);
    }
}
