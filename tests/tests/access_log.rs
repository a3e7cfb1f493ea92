//! The access log: what stands in its lines, which flows have them, and that nothing waits for them.

use std::{fs, io::Read as _, os::unix::net::UnixDatagram, path::Path, process::ChildStdout, time::Duration};

use anyhow::{Context as _, Result, ensure};
use nix::{
    fcntl::{FcntlArg, fcntl},
    sys::signal::Signal,
};
use serde_json::Value;
use tunnel_tests::{
    PATIENCE, Process, TARGET4, World,
    daemon::Daemon,
    dialogue::ask,
    gateway,
    node::Node,
    pki::{GATEWAY_ID, NODE_ID},
    process, programs, target, wait_for,
    world::NET4,
};

/// The lines of a log that is JSON, once there are so many of them that fit.
fn lines(path: &Path, many: usize, fits: impl Fn(&Value) -> bool) -> Result<Vec<Value>> {
    let read = || -> Result<Vec<Value>> {
        let text = fs::read_to_string(path).unwrap_or_default();
        // The last one may not be whole yet.
        let whole = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        whole.map(|line| serde_json::from_str(line).with_context(|| line.to_owned())).collect()
    };
    let found = wait_for(&format!("{many} lines in {}", path.display()), PATIENCE, || match read() {
        Ok(lines) => {
            let fitting: Vec<_> = lines.into_iter().filter(&fits).collect();
            (fitting.len() >= many).then_some(Ok(fitting))
        }
        Err(e) => Some(Err(e)),
    });
    found.with_context(|| fs::read_to_string(path).unwrap_or_default())?
}

fn section(path: &Path, more: &str) -> String {
    format!("[[access_log]]\noutput = \"file\"\npath = \"{}\"\n{more}\n", path.display())
}

/// A gateway of ours as a daemon, which says in a log what it carries.
fn gateway_with(world: &World, sections: &str) -> Result<Daemon> {
    let identity = world.pki().named("gateway").toml();
    let config = format!(
        "{identity}[[listener]]\nname = \"mesh\"\naddress = \"{NET4}:{}\"\n\
         [[route]]\nname = \"here\"\nto = \"direct\"\n\
         [[policy]]\nidentity = \"any\"\ntarget = [\"10.200.0.0/24\"]\n{sections}",
        gateway::PORT
    );
    Daemon::start(world, world.net(), &config)
}

/// `tunnel exec` by a route with a name, to be written to a log.
fn agent(world: &World, routes: &str, sections: &str) -> Result<std::path::PathBuf> {
    let identity = world.pki().named("node").toml();
    world.file(
        "agent.toml",
        format!(
            "{identity}{routes}[[route]]\nname = \"mesh\"\nto = [{{ upstream = \"gateway\" }}]\n\
             [[upstream]]\nname = \"gateway\"\nendpoints = [\"{NET4}:{}\"]\nverify = [\"{GATEWAY_ID}\"]\n{sections}",
            gateway::PORT
        ),
    )
}

/// A flow has one line at each end of the tunnel, with who, where to, by which way, how much and how long.
#[test]
fn a_flow_has_a_line_with_both_identities_its_way_its_bytes_and_its_durations() -> Result<()> {
    let world = World::new()?;
    let (near, far) = (world.folder().join("near.log"), world.folder().join("far.log"));
    let _gateway = gateway_with(&world, &section(&far, ""))?;
    let target = world.serve(TARGET4, target::name_the_peer())?;
    let done = world
        .exec_with(&agent(&world, "", &section(&near, ""))?)
        .run_app(&["names", &target.addr().to_string()])?;
    assert!(done.success(), "{done}");

    let line = lines(&near, 1, |_| true)?.remove(0);
    for (key, value) in [
        ("event", Value::from("end")),
        ("source", "capture".into()),
        ("destination", target.addr().to_string().into()),
        ("route", 0.into()),
        ("route_name", "mesh".into()),
        ("upstream", "gateway".into()),
        ("endpoint", format!("{NET4}:{}", gateway::PORT).into()),
        ("upstream_identity", GATEWAY_ID.into()),
        ("path", "copy".into()),
        ("bytes_sent", 0.into()),
        ("reason", "closed".into()),
        ("fault", "nobody".into()),
    ] {
        assert_eq!(line[key], value, "{key}: {line}");
    }
    assert!(line["bytes_received"].as_u64() > Some(10), "{line}");
    assert!(line["client_identity"].is_null() && line["flow"].is_string(), "{line}");
    let millis = |key: &str| line[key].as_f64().with_context(|| format!("{key}: {line}"));
    let [queue, connect, first_byte, all] =
        [millis("queue_ms")?, millis("connect_ms")?, millis("first_byte_ms")?, millis("duration_ms")?];
    assert!(0.0 < queue && queue <= connect && connect <= first_byte && first_byte <= all, "{line}");

    let line = lines(&far, 1, |_| true)?.remove(0);
    for (key, value) in [
        ("source", Value::from("listener")),
        ("source_name", "mesh".into()),
        ("client_identity", NODE_ID.into()),
        ("endpoint", target.addr().to_string().into()),
        ("route_name", "here".into()),
        ("reason", "closed".into()),
    ] {
        assert_eq!(line[key], value, "{key}: {line}");
    }
    assert!(line["upstream"].is_null() && line["upstream_identity"].is_null(), "{line}");
    assert!(line["queue_ms"].is_null() && line["connect_ms"].is_f64(), "dialled: {line}");
    Ok(())
}

/// A flow that lasts has lines at its start and once in a while, by the same number as the one at its end.
#[test]
fn a_flow_that_lasts_has_lines_at_its_start_and_once_in_a_while() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let path = world.folder().join("access.log");
    let log = section(&path, "start = true\ninterval = \"1s\"");
    let _daemon = node.daemon(&format!("{}{log}", node.config(&gateway, "", "")))?;
    let mut app = node.hold(&target)?;
    let live = lines(&path, 2, |line| line["event"] == "live")?;
    assert_eq!(ask(&mut app, "ping")?, "ok");
    app.hang_up();
    app.wait(PATIENCE)?;
    let end = lines(&path, 1, |line| line["event"] == "end")?.remove(0);
    let start = lines(&path, 1, |line| line["event"] == "start")?;
    assert_eq!((start.len(), &start[0]["flow"], &live[0]["flow"]), (1, &end["flow"], &end["flow"]), "{end}");
    assert!(start[0]["reason"].is_null() && live[0]["reason"].is_null(), "{live:?}");
    assert!(live[0]["bytes_sent"].as_u64() > Some(0), "{live:?}");
    assert!(live[0]["duration_ms"].as_f64() < live[1]["duration_ms"].as_f64(), "{live:?}");
    Ok(())
}

/// A log has the flows of its routes only, the failures only, or a share of them, as it says.
#[test]
fn a_log_has_the_flows_that_it_was_asked_for() -> Result<()> {
    let world = World::new()?;
    let _gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let folder = world.folder().to_owned();
    let [all, failures, route, share] =
        ["all", "failures", "route", "share"].map(|name| folder.join(format!("{name}.log")));
    let routes = "[[route]]\nname = \"nowhere\"\nmatch = { destination = [\"10.200.0.99/32\"] }\n\
                  to = [{ upstream = \"gateway\" }]\n";
    let sections = [
        section(&all, ""),
        section(&failures, "only = \"failures\"\nformat = \"text\""),
        section(&route, "routes = [\"nowhere\"]"),
        section(&share, "share = 50"),
    ];
    let exec = world.exec_with(&agent(&world, routes, &sections.concat())?);
    let done = exec.run_app(&["many-short", &target.addr().to_string(), "200", "write"])?;
    assert!(done.success(), "{done}");
    assert_eq!(lines(&all, 200, |_| true)?.len(), 200);
    assert_eq!((fs::read_to_string(&failures)?, fs::read_to_string(&route)?), (String::new(), String::new()));
    // Six standard deviations (7 each) from 100.
    let some = lines(&share, 1, |_| true)?.len();
    assert!((58..=142).contains(&some), "{some}");

    let done = exec.run_app(&["expect-reset", "10.200.0.99:9", "0"])?;
    let failed = lines(&route, 1, |_| true)?;
    assert_eq!((failed.len(), &failed[0]["reason"]), (1, &"upstream_refused".into()), "{done}");
    let text = fs::read_to_string(&failures)?;
    assert!(text.lines().count() == 1 && text.contains(" reason=upstream_refused fault=upstream "), "{text}");
    Ok(())
}

/// After a file was renamed, SIGUSR1 has the lines go into a new one of its name; none is lost.
#[test]
fn a_file_that_was_renamed_is_opened_again_on_sigusr1() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    let (path, old) = (world.folder().join("access.log"), world.folder().join("access.log.1"));
    let mut daemon = node.daemon(&format!("{}{}", node.config(&gateway, "", ""), section(&path, "")))?;
    drop(node.hold(&target)?);
    assert_eq!(lines(&path, 1, |_| true)?.len(), 1);
    fs::rename(&path, &old)?;
    drop(node.hold(&target)?);
    assert_eq!(lines(&old, 2, |_| true)?.len(), 2, "the file is still open");
    daemon.process().signal(Signal::SIGUSR1)?;
    daemon.process().wait_for_line("reopened access log")?;
    drop(node.hold(&target)?);
    assert_eq!(lines(&path, 1, |_| true)?.len(), 1);
    assert_eq!(lines(&old, 2, |_| true)?.len(), 2);
    Ok(())
}

/// The journal gets each line as fields of its native protocol.
#[test]
fn the_journal_gets_a_line_as_fields() -> Result<()> {
    let world = World::new()?;
    let _gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::name_the_peer())?;
    let path = world.folder().join("journal.socket");
    let journal = UnixDatagram::bind(&path)?;
    journal.set_read_timeout(Some(PATIENCE))?;
    let log = format!("[[access_log]]\noutput = \"journal\"\npath = \"{}\"\n", path.display());
    let done = world.exec_with(&agent(&world, "", &log)?).run_app(&["names", &target.addr().to_string()])?;
    assert!(done.success(), "{done}");
    let mut datagram = vec![0; 64 * 1024];
    let n = journal.recv(&mut datagram).context("the journal got nothing")?;
    let text = String::from_utf8(datagram[..n].to_vec())?;
    let fields: Vec<_> = text.lines().filter_map(|line| line.split_once('=')).collect();
    let of = |name: &str| fields.iter().find(|(n, _)| *n == name).map(|(_, value)| *value);
    assert!(of("MESSAGE").is_some_and(|message| message.starts_with("flow ended: ")), "{text}");
    assert_eq!((of("PRIORITY"), of("SYSLOG_IDENTIFIER")), (Some("6"), Some("tunnel-access")), "{text}");
    assert_eq!(of("TUNNEL_DESTINATION"), Some(target.addr().to_string().as_str()), "{text}");
    assert_eq!((of("TUNNEL_REASON"), of("TUNNEL_ROUTE_NAME")), (Some("closed"), Some("mesh")), "{text}");
    Ok(())
}

/// Where a log cannot be written, because the disk is full or the journal is not there, flows go on as without it, and
/// the lines that are lost are counted and logged.
#[test]
fn a_full_disk_and_a_journal_that_is_away_cost_lines_and_no_flow() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::echo())?;
    let node = Node::new(&world)?;
    // Every write there is ENOSPC (full(4)).
    let full = section(Path::new("/dev/full"), "");
    let away = world.folder().join("nobody");
    let journal = format!("[[access_log]]\noutput = \"journal\"\npath = \"{}\"\n", away.display());
    let mut daemon = node.daemon(&format!("{}{full}{journal}", node.config(&gateway, "", "")))?;
    for _ in 0..5 {
        let mut app = node.hold(&target)?;
        assert_eq!(ask(&mut app, "ping")?, "ok");
        app.hang_up();
        app.wait(PATIENCE)?;
    }
    let lost = daemon.process().wait_for_line("access log lines lost")?;
    assert!(lost.contains("/dev/full") || lost.contains("nobody"), "{lost}");
    assert_eq!(daemon.stop_and_count("access_log_lost")?, 10, "five flows, two logs");
    let log = daemon.log();
    assert!(log.contains("No space left on device") && log.contains("No such file or directory"), "{log}");
    Ok(())
}

/// A daemon whose standard output nobody reads carries flows as fast as before, says how many lines that cost, and ends when it
/// is told to.
#[test]
fn a_standard_output_that_nobody_reads_holds_up_no_flow_and_no_end() -> Result<()> {
    let world = World::new()?;
    let target = world.serve(TARGET4, target::echo())?;
    let identity = world.pki().named("gateway").toml();
    let config = world.file(
        "gateway.toml",
        format!(
            "{identity}[[listener]]\naddress = \"{NET4}:{}\"\n[[route]]\nto = \"direct\"\n\
             [[policy]]\nidentity = \"any\"\ntarget = [\"10.200.0.0/24\"]\n[[access_log]]\noutput = \"stdout\"\n",
            gateway::PORT
        ),
    )?;
    let mut command = world.net().command_ended_by(programs::tunnel()?, Signal::SIGTERM);
    command.args(["run", "--log", "info", "--config"]).arg(config);
    let (mut daemon, mut out): (Process, ChildStdout) =
        Process::spawn_to_talk_to("daemon", world.folder(), command)?;
    daemon.wait_for_line("listening")?;
    // The smallest pipe holds some seven lines; beyond the queue's 4,096 they are lost.
    fcntl(&out, FcntlArg::F_SETPIPE_SZ(4096))?;
    let exec = world.exec_with(&agent(&world, "", "")?).limit(Duration::from_secs(120));
    let done = exec.run_app(&["many-short", &target.addr().to_string(), "4600", "write"])?;
    assert!(done.success(), "{done}");
    daemon.signal(Signal::SIGTERM)?;
    let status = daemon.wait(PATIENCE)?;
    ensure!(status.success(), "{status}: {daemon}");
    let log = daemon.stderr();
    let lost = log.split_once("(\"access_log_lost\", ").and_then(|(_, n)| n.split_once(')'));
    let lost: usize = lost.with_context(|| log.clone())?.0.parse()?;
    assert!((400..=4600).contains(&lost) && log.contains("access log lines lost"), "{lost}: {log}");
    let mut text = String::new();
    out.read_to_string(&mut text)?;
    let whole: Vec<_> = text.split_inclusive('\n').filter(|line| line.ends_with('\n')).collect();
    for line in &whole {
        serde_json::from_str::<Value>(line).with_context(|| format!("a torn line: {line}"))?;
    }
    Ok(())
}

/// A log that cannot be opened fails the start with its path, and a reload that adds one changes nothing.
#[test]
fn a_log_that_cannot_be_opened_is_an_error_that_changes_nothing() -> Result<()> {
    let world = World::new()?;
    let path = world.folder().join("access.log");
    let mut daemon = gateway_with(&world, &section(&path, ""))?;
    let before = fs::read_to_string(daemon.config())?;
    let wrong = section(Path::new("/nowhere/access.log"), "");
    daemon.tell(&format!("{before}{wrong}"))?;
    let answers = daemon.answers();
    let last = answers.last().context("no answer")?;
    assert!(last.contains("failed to reload") && last.contains("/nowhere/access.log"), "{last}");

    let config = world.file("wrong.toml", format!("{}{wrong}", before.replace("15008", "15009")))?;
    let mut command = world.net().command(programs::tunnel()?);
    let failed = process::output(command.args(["run", "--config"]).arg(config));
    let failed = format!("{:#}", failed.expect_err("there is no such folder"));
    assert!(failed.contains("cannot open the access log /nowhere/access.log: No such file"), "{failed}");

    let other = world.folder().join("other.log");
    daemon.tell(&before.replace("access.log", "other.log"))?;
    assert!(daemon.answers().last().is_some_and(|last| last.contains("reloaded")), "{}", daemon.log());
    assert!(other.is_file());
    Ok(())
}
