//! How bytes become what happens.

use arbitrary::{Result, Unstructured};
use std::time::Duration;

pub const NANOSECOND: Duration = Duration::from_nanos(1);
pub const YEAR: Duration = Duration::from_secs(31_557_600);

/// One nanosecond less.
pub fn just_before(wait: Duration) -> Duration {
    wait.checked_sub(NANOSECOND).expect("a wait takes time")
}

/// Plays a scenario. Where the bytes end, it ends.
pub fn play(data: &[u8], scenario: impl FnOnce(&mut Unstructured<'_>) -> Result<()>) {
    match scenario(&mut Unstructured::new(data)) {
        Ok(()) | Err(arbitrary::Error::NotEnoughData | arbitrary::Error::IncorrectFormat) => {}
        Err(error) => panic!("{error}"),
    }
}

/// One time in eight.
pub fn rarely(input: &mut Unstructured<'_>) -> Result<bool> {
    input.ratio(1_u8, 8_u8)
}

/// Any duration: round and odd ones, from none to more than any clock goes.
pub fn duration(input: &mut Unstructured<'_>) -> Result<Duration> {
    Ok(match input.int_in_range(0..=4)? {
        0 => Duration::from_nanos(input.arbitrary::<u8>()?.into()),
        1 => Duration::from_nanos(input.arbitrary()?),
        2 => Duration::from_millis(input.arbitrary::<u16>()?.into()),
        3 => Duration::from_secs(input.arbitrary::<u8>()?.into()),
        _ => Duration::new(input.arbitrary()?, input.int_in_range(0..=999_999_999)?),
    })
}

/// What happens next to something that hands out permits.
#[derive(Debug, Clone, Copy)]
pub enum Step {
    Advance(Duration),
    Rewind(Duration),
    Take,
    End,
}

impl Step {
    /// `None` where the input ends.
    pub fn next(input: &mut Unstructured<'_>) -> Result<Option<Self>> {
        if input.is_empty() {
            return Ok(None);
        }
        Ok(Some(match input.int_in_range(0..=7)? {
            0 | 1 => Self::Advance(duration(input)?),
            2 => Self::Rewind(duration(input)?),
            3 | 4 => Self::End,
            _ => Self::Take,
        }))
    }
}

/// So many bytes as the first of them says.
pub fn bytes(input: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let length = usize::from(input.arbitrary::<u8>()?).min(input.len());
    Ok(input.bytes(length)?.to_vec())
}

/// The same as text, what is none of it replaced.
pub fn text(input: &mut Unstructured<'_>) -> Result<String> {
    Ok(String::from_utf8_lossy(&bytes(input)?).into_owned())
}
