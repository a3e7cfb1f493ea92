//! Real programs, unmodified, captured: they work, and do not know why.

use anyhow::Result;
use tunnel_tests::{World, programs::system, servers};

/// An unmodified psql works with a PostgreSQL server that the node has no route to.
#[test]
fn psql_works_with_a_postgresql_that_the_node_has_no_route_to() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let server = servers::postgres(&world)?;
    let psql = system("psql")?;
    let (host, port) = (server.addr().ip().to_string(), server.addr().port().to_string());
    let connection = ["--no-psqlrc", "--username=postgres", "--host", &host, "--port", &port, "postgres"];
    let sql = "create table numbers as select n, md5(n::text) as hash from generate_series(1, 20000) as n;
               select count(*), md5(string_agg(hash, '' order by n)) from numbers;
               select inet_server_addr(), inet_client_addr();";
    let run = |flags: &[&str]| {
        let mut words = vec![psql.as_os_str()];
        words.extend(connection.iter().chain(flags).map(std::ffi::OsStr::new));
        world.exec(&gateway).run(&words)
    };
    let done = run(&["--quiet", "--tuples-only", "--no-align", "--command", sql])?;
    assert!(done.success(), "{done}");
    let lines: Vec<&str> = done.stdout.lines().collect();
    assert_eq!(lines.len(), 2, "{done}");
    assert!(lines[0].starts_with("20000|"), "{done}");
    assert_eq!(lines[1], format!("{host}|{}", tunnel_tests::NET4), "{done}");

    // A megabyte of rows, and back in: COPY both ways.
    let file = world.folder().join("numbers.csv");
    let copy = format!("\\copy numbers to '{}' csv", file.display());
    let done = run(&["--command", &copy])?;
    assert!(done.success() && done.stdout.contains("COPY 20000"), "{done}");
    let again = format!("\\copy numbers from '{}' csv", file.display());
    let done =
        run(&["--command", &again, "--command", "select count(*) from numbers where md5(n::text) = hash"])?;
    assert!(done.success() && done.stdout.contains("40000"), "{done}");
    Ok(())
}

/// An unmodified redis-benchmark works with a Redis server that the node has no route to.
#[test]
fn heavy_redis_benchmark_works_with_a_redis_that_the_node_has_no_route_to() -> Result<()> {
    let world = World::new()?;
    let gateway = world.gateway().start()?;
    let server = servers::redis(&world)?;
    let (host, port) = (server.addr().ip().to_string(), server.addr().port().to_string());
    let benchmark = system("redis-benchmark")?.display().to_string();
    let words =
        [&benchmark, "-h", &host, "-p", &port, "-c", "50", "-n", "20000", "-q", "-t", "ping,set,get,lpush"];
    let done = world.exec(&gateway).run(&words)?;
    assert!(done.success(), "{done}");
    for test in ["PING_INLINE", "PING_MBULK", "SET", "GET", "LPUSH"] {
        assert!(done.stdout.contains(&format!("{test}: ")), "{test}: {done}");
    }
    assert!(done.flows()?.len() >= 4 * 50, "{}", done.flows()?.len());

    let pipelined = [
        &benchmark, "-h", &host, "-p", &port, "-c", "10", "-n", "50000", "-P", "64", "-d", "1000", "-q",
        "-t", "set,get",
    ];
    let done = world.exec(&gateway).run(&pipelined)?;
    assert!(done.success(), "{done}");
    let cli = system("redis-cli")?.display().to_string();
    let done = world.exec(&gateway).run(&[&cli, "-h", &host, "-p", &port, "info", "stats"])?;
    assert!(done.success() && done.stdout.contains("total_commands_processed"), "{done}");
    Ok(())
}
