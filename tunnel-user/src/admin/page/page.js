"use strict";
// Flows that are drawn at once: more are counted, and found by the filter.
const FLOWS_MAX = 500;
const EVERY = 2000;
const $ = (id) => document.getElementById(id);

function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (n >= 1000 && unit < units.length - 1) { n /= 1024; unit += 1; }
  return (unit === 0 ? n.toFixed(0) : n.toFixed(1)) + " " + units[unit];
}

function span(seconds) {
  const units = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  const first = Math.max(0, units.findIndex(([unit]) => seconds >= unit));
  const at = seconds < 1 ? 3 : first;
  const [unit, name] = units[at];
  let text = Math.floor(seconds / unit) + " " + name;
  const next = units[at + 1];
  if (next && Math.floor((seconds % unit) / next[0]) > 0) text += " " + Math.floor((seconds % unit) / next[0]) + " " + next[1];
  return text;
}

// Texts are set as texts: what a peer has named is never markup.
function cell(text, kind) {
  const td = document.createElement("td");
  td.textContent = text;
  if (kind) td.className = kind;
  return td;
}

function fill(id, rows, none) {
  const body = $(id);
  const made = rows.map((cells) => {
    const tr = document.createElement("tr");
    tr.append(...cells.map((c) => Array.isArray(c) ? cell(c[0], c[1]) : cell(c)));
    return tr;
  });
  if (made.length === 0) {
    const td = cell(none, "dim");
    td.colSpan = body.parentElement.tHead.rows[0].cells.length;
    const tr = document.createElement("tr");
    tr.append(td);
    made.push(tr);
  }
  body.replaceChildren(...made);
}

async function get(path) {
  const answer = await fetch(path, { cache: "no-store" });
  if (!answer.ok) throw new Error(path + ": " + answer.status);
  return answer.json();
}

function showStatus(s) {
  const up = span(Date.now() / 1000 - s.started_at);
  $("state").textContent = `${s.version}: ${s.state}, ${s.ready ? "ready" : "NOT READY"}, up ${up}, ${s.flows.live} of ${s.flows_max} flows live`;
  $("state").className = s.ready ? "good" : "bad";
  document.title = (s.ready ? "" : "NOT READY - ") + "tunnel";
  $("problems").hidden = s.problems.length === 0;
  $("problem-list").replaceChildren(...s.problems.map((p) => {
    const li = document.createElement("li");
    const what = document.createElement("strong");
    what.textContent = (p.severity === "error" ? "Error: " : "Warning: ") + p.what;
    what.className = p.severity === "error" ? "bad" : "";
    li.append(what, document.createElement("br"), p.remedy);
    return li;
  }));
  const r = s.rates;
  $("rates").textContent = `In the last ${Math.round(r.over)} s: ${r.opened.toFixed(1)} flows/s, ${bytes(r.sent)}/s sent, ${bytes(r.received)}/s received.`;
  const errors = Object.entries(r.errors_last_hour).sort((a, b) => b[1] - a[1]);
  fill("errors", errors.map(([reason, n]) => [reason, [String(n), "n"]]), "none");
  fill("sources", [
    ...s.captures.map((c) => [c.name || "-", "capture", c.group, !c.present ? ["waits for its cgroup", "bad"] : c.attached ? ["capturing", "good"] : ["not attached", "bad"]]),
    ...s.listeners.map((l) => [l.name || "-", l.kind, l.address, l.tls ? "TLS" : "plaintext"]),
  ], "none");
  fill("upstreams", s.upstream_reports.flatMap((u) => u.endpoints.length === 0
    ? [[u.path, "-", ["no endpoint", "bad"], ["-", "n"], ["-", "n"], u.unavailable || ""]]
    : u.endpoints.map((e) => [u.path, e.address,
        e.available > 0 ? ["available", "good"] : [e.ejected > 0 ? "ejected" : "unhealthy", "bad"],
        [String(e.connections), "n"], [String(e.streams), "n"], e.last_error])), "none");
  fill("certificates", s.identities.map((i) => {
    const ends = i.chain.length ? i.chain[0].not_after : 0;
    const left = ends - Date.now() / 1000;
    return [i.name, i.identity || "-", left < 0 ? ["expired " + span(-left) + " ago", "bad"] : "in " + span(left), i.origin];
  }), "none");
}

function showHistory(points) {
  const peak = Math.max(1, ...points.map((p) => Math.max(p.sent, p.received)));
  const line = (of) => points.map((p) => `${(720 - p.ago / 5).toFixed(1)},${(156 - 150 * p[of] / peak).toFixed(1)}`).join(" ");
  const made = ["sent", "received"].map((of) => {
    const polyline = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
    polyline.setAttribute("points", line(of));
    polyline.setAttribute("class", of);
    return polyline;
  });
  const title = $("chart-title");
  const last = points[points.length - 1];
  title.textContent = last ? `Throughput over the last hour: now ${bytes(last.sent)}/s sent and ${bytes(last.received)}/s received, at most ${bytes(peak)}/s` : "no data yet";
  $("chart").replaceChildren(title, ...made);
  $("peak").textContent = bytes(peak) + "/s";
}

function showFlows(flows) {
  const more = flows.length > FLOWS_MAX;
  $("shown").textContent = more ? `the first ${FLOWS_MAX}, and there are more` : `${flows.length} flows`;
  fill("flows", flows.slice(0, FLOWS_MAX).map((f) => [f.id, f.client, f.destination, f.source || "-", f.upstream || "direct", f.identity || "-", f.path,
    [bytes(f.sent), "n"], [bytes(f.received), "n"], [span(f.age_ms / 1000), "n"]]), "no flows");
}

let busy = false;
async function update() {
  if (busy) return;
  busy = true;
  try {
    const filter = $("filter").value.trim();
    const wanted = filter === "" ? "" : "&destination=" + encodeURIComponent(filter);
    const [status, history, flows] = await Promise.all([get("/status"), get("/history"), get(`/flows?limit=${FLOWS_MAX + 1}${wanted}`)]);
    showStatus(status);
    showHistory(history);
    showFlows(flows);
  } catch (e) {
    $("state").textContent = "the daemon does not answer: " + e.message;
    $("state").className = "bad";
  } finally {
    busy = false;
  }
}

$("filter").addEventListener("input", update);
setInterval(() => { if ($("live").checked && !document.hidden) update(); }, EVERY);
update();
