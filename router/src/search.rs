//! Finds bytes many at a step.

/// Bytes that are looked at together.
const STEP_BYTES: usize = 32;

/// How many bytes there are before the first one that means something, which is not 0.
///
/// `means` must not branch: it becomes a few vector instructions then.
pub(crate) fn before(bytes: &[u8], means: impl Fn(u8) -> u8) -> usize {
    let (steps, _) = bytes.as_chunks::<STEP_BYTES>();
    // No way out of the inner loop, for the same reason.
    let clear = |step: &&[u8; STEP_BYTES]| step.iter().fold(0, |any, byte| any | means(*byte)) == 0;
    let clear = STEP_BYTES * steps.iter().take_while(clear).count();
    let more = bytes[clear..].iter().take_while(|byte| means(**byte) == 0).count();
    clear + more
}

/// The place of a byte.
pub(crate) fn find(bytes: &[u8], wanted: u8) -> Option<usize> {
    let at = before(bytes, |byte| u8::from(byte == wanted));
    (at < bytes.len()).then_some(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_is_found_wherever_it_is() {
        for len in 0..100 {
            let mut bytes = vec![b'a'; len];
            assert_eq!((find(&bytes, b'x'), before(&bytes, |byte| byte & 0x80)), (None, len));
            for at in (0..len).rev() {
                bytes[at] = b'x';
                assert_eq!(find(&bytes, b'x'), Some(at));
                assert_eq!(before(&bytes, |byte| u8::from(byte == b'x') | u8::from(byte == b'y')), at);
            }
        }
    }
}
