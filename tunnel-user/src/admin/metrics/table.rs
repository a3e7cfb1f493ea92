//! Every metric: its name, its kind, its labels and what it counts. The reference is generated from this list.
//!
//! # Invariants
//! - No label takes a value that a peer chooses: they are words of this program, and names of the configuration. Except those of
//!   Istio's metrics, which are off by default and bounded (`observe/istio.rs`).

/// What a metric is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It only rises, until the daemon is started again. Its samples end in `_total`.
    Counter,
    /// It rises and falls.
    Gauge,
    /// Durations, in seconds.
    Histogram,
}

/// One metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metric {
    /// Its name, without `_total`.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
    /// The names of its labels.
    pub labels: &'static [&'static str],
    /// What it says.
    pub help: &'static str,
}

macro_rules! labels {
    ([@istio]) => { ISTIO_LABELS };
    ([$($label:literal),*]) => { &[$($label),*] };
}

macro_rules! metrics {
    ($($(#[doc = $doc:literal])+ $id:ident = $name:literal, $kind:ident, $labels:tt;)+) => {
        $(
            $(#[doc = $doc])+
            pub(crate) const $id: Metric = Metric {
                name: $name,
                kind: Kind::$kind,
                labels: labels!($labels),
                help: concat!($($doc),+).trim_ascii_start(),
            };
        )+

        /// All of them, in the order in which they are written.
        pub const METRICS: &[Metric] = &[$($id),+];
    };
}

metrics! {
    /// Always 1. Version of the daemon, and release of the kernel that it runs on.
    BUILD_INFO = "tunnel_build_info", Gauge, ["version", "kernel"];
    /// When the daemon was started, in seconds since 1970.
    START_TIME = "process_start_time_seconds", Gauge, [];
    /// CPU time of the whole process.
    CPU = "process_cpu_seconds", Counter, [];
    /// Resident memory of the process.
    RESIDENT = "process_resident_memory_bytes", Gauge, [];
    /// Open file descriptors.
    OPEN_FDS = "process_open_fds", Gauge, [];
    /// Limit of open file descriptors.
    MAX_FDS = "process_max_fds", Gauge, [];
    /// Worker threads.
    WORKERS = "tunnel_workers", Gauge, [];
    /// Whether the daemon is ready: every capture attached, every listener bound, every identity valid, and not draining.
    READY = "tunnel_ready", Gauge, [];
    /// Whether the daemon drains.
    DRAINING = "tunnel_draining", Gauge, [];
    /// Panics of tasks and threads.
    PANICS = "tunnel_panics", Counter, [];
    /// Changes of the configuration since the start, by result: success or failure.
    RELOADS = "tunnel_config_reloads", Counter, ["result"];
    /// Whether the latest change of the configuration was put in force.
    RELOAD_OK = "tunnel_config_last_reload_successful", Gauge, [];
    /// When the configuration in force was put in force, in seconds since 1970.
    RELOADED_AT = "tunnel_config_last_reload_success_timestamp_seconds", Gauge, [];

    /// Flows that have reached their target.
    FLOWS_OPENED = "tunnel_flows_opened", Counter, [];
    /// Of these: by where they left, the name of the upstream or "direct" for those that were dialled from here. A flow that is
    /// sent through one upstream inside another counts for both.
    FLOWS_ROUTED = "tunnel_flows_routed", Counter, ["upstream"];
    /// Flows that have ended or were refused, by reason, and by who could have prevented it.
    FLOWS_ENDED = "tunnel_flows_ended", Counter, ["reason", "fault"];
    /// Flows that are carried now, by what moves their bytes.
    FLOWS_LIVE = "tunnel_flows_live", Gauge, ["path"];
    /// Flows whose target is being reached.
    FLOWS_PENDING = "tunnel_flows_pending", Gauge, [];
    /// Flows that the daemon carries at most.
    FLOWS_LIMIT = "tunnel_flows_limit", Gauge, [];
    /// Bytes that flows have moved, counted while they run. Sent: from clients to targets; received: from targets to clients.
    FLOW_BYTES = "tunnel_flow_bytes", Counter, ["direction"];
    /// Of these: bytes that the kernel moved, by path, of flows that have ended.
    KERNEL_BYTES = "tunnel_flow_kernel_bytes", Counter, ["path"];
    /// What has happened to spliced and piped flows.
    RELAY_EVENTS = "tunnel_relay_events", Counter, ["event"];
    /// Flows that ended with a reset.
    FLOWS_RESET = "tunnel_flows_reset", Counter, [];
    /// From the arrival of a flow until its target was reached.
    CONNECT_SECONDS = "tunnel_flow_connect_duration_seconds", Histogram, [];
    /// From the arrival of a flow until the first byte of its target.
    FIRST_BYTE_SECONDS = "tunnel_flow_first_byte_duration_seconds", Histogram, [];
    /// From the arrival of a flow until its end, of those that had reached their target.
    FLOW_SECONDS = "tunnel_flow_duration_seconds", Histogram, [];

    /// Connections of peers that have completed their handshake.
    LISTENER_CONNECTIONS = "tunnel_listener_connections", Counter, [];
    /// Connections of peers that were rejected, by the check that they failed.
    LISTENER_REJECTED = "tunnel_listener_connections_rejected", Counter, ["check"];
    /// From the arrival of a connection at a listener until its handshake was complete.
    HANDSHAKE_SECONDS = "tunnel_listener_handshake_duration_seconds", Histogram, [];

    /// What each policy has decided, by its name ("other" for those beyond 256): requests that it allowed, denied, or, in report
    /// mode, would have decided otherwise (reported), and live flows that it ended.
    POLICY_DECISIONS = "tunnel_policy_decisions", Counter, ["policy", "decision"];
    /// Bytes that peers and their flows may make the process hold (limits.memory).
    MEMORY_BUDGET = "tunnel_memory_budget_bytes", Gauge, [];
    /// Of these: bytes that are held now.
    MEMORY_HELD = "tunnel_memory_held_bytes", Gauge, [];
    /// Times that a peer was given a smaller window because half of the budget, or of the peer's part of it, was in use.
    WINDOWS_SHRUNK = "tunnel_memory_windows_shrunk", Counter, [];
    /// Flows and connections that were refused because a budget was used up: of the process, of one peer, or, before a first
    /// request, of either (connection).
    MEMORY_REFUSED = "tunnel_memory_refused", Counter, ["budget"];

    /// Whether the programs of a capture are attached.
    CAPTURE_ATTACHED = "tunnel_capture_attached", Gauge, ["capture"];
    /// Whether the cgroup of a capture exists.
    CAPTURE_PRESENT = "tunnel_capture_cgroup_present", Gauge, ["capture"];
    /// Network namespaces that a capture has listeners in.
    CAPTURE_NAMESPACES = "tunnel_capture_namespaces", Gauge, ["capture"];
    /// Processes of a captured cgroup.
    CAPTURE_PROCESSES = "tunnel_capture_processes", Gauge, ["capture"];
    /// Warnings of processes that have left a captured cgroup.
    CAPTURE_LEFT = "tunnel_capture_left", Counter, ["capture"];
    /// Counters of a capture's kernel programs.
    CAPTURE_EVENTS = "tunnel_capture_events", Counter, ["capture", "event"];

    /// Endpoints of an upstream, by state: available, ejected, unhealthy. One that is ejected by any worker counts as ejected.
    UPSTREAM_ENDPOINTS = "tunnel_upstream_endpoints", Gauge, ["upstream", "state"];
    /// Shared connections to an upstream, by state: open or connecting.
    UPSTREAM_CONNECTIONS = "tunnel_upstream_connections", Gauge, ["upstream", "state"];
    /// Streams that are open through an upstream.
    UPSTREAM_STREAMS = "tunnel_upstream_streams", Gauge, ["upstream"];
    /// Flows that wait for a connection to an upstream.
    UPSTREAM_PENDING = "tunnel_upstream_pending", Gauge, ["upstream"];
    /// Connections to an upstream, by result: success or failure.
    UPSTREAM_CONNECTED = "tunnel_upstream_connects", Counter, ["upstream", "result"];
    /// Streams through an upstream, by result: success or failure.
    UPSTREAM_OPENED = "tunnel_upstream_requests", Counter, ["upstream", "result"];
    /// Times that an endpoint of an upstream was ejected.
    UPSTREAM_EJECTIONS = "tunnel_upstream_ejections", Counter, ["upstream"];
    /// How long connections to an upstream took to be made, with their handshakes.
    UPSTREAM_CONNECT_SECONDS = "tunnel_upstream_connect_duration_seconds", Histogram, ["upstream"];

    /// When the certificate of an identity expires, in seconds since 1970.
    CERTIFICATE_EXPIRY = "tunnel_certificate_expiry_timestamp_seconds", Gauge, ["identity"];
    /// When its validity began.
    CERTIFICATE_BEGIN = "tunnel_certificate_not_before_timestamp_seconds", Gauge, ["identity"];

    /// Lines of access logs, by result: written or lost.
    ACCESS_LOG_LINES = "tunnel_access_log_lines", Counter, ["result"];
    /// Log lines that were lost: standard error was not read as fast as they came, or could not be written to.
    LOG_LINES_LOST = "tunnel_log_lines_lost", Counter, [];
    /// Spans of traces, by result: exported or dropped.
    SPANS = "tunnel_spans", Counter, ["result"];
    /// Requests to the admin interface, by the status that they were answered with.
    ADMIN_REQUESTS = "tunnel_admin_requests", Counter, ["code"];

    /// With admin.metrics = ["istio"]: flows that have reached their target. At most 2,000 pairs of identity and name have series of
    /// their own, of which each worker counts its share; the others are together in "other".
    ISTIO_OPENED = "istio_tcp_connections_opened", Counter, [@istio];
    /// With admin.metrics = ["istio"]: of these, those that have ended.
    ISTIO_CLOSED = "istio_tcp_connections_closed", Counter, [@istio];
    /// With admin.metrics = ["istio"]: flows that did not reach their target. Names that no flow has reached are together in
    /// "unknown".
    ISTIO_FAILED = "istio_tcp_connections_failed", Counter, [@istio];
    /// With admin.metrics = ["istio"]: bytes from targets to clients, counted while flows run. Istio's names are the target's:
    /// this is received_bytes in tunnel's own metrics and logs, for both reporters.
    ISTIO_SENT = "istio_tcp_sent_bytes", Counter, [@istio];
    /// With admin.metrics = ["istio"]: bytes from clients to targets.
    ISTIO_RECEIVED = "istio_tcp_received_bytes", Counter, [@istio];
}

/// The labels that ztunnel gives to every series of TCP.
const ISTIO_LABELS: &[&str] = &[
    "reporter",
    "source_workload",
    "source_canonical_service",
    "source_canonical_revision",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_cluster",
    "destination_service",
    "destination_service_namespace",
    "destination_service_name",
    "destination_workload",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_cluster",
    "request_protocol",
    "response_flags",
    "connection_security_policy",
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_unique_and_end_in_their_unit() {
        let names: BTreeSet<_> = METRICS.iter().map(|m| m.name).collect();
        assert_eq!(names.len(), METRICS.len());
        for metric in METRICS {
            let Metric { name, kind, help, .. } = metric;
            assert!(!name.ends_with("_total") && help.ends_with('.'), "{name}: {help}");
            assert!(*kind != Kind::Histogram || name.ends_with("_seconds"), "{name}");
        }
    }
}
