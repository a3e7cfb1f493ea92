//! Signal dispositions, signal mask, limits and variables that this process was started with, for a command that is to have the
//! same.
//!
//! A shell, systemd and `nohup` pass information to their children by ignored signals, by the signal mask, by limits, and by
//! variables that name a process.
//!
//! # Invariants
//! - What is restored was read before this process, or its runtime, changed it.
//! - Between fork and exec only async-signal-safe calls are made (signal-safety(7)), and nothing is allocated.

#![expect(
    unsafe_code,
    reason = "signal dispositions, the environment between fork and exec, and what runs before main"
)]

use std::{
    ffi::{CStr, c_char, c_int},
    fs::File,
    io::{self, Write as _},
    mem::MaybeUninit,
    os::{fd::AsRawFd as _, unix::process::CommandExt as _},
    process::{Child, Command},
    ptr,
    sync::atomic::{AtomicBool, Ordering},
};

use nix::sys::{
    resource::{Resource, getrlimit, rlim_t, setrlimit},
    signal::{SigSet, SigmaskHow, Signal, pthread_sigmask},
};

/// Whether SIGPIPE was ignored when this process began. Rust's runtime ignores it before `main` (std::rt::init), and has a
/// child's reset to the default whatever it was.
static SIGPIPE_IGNORED: AtomicBool = AtomicBool::new(false);

/// Runs before the runtime: the C library calls what an object lists in this section (System V ABI, "Initialization and
/// Termination Functions").
// SAFETY: the section is an array of pointers to functions of the C ABI. Whoever is called there may ignore its arguments, and
// this one asks for nothing that is not there before `main`: it makes one system call and stores to an atomic.
#[unsafe(link_section = ".init_array")]
#[used]
static BEFORE_MAIN: extern "C" fn() = note_sigpipe;

extern "C" fn note_sigpipe() {
    SIGPIPE_IGNORED.store(is_ignored(libc::SIGPIPE), Ordering::Relaxed);
}

/// Whether this process ignores a signal.
pub fn is_ignored(signal: c_int) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: sigaction(2) without a new action writes the present one, and fails only for what is no signal.
    unsafe {
        libc::sigaction(signal, ptr::null(), action.as_mut_ptr()) == 0
            && action.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

/// Signals that say that this process itself is broken: nobody else's.
const FAULTS: [Signal; 7] = [
    Signal::SIGSEGV,
    Signal::SIGBUS,
    Signal::SIGFPE,
    Signal::SIGILL,
    Signal::SIGTRAP,
    Signal::SIGSYS,
    Signal::SIGABRT,
];

/// What a command gets that this process was given, and had to change for itself.
pub struct Inherited {
    mask: SigSet,
    ignored: [(c_int, bool); 2],
    /// Soft and hard limit of descriptors.
    nofile: (rlim_t, rlim_t),
    meant_for: MeantFor,
}

impl Inherited {
    /// Takes it down, blocks every signal but those of faults, and has SIGCHLD tell of children: where it is ignored, the
    /// kernel keeps no status of them (wait(2), "Notes"). Returns the signals that are blocked now.
    ///
    /// To be called before any thread starts: threads inherit the mask, and one descriptor then gets every signal.
    pub fn take() -> io::Result<(Self, SigSet)> {
        let nofile = getrlimit(Resource::RLIMIT_NOFILE)?;
        let ignored = [
            (libc::SIGPIPE, SIGPIPE_IGNORED.load(Ordering::Relaxed)),
            (libc::SIGCHLD, is_ignored(libc::SIGCHLD)),
        ];
        let mut blocked = SigSet::all();
        FAULTS.into_iter().for_each(|fault| blocked.remove(fault));
        let mut mask = SigSet::empty();
        pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&blocked), Some(&mut mask))?;
        // SAFETY: no handler is installed; also without SA_NOCLDSTOP and SA_NOCLDWAIT from now on.
        unsafe { set(libc::SIGCHLD, libc::SIG_DFL) }?;
        Ok((Self { mask, ignored, nofile, meant_for: MeantFor::new(std::process::id()) }, blocked))
    }

    /// Starts a command with it, in the cgroup whose `cgroup.procs` this is, open for writing.
    pub fn spawn(mut self, mut command: Command, procs: &File) -> io::Result<Child> {
        let fd = procs.as_raw_fd();
        // SAFETY: between fork and exec only async-signal-safe calls are made (signal-safety(7)), and nothing is allocated or
        // locked: write(2) to a descriptor that is borrowed until spawn has returned, and those of `give`. The child has one
        // thread there, and `self` is the closure's, which lives in `command` and so stays where it is until exec.
        unsafe {
            command.pre_exec(move || {
                if libc::write(fd, b"0".as_ptr().cast(), 1) != 1 {
                    return Err(io::Error::last_os_error());
                }
                self.give()
            });
        }
        // The closure is dropped with the command: no later spawn finds another file behind the number.
        command.spawn()
    }

    /// Gives it to the process that calls, between fork and exec.
    ///
    /// # Safety
    /// The process has one thread, and `self` stays where it is until exec.
    unsafe fn give(&mut self) -> io::Result<()> {
        setrlimit(Resource::RLIMIT_NOFILE, self.nofile.0, self.nofile.1)?;
        for (signal, ignored) in self.ignored {
            // SAFETY: no handler is installed.
            unsafe { set(signal, if ignored { libc::SIG_IGN } else { libc::SIG_DFL }) }?;
        }
        // SAFETY: as the caller promises.
        unsafe { self.meant_for.us() };
        // Last: what waits is delivered now.
        Ok(pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&self.mask), None)?)
    }
}

/// Sets a signal's disposition, without flags.
///
/// # Safety
/// `disposition` is `SIG_DFL` or `SIG_IGN`.
unsafe fn set(signal: c_int, disposition: libc::sighandler_t) -> io::Result<()> {
    // SAFETY: zero is valid for every field of this structure of C: no flags, an empty mask.
    let mut action = unsafe { MaybeUninit::<libc::sigaction>::zeroed().assume_init() };
    action.sa_sigaction = disposition;
    // SAFETY: a valid action.
    match unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Variables with which systemd says which process something is meant for: sockets that it has opened (sd_listen_fds(3)), a
/// watchdog (sd_watchdog_enabled(3)), a unit's standard output (systemd.exec(5)).
const PROCESS: [&CStr; 3] = [c"LISTEN_PID=", c"WATCHDOG_PID=", c"SYSTEMD_EXEC_PID="];
/// Says the same of the sockets by the inode of a pidfd, which nobody knows beforehand. Where it is missing, the id decides.
const INODE: &CStr = c"LISTEN_PIDFDID=";
/// The longest of [`PROCESS`], the digits of a pid (pid_t is an i32), a zero byte.
const ROOM: usize = 17 + 10 + 1;

/// What was meant for this process, and is the command's instead.
struct MeantFor {
    /// This process, as it stands in a variable.
    old: Vec<u8>,
    /// Room for the variables of the command.
    new: [[u8; ROOM]; PROCESS.len()],
}

unsafe extern "C" {
    /// environ(7).
    static mut environ: *mut *mut c_char;
}

impl MeantFor {
    fn new(pid: u32) -> Self {
        Self { old: pid.to_string().into_bytes(), new: [[0; ROOM]; PROCESS.len()] }
    }

    /// Has the variables that name the parent name the process that calls.
    ///
    /// # Safety
    /// As [`Inherited::give`].
    unsafe fn us(&mut self) {
        let mut sockets = false;
        // SAFETY: nobody else uses the environment of a process with one thread.
        let mut at = unsafe { environ };
        // SAFETY: the environment is null, or an array of C strings that ends with a null pointer.
        while !at.is_null() && unsafe { !(*at).is_null() } {
            // SAFETY: as above.
            let variable = unsafe { CStr::from_ptr(*at) }.to_bytes();
            for (name, new) in PROCESS.iter().zip(&mut self.new) {
                if variable.strip_prefix(name.to_bytes()) == Some(&self.old) {
                    sockets |= *name == PROCESS[0];
                    let mut text = &mut new[..];
                    // It fits, and zeroes are behind it.
                    let _fits = text.write_all(name.to_bytes());
                    let _fits = write!(text, "{}", std::process::id());
                    // SAFETY: as above; `new` stays until exec, as the caller promises.
                    unsafe { *at = new.as_mut_ptr().cast() };
                }
            }
            // SAFETY: the null pointer at the end was not reached.
            at = unsafe { at.add(1) };
        }
        if sockets {
            // SAFETY: as the caller promises.
            unsafe { remove(INODE) };
        }
    }
}

/// Removes variables from the environment.
///
/// # Safety
/// The process has one thread.
unsafe fn remove(name: &CStr) {
    // SAFETY: as in `MeantFor::us`; what is written lies at or before what is read.
    unsafe {
        let (mut from, mut to) = (environ, environ);
        if from.is_null() {
            return;
        }
        while !(*from).is_null() {
            if !CStr::from_ptr(*from).to_bytes().starts_with(name.to_bytes()) {
                *to = *from;
                to = to.add(1);
            }
            from = from.add(1);
        }
        *to = ptr::null_mut();
    }
}
