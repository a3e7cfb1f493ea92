//! Debian's proxies that accept CONNECT, in `net`, or on the node in front of another proxy.
//!
//! # Invariants
//! - Each runs in the foreground, with a configuration of its own in the world's folder, does not read `/etc`, and ends
//!   with its guard.
//! - A proxy that is not installed fails the test.

use std::{fs, net::SocketAddr};

use anyhow::Result;

use crate::{process::Process, programs, servers::listening, world::World};

/// tinyproxy: HTTP/1.1, and one connection to the target for each.
pub fn tinyproxy(world: &World, at: SocketAddr) -> Result<Process> {
    let config =
        format!("Port {}\nListen {}\nTimeout 600\nMaxClients 100\nLogLevel Critical\n", at.port(), at.ip());
    let config = world.file("tinyproxy.conf", config)?;
    let mut command = world.net().command(programs::system("tinyproxy")?);
    command.arg("-d").arg("-c").arg(config);
    listening(world.net(), &[at.port()], "tinyproxy", world.folder(), command)
}

/// squid: HTTP/1.1.
pub fn squid(world: &World, at: SocketAddr) -> Result<Process> {
    let config = format!(
        "http_port {at}\nhttp_access allow all\ncache deny all\naccess_log none\ncache_log /dev/null\n\
         cache_store_log none\npid_filename none\nnetdb_filename none\npinger_enable off\n\
         visible_hostname squid.test\nshutdown_lifetime 0 seconds\nmax_filedescriptors 1024\n\
         dns_nameservers 127.0.0.1\n"
    );
    let config = world.file("squid.conf", config)?;
    let mut command = world.net().command(programs::system("squid")?);
    command.args(["-N", "-d", "1", "-f"]).arg(config).current_dir(world.folder());
    listening(world.net(), &[at.port()], "squid", world.folder(), command)
}

/// haproxy: HTTP/2 over mTLS, passed on to a proxy that speaks HTTP/1.1.
pub fn haproxy(world: &World, at: SocketAddr, onward: SocketAddr) -> Result<Process> {
    let who = world.pki().named("gateway");
    let both = world.file("haproxy.pem", [fs::read(&who.cert)?, fs::read(&who.key)?].concat())?;
    let config = format!(
        "defaults\n  mode http\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n\
         frontend in\n  bind {at} ssl crt {} ca-file {} verify required alpn h2 ssl-min-ver TLSv1.3\n\
         \x20 default_backend proxy\nbackend proxy\n  server proxy {onward}\n",
        both.display(),
        who.ca.display()
    );
    let config = world.file("haproxy.cfg", config)?;
    let mut command = world.net().command(programs::system("haproxy")?);
    command.arg("-db").arg("-f").arg(config);
    listening(world.net(), &[at.port()], "haproxy", world.folder(), command)
}

/// nghttpx: HTTP/2 over mTLS, passed on to a proxy that speaks HTTP/1.1.
pub fn nghttpx(world: &World, at: SocketAddr, onward: SocketAddr) -> Result<Process> {
    let who = world.pki().named("gateway");
    let mut command = world.net().command(programs::system("nghttpx")?);
    command.args(["--conf=/dev/null", "--http2-proxy", "--workers=1", "--no-ocsp", "--verify-client"]);
    command.args(["--tls-min-proto-version=TLSv1.3", "--errorlog-file=/dev/stderr"]);
    command.arg(format!("--frontend={},{}", at.ip(), at.port()));
    command.arg(format!("--backend={},{}", onward.ip(), onward.port()));
    command.arg(format!("--verify-client-cacert={}", who.ca.display()));
    command.arg(who.key).arg(who.cert);
    listening(world.net(), &[at.port()], "nghttpx", world.folder(), command)
}

/// nghttpx on the node, before a proxy that takes HTTP/2 in plaintext: what its clients ask for over HTTP/1.1 are CONNECT
/// streams of one connection to that.
pub fn nghttpx_before(world: &World, at: SocketAddr, onward: SocketAddr) -> Result<Process> {
    let mut command = world.node().command(programs::system("nghttpx")?);
    command.args(["--conf=/dev/null", "--http2-proxy", "--workers=1", "--errorlog-file=/dev/stderr"]);
    command.arg(format!("--frontend={},{};no-tls", at.ip(), at.port()));
    command.arg(format!("--backend={},{};;proto=h2", onward.ip(), onward.port()));
    listening(world.node(), &[at.port()], "nghttpx", world.folder(), command)
}
