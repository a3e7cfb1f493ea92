//! Traces, at a collector whose messages are OpenTelemetry's own.

use std::{net::SocketAddr, path::Path, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result};
use serde_json::Value;
use tunnel_tests::{
    PATIENCE, Process, TARGET4, World,
    daemon::Daemon,
    gateway,
    hop::Hop,
    netns::NetNs,
    peer::{ask, connect_request},
    pki::{GATEWAY_ID, NODE_ID},
    programs, target, wait_for,
    world::{NET4, NODE4},
};

/// A collector on a host.
struct Collector {
    process: Process,
    addr: SocketAddr,
}

impl Collector {
    fn start(world: &World, host: &NetNs, addr: SocketAddr) -> Result<Self> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("providers/collector.py");
        let mut command = host.command(programs::collector()?);
        command.arg(script).arg(addr.to_string());
        let mut process = Process::spawn_with_input("collector", world.folder(), command)?;
        let line = process.wait_for_line("listening=")?;
        let addr = line.trim_start_matches("listening=").parse()?;
        Ok(Self { process, addr })
    }

    /// What it has been sent.
    fn spans(&self) -> Result<Vec<Value>> {
        let out = self.process.stdout();
        let whole = out.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        let spans = whole.filter_map(|line| line.strip_prefix("span="));
        spans.map(|span| serde_json::from_str(span).with_context(|| span.to_owned())).collect()
    }

    /// The same, once there are so many.
    fn wait(&self, many: usize) -> Result<Vec<Value>> {
        wait_for(&format!("{many} spans"), PATIENCE, || self.spans().ok().filter(|spans| spans.len() >= many))
            .with_context(|| format!("{}", self.process))
    }

    fn section(&self, more: &str) -> String {
        format!("[traces]\nendpoint = \"http://{}\"\n{more}\n", self.addr)
    }
}

/// The one span of this name.
fn named<'a>(spans: &'a [Value], name: &str) -> Result<&'a Value> {
    let mut found = spans.iter().filter(|span| span["name"] == name);
    let one = found.next().with_context(|| format!("no {name}: {spans:#?}"))?;
    assert!(found.next().is_none(), "more than one {name}: {spans:#?}");
    Ok(one)
}

fn agent(world: &World, traces: &str) -> Result<PathBuf> {
    let identity = world.pki().named("node").toml();
    world.file(
        "agent.toml",
        format!(
            "{identity}{traces}[[route]]\nname = \"mesh\"\nto = [{{ upstream = \"gateway\" }}]\n\
             [[upstream]]\nname = \"gateway\"\nendpoints = [\"{NET4}:{}\"]\nverify = [\"{GATEWAY_ID}\"]\n",
            gateway::PORT
        ),
    )
}

fn gateway_with(world: &World, sections: &str, route: &str) -> Result<Daemon> {
    let identity = world.pki().named("gateway").toml();
    let config = format!(
        "{identity}{sections}[[listener]]\naddress = \"{NET4}:{}\"\n{route}\n\
         [[policy]]\nidentity = \"any\"\ntarget = [\"10.200.0.0/24\"]\n",
        gateway::PORT
    );
    Daemon::start(world, world.net(), &config)
}

/// A captured flow is one trace through both ends of the tunnel: its spans are nested, within each other's times, and say who and
/// where to.
#[test]
fn a_flow_is_one_trace_from_its_capture_to_the_dial_at_the_gateway() -> Result<()> {
    let world = World::new()?;
    let near = Collector::start(&world, world.node(), SocketAddr::new(NODE4, 0))?;
    let far = Collector::start(&world, world.net(), SocketAddr::new(NET4, 0))?;
    let mut gateway = gateway_with(&world, &far.section(""), "[[route]]\nto = \"direct\"")?;
    let target = world.serve(TARGET4, target::name_the_peer())?;
    let more = "service_name = \"agent\"\nheaders = { x-key = \"s3cret\" }";
    let done = world
        .exec_with(&agent(&world, &near.section(more))?)
        .run_app(&["names", &target.addr().to_string()])?;
    assert!(done.success(), "{done}");
    gateway.process().stop()?;

    let (near, far) = (near.wait(6)?, far.wait(3)?);
    assert_eq!((near.len(), far.len()), (6, 3), "{near:#?} {far:#?}");
    let root = named(&near, "capture")?;
    for span in near.iter().chain(&far) {
        assert_eq!((&span["trace"], &span["scope"]), (&root["trace"], &"tunnel".into()), "{span:#}");
        assert!(span["start"].as_u64() <= span["end"].as_u64(), "{span:#}");
        assert_eq!(span["status"], "STATUS_CODE_UNSET", "{span:#}");
    }
    assert_eq!((&root["parent"], &root["kind"]), (&"".into(), &"SPAN_KIND_SERVER".into()));
    assert_eq!((&root["path"], &root["key"]), (&"/v1/traces".into(), &"s3cret".into()));
    assert_eq!(root["resource"]["service.name"], "agent");
    assert_eq!(root["attributes"]["tunnel.destination"], target.addr().to_string());
    assert_eq!(root["attributes"]["tunnel.end_reason"], "closed");
    let connect = named(&near, "connect")?;
    assert_eq!(connect["attributes"]["tunnel.upstream.identity"], GATEWAY_ID);
    assert_eq!(connect["attributes"]["server.port"], gateway::PORT);
    assert_eq!(named(&near, "route")?["attributes"]["tunnel.route.name"], "mesh");
    let listener = named(&far, "listener")?;
    assert_eq!(listener["attributes"]["tunnel.client.identity"], NODE_ID);
    let dial = named(&far, "dial")?;
    assert_eq!(dial["attributes"]["server.port"], target.addr().port());
    for (child, parent) in [
        (connect, root),
        (named(&near, "route")?, root),
        (named(&near, "queue")?, connect),
        (named(&near, "dial")?, connect),
        (named(&near, "handshake")?, connect),
        (listener, connect),
        (named(&far, "route")?, listener),
        (dial, listener),
    ] {
        assert_eq!(child["parent"], parent["id"], "{child:#} {parent:#}");
        // A microsecond for the two clocks, each of which is read for one span at a time.
        let within = child["start"].as_u64() >= parent["start"].as_u64().map(|n| n - 1_000_000);
        assert!(within, "{child:#} {parent:#}");
    }
    Ok(())
}

/// A trace that a peer has begun is sampled if the peer says so, whatever is configured, and passed on as it came; one that
/// begins here is passed on as not sampled where nothing is.
#[test]
fn the_parents_sampled_flag_decides_and_is_passed_on() -> Result<()> {
    let world = World::new()?;
    let collector = Collector::start(&world, world.net(), SocketAddr::new(NET4, 0))?;
    let next = SocketAddr::new(NET4, gateway::PORT + 1);
    let hop = Hop::start(world.net(), next, &world.pki().named("gateway"))?;
    let route = format!(
        "[[route]]\nto = [{{ upstream = \"next\" }}]\n\
         [[upstream]]\nname = \"next\"\nendpoints = [\"{next}\"]\nverify = [\"{GATEWAY_ID}\"]"
    );
    let mut gateway = gateway_with(&world, &collector.section("sample = 0.0"), &route)?;
    let at = SocketAddr::new(NET4, gateway::PORT);
    let id = "0af7651916cd43dd8448eb211c80319c";
    let mut passed_on = Vec::new();
    for parent in
        [Some(format!("00-{id}-b7ad6b7169203331-01")), Some(format!("00-{id}-b7ad6b7169203331-00")), None]
    {
        let mut request = connect_request("10.200.0.10:80")?;
        if let Some(parent) = parent {
            request.headers_mut().insert("traceparent", parent.parse()?);
        }
        ask(world.node(), at, &world.pki().named("node"), request)?;
        let asked = hop.asked();
        let last = asked.last().context("nothing was asked")?;
        passed_on.push(last.headers()["traceparent"].to_str()?.to_owned());
    }
    gateway.process().stop()?;
    let spans = collector.wait(4)?;
    let connect = named(&spans, "connect")?;
    assert_eq!(passed_on[0], format!("00-{id}-{}-01", connect["id"].as_str().context("no id")?));
    assert!(passed_on[1].starts_with(&format!("00-{id}-")) && passed_on[1].ends_with("-00"), "{passed_on:?}");
    assert!(!passed_on[2].contains(id) && passed_on[2].ends_with("-00"), "{passed_on:?}");
    assert!(spans.iter().all(|span| span["trace"] == id), "{spans:#?}");
    assert_eq!(named(&spans, "listener")?["parent"], "b7ad6b7169203331");
    Ok(())
}

/// The spans of a flow that fails say so, with the reason of its end.
#[test]
fn a_flow_that_fails_has_spans_with_the_reason() -> Result<()> {
    let world = World::new()?;
    let collector = Collector::start(&world, world.net(), SocketAddr::new(NET4, 0))?;
    let mut gateway = gateway_with(&world, &collector.section(""), "[[route]]\nto = \"direct\"")?;
    let at = SocketAddr::new(NET4, gateway::PORT);
    let answer = ask(world.node(), at, &world.pki().named("node"), connect_request("10.200.0.10:1")?)?;
    assert_eq!(answer.status, 502);
    gateway.process().stop()?;
    let spans = collector.wait(3)?;
    for name in ["listener", "connect", "dial"] {
        let Some(span) = spans.iter().find(|span| span["name"] == name) else { continue };
        assert_eq!(span["status"], "STATUS_CODE_ERROR", "{span:#}");
        assert_eq!(span["attributes"]["error.type"], "target_refused", "{span:#}");
        assert!(span["message"].as_str().is_some_and(|message| message.contains("refused")), "{span:#}");
    }
    named(&spans, "dial")?;
    Ok(())
}

/// While the collector is away, or does not want them, flows go on as without it; spans that nobody took are counted, and those
/// that waited a short time are sent.
#[test]
fn a_collector_that_is_away_costs_spans_and_no_flow() -> Result<()> {
    let world = World::new()?;
    let at = SocketAddr::new(NET4, 4318);
    let target = world.serve(TARGET4, target::echo())?;
    let nowhere = format!("[traces]\nendpoint = \"http://{at}\"\ntimeout = \"1s\"\n");
    let mut gateway = gateway_with(&world, &nowhere, "[[route]]\nto = \"direct\"")?;
    let exec = world.exec_with(&agent(&world, "")?).limit(Duration::from_secs(60));
    // Three spans each, and more of them than the queue holds.
    let done = exec.run_app(&["many-short", &target.addr().to_string(), "2000", "write"])?;
    assert!(done.success() && done.to_string().contains("ok"), "{done}");
    gateway.process().wait_for_line("spans dropped")?;
    let mut collector = Collector::start(&world, world.net(), at)?;
    collector.wait(512)?;
    collector.process.tell("400")?;
    collector.process.wait_for_line("status=400")?;
    // The collector shows those, too, that it has refused.
    let mut log = String::new();
    let dropped = gateway.stop_and_count("spans_dropped")?;
    log.push_str(&gateway.log());
    let exported = log.split_once("(\"spans_exported\", ").and_then(|(_, n)| n.split_once(')'));
    let exported: u64 = exported.with_context(|| log.clone())?.0.parse()?;
    assert!(exported >= 512 && exported + dropped == 6000, "{exported} + {dropped}: {log}");
    Ok(())
}
