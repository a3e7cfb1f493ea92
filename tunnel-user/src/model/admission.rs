//! What a flow was admitted with: enough to ask policies and routes about it again when they change.

use std::{net::SocketAddr, sync::Arc};

use http::{HeaderMap, HeaderName, HeaderValue, Version};

use super::flow::{ClientAddr, Identity, Sniffed, SourceKind, Target};

/// What a flow asked for at a source, or at a listener that it was handed to in this process.
#[derive(Clone, Debug)]
pub struct Admission {
    /// By what kind of source it came.
    pub source: SourceKind,
    /// What the configuration calls that.
    pub name: Option<Arc<str>>,
    /// Who opened it.
    pub client: ClientAddr,
    /// Who the peer behind a listener has proved to be.
    pub identity: Option<Identity>,
    /// The name by which that peer asked for us.
    pub server_name: Option<Box<str>>,
    /// What it asked for.
    pub target: Target,
    /// The request.
    pub head: Option<HeldHead>,
    /// What its first bytes said, where somebody has looked.
    pub sniffed: Option<Sniffed>,
    /// Where it went on.
    pub onward: Onward,
}

/// Where a flow went on, as far as policies ask.
#[derive(Clone, Debug)]
pub enum Onward {
    /// The target was dialled at this address.
    Dialled(SocketAddr),
    /// The target was passed on without being resolved, and this other one, which the client has named since.
    Unresolved(Option<Target>),
}

/// A request's version and headers, in as little memory as they take.
#[derive(Clone, Debug)]
pub struct HeldHead {
    version: Version,
    /// For each line: the length of its name and of its value, and both.
    lines: Box<[u8]>,
}

impl HeldHead {
    /// A copy.
    pub fn new(version: Version, headers: &HeaderMap) -> Self {
        let length = |text: &[u8]| u32::try_from(text.len()).unwrap_or(u32::MAX);
        let mut lines = Vec::new();
        for (name, value) in headers {
            let (name, value) = (name.as_str().as_bytes(), value.as_bytes());
            lines.extend(length(name).to_ne_bytes());
            lines.extend(length(value).to_ne_bytes());
            lines.extend(name);
            lines.extend(value);
        }
        Self { version, lines: lines.into() }
    }

    /// Bytes that it takes.
    pub fn size(&self) -> usize {
        self.lines.len()
    }

    /// The version of HTTP that it came by.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The headers, as they were.
    pub fn headers(&self) -> HeaderMap {
        let (mut headers, mut rest) = (HeaderMap::new(), &*self.lines);
        while let Some((name, value)) = line(&mut rest) {
            headers.append(name, value);
        }
        headers
    }
}

fn line(rest: &mut &[u8]) -> Option<(HeaderName, HeaderValue)> {
    let mut length = || {
        let (length, behind) = rest.split_first_chunk()?;
        *rest = behind;
        usize::try_from(u32::from_ne_bytes(*length)).ok()
    };
    let (name, value) = (length()?, length()?);
    let (line, behind) = rest.split_at_checked(name + value)?;
    *rest = behind;
    let (name, value) = line.split_at_checked(name)?;
    Some((HeaderName::from_bytes(name).ok()?, HeaderValue::from_bytes(value).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Headers that are held come back as they were: several lines of a name, empty values, and bytes that are no text.
    #[test]
    fn held_headers_are_what_they_were() {
        let mut headers = HeaderMap::new();
        assert_eq!(HeldHead::new(Version::HTTP_2, &headers).headers(), headers);
        for (name, value) in [("a", "1"), ("a", "2"), ("x-empty", ""), ("user-agent", "\u{e9}")] {
            headers.append(HeaderName::from_static(name), HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        let held = HeldHead::new(Version::HTTP_11, &headers);
        assert_eq!((held.version(), held.headers()), (Version::HTTP_11, headers));
    }
}
