//! What the configuration denies by address and port alone fails in connect(), and nothing of it leaves the node.
//!
//! The targets here can be reached from the node by itself: what escapes shows itself.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::Result;
use tunnel_tests::{
    Gateway, NET4, NET6, NODE4, PATIENCE, TARGET4, Target, World, daemon::through, dialogue::ask, node::Node,
    pki::GATEWAY_ID, process, servers, target,
};

/// curl tries the other family after 200 ms (`--happy-eyeballs-timeout-ms`), and at once when the first fails.
const AT_ONCE: Duration = Duration::from_millis(150);

/// A route that denies these.
fn deny(destinations: &[String]) -> String {
    format!("[[route]]\nmatch = {{ destination = {destinations:?} }}\nto = \"deny\"\n")
}

/// Routes in front of the one that takes everything.
fn with_routes(node: &Node<'_>, gateway: &Gateway<'_>, capture: &str, routes: &str) -> String {
    node.config(gateway, "", capture).replacen("[[route]]", &format!("{routes}[[route]]"), 1)
}

fn mapped(addr: SocketAddr) -> SocketAddr {
    match addr.ip() {
        IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), addr.port()),
        IpAddr::V6(_) => addr,
    }
}

/// A `deny` route fails connect() with ECONNREFUSED, for either family and for v4-mapped addresses, blocking or not;
/// what it does not name is carried, and each denial is counted.
///
/// Failure: refused.
#[test]
fn what_a_route_denies_by_address_and_port_fails_in_connect_over_ipv4_ipv6_and_v4_mapped() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().allow("10.77.0.0/30").start()?;
    let (four, six) = (world.serve(NET4, target::echo())?, world.serve(NET6, target::echo())?);
    let other = world.serve(NET4, target::echo())?;
    let node = Node::new(&world)?;
    for open in [&four, &six] {
        assert_eq!(node.connect_error(open)?, "ok", "nothing is captured yet");
    }
    let denied = [format!("{NET4}:{}", four.addr().port()), format!("[{NET6}]:{}", six.addr().port())];
    let mut daemon = node.daemon(&with_routes(&node, &gateway, "", &deny(&denied)))?;
    for addr in [four.addr(), six.addr(), mapped(four.addr())] {
        assert_eq!(node.connect_error_of(addr)?, "ECONNREFUSED", "{addr}");
    }
    let mut app = node.app(&["nonblocking", &four.addr().to_string(), "1"])?;
    assert_eq!(app.wait_for_line("connect=")?, "connect=Err(ECONNREFUSED)", "and never EINPROGRESS");
    app.wait(PATIENCE)?;
    node.hold(&other)?;
    assert_eq!((four.peers().len(), six.peers().len()), (1, 1), "from before");
    let accepted = gateway.log().matches("tunnel accepted").count();
    assert_eq!(accepted, 1, "the one that is not denied: {}", gateway.log());
    // The last of them asked twice.
    assert_eq!(daemon.stop_and_count("denied_by_route")?, 5);
    assert!(daemon.log().contains("denied by a route"), "{}", daemon.log());
    Ok(())
}

/// What no route takes is denied, as it was, and fails in connect() too; a route of another capture, or of listeners,
/// does not take it.
///
/// Failure: refused.
#[test]
fn what_no_route_takes_fails_in_connect() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().allow("10.77.0.0/30").start()?;
    let (near, far) = (world.serve(NET4, target::echo())?, world.serve(TARGET4, target::echo())?);
    let node = Node::new(&world)?;
    let every = "[[route]]\nto =";
    let narrow = format!(
        "[[route]]\nmatch = {{ source = [\"listener\"] }}\nto = \"direct\"\n\
         [[route]]\nmatch = {{ identity = [\"spiffe://test.tunnel/*\"] }}\nto = \"direct\"\n\
         [[route]]\nmatch = {{ host = [\"*.internal\"] }}\nto = \"direct\"\n\
         [[route]]\nmatch = {{ destination = [\"{TARGET4}\"] }}\nto ="
    );
    let mut daemon = node.daemon(&node.config(&gateway, "", "").replacen(every, &narrow, 1))?;
    assert_eq!(node.connect_error(&near)?, "ECONNREFUSED");
    node.hold(&far)?;
    assert_eq!(near.peers(), []);
    assert_eq!(daemon.stop_and_count("denied_by_route")?, 1);
    Ok(())
}

/// `refuse` fails connect() with ENETUNREACH, whatever the routes say; include and exclude of longer prefixes hold.
///
/// Failure: refused.
#[test]
fn what_a_capture_refuses_is_unreachable() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().allow("10.77.0.0/30").allow("fd77::/64").start()?;
    let six = world.serve(NET6, target::echo())?;
    let (taken, alone, four) = (
        world.serve(NET6, target::echo())?,
        world.serve(NET6, target::echo())?,
        world.serve(NET4, target::echo())?,
    );
    let node = Node::new(&world)?;
    let capture = format!(
        "include = [\"0.0.0.0/0\", \"::/0\", \"[{NET6}]:{}\"]\nrefuse = [\"::/0\"]\nexclude = [\"[{NET6}]:{}\"]",
        taken.addr().port(),
        alone.addr().port()
    );
    let mut daemon = node.daemon(&node.config(&gateway, "", &capture))?;
    assert_eq!(node.connect_error(&six)?, "ENETUNREACH");
    assert_eq!(six.peers(), []);
    for (target, through) in [(&taken, true), (&alone, false), (&four, true)] {
        node.hold(target)?;
        let by_gateway = [NET4, NET6].contains(&target.peers()[0].ip());
        assert_eq!(by_gateway, through, "{target:?}");
    }
    assert_eq!(daemon.stop_and_count("refused_by_rule")?, 1);
    Ok(())
}

/// `tunnel exec --refuse` fails connect() with ENETUNREACH.
///
/// Failure: refused.
#[test]
fn what_exec_is_told_to_refuse_is_unreachable() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().allow("10.77.0.0/30").start()?;
    let (six, four) =
        (world.serve(NET6, target::name_the_peer())?, world.serve(NET4, target::name_the_peer())?);
    let exec = world.exec(&gateway).flag("--refuse", "::/0");
    let done = exec.run_app(&["connect-error", &six.addr().to_string()])?;
    assert_eq!((done.value("connect")?, done.flows()?.len()), ("ENETUNREACH", 0), "{done}");
    let done = exec.run_app(&["names", &four.addr().to_string()])?;
    assert_eq!(done.value("seen")?.parse::<SocketAddr>()?.ip(), NET4, "{done}");
    assert_eq!(six.peers(), []);
    Ok(())
}

/// A client that knows an IPv6 and an IPv4 address falls back to IPv4 at once, where IPv6 is refused or denied; it does
/// not where the connection is taken first and reset then.
///
/// Failure: refused.
#[test]
fn curl_falls_back_from_ipv6_to_ipv4_where_ipv6_is_refused_or_denied() -> Result<()> {
    let world = World::new()?;
    // It dials IPv4 only.
    let gateway = world.gateway().allow_only(&["10.200.0.0/24"]).start()?;
    let files = world.folder().join("www");
    fs::create_dir(&files)?;
    fs::write(files.join("page"), "the page")?;
    let server = servers::http(&world, &files)?;
    let port = server.addr().port();
    let node = Node::new(&world)?;
    let curl = || -> Result<(String, Duration)> {
        let mut command = world.node().command("curl");
        let resolve = format!("both.test:{port}:[2001:db8::1],{TARGET4}");
        command.args(["-sS", "--fail", "--max-time", "20", "--noproxy", "*", "--resolve", &resolve]);
        command.args(["-w", "\n%{time_connect}", &format!("http://both.test:{port}/page")]);
        node.cgroup.adopt(&mut command)?;
        let said = process::output(&mut command)?;
        let (page, connected) = said.trim_end().rsplit_once('\n').unwrap_or((&said, "0"));
        Ok((page.to_owned(), Duration::from_secs_f64(connected.parse()?)))
    };
    let mut daemon = node.daemon(&node.config(&gateway, "", ""))?;
    let reset = curl().expect_err("IPv6 is taken, and the gateway says no").to_string();
    assert!(reset.contains("curl: (56)") || reset.contains("curl: (52)"), "{reset}");
    let refusing = node.config(&gateway, "", "refuse = [\"::/0\"]");
    let denying = with_routes(&node, &gateway, "", &deny(&["::/0".to_owned()]));
    for config in [refusing, denying] {
        daemon.tell(&config)?;
        let (page, connected) = curl()?;
        assert_eq!(page, "the page");
        assert!(connected < AT_ONCE, "it waited for IPv6: {connected:?}");
    }
    assert_eq!(daemon.stop_and_count("refused_by_rule")?, 1);
    Ok(())
}

/// A route that has to look at what a connection says first keeps its flows, although a later one denies all: what it
/// does not take is connected, then reset.
///
/// Failure: refused.
#[test]
fn a_route_that_looks_inside_before_a_deny_still_gets_its_flows() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let files = world.folder().join("www");
    fs::create_dir(&files)?;
    fs::write(files.join("page"), "the page")?;
    let server = servers::http(&world, &files)?;
    let far = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let addr = server.addr();
    let routes = format!(
        "[[route]]\nmatch = {{ http_host = [\"web.test\"], destination = [\"{addr}\"] }}\n\
         to = [{{ upstream = \"gateway\" }}]\n[[route]]\nto = \"deny\"\n"
    );
    let _daemon = node.daemon(&with_routes(&node, &gateway, "", &routes))?;
    let page = |name: &str| {
        let mut command = world.node().command("curl");
        let host = format!("Host: {name}");
        command.args(["-sS", "--fail", "--max-time", "20", "-H", &host, &format!("http://{addr}/page")]);
        node.cgroup.adopt(&mut command)?;
        process::output(&mut command)
    };
    assert_eq!(page("web.test")?, "the page");
    let reset = page("other.test").expect_err("the routes deny it").to_string();
    assert!(reset.contains("curl: (56)") || reset.contains("curl: (52)"), "{reset}");
    assert_eq!(node.connect_error(&far)?, "ECONNREFUSED", "no route looks inside of that");
    Ok(())
}

/// A reload that adds or removes a denial holds for the next connect(); a route ends what it now denies, and what a capture
/// now refuses goes on.
///
/// Failure: refused.
#[test]
fn a_denial_that_a_reload_adds_or_removes_holds_for_the_next_connect() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().allow("10.77.0.0/30").start()?;
    let target = world.serve(NET4, target::echo())?;
    let node = Node::new(&world)?;
    let open = node.config(&gateway, "", "");
    let denying = with_routes(&node, &gateway, "", &deny(&[format!("{NET4}:{}", target.addr().port())]));
    let refusing = node.config(&gateway, "", &format!("refuse = [\"{NET4}\"]"));
    let mut daemon = node.daemon(&open)?;
    for (config, error, pings) in [(&denying, "ECONNREFUSED", "ECONNRESET"), (&refusing, "ENETUNREACH", "ok")]
    {
        let mut held = node.hold(&target)?;
        daemon.tell(config)?;
        assert_eq!(node.connect_error(&target)?, error);
        assert_eq!(ask(&mut held, "ping")?, pings);
        if pings == "ok" {
            held.hang_up();
            held.wait(PATIENCE)?;
        }
        daemon.tell(&open)?;
        node.hold(&target)?;
    }
    let answers = daemon.answers();
    let replaced =
        |answer: &String| answer.contains("reloaded configuration") && answer.contains("captures=1");
    assert!(answers.len() == 4 && answers.iter().all(replaced), "{answers:?}");
    // Routes that mean nothing to the kernel replace nothing there.
    let web = "[[route]]\nmatch = { destination = [\"10.200.0.0/24\"] }\nto = [{ upstream = \"gateway\" }]\n";
    daemon.tell(&with_routes(&node, &gateway, "", web))?;
    assert!(daemon.answers()[4].contains("captures=0"), "{:?}", daemon.answers());
    assert!(target.peers().iter().all(|peer| peer.ip() == NET4), "{:?}", target.peers());
    assert_eq!(daemon.stop_and_count("denied_by_route")?, 1, "what programs have counted that are gone");
    Ok(())
}

/// While no daemon runs, what is denied or refused fails as before: also where the rest goes out in plaintext.
///
/// Failure: refused.
#[test]
fn what_is_denied_or_refused_stays_so_when_the_daemon_is_killed_whatever_on_failure_says() -> Result<()> {
    for (on_failure, other) in [("open", "ok"), ("closed", "ECONNREFUSED")] {
        let world = World::new()?;
        let gateway = world.gateway().start()?;
        let (denied, refused) = (world.serve(NET4, target::echo())?, world.serve(NET6, target::echo())?);
        let rest = world.serve(NET4, target::echo())?;
        let node = Node::new(&world)?;
        let capture = format!("on_failure = \"{on_failure}\"\nrefuse = [\"::/0\"]");
        let routes = deny(&[format!("{NET4}:{}", denied.addr().port())]);
        let mut daemon = node.daemon(&with_routes(&node, &gateway, &capture, &routes))?;
        daemon.process().kill()?;
        assert_eq!(node.connect_error(&rest)?, other, "{on_failure}");
        assert_eq!(node.connect_error(&denied)?, "ECONNREFUSED", "{on_failure}");
        assert_eq!(node.connect_error(&refused)?, "ENETUNREACH", "{on_failure}");
        assert_eq!((denied.peers(), refused.peers()), (vec![], vec![]), "{on_failure}");
    }
    Ok(())
}

/// More denials than a rule of the kernel's holds are no mistake: the daemon resets, and says that it does.
///
/// Failure: refused.
#[test]
fn denials_that_the_kernel_has_no_room_for_are_resets_by_the_daemon() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().allow("10.77.0.0/30").start()?;
    let target = world.serve(NET4, target::echo())?;
    let node = Node::new(&world)?;
    let port = target.addr().port();
    let odd: Vec<_> = (0..20).map(|i| (1001 + 2 * i).to_string()).chain([port.to_string()]).collect();
    let routes = deny(&[format!("{NET4}:{}", odd.join(","))]);
    let mut daemon = node.daemon(&with_routes(&node, &gateway, "", &routes))?;
    let mut app = node.app(&["expect-reset", &target.addr().to_string(), "0"])?;
    assert!(app.wait(PATIENCE)?.success(), "{app}");
    assert_eq!(target.peers(), []);
    let said = daemon.log().matches("more ports or prefixes than the kernel's rules have room for").count();
    assert_eq!(said, 1, "{}", daemon.log());
    assert_eq!(daemon.stop_and_count("denied_by_route")?, 0);
    Ok(())
}

/// A daemon leaves loopback alone, as `exec` does, unless its capture includes it by name.
#[test]
fn a_daemon_leaves_loopback_alone_unless_it_is_included() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().allow("127.0.0.1/32").start()?;
    let own = Target::start(world.node(), "127.0.0.1:0".parse()?, target::echo())?;
    let node = Node::new(&world)?;
    let mut daemon = node.daemon(&node.config(&gateway, "", ""))?;
    node.hold(&own)?;
    assert_eq!((own.peers().len(), gateway.log().matches("tunnel accepted").count()), (1, 0));
    // The gateway's loopback, not the node's.
    let far = Target::start(world.net(), own.addr(), target::echo())?;
    daemon.tell(&node.config(&gateway, "", "include = [\"0.0.0.0/0\", \"127.0.0.1\"]"))?;
    node.hold(&far)?;
    assert_eq!((own.peers().len(), far.peers().len()), (1, 1));
    Ok(())
}

/// Applications on this node that are denied never reach a target in plaintext, however many ways of connecting they
/// try.
///
/// Failure: refused.
#[test]
fn no_way_to_connect_gets_past_a_denial() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().allow("10.77.0.0/30").allow("fd77::/64").start()?;
    let node = world.pki().named("node").toml();
    for ip in [NET4, NET6] {
        let target = world.serve(ip, target::echo())?;
        let addr = target.addr().to_string();
        let routes = deny(&[format!("{ip}")]);
        let config = format!("{node}{routes}{}", through(gateway.addr(), GATEWAY_ID));
        let exec = world.exec_with(&world.file("denying.toml", config)?);
        let bound = if ip.is_ipv4() { format!("{NODE4}:0") } else { "[::]:0".to_owned() };
        for words in [
            &["duplex", &addr, "1"][..],
            &["nonblocking", &addr, "1"],
            &["bound", &addr, &bound, "1"],
            &["fastopen", &addr, "1"],
            &["fastopen-sendto", &addr, "1"],
            &["tree", &addr, "1", "2"],
        ] {
            let done = exec.run_app(words)?;
            assert!(!done.success(), "{words:?}: {done}");
            assert_eq!(done.flows()?.len(), 0, "{words:?}: {done}");
        }
        // Where the kernel has no MPTCP it succeeds, with nothing.
        exec.run_app(&["mptcp", &addr])?;
        assert_eq!(target.peers(), []);
    }
    // It is the routes that say no.
    let target = world.serve(NET4, target::duplex(1))?;
    let config = format!("{node}{}", through(gateway.addr(), GATEWAY_ID));
    let done = world.exec_with(&world.file("open.toml", config)?).run_app(&[
        "duplex",
        &target.addr().to_string(),
        "1",
    ])?;
    assert!(done.success(), "{done}");
    Ok(())
}
