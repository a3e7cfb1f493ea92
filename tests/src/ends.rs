//! What a byte stream with two ends promises, checked over a chain of proxies with the tests' application. Each
//! function is one promise, for any [`Way`] from the application to a target.
//!
//! # Invariants
//! - Every byte is checked at both ends, and a FIN and a reset are not taken for each other.

use std::{ffi::OsString, net::SocketAddr, sync::Arc};

use anyhow::Result;

use crate::{
    exec::Exec,
    process::Process,
    programs,
    target::{self, Handler, Target},
    wait::PATIENCE,
    world::{TARGET4, World},
};

/// How an application gets to its target.
#[derive(Clone, Copy)]
pub enum Way<'w> {
    /// It connects to the target's address, and is captured.
    Captured(&'w World, &'w Exec<'w>),
    /// It connects to a port on the node, from which a proxy leads to this one target.
    Port(&'w World, SocketAddr, SocketAddr),
}

impl Way<'_> {
    fn world(&self) -> &World {
        match self {
            Self::Captured(world, _) | Self::Port(world, ..) => world,
        }
    }

    /// A target where this way leads.
    pub fn serve(&self, handler: impl Handler) -> Result<Target> {
        match self {
            Self::Captured(world, _) => world.serve(TARGET4, handler),
            Self::Port(world, _, target) => Target::start(world.net(), *target, handler),
        }
    }

    /// Starts an application that does something with it.
    pub fn start(&self, does: &str, target: SocketAddr, more: &[&str]) -> Result<Process> {
        let app = programs::app()?;
        let words = |at: SocketAddr| {
            [vec![does.to_owned(), at.to_string()], more.iter().map(|&word| word.to_owned()).collect()]
                .concat()
        };
        let command = match self {
            Self::Captured(_, exec) => {
                let words = words(target).into_iter().map(OsString::from);
                exec.command(&[app.into_os_string()].into_iter().chain(words).collect::<Vec<_>>())?
            }
            Self::Port(world, port, _) => {
                let mut command = world.node().command(&app);
                command.args(words(*port));
                command
            }
        };
        let process = Process::spawn_with_input("app", self.world().folder(), command)?;
        if let Self::Captured(world, _) = self {
            world.note_exec(process.id());
        }
        Ok(process)
    }

    /// Runs one to its end, which has to be a good one; what it said.
    pub fn run(&self, does: &str, target: SocketAddr, bytes: u64) -> Result<String> {
        self.run_with(does, target, &[&bytes.to_string()])
    }

    /// The same, with more words.
    pub fn run_with(&self, does: &str, target: SocketAddr, more: &[&str]) -> Result<String> {
        let mut app = self.start(does, target, more)?;
        app.hang_up();
        let status = app.wait(3 * PATIENCE)?;
        assert!(status.success(), "{does} {more:?}: {status}\n{app}");
        Ok(app.stdout())
    }
}

fn says(stdout: &str, line: &str) -> bool {
    stdout.lines().any(|said| said == line)
}

/// All bytes arrive once and in order, both ways at once.
pub fn bytes_arrive(way: Way<'_>, bytes: u64) -> Result<()> {
    let target = way.serve(target::duplex(bytes))?;
    way.run("duplex", target.addr(), bytes)?;
    assert_eq!(target.outcomes(1)?, [Ok(())]);
    Ok(())
}

/// The same, and the target ends first: for a proxy that does not pass on an application's end.
pub fn bytes_arrive_until_the_target_ends(way: Way<'_>, bytes: u64) -> Result<()> {
    let target = way.serve(target::duplex_then_end(bytes))?;
    way.run("duplex", target.addr(), bytes)?;
    assert_eq!(target.outcomes(1)?, [Ok(())]);
    Ok(())
}

/// When the application has ended, it still hears the target.
pub fn its_end_is_heard_and_answered(way: Way<'_>) -> Result<()> {
    for bytes in [0, 1, 300_000] {
        let target = way.serve(target::answer_after_end())?;
        let said = way.run("half-close", target.addr(), bytes)?;
        assert!(says(&said, &format!("answer={bytes}")), "{bytes} bytes: {said}");
    }
    Ok(())
}

/// When the target has ended, the application has got everything, and hears that it has. What it says then is
/// another promise.
pub fn the_targets_end_is_heard(way: Way<'_>) -> Result<()> {
    for bytes in [0, 1, 300_000] {
        let target = way.serve(target::offer(bytes, &Arc::default()))?;
        way.run("hear-end", target.addr(), bytes)?;
    }
    Ok(())
}

/// When the target has ended, it still hears the application.
pub fn the_targets_end_is_heard_and_answered(way: Way<'_>) -> Result<()> {
    for bytes in [0, 1, 300_000] {
        let target = way.serve(target::end_then_listen(bytes))?;
        way.run("hear-end-first", target.addr(), bytes)?;
        assert_eq!(target.outcomes(1)?, [Ok(())], "{bytes} bytes");
    }
    Ok(())
}

/// A reset by the target reaches the application, and is never an end.
pub fn a_reset_of_the_target_is_a_reset(way: Way<'_>) -> Result<()> {
    for bytes in [1, 200_000] {
        let target = way.serve(target::reset_after(bytes))?;
        let said = way.run("expect-reset", target.addr(), bytes)?;
        assert!(says(&said, "ended=ECONNRESET"), "after {bytes} bytes: {said}");
        assert_eq!(target.outcomes(1)?, [Ok(())], "after {bytes} bytes");
    }
    Ok(())
}

/// A reset by the application reaches the target, and is never an end.
pub fn a_reset_of_the_application_is_a_reset(way: Way<'_>) -> Result<()> {
    for bytes in [1, 200_000] {
        let target = way.serve(target::expect_reset_after(bytes))?;
        let mut app = way.start("reset", target.addr(), &[&bytes.to_string()])?;
        // Only when everything has arrived: a reset may overtake what is on its way.
        app.wait_for_line("answered")?;
        app.tell("reset")?;
        assert!(app.wait(PATIENCE)?.success(), "{app}");
        assert_eq!(target.outcomes(1)?, [Ok(())], "after {bytes} bytes");
    }
    Ok(())
}

/// Whoever cannot be reached resets the application, and not one byte comes.
pub fn nobody_there_is_a_reset(way: Way<'_>) -> Result<()> {
    let nobody = way.serve(target::echo())?.addr();
    let said = way.run("expect-reset", nobody, 1000)?;
    assert!(says(&said, "ended=ECONNRESET") && says(&said, "received=0"), "{said}");
    Ok(())
}

/// A reset by the target, or nobody there, is an end at least, and not one byte comes that was not sent: all that some
/// proxies make of it.
pub fn without_a_target_it_ends(way: Way<'_>) -> Result<()> {
    let ended = |said: &str| says(said, "ended=ECONNRESET") || says(said, "ended=EOF");
    let resetting = way.serve(target::reset_after(1))?;
    let said = way.run("expect-reset", resetting.addr(), 1)?;
    assert!(ended(&said) && (says(&said, "received=1") || says(&said, "received=0")), "{said}");
    assert_eq!(resetting.outcomes(1)?, [Ok(())]);
    let nobody = resetting.addr();
    drop(resetting);
    let said = way.run("expect-reset", nobody, 1000)?;
    assert!(ended(&said) && says(&said, "received=0"), "{said}");
    Ok(())
}

/// All of it, but for what nobody listens to.
pub fn is_a_byte_stream(way: Way<'_>) -> Result<()> {
    its_end_is_heard_and_answered(way)?;
    the_targets_end_is_heard_and_answered(way)?;
    a_reset_of_the_target_is_a_reset(way)?;
    a_reset_of_the_application_is_a_reset(way)
}
