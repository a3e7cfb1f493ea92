//! `tunnel exec` is not there, as far as the command and its caller can tell.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result};
use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, kill, sigaction},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use tunnel_tests::{
    Finished, PATIENCE, TARGET4, World, leftovers, process, programs, target,
    terminal::{Guarded, Terminal, spawn_on},
    wait_for,
};

/// Runs `sh -c SCRIPT` with a gateway that it does not need.
fn shell(script: &str) -> Result<Finished> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    world.exec(&gateway).run(&["sh", "-c", script])
}

/// `tunnel exec` exits with the status of its command.
#[test]
fn the_commands_status_is_ours() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    for status in [0, 1, 64, 77, 255] {
        let done = world.exec(&gateway).run(&["sh", "-c", &format!("exit {status}")])?;
        assert_eq!(done.status.code(), Some(status), "{done}");
        assert_eq!((done.stdout.as_str(), done.stderr.as_str()), ("", ""), "we say nothing ourselves");
    }
    Ok(())
}

/// A command that a signal ends gives 128 plus the signal as the status.
#[test]
fn a_command_that_a_signal_ends_is_128_and_the_signal() -> Result<()> {
    for (signal, code) in [("KILL", 137), ("TERM", 143), ("SEGV", 139)] {
        let done = shell(&format!("kill -{signal} $$"))?;
        assert_eq!(done.status.code(), Some(code), "{done}");
    }
    Ok(())
}

/// A missing command gives the status 127, one that cannot be executed 126.
#[test]
fn a_command_that_is_not_there_is_127_and_one_that_cannot_be_run_126() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let done = world.exec(&gateway).run(&["no-such-command"])?;
    assert_eq!(done.status.code(), Some(127), "{done}");
    assert!(done.stderr.contains("no-such-command") && done.stderr.contains("not found"), "{done}");
    let file = world.file("not-a-program", "text")?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644))?;
    let done = world.exec(&gateway).run(&[&file])?;
    assert_eq!(done.status.code(), Some(126), "{done}");
    assert!(done.stderr.contains("not-a-program"), "{done}");
    Ok(())
}

/// The command runs with the caller's limit of file descriptors.
#[test]
fn the_command_has_the_callers_limit_of_descriptors() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    // A test is a process of its own. The daemon raises its limit; select(2) in the command would suffer.
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, 700, hard)?;
    let done = world.exec(&gateway).run(&["sh", "-c", "ulimit -S -n; ulimit -H -n"])?;
    assert_eq!(done.stdout, format!("700\n{hard}\n"), "{done}");
    Ok(())
}

/// The command inherits environment, working directory and standard input.
#[test]
fn the_command_has_our_environment_folder_and_standard_input() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let folder = world.folder().join("here");
    fs::create_dir(&folder)?;
    let exec = world.exec(&gateway).env("COLOUR", "blue and green").folder(&folder);
    let mut app = exec.spawn(&["sh", "-c", "echo \"$COLOUR\"; pwd; cat; echo said >&2"])?;
    app.tell("from standard input")?;
    let done = app.finish()?;
    let said = format!("blue and green\n{}\nfrom standard input\n", folder.canonicalize()?.display());
    assert_eq!((done.stdout, done.stderr), (said, "said\n".to_owned()));
    Ok(())
}

/// Signals to `tunnel exec` are forwarded to the command.
#[test]
fn signals_reach_the_command() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    use Signal::{SIGALRM, SIGHUP, SIGINT, SIGIO, SIGPWR, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGVTALRM};
    for signal in [SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGALRM, SIGVTALRM, SIGIO, SIGPWR] {
        let name = signal.as_str().trim_start_matches("SIG");
        let script = format!("trap 'echo got {name}; exit 9' {name}; echo ready; read forever");
        let mut app = world.exec(&gateway).spawn(&["sh", "-c", &script])?;
        app.says("ready")?;
        app.process().signal(signal)?;
        app.says(&format!("got {name}"))?;
        let done = app.ended()?;
        assert_eq!(done.status.code(), Some(9), "{done}");
    }
    Ok(())
}

/// A forwarded signal ends a command that does not handle it.
#[test]
fn a_command_without_a_handler_is_ended_by_the_signal() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let mut app = world.exec(&gateway).spawn(&["sh", "-c", "echo ready; exec cat"])?;
    app.says("ready")?;
    app.process().signal(Signal::SIGINT)?;
    assert_eq!(app.ended()?.status.code(), Some(130));
    Ok(())
}

/// Whatever the caller gave its child (ignored signals, as systemd does with SIGPIPE and nohup with SIGHUP; a mask;
/// descriptors; limits), the command has: what it has without us is the judge.
#[test]
fn the_command_has_what_its_caller_gave_and_nothing_of_ours() -> Result<()> {
    const SHOW: &str = "grep -E '^(Sig(Blk|Ign|Cgt)|Umask|NoNewPrivs|Cap...|Groups|Seccomp):' /proc/self/status; ulimit -a; \
                        nice; cat /proc/self/oom_score_adj; ls /proc/self/fd; cat <&7";
    use Signal::{SIGCHLD, SIGHUP, SIGPIPE, SIGTSTP, SIGUSR1, SIGUSR2};
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let given = world.file("given", "a file that was open\n")?;
    let ignored: [&[Signal]; 4] =
        [&[], &[SIGPIPE], &[SIGCHLD], &[SIGPIPE, SIGCHLD, SIGHUP, SIGTSTP, SIGUSR1]];
    for ignored in ignored {
        for blocked in [&[][..], &[SIGUSR2, SIGCHLD]] {
            let mask: SigSet = blocked.iter().copied().collect();
            let give = |mut command: Command| {
                let (ignored, file) = (ignored.to_vec(), File::open(&given)?);
                let prepare = move || {
                    let ignore = SigAction::new(SigHandler::SigIgn, SaFlags::empty(), SigSet::empty());
                    for signal in &ignored {
                        // SAFETY: no handler is installed.
                        unsafe { sigaction(*signal, &ignore) }?;
                    }
                    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o027));
                    // SAFETY: nobody else uses this descriptor here.
                    let seven = unsafe { nix::unistd::dup2_raw(&file, 7) }?;
                    // It may have been that one, which closes itself.
                    fcntl(&seven, FcntlArg::F_SETFD(FdFlag::empty()))?;
                    std::mem::forget(seven);
                    Ok(mask.thread_set_mask()?)
                };
                // SAFETY: between fork and exec the closure makes system calls; it does not allocate.
                unsafe { command.pre_exec(prepare) };
                process::output(&mut command)
            };
            let mut plain = world.node().command("sh");
            plain.args(["-c", SHOW]);
            let plain = give(plain)?;
            assert!(plain.contains("a file that was open"), "{plain}");
            let ours = give(world.exec(&gateway).command(&["sh", "-c", SHOW])?)?;
            assert_eq!(ours, plain, "{ignored:?} ignored, {blocked:?} blocked");
        }
    }
    Ok(())
}

/// A caller that ignores SIGCHLD, so that the kernel forgets the status of its children, gets the command's from us.
#[test]
fn the_commands_status_is_ours_also_for_a_caller_that_ignores_sigchld() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    for (script, code) in [("exit 7", 7), ("kill -KILL $$", 137)] {
        let mut command = world.exec(&gateway).command(&["sh", "-c", script])?;
        let ignore = || {
            let ignore = SigAction::new(SigHandler::SigIgn, SaFlags::empty(), SigSet::empty());
            // SAFETY: no handler is installed.
            unsafe { sigaction(Signal::SIGCHLD, &ignore) }?;
            Ok(())
        };
        // SAFETY: between fork and exec the closure makes one system call.
        unsafe { command.pre_exec(ignore) };
        let output = command.output()?;
        assert_eq!(process::code(output.status), code, "{output:?}");
    }
    Ok(())
}

/// What systemd says by a process id (sockets that it has opened, a watchdog) is said of the command, if it was said of us.
#[test]
fn sockets_and_a_watchdog_that_were_for_us_are_for_the_command() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    const SHOW: &str =
        "echo $$ $LISTEN_PID $WATCHDOG_PID $SYSTEMD_EXEC_PID; echo $LISTEN_FDS ${LISTEN_PIDFDID-gone} $LAST";
    // As whoever starts us does: the id is known when the program is about to run.
    let pass = |pid: &str| -> Result<String> {
        let script = format!(
            "export LISTEN_PIDFDID=5 LISTEN_FDS=2 LISTEN_PID={pid} WATCHDOG_PID={pid} SYSTEMD_EXEC_PID={pid} LAST=1; exec \"$@\""
        );
        let ours = world.exec(&gateway).command(&["sh", "-c", SHOW])?;
        let mut command = world.node().command_ended_by("sh", Signal::SIGTERM);
        command.args(["-c", &script, "sh"]).arg(ours.get_program()).args(ours.get_args());
        process::output(&mut command)
    };
    let said = pass("$$")?;
    let (ids, rest) = said.split_once('\n').context("two lines")?;
    let ids: Vec<_> = ids.split(' ').collect();
    assert!(ids.len() == 4 && ids.iter().all(|id| *id == ids[0]), "{said}");
    assert_eq!(rest, "2 gone 1\n");
    // Somebody else's stay somebody else's.
    let said = pass("1")?;
    assert!(said.contains(" 1 1 1\n2 5 1\n"), "{said}");
    Ok(())
}

/// Waits until a child has stopped, and returns by which signal.
fn stopped(child: &Child) -> Result<Signal> {
    let pid = Pid::from_raw(child.id().cast_signed());
    wait_for("tunnel exec to stop", PATIENCE, || {
        match waitpid(pid, Some(WaitPidFlag::WUNTRACED | WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Stopped(_, signal)) => Some(Ok(signal)),
            Ok(WaitStatus::StillAlive) => None,
            other => Some(Err(anyhow::anyhow!("{other:?}"))),
        }
    })?
}

/// A command that stops has stopped for its caller too, however it was stopped, and goes on when we are continued.
#[test]
fn a_command_that_stops_stops_us_and_goes_on_when_we_do() -> Result<()> {
    use Signal::{SIGCONT, SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU};
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    for signal in [SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU] {
        let name = signal.as_str().trim_start_matches("SIG");
        for script in [
            format!("kill -{name} $$; exit 5"),
            // We are told to, and pass it on.
            "echo ready; read x; exit 5".to_owned(),
        ] {
            if signal == SIGSTOP && script.contains("read") {
                continue;
            }
            let mut command = world.exec(&gateway).command(&["sh", "-c", &script])?;
            // A job: its group has somebody outside who would continue it (POSIX, "orphaned process group").
            command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped());
            let mut guarded = Guarded(command.spawn()?);
            let child = &mut guarded.0;
            world.note_exec(child.id());
            let pid = Pid::from_raw(child.id().cast_signed());
            if script.contains("read") {
                let mut line = [0; 6];
                child.stdout.as_mut().context("a pipe")?.read_exact(&mut line)?;
                kill(pid, signal)?;
            }
            assert_eq!(stopped(child)?, signal, "{script}");
            kill(pid, SIGCONT)?;
            drop(child.stdin.take());
            assert_eq!(status(child)?, 5, "{script}");
        }
    }
    Ok(())
}

/// The command runs in a cgroup of its own, which is removed afterwards.
#[test]
fn the_command_runs_in_a_group_of_its_own_that_is_gone_afterwards() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let mut app = world.exec(&gateway).spawn(&["sh", "-c", "cat /proc/self/cgroup; echo ready; read x"])?;
    app.says("ready")?;
    let name = format!("tunnel-exec-{}", app.process().id());
    assert!(app.process().stdout().contains(&name), "{}", app.process());
    assert_eq!(leftovers::cgroups(std::slice::from_ref(&name)).len(), 1);
    // Its end of input makes `read` fail, which nobody minds.
    let _done = app.finish()?;
    assert_eq!(leftovers::cgroups(&[name]), [""; 0].map(std::path::PathBuf::from));
    Ok(())
}

/// Processes that the command leaves behind are ended and named.
#[test]
fn what_the_command_leaves_running_is_ended_and_named() -> Result<()> {
    let done = shell("sleep 1000 & echo pid=$!; sleep 1001 >/dev/null 2>&1 & exit 3")?;
    assert_eq!(done.status.code(), Some(3), "{done}");
    let pid = done.value("pid")?;
    assert!(done.stderr.contains("terminated 2 processes") && done.stderr.contains(pid), "{done}");
    leftovers::gone("processes", || {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        if command.starts_with(b"sleep") { vec![pid] } else { Vec::new() }
    })
}

/// `tunnel exec` works under `ip netns exec`, which mounts another /sys.
#[test]
fn it_works_where_ip_netns_exec_has_replaced_sys() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::duplex(1000))?;
    let exec = world.exec(&gateway).by_ip_netns_exec();
    let seen = exec.run(&["sh", "-c", "grep -c cgroup2 /proc/mounts; ls /sys/fs/cgroup | wc -l"])?;
    assert_eq!(seen.stdout, "0\n0\n", "this shows nothing: a cgroup2 hierarchy is in sight");
    let done = exec.run_app(&["duplex", &target.addr().to_string(), "1000"])?;
    assert!(done.success(), "{done}");
    assert_eq!(done.flows()?.len(), 1, "{done}");
    Ok(())
}

/// When `tunnel exec` is killed, connections of its command are reset, new ones are refused, and nothing
/// leaves in plaintext.
///
/// Failure: daemon-killed.
#[test]
fn when_we_are_killed_the_commands_connections_are_reset_and_refused_and_never_plaintext() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().allow("10.77.0.0/30").start()?;
    // One that the node could reach by itself.
    let target = tunnel_tests::Target::start(world.net(), (tunnel_tests::NET4, 0).into(), target::echo())?;
    let mut app = world.exec(&gateway).spawn_app(&["hold", &target.addr().to_string()])?;
    app.says("held")?;
    app.tell("ping")?;
    app.says("ping=ok")?;
    let pid = app.process().id();
    app.process().kill()?;

    // The application is an orphan now; its input and output are still ours.
    let mut says = |command: &str, key: &str| {
        app.tell(command)?;
        let what = format!("the orphan to answer {command}");
        wait_for(&what, PATIENCE, || {
            let out = app.process().stdout();
            let line = out.lines().rfind(|line| line.starts_with(key)).map(str::to_owned);
            line.filter(|line| line != "ping=ok")
        })
    };
    assert_eq!(says("connect", "connect=")?, "connect=ECONNREFUSED");
    assert_eq!(says("read", "read=")?, "read=ECONNRESET");
    assert_eq!(target.peers().len(), 1, "only what was carried");
    app.process().hang_up();
    let group = format!("tunnel-exec-{pid}");
    leftovers::gone("processes", || {
        let groups = leftovers::cgroups(std::slice::from_ref(&group));
        groups
            .iter()
            .filter(|g| !fs::read_to_string(g.join("cgroup.procs")).unwrap_or_default().is_empty())
            .cloned()
            .collect()
    })?;
    // The next one removes what the killed one left.
    let done = world.exec(&gateway).run(&["true"])?;
    assert!(done.success(), "{done}");
    assert!(leftovers::cgroups(&[group]).is_empty());
    Ok(())
}

/// `--stats` prints a table to standard error.
#[test]
fn stats_are_a_table_on_standard_error() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let target = world.serve(TARGET4, target::duplex(2048))?;
    let done =
        world.exec(&gateway).switch("--stats").run_app(&["duplex", &target.addr().to_string(), "2048"])?;
    assert_eq!(done.stdout, "duplex=2048\n");
    let lines: Vec<&str> = done.stderr.lines().collect();
    assert_eq!(lines.len(), 2, "{done}");
    assert!(lines[0].starts_with("DESTINATION"), "{done}");
    for word in [
        &target.addr().to_string(),
        &gateway.addr().to_string(),
        tunnel_tests::pki::GATEWAY_ID,
        "2.0 KiB",
        "closed",
    ] {
        assert!(lines[1].contains(word), "no {word}: {done}");
    }
    Ok(())
}

/// Two `tunnel exec` run beside each other without interference.
#[test]
fn two_at_a_time_do_not_disturb_each_other() -> Result<()> {
    let world = World::new()?;
    let (one, two) = (world.gateway().start()?, world.gateway().listen("10.77.0.2:15009".parse()?).start()?);
    let target = world.serve(TARGET4, target::echo())?;
    let addr = target.addr().to_string();
    let mut first = world.exec(&one).spawn_app(&["hold", &addr])?;
    let mut second = world.exec(&two).spawn_app(&["hold", &addr])?;
    for app in [&mut first, &mut second] {
        app.says("held")?;
        app.tell("ping")?;
        app.says("ping=ok")?;
    }
    let done = first.finish()?;
    assert!(done.success(), "{done}");
    second.tell("connect")?;
    second.says("connect=ok")?;
    assert_eq!(second.finish()?.flows()?.len(), 2);
    Ok(())
}

/// Starts `tunnel exec` with a terminal, as a shell's job in the foreground.
fn on_terminal(world: &World, words: &[&str]) -> Result<(Terminal, Child)> {
    let gateway = world.gateway().start()?;
    let (terminal, slave) = Terminal::open()?;
    let child = spawn_on(world.exec(&gateway).command(words)?, slave)?;
    world.note_exec(child.id());
    Ok((terminal, child))
}

fn status(child: &mut Child) -> Result<i32> {
    let status = wait_for("tunnel exec to end", PATIENCE, || child.try_wait().transpose())?;
    Ok(process::code(status?))
}

/// The command has the controlling terminal.
#[test]
fn the_command_has_our_terminal() -> Result<()> {
    let world = World::new()?;
    let script = "test -t 0 && test -t 1 && test -t 2 && : </dev/tty && echo terminal; read line; echo \"heard $line\"";
    let (mut terminal, mut child) = on_terminal(&world, &["sh", "-c", script])?;
    terminal.shows("terminal")?;
    terminal.keys.write_all(b"keys\n")?;
    terminal.shows("heard keys")?;
    assert_eq!(status(&mut child)?, 0);
    Ok(())
}

/// Ctrl-C interrupts the command once, and `tunnel exec` exits with its status.
#[test]
fn ctrl_c_ends_the_command_once_and_we_end_with_its_status() -> Result<()> {
    let world = World::new()?;
    let script = "trap 'echo interrupted; n=1$n' INT; echo ready; while [ -z \"$n\" ]; do read line; done; echo times $n";
    let (mut terminal, mut child) = on_terminal(&world, &["sh", "-c", script])?;
    terminal.shows("ready")?;
    terminal.keys.write_all(&[3])?;
    // A shell runs a trap before it reads or once it has read, and a signal may come in between: it reads a line.
    // Where it has ended by then, nobody does.
    let _ended = terminal.keys.write_all(b"\n");
    terminal.shows("times 1\r\n")?;
    assert_eq!(status(&mut child)?, 0);

    let app = programs::app()?.display().to_string();
    let (mut terminal, mut child) = on_terminal(&world, &[&app, "reconnect", "127.0.0.1:1"])?;
    terminal.shows("ready")?;
    terminal.keys.write_all(&[3])?;
    assert_eq!(status(&mut child)?, 130);
    Ok(())
}

/// The terminal of a shell with jobs is the shell's again when a command stops itself, and the command's after `fg`.
#[test]
fn a_shell_has_its_terminal_back_when_the_command_suspends_itself_and_can_continue_it() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let (mut terminal, slave) = Terminal::open()?;
    let script = "echo suspending; kill -TSTP $$; read line; echo \"heard $line\"";
    let ours = world.exec(&gateway).command(&["sh", "-c", script])?;
    let words = std::iter::once(ours.get_program()).chain(ours.get_args());
    let quoted = |word: &std::ffi::OsStr| format!("'{}'", word.to_string_lossy().replace('\'', r"'\''"));
    let line = words.map(quoted).collect::<Vec<_>>().join(" ");
    let job = world.file("job.sh", format!("exec {line}\n"))?;
    let mut shell = world.node().command("sh");
    shell.args(["-i", "-m"]);
    let mut shell = Guarded(spawn_on(shell, slave)?);
    terminal.keys.write_all(format!("sh {}\n", job.display()).as_bytes())?;
    terminal.shows("suspending")?;
    terminal.shows("Stopped")?;
    terminal.keys.write_all(b"echo sh''ell\n")?;
    terminal.shows("shell")?;
    terminal.keys.write_all(b"fg\nkeys\n")?;
    terminal.shows("heard keys")?;
    terminal.keys.write_all(b"exit 3\n")?;
    assert_eq!(status(&mut shell.0)?, 3);
    Ok(())
}
