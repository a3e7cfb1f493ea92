"""CONNECT over HTTP/3 by aioquic: h3_connect.py HOST PORT CA CERT KEY (echo|send) TARGET BYTES

Sends so many bytes through a tunnel to TARGET; with "echo" it ends its direction behind them. Says the status, how many
bytes came back, and how the tunnel ended.
"""

import asyncio
import sys

from aioquic.asyncio.client import connect
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.h3.connection import H3Connection
from aioquic.h3.events import DataReceived, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import ConnectionTerminated, ProtocolNegotiated, StreamReset


class Client(QuicConnectionProtocol):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.http = None
        self.status = asyncio.get_running_loop().create_future()
        self.ended = asyncio.get_running_loop().create_future()
        self.received = 0

    def end(self, how):
        if not self.ended.done():
            self.ended.set_result(how)
        if not self.status.done():
            self.status.set_result(how)

    def quic_event_received(self, event):
        if isinstance(event, ProtocolNegotiated):
            self.http = H3Connection(self._quic)
        if isinstance(event, StreamReset):
            self.end(hex(event.error_code))
        if isinstance(event, ConnectionTerminated):
            self.end(f"closed {hex(event.error_code)} {event.reason_phrase}")
        if self.http is None:
            return
        for http_event in self.http.handle_event(event):
            if isinstance(http_event, HeadersReceived) and not self.status.done():
                self.status.set_result(dict(http_event.headers)[b":status"].decode())
            if isinstance(http_event, DataReceived):
                self.received += len(http_event.data)
            if getattr(http_event, "stream_ended", False):
                self.end("FIN")


async def main(host, port, ca, cert, key, does, target, count):
    configuration = QuicConfiguration(is_client=True, alpn_protocols=["h3"])
    configuration.load_verify_locations(ca)
    configuration.load_cert_chain(cert, key)
    async with connect(host, int(port), configuration=configuration, create_protocol=Client) as client:
        await client.wait_connected()
        stream = client._quic.get_next_available_stream_id()
        client.http.send_headers(stream, [(b":method", b"CONNECT"), (b":authority", target.encode())])
        client.transmit()
        status = await asyncio.wait_for(client.status, 20)
        print(f"status={status}", flush=True)
        if status != "200":
            return
        client.http.send_data(stream, b"x" * int(count), end_stream=does == "echo")
        client.transmit()
        ended = await asyncio.wait_for(client.ended, 20)
        print(f"received={client.received} ended={ended}", flush=True)


asyncio.run(main(*sys.argv[1:]))
