//! Stable names of what a configuration describes.
//!
//! Sections refer to each other by name, and a running daemon is compared with another configuration by name. Copies share
//! the text.

use std::{borrow::Borrow, fmt, net::SocketAddr, ops::Deref, sync::Arc};

macro_rules! name {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Arc<str>);

        impl $name {
            /// The text itself.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl From<&str> for $name {
            fn from(name: &str) -> Self {
                Self(name.into())
            }
        }

        impl From<String> for $name {
            fn from(name: String) -> Self {
                Self(name.into())
            }
        }

        impl Deref for $name {
            type Target = str;

            fn deref(&self) -> &str {
                &self.0
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl PartialEq<str> for $name {
            fn eq(&self, other: &str) -> bool {
                *self.0 == *other
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name! {
    /// An upstream's.
    UpstreamName
}

name! {
    /// An identity's: a certificate, its key, and the roots that it is used with.
    IdentityName
}

impl Default for IdentityName {
    /// The one that is used where none is named.
    fn default() -> Self {
        Self::from("default")
    }
}

name! {
    /// A captured group's: its path, or its systemd unit.
    GroupName
}

/// The stable name of something that connections are accepted from.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SourceName {
    /// A captured group.
    Capture(GroupName),
    /// Rules of the operator's redirect connections to these addresses.
    Redirect(Arc<[SocketAddr]>),
    /// A listener for CONNECT requests, by its configured address.
    Listener(SocketAddr),
}

impl fmt::Display for SourceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Capture(group) => write!(f, "capture {group}"),
            Self::Redirect(addresses) => write!(f, "redirect {addresses:?}"),
            Self::Listener(address) => write!(f, "listener {address}"),
        }
    }
}
