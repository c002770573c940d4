//! Fingerprints in place of keys, that nobody can foresee or trace back.
//!
//! By `SipHash-1-3`, the function of the standard library's maps, with a random key. Written out here because callers wait for it: a
//! number goes into the state as it is, where the standard library takes every number to pieces, and all of it can be inlined
//! into the one place where a key is found.

use std::hash::{BuildHasher, Hash, Hasher, RandomState};

/// Makes the fingerprints of one set.
pub(crate) struct Seed {
    /// What a hasher begins with.
    state: [u64; 4],
    keyless: u64,
}

impl Default for Seed {
    fn default() -> Self {
        let random = RandomState::new();
        let fresh = SipHasher::new(random.hash_one(0), random.hash_one(1));
        Self {
            state: fresh.state,
            keyless: fingerprint(&fresh),
        }
    }
}

#[inline]
fn fingerprint(hasher: &SipHasher) -> u64 {
    match hasher.finish() {
        0 => instead_of_zero(),
        hash => hash,
    }
}

/// Zero is nobody's: tables may use it as a mark. A call, so that nobody else waits for the comparison.
#[cold]
fn instead_of_zero() -> u64 {
    1
}

impl Seed {
    /// Its tail and length are known to be empty where it is inlined, and fold away.
    #[inline]
    fn hasher(&self) -> SipHasher {
        SipHasher {
            state: self.state,
            tail: 0,
            length: 0,
        }
    }

    #[inline]
    pub(crate) fn fingerprint(&self, key: &(impl Hash + ?Sized)) -> u64 {
        let mut hasher = self.hasher();
        key.hash(&mut hasher);
        fingerprint(&hasher)
    }

    /// The fingerprint of what is written, if it says that there is a key.
    #[inline]
    pub(crate) fn fingerprint_with(&self, write: impl FnOnce(&mut SipHasher) -> bool) -> Option<u64> {
        let mut hasher = self.hasher();
        write(&mut hasher).then(|| fingerprint(&hasher))
    }

    /// The fingerprint of no key.
    #[inline]
    pub(crate) fn keyless(&self) -> u64 {
        self.keyless
    }
}

/// `SipHash` with one round for each word and three at the end.
pub(crate) struct SipHasher {
    state: [u64; 4],
    /// What does not make up a word yet, from the lowest byte on.
    tail: u64,
    /// How many bytes have been written.
    length: u64,
}

impl SipHasher {
    fn new(key0: u64, key1: u64) -> Self {
        Self {
            state: [
                key0 ^ 0x736f_6d65_7073_6575,
                key1 ^ 0x646f_7261_6e64_6f6d,
                key0 ^ 0x6c79_6765_6e65_7261,
                key1 ^ 0x7465_6462_7974_6573,
            ],
            tail: 0,
            length: 0,
        }
    }

    #[inline]
    fn round([mut v0, mut v1, mut v2, mut v3]: [u64; 4]) -> [u64; 4] {
        v0 = v0.wrapping_add(v1);
        v2 = v2.wrapping_add(v3);
        v1 = v1.rotate_left(13) ^ v0;
        v3 = v3.rotate_left(16) ^ v2;
        v0 = v0.rotate_left(32);
        v2 = v2.wrapping_add(v1);
        v0 = v0.wrapping_add(v3);
        v1 = v1.rotate_left(17) ^ v2;
        v3 = v3.rotate_left(21) ^ v0;
        v2 = v2.rotate_left(32);
        [v0, v1, v2, v3]
    }

    #[inline]
    fn absorb(mut state: [u64; 4], word: u64) -> [u64; 4] {
        state[3] ^= word;
        state = Self::round(state);
        state[0] ^= word;
        state
    }

    /// Writes the lowest bytes of a number, one to eight; all others are zero.
    #[inline]
    fn write_low(&mut self, number: u64, bytes: u64) {
        let before = self.length % 8;
        self.length = self.length.wrapping_add(bytes);
        self.tail |= number << (8 * before);
        if before + bytes >= 8 {
            self.state = Self::absorb(self.state, self.tail);
            // In two steps: all 64 bits may go.
            self.tail = number >> (8 * (7 - before)) >> 8;
        }
    }
}

impl Hasher for SipHasher {
    #[inline]
    fn finish(&self) -> u64 {
        let mut state = Self::absorb(self.state, self.length << 56 | self.tail);
        state[2] ^= 0xFF;
        for _ in 0..3 {
            state = Self::round(state);
        }
        state[0] ^ state[1] ^ state[2] ^ state[3]
    }

    #[inline]
    fn write(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks();
        for word in words {
            self.write_low(u64::from_le_bytes(*word), 8);
        }
        let number = rest.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte));
        if !rest.is_empty() {
            self.write_low(number, rest.len() as u64);
        }
    }

    #[inline]
    fn write_u8(&mut self, number: u8) {
        self.write_low(number.into(), 1);
    }
    #[inline]
    fn write_u16(&mut self, number: u16) {
        self.write_low(number.into(), 2);
    }
    #[inline]
    fn write_u32(&mut self, number: u32) {
        self.write_low(number.into(), 4);
    }
    #[inline]
    fn write_u64(&mut self, number: u64) {
        self.write_low(number, 8);
    }
    #[inline]
    fn write_usize(&mut self, number: usize) {
        self.write_low(number as u64, 8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection::vec, prelude::*};
    use std::hash::DefaultHasher;

    proptest! {
        #[test]
        fn it_is_the_standard_librarys_function_however_the_bytes_come(pieces in vec(vec(any::<u8>(), 0..40), 0..6)) {
            let (mut ours, mut theirs) = (SipHasher::new(0, 0), DefaultHasher::new());
            for piece in &pieces {
                ours.write(piece);
                theirs.write(piece);
            }
            prop_assert_eq!(ours.finish(), theirs.finish());
        }

        #[test]
        fn a_number_is_its_bytes(before in vec(any::<u8>(), 0..9), a: u8, b: u16, c: u32, d: u64, e: u128) {
            let (mut numbers, mut bytes) = (SipHasher::new(1, 2), SipHasher::new(1, 2));
            numbers.write(&before);
            bytes.write(&before);
            numbers.write_u8(a);
            numbers.write_u16(b);
            numbers.write_u32(c);
            numbers.write_u64(d);
            bytes.write(&[a]);
            bytes.write(&b.to_le_bytes());
            bytes.write(&c.to_le_bytes());
            bytes.write(&d.to_le_bytes());
            if cfg!(target_endian = "little") {
                numbers.write_u128(e);
                bytes.write(&e.to_le_bytes());
            }
            prop_assert_eq!(numbers.finish(), bytes.finish());
        }
    }
}
