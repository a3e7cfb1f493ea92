//! Which kernels have the fixes that a fast path needs, and what the others lack.
//!
//! # Invariants
//! - A kernel of which nothing is known is not trusted: a fast path on a kernel with a bug loses bytes or crashes the machine.
//! - Nothing is tried here.

use std::{fmt, fs};

use nix::sys::utsname::uname;

/// What a kernel may be good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// `sk_skb` programs that redirect to the other socket's egress.
    Splice,
    /// `sk_msg` programs that redirect to the other socket's ingress.
    Bypass,
}

/// Something that was wrong, and where it was put right.
struct Fix {
    what: &'static str,
    /// The first release that has it: (6, 16) is every 6.16 and all later ones.
    since: (u32, u32),
    /// The first releases of older lines that have it too.
    stable: &'static [Version],
}

/// A release: 6.12.34. A distribution's own patches are not seen.
type Version = (u32, u32, u32);

/// What splice takes, newest first, by the titles of upstream's commits ("bpf, sockmap: ...").
const SPLICE: [Fix; 2] = [
    Fix {
        what: "redirected bytes sent twice when a socket is full, and a socket used after it was closed \
               (\"fix duplicated data transmission\", \"Avoid using sk_socket after free when sending\")",
        since: (6, 16),
        stable: &[(6, 15, 3), (6, 12, 34), (6, 6, 94), (6, 1, 142)],
    },
    Fix {
        what: "ends and first bytes lost, buffers freed twice (\"Handle fin correctly\", \"TCP data stall on recv \
               before accept\", \"Fix skb refcnt race after locking changes\")",
        since: (6, 6),
        stable: &[(6, 5, 6), (6, 1, 56)],
    },
];

/// What no kernel has: `sk_psock_backlog` takes what a program passes, behind something that waits to be sent, into the
/// socket's account of memory without the socket's lock. The account can be off by less than a page for it, and
/// `inet_sock_destruct` warns of that, once after each boot. Nothing else is known to come of it (decision 28).
const SPLICE_WARNS: &str = "kernel.panic_on_warn is set, and a kernel may warn of a socket's account of memory where flows \
                            are spliced (\"inet_sock_destruct\"): harmless by itself, but it would stop this node";
/// sysctl
const PANIC_ON_WARN: &str = "/proc/sys/kernel/panic_on_warn";

/// What bypass takes, likewise. Only lines that it was tried on: 6.1 and 6.6 may have the fix, and nobody has looked.
const BYPASS: [Fix; 1] = [Fix {
    what: "what is redirected is charged to nobody, so that nothing bounds it, and a socket used after it was closed \
           (\"tcp_bpf: Add sk_rmem_alloc related logic for tcp_bpf ingress redirection\", \"tcp_bpf: Charge receive \
           socket buffer in bpf_tcp_ingress()\", 6.13; \"Avoid using sk_socket after free when sending\", 6.16)",
    since: (6, 16),
    stable: &[(6, 12, 34)],
}];

/// A kernel.
#[derive(Clone, Debug)]
pub struct Kernel {
    release: String,
    version: Option<Version>,
    /// Whether a warning stops it.
    panics_on_warn: bool,
}

impl Kernel {
    /// The one that runs.
    pub fn running() -> Self {
        match uname() {
            Ok(u) => Self {
                panics_on_warn: fs::read_to_string(PANIC_ON_WARN).is_ok_and(|set| set.trim() != "0"),
                ..Self::new(&u.release().to_string_lossy(), &u.version().to_string_lossy())
            },
            Err(e) => Self { release: e.to_string(), version: None, panics_on_warn: false },
        }
    }

    /// By uname(2). Debian's release numbers an ABI ("6.1.0-40-amd64"); which stable release it is made from stands in
    /// its version ("#1 SMP PREEMPT_DYNAMIC Debian 6.1.153-1 (2025-09-20)").
    fn new(release: &str, version: &str) -> Self {
        let debian = version.split_once("Debian ").and_then(|(_, of)| parse(of));
        Self {
            release: release.to_owned(),
            version: debian.or_else(|| parse(release)),
            panics_on_warn: false,
        }
    }

    /// Whether it is of this line of upstream, or a later one. One of which nothing is known is not.
    pub fn is_at_least(&self, line: (u32, u32)) -> bool {
        self.version.is_some_and(|(major, minor, _)| (major, minor) >= line)
    }

    /// Whether it is known to be good for it; else the reason.
    pub fn allows(&self, feature: Feature) -> Result<(), String> {
        let fixes = match feature {
            Feature::Splice => &SPLICE[..],
            Feature::Bypass => &BYPASS[..],
        };
        let Some(version) = self.version else {
            return Err(format!("the release of {self} is unknown"));
        };
        match fixes.iter().find(|fix| !fix.is_in(version)) {
            Some(fix) => {
                Err(format!("{self} is not known to have a required fix, {}: {}", fix.where_in(), fix.what))
            }
            None if feature == Feature::Splice && self.panics_on_warn => Err(SPLICE_WARNS.to_owned()),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Linux {}", self.release)?;
        match self.version {
            Some(version) if !self.release.starts_with(&shown(version)) => {
                write!(f, " ({})", shown(version))
            }
            _ => Ok(()),
        }
    }
}

impl Fix {
    fn is_in(&self, (major, minor, patch): Version) -> bool {
        (major, minor) >= self.since
            || self.stable.iter().any(|&(a, b, c)| (a, b) == (major, minor) && patch >= c)
    }

    fn where_in(&self) -> String {
        let stable: Vec<_> = self.stable.iter().map(|v| shown(*v)).collect();
        format!("in Linux {}.{} ({})", self.since.0, self.since.1, stable.join(", "))
    }
}

fn shown((major, minor, patch): Version) -> String {
    format!("{major}.{minor}.{patch}")
}

/// "6.12.34-anything", "6.16".
fn parse(text: &str) -> Option<Version> {
    let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    let (major, minor) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    // "6.16-rc1" is before 6.16.
    let candidate = text.contains("-rc");
    let patch = if text.matches('.').count() > 1 { numbers.next()?.ok()? } else { 0 };
    if candidate && patch == 0 {
        return Some(minor.checked_sub(1).map_or((major, 0, 0), |before| (major, before, u32::MAX)));
    }
    Some((major, minor, patch))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_good_where_every_fix_is_and_never_by_guess() {
        let splice = |release: &str, version: &str| Kernel::new(release, version).allows(Feature::Splice);
        for good in ["6.18.44-fc-v669", "6.16.0", "6.15.3", "6.12.34-x", "6.6.94", "6.1.142", "7.0", "6.16"] {
            splice(good, "#1 SMP").unwrap_or_else(|e| panic!("{good}: {e}"));
        }
        for bad in [
            "6.15.2",
            "6.14.11",
            "6.12.33",
            "6.12.0-55.el10",
            "6.6.93",
            "6.1.141",
            "5.15.200",
            "6.1.0-40",
            "x",
        ] {
            splice(bad, "#1 SMP").expect_err(bad);
        }
        splice("6.1.0-40-amd64", "#1 SMP PREEMPT_DYNAMIC Debian 6.1.153-1 (2025-09-20)").unwrap();
        let old = splice("6.1.0-9-amd64", "#1 SMP PREEMPT_DYNAMIC Debian 6.1.27-1 (2023-05-08)").unwrap_err();
        assert!(old.contains("6.1.0-9-amd64 (6.1.27)") && old.contains("6.1.142"), "{old}");
    }

    #[test]
    fn nothing_is_spliced_where_a_warning_would_stop_the_node() {
        let strict = Kernel { panics_on_warn: true, ..Kernel::new("6.18.44", "#1 SMP") };
        let why = strict.allows(Feature::Splice).unwrap_err();
        assert!(why.contains("panic_on_warn"), "{why}");
        // It takes the socket's lock.
        strict.allows(Feature::Bypass).unwrap();
    }
}
