//! `cargo xtask demo`: an unmodified curl fetches a page from a server that it has no route to.
//!
//! Two network namespaces, joined by one cable, are the two hosts. Invariant: whatever ends the demo, a
//! failure and Ctrl-C included, takes the namespaces, the processes and the keys along.

use std::{
    fs::{self, File},
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    leftovers::Snapshot,
    run::{self, Checkout, Interrupted, blue, bold, dim, green, red, sh, took},
    setup::{self, Group},
};

/// The cable: the gateway's end, and the node's.
const GATEWAY: &str = "10.77.0.1";
const NODE: &str = "10.77.0.2";

/// The server's address, which exists behind the gateway only, and what the gateway lets through.
const SERVER: &str = "10.200.0.10";
const ALLOW: &str = "10.200.0.0/24:80";

/// HBONE's port.
const PORT: u16 = 15008;

/// What the page says; the demo checks that it came back.
const PAGE: &str = "Hello from a network that this node has no route to.\n";

/// A daemon that is not up by then will not be; a slow machine needs less than one second.
const START: Duration = Duration::from_secs(15);

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Builds and shows the optimised program; takes minutes the first time.
    #[arg(long)]
    release: bool,

    /// Shows this program instead of building one.
    #[arg(long, value_name = "PROGRAM", conflicts_with = "release")]
    tunnel: Option<PathBuf>,
}

pub(crate) fn run(checkout: &Checkout, args: &Args) -> Result<()> {
    let started = Instant::now();
    run::require_root("making network namespaces and loading kernel programs, which the demo does,")?;
    setup::ensure(checkout, &[Group::Demo])?;
    run::catch_interrupts()?;
    let tunnel = match &args.tunnel {
        Some(program) => program.canonicalize().with_context(|| format!("{}", program.display()))?,
        None => checkout.build_tunnel(args.release)?,
    };
    sweep()?;

    let before = Snapshot::take(checkout);
    let played = play(tunnel);
    let clean = before.compare(checkout);
    played?;
    clean?;
    println!("\n{} everything is put away again {}", green("ok "), dim(&took(started)));
    Ok(())
}

fn play(tunnel: PathBuf) -> Result<()> {
    let mut stage = Stage::new(tunnel);
    let outcome = stage.set().and_then(|()| stage.perform());
    if let Err(error) = &outcome
        && !error.is::<Interrupted>()
    {
        stage.show_logs();
    }
    outcome
}

/// The two hosts and what runs on them.
struct Stage {
    tunnel: PathBuf,
    /// The namespaces' names; the process id keeps two demos apart.
    node: String,
    net: String,
    /// Keys, the page, logs.
    folder: PathBuf,
    daemons: Vec<(&'static str, Child)>,
}

impl Stage {
    fn new(tunnel: PathBuf) -> Self {
        let pid = std::process::id();
        Self {
            tunnel,
            node: format!("td-node-{pid}"),
            net: format!("td-net-{pid}"),
            folder: std::env::temp_dir().join(format!("tunnel-demo-{pid}")),
            daemons: Vec::new(),
        }
    }

    /// Hosts, keys, the gateway and the server.
    fn set(&mut self) -> Result<()> {
        let (pid, folder) = (std::process::id(), self.folder.clone());
        fs::DirBuilder::new().mode(0o700).create(&folder)?;

        say("two hosts: a node, and the gateway of a network that the node has no route to");
        for name in [&self.node, &self.net] {
            sh(&format!("ip netns add {name}"))?;
            sh(&format!("ip -n {name} link set lo up"))?;
        }
        let (node_end, net_end) = (format!("tdn{pid}"), format!("tdg{pid}"));
        sh(&format!(
            "ip -n {} link add {node_end} type veth peer name {net_end} netns {}",
            self.node, self.net
        ))?;
        for (name, end, address) in [(&self.node, &node_end, NODE), (&self.net, &net_end, GATEWAY)] {
            sh(&format!("ip -n {name} address add {address}/30 dev {end}"))?;
            sh(&format!("ip -n {name} link set {end} up"))?;
        }
        sh(&format!("ip -n {} address add {SERVER}/32 dev lo", self.net))?;
        show(&format!(
            "{}  {NODE} ──────────── {GATEWAY}  {} ── {SERVER}\n\
             curl                                     tunnel gateway     HTTP server",
            self.node, self.net
        ));
        show(&dim("the node's routes:"));
        show(run::output(Command::new("ip").args(["-n", &self.node, "route"]))?.trim_end());

        say("a throwaway CA, and one certificate for each side");
        let pki = folder.join("pki");
        self.pki(&["init"], &[&pki])?;
        let dir = [Path::new("--dir"), &pki];
        self.pki(&["issue", "--id", "spiffe://demo.tunnel/node", "--name", "node"], &dir)?;
        self.pki(
            &["issue", "--id", "spiffe://demo.tunnel/gateway", "--name", "gateway", "--ip", GATEWAY],
            &dir,
        )?;

        say("behind the gateway: a web server; on the gateway: tunnel gateway");
        fs::create_dir(folder.join("www"))?;
        fs::write(folder.join("www/index.html"), PAGE)?;
        let mut server = self.on(&self.net, "KILL");
        server
            .args(["python3", "-m", "http.server", "80", "--bind", SERVER, "--directory"])
            .arg(folder.join("www"));
        self.start("web server", server, 80)?;

        let mut gateway = self.on(&self.net, "TERM");
        gateway.arg(&self.tunnel).args(["gateway", "--listen", &format!("{GATEWAY}:{PORT}")]);
        gateway.args(self.credentials("gateway")).args(["--allow", ALLOW]);
        show(&dim(&typed(&gateway, &self.folder)));
        self.start("gateway", gateway, PORT)
    }

    fn perform(&self) -> Result<()> {
        let url = format!("http://{SERVER}/");
        say("on the node, curl by itself:");
        let mut route = self.on(&self.node, "KILL");
        route.args(["ip", "route", "get", SERVER]);
        show(&dim(&typed(&route, &self.folder)));
        let unreachable = self.finish("ip route", route)?;
        show(&red(String::from_utf8_lossy(&unreachable.stderr).trim_end()));
        let mut curl = self.on(&self.node, "KILL");
        curl.args(["curl", "--silent", "--show-error", "--max-time", "5", &url]);
        show(&dim(&typed(&curl, &self.folder)));
        let plain = self.finish("plain curl", curl)?;
        show(&red(String::from_utf8_lossy(&plain.stderr).trim_end()));
        ensure!(
            !plain.status.success(),
            "the node reaches the server without the tunnel: this shows nothing"
        );

        say("on the node, the same curl, its connections captured:");
        let mut captured = self.on(&self.node, "TERM");
        captured.arg(&self.tunnel).args(["exec", "--gateway", &format!("{GATEWAY}:{PORT}")]);
        captured.args(self.credentials("node")).args([
            "--verify",
            "spiffe://demo.tunnel/gateway",
            "--stats",
            "--",
        ]);
        captured.args(["curl", "--silent", "--show-error", "--max-time", "20", &url]);
        show(&dim(&typed(&captured, &self.folder)));
        let fetched = self.finish("tunnel exec", captured)?;
        let page = String::from_utf8_lossy(&fetched.stdout);
        show(&green(page.trim_end()));
        say("what was carried:");
        show(String::from_utf8_lossy(&fetched.stderr).trim_end());
        ensure!(fetched.status.success(), "curl failed through the tunnel ({})", fetched.status);
        ensure!(page == PAGE, "the page that came back is not the one that is served");
        Ok(())
    }

    /// A command on a host: in its network, with the rest of this machine, and ended when the demo is killed.
    fn on(&self, namespace: &str, end_with: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{namespace}")).args(["setpriv", "--pdeathsig", end_with]);
        command.stdin(Stdio::null());
        command
    }

    fn pki(&self, args: &[&str], paths: &[&Path]) -> Result<()> {
        let mut command = Command::new(&self.tunnel);
        command.arg("pki").args(args).args(paths);
        show(&dim(&typed(&command, &self.folder)));
        run::output(&mut command).map(drop)
    }

    fn credentials(&self, name: &str) -> [String; 6] {
        let file = |name: &str| self.folder.join("pki").join(name).display().to_string();
        [
            "--ca".into(),
            file("ca.pem"),
            "--cert".into(),
            file(&format!("{name}.pem")),
            "--key".into(),
            file(&format!("{name}-key.pem")),
        ]
    }

    /// Starts a daemon in the net namespace and waits until it listens.
    fn start(&mut self, name: &'static str, mut command: Command, port: u16) -> Result<()> {
        let log = File::create(self.folder.join(format!("{name}.log")))?;
        command.stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().with_context(|| format!("{name} does not start"))?;
        self.daemons.push((name, child));
        let end = Instant::now() + START;
        loop {
            let filter = format!("sport = :{port}");
            if !run::output(Command::new("ip").args(["netns", "exec", &self.net, "ss", "-Hltn", &filter]))?
                .is_empty()
            {
                return Ok(());
            }
            let ended = self.daemons.last_mut().and_then(|(_, child)| child.try_wait().ok().flatten());
            if let Some(status) = ended {
                anyhow::bail!("the {name} ended at once ({status})");
            }
            ensure!(Instant::now() < end, "the {name} does not listen on port {port}");
            run::pause(Duration::from_millis(50))?;
        }
    }

    /// Runs a command to its end; what it said goes through files, so that it cannot block on us.
    fn finish(&self, name: &str, mut command: Command) -> Result<Output> {
        let [out, err] = ["out", "err"].map(|kind| self.folder.join(format!("{name}.{kind}")));
        command.stdout(File::create(&out)?).stderr(File::create(&err)?);
        let mut child = command.spawn().with_context(|| format!("{name} does not start"))?;
        let status = run::wait(&mut child, || ())?;
        Ok(Output { status, stdout: fs::read(&out)?, stderr: fs::read(&err)? })
    }

    fn show_logs(&self) {
        for (name, _) in &self.daemons {
            say(&format!("the {name}'s log:"));
            let log = fs::read(self.folder.join(format!("{name}.log"))).unwrap_or_default();
            show(String::from_utf8_lossy(&log).trim_end());
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        for (name, child) in self.daemons.iter_mut().rev() {
            if let Err(error) = run::stop(child) {
                eprintln!("the {name} (process {}) did not end: {error}", child.id());
            }
        }
        for name in [&self.node, &self.net] {
            if Path::new("/run/netns").join(name).exists()
                && let Err(error) = sh(&format!("ip netns delete {name}"))
            {
                eprintln!("remove the namespace {name} by hand: {error}");
            }
        }
        if self.folder.exists()
            && let Err(error) = fs::remove_dir_all(&self.folder)
        {
            eprintln!("remove {} by hand: {error}", self.folder.display());
        }
    }
}

/// Removes what a demo left that was killed with SIGKILL.
fn sweep() -> Result<()> {
    let orphans = |folder: &Path, prefixes: &[&str]| -> Vec<String> {
        let names = fs::read_dir(folder).into_iter().flatten().flatten();
        let names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
        let of_dead = |name: &String| {
            let owner = prefixes.iter().find_map(|prefix| name.strip_prefix(prefix));
            owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists())
        };
        names.filter(of_dead).collect()
    };
    for name in orphans(Path::new("/run/netns"), &["td-node-", "td-net-"]) {
        sh(&format!("ip netns delete {name}"))?;
    }
    for name in orphans(&std::env::temp_dir(), &["tunnel-demo-"]) {
        fs::remove_dir_all(std::env::temp_dir().join(name))?;
    }
    Ok(())
}

fn say(text: &str) {
    println!("\n{} {}", blue("──"), bold(text));
}

fn show(text: &str) {
    for line in text.lines() {
        println!("   {line}");
    }
}

/// A command as it would be typed on its host, folded before options.
fn typed(command: &Command, folder: &Path) -> String {
    const WIDTH: usize = 96;
    let words: Vec<_> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| {
            let word = word.to_string_lossy().replace(&format!("{}/", folder.display()), "");
            if word.ends_with("/tunnel") { "tunnel".to_owned() } else { word }
        })
        .collect();
    let own = words.iter().position(|word| word == "--pdeathsig").map_or(0, |at| at + 2);
    let mut lines = vec!["$".to_owned()];
    for (at, word) in words.iter().enumerate().skip(own) {
        let value = words.get(at + 1).filter(|next| !next.starts_with('-')).map_or(0, String::len);
        let line = lines.last().map_or(0, |line| line.chars().count());
        if word.starts_with('-') && line + word.len() + value > WIDTH {
            lines.push("   ".to_owned());
        }
        if let Some(line) = lines.last_mut() {
            line.push(' ');
            line.push_str(word);
        }
    }
    lines.join(" \\\n")
}
