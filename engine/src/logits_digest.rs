//! The running digest of logits bits: the proof that two workers computed the same.

use std::hash::Hasher;

use twox_hash::XxHash3_64;

/// The digest after one more row of logits: xxh3 of the row's `f32` little-endian bytes, seeded with the digest
/// `before` (0 at the first token).
///
/// Equal tokens prove little (two swapped KV blocks often change none); equal bits of every logit do.
pub fn running_digest(before: Option<u64>, logits: &[f32]) -> u64 {
    const STAGE_NUMBERS: usize = 1024;
    let mut hasher = XxHash3_64::with_seed(before.unwrap_or(0));
    let mut bytes = [0u8; STAGE_NUMBERS * 4];
    for part in logits.chunks(STAGE_NUMBERS) {
        for (number, bytes) in part.iter().zip(bytes.as_chunks_mut().0) {
            *bytes = number.to_le_bytes();
        }
        hasher.write(&bytes[..part.len() * 4]);
    }
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_chained_hash_of_the_bytes() {
        let rows = [[0.5f32; 3000], [-1.25; 3000]];
        let mut before = None;
        for row in &rows {
            let bytes: Vec<u8> = row.iter().flat_map(|number| number.to_le_bytes()).collect();
            let expected = XxHash3_64::oneshot_with_seed(before.unwrap_or(0), &bytes);
            assert_eq!(running_digest(before, row), expected);
            before = Some(expected);
        }
        assert_ne!(running_digest(None, &[0.0]), running_digest(None, &[-0.0]), "bits, not values");
    }
}
