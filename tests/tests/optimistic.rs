//! What an application sends first goes with the request, before its answer, over HTTP/2; and never anywhere where it
//! should not.
//!
//! What "one round trip" means is counted and not timed: the far end has the bytes before it has said a word.

use std::{net::SocketAddr, path::PathBuf, sync::mpsc, time::Duration};

use anyhow::{Context as _, Result, ensure};
use tokio::time::timeout;
use tunnel_tests::{
    NET4, PATIENCE, TARGET4, Target, World,
    daemon::Daemon,
    ends::{self, Way},
    envoy::{ENVOY_ID, Envoy},
    gateway,
    pattern::{DOWN, UP},
    peer,
    pki::{GATEWAY_ID, NODE_ID},
    script::{Script, Talk},
    target,
};

/// Where the first gateway is.
const FIRST: SocketAddr = SocketAddr::new(NET4, gateway::PORT);
/// And the next one.
const NEXT: SocketAddr = SocketAddr::new(NET4, gateway::PORT + 1);
/// What is asked for, of gateways that do as their script says.
const ASKED: &str = "10.200.0.10:80";
/// What goes ahead at most, for one flow.
const EARLY_MAX: usize = 64 * 1024;
/// How long nothing has to happen, where nothing may.
const A_WHILE: Duration = Duration::from_millis(300);
/// Error codes of RFC 9113 section 7.
const INTERNAL_ERROR: u32 = 2;
const REFUSED_STREAM: u32 = 7;
const CANCEL: u32 = 8;

/// An upstream of a configuration.
fn upstream(name: &str, at: SocketAddr, keys: &str) -> String {
    format!(
        "[[upstream]]\nname = \"{name}\"\nendpoints = [\"{at}\"]\nverify = [\"{GATEWAY_ID}\"]\n\
         response_timeout = \"20s\"\n{keys}\n"
    )
}

/// For `tunnel exec`: one worker, and one route, with these keys.
fn routed(world: &World, route: &str, upstreams: &str) -> Result<PathBuf> {
    let identity = world.pki().named("node").toml();
    world.file("agent.toml", format!("[daemon]\nworkers = 1\n{identity}[[route]]\n{route}\n{upstreams}"))
}

/// The same, with everything through one gateway. `keys` are more of the upstream.
fn agent(world: &World, keys: &str) -> Result<PathBuf> {
    routed(world, "to = [{ upstream = \"first\" }]", &upstream("first", FIRST, keys))
}

fn script<F, Fut>(world: &World, at: SocketAddr, play: F) -> Result<Script>
where
    F: Fn(usize, Talk) -> Fut + Send + 'static,
    Fut: Future<Output = Result<()>> + 'static,
{
    Script::start(world.net(), at, &world.pki().named("gateway"), play)
}

/// Has nothing come for a while, where something may not.
async fn quiet(talk: &mut Talk) -> Result<()> {
    match timeout(A_WHILE, talk.next()).await {
        Err(_) => Ok(()),
        Ok(frame) => anyhow::bail!("nothing should come, and this did: {frame:?}"),
    }
}

/// What a target says.
fn down(bytes: usize) -> Vec<u8> {
    let mut out = vec![0; bytes];
    DOWN.fill(0, &mut out);
    out
}

/// What the first half of `many ADDR 1 1000` sends, and waits for the echo of.
const HALF: usize = 500;

/// Answers when the first bytes have come, and echoes.
async fn answers_what_has_come(mut talk: Talk) -> Result<()> {
    let stream = talk.request().await?;
    talk.bytes(stream, 0, HALF).await?;
    talk.accept(stream).await?;
    talk.send(stream, &up(0, HALF), false).await?;
    talk.echo(stream).await?;
    talk.hold().await
}

fn up(from: usize, to: usize) -> Vec<u8> {
    let mut out = vec![0; to - from];
    UP.fill(from as u64, &mut out);
    out
}

/// The first bytes of an application reach the gateway before it has answered.
#[test]
fn what_an_application_sends_first_is_there_before_the_gateway_has_answered() -> Result<()> {
    let world = World::new()?;
    let gateway = script(&world, FIRST, |_, talk| answers_what_has_come(talk))?;
    let done = world.exec_with(&agent(&world, "")?).run_app(&["many", ASKED, "1", "1000"])?;
    assert!(done.success(), "{done}");
    gateway.played()?;
    let flow = &done.flows()?[0];
    assert_eq!((flow["sent"].as_u64(), flow["received"].as_u64()), (Some(1000), Some(1000)), "{flow}");
    Ok(())
}

/// Sniffed bytes are sent optimistically too.
#[test]
fn what_was_looked_at_goes_ahead_too() -> Result<()> {
    let world = World::new()?;
    let gateway = script(&world, FIRST, |_, talk| answers_what_has_come(talk))?;
    let route =
        "match = { sni = [\"somebody.else\"] }\nto = \"deny\"\n[[route]]\nto = [{ upstream = \"first\" }]";
    let agent = routed(&world, route, &upstream("first", FIRST, ""))?;
    let done = world.exec_with(&agent).run_app(&["many", ASKED, "1", "1000"])?;
    assert!(done.success(), "{done}");
    gateway.played()
}

/// Through a chain of two gateways the first bytes arrive before any answer.
#[test]
fn through_a_chain_of_two_the_first_bytes_are_there_before_anybody_has_answered() -> Result<()> {
    let world = World::new()?;
    let last = script(&world, NEXT, |_, talk| answers_what_has_come(talk))?;
    let config = format!(
        "[daemon]\nworkers = 1\n{}[[listener]]\naddress = \"{FIRST}\"\n[[route]]\nto = [{{ upstream = \"next\" }}]\n{}\
         [[policy]]\nidentity = [\"{NODE_ID}\"]\ntarget = [\"10.200.0.0/24\"]\n",
        world.pki().named("gateway").toml(),
        upstream("next", NEXT, ""),
    );
    let mut hop = Daemon::start(&world, world.net(), &config)?;
    let done = world.exec_with(&agent(&world, "")?).run_app(&["many", ASKED, "1", "1000"])?;
    assert!(done.success(), "{done}");
    // With its connections.
    hop.process().stop()?;
    last.played()
}

/// A target that speaks first is heard, and optimistic data adds nothing to the stream.
#[test]
fn a_target_that_speaks_first_is_heard_and_nothing_goes_ahead_of_what_was_not_sent() -> Result<()> {
    const BYTES: usize = 1000;
    let world = World::new()?;
    let gateway = script(&world, FIRST, async |_, mut talk| {
        let stream = talk.request().await?;
        quiet(&mut talk).await?;
        talk.accept(stream).await?;
        talk.send(stream, &down(BYTES), true).await?;
        talk.bytes(stream, 0, BYTES).await?;
        talk.end(stream).await
    })?;
    let words = ["hear-end-first", ASKED, &BYTES.to_string()];
    let done = world.exec_with(&agent(&world, "")?).run_app(&words)?;
    assert!(done.success(), "{done}");
    gateway.played()
}

/// A half-close before the answer follows the optimistic bytes.
#[test]
fn an_end_before_the_answer_goes_behind_the_bytes() -> Result<()> {
    let world = World::new()?;
    for bytes in [0, 1000] {
        let gateway = script(&world, FIRST, move |_, mut talk| async move {
            let stream = talk.request().await?;
            if !talk.bytes(stream, 0, bytes).await? {
                talk.end(stream).await?;
            }
            talk.accept(stream).await?;
            talk.send(stream, &down(bytes), true).await?;
            talk.hold().await
        })?;
        let words = ["half-close", ASKED, &bytes.to_string()];
        let done = world.exec_with(&agent(&world, "")?).run_app(&words)?;
        assert!(done.success(), "{bytes} bytes: {done}");
        assert!(done.flows()?[0]["reason"].as_str() == Some("closed"), "{:?}", done.flows()?);
        gateway.played()?;
    }
    Ok(())
}

/// Optimistic data is bounded, and the rest follows the answer.
#[test]
fn no_more_than_the_bound_goes_ahead_and_the_rest_follows_the_answer() -> Result<()> {
    const BYTES: usize = 300_000;
    let world = World::new()?;
    let gateway = script(&world, FIRST, async |_, mut talk| {
        let stream = talk.request().await?;
        talk.bytes(stream, 0, EARLY_MAX).await?;
        quiet(&mut talk).await?;
        talk.accept(stream).await?;
        if !talk.bytes(stream, EARLY_MAX, BYTES).await? {
            talk.end(stream).await?;
        }
        talk.send(stream, &[], true).await
    })?;
    let words = ["write", ASKED, &BYTES.to_string()];
    let done = world.exec_with(&agent(&world, "")?).run_app(&words)?;
    assert!(done.success(), "{done}");
    gateway.played()?;
    assert_eq!(done.flows()?[0]["sent"].as_u64(), Some(BYTES as u64), "{:?}", done.flows()?);
    Ok(())
}

/// A request that the peer did not process is retried with its optimistic data.
#[test]
fn a_request_that_was_not_acted_on_is_sent_again_with_what_went_ahead_of_it() -> Result<()> {
    let world = World::new()?;
    let gateway = script(&world, FIRST, async |number, mut talk| {
        if number > 1 {
            return answers_what_has_come(talk).await;
        }
        let refused = talk.request().await?;
        talk.bytes(refused, 0, HALF).await?;
        talk.cut(refused, REFUSED_STREAM).await?;
        let again = talk.request().await?;
        ensure!(again > refused, "stream {again} after {refused}");
        talk.bytes(again, 0, HALF).await?;
        talk.leave(refused).await?;
        talk.hold().await
    })?;
    let done = world.exec_with(&agent(&world, "")?).run_app(&["many", ASKED, "1", "1000"])?;
    assert!(done.success(), "{done}");
    gateway.played()?;
    gateway.played()?;
    let flow = &done.flows()?[0];
    assert_eq!(flow["sent"].as_u64(), Some(1000), "once: {flow}");
    Ok(())
}

/// A retried request repeats a half-close that was sent optimistically.
#[test]
fn an_end_that_went_ahead_goes_again_too() -> Result<()> {
    let world = World::new()?;
    let gateway = script(&world, FIRST, async |_, mut talk| {
        let refused = talk.request().await?;
        talk.bytes(refused, 0, HALF).await?;
        talk.end(refused).await?;
        talk.cut(refused, REFUSED_STREAM).await?;
        let again = talk.request().await?;
        if !talk.bytes(again, 0, HALF).await? {
            talk.end(again).await?;
        }
        talk.accept(again).await?;
        talk.send(again, &down(HALF), true).await?;
        talk.hold().await
    })?;
    let words = ["half-close", ASKED, &HALF.to_string()];
    let done = world.exec_with(&agent(&world, "")?).run_app(&words)?;
    assert!(done.success(), "{done}");
    gateway.played()
}

/// With `retries` the next upstream gets the optimistic data.
#[test]
fn where_a_route_tries_again_the_other_upstream_gets_what_went_ahead() -> Result<()> {
    let world = World::new()?;
    let refusing = script(&world, FIRST, async |_, mut talk| {
        let stream = talk.request().await?;
        talk.bytes(stream, 0, HALF).await?;
        talk.refuse(stream, "503").await?;
        assert_eq!(talk.reset(stream).await?, CANCEL);
        talk.hold().await
    })?;
    let standby = script(&world, NEXT, |_, talk| answers_what_has_come(talk))?;
    let route =
        "retries = 1\nto = [{ upstream = \"first\", weight = 10000 }, { upstream = \"next\", weight = 1 }]";
    let upstreams = upstream("first", FIRST, "") + &upstream("next", NEXT, "");
    let agent = routed(&world, route, &upstreams)?;
    let done = world.exec_with(&agent).run_app(&["many", ASKED, "1", "1000"])?;
    assert!(done.success(), "{done}");
    refusing.played()?;
    standby.played()
}

/// Optimistic data of a refused request reaches nobody, and the application is reset.
#[test]
fn what_went_ahead_of_a_refusal_reaches_nobody_and_resets_the_application() -> Result<()> {
    let world = World::new()?;
    let gateway = script(&world, FIRST, async |_, mut talk| {
        let stream = talk.request().await?;
        talk.bytes(stream, 0, 1000).await?;
        talk.refuse(stream, "403").await?;
        assert_eq!(talk.reset(stream).await?, CANCEL);
        talk.hold().await
    })?;
    let exec = world.exec_with(&agent(&world, "")?);
    let refused = |target: &str, status: &str| {
        let done = exec.run_app(&["expect-reset", target, "1000"])?;
        assert_eq!((done.value("connect")?, done.value("ended")?), ("ok", "ECONNRESET"), "{done}");
        assert_eq!(done.value("received")?, "0", "{done}");
        let flow = &done.flows()?[0];
        assert!(flow["detail"].as_str().is_some_and(|d| d.contains(status)), "{flow}");
        assert_eq!(flow["sent"].as_u64(), Some(0), "{flow}");
        assert!(done.stderr.contains(status), "it is in the log: {done}");
        anyhow::Ok(())
    };
    refused(ASKED, "403")?;
    gateway.played()?;
    drop(gateway);
    // A gateway of ours: policy says no; nobody is there.
    let target = world.serve(TARGET4, target::echo())?;
    let (denied, gone) = (target.addr(), world.serve(TARGET4, target::echo())?.addr());
    let _ours = world.gateway().allow_only(&[&gone.to_string()]).start()?;
    refused(&denied.to_string(), "403")?;
    refused(&gone.to_string(), "502")?;
    assert_eq!(target.peers(), []);
    Ok(())
}

/// What an application sent before it reset its connection was acknowledged to it: it reaches the target, and then the
/// reset does, although the target had not answered by then.
#[test]
fn what_an_application_sent_before_it_reset_reaches_a_target_that_answers_later() -> Result<()> {
    let world = World::new()?;
    // No more than our socket holds beside it: what that has not acknowledged is gone with the reset.
    for bytes in [1000, 80_000] {
        let (tell, told) = mpsc::channel();
        let (go_on, goes_on) = mpsc::channel();
        let goes_on = std::sync::Arc::new(std::sync::Mutex::new(goes_on));
        let gateway = script(&world, FIRST, move |_, mut talk| {
            let (tell, goes_on) = (tell.clone(), std::sync::Arc::clone(&goes_on));
            async move {
                let stream = talk.request().await?;
                talk.bytes(stream, 0, bytes.min(EARLY_MAX)).await?;
                tell.send(())?;
                // The application has reset its connection by then.
                tokio::task::spawn_blocking(move || {
                    goes_on.lock().unwrap_or_else(std::sync::PoisonError::into_inner).recv_timeout(PATIENCE)
                })
                .await??;
                talk.accept(stream).await?;
                if bytes > EARLY_MAX {
                    talk.bytes(stream, EARLY_MAX, bytes).await?;
                }
                assert_eq!(talk.reset(stream).await?, CANCEL);
                talk.hold().await
            }
        })?;
        let mut app = world.exec_with(&agent(&world, "")?).spawn_app(&[
            "reset-unanswered",
            ASKED,
            &bytes.to_string(),
        ])?;
        told.recv_timeout(PATIENCE)?;
        app.says("sent=1")?;
        app.tell("reset")?;
        app.says("reset=1")?;
        go_on.send(())?;
        let done = app.finish()?;
        assert!(done.success(), "{done}");
        gateway.played()?;
        assert_eq!(done.flows()?[0]["reason"], "client_reset", "{bytes} bytes");
    }
    Ok(())
}

/// A gateway that resets before its answer resets the application, without a retry.
#[test]
fn a_gateway_that_resets_before_its_answer_resets_the_application_and_is_not_asked_again() -> Result<()> {
    let world = World::new()?;
    let gateway = script(&world, FIRST, async |_, mut talk| {
        let stream = talk.request().await?;
        talk.bytes(stream, 0, 1000).await?;
        talk.cut(stream, INTERNAL_ERROR).await?;
        talk.hold().await
    })?;
    let done = world.exec_with(&agent(&world, "")?).run_app(&["expect-reset", ASKED, "1000"])?;
    assert_eq!((done.value("ended")?, done.value("received")?), ("ECONNRESET", "0"), "{done}");
    gateway.played()?;
    let flow = &done.flows()?[0];
    assert!(flow["reason"] == "upstream_lost", "{flow}");
    Ok(())
}

/// With `optimistic_data = false` nothing is sent before the answer.
#[test]
fn where_it_is_switched_off_nothing_goes_ahead() -> Result<()> {
    let world = World::new()?;
    let gateway = script(&world, FIRST, async |_, mut talk| {
        let stream = talk.request().await?;
        quiet(&mut talk).await?;
        talk.accept(stream).await?;
        talk.echo(stream).await?;
        talk.hold().await
    })?;
    let agent = agent(&world, "optimistic_data = false")?;
    let done = world.exec_with(&agent).run_app(&["many", ASKED, "1", "1000"])?;
    assert!(done.success(), "{done}");
    gateway.played()
}

/// Over HTTP/1 nothing is sent before the answer.
#[test]
fn over_http_1_nothing_goes_ahead() -> Result<()> {
    let world = World::new()?;
    let proxy = Target::start(world.net(), FIRST, target::late_proxy(A_WHILE, 1000))?;
    let config = format!(
        "[daemon]\nworkers = 1\n[[route]]\nto = [{{ upstream = \"proxy\" }}]\n[[upstream]]\nname = \"proxy\"\n\
         endpoints = [\"{FIRST}\"]\nprotocol = \"h1\"\ntls = false\n"
    );
    let agent = world.file("agent.toml", config)?;
    let done = world.exec_with(&agent).run_app(&["duplex", ASKED, "1000"])?;
    assert_eq!(proxy.outcomes(1)?, [Ok(())]);
    assert!(done.success(), "{done}");
    Ok(())
}

/// Envoy accepts optimistic data, and answers 503 where the target is down.
#[test]
fn envoy_takes_what_goes_ahead_and_says_503_where_nobody_is() -> Result<()> {
    let world = World::new()?;
    let _envoy = Envoy::start(&world, world.net(), "gateway.yaml", &[FIRST.port(), 3128], &[])?;
    let keys = format!("verify = [\"{ENVOY_ID}\"]");
    let config = upstream("first", FIRST, "").replace(&format!("verify = [\"{GATEWAY_ID}\"]"), &keys);
    let agent = routed(&world, "to = [{ upstream = \"first\" }]", &config)?;
    let exec = world.exec_with(&agent);
    let way = Way::Captured(&world, &exec);
    ends::bytes_arrive(way, 300_000)?;
    ends::its_end_is_heard_and_answered(way)?;
    ends::the_targets_end_is_heard(way)?;
    let gone = world.serve(TARGET4, target::echo())?.addr().to_string();
    for bytes in ["1000", "300000"] {
        let done = exec.run_app(&["expect-reset", &gone, bytes])?;
        assert_eq!((done.value("ended")?, done.value("received")?), ("ECONNRESET", "0"), "{done}");
        let flow = &done.flows()?[0];
        assert!(flow["detail"].as_str().is_some_and(|d| d.contains("503")), "{flow}");
    }
    Ok(())
}

/// More than h2 takes on one connection for streams that it has forgotten.
const REFUSALS: usize = 400;

/// Data behind refused requests takes no window of the connection.
#[test]
fn what_comes_behind_refusals_costs_a_connection_nothing() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let denied = format!("{TARGET4}:{}", target.addr().port() - 1);
    let (addr, config, allowed) =
        (gateway.addr(), peer::tls(&world.pki().named("node"))?, target.addr().to_string());
    world.node().block_on(|| async move {
        let (mut requests, connection) = peer::connect(addr, config).await?;
        let _driving = tokio::task::spawn_local(connection);
        let (response, mut other) = requests.send_request(peer::connect_request(&allowed)?, false)?;
        let mut body = timeout(PATIENCE, response).await.context("no answer")??.into_body();
        for n in 0..REFUSALS {
            requests = requests.ready().await?;
            let (response, mut send) = requests.send_request(peer::connect_request(&denied)?, false)?;
            let response = timeout(PATIENCE, response).await.context("no answer")??;
            assert_eq!(response.status().as_u16(), 502);
            // It was on its way.
            send.send_data("late".into(), false).with_context(|| format!("stream {n}"))?;
            send.send_data("later".into(), true).with_context(|| format!("stream {n}"))?;
        }
        other.send_data("still here".into(), true)?;
        let mut echoed = Vec::new();
        while let Some(chunk) = timeout(PATIENCE, body.data()).await.context("no echo")? {
            echoed.extend_from_slice(&chunk?);
        }
        assert_eq!(echoed, b"still here");
        anyhow::Ok(())
    })
}
