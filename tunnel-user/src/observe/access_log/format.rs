//! What stands in a line of the access log, as JSON, as text, and as fields of the journal.
//!
//! # Invariants
//! - The three have the same fields, in the same order. A field that a flow has not is left out.
//! - What a peer or a client chose (names, details) cannot end a line or a field.

use std::{fmt, io::Write as _, time::SystemTime};

use time::UtcDateTime;

use super::{Entry, Event};
use crate::{
    config::LineFormat,
    model::{end::Fault, flow::SourceKind},
    observe::{flows::CurrentPath, marks::Micros, stats::Via},
};

/// The value of a field.
enum Value<'a> {
    Text(&'a dyn fmt::Display),
    Number(u64),
    Millis(f64),
}

/// Calls `field` for each field of an entry.
fn fields(entry: &Entry, mut field: impl FnMut(&'static str, Value<'_>)) {
    let Entry { event, at, flow, record } = entry;
    let mut text = |name, value: &dyn fmt::Display| field(name, Value::Text(value));
    text("time", &Rfc3339(*at));
    text("event", &event.word());
    if let Some(flow) = flow {
        text("flow", flow);
    }
    text("source", &source(record.kind));
    if let Some(name) = &record.source {
        text("source_name", name);
    }
    text("client", &record.client);
    if let Some(identity) = &record.client_identity {
        text("client_identity", identity);
    }
    text("destination", &record.destination);
    if let Some(host) = &record.host {
        text("host", host);
    }
    if let Some(route) = record.route {
        field("route", Value::Number(route as u64));
    }
    let mut text = |name, value: &dyn fmt::Display| field(name, Value::Text(value));
    if let Some(name) = &record.route_name {
        text("route_name", name);
    }
    match &record.via {
        Via::Direct(addr) => text("endpoint", addr),
        Via::Nowhere => {}
        Via::Tunnel { upstream, peer, stream } => {
            text("upstream", upstream);
            text("endpoint", peer);
            // Without a tunnel it is the client's.
            if let Some(identity) = &record.identity {
                text("upstream_identity", identity);
            }
            if let Some(stream) = stream {
                field("stream", Value::Number(*stream));
            }
        }
    }
    if let Some(passed) = record.passed() {
        field("passed", Value::Text(&passed));
    }
    if let Some(trace) = &record.trace {
        field("trace_id", Value::Text(&format_args!("{:032x}", trace.id)));
    }
    if flow.is_some() {
        field("path", Value::Text(&path(record.path)));
    }
    field("bytes_sent", Value::Number(record.sent));
    field("bytes_received", Value::Number(record.received));
    let phases = record.phases;
    for (name, length) in
        [("queue_ms", phases.queue), ("connect_ms", phases.connect), ("first_byte_ms", phases.first_byte)]
    {
        if let Some(length) = length {
            field(name, Value::Millis(Micros::millis(length)));
        }
    }
    if *event == Event::Start {
        return;
    }
    field("duration_ms", Value::Millis((record.duration_ms * 1e3).round() / 1e3));
    if *event == Event::End {
        field("reason", Value::Text(&record.reason));
        field("fault", Value::Text(&fault(record.reason.fault())));
        if let Some(rule) = &record.rule {
            field("rule", Value::Text(rule));
        }
        let words = record.detail.as_deref().unwrap_or_else(|| record.reason.meaning());
        field("detail", Value::Text(&words));
    }
}

const fn source(kind: SourceKind) -> &'static str {
    match kind {
        SourceKind::Capture => "capture",
        SourceKind::Listener => "listener",
    }
}

const fn path(path: CurrentPath) -> &'static str {
    match path {
        CurrentPath::Copy => "copy",
        CurrentPath::Pipe => "pipe",
        CurrentPath::Splice => "splice",
        CurrentPath::Bypass => "bypass",
    }
}

const fn fault(fault: Fault) -> &'static str {
    match fault {
        Fault::Nobody => "nobody",
        Fault::Client => "client",
        Fault::Upstream => "upstream",
        Fault::Us => "us",
    }
}

/// Adds a line to `out`, with its end.
pub(super) fn line(out: &mut Vec<u8>, entry: &Entry, format: LineFormat) {
    match format {
        LineFormat::Json => json(out, entry),
        LineFormat::Text => text(out, entry),
    }
    out.push(b'\n');
}

// Writing to memory does not fail, and strings are valid JSON.
fn json(out: &mut Vec<u8>, entry: &Entry) {
    let mut separator = b'{';
    fields(entry, |name, value| {
        out.push(separator);
        separator = b',';
        let _written = match value {
            Value::Text(text) => {
                let _name = write!(out, "\"{name}\":");
                serde_json::to_writer(&mut *out, &text.to_string()).map_err(Into::into)
            }
            Value::Number(n) => write!(out, "\"{name}\":{n}"),
            Value::Millis(ms) => write!(out, "\"{name}\":{ms}"),
        };
    });
    out.push(b'}');
}

fn text(out: &mut Vec<u8>, entry: &Entry) {
    let mut first = true;
    fields(entry, |name, value| {
        if !std::mem::take(&mut first) {
            out.push(b' ');
        }
        let _written = match value {
            Value::Text(text) => {
                let text = text.to_string();
                let plain = |c: char| c.is_ascii_graphic() && !matches!(c, '"' | '=' | '\\');
                if !text.is_empty() && text.chars().all(plain) {
                    write!(out, "{name}={text}")
                } else {
                    let _name = write!(out, "{name}=");
                    serde_json::to_writer(&mut *out, &text).map_err(Into::into)
                }
            }
            Value::Number(n) => write!(out, "{name}={n}"),
            Value::Millis(ms) => write!(out, "{name}={ms}"),
        };
    });
}

/// What systemd's tools filter by: `journalctl SYSLOG_IDENTIFIER=tunnel-access`.
const IDENTIFIER: &str = "tunnel-access";

/// A datagram of the journal's native protocol: a message in words, a priority, and `TUNNEL_` and the name in capitals for
/// each field (systemd, "Native Journal Protocol").
pub(super) fn journal(entry: &Entry) -> Vec<u8> {
    let Entry { event, record, .. } = entry;
    let mut out = Vec::with_capacity(1024);
    let message = match event {
        Event::Start => format!("flow started: {} to {}", record.client, record.destination),
        Event::Live => format!("flow live: {} to {}", record.client, record.destination),
        Event::End => {
            format!("flow ended: {} to {}: {}", record.client, record.destination, record.reason)
        }
    };
    // LOG_WARNING and LOG_INFO of syslog(3).
    let failed = *event == Event::End && record.reason.fault() != Fault::Nobody;
    journal_field(&mut out, "MESSAGE", &message);
    journal_field(&mut out, "PRIORITY", if failed { "4" } else { "6" });
    journal_field(&mut out, "SYSLOG_IDENTIFIER", IDENTIFIER);
    fields(entry, |name, value| {
        let name = format!("TUNNEL_{}", name.to_ascii_uppercase());
        match value {
            Value::Text(text) => journal_field(&mut out, &name, &text.to_string()),
            Value::Number(n) => journal_field(&mut out, &name, &n.to_string()),
            Value::Millis(ms) => journal_field(&mut out, &name, &ms.to_string()),
        }
    });
    out
}

/// `NAME=VALUE`, or where a value has more than one line, its name, its length in 8 bytes, little endian, and itself.
fn journal_field(out: &mut Vec<u8>, name: &str, value: &str) {
    out.extend_from_slice(name.as_bytes());
    if value.contains('\n') {
        out.push(b'\n');
        out.extend_from_slice(&(value.len() as u64).to_le_bytes());
    } else {
        out.push(b'=');
    }
    out.extend_from_slice(value.as_bytes());
    out.push(b'\n');
}

/// A moment in UTC with microseconds (RFC 3339).
pub(super) struct Rfc3339(pub(super) SystemTime);

impl fmt::Display for Rfc3339 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = UtcDateTime::from(self.0);
        let (year, month, day) = at.to_calendar_date();
        let (hour, minute, second, micros) = at.as_hms_micro();
        let month = u8::from(month);
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z")
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;
    use crate::{
        model::{
            end::EndReason,
            flow::{ClientAddr, FarEnd, Identity, PeerAddr},
        },
        observe::stats::Record,
    };

    fn entry(event: Event) -> Entry {
        let mut record =
            Record::new(&"10.2.3.4:443".parse().unwrap(), ClientAddr("10.0.0.7:40000".parse().unwrap()));
        let gateway = FarEnd::Socket(PeerAddr("10.77.0.2:15008".parse().unwrap()));
        let identity = Identity("spiffe://example.org/gateway".into());
        record.through(&"gateway".into(), &gateway, Some(3), Some(&identity));
        (record.sent, record.received, record.route) = (76, 9, Some(1));
        record.host = Some("a.example".into());
        record.ended(EndReason::TargetReset, Some("it said \"no\"\nand left".to_owned()));
        record.lasted(Duration::from_micros(12_345));
        let at = UNIX_EPOCH + Duration::new(1_764_519_469, 5_000);
        Entry { event, at, flow: None, record }
    }

    fn written(format: LineFormat, event: Event) -> String {
        let mut out = Vec::new();
        line(&mut out, &entry(event), format);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_line_is_an_object_of_json_that_ends_where_it_should() {
        let line = written(LineFormat::Json, Event::End);
        assert_eq!(line.lines().count(), 1, "{line}");
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["time"], "2025-11-30T16:17:49.000005Z");
        assert_eq!(value["upstream_identity"], "spiffe://example.org/gateway");
        assert_eq!((&value["stream"], &value["bytes_sent"]), (&3.into(), &76.into()));
        assert_eq!((&value["reason"], &value["duration_ms"]), (&"target_reset".into(), &12.345.into()));
        assert_eq!(value["detail"], "it said \"no\"\nand left");
        assert!(value.get("client_identity").is_none() && value.get("path").is_none(), "{value}");
        let start: serde_json::Value =
            serde_json::from_str(&written(LineFormat::Json, Event::Start)).unwrap();
        assert!(start.get("reason").is_none() && start.get("duration_ms").is_none(), "{start}");
    }

    #[test]
    fn text_quotes_what_could_be_read_as_another_field() {
        let line = written(LineFormat::Text, Event::End);
        assert_eq!(line.lines().count(), 1, "{line}");
        assert!(line.contains(" client=10.0.0.7:40000 destination=10.2.3.4:443 host=a.example "), "{line}");
        assert!(line.ends_with(" detail=\"it said \\\"no\\\"\\nand left\"\n"), "{line}");
    }

    #[test]
    fn a_field_of_the_journal_with_more_than_one_line_has_a_length() {
        let out = journal(&entry(Event::End));
        let (before, after) =
            (b"TUNNEL_DETAIL\n\x15\0\0\0\0\0\0\0it said \"no\"\nand left\n".as_slice(), &out);
        assert!(after.ends_with(before), "{}", String::from_utf8_lossy(&out));
        assert!(
            out.starts_with(
                b"MESSAGE=flow ended: 10.0.0.7:40000 to 10.2.3.4:443: target_reset\nPRIORITY=4\n"
            )
        );
    }

    #[test]
    fn moments_are_written_as_rfc_3339_wants_them() {
        for (seconds, micros, text) in [
            (0, 0, "1970-01-01T00:00:00.000000Z"),
            (951_782_400, 5, "2000-02-29T00:00:00.000005Z"),
            (4_107_542_399, 999_999, "2100-02-28T23:59:59.999999Z"),
        ] {
            let at = UNIX_EPOCH + Duration::new(seconds, micros * 1000);
            assert_eq!(Rfc3339(at).to_string(), text);
        }
    }
}
