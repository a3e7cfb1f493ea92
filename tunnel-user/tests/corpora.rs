//! What the fuzzers have found is tried again, without them.

#[path = "../../fuzz/src/lib.rs"]
#[expect(unreachable_pub, reason = "the fuzzers' crate, in which they are reached")]
mod fuzz;

use std::{fs, path::Path};

#[test]
fn every_input_of_the_corpora_keeps_the_promises() {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    for (name, check) in fuzz::ALL {
        let folder = corpora.join(name);
        let files = fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        let mut inputs = 0;
        for file in files {
            let file = file.unwrap().path();
            let input = fs::read(&file).unwrap();
            if std::panic::catch_unwind(|| check(&input)).is_err() {
                panic!("{}", file.display());
            }
            inputs += 1;
        }
        assert!(inputs > 0, "{} is empty", folder.display());
    }
}
