//! Names that peers ask for: looked up as the system's files say, at nobody else's expense, and no longer than for as
//! long as somebody wants to know.

use std::{fs, net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use h2::{
    SendStream,
    client::{ResponseFuture, SendRequest},
};
use tokio::{task, time};
use tunnel_tests::{
    NET4, PATIENCE, TARGET4, TARGET6, Target, World,
    daemon::Daemon,
    dns::Dns,
    gateway::PORT,
    peer::{self, connect_request},
    pki::Credentials,
    target, wait_for,
};

/// Well below what a name server gets for its answer (5 s), and above what a busy machine needs.
const AT_ONCE: Duration = Duration::from_secs(3);

fn at() -> SocketAddr {
    SocketAddr::new(NET4, PORT)
}

/// A gateway with one worker that lets everybody reach the names of `test`; what its files say.
fn gateway(world: &World, hosts: &str, resolv: &str) -> Result<(Daemon, [PathBuf; 2])> {
    let config = format!(
        "[daemon]\nworkers = 1\n{}[[listener]]\naddress = \"{}\"\nmax_streams = 1500\n[[route]]\nto = \"direct\"\n\
         [[policy]]\nidentity = \"any\"\ntarget = [\"*.test\", \"*.hangs.test\", \"web\"]\n",
        world.pki().named("gateway").toml(),
        at()
    );
    let files = [world.file("hosts", hosts)?, world.file("resolv.conf", resolv)?];
    let seen = [(files[0].clone(), "/etc/hosts"), (files[1].clone(), "/etc/resolv.conf")];
    Ok((Daemon::start_seeing(world, world.net(), &config, &seen)?, files))
}

/// A connection to it, driven until the runtime ends.
async fn connected(who: &Credentials) -> Result<SendRequest<Bytes>> {
    let (requests, connection) = peer::connect(at(), peer::tls(who)?).await?;
    task::spawn_local(connection);
    Ok(requests)
}

async fn send(
    requests: &mut SendRequest<Bytes>,
    authority: &str,
) -> Result<(ResponseFuture, SendStream<Bytes>)> {
    let mut ready = requests.clone().ready().await?;
    Ok(ready.send_request(connect_request(authority)?, false)?)
}

/// The status, if it comes at once.
async fn status(requests: &mut SendRequest<Bytes>, authority: &str) -> Result<u16> {
    let (response, _body) = send(requests, authority).await?;
    let answered =
        time::timeout(AT_ONCE, response).await.with_context(|| format!("{authority}: no answer yet"))?;
    Ok(answered?.status().as_u16())
}

/// UDP sockets of the gateway's host besides the name server's.
fn asking(world: &World) -> Result<usize> {
    world.net().run(|| {
        let tables = ["/proc/thread-self/net/udp", "/proc/thread-self/net/udp6"].map(fs::read_to_string);
        let [v4, v6] = tables;
        let of_a_question = |line: &&str| {
            // Port 53 in the kernel's words; its own is the second of a line.
            line.split_whitespace().nth(1).is_some_and(|own| own.contains(':') && !own.ends_with(":0035"))
        };
        Ok((v4? + &v6?).lines().filter(of_a_question).count())
    })
}

fn authority(name: &str, target: &Target) -> String {
    format!("{name}:{}", target.addr().port())
}

/// With 1,200 names of one peer that no server answers for, another peer's names are dialled at once, whether the hosts
/// file knows them or a server does; and so are the first peer's own once it has given up the others.
///
/// Failure: misbehaviour.
#[test]
fn names_of_one_peer_that_hang_hold_up_nobody_elses() -> Result<()> {
    const HANGING: usize = 1200;
    let world = World::new()?;
    let other = world.pki().issue("other", "spiffe://test.tunnel/other", &[])?;
    let node = world.pki().named("node");
    let dns = Dns::start(world.net(), NET4)?;
    dns.says("web.test", &[TARGET4]);
    dns.says_nothing_of(".hangs.test");
    let (_gateway, _files) =
        gateway(&world, &format!("{TARGET4} listed.test\n"), &format!("nameserver {NET4}\n"))?;
    let target = world.serve(TARGET4, target::echo())?;
    let (listed, web) = (authority("listed.test", &target), authority("web.test", &target));
    world.node().block_on(|| async {
        let (mut hostile, mut other) = (connected(&node).await?, connected(&other).await?);
        assert_eq!(status(&mut hostile, &web).await?, 200, "with nothing else to do");
        let asked = dns.asked();
        let mut hanging = Vec::new();
        for i in 0..HANGING {
            hanging.push(send(&mut hostile, &format!("n{i}.hangs.test:80")).await?);
        }
        let several = || dns.asked() > asked + 32;
        while !several() {
            time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(status(&mut other, &listed).await?, 200, "a name of the hosts file");
        assert_eq!(status(&mut other, &web).await?, 200, "a name of the server");
        assert_eq!(status(&mut hostile, &listed).await?, 200, "what nobody is asked for waits for no turn");
        // Dropped, they are reset.
        drop(hanging);
        assert_eq!(status(&mut hostile, &web).await?, 200, "its turn is over with its requests");
        anyhow::Ok(())
    })
}

/// A request that its peer takes back takes its look-up along, however long the servers may still take.
///
/// Failure: misbehaviour.
#[test]
fn a_request_that_is_taken_back_leaves_no_look_up_behind() -> Result<()> {
    let world = World::new()?;
    let dns = Dns::start(world.net(), NET4)?;
    dns.falls_silent();
    let (_gateway, _files) =
        gateway(&world, "", &format!("nameserver {NET4}\noptions timeout:30 attempts:5\n"))?;
    let node = world.pki().named("node");
    world.node().block_on(|| async {
        let mut requests = connected(&node).await?;
        let asked = send(&mut requests, "a.hangs.test:80").await?;
        while dns.asked() == 0 {
            time::sleep(Duration::from_millis(5)).await;
        }
        drop(asked);
        // The connection has to be driven meanwhile.
        let deadline = time::Instant::now() + Duration::from_secs(5);
        while asking(&world)? > 0 {
            anyhow::ensure!(time::Instant::now() < deadline, "{} sockets are left", asking(&world)?);
            time::sleep(Duration::from_millis(5)).await;
        }
        anyhow::Ok(())
    })
}

/// A name is looked up by /etc/hosts first, then by the servers and the search list of /etc/resolv.conf; what these say is
/// seen as soon as they change.
///
/// Failure: misbehaviour.
#[test]
fn names_go_by_the_systems_files_and_by_their_newest_version() -> Result<()> {
    let world = World::new()?;
    let dns = Dns::start(world.net(), NET4)?;
    dns.says("web.one.test", &[TARGET4]);
    dns.says("web.two.test", &[TARGET6]);
    let resolv =
        |search: &str| format!("nameserver {NET4}\nsearch {search}\noptions ndots:1 timeout:1 attempts:1\n");
    let (_gateway, [hosts, conf]) = gateway(&world, "", &resolv("one.test"))?;
    let (v4, v6) = (world.serve(TARGET4, target::echo())?, world.serve(TARGET6, target::echo())?);
    let ask = |target: &Target, peers: usize| -> Result<()> {
        let answer = peer::ask(
            world.node(),
            at(),
            &world.pki().named("node"),
            connect_request(&authority("web", target))?,
        )?;
        assert_eq!(answer.status, 200, "{answer:?}");
        target.connected(peers)?;
        Ok(())
    };
    ask(&v4, 1)?;
    // In place: it is mounted where the gateway sees it.
    fs::write(&conf, resolv("no.test two.test"))?;
    ask(&v6, 1)?;
    fs::write(&hosts, format!("{TARGET4} web\n"))?;
    ask(&v4, 2)?;
    fs::write(&hosts, "")?;
    ask(&v6, 2)?;
    // A server that drops questions for IPv6 holds up no IPv4.
    dns.says_nothing_of_ipv6();
    fs::write(&conf, format!("nameserver {NET4}\nsearch one.test\noptions timeout:30\n"))?;
    let node = world.pki().named("node");
    let web = authority("web", &v4);
    let answered = world.node().block_on(|| async { status(&mut connected(&node).await?, &web).await })?;
    assert_eq!(answered, 200);
    wait_for("the sockets of the question for IPv6 to go", PATIENCE, || {
        (asking(&world).ok()? == 0).then_some(())
    })?;
    Ok(())
}
