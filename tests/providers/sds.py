"""A secret discovery service for the tests, on `xds-protos` and grpcio: its wire types are Envoy's own.

usage: sds.py SOCKET. Each line of standard input is a state in JSON: {NAME: {"cert": FILE, "key": FILE}, NAME: {"ca": FILE},
NAME: {"domains": {TRUST_DOMAIN: FILE}}, NAME: {"broken": TEXT}}, or {"deny": TEXT}. What clients acknowledge or reject is
printed.
"""

import json
import queue
import sys
import threading
from concurrent import futures

import grpc
from envoy.extensions.transport_sockets.tls.v3 import secret_pb2, tls_spiffe_validator_config_pb2
from envoy.service.discovery.v3 import discovery_pb2
from envoy.service.secret.v3 import sds_pb2_grpc
from google.protobuf import any_pb2

TYPE = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"


def read(file):
    with open(file, "rb") as f:
        return f.read()


def secret(name, of):
    made = secret_pb2.Secret(name=name)
    if "cert" in of:
        made.tls_certificate.certificate_chain.inline_bytes = read(of["cert"])
        made.tls_certificate.private_key.inline_bytes = read(of["key"])
    elif "ca" in of:
        made.validation_context.trusted_ca.inline_string = read(of["ca"]).decode()
    elif "domains" in of:
        config = tls_spiffe_validator_config_pb2.SPIFFECertValidatorConfig()
        for domain, file in of["domains"].items():
            config.trust_domains.add(name=domain).trust_bundle.inline_bytes = read(file)
        custom = made.validation_context.custom_validator_config
        custom.name = "envoy.tls.cert_validator.spiffe"
        custom.typed_config.Pack(config)
    else:
        made.tls_certificate.certificate_chain.inline_string = of["broken"]
    return made


class Servicer(sds_pb2_grpc.SecretDiscoveryServiceServicer):
    def __init__(self):
        self.changed = threading.Condition()
        self.state, self.version = None, 0

    def set(self, state):
        with self.changed:
            self.state, self.version = state, self.version + 1
            self.changed.notify_all()

    def StreamSecrets(self, requests, context):
        asked = queue.Queue()

        def listen():
            try:
                for request in requests:
                    asked.put(request)
            except grpc.RpcError:
                pass

        threading.Thread(target=listen, daemon=True).start()
        first = asked.get()
        names, sent = list(first.resource_names), 0
        print(f"asked {','.join(names)} of {first.type_url}", flush=True)
        while context.is_active():
            with self.changed:
                self.changed.wait_for(lambda: self.version > sent, timeout=0.05)
                state, version = self.state, self.version
            while not asked.empty():
                said = asked.get()
                word = f"rejected {said.error_detail.message}" if said.HasField("error_detail") else "accepted"
                print(f"{word} {','.join(names)} {said.version_info}", flush=True)
            if version == sent:
                continue
            sent = version
            if "deny" in state:
                context.abort(grpc.StatusCode.PERMISSION_DENIED, state["deny"])
            answer = discovery_pb2.DiscoveryResponse(
                version_info=str(version), type_url=TYPE, nonce=f"nonce-{version}"
            )
            for name in names:
                if name in state:
                    packed = any_pb2.Any()
                    packed.Pack(secret(name, state[name]))
                    answer.resources.append(packed)
            if answer.resources:
                yield answer


servicer = Servicer()
server = grpc.server(futures.ThreadPoolExecutor(max_workers=32))
sds_pb2_grpc.add_SecretDiscoveryServiceServicer_to_server(servicer, server)
assert server.add_insecure_port("unix:" + sys.argv[1])
for line in sys.stdin:
    first = servicer.state is None
    servicer.set(json.loads(line))
    if first:
        server.start()
        print("listening", flush=True)
server.stop(0).wait()
