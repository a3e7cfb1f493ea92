//! Permits: one of a bounded or counted number, given back when it is dropped.

use std::{cell::Cell, fmt, rc::Rc};

/// What gives permits out, and counts them.
pub trait Issuer {
    /// One of its permits was dropped.
    fn returned(&self);
}

/// One of those that an [`Issuer`] has given out.
pub struct Permit(Rc<dyn Issuer>);

impl Permit {
    /// Of an issuer that has counted it.
    pub fn new(issuer: Rc<dyn Issuer>) -> Self {
        Self(issuer)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.returned();
    }
}

impl fmt::Debug for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Permit")
    }
}

/// Counts the permits that are out.
#[derive(Clone, Debug, Default)]
pub struct Count(Rc<Cell<usize>>);

impl Count {
    /// One more permit, unless `most` are out.
    pub fn take(&self, most: usize) -> Option<Permit> {
        let out = self.0.get();
        (out < most).then(|| {
            self.0.set(out + 1);
            let issuer: Rc<dyn Issuer> = Rc::<Cell<usize>>::clone(&self.0);
            Permit(issuer)
        })
    }
}

impl Issuer for Cell<usize> {
    fn returned(&self) {
        self.set(self.get() - 1);
    }
}

/// What a stream holds as long as it lives, whoever waits for it.
#[derive(Debug)]
pub struct StreamPermits {
    /// On its connection.
    pub connection: Permit,
    /// Among the streams of its endpoint.
    pub endpoint: Permit,
    /// Among the streams of its upstream, where those are limited.
    pub upstream: Option<Permit>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn never_more_permits_are_out_than_the_limit_and_those_given_back_are_taken_again() {
        let count = Count::default();
        let one = count.take(2).unwrap();
        let _two = count.take(2).unwrap();
        assert!(count.take(2).is_none());
        drop(one);
        assert!(count.take(2).is_some() && count.take(0).is_none());
    }
}
