//! Sets of ports, as lists of inclusive ranges.
//!
//! # Invariants
//! - Ranges are sorted, disjoint and do not touch, so that equal sets are equal lists.

/// Inclusive ranges.
pub type Ports = Vec<(u16, u16)>;

/// The same ports, in the one form that they have.
fn merged(mut ranges: Ports) -> Ports {
    ranges.sort_unstable();
    let mut out = Ports::new();
    for (first, last) in ranges {
        match out.last_mut() {
            Some((_, end)) if u32::from(first) <= u32::from(*end) + 1 => *end = last.max(*end),
            _ => out.push((first, last)),
        }
    }
    out
}

/// The ports of either.
pub(super) fn union(mut a: Ports, b: &[(u16, u16)]) -> Ports {
    if b.is_empty() {
        return a;
    }
    a.extend(b);
    merged(a)
}

/// The ports of `a` that are not in `b`.
pub(super) fn subtract(a: Ports, b: &[(u16, u16)]) -> Ports {
    let mut left = a;
    for &(first, last) in b {
        left = left
            .into_iter()
            .flat_map(|(s, e)| {
                let before = (s < first).then(|| (s, e.min(first.saturating_sub(1))));
                let after = (e > last).then(|| (s.max(last.saturating_add(1)), e));
                [before, after].into_iter().flatten().filter(|(s, e)| s <= e)
            })
            .collect();
    }
    left
}

/// The ports of both.
pub(super) fn intersect(a: &[(u16, u16)], b: &[(u16, u16)]) -> Ports {
    let both = |&(s, e): &(u16, u16)| b.iter().map(move |&(first, last)| (s.max(first), e.min(last)));
    merged(a.iter().flat_map(both).filter(|(s, e)| s <= e).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Ports at both ends of what there is, and few in between, so that ranges touch and overlap.
    fn ranges() -> impl Strategy<Value = Ports> {
        let port = || prop_oneof![0u16..8, u16::MAX - 3..=u16::MAX];
        let range = (port(), port()).prop_map(|(a, b)| (a.min(b), a.max(b)));
        proptest::collection::vec(range, 0..5)
    }

    proptest! {
        #[test]
        fn sets_are_what_their_names_say_and_have_one_form(a in ranges(), b in ranges(), port: u16) {
            let a = merged(a);
            for port in [0, 1, 3, 7, 8, port, u16::MAX - 3, u16::MAX - 1, u16::MAX] {
                let has = |set: &[(u16, u16)]| set.iter().any(|&(s, e)| (s..=e).contains(&port));
                prop_assert_eq!(has(&union(a.clone(), &b)), has(&a) || has(&b));
                prop_assert_eq!(has(&subtract(a.clone(), &b)), has(&a) && !has(&b));
                prop_assert_eq!(has(&intersect(&a, &b)), has(&a) && has(&b));
            }
            for set in [union(a.clone(), &b), subtract(a.clone(), &b), intersect(&a, &b)] {
                prop_assert_eq!(&merged(set.clone()), &set);
            }
        }
    }
}
