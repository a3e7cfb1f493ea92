//! The endpoints: what each path answers.

use std::{borrow::Cow, collections::BTreeMap, convert::Infallible};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use serde::Serialize;
use serde_json::json;

use super::{
    flows::{self, Wanted},
    guard::{self, Rejected},
    metrics::{Format, Scrape},
    problems,
    server::{Body, Context},
    view::{Attach, By, Command, Flows, Overview, Problem, Question, Status, Until, Upstream},
};
use crate::{
    model::flow::Target,
    observe::{recent, telemetry::LogFilter},
    sinks::upstream::report::UpstreamReport,
};

/// The longest log filter that is taken.
const FILTER_MAX: usize = 4096;

/// Requests since the start, by the status that they were answered with.
#[derive(Clone, Debug, Default)]
pub(super) struct Requests(BTreeMap<StatusCode, u64>);

impl Requests {
    pub(super) fn count(&mut self, status: StatusCode) {
        *self.0.entry(status).or_default() += 1;
    }

    pub(super) fn by_code(&self) -> Vec<(String, u64)> {
        self.0.iter().map(|(status, n)| (status.as_str().to_owned(), *n)).collect()
    }
}

/// What a path can do.
struct Endpoint {
    path: &'static str,
    /// Whether it changes something, and takes POST.
    changes: bool,
    what: &'static str,
}

const fn read(path: &'static str, what: &'static str) -> Endpoint {
    Endpoint { path, changes: false, what }
}

const fn change(path: &'static str, what: &'static str) -> Endpoint {
    Endpoint { path, changes: true, what }
}

/// All of them.
const ENDPOINTS: &[Endpoint] = &[
    read("/", "a page for browsers, which shows what is below; else this list"),
    read("/healthz/live", "200 while every worker answers, else 503"),
    read(
        "/healthz/ready",
        "200 when every capture is attached, every listener bound and every identity valid, else 503 with what is missing",
    ),
    read("/metrics", "metrics, as OpenMetrics or Prometheus text by Accept"),
    read("/status", "everything on one screen, as JSON"),
    read("/flows", "the live flows, as a JSON list; see the parameters of `tunnel flows`"),
    change("/flows/ID/kill", "ends a flow"),
    read("/upstreams", "upstreams with the health of their endpoints and their pools"),
    read("/certificates", "identities with their certificates and roots; no keys"),
    read("/config_dump", "the configuration in force, with defaults, by where it came from; no keys"),
    read(
        "/explain",
        "where a flow would go, and why: ?to=HOST:PORT with capture=, cgroup= or listener= (and identity=), sni=, http_host=",
    ),
    read("/history", "throughput of the last hour"),
    read("/log", "the lines that were logged last"),
    read("/logging", "the log filter"),
    change("/logging", "sets it: ?level=LEVEL, ?target=TARGET&level=LEVEL, ?filter=FILTER, or ?reset"),
    change(
        "/captures",
        "captures one more group: ?cgroup= or unit=, name=, include=, refuse=, exclude=, on_failure=, until=PID or until=empty",
    ),
    change("/captures/detach", "ends a capture that was attached: ?which=GROUP or NAME"),
    change("/drain", "drains the daemon, as SIGTERM does"),
];

/// Answers a request that the guard has let pass.
pub(super) async fn answer<B>(context: &std::rc::Rc<Context>, request: &Request<B>) -> Response<Body> {
    let path = request.uri().path();
    let query = Query(request.uri().query().unwrap_or_default());
    let posted = *request.method() == Method::POST;
    let id = path.strip_prefix("/flows/").and_then(|rest| rest.strip_suffix("/kill"));
    if let (Some(id), true) = (id, posted) {
        return kill(context, id).await;
    }
    match (path, posted) {
        ("/", false) => match request.headers().get(header::ACCEPT) {
            Some(accept) if accept.as_bytes().windows(9).any(|part| part == b"text/html") => page(),
            _ => index(),
        },
        ("/page.css", false) => {
            respond(StatusCode::OK, "text/css; charset=utf-8", include_str!("page/page.css"))
        }
        ("/page.js", false) => {
            respond(StatusCode::OK, "text/javascript; charset=utf-8", include_str!("page/page.js"))
        }
        ("/healthz/live", false) => live(context).await,
        ("/healthz/ready", false) => ready(context).await,
        ("/metrics", false) => metrics(context, request.headers().get(header::ACCEPT)).await,
        ("/status", false) => json(StatusCode::OK, &status(context).await),
        ("/flows", false) => match Wanted::new(query.pairs()) {
            Ok(wanted) => flows::answer(context, wanted),
            Err(why) => error(StatusCode::BAD_REQUEST, &why),
        },
        ("/upstreams", false) => json(StatusCode::OK, &upstreams(context.sight.upstreams().await)),
        ("/certificates", false) => json(StatusCode::OK, &context.sight.overview().await.0.identities),
        ("/config_dump", false) => match context.sight.command(Command::ConfigDump).await {
            Some(dump) => json(StatusCode::OK, &dump),
            None => busy(),
        },
        ("/explain", false) => explain(context, &query).await,
        ("/history", false) => {
            let points = context.history.borrow().points();
            json(StatusCode::OK, &points)
        }
        ("/log", false) => {
            let text = String::from_utf8_lossy(&recent::lines()).into_owned();
            respond(StatusCode::OK, "text/plain; charset=utf-8", text)
        }
        ("/logging", false) => json(StatusCode::OK, &json!({ "filter": context.log.filter() })),
        ("/logging", true) => set_log(context, &query),
        ("/captures", true) => match attachment(&query) {
            Ok(wanted) => changed(context.sight.change(|tell| Command::Attach(wanted, tell)).await),
            Err(why) => error(StatusCode::BAD_REQUEST, &why),
        },
        ("/captures/detach", true) => match query.get("which") {
            Some(which) => changed(context.sight.change(|tell| Command::Detach(which, tell)).await),
            None => error(StatusCode::BAD_REQUEST, "say what to detach: ?which=GROUP"),
        },
        ("/drain", true) => match context.sight.command(Command::Drain).await {
            Some(()) => json(StatusCode::ACCEPTED, &json!({ "draining": true })),
            None => busy(),
        },
        _ => unknown(if id.is_some() { "/flows/ID/kill" } else { path }),
    }
}

/// What is not known, or known by another method.
fn unknown(path: &str) -> Response<Body> {
    let Some(endpoint) = ENDPOINTS.iter().find(|e| e.path == path) else {
        return error(StatusCode::NOT_FOUND, "there is no such path: GET / lists them");
    };
    let (method, why) = if endpoint.changes {
        ("POST", "this changes something: use POST")
    } else {
        ("GET, HEAD", "this changes nothing: use GET")
    };
    let mut answer = error(StatusCode::METHOD_NOT_ALLOWED, why);
    answer.headers_mut().insert(header::ALLOW, HeaderValue::from_static(method));
    answer
}

pub(super) fn rejected(rejected: Rejected) -> Response<Body> {
    error(rejected.status, rejected.why)
}

fn busy() -> Response<Body> {
    error(
        StatusCode::SERVICE_UNAVAILABLE,
        "the control loop does not answer: it is busy, or the daemon drains",
    )
}

fn error(status: StatusCode, why: &str) -> Response<Body> {
    json(status, &json!({ "error": why }))
}

fn json(status: StatusCode, what: &impl Serialize) -> Response<Body> {
    match serde_json::to_string_pretty(what) {
        Ok(text) => respond(status, "application/json", text + "\n"),
        Err(e) => respond(StatusCode::INTERNAL_SERVER_ERROR, "text/plain; charset=utf-8", format!("{e}\n")),
    }
}

fn respond(status: StatusCode, kind: &'static str, text: impl Into<Cow<'static, str>>) -> Response<Body> {
    let bytes = match text.into() {
        Cow::Borrowed(text) => Bytes::from_static(text.as_bytes()),
        Cow::Owned(text) => Bytes::from(text),
    };
    let mut answer =
        Response::new(Full::new(bytes).map_err(|never: Infallible| match never {}).boxed_unsync());
    *answer.status_mut() = status;
    fixed_headers(&mut answer, kind);
    answer
}

/// What every answer has: what it is, and that no site may read, frame or keep it.
pub(super) fn fixed_headers(answer: &mut Response<Body>, kind: &'static str) {
    for (name, value) in [
        (header::CONTENT_TYPE, kind),
        (header::CACHE_CONTROL, "no-store"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "no-referrer"),
    ] {
        answer.headers_mut().insert(name, HeaderValue::from_static(value));
    }
}

fn index() -> Response<Body> {
    let mut text = String::from("tunnel: the admin interface\n\n");
    for Endpoint { path, changes, what } in ENDPOINTS {
        let method = if *changes { "POST" } else { "GET " };
        text += &format!("{method} {path:<16} {what}\n");
    }
    respond(StatusCode::OK, "text/plain; charset=utf-8", text)
}

/// What a page of ours may do: show what this interface answers, and nothing of anybody else.
const PAGE_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; \
                           form-action 'none'; frame-ancestors 'none'";

/// The page for browsers.
fn page() -> Response<Body> {
    let mut answer = respond(StatusCode::OK, "text/html; charset=utf-8", include_str!("page/page.html"));
    answer.headers_mut().insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(PAGE_POLICY));
    answer
}

async fn live(context: &Context) -> Response<Body> {
    let workers = context.sight.workers();
    let answered = context.sight.ask(|_| ()).await.into_iter().flatten().count();
    // Those that have drained have ended.
    let live = answered == workers || context.sight.is_draining();
    let status = if live { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    json(status, &json!({ "live": live, "workers": workers, "answered": answered }))
}

async fn ready(context: &Context) -> Response<Body> {
    let status = status(context).await;
    let code = if status.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let missing: Vec<_> = status.problems.iter().filter(|p| p.blocks_ready).collect();
    json(code, &json!({ "ready": status.ready, "state": status.state, "missing": missing }))
}

async fn metrics(context: &Context, accept: Option<&HeaderValue>) -> Response<Body> {
    let format = Format::wanted(accept.and_then(|a| a.to_str().ok()));
    let requests = context.requests.borrow().clone();
    match Scrape::take(&context.sight, requests).await.text(format) {
        Ok(text) => respond(StatusCode::OK, format.content_type(), text),
        Err(_) => error(StatusCode::INTERNAL_SERVER_ERROR, "the metrics could not be written"),
    }
}

/// Everything on one screen.
async fn status(context: &Context) -> Status {
    let sight = &context.sight;
    let (overview, age) = sight.overview().await;
    let reports = sight.upstreams().await;
    let totals = sight.totals().await;
    let problems: Vec<Problem> = problems::of(&overview, &reports);
    let draining = sight.is_draining();
    let ended = totals.sums.ended.iter().filter(|(_, n)| *n > 0);
    Status {
        state: if draining { "draining" } else { "running" }.to_owned(),
        ready: !draining && problems.iter().all(|p| !p.blocks_ready),
        overview: Overview::clone(&overview),
        overview_age: age.as_secs(),
        upstream_reports: upstreams(reports),
        flows: Flows {
            live: totals.live.flows(),
            pending: totals.live.active.saturating_sub(totals.live.flows()),
            opened: totals.sums.of("flows_opened"),
            sent: totals.live.totals.sent,
            received: totals.live.totals.received,
            ended: ended.map(|(reason, n)| (reason.word().to_owned(), *n)).collect(),
        },
        rates: context.history.borrow().rates(&totals),
        problems,
    }
}

fn upstreams(reports: BTreeMap<String, UpstreamReport>) -> Vec<Upstream> {
    let each = reports.into_iter().map(|(name, report)| {
        let UpstreamReport { path, endpoints, unavailable, totals, .. } = report;
        Upstream { name, path, endpoints, unavailable, totals }
    });
    each.collect()
}

async fn kill(context: &Context, id: &str) -> Response<Body> {
    match id.parse() {
        Err(e) => error(StatusCode::BAD_REQUEST, &format!("\"{id}\" {e}")),
        Ok(id) => {
            if flows::kill(context, id).await == 0 {
                return error(StatusCode::NOT_FOUND, &format!("there is no flow {id}: it may have ended"));
            }
            tracing::warn!(flow = %id, "an operator has ended a flow");
            json(StatusCode::OK, &json!({ "killed": 1 }))
        }
    }
}

/// Where a flow would go. Nothing is sent.
async fn explain(context: &Context, query: &Query<'_>) -> Response<Body> {
    let bad = |why: &str| error(StatusCode::BAD_REQUEST, why);
    let Some(to) = query.get("to") else { return bad("say what it wants to reach: ?to=HOST:PORT") };
    let to = match to.parse::<Target>() {
        Ok(to) => to,
        Err(e) => return bad(&format!("to: \"{to}\": {e}")),
    };
    let by = match (query.get("capture"), query.get("cgroup"), query.get("listener")) {
        (None, None, None) => By::AnyCapture,
        (Some(capture), None, None) => By::Capture(capture),
        (None, Some(cgroup), None) => By::Cgroup(cgroup),
        (None, None, Some(listener)) => By::Listener(listener),
        _ => return bad("a flow comes by one of capture, cgroup and listener"),
    };
    let identity = query.get("identity");
    let question = Question { to, by, identity, sni: query.get("sni"), http_host: query.get("http_host") };
    match context.sight.command(|tell| Command::Explain(question, tell)).await {
        None => busy(),
        Some(Err(why)) => bad(&why),
        Some(Ok(mut explanation)) => {
            let reports = context.sight.upstreams().await;
            for share in &mut explanation.upstreams {
                if let Some(report) = reports.get(&share.upstream) {
                    share.endpoints.clone_from(&report.endpoints);
                    share.unavailable.clone_from(&report.unavailable);
                }
            }
            json(StatusCode::OK, &explanation)
        }
    }
}

/// The capture that a request wants, as a configuration would have it.
fn attachment(query: &Query<'_>) -> Result<Attach, String> {
    let mut keys = BTreeMap::<&str, serde_json::Value>::new();
    let mut until = None;
    for (name, value) in query.pairs() {
        let key = ["cgroup", "unit", "name", "on_failure"].into_iter().find(|key| *key == name);
        let list = ["include", "refuse", "exclude"].into_iter().find(|key| *key == name);
        match (key, list, name.as_str()) {
            (Some(key), ..) => drop(keys.insert(key, value.into())),
            (_, Some(list), _) => {
                let values = keys.entry(list).or_insert_with(|| json!([]));
                if let Some(values) = values.as_array_mut() {
                    values.push(value.into());
                }
            }
            (_, _, "until") if value == "empty" => until = Some(Until::Empty),
            (_, _, "until") => {
                let pid = value
                    .parse()
                    .map_err(|_| format!("until: \"{value}\" is neither a process nor \"empty\""))?;
                until = Some(Until::Process(pid));
            }
            _ => return Err(format!("there is no parameter {name}")),
        }
    }
    // Strings and lists of strings are written in TOML as in JSON, but for DEL, which JSON does not escape.
    let line =
        |(key, value): (&str, serde_json::Value)| format!("{key} = {value}\n").replace('\u{7f}', "\\u007F");
    Ok(Attach { text: format!("[[capture]]\n{}", keys.into_iter().map(line).collect::<String>()), until })
}

/// What a request to attach says, by its query.
pub fn capture_of(query: &str) -> Result<Attach, String> {
    attachment(&Query(query))
}

/// Whether a request is answered at all, and what it asks for can be read. Nothing is done.
pub fn admits<B>(request: &Request<B>, over_tcp: bool, writes_over_tcp: bool) -> bool {
    let way = if over_tcp { guard::Way::Tcp } else { guard::Way::Unix };
    if guard::check(request, way, writes_over_tcp).is_err() {
        return false;
    }
    let query = Query(request.uri().query().unwrap_or_default());
    match request.uri().path() {
        "/flows" => Wanted::new(query.pairs()).is_ok(),
        "/captures" => attachment(&query).is_ok(),
        "/logging" => {
            query.get("filter").is_none_or(|f| f.len() <= FILTER_MAX && f.parse::<LogFilter>().is_ok())
        }
        "/explain" => query.get("to").is_some_and(|to| to.parse::<Target>().is_ok()),
        _ => true,
    }
}

fn changed(result: Option<Result<String, String>>) -> Response<Body> {
    match result {
        None => busy(),
        Some(Err(why)) => error(StatusCode::BAD_REQUEST, &why),
        Some(Ok(group)) => json(StatusCode::OK, &json!({ "capture": group })),
    }
}

fn set_log(context: &Context, query: &Query<'_>) -> Response<Body> {
    let filter = match (query.get("filter"), query.get("target"), query.get("level")) {
        (None, None, None) if query.get("reset").is_some() => Ok(context.log.first()),
        (Some(filter), None, None) if !filter.trim().is_empty() => {
            filter.parse().map_err(|e| format!("this is no log filter: {e}"))
        }
        (None, target, Some(level)) => context.log.with(target.as_deref(), &level),
        _ => {
            let why = "say ?level=LEVEL, ?target=TARGET&level=LEVEL, ?filter=FILTER or ?reset";
            return error(StatusCode::BAD_REQUEST, why);
        }
    };
    let filter: LogFilter = match filter {
        Ok(filter) if filter.as_str().len() <= FILTER_MAX => filter,
        Ok(_) => return error(StatusCode::BAD_REQUEST, "the filter is too long"),
        Err(why) => return error(StatusCode::BAD_REQUEST, &why),
    };
    if !context.log.set(&filter) {
        return error(StatusCode::INTERNAL_SERVER_ERROR, "this process does not log");
    }
    tracing::info!(filter = filter.as_str(), "an operator has changed the log filter");
    json(StatusCode::OK, &json!({ "filter": filter.as_str() }))
}

/// The parameters of a request.
pub(super) struct Query<'q>(pub(super) &'q str);

impl Query<'_> {
    /// Names and values, decoded.
    pub(super) fn pairs(&self) -> impl Iterator<Item = (String, String)> {
        let pairs = self.0.split('&').filter(|pair| !pair.is_empty());
        pairs.map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decoded(name), decoded(value))
        })
    }

    /// The first of this name.
    pub(super) fn get(&self, name: &str) -> Option<String> {
        self.pairs().find(|(n, _)| n == name).map(|(_, value)| value)
    }
}

/// Percent-encoding undone (RFC 3986 section 2.1), and `+` for a space, as forms have it.
fn decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = || u8::from_str_radix(std::str::from_utf8(bytes.get(at + 1..at + 3)?).ok()?, 16).ok();
        match (bytes[at], hex()) {
            (b'+', _) => out.push(b' '),
            (b'%', Some(byte)) => {
                out.push(byte);
                at += 2;
            }
            (byte, _) => out.push(byte),
        }
        at += 1;
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_decoded_and_what_is_not_encoded_well_stays() {
        let query = Query("target=tunnel%3A%3Arelay&level=debug&a+b=%zz%4&flag&&x=%F0%9F%92%A9");
        let pairs: Vec<_> = query.pairs().collect();
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(
            pairs,
            [
                pair("target", "tunnel::relay"),
                pair("level", "debug"),
                pair("a b", "%zz%4"),
                pair("flag", ""),
                pair("x", "💩")
            ]
        );
    }
}
