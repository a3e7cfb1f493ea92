//! Real servers, Debian's, in `net`.

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use nix::unistd::User;

use crate::{
    netns::{self, NetNs},
    process::{self, Process},
    programs,
    wait::{PATIENCE, wait_for},
    world::{TARGET4, World},
};

/// A server, which ends when it drops.
#[derive(Debug)]
pub struct Server {
    addr: SocketAddr,
    process: Process,
}

impl Server {
    /// Where it is.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    fn start(world: &World, name: &str, port: u16, command: Command) -> Result<Self> {
        let process = listening(world.net(), &[port], name, world.folder(), command)?;
        Ok(Self { addr: SocketAddr::new(TARGET4, port), process })
    }
}

/// Starts a program, and returns when something on its host listens on every one of `ports`.
pub fn listening(
    host: &NetNs,
    ports: &[u16],
    name: &str,
    folder: &Path,
    command: Command,
) -> Result<Process> {
    let mut process = Process::spawn(name, folder, command)?;
    wait_for(&format!("{name} to listen"), PATIENCE, || {
        let ended = process.ended().is_ok_and(|status| status.is_some());
        let listens = ports.iter().all(|port| host.listens(*port).is_ok_and(|listens| listens));
        (listens || ended).then_some(())
    })
    .with_context(|| format!("{process}"))?;
    ensure!(process.ended()?.is_none(), "{name} ended at once\n{process}");
    Ok(process)
}

/// Python's web server, with the files of a folder.
pub fn http(world: &World, files: &Path) -> Result<Server> {
    const PORT: u16 = 80;
    let mut command = world.net().command("python3");
    command.args(["-m", "http.server", &PORT.to_string(), "--bind", &TARGET4.to_string(), "--directory"]);
    command.arg(files);
    Server::start(world, "http-server", PORT, command)
}

/// The same over TLS, several clients at once; it shows the gateway's certificate.
pub fn https(world: &World, files: &Path) -> Result<Server> {
    const PORT: u16 = 443;
    const SCRIPT: &str = "import functools, http.server, ssl, sys\n\
        ip, port, folder, cert, key = sys.argv[1:]\n\
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)\n\
        server = http.server.ThreadingHTTPServer((ip, int(port)), handler)\n\
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)\n\
        context.load_cert_chain(cert, key)\n\
        server.socket = context.wrap_socket(server.socket, server_side=True)\n\
        server.serve_forever()\n";
    let who = world.pki().named("gateway");
    let mut command = world.net().command("python3");
    command.args(["-c", SCRIPT, &TARGET4.to_string(), &PORT.to_string()]);
    command.arg(files).arg(who.cert).arg(who.key);
    Server::start(world, "https-server", PORT, command)
}

/// Redis, without persistence.
pub fn redis(world: &World) -> Result<Server> {
    const PORT: u16 = 6379;
    let mut command = world.net().command(programs::system("redis-server")?);
    command.args([
        "--bind",
        &TARGET4.to_string(),
        "--port",
        &PORT.to_string(),
        "--save",
        "",
        "--protected-mode",
        "no",
    ]);
    command.current_dir(world.folder());
    Server::start(world, "redis-server", PORT, command)
}

/// PostgreSQL with a fresh database, open to user `postgres` from everywhere without a password.
pub fn postgres(world: &World) -> Result<Server> {
    const PORT: u16 = 5432;
    let programs = postgres_programs()?;
    let user =
        User::from_name("postgres")?.or(User::from_name("nobody")?).context("no user for PostgreSQL")?;
    let data = world.folder().join("postgres");
    fs::create_dir(&data)?;
    // Another user has to get through to it.
    fs::set_permissions(world.folder(), fs::Permissions::from_mode(0o711))?;
    chown(&data, Some(user.uid.as_raw()), Some(user.gid.as_raw()))?;
    let as_user = |mut command: Command, program: &str| {
        command.args(["--reuid", &user.uid.to_string(), "--regid", &user.gid.to_string(), "--clear-groups"]);
        // Changing the user clears the death signal (prctl(2)).
        command
            .args(["--pdeathsig", "INT"])
            .arg(programs.join(program))
            .arg("-D")
            .arg(&data)
            .current_dir("/");
        command
    };
    let mut init = as_user(netns::plain("setpriv"), "initdb");
    init.args(["--username=postgres", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C"]);
    process::output(&mut init)?;
    fs::write(data.join("pg_hba.conf"), "host all all all trust\n")?;
    let mut serve = as_user(world.net().command("setpriv"), "postgres");
    let (listen, port) = (format!("listen_addresses={TARGET4}"), format!("port={PORT}"));
    for setting in [listen.as_str(), &port, "fsync=off", "unix_socket_directories="] {
        serve.args(["-c", setting]);
    }
    Server::start(world, "postgres", PORT, serve)
}

/// Debian keeps them outside of `PATH`, one folder for each version.
fn postgres_programs() -> Result<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let found = versions.map(|version| version.path().join("bin")).find(|bin| bin.join("initdb").is_file());
    found.context("PostgreSQL is not installed: cargo xtask setup installs it")
}
