//! What `tunnel doctor` and `tunnel exec` report where a privilege or a part of the kernel is missing: run as root, as
//! nobody, and with bpf(2) failing with ENOSYS. The tests need root, and capture nothing.

use std::{
    fs, io,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::Value;

const TUNNEL: &str = env!("CARGO_BIN_EXE_tunnel");

/// Certificates, and flags for an `exec` that gets as far as capturing.
struct Identity {
    dir: tempfile::TempDir,
}

impl Identity {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        // Everybody may read it: nobody has to.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("its mode");
        let me = Self { dir };
        let path = me.dir.path().to_str().expect("UTF-8").to_owned();
        for args in [
            &["pki", "init", &path][..],
            &["pki", "issue", "--id", "spiffe://example.org/node", "--dir", &path, "--name", "node"],
        ] {
            let made = Command::new(TUNNEL).args(args).output().expect("tunnel starts");
            assert!(made.status.success(), "{made:?}");
        }
        let nobody = Some(65534);
        std::os::unix::fs::chown(me.path("node-key.pem"), nobody, nobody).expect("its owner");
        me
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn exec(&self, command: &mut Command) -> Output {
        command.args(["exec", "--gateway", "127.0.0.1:1", "--ca"]).arg(self.path("ca.pem"));
        command.arg("--cert").arg(self.path("node.pem")).arg("--key").arg(self.path("node-key.pem"));
        run(command.args(["--", "echo", "it ran"]))
    }
}

fn run(command: &mut Command) -> Output {
    assert!(nix::unistd::geteuid().is_root(), "loading programs takes root: run the tests as root");
    command.env_remove("TUNNEL_LOG").output().expect("it starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// `tunnel`, as a user without any privilege.
fn as_nobody(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "nobody", "--regid", "nogroup", "--clear-groups"]).arg(program);
    command
}

/// `tunnel`, on a kernel that knows no bpf(2).
fn without_bpf() -> Command {
    fn filter() -> io::Result<()> {
        let op = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter {
            code: u16::try_from(code).expect("16 bits"),
            jt,
            jf,
            k,
        };
        let errno = u32::try_from(libc::ENOSYS).expect("positive");
        let bpf = u32::try_from(libc::SYS_bpf).expect("positive");
        // The first word of struct seccomp_data is the system call's number.
        let mut program = [
            op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
            op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, bpf),
            op(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | errno),
            op(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
        ];
        let filter = libc::sock_fprog { len: 4, filter: program.as_mut_ptr() };
        // SAFETY: the filter and the program that it points to live for the call, which copies them.
        let set = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) };
        if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
    let mut command = Command::new(TUNNEL);
    // SAFETY: between fork and exec only prctl(2) is called; the filter is on the stack.
    unsafe { command.pre_exec(filter) };
    command
}

fn findings(output: &Output) -> Vec<Value> {
    let all: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"));
    all.as_array().expect("an array").clone()
}

fn failed(findings: &[Value]) -> Vec<&str> {
    findings.iter().filter(|f| f["level"] == "fail").map(|f| f["check"].as_str().expect("a name")).collect()
}

#[test]
fn as_root_the_doctor_finds_everything_and_says_so_as_json() {
    let output = run(Command::new(TUNNEL).args(["doctor", "--json"]));
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let findings = findings(&output);
    assert_eq!(failed(&findings), Vec::<&str>::new());
    for finding in &findings {
        for key in ["check", "found", "remedy"] {
            assert!(finding[key].is_string(), "{finding}");
        }
        let (ok, level) = (finding["ok"].as_bool(), finding["level"].as_str());
        assert_eq!(ok, Some(matches!(level, Some("ok" | "info"))), "{finding}");
        // What is not well comes with its remedy.
        assert!(ok == Some(true) || finding["remedy"] != "", "{finding}");
    }
    for check in ["kernel", "capabilities", "cgroup2", "bpffs", "program capture_connect4", "SO_NETNS_COOKIE"]
    {
        assert!(findings.iter().any(|f| f["check"] == check), "{check} is missing: {findings:?}");
    }
    let output = run(Command::new(TUNNEL).arg("doctor"));
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let shown = text(&output.stdout);
    assert!(shown.ends_with("\nCapture works here.\n"), "{shown}");
    assert!(!shown.contains('\x1b'), "colours where there is no terminal: {shown}");
}

#[test]
fn without_privilege_the_doctor_and_exec_end_with_77_and_name_the_capabilities() {
    let identity = Identity::new();
    // Where the checkout lies, nobody may have no access.
    let program = identity.path("tunnel");
    fs::copy(TUNNEL, &program).expect("a copy of the program");

    let output = run(as_nobody(&program).args(["doctor", "--json"]));
    assert_eq!(output.status.code(), Some(77), "{output:?}");
    let findings = findings(&output);
    let capabilities = findings.iter().find(|f| f["check"] == "capabilities").expect("it is looked at");
    let exec = identity.exec(&mut as_nobody(&program));
    assert_eq!(exec.status.code(), Some(77), "{exec:?}");
    assert_eq!(text(&exec.stdout), "", "the command ran");
    for name in ["CAP_NET_ADMIN", "CAP_SYS_ADMIN", "CAP_BPF"] {
        assert!(capabilities["found"].as_str().is_some_and(|f| f.contains(name)), "{capabilities}");
        assert!(text(&exec.stderr).contains(name), "{exec:?}");
    }
    assert!(failed(&findings).contains(&"SO_MARK"), "{findings:?}");
}

#[test]
fn without_the_kernels_bpf_the_doctor_and_exec_end_with_69_and_the_command_does_not_run() {
    let output = run(without_bpf().args(["doctor", "--json"]));
    assert_eq!(output.status.code(), Some(69), "{output:?}");
    let findings = findings(&output);
    assert_eq!(failed(&findings), ["bpf maps"]);
    let maps = findings.iter().find(|f| f["check"] == "bpf maps").expect("it is looked at");
    let remedy = maps["remedy"].as_str().expect("a text");
    assert!(remedy.contains("mode = \"redirect\""), "another way to capture is named: {remedy}");

    let exec = Identity::new().exec(&mut without_bpf());
    assert_eq!(exec.status.code(), Some(69), "{exec:?}");
    assert_eq!(text(&exec.stdout), "", "the command ran");
    let said = text(&exec.stderr);
    assert!(said.contains("not implemented") && said.contains("tunnel doctor"), "{said}");
}
