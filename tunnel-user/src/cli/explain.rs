//! `tunnel explain`: where a connection would go, and why.

use clap::Args;

use super::{
    client::{Client, DaemonArgs, encoded},
    table::printable,
};
use crate::{
    admin::view::{Explanation, Step},
    model::flow::Target,
    process::exit::Failure,
    routing::router::Verdict,
};

/// Arguments of `tunnel explain`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sudo tunnel explain --to 10.2.3.4:443
  sudo tunnel explain --to 10.2.3.4:443 --cgroup /sys/fs/cgroup/system.slice/app.service
  sudo tunnel explain --to db.internal:5432 --listener mesh --identity spiffe://example.org/ns/a/sa/b")]
pub struct ExplainArgs {
    /// Which daemon.
    #[command(flatten)]
    pub daemon: DaemonArgs,
    /// What the connection is for: an address, or, of a listener's peer, a name, and a port.
    #[arg(long, value_name = "HOST:PORT")]
    pub to: Target,
    /// Of an application in this capture, by its name, cgroup or unit. Default: the first capture.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["cgroup", "listener"])]
    pub capture: Option<String>,
    /// Of an application in this cgroup.
    #[arg(long, value_name = "PATH", conflicts_with = "listener")]
    pub cgroup: Option<String>,
    /// Of a peer of this listener, by its name or address.
    #[arg(long, value_name = "NAME")]
    pub listener: Option<String>,
    /// The identity that this peer has proved.
    #[arg(long, value_name = "ID", requires = "listener")]
    pub identity: Option<String>,
    /// The server name in the TLS that the connection carries (SNI).
    #[arg(long, value_name = "NAME", conflicts_with = "http_host")]
    pub sni: Option<String>,
    /// The host of the HTTP/1 request that the connection carries.
    #[arg(long, value_name = "NAME")]
    pub http_host: Option<String>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// The text.
pub fn run(args: &ExplainArgs) -> Result<String, Failure> {
    let to = args.to.to_string();
    let parameters = [
        ("to", Some(&to)),
        ("capture", args.capture.as_ref()),
        ("cgroup", args.cgroup.as_ref()),
        ("listener", args.listener.as_ref()),
        ("identity", args.identity.as_ref()),
        ("sni", args.sni.as_ref()),
        ("http_host", args.http_host.as_ref()),
    ];
    let given = parameters.iter().filter_map(|(name, value)| Some(format!("{name}={}", encoded((*value)?))));
    let path = format!("/explain?{}", given.collect::<Vec<_>>().join("&"));
    let client = Client::new(&args.daemon)?;
    if args.json {
        return Ok(String::from_utf8_lossy(&client.get(&path)?).into_owned());
    }
    client.read::<Explanation>(&path).map(|explanation| text(&explanation))
}

fn text(explanation: &Explanation) -> String {
    let Explanation { to, by, capture, policy, routes, decision, upstreams } = explanation;
    let mut out = format!("{} to {to}\n", if by.is_empty() { "a connection" } else { by });
    let step = |what: &str, step: &Option<Step>| {
        let line = |Step { passes, why }: &Step| {
            format!("  {what}: {}: {}\n", if *passes { "yes" } else { "no" }, printable(why))
        };
        step.as_ref().map(line).unwrap_or_default()
    };
    out += &step("captured", capture);
    out += &step("allowed", policy);
    for route in routes {
        let says = match route.verdict {
            Verdict::Takes => "takes it".to_owned(),
            Verdict::Depends => "takes it if its first bytes match".to_owned(),
            Verdict::NotMet => format!("does not match: {}", route.unmet.join(", ")),
            Verdict::Behind => "is not asked: an earlier route takes it".to_owned(),
        };
        out += &format!("  route {}: {says}\n", route.route);
    }
    out += &format!("-> {}\n", printable(decision));
    for share in upstreams {
        out += &format!("  upstream {} ({:.0} % of such flows)\n", share.upstream, share.percent);
        if let Some(why) = &share.unavailable {
            out += &format!("    no endpoint: {}\n", printable(why));
        }
        for endpoint in &share.endpoints {
            let state = if endpoint.available > 0 { "available" } else { "not available" };
            let last = if endpoint.last_error.is_empty() {
                String::new()
            } else {
                format!("; last error: {}", printable(&endpoint.last_error))
            };
            out +=
                &format!("    endpoint {}: {state}, {} streams{last}\n", endpoint.address, endpoint.streams);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{admin::view::Share, routing::router::Explained};

    #[test]
    fn every_step_and_every_route_says_why() {
        let route = |route, verdict, unmet: &[&str]| Explained {
            route,
            verdict,
            unmet: unmet.iter().map(|u| (*u).to_owned()).collect(),
        };
        let text = text(&Explanation {
            to: "10.0.0.1:443".to_owned(),
            by: "capture apps".to_owned(),
            capture: Some(Step { passes: true, why: "10.0.0.0/8 in include".to_owned() }),
            routes: vec![route(0, Verdict::NotMet, &["destination"]), route(1, Verdict::Takes, &[])],
            decision: "route 1: through upstream gw".to_owned(),
            upstreams: vec![Share { upstream: "gw".to_owned(), percent: 100.0, ..Share::default() }],
            ..Explanation::default()
        });
        assert_eq!(
            text,
            "capture apps to 10.0.0.1:443\n  captured: yes: 10.0.0.0/8 in include\n  route 0: does not match: destination\n  \
             route 1: takes it\n-> route 1: through upstream gw\n  upstream gw (100 % of such flows)\n"
        );
    }
}
