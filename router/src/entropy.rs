//! Random bytes for what every request needs a few of: its id, its seed.
//!
//! They are the system's, fetched for many requests at a time: a system call for each would be felt. Nothing that is handed
//! out is kept. What secrets depend on asks the system itself.

use std::cell::RefCell;

/// Bytes that are fetched at a time, for each thread.
const FETCHED: usize = 1024;

struct Pool {
    bytes: [u8; FETCHED],
    /// Those before are handed out, and cleared.
    next: usize,
}

thread_local! {
    static POOL: RefCell<Pool> = const { RefCell::new(Pool { bytes: [0; FETCHED], next: FETCHED }) };
}

/// `N` random bytes, of at most [`FETCHED`].
pub(crate) fn bytes<const N: usize>() -> Result<[u8; N], getrandom::Error> {
    const { assert!(N <= FETCHED) };
    POOL.with_borrow_mut(|pool| {
        if FETCHED - pool.next < N {
            getrandom::fill(&mut pool.bytes)?;
            pool.next = 0;
        }
        let mut out = [0; N];
        let taken = &mut pool.bytes[pool.next..pool.next + N];
        out.copy_from_slice(taken);
        taken.fill(0);
        pool.next += N;
        Ok(out)
    })
}

/// A random number.
pub(crate) fn number() -> Result<u64, getrandom::Error> {
    bytes().map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn nothing_is_handed_out_twice() {
        let mut seen: HashSet<u64> = HashSet::new();
        for _ in 0..10_000 {
            assert!(seen.insert(number().unwrap()));
            let [_] = bytes::<1>().unwrap();
            let ten = bytes::<10>().unwrap();
            assert!(ten.iter().any(|byte| *byte != 0));
        }
    }
}
