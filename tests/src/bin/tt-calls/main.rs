//! One named behaviour on a connected socket, and what the program that shows it can observe: lines `KEY=VALUE` in the
//! order in which things were seen, and `done` when nothing is left to observe.
//!
//! The *subject* shows the behaviour, the *partner* is the other end. Either may be the one that connects. Before that
//! they chat: so many exchanges, a rest, and as many again, for paths that treat flows by what they have done so far.
//!
//! # Invariants
//! - The output does not depend on time: a part waits for the other part over a channel that nobody captures, and for
//!   the kernel's events on the socket; an amount that depends on buffers is printed as "some". So two runs over the
//!   same kind of path print the same, and a difference between two kinds of path is a difference in behaviour.

mod ending;
mod late;
mod readiness;
mod reading;
mod splicing;
mod sys;
mod traffic;
mod writing;

use std::{
    env, fmt,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::errno::Errno;
use tunnel_tests::pattern::{DOWN, Pattern, UP};

/// What takes longer hangs: on an emulated processor everything else is done in a third of it.
const HANGS: Duration = Duration::from_secs(45);
/// What has not come by then does not come. Less than `HANGS`, so that it is told what did not.
const PATIENCE: Duration = Duration::from_secs(20);
/// What does not come within this time is said not to come by itself: enough for a wake-up on a busy machine.
const NOTHING: Duration = Duration::from_millis(150);
/// How often it is looked whether something has come.
const LOOK: Duration = Duration::from_millis(1);

/// A behaviour: its name, what the subject does, what the partner does.
type Behaviour = (&'static str, fn(&mut End) -> Result<()>, fn(&mut End) -> Result<()>);

fn behaviours() -> Vec<Behaviour> {
    [reading::ALL, readiness::ALL, splicing::ALL, writing::ALL, ending::ALL, late::ALL, traffic::ALL].concat()
}

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            println!("failed={e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[&str]) -> Result<()> {
    let (part, how, address, control, name, chat, rest) = match words {
        ["list"] => {
            behaviours().iter().for_each(|(name, ..)| println!("{name}"));
            return Ok(());
        }
        ["connect", address] => {
            sys::alarm(HANGS);
            let stream = match TcpStream::connect(address.parse::<SocketAddr>()?) {
                Ok(stream) => stream,
                Err(e) => {
                    note::<usize>("connect", Err(Errno::from_raw(e.raw_os_error().unwrap_or_default())));
                    return Ok(());
                }
            };
            tell("connect", "ok");
            note("receive", sys::recv(&stream, &mut [0; 8], 0));
            return Ok(());
        }
        [part, how, address, control, name, chat, rest] => (part, how, address, control, name, chat, rest),
        _ => bail!("unknown: {words:?}"),
    };
    sys::alarm(HANGS);
    let behaviours = behaviours();
    let found = behaviours.iter().find(|(known, ..)| known == name);
    let (_, subject, partner) = found.with_context(|| format!("there is no behaviour {name}"))?;
    let mut end = match *how {
        "listen" => End::listen(address.parse()?, Path::new(control))?,
        "connect" => End::connect(address.parse()?, Path::new(control))?,
        _ => bail!("neither listen nor connect: {how}"),
    };
    end.chat(chat.parse()?, Duration::from_millis(rest.parse()?)).context("chatting")?;
    match *part {
        "subject" => subject(&mut end)?,
        "partner" => partner(&mut end)?,
        _ => bail!("neither subject nor partner: {part}"),
    }
    println!("done=1");
    Ok(())
}

/// What one end tells the other.
#[derive(Clone, Copy, Debug)]
#[repr(u8)]
enum Word {
    /// What the other waits to begin with.
    Go = b'g',
    /// It is all on its way.
    Sent = b's',
    /// It was all received, or looked at.
    Got = b'o',
    /// The socket is closed, or an end was said.
    Ended = b'e',
}

/// One end of the connection.
struct End {
    /// Nothing once it is closed.
    socket: Option<TcpStream>,
    control: UnixStream,
    connected: bool,
}

impl End {
    fn listen(address: SocketAddr, control: &Path) -> Result<Self> {
        let (listener, channel) = (TcpListener::bind(address)?, UnixListener::bind(control)?);
        note("listening", Ok::<_, Errno>(listener.local_addr()?));
        let (control, _) = channel.accept()?;
        let (socket, _) = listener.accept()?;
        Ok(Self { socket: Some(socket), control, connected: false })
    }

    fn connect(address: SocketAddr, control: &Path) -> Result<Self> {
        let control = UnixStream::connect(control)?;
        let socket = TcpStream::connect(address).context("connect")?;
        Ok(Self { socket: Some(socket), control, connected: true })
    }

    fn socket(&self) -> Result<&TcpStream> {
        self.socket.as_ref().context("the socket is closed")
    }

    /// close(2).
    fn close(&mut self) {
        self.socket = None;
    }

    /// Tells the other end that something was done.
    fn tell(&mut self, word: Word) -> Result<()> {
        self.control.write_all(&[word as u8]).with_context(|| format!("telling {word:?}"))
    }

    /// Waits until the other end tells this.
    fn hear(&mut self, word: Word) -> Result<()> {
        let mut heard = [0];
        self.control.read_exact(&mut heard).with_context(|| format!("waiting for {word:?}"))?;
        ensure!(heard == [word as u8], "{:?} where {word:?} should be", char::from(heard[0]));
        Ok(())
    }

    /// So many messages there and back, a rest, and as many again. Whoever connected begins.
    fn chat(&self, exchanges: u64, rest: Duration) -> Result<()> {
        let socket = self.socket()?;
        socket.set_nodelay(true)?;
        for n in 0..2 * exchanges {
            if n == exchanges {
                pause(rest);
            }
            let size = 1 + usize::try_from(n * 37 % 1000)?;
            let (mine, theirs) = (self.pattern(), self.peers_pattern());
            let mut message = vec![0; size];
            let mut say = || -> Result<()> {
                mine.fill(n * 1000, &mut message);
                (&*socket).write_all(&message).context("saying")
            };
            if self.connected {
                say()?;
            }
            let mut heard = vec![0; size];
            (&*socket).read_exact(&mut heard).context("hearing")?;
            theirs.check(n * 1000, &heard)?;
            if !self.connected {
                say()?;
            }
        }
        socket.set_nodelay(false)?;
        Ok(())
    }

    /// The bytes that this end sends.
    fn pattern(&self) -> Pattern {
        if self.connected { UP } else { DOWN }
    }

    /// The bytes that the other end sends.
    fn peers_pattern(&self) -> Pattern {
        if self.connected { DOWN } else { UP }
    }

    /// The first `length` bytes that this end sends.
    fn bytes(&self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.pattern().fill(0, &mut bytes);
        bytes
    }

    /// "right" if these are the bytes that the other end sends from `offset` on.
    fn judge(&self, offset: usize, bytes: &[u8]) -> String {
        match self.peers_pattern().check(offset as u64, bytes) {
            Ok(()) => format!("{} right", bytes.len()),
            Err(e) => format!("{} bytes, {e}", bytes.len()),
        }
    }

    /// Sends all of it, however many calls that takes.
    fn send_all(&self, bytes: &[u8]) -> Result<()> {
        self.socket()?.write_all_of(bytes)
    }

    /// Waits until so many bytes can be read, as FIONREAD counts them: how many can then.
    fn wait_queued(&self, wanted: usize) -> Result<usize> {
        let end = Instant::now() + PATIENCE;
        loop {
            let queued = usize::try_from(sys::ioctl(self.socket()?, sys::FIONREAD)?)?;
            if queued >= wanted || Instant::now() > end {
                return Ok(queued);
            }
            pause(LOOK);
        }
    }

    /// Waits until poll(2) tells one of these events: all that it tells then.
    fn wait_events(&self, wanted: i16) -> Result<i16> {
        Ok(sys::poll(self.socket()?, wanted, PATIENCE)?)
    }
}

/// What std has for streams that may be interrupted.
trait WriteAll {
    fn write_all_of(&self, bytes: &[u8]) -> Result<()>;
}

impl WriteAll for TcpStream {
    fn write_all_of(&self, bytes: &[u8]) -> Result<()> {
        (&*self).write_all(bytes).context("sending")
    }
}

/// Prints an observation.
fn note<T: fmt::Display>(key: &str, seen: Result<T, Errno>) {
    match seen {
        Ok(value) => println!("{key}={value}"),
        Err(errno) => println!("{key}={errno:?}"),
    }
}

/// Prints an observation that is no error.
fn tell(key: &str, value: impl fmt::Display) {
    println!("{key}={value}");
}

/// Between two looks, and where nothing is to happen.
#[expect(clippy::disallowed_methods, reason = "a process of its own that waits is what is wanted")]
fn pause(length: Duration) {
    thread::sleep(length);
}

/// poll's events, by their names.
fn poll_names(events: i16) -> String {
    names(u32::from(events.cast_unsigned()))
}

/// epoll's events, by their names: poll's have the same values.
fn names(events: u32) -> String {
    const NAMES: [(i32, &str); 7] = [
        (libc::EPOLLIN, "IN"),
        (libc::EPOLLPRI, "PRI"),
        (libc::EPOLLOUT, "OUT"),
        (libc::EPOLLERR, "ERR"),
        (libc::EPOLLHUP, "HUP"),
        (libc::EPOLLRDHUP, "RDHUP"),
        (libc::EPOLLRDNORM, "RDNORM"),
    ];
    let set = NAMES.iter().filter(|(bit, _)| events & bit.cast_unsigned() != 0).map(|(_, name)| *name);
    let set: Vec<_> = set.collect();
    if set.is_empty() { "none".to_owned() } else { set.join("|") }
}
