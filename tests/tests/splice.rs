//! `relay = "splice"`: captured, dialled directly, and moved by a kernel program while it chats; nobody sees a
//! difference.
//!
//! Applications here exchange single bytes first, so that their flows belong to the program before they do what they
//! are tested with.

use std::{
    cell::RefCell,
    fs, io,
    net::TcpStream,
    panic::resume_unwind,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value as Json;
use tunnel_tests::{
    Exec, Finished, PATIENCE, TARGET4, TARGET6, Target, World,
    admin::Admin,
    amount::amount,
    cgroup::Cgroup,
    dialogue::{ask, lines_with},
    dmesg::Mark,
    leftovers,
    load::{
        Workload,
        driver::{Client, Server},
    },
    modes::{COPY, Mode, Stage},
    process, programs,
    target::{self, Gate, Handler},
    wait_for,
    world::{NET4, NET6},
};

const MIB: u64 = 1 << 20;
/// Round trips before anything else: a flow is promoted after 16 wake-ups, at a moment when nothing is on its way, which
/// on a busy machine has been late by 80 of them.
const PINGS: usize = 300;
/// The same where there are many flows, and some may be late.
const PINGS_OF_MANY: usize = 100;

/// A node with a route to the targets, and what it captures goes there by itself.
struct Node {
    world: World,
    config: PathBuf,
    kernel: RefCell<Mark>,
}

impl Node {
    fn new() -> Result<Self> {
        Self::with("splice")
    }

    fn with(relay: &str) -> Result<Self> {
        let (world, kernel) = (World::new()?, RefCell::new(Mark::now()?));
        world.node().ip(&format!("route add default via {NET4}"))?;
        world.node().ip(&format!("-6 route add default via {NET6}"))?;
        let config = format!("[daemon]\nworkers = 1\nrelay = \"{relay}\"\n[[route]]\nto = \"direct\"\n");
        let config = world.file("direct.toml", config)?;
        Ok(Self { world, config, kernel })
    }

    fn exec(&self) -> Exec<'_> {
        // The counters are logged at the end.
        self.world.exec_with(&self.config).flag("--log", "info").limit(Duration::from_secs(120))
    }

    /// A target that answers the first bytes, and where it is.
    fn chatty(&self, handler: impl Handler) -> Result<(Target, String)> {
        self.chatty_after(PINGS, handler)
    }

    fn chatty_after(&self, pings: usize, handler: impl Handler) -> Result<(Target, String)> {
        let target = self.world.serve(TARGET4, target::after_pings(pings, handler))?;
        let addr = format!("{}+{pings}", target.addr());
        Ok((target, addr))
    }

    /// The kernel has had nothing to complain of.
    fn assert_quiet(&self) -> Result<()> {
        assert_eq!(self.kernel.borrow_mut().warnings()?, Vec::<String>::new());
        Ok(())
    }
}

/// A counter, as it is logged at the end.
fn counter(done: &Finished, name: &str) -> u64 {
    counter_of(&done.stderr, name)
}

fn counter_of(log: &str, name: &str) -> u64 {
    let found = log.split_once(&format!("(\"{name}\", "));
    found.and_then(|(_, rest)| rest.split_once(')')?.0.parse().ok()).unwrap_or(0)
}

/// So many flows were the program's for a while.
fn assert_spliced(done: &Finished, flows: u64) {
    assert_eq!(counter(done, "flows_spliced"), flows, "{done}");
    assert!(counter(done, "bytes_spliced") >= flows * PINGS as u64 / 6, "{done}");
    assert_eq!(counter(done, "splice_refused") + counter(done, "splice_no_slot"), 0, "{done}");
    assert_accounts(done);
}

/// No account of memory was wrong, but for those of flows whose mailbox was full because the kernel's worker got no processor.
fn assert_accounts(done: &Finished) {
    assert!(counter(done, "splice_accounts_wrong") <= 2 * counter(done, "splice_forced"), "{done}");
}

/// With `relay = "splice"` 32 MiB in each direction at once arrive unchanged behind small messages.
#[test]
fn heavy_32_mib_each_way_at_once_arrive_unchanged_behind_small_messages() -> Result<()> {
    const BYTES: u64 = 32 * MIB;
    let node = Node::new()?;
    for ip in [TARGET4, TARGET6] {
        let target = node.world.serve(ip, target::after_pings(PINGS, target::duplex(BYTES)))?;
        let addr = format!("{}+{PINGS}", target.addr());
        let done = node.exec().run_app(&["duplex", &addr, &BYTES.to_string()])?;
        assert!(done.success(), "{done}");
        assert_eq!(target.outcomes(1)?, [Ok(())]);
        let (flow, all) = (&done.flows()?[0], BYTES + PINGS as u64);
        assert_eq!((flow["sent"].as_u64(), flow["received"].as_u64()), (Some(all), Some(all)), "{flow}");
        assert_spliced(&done, 1);
        // Bulk is copied.
        assert!(counter(&done, "splice_demotions") > 0, "{done}");
        assert!(counter(&done, "bytes_spliced") < BYTES, "{done}");
    }
    node.assert_quiet()
}

/// With `relay = "splice"` half-close works, whichever side ends first.
#[test]
fn whichever_side_ends_first_the_other_is_heard_behind_small_messages() -> Result<()> {
    let node = Node::new()?;
    for bytes in [0, 1, 5_000, 300_000, 4 * MIB] {
        let text = bytes.to_string();
        let (_target, addr) = node.chatty(target::answer_after_end())?;
        let done = node.exec().run_app(&["half-close", &addr, &text])?;
        assert!(done.success(), "{bytes} bytes: {done}");
        assert_eq!(done.value("answer")?, text);
        assert_spliced(&done, 1);

        let (target, addr) = node.chatty(target::end_then_listen(bytes))?;
        let done = node.exec().run_app(&["hear-end-first", &addr, &text])?;
        assert!(done.success(), "{bytes} bytes: {done}");
        assert_eq!(target.outcomes(1)?, [Ok(())], "{bytes} bytes");
        assert_spliced(&done, 1);
    }
    node.assert_quiet()
}

/// With `relay = "splice"` a reset of either side resets the other.
#[test]
fn a_reset_of_either_side_resets_the_other_behind_small_messages() -> Result<()> {
    let node = Node::new()?;
    for bytes in [1, 200_000] {
        let text = bytes.to_string();
        let (target, addr) = node.chatty(target::reset_after(bytes))?;
        let done = node.exec().run_app(&["expect-reset", &addr, &text])?;
        assert_eq!(done.value("ended")?, "ECONNRESET", "after {bytes} bytes: {done}");
        assert_eq!(target.outcomes(1)?, [Ok(())], "after {bytes} bytes");
        assert_eq!(done.flows()?[0]["reason"], "target_reset", "{done}");

        let (target, addr) = node.chatty(target::expect_reset_after(bytes))?;
        let mut app = node.exec().spawn_app(&["reset", &addr, &text])?;
        app.says("answered")?;
        app.tell("reset")?;
        let done = app.finish()?;
        assert!(done.success(), "{done}");
        assert_eq!(target.outcomes(1)?, [Ok(())], "after {bytes} bytes");
        assert_eq!(done.flows()?[0]["reason"], "client_reset", "{done}");
        assert_spliced(&done, 1);
    }
    node.assert_quiet()
}

/// With `relay = "splice"` a target that does not read stalls its application and no other flow.
#[test]
fn heavy_a_target_that_does_not_read_stops_the_application_and_no_other_flow() -> Result<()> {
    const OFFERED: u64 = 128 * MIB;
    /// Two pairs of socket buffers as Linux grows them (net.ipv4.tcp_rmem, tcp_wmem), and the program's credit.
    const TAKEN_MAX: u64 = 32 * MIB;
    let node = Node::new()?;
    let (gate, read) = (Gate::default(), Arc::new(AtomicU64::new(0)));
    let (stuck, stuck_addr) = node.chatty(target::slow_reader(&gate, &read))?;
    let echo = node.world.serve(TARGET4, target::echo())?;
    let words = ["offer", &stuck_addr, &echo.addr().to_string(), &OFFERED.to_string()];
    let mut app = node.exec().spawn_app(&words)?;
    app.says("ready")?;
    let before = app.process().memory()?;
    app.tell("offer")?;
    let written: u64 = app.value("written")?.parse()?;
    let grown = app.process().memory()?.saturating_sub(before);
    assert!(written < TAKEN_MAX, "{written} bytes were taken: nothing was held back");
    assert!(grown < MIB, "it grew by {grown} bytes: they were to stay in the kernel");
    gate.open();
    app.tell("the rest")?;
    let done = app.finish()?;
    assert!(done.success(), "{done}");
    assert_eq!(stuck.outcomes(1)?, [Ok(())]);
    assert_eq!(read.load(Ordering::Relaxed), OFFERED);
    assert_spliced(&done, 2);
    node.assert_quiet()
}

/// Under memory pressure the splice delivers every byte and fails no call that would succeed with the copy.
#[test]
fn heavy_under_memory_pressure_every_byte_arrives_and_nothing_fails_that_would_not_copied() -> Result<()> {
    const FLOWS: usize = 60;
    const MEMORY: u64 = 4 * MIB;
    let mut taken = Vec::new();
    for relay in ["copy", "splice"] {
        let node = Node::with(relay)?;
        let Some(group) = Cgroup::with_tcp_memory(MEMORY)? else { return Ok(()) };
        node.world.buffers_of_64_kib()?;
        let (gate, read) = (Gate::default(), Arc::new(AtomicU64::new(0)));
        let (opened, sum) = (gate.clone(), Arc::clone(&read));
        let counting = move |mut stream: &TcpStream| {
            opened.wait();
            sum.fetch_add(io::copy(&mut stream, &mut io::sink())?, Ordering::Relaxed);
            Ok(())
        };
        let (stuck, stuck_addr) = node.chatty_after(PINGS_OF_MANY, counting)?;
        let echo = node.world.serve(TARGET4, target::echo())?;
        let words = ["stick", &stuck_addr, &echo.addr().to_string(), &FLOWS.to_string()];
        let mut app = node.exec().within(&group).spawn_app(&words)?;
        app.value_in_the_end("ready")?;
        app.tell("stick")?;
        let written: u64 = app.value_in_the_end("written")?.parse()?;
        taken.push(written);
        let most = group.most_tcp_memory()?;
        assert!(most >= MEMORY, "{most} bytes: there was no pressure");
        gate.open();
        app.tell("end")?;
        let done = app.finish()?;
        assert!(done.success(), "{done}");
        assert!(stuck.outcomes(FLOWS)?.iter().all(Result::is_ok), "{done}");
        assert_eq!(read.load(Ordering::Relaxed), written, "every byte arrived");
        if relay == "splice" {
            // As below.
            assert!(counter(&done, "flows_spliced") >= (FLOWS - FLOWS / 10) as u64, "{done}");
            assert_accounts(&done);
        }
        node.assert_quiet()?;
    }
    println!("{taken:?} bytes were taken by {FLOWS} flows, copied and spliced");
    Ok(())
}

/// Targets that do not read, 500 of them where tests are thorough, hold no more memory than with the copy, and at most 1 MB
/// each.
#[test]
fn heavy_many_targets_that_do_not_read_cost_what_copying_costs_and_a_megabyte_each_at_most() -> Result<()> {
    let flows: u64 = amount(100, 500);
    let mut taken = Vec::new();
    for relay in ["copy", "splice"] {
        let node = Node::with(relay)?;
        node.world.buffers_of_64_kib()?;
        let (gate, read) = (Gate::default(), Arc::new(AtomicU64::new(0)));
        let (_stuck, stuck_addr) = node.chatty_after(PINGS_OF_MANY, target::slow_reader(&gate, &read))?;
        let echo = node.world.serve(TARGET4, target::echo())?;
        let mut app =
            node.exec().spawn_app(&["stick", &stuck_addr, &echo.addr().to_string(), &flows.to_string()])?;
        app.value_in_the_end("ready")?;
        app.tell("stick")?;
        let written: u64 = app.value_in_the_end("written")?.parse()?;
        taken.push(written);
        gate.open();
        app.tell("end")?;
        let done = app.finish()?;
        assert!(done.success(), "{done}");
        if relay == "splice" {
            // On a busy machine a flow may have no quiet moment before it is stuck.
            assert!(counter(&done, "flows_spliced") >= flows - flows / 10, "{done}");
            assert_accounts(&done);
        }
        node.assert_quiet()?;
    }
    println!("{taken:?} bytes were taken by {flows} flows, copied and spliced");
    assert!(taken[1] < taken[0] + flows * MIB, "{taken:?}");
    assert!(taken[1] < flows * 8 * MIB, "{taken:?}");
    Ok(())
}

/// When application, target or daemon is killed during a splice, the others are reset and nothing hangs.
///
/// Failure: daemon-killed.
#[test]
fn heavy_whoever_is_killed_in_the_middle_the_others_hear_of_it_and_nothing_is_stuck() -> Result<()> {
    let node = Node::new()?;
    // The application. (The target's process is this one: tests above reset its socket, which is what the kernel does
    // for one that is killed.)
    let (target, addr) = node.chatty(target::expect_reset_after(1))?;
    // What is in the background has no input of its own, and would end.
    let script = "exec 3<&0; \"$0\" hold \"$1\" <&3 & echo pid=$!; wait $!";
    let app = programs::app()?;
    let mut app = node.exec().spawn(&["sh", "-c", script, &app.to_string_lossy(), &addr])?;
    let pid: i32 = app.value("pid")?.parse()?;
    app.says("held")?;
    kill(Pid::from_raw(pid), Signal::SIGKILL)?;
    let done = app.ended()?;
    assert_spliced(&done, 1);
    target.outcomes(1)?;
    // The daemon.
    let (target, addr) = node.chatty(target::echo())?;
    let mut app = node.exec().spawn_app(&["hold", &addr])?;
    app.says("held")?;
    let group = format!("tunnel-exec-{}", app.process().id());
    app.process().kill()?;
    // The application is an orphan now; its input and output are still ours.
    app.tell("read")?;
    wait_for("the orphan to be reset", PATIENCE, || {
        app.process().stdout().contains("read=ECONNRESET").then_some(())
    })?;
    app.process().hang_up();
    assert!(target.outcomes(1)?[0].is_err(), "the target is reset");
    // The next one removes what the killed one left, once its command has ended.
    wait_for("the group to be left", PATIENCE, || {
        let group = leftovers::cgroups(std::slice::from_ref(&group)).pop()?;
        fs::read_to_string(group.join("cgroup.procs")).ok()?.is_empty().then_some(())
    })?;
    assert!(node.exec().run(&["true"])?.success());
    node.assert_quiet()
}

/// Every byte arrives while flows move between copy and splice again and again.
#[test]
fn heavy_every_byte_arrives_while_flows_change_sides_again_and_again() -> Result<()> {
    const SECONDS: &str = "8";
    let node = Node::with("auto")?;
    let echo = node.world.serve(TARGET4, target::echo())?;
    let addr = format!("{}+{PINGS}", echo.addr());
    let apps: Vec<_> = ["3", "5", "7"]
        .iter()
        .map(|seed| node.exec().spawn_app(&["soak", &addr, SECONDS, seed]))
        .collect::<Result<_>>()?;
    let mut changes = 0;
    for app in apps {
        let done = app.ended()?;
        assert!(done.success(), "{done}");
        assert_spliced(&done, 1);
        changes += counter(&done, "splice_promotions") + counter(&done, "splice_demotions");
    }
    println!("{changes} changes of sides");
    assert!(changes > 100, "{changes}");
    node.assert_quiet()
}

/// With panic_on_warn `relay = "splice"` exits with 69, and "auto" copies.
#[test]
fn where_a_warning_would_stop_the_node_it_ends_with_69_and_auto_copies() -> Result<()> {
    const PLACE: &str = "/proc/sys/kernel/panic_on_warn";
    let node = Node::new()?;
    let strict = node.world.file("panic_on_warn", "1\n")?;
    let done = node.exec().sees(&strict, PLACE).run(&["true"])?;
    assert_eq!(done.code(), 69, "{done}");
    assert!(done.stderr.contains("panic_on_warn") && done.stderr.contains("relay = \"auto\""), "{done}");

    let node = Node::with("auto")?;
    let (_target, addr) = node.chatty(target::duplex(1000))?;
    let done = node.exec().sees(&strict, PLACE).run_app(&["duplex", &addr, "1000"])?;
    assert!(done.success() && done.stderr.contains("are copied: kernel.panic_on_warn"), "{done}");
    assert_eq!(counter(&done, "flows_spliced"), 0, "{done}");
    node.assert_quiet()
}

/// Hundreds of flows are spliced at once, and their slots are reused.
#[test]
fn hundreds_of_flows_are_served_at_once_and_their_places_are_given_again() -> Result<()> {
    const FLOWS: u64 = 300;
    let node = Node::new()?;
    let echo = node.world.serve(TARGET4, target::echo())?;
    // One that goes on all the time, so that both crowds are of one daemon.
    let script = "for crowd in 1 2; do \"$0\" many \"$1\" \"$2\" 1000000 </dev/null || exit 1; done";
    let (app, addr, flows) = (programs::app()?, echo.addr().to_string(), FLOWS.to_string());
    let done = node.exec().run(&["sh", "-c", script, &app.to_string_lossy(), &addr, &flows])?;
    assert!(done.success(), "{done}");
    assert_eq!(counter(&done, "splice_no_slot") + counter(&done, "splice_refused"), 0, "{done}");
    assert_eq!(counter(&done, "flows"), 2 * FLOWS, "{done}");
    node.assert_quiet()
}

/// What a spliced flow has moved is known to the byte while it lasts, and a kill, a limit, a drain or a target that
/// vanishes ends it as it ends a copied one.
///
/// Failure: limits.
#[test]
fn a_spliced_flow_is_counted_while_it_lasts_and_ended_by_whatever_ends_a_copied_one() -> Result<()> {
    let cases = [
        ("", "killed"),
        ("flow_idle_timeout = \"2s\"", "idle_timeout"),
        ("flow_max_duration = \"5s\"", "max_duration"),
        ("", "drain_timeout"),
        ("", "target_timeout"),
    ];
    thread::scope(|scope| {
        let cases = cases.map(|(limit, reason)| scope.spawn(move || counted_and_ended(limit, reason)));
        cases.into_iter().try_for_each(|case| case.join().unwrap_or_else(|panic| resume_unwind(panic)))
    })
}

/// A spliced flow under a limit, or that something else ends, with that reason.
fn counted_and_ended(limit: &str, reason: &str) -> Result<()> {
    /// It is not idle while it talks this long, with a pause shorter than the limit between two exchanges.
    const TALKS: Duration = Duration::from_millis(3_500);
    let world = World::new()?;
    world.node().ip(&format!("route add default via {NET4}"))?;
    let echo = world.serve(TARGET4, target::echo())?;
    let node = tunnel_tests::node::Node::new(&world)?;
    let mut daemon = node.daemon(&format!(
        "[daemon]\nworkers = 1\nrelay = \"splice\"\ndrain_timeout = \"200ms\"\n\
             tcp_keepalive = {{ time = \"1s\", interval = \"1s\", probes = 1 }}\n{}[daemon.limits]\n{limit}\n\
             [[capture]]\ncgroup = \"{}\"\n[[route]]\nto = \"direct\"\n",
        node.bpffs.toml(),
        node.cgroup.path().display()
    ))?;
    let admin = Admin::of(&daemon);
    let mut app = node.hold(&echo)?;
    let flow = || -> Result<Json> { Ok(admin.json("/flows")?[0].take()) };
    // One when it was held, and each of these.
    let mut bytes = 1;
    let spliced = Instant::now();
    while flow()?["path"] != "splice" {
        assert!(spliced.elapsed() < PATIENCE, "{}", flow()?);
        assert_eq!(ask(&mut app, "ping")?, "ok");
        bytes += 1;
    }
    let exchanges = if reason == "max_duration" { 1 } else { 5 };
    for _ in 0..exchanges {
        assert_eq!(ask(&mut app, "ping")?, "ok");
        bytes += 1;
        let now = flow()?;
        assert_eq!((&now["path"], &now["sent"]), (&"splice".into(), &bytes.into()), "{now}");
        assert_eq!(now["received"], bytes, "{now}");
    }
    match reason {
        "killed" => {
            let id = flow()?["id"].as_str().unwrap_or_default().to_owned();
            assert_eq!(admin.post(&format!("/flows/{id}/kill"))?.status, 200);
        }
        "idle_timeout" => {
            let talking = Instant::now();
            while talking.elapsed() < TALKS {
                assert_eq!(ask(&mut app, "ping")?, "ok", "it is not idle");
                bytes += 1;
                rest(Duration::from_millis(250));
            }
        }
        "drain_timeout" => daemon.process().signal(Signal::SIGTERM)?,
        "target_timeout" => {
            // What is sent to it goes nowhere from now on, and nothing comes back.
            let port = echo.addr().port().to_string();
            for way in ["--dport", "--sport"] {
                let mut drop_all = world.net().command(programs::system("iptables")?);
                drop_all.args(["-w", "-A", "INPUT", "-p", "tcp", way, &port, "-j", "DROP"]);
                process::output(&mut drop_all)?;
            }
        }
        _ => {}
    }
    let (last, sent) = if reason == "target_timeout" { ("ping", bytes + 1) } else { ("read", bytes) };
    assert_eq!(ask(&mut app, last)?, "ECONNRESET", "{reason}");
    let parts = [
        "flow ended".to_owned(),
        format!("reason={reason}"),
        format!("sent={sent} "),
        format!("received={bytes} "),
    ];
    wait_for(&format!("{parts:?}"), PATIENCE, || {
        let parts: Vec<_> = parts.iter().map(String::as_str).collect();
        (!lines_with(&daemon.log(), &parts).is_empty()).then_some(())
    })
    .map_err(|e| e.context(daemon.log()))?;
    daemon.process().stop()?;
    Ok(())
}

/// No spliced socket is closed with a wrong account of memory, while both directions of many connections are busy and no mailbox
/// is full.
#[test]
fn heavy_no_spliced_socket_is_closed_with_a_wrong_account_of_memory() -> Result<()> {
    /// How long one daemon has connections opened, soaked and closed.
    const LENGTH: Duration = Duration::from_secs(15);
    /// How long each is: chat and bulk take turns (`load/soak.rs`), and accounts went wrong where they did.
    const EACH: Duration = Duration::from_millis(1600);
    /// On a machine that is so slow that no flow is spliced within that, twice as long, up to this.
    const EACH_MAX: Duration = Duration::from_secs(60);
    const WARM: Duration = Duration::from_millis(400);
    let (stage, mut kernel) = (Stage::new()?, Mark::now()?);
    let mode = Mode { daemon: "relay = \"splice\"", ..COPY };
    let server = Server::start(stage.world.net(), stage.world.folder(), TARGET4, None)?;
    let (mut looked_at, mut wrong, mut mailed, mut forced, mut each) = (0, 0, 0, 0, EACH);
    let (began, wanted) = (Instant::now(), accounts_wanted());
    while looked_at < wanted {
        let mut daemon = stage.daemon(&mode, None)?;
        let (started, mut crowds) = (Instant::now(), [16, 64].into_iter().cycle());
        while started.elapsed() < LENGTH {
            let Some(connections) = crowds.next() else { break };
            let (soak, command) = (Workload::Soak { connections }, stage.program(programs::load()?, true)?);
            let mut client = Client::start(command, stage.world.folder(), server.addr(), soak, each, WARM)?;
            client.wait_ready()?;
            client.measure()?;
            client.end()?;
        }
        daemon.process().stop()?;
        let log = daemon.log();
        let counter = |name| counter_of(&log, name);
        let (here, spliced) = (counter("splice_accounts"), counter("flows_spliced"));
        assert!(here >= spliced, "{here} were looked at, two of each of {spliced} flows");
        if spliced == 0 {
            each *= 2;
            assert!(each < EACH_MAX, "nothing is spliced: {log}");
        }
        looked_at += here;
        wrong += counter("splice_accounts_wrong");
        mailed += counter("splice_mailed");
        forced += counter("splice_forced");
        println!(
            "{looked_at} sockets looked at, {wrong} wrong; {mailed} bytes by mailboxes, {forced} full; {:?}",
            began.elapsed()
        );
    }
    // Where the kernel's worker gets no processor.
    assert!(wrong <= 2 * forced, "{wrong} of {looked_at}, and {forced} flows whose mailbox was full");
    assert_eq!(kernel.warnings()?, Vec::<String>::new());
    Ok(())
}

/// Between two exchanges.
#[expect(clippy::disallowed_methods, reason = "what is idle for less than a limit is tested")]
fn rest(length: Duration) {
    thread::sleep(length);
}

/// How many spliced sockets are looked at, at least: more in `cargo xtask verify`.
#[expect(clippy::disallowed_methods, reason = "a test has no command line of its own")]
fn accounts_wanted() -> u64 {
    std::env::var("TUNNEL_SPLICE_ACCOUNTS").ok().and_then(|n| n.parse().ok()).unwrap_or(1)
}
