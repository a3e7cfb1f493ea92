//! What an operator types about a running daemon: status, flows, top, explain, support.

use std::{collections::BTreeSet, fs, os::unix::fs::PermissionsExt as _, time::Duration};

use anyhow::{Context as _, Result};
use nix::sys::{
    signal::Signal,
    termios::{LocalFlags, tcgetattr},
};
use tunnel_tests::{
    PATIENCE, TARGET4, World,
    admin::{Admin, config, tunnel},
    daemon::Daemon,
    dialogue::ask,
    node::Node,
    process::Process,
    programs, target,
    terminal::{Guarded, Terminal, spawn_on},
    wait_for,
};

/// `tunnel status` shows captures, upstreams, certificates and flows on one screen, and a problem with its remedy when the
/// upstream cannot be reached.
#[test]
fn status_shows_one_screen_and_names_problems_with_their_remedy() -> Result<()> {
    let world = World::new()?;
    let mut gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let daemon = node.daemon(&config(&node, &gateway, ""))?;
    let mut app = node.hold(&target)?;
    let (code, text) = tunnel(&daemon, &["status"])?;
    assert_eq!(code, 0, "{text}");
    for part in [
        "running, ready",
        "flows 1 of",
        "apps",
        "capturing",
        &gateway.addr().to_string(),
        tunnel_tests::pki::NODE_ID,
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains("PROBLEMS"), "{text}");
    let (code, json) = tunnel(&daemon, &["status", "--json"])?;
    assert_eq!(code, 0);
    assert_eq!(serde_json::from_str::<serde_json::Value>(&json)?["flows"]["live"], 1, "{json}");
    let (_, text) = tunnel(&daemon, &["flows", "--upstream", "gateway"])?;
    assert!(text.lines().count() == 2 && text.contains(&target.addr().to_string()), "{text}");
    let (_, text) = tunnel(&daemon, &["flows", "--destination", "10.9.9.9"])?;
    assert_eq!(text, "no flows\n");

    app.hang_up();
    app.wait(PATIENCE)?;
    gateway.kill()?;
    wait_for("a problem", PATIENCE, || {
        node.connect_error(&target).ok()?;
        let (_, text) = tunnel(&daemon, &["status"]).ok()?;
        (text.contains("PROBLEMS") && text.contains("upstream \"gateway\"")).then_some(())
    })?;
    Ok(())
}

/// `tunnel flows --kill` ends a flow; an ID that is none, or of no flow, is an error that says so.
#[test]
fn flows_are_killed_from_the_command_line() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let daemon = node.daemon(&config(&node, &gateway, ""))?;
    let mut app = node.hold(&target)?;
    let id = Admin::of(&daemon).json("/flows")?[0]["id"].as_str().context("no flow")?.to_owned();
    let (code, text) = tunnel(&daemon, &["flows", "--kill", &id])?;
    assert_eq!((code, text), (0, format!("ended flow {id}\n")));
    assert_ne!(ask(&mut app, "ping").unwrap_or_default(), "ok");
    wait_for("its end", PATIENCE, || {
        let (code, text) = tunnel(&daemon, &["flows", "--kill", &id]).ok()?;
        (code == 1 && text.contains("there is no flow")).then_some(())
    })?;
    let (code, text) = tunnel(&daemon, &["flows", "--kill", "seven"])?;
    assert!(code == 64 && text.contains("two numbers"), "{code}: {text}");
    Ok(())
}

/// `tunnel explain` says whether a connection would be captured, which route takes it, why the others do not, and which upstream
/// and endpoint it may take; the daemon's own traffic says the same.
#[test]
fn explain_says_which_route_and_upstream_and_why_not_the_others() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let routes = "[[route]]\nmatch.destination = [\"10.9.0.0/16\"]\nto = \"deny\"\n\
                  [[route]]\nmatch.destination = [\"10.8.0.0/16:443\"]\nmatch.sni = [\"*.example\"]\nto = \"direct\"\n";
    let daemon = node.daemon(&format!("{routes}{}", config(&node, &gateway, "")))?;
    let addr = target.addr().to_string();
    let (code, text) = tunnel(&daemon, &["explain", "--to", &addr])?;
    assert_eq!(code, 0, "{text}");
    for part in [
        "captured: yes",
        "route 0: does not match: destination",
        "route 1: does not match: destination",
        "route 2: takes it",
        "through upstream gateway",
        &format!("endpoint {}: available", gateway.addr()),
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let explained = |words: &[&str]| tunnel(&daemon, &[&["explain", "--to"], words].concat());
    let (_, text) = explained(&["10.9.0.1:80"])?;
    assert!(text.contains("ECONNREFUSED"), "{text}");
    assert_eq!(node.connect_error_of("10.9.0.1:80".parse()?)?, "ECONNREFUSED");
    let (_, text) = explained(&["10.8.0.1:443"])?;
    assert!(text.contains("route 1: takes it if its first bytes match"), "{text}");
    let (_, text) = explained(&["10.8.0.1:443", "--sni", "a.example"])?;
    assert!(text.contains("route 1: takes it\n") && text.contains("route 2: is not asked"), "{text}");
    let (_, text) = explained(&["127.0.0.1:80"])?;
    assert!(text.contains("captured: no") && text.contains("left alone by default"), "{text}");
    let inside = node.cgroup.path().join("below").display().to_string();
    let (_, text) = explained(&[&addr, "--cgroup", &inside])?;
    assert!(text.contains("captured: yes"), "{text}");
    let (_, text) = explained(&[&addr, "--cgroup", "/sys/fs/cgroup/elsewhere"])?;
    assert!(text.contains("no capture is of") && text.contains("connects directly"), "{text}");
    let (code, text) = explained(&[&addr, "--listener", "none"])?;
    assert!(code == 1 && text.contains("there is no listener"), "{text}");
    assert_eq!(target.peers().len(), 0, "nothing was sent");
    Ok(())
}

/// `tunnel explain` says of a listener's peer whether policy allows it, as a request of that peer is answered.
#[test]
fn explain_says_what_policy_says_of_a_peer() -> Result<()> {
    let world = World::new()?;
    let config = format!(
        "{}[[listener]]\nname = \"mesh\"\naddress = \"{}:15008\"\n[[route]]\nto = \"direct\"\n\
         [[policy]]\nidentity = [\"{}\"]\ntarget = [\"{TARGET4}/32\"]\n",
        world.pki().named("gateway").toml(),
        tunnel_tests::NET4,
        tunnel_tests::pki::NODE_ID
    );
    let daemon = Daemon::start(&world, world.net(), &config)?;
    let explained = |to: &str, who: &str| {
        tunnel(&daemon, &["explain", "--to", to, "--listener", "mesh", "--identity", who])
            .map(|(_, text)| text)
    };
    let to = format!("{TARGET4}:80");
    let text = explained(&to, tunnel_tests::pki::NODE_ID)?;
    assert!(text.contains("allowed: yes") && text.contains("dialled from here"), "{text}");
    let text = explained(&to, "spiffe://other/x")?;
    assert!(text.contains("allowed: no") && text.contains("policy_denied"), "{text}");
    Ok(())
}

/// `tunnel support` writes a folder that only its owner can read, with the configuration and the latest log lines and no key.
#[test]
fn support_writes_a_report_without_secrets() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let node = Node::new(&world)?;
    let secret = "headers = { proxy-authorization = \"Basic c2VjcmV0\" }\n";
    let daemon = node.daemon(&(config(&node, &gateway, "") + secret))?;
    let folder = world.folder().join("report");
    let (code, text) = tunnel(&daemon, &["support", "--output", &folder.display().to_string()])?;
    assert_eq!(code, 0, "{text}");
    assert_eq!(fs::metadata(&folder)?.permissions().mode() & 0o777, 0o700);
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(&folder)? {
        let entry = entry?;
        let text = String::from_utf8_lossy(&fs::read(entry.path())?).into_owned();
        assert!(!text.contains("PRIVATE KEY") && !text.contains("c2VjcmV0"), "{:?}", entry.path());
        names.insert(entry.file_name().to_string_lossy().into_owned());
    }
    for name in ["status.json", "metrics.txt", "config.json", "doctor.json", "log.txt", "certificates.json"] {
        assert!(names.contains(name), "{name} of {names:?}");
    }
    assert!(fs::read_to_string(folder.join("log.txt"))?.contains("capturing"));
    let (code, text) = tunnel(&daemon, &["support", "--output", &folder.display().to_string()])?;
    assert!(code == 1 && text.contains("does not exist yet"), "{text}");
    Ok(())
}

/// What a program shows on a terminal of this size once it shows `text`, and not `gone`. Only of another size does it draw
/// everything again.
fn drawn(terminal: &mut Terminal, (columns, rows): (u16, u16), text: &str, gone: &str) -> Result<String> {
    let mut wider = false;
    wait_for(text, PATIENCE, || {
        wider = !wider;
        terminal.resize(columns + u16::from(wider), rows).ok()?;
        let words = terminal.words_within(Duration::from_millis(500), text);
        (words.contains(text) && !words.contains(gone)).then_some(words)
    })
    .with_context(|| format!("{:?}", terminal.seen()))
}

/// `tunnel top` shows the fastest flow first, filters, ends a flow after a yes only, fits into a narrow terminal, has no colours
/// where NO_COLOR is set, goes on when another daemon takes over, and leaves the terminal as it was.
#[test]
fn top_shows_and_ends_flows_and_outlives_its_daemon() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let mut daemon = node.daemon(&config(&node, &gateway, ""))?;
    let admin = Admin::of(&daemon);
    let mut app = node.hold(&target)?;
    let addr = target.addr().to_string();
    let (code, json) = tunnel(&daemon, &["top", "--once", "--json", "--interval", "100ms"])?;
    let json: serde_json::Value = serde_json::from_str(&json).with_context(|| json.clone())?;
    assert_eq!((code, &json["flows"][0]["destination"]), (0, &addr.clone().into()));
    assert!(
        json["flows"][0]["sent_per_second"].is_f64() && json["upstreams"][0]["name"] == "gateway",
        "{json:#}"
    );
    let (code, text) = tunnel(&daemon, &["top"])?;
    assert!(code == 1 && text.contains("--once"), "{text}");

    let (mut terminal, slave) = Terminal::open()?;
    let before = tcgetattr(&slave)?;
    let mut top = world.node().command(programs::tunnel()?);
    top.args(["top", "--interval", "100ms", "--socket"]).arg(admin.path());
    top.env("NO_COLOR", "1").env("TERM", "xterm");
    terminal.resize(150, 30)?;
    let mut top = Guarded(spawn_on(top, slave.try_clone()?)?);
    let screen = drawn(&mut terminal, (150, 30), "q quit", "PAUSED")?;
    assert!(screen.contains(&addr) && screen.contains("UPSTREAM"), "{screen}");
    assert!(!tcgetattr(&slave)?.local_flags.contains(LocalFlags::ECHO), "raw");

    terminal.types("/elsewhere\r")?;
    drawn(&mut terminal, (150, 30), "filter \"elsewhere\"", &addr)?;
    // Escape alone, and not the beginning of another key.
    terminal.types("\x1b")?;
    let screen = drawn(&mut terminal, (40, 10), "sorted by rate q", "CLIENT")?;
    assert!(screen.contains("DESTINATION"), "{screen}");

    terminal.types("\x1b[Bk")?;
    drawn(&mut terminal, (150, 30), "Both sides are reset", "PAUSED")?;
    terminal.types("n")?;
    drawn(&mut terminal, (150, 30), "nothing was ended", "PAUSED")?;
    assert_eq!(ask(&mut app, "ping")?, "ok");
    terminal.types("ky")?;
    drawn(&mut terminal, (150, 30), "ended flow", "PAUSED")?;
    assert_ne!(ask(&mut app, "ping").unwrap_or_default(), "ok", "it was reset");

    let first = admin.json("/status")?["pid"].clone();
    let mut command = world.node().command_ended_by(programs::tunnel()?, Signal::SIGTERM);
    command.args(["run", "--takeover", "--log", "info", "--config"]).arg(daemon.config());
    let _next = Process::spawn("next", world.folder(), command)?;
    let second = admin.until("another daemon", |status| status["pid"] != first)?["pid"].clone();
    assert!(daemon.process().wait(PATIENCE)?.success());
    let screen = drawn(&mut terminal, (150, 30), &format!("pid {second} ready"), "PAUSED")?;
    // Foreground and background, of a palette (ECMA-48, SGR).
    let seen = terminal.seen();
    assert!(
        screen.contains("gateway") && !seen.contains("\x1b[38;") && !seen.contains("\x1b[48;"),
        "{seen:?}"
    );

    terminal.types("q")?;
    assert!(top.0.wait()?.success());
    terminal.shows("\x1b[?1049l")?;
    assert_eq!(tcgetattr(&slave)?.local_flags, before.local_flags);
    Ok(())
}
