//! How many unsafe blocks, functions and implementations each file of the shipped code has at most: `cargo xtask rooms` fails on
//! one more, so that it is seen by whoever reviews the change, and on one less, so that the ceiling follows.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context as _, Result};
use proc_macro2::{TokenStream, TokenTree};

use crate::rooms::sources;

/// Of every file that has any.
const CEILINGS: &[(&str, usize)] = &[
    ("tunnel-common/src/pod.rs", 1),
    ("tunnel-ebpf/src/bypass.rs", 15),
    ("tunnel-ebpf/src/connect.rs", 13),
    ("tunnel-ebpf/src/device.rs", 3),
    ("tunnel-ebpf/src/field.rs", 2),
    ("tunnel-ebpf/src/group.rs", 9),
    ("tunnel-ebpf/src/main.rs", 2),
    ("tunnel-ebpf/src/maps.rs", 16),
    ("tunnel-ebpf/src/original_dst.rs", 15),
    ("tunnel-ebpf/src/splice.rs", 21),
    ("tunnel-ebpf/src/steer.rs", 6),
    ("tunnel-ebpf/src/tcp_events.rs", 12),
    ("tunnel-user/src/kernel/bypass/slot.rs", 1),
    ("tunnel-user/src/kernel/bypass/tests.rs", 5),
    ("tunnel-user/src/kernel/confine/hostile.rs", 2),
    ("tunnel-user/src/kernel/confine/landlock.rs", 4),
    ("tunnel-user/src/kernel/confine/seccomp.rs", 1),
    ("tunnel-user/src/kernel/inherited.rs", 20),
    ("tunnel-user/src/kernel/map.rs", 3),
    ("tunnel-user/src/kernel/mapped.rs", 7),
    ("tunnel-user/src/kernel/memory.rs", 1),
    ("tunnel-user/src/kernel/passed.rs", 2),
    ("tunnel-user/src/kernel/ready.rs", 1),
    ("tunnel-user/src/kernel/sys.rs", 36),
    ("tunnel-user/src/transport/sockopt.rs", 12),
];

/// What is wrong with the files of a checkout.
pub(crate) fn check(root: &Path) -> Result<Vec<String>> {
    let mut found = BTreeMap::new();
    for folder in ["tunnel-common/src", "tunnel-ebpf/src", "tunnel-user/src"] {
        for file in sources(&root.join(folder))? {
            let text = fs::read_to_string(&file)?;
            let tokens: TokenStream =
                text.parse().ok().with_context(|| format!("{}: no Rust", file.display()))?;
            let name = file.strip_prefix(root)?.to_string_lossy().into_owned();
            let n = count(tokens);
            if n > 0 {
                found.insert(name, n);
            }
        }
    }
    Ok(compare(&found, CEILINGS))
}

fn compare(found: &BTreeMap<String, usize>, ceilings: &[(&str, usize)]) -> Vec<String> {
    let ceiling = |name: &str| ceilings.iter().find(|(file, _)| *file == name).map_or(0, |(_, n)| *n);
    let gone = ceilings.iter().map(|(file, _)| (*file).to_owned()).filter(|file| !found.contains_key(file));
    let all = found.iter().map(|(name, n)| (name.clone(), *n)).chain(gone.map(|name| (name, 0)));
    all.filter(|(name, n)| ceiling(name) != *n)
        .map(|(name, n)| {
            let most = ceiling(&name);
            let what = if n > most { "is it needed? Then raise" } else { "lower" };
            format!("{name}: {n} times unsafe, and its ceiling is {most}: {what} it in xtask/src/unsafes.rs")
        })
        .collect()
}

/// The keyword, wherever it is, in macros too.
fn count(tokens: TokenStream) -> usize {
    tokens
        .into_iter()
        .map(|token| match token {
            TokenTree::Ident(word) => usize::from(word == "unsafe"),
            TokenTree::Group(group) => count(group.stream()),
            _ => 0,
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keyword_counts_wherever_it_is_and_a_word_in_a_comment_does_not() {
        let text = "// unsafe\n#![expect(unsafe_code)]\nunsafe fn f() { m!(unsafe { g() }); let _ = \"unsafe\"; unsafe {} }";
        assert_eq!(count(text.parse().unwrap()), 3);
    }

    #[test]
    fn one_more_fails_and_so_does_one_less() {
        let found = BTreeMap::from([("a.rs".to_owned(), 2), ("b.rs".to_owned(), 1)]);
        assert!(compare(&found, &[("a.rs", 2), ("b.rs", 1)]).is_empty());
        assert_eq!(compare(&found, &[("a.rs", 3), ("c.rs", 1)]).len(), 3);
    }
}
