//! The messages of OTLP that a trace takes, as `opentelemetry/proto/trace/v1/trace.proto` and those beside it have them
//! (OTLP 1.9): the fields that we set, by their numbers.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prost::{Message, Oneof};

use super::{Attribute, Span as Ours};

/// `STATUS_CODE_ERROR`.
const ERROR: i32 = 2;
/// What made the spans.
const SCOPE: &str = "tunnel";

#[derive(Message)]
pub(super) struct ExportRequest {
    #[prost(message, repeated, tag = "1")]
    resource_spans: Vec<ResourceSpans>,
}

#[derive(Message)]
struct ResourceSpans {
    #[prost(message, optional, tag = "1")]
    resource: Option<Resource>,
    #[prost(message, repeated, tag = "2")]
    scope_spans: Vec<ScopeSpans>,
}

#[derive(Message)]
struct Resource {
    #[prost(message, repeated, tag = "1")]
    attributes: Vec<KeyValue>,
}

#[derive(Message)]
struct ScopeSpans {
    #[prost(message, optional, tag = "1")]
    scope: Option<Scope>,
    #[prost(message, repeated, tag = "2")]
    spans: Vec<Span>,
}

#[derive(Message)]
struct Scope {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    version: String,
}

#[derive(Message)]
struct Span {
    #[prost(bytes = "vec", tag = "1")]
    trace_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    span_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    parent_span_id: Vec<u8>,
    #[prost(string, tag = "5")]
    name: String,
    #[prost(int32, tag = "6")]
    kind: i32,
    #[prost(fixed64, tag = "7")]
    start_time_unix_nano: u64,
    #[prost(fixed64, tag = "8")]
    end_time_unix_nano: u64,
    #[prost(message, repeated, tag = "9")]
    attributes: Vec<KeyValue>,
    #[prost(message, optional, tag = "15")]
    status: Option<Status>,
    /// The low 8 bits are those of W3C Trace Context.
    #[prost(fixed32, tag = "16")]
    flags: u32,
}

#[derive(Message)]
struct Status {
    #[prost(string, tag = "2")]
    message: String,
    #[prost(int32, tag = "3")]
    code: i32,
}

#[derive(Message)]
struct KeyValue {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(message, optional, tag = "2")]
    value: Option<AnyValue>,
}

#[derive(Message)]
struct AnyValue {
    #[prost(oneof = "Any", tags = "1, 3")]
    value: Option<Any>,
}

#[derive(Oneof)]
enum Any {
    #[prost(string, tag = "1")]
    Text(String),
    #[prost(int64, tag = "3")]
    Number(i64),
}

/// What a collector answers.
#[derive(Message)]
pub(super) struct ExportResponse {
    /// Something was wrong with some of it.
    #[prost(message, optional, tag = "1")]
    pub(super) partial_success: Option<PartialSuccess>,
}

/// What it did not take.
#[derive(Message)]
pub(super) struct PartialSuccess {
    /// Spans.
    #[prost(int64, tag = "1")]
    pub(super) rejected_spans: i64,
    /// Why.
    #[prost(string, tag = "2")]
    pub(super) error_message: String,
}

/// A request with these spans of this service.
pub(super) fn request(service: &str, spans: Vec<Ours>) -> ExportRequest {
    let attributes = [
        ("service.name", Attribute::Text(service.to_owned())),
        ("service.version", Attribute::Text(env!("CARGO_PKG_VERSION").to_owned())),
        ("process.pid", Attribute::Number(std::process::id().into())),
    ];
    let resource = Resource { attributes: attributes.into_iter().map(KeyValue::from).collect() };
    let scope = Scope { name: SCOPE.to_owned(), version: env!("CARGO_PKG_VERSION").to_owned() };
    let spans = spans.into_iter().map(Span::from).collect();
    let scope_spans = vec![ScopeSpans { scope: Some(scope), spans }];
    ExportRequest { resource_spans: vec![ResourceSpans { resource: Some(resource), scope_spans }] }
}

impl From<Ours> for Span {
    fn from(ours: Ours) -> Self {
        let Ours { trace, id, parent, name, kind, start, end, attributes, error } = ours;
        Self {
            trace_id: trace.to_be_bytes().to_vec(),
            span_id: id.to_be_bytes().to_vec(),
            parent_span_id: parent.map(|parent| parent.to_be_bytes().to_vec()).unwrap_or_default(),
            name: name.to_owned(),
            kind: kind as i32,
            start_time_unix_nano: nanos(start),
            end_time_unix_nano: nanos(end),
            attributes: attributes.into_iter().map(KeyValue::from).collect(),
            status: error.map(|message| Status { message, code: ERROR }),
            // Only sampled ones are sent.
            flags: 1,
        }
    }
}

impl From<(&'static str, Attribute)> for KeyValue {
    fn from((key, value): (&'static str, Attribute)) -> Self {
        let value = match value {
            Attribute::Text(text) => Any::Text(text),
            Attribute::Number(n) => Any::Number(n),
        };
        Self { key: key.to_owned(), value: Some(AnyValue { value: Some(value) }) }
    }
}

fn nanos(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
