//! The admin interface beside thousands of live flows: what a scrape costs, that `/flows` and `tunnel top` hold all of them, and the
//! page in a browser.
//!
//! They take minutes, a quiet machine or a browser: `cargo xtask verify --only flows`.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use tunnel_tests::{
    PATIENCE, TARGET4, World,
    admin::{Admin, config, over_tcp, tunnel},
    daemon::Daemon,
    load::{
        Workload,
        driver::{Client, Server},
    },
    node::Node,
    process::output,
    programs, wait_for,
};

const TCP: &str = "127.0.0.1:15000";
/// How often metrics are scraped to measure one.
const SCRAPES: u32 = 20;

/// CPU time of a process so far, of all its threads (proc_pid_stat(5)).
fn cpu(pid: u32) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<_> = stat.rsplit(')').next().context("no fields")?.split_whitespace().collect();
    let ticks = |field: usize| fields.get(field).and_then(|f| f.parse::<u64>().ok()).context("no time");
    let hertz = u64::try_from(nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.context("no ticks")?)?;
    // utime and stime are fields 14 and 15; the state, behind the name, is 3.
    Ok(Duration::from_millis((ticks(11)? + ticks(12)?) * 1000 / hertz))
}

/// A daemon with as many idle flows as `TUNNEL_FLOWS` says, and `with` while they are there.
fn with_flows(
    default: usize,
    with: impl FnOnce(&World, &mut Daemon, &Admin, usize, u64) -> Result<()>,
) -> Result<()> {
    #[expect(clippy::disallowed_methods, reason = "a test has no command line of its own")]
    let flows = env::var("TUNNEL_FLOWS").ok().and_then(|n| n.parse().ok()).unwrap_or(default);
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let server = Server::start(world.net(), world.folder(), TARGET4, None)?;
    let node = Node::new(&world)?;
    let text = config(&node, &gateway, &format!("listen = \"{TCP}\""));
    let mut daemon = node.daemon(&text.replacen("[daemon]\n", "[daemon]\nmax_flows = 19000\n", 1))?;
    let admin = Admin::of(&daemon);
    let before = daemon.process().memory()?;
    let mut command = world.node().command(programs::load()?);
    node.cgroup.adopt(&mut command)?;
    let length = Duration::from_secs(600);
    let workload = Workload::Idle { connections: u32::try_from(flows)? };
    let mut client =
        Client::start(command, world.folder(), server.addr(), workload, length, Duration::from_secs(1))?;
    client.wait_ready()?;
    wait_for("the flows", 10 * PATIENCE, || {
        let live = admin.metric("tunnel_flows_live{path=\"copy\"}").ok()?;
        (live >= f64::from(u32::try_from(flows).ok()?)).then_some(())
    })?;
    with(&world, &mut daemon, &admin, flows, before)
}

/// With 18,000 live flows a scrape takes less than 50 ms of CPU; `/flows` and `tunnel top` hold all of them.
#[test]
#[ignore = "measures: cargo xtask verify --only flows"]
fn a_scrape_beside_thousands_of_flows_is_cheap() -> Result<()> {
    with_flows(18_000, |_, daemon, admin, flows, before| {
        let memory = daemon.process().memory()?;
        println!("{flows} idle flows: {} bytes of resident memory each", (memory - before) / flows as u64);
        let pid = daemon.process().id();
        let mut took = Vec::new();
        let start = cpu(pid)?;
        for _ in 0..SCRAPES {
            let asked = Instant::now();
            ensure!(admin.get("/metrics")?.status == 200, "no metrics");
            took.push(asked.elapsed());
        }
        let each = (cpu(pid)? - start) / SCRAPES;
        took.sort_unstable();
        println!("a scrape: {each:?} of CPU, {:?} at the median", took[took.len() / 2]);
        let asked = Instant::now();
        let listed = admin.json("/flows")?;
        println!("/flows: {:?}", asked.elapsed());
        assert_eq!(listed.as_array().map(Vec::len), Some(flows));
        let (code, top) = tunnel(daemon, &["top", "--once", "--json"])?;
        let top: serde_json::Value = serde_json::from_str(&top)?;
        assert_eq!((code, top["flows"].as_array().map(Vec::len)), (0, Some(flows)));
        assert!(each < Duration::from_millis(50), "{each:?}");
        Ok(())
    })
}

/// The page shows 10,000 flows in a browser, light, dark and narrow; what it looks like is left in the target folder.
#[test]
#[ignore = "takes a browser: cargo xtask verify --only flows"]
fn the_page_shows_ten_thousand_flows_in_a_browser() -> Result<()> {
    with_flows(10_000, |world, _, _, flows, _| {
        let answer =
            over_tcp(world.node(), TCP.parse()?, "GET", "/healthz/ready", &format!("Host: {TCP}\r\n"))?;
        assert_eq!(answer.status, 200);
        let folder = programs::tunnel()?.parent().context("no folder")?.join("page");
        fs::create_dir_all(&folder)?;
        let dom = output(browser(world, "light")?.arg("--dump-dom").arg(url()))?;
        let count = format!("{flows} of ");
        assert!(dom.contains(&count) && dom.contains(&format!("{TARGET4}:")), "{dom:.2000}");
        assert!(dom.matches("<tr>").count() > 500, "the first 500 are drawn");
        for (name, scheme, size) in
            [("light", "light", "1280,1600"), ("dark", "dark", "1280,1600"), ("narrow", "light", "420,1600")]
        {
            let file = folder.join(format!("{name}.png"));
            output(&mut shot(browser(world, scheme)?, &file, size))?;
            assert!(fs::metadata(&file)?.len() > 10_000, "{}", file.display());
            println!("{}", file.display());
        }
        Ok(())
    })
}

fn url() -> String {
    format!("http://{TCP}/")
}

fn shot(mut browser: Command, file: &Path, size: &str) -> Command {
    browser.arg(format!("--screenshot={}", file.display())).arg(format!("--window-size={size}")).arg(url());
    browser
}

/// Chromium without a screen, with a profile of its own.
fn browser(world: &World, scheme: &str) -> Result<Command> {
    let profile: PathBuf = world.folder().join(format!("chromium-{scheme}"));
    let mut command = world.node().command(programs::system("chromium")?);
    command.args([
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
    ]);
    // In blink::mojom::PreferredColorScheme dark is 0 and light 1.
    command.arg(format!("--blink-settings=preferredColorScheme={}", u8::from(scheme == "light")));
    command.args(["--virtual-time-budget=8000", "--timeout=60000"]);
    command.arg(format!("--user-data-dir={}", profile.display()));
    Ok(command)
}
