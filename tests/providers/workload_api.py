"""A SPIFFE Workload API for the tests, on the servicer of PyPI's `spiffe` and grpcio: its wire types are not ours.

usage: workload_api.py SOCKET. Each line of standard input is a state in JSON:
{"svids": [{"id": ID, "cert": FILE, "key": FILE, "bundle": FILE}], "federated": {TRUST_DOMAIN: FILE}}, or {"deny": TEXT}.
Each stream gets the state at once, and again when there is another; denied, it ends with PERMISSION_DENIED.
"""

import base64
import json
import re
import sys
import threading
from concurrent import futures

import grpc
from spiffe._proto import workload_pb2, workload_pb2_grpc


def der(file):
    """All sections of a PEM file, one after the other."""
    with open(file) as f:
        sections = re.findall("-----BEGIN [A-Z ]+-----(.*?)-----END", f.read(), re.DOTALL)
    return b"".join(base64.b64decode("".join(section.split())) for section in sections)


class Servicer(workload_pb2_grpc.SpiffeWorkloadAPIServicer):
    def __init__(self):
        self.changed = threading.Condition()
        self.state, self.version = None, 0

    def set(self, state):
        with self.changed:
            self.state, self.version = state, self.version + 1
            self.changed.notify_all()

    def FetchX509SVID(self, request, context):
        metadata = dict(context.invocation_metadata())
        if metadata.get("workload.spiffe.io") != "true":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "security header missing from request")
        seen = 0
        while context.is_active():
            with self.changed:
                self.changed.wait_for(lambda: self.version > seen, timeout=0.1)
                if self.version == seen:
                    continue
                state, seen = self.state, self.version
            if "deny" in state:
                context.abort(grpc.StatusCode.PERMISSION_DENIED, state["deny"])
            answer = workload_pb2.X509SVIDResponse()
            for svid in state["svids"]:
                answer.svids.add(
                    spiffe_id=svid["id"],
                    x509_svid=der(svid["cert"]),
                    x509_svid_key=der(svid["key"]),
                    bundle=der(svid["bundle"]),
                )
            for domain, file in state.get("federated", {}).items():
                answer.federated_bundles[domain] = der(file)
            yield answer
            print(f"sent {len(state['svids'])}", flush=True)


servicer = Servicer()
server = grpc.server(futures.ThreadPoolExecutor(max_workers=16))
workload_pb2_grpc.add_SpiffeWorkloadAPIServicer_to_server(servicer, server)
assert server.add_insecure_port("unix:" + sys.argv[1])
for line in sys.stdin:
    first = servicer.state is None
    servicer.set(json.loads(line))
    if first:
        server.start()
        print("listening", flush=True)
server.stop(0).wait()
