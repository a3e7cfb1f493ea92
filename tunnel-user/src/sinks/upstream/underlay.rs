//! The way to an endpoint that leads through another upstream (`via`): the seam where an upstream meets an upstream. Who goes
//! through whom has no end in itself, which the configuration has made sure of.

use std::{
    fmt,
    future::Future,
    hash::{Hash, Hasher},
    pin::Pin,
    rc::Rc,
};

use super::{TunnelError, stream::Outer};
use crate::model::flow::Target;

/// What opens byte streams for the connections of another upstream.
pub trait Underlay {
    /// Its name in errors, with those that it goes through itself.
    fn path(&self) -> &str;

    /// How many others it goes through.
    fn depth(&self) -> usize;

    /// Opens a stream to an endpoint of the other upstream, whose name, if it is one, its own far end resolves.
    fn open<'a>(
        &'a self,
        endpoint: &'a Target,
    ) -> Pin<Box<dyn Future<Output = Result<Outer, TunnelError>> + 'a>>;
}

/// An [`Underlay`], shared. Compared as what it is, an object.
#[derive(Clone)]
pub struct Via(Rc<dyn Underlay>);

impl Via {
    /// Through this one.
    pub fn new(underlay: Rc<dyn Underlay>) -> Self {
        Self(underlay)
    }
}

impl std::ops::Deref for Via {
    type Target = dyn Underlay;

    fn deref(&self) -> &Self::Target {
        &*self.0
    }
}

impl PartialEq for Via {
    fn eq(&self, other: &Self) -> bool {
        Rc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Via {}

impl Hash for Via {
    fn hash<H: Hasher>(&self, state: &mut H) {
        Rc::as_ptr(&self.0).cast::<()>().hash(state);
    }
}

impl fmt::Debug for Via {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Via").field(&self.0.path()).finish()
    }
}
