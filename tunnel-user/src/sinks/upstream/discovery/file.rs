//! Endpoints from a file of lines, HOST:PORT, read again whenever it changes. What replaces it should do so by renaming.
//!
//! # Invariants
//! - A file with a mistake changes nothing, and the mistake is logged with its line.

use std::{
    fmt,
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use tokio::sync::watch;

use super::{EndpointSet, Feed, Site, tell};
use crate::{
    config::ENDPOINTS_MAX,
    model::flow::{Target, TargetError},
    process::files,
};

/// The longest file that is read: [`ENDPOINTS_MAX`] of the longest names, and as much again for comments.
const FILE_MAX: u64 = 512 * 1024;

/// Why a file gives no endpoints.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be read.
    #[error("{}: {source}", file.display())]
    Read {
        /// Which.
        file: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It cannot be watched.
    #[error("{} cannot be watched: {source}", file.display())]
    Watch {
        /// Which.
        file: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A mistake in it.
    #[error("{}{}: {mistake}", file.display(), line.map(|n| format!(":{n}")).unwrap_or_default())]
    Mistake {
        /// Which.
        file: PathBuf,
        /// Its line, from 1, where it has one.
        line: Option<usize>,
        /// What is wrong.
        mistake: Mistake,
    },
}

/// What is wrong with a line, or with the whole.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mistake {
    /// The line is not an endpoint.
    #[error("\"{text}\": {why}")]
    Line {
        /// The line.
        text: String,
        /// What is wrong with it.
        why: TargetError,
    },
    /// Too many lines.
    #[error("has more than {ENDPOINTS_MAX} endpoints")]
    TooMany,
    /// Too many bytes.
    #[error("is longer than {FILE_MAX} bytes")]
    TooLong,
    /// Not text.
    #[error("is not UTF-8")]
    NotText,
}

/// Reads a file, and again whenever it changes. The first time it has to be without a mistake.
pub fn follow(upstream: &str, file: &Path) -> Result<Feed, FileError> {
    let known = read(file)?;
    let (feed, told) = watch::channel(None);
    tell(upstream, &feed, known);
    let (upstream, of) = (upstream.to_owned(), file.to_owned());
    let mut said = None;
    let look = move || match read(&of) {
        Ok(known) => {
            said = None;
            tell(&upstream, &feed, known);
        }
        Err(e) => {
            let why = e.to_string();
            // It is looked at again and again; a mistake that stays is said once.
            if said.as_ref() != Some(&why) {
                tracing::error!(upstream, "the endpoints stay as they were: {why}");
                said = Some(why);
            }
        }
    };
    let watch = files::watch([file], "endpoints-watch", look)
        .map_err(|source| FileError::Watch { file: file.to_owned(), source })?;
    Ok(Feed::new(told, watch))
}

fn read(file: &Path) -> Result<EndpointSet, FileError> {
    let mut bytes = Vec::new();
    File::open(file)
        .and_then(|open| open.take(FILE_MAX + 1).read_to_end(&mut bytes))
        .map_err(|source| FileError::Read { file: file.to_owned(), source })?;
    let wrong = |(line, mistake)| FileError::Mistake { file: file.to_owned(), line, mistake };
    let sites = parse(&bytes).map_err(wrong)?;
    Ok(EndpointSet::new(sites.into_iter().map(Site::from), format!("{} lists none", file.display())))
}

fn parse(bytes: &[u8]) -> Result<Vec<Target>, (Option<usize>, Mistake)> {
    if bytes.len() as u64 > FILE_MAX {
        return Err((None, Mistake::TooLong));
    }
    let text = std::str::from_utf8(bytes).map_err(|_| (None, Mistake::NotText))?;
    let mut endpoints = Vec::new();
    for (i, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        let wrong = |why| (Some(i + 1), Mistake::Line { text: Shortened(line).to_string(), why });
        endpoints.push(line.parse().map_err(wrong)?);
        if endpoints.len() > ENDPOINTS_MAX {
            return Err((Some(i + 1), Mistake::TooMany));
        }
    }
    Ok(endpoints)
}

/// A line as an error shows it: control characters escaped, and no longer than one can read.
struct Shortened<'a>(&'a str);

impl fmt::Display for Shortened<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 80;
        let short: String = self.0.chars().take(SHOWN).collect();
        let more = if short.len() < self.0.len() { ".." } else { "" };
        write!(f, "{}{more}", short.escape_debug())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;

    fn shown(text: &str) -> Result<Vec<String>, (Option<usize>, String)> {
        let parsed = parse(text.as_bytes());
        parsed.map(|all| all.iter().map(ToString::to_string).collect()).map_err(|(n, m)| (n, m.to_string()))
    }

    #[test]
    fn lines_are_endpoints_and_comments_are_not() {
        let text = "# east\n\n 10.9.0.1:15008 \r\ngw.Test.:15008 # by name\n[fd00::1]:15008";
        let wanted = ["10.9.0.1:15008", "gw.test:15008", "[fd00::1]:15008"].map(str::to_owned);
        assert_eq!(shown(text), Ok(wanted.to_vec()));
        assert_eq!(shown("# nothing\n"), Ok(Vec::new()));
    }

    #[test]
    fn a_mistake_is_named_with_its_line() {
        let why = |line: usize, text: &str| Err((Some(line), text.to_owned()));
        assert_eq!(shown("10.9.0.1:1\n10.9.0.2\n"), why(2, "\"10.9.0.2\": authority has no port"));
        assert_eq!(shown("a b:1"), why(1, "\"a b:1\": host is neither an IP address nor a host name"));
        let long = "x".repeat(500);
        assert!(shown(&long).unwrap_err().1.len() < 150);
        assert_eq!(shown(&"a:1\n".repeat(1001)), why(1001, "has more than 1000 endpoints"));
        assert_eq!(parse(&[0xff]), Err((None, Mistake::NotText)));
        assert_eq!(parse(&vec![b'#'; 512 * 1024 + 1]), Err((None, Mistake::TooLong)));
    }

    proptest! {
        #[test]
        fn any_bytes_are_endpoints_or_a_mistake(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _verdict = parse(&bytes);
        }
    }

    #[tokio::test]
    async fn a_replaced_file_is_read_and_one_with_a_mistake_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("east.endpoints");
        let replace = |text: &str| {
            let new = dir.path().join("new");
            fs::write(&new, text).unwrap();
            fs::rename(&new, &file).unwrap();
        };
        replace("10.0.0.1:1\n10.0.0.1:1\n");
        let mut feed = follow("east", &file).unwrap();
        let sites = |known: &EndpointSet| known.sites.iter().map(|s| s.at.to_string()).collect::<Vec<_>>();
        assert_eq!(sites(&feed.now().unwrap()), ["10.0.0.1:1"], "each endpoint once");
        replace("nonsense\n");
        replace("10.0.0.2:1\n");
        assert_eq!(sites(&feed.next().await), ["10.0.0.2:1"]);
        replace("");
        let none = feed.next().await;
        assert!(none.sites.is_empty() && none.unavailable.ends_with("east.endpoints lists none"), "{none:?}");
        assert!(follow("east", &dir.path().join("gone")).is_err());
    }
}
