//! Randomness as an argument. Nothing else in the crate draws any.

/// Where random bytes come from; always fit for keys and tokens.
pub trait Random: Send + Sync {
    fn fill(&self, bytes: &mut [u8]);
}

/// Draws an array.
pub fn draw<const N: usize>(random: &dyn Random) -> [u8; N] {
    let mut bytes = [0; N];
    random.fill(&mut bytes);
    bytes
}

/// The kernel's source.
#[derive(Debug, Clone, Copy, Default)]
pub struct OsRandom;

impl Random for OsRandom {
    fn fill(&self, bytes: &mut [u8]) {
        // Going on without randomness would hand out guessable tokens.
        getrandom::fill(bytes).expect("the kernel gives random bytes");
    }
}
