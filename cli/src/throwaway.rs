//! Names of what is made for one run and deleted at its end. It must not make anything of them.

use data_encoding::BASE32_NOPAD;

use crate::failure::Failure;

/// Six letters and digits, so that two runs do not meet.
pub fn letters() -> Result<String, Failure> {
    let mut bytes = [0; 4];
    getrandom::fill(&mut bytes).map_err(|e| Failure::Failed(format!("the system gives no randomness: {e}")))?;
    let text = BASE32_NOPAD.encode(&bytes).to_ascii_lowercase();
    Ok(text.chars().take(6).collect())
}
