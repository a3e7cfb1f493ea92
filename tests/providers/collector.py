"""A collector of OpenTelemetry, as far as a test needs one: OTLP over HTTP, decoded by OpenTelemetry's own messages.

It prints each span as a line of JSON. A line on standard input is the status of the answers from then on.
"""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

status = 200
lock = threading.Lock()


def value(any_value):
    return getattr(any_value, any_value.WhichOneof("value"))


def attributes(pairs):
    return {pair.key: value(pair.value) for pair in pairs}


class Collector(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        answer = ExportTraceServiceResponse().SerializeToString()
        if status == 200:
            assert self.headers["content-type"] == "application/x-protobuf", self.headers
            request = ExportTraceServiceRequest.FromString(body)
            assert request.ByteSize() == len(body), "fields that the messages do not have"
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        self.tell(resource, scope, span)
        self.send_response(status)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def tell(self, resource, scope, span):
        line = {
            "path": self.path,
            "key": self.headers["x-key"],
            "resource": attributes(resource.resource.attributes),
            "scope": scope.scope.name,
            "trace": span.trace_id.hex(),
            "id": span.span_id.hex(),
            "parent": span.parent_span_id.hex(),
            "name": span.name,
            "kind": Span.SpanKind.Name(span.kind),
            "start": span.start_time_unix_nano,
            "end": span.end_time_unix_nano,
            "attributes": attributes(span.attributes),
            "status": Status.StatusCode.Name(span.status.code),
            "message": span.status.message,
        }
        with lock:
            print("span=" + json.dumps(line), flush=True)

    def log_message(self, *_):
        pass


address, port = sys.argv[1].rsplit(":", 1)
server = ThreadingHTTPServer((address, int(port)), Collector)
threading.Thread(target=server.serve_forever, daemon=True).start()
print(f"listening={server.server_address[0]}:{server.server_address[1]}", flush=True)
for line in sys.stdin:
    status = int(line)
    print(f"status={status}", flush=True)
