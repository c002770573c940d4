//! What libFuzzer runs for hours, run for a moment: the seeds of every target, and some random bytes.
#![cfg(feature = "http")]

#[path = "lib.rs"]
mod targets;

use proptest::{prelude::*, test_runner::FileFailurePersistence};
use std::{
    fs,
    panic::{catch_unwind, resume_unwind},
    path::Path,
};

const LONGEST: usize = 512;

/// Bytes that follow from a seed (xorshift64*), and often one of those that mean something somewhere.
fn bytes(seed: u64, length: usize) -> Vec<u8> {
    const SPECIAL: [u8; 16] = *b"\"\\\n\r,;=:/%.[]{} ";
    let mut state = seed | 1;
    let mut next = move || {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_be_bytes()
    };
    let byte = |_| match next() {
        [0..64, at, ..] => SPECIAL[usize::from(at) % SPECIAL.len()],
        [_, byte, ..] => byte,
    };
    (0..length).map(byte).collect()
}

/// Every committed input of a target; one that fails is named.
fn seeds(target: &str, run: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fuzz/seeds")
        .join(target);
    let files = fs::read_dir(&folder).expect("every target has seeds");
    let mut seen = 0;
    for file in files {
        let path = file.expect("it is there").path();
        let bytes = fs::read(&path).expect("it is readable");
        if let Err(panic) = catch_unwind(|| run(&bytes)) {
            eprintln!("the seed {} fails", path.display());
            resume_unwind(panic);
        }
        seen += 1;
    }
    assert!(seen > 0, "every target has seeds");
}

macro_rules! targets {
    ($($target:ident: $holds:ident,)+) => { $(
        #[test]
        fn $holds() {
            seeds(stringify!($target), targets::$target::run);
            let config = ProptestConfig {
                cases: 2_000,
                failure_persistence: Some(Box::new(FileFailurePersistence::Off)),
                ..ProptestConfig::default()
            };
            proptest!(config, |(seed in any::<u64>(), length in 0..LONGEST)| {
                targets::$target::run(&bytes(seed, length));
            });
        }
    )+ };
}

targets! {
    admin: any_request_of_the_admin_service_is_answered_well_and_changes_nothing,
    bodies: any_body_passes_unchanged_and_settles_its_call_once,
    breakers: a_breaker_of_any_settings_does_what_its_status_tells,
    client_address: what_a_client_writes_never_decides_what_a_proxy_has_seen,
    headers: any_header_fields_are_read_and_what_is_written_is_well_formed,
    limits: a_limiter_of_any_settings_keeps_to_its_rule,
}
