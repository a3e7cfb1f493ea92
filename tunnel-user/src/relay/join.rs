//! Whether the kernel can move the bytes of a flow: where both of its legs are sockets of ours, whose bytes are raw.
//!
//! This is the one place that asks. A leg knows nothing of sockets; which type a leg has is known when the relay is
//! compiled, so the question costs nothing.

use std::any::Any;

use super::{Leg, TcpLeg};

/// Both sockets, made ready to be read and written in other ways than by their legs. `None`: the flow is copied.
pub(super) fn sockets<'f, C: Leg, T: Leg>(
    client: &'f mut C,
    target: &'f mut T,
) -> Option<(&'f mut TcpLeg, &'f mut TcpLeg)> {
    let client = (client as &mut dyn Any).downcast_mut::<TcpLeg>()?;
    let target = (target as &mut dyn Any).downcast_mut::<TcpLeg>()?;
    client.stay_with_tcp();
    target.stay_with_tcp();
    Some((client, target))
}

#[cfg(test)]
mod tests {
    use tokio::net::{TcpListener, TcpStream};

    use super::*;
    use crate::relay::{Queue, nested::Nested};

    #[tokio::test]
    async fn only_two_sockets_are_joined() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let (one, other) = tokio::join!(TcpStream::connect(at), listener.accept());
        let (mut one, mut other) = (TcpLeg::new(one.unwrap()), TcpLeg::new(other.unwrap().0));
        assert!(sockets(&mut one, &mut other).is_some());
        let mut wrapped = Nested::new(other, Queue::default());
        assert!(sockets(&mut one, &mut wrapped).is_none() && sockets(&mut wrapped, &mut one).is_none());
    }
}
