//! What was captured: connections of applications on this node.
//!
//! Enters: redirected connections, with the address that each asked for. Leaves: flows that have ended, booked.
//! Invariant: what the kernel has accepted when the order to stop comes is carried too. It never asks a policy:
//! captured applications are the operator's own.

use std::{future::Future, rc::Rc, sync::Arc, time::Instant};

use super::{At, Going, Place, Proxy, back_off, reach::Wish};
use crate::{
    model::{
        end::EndReason,
        flow::{Source, Target},
    },
    observe::stats::Record,
    process::drain::Tasks,
    relay::{Ahead, Queue, TcpLeg},
    routing::{flow::Flow, index::NOBODY, router::Decision},
    sources::capture::accept::{Accept, Captured, Stray},
};

/// Accepts until it is told to stop. Then it takes what is waiting: the kernel has told those applications
/// that they are connected.
pub(super) async fn accept_captured(proxy: Rc<Proxy>, accept: Accept, at: Rc<At>, flows: Rc<Tasks>) {
    let mut watch = at.watch.clone();
    let mut draining = false;
    loop {
        let accepted = tokio::select! {
            biased;
            accepted = accept.next() => accepted,
            () = watch.draining(), if !draining => {
                draining = true;
                continue;
            }
            () = std::future::ready(()), if draining => return,
        };
        match accepted {
            Ok(Ok(captured)) => match proxy.admit(None) {
                Ok(place) => {
                    flows.spawn(carry_captured(Rc::clone(&proxy), captured, at.name(), place));
                }
                Err(refusal) => {
                    proxy.counters.over_limit.add(1);
                    proxy.counters.ended.of(refusal.reason()).add(1);
                    if proxy.lines.crowded.admit() {
                        let reason = refusal.reason();
                        tracing::warn!(%reason, "reset a captured connection: {refusal} (daemon.max_flows)");
                    }
                }
            },
            Ok(Err(stray)) => {
                let (reason, counter) = match &stray {
                    Stray::ToUs(_) => (EndReason::ToOurselves, &proxy.counters.to_ourselves),
                    Stray::NotCaptured | Stray::Unreadable(_) | Stray::NotRedirected(_) => {
                        (EndReason::NoOriginalDst, &proxy.counters.no_origin)
                    }
                };
                counter.add(1);
                proxy.counters.ended.of(reason).add(1);
                if proxy.lines.strays.admit() {
                    tracing::warn!(%reason, "reset a connection to the capture listener that {stray}");
                }
            }
            Err(e) => back_off(&e).await,
        }
    }
}

/// captured → tunnel or dial.
fn carry_captured(
    proxy: Rc<Proxy>,
    captured: Captured,
    name: Option<Arc<str>>,
    place: Place,
) -> impl Future<Output = ()> {
    // Apart: what it takes to reach a target is not held as long as the flow.
    let reached = Box::pin(reach_captured(Rc::clone(&proxy), captured, name));
    async move {
        if let Some((mut leg, going)) = reached.await {
            proxy.relay(&mut leg, going).await;
        }
        drop(place);
    }
}

/// The application's socket, and what the flow goes on with. One that does not go on is booked, and its socket dropped,
/// which resets the application's connection.
async fn reach_captured(
    proxy: Rc<Proxy>,
    captured: Captured,
    name: Option<Arc<str>>,
) -> Option<(TcpLeg, Box<Going>)> {
    let started = Instant::now();
    let Captured { stream, client, original_dst, bypass } = captured;
    let target = Target::from(original_dst);
    let mut record = Record::new(&target, client);
    let mut leg = TcpLeg::captured(stream, bypass);
    let reached = {
        let setup = proxy.setup();
        let wish = Wish {
            setup: &setup,
            flow: Flow {
                source: Source::Captured,
                name: name.as_deref(),
                target: &target,
                client,
                identity: None,
                peer: &NOBODY,
                server_name: None,
                request: None,
                inside: None,
            },
            permit: None,
            dial_timeout: setup.shared.dial_timeout,
        };
        let decision = proxy.route(&wish);
        if let Decision::Look = decision {
            // Apart, so that other flows take no more room for it.
            let looked = proxy.look_and_reach(&mut leg, Queue::default(), wish, record, started);
            let going = Box::pin(looked).await?;
            return Some((leg, going));
        }
        let ahead = Ahead::new(&mut leg, Queue::default());
        tokio::select! {
            biased;
            reached = proxy.reach(&wish, decision, &mut record, Some(&ahead)) => {
                Some(reached.map(|sink| (sink, ahead.into_early())))
            }
            _ = ahead.left() => None,
        }
    };
    match reached {
        Some(Ok((sink, early))) => return Some((leg, Box::new(Going { sink, early, record, started }))),
        Some(Err(refusal)) => proxy.refused(&refusal, record, None, started),
        None => proxy.left(record, started),
    }
    None
}
