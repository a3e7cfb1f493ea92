"""Floods a listener of HTTP/3 by aioquic: h3_pings.py HOST PORT CA CERT KEY COUNT

Sends so many PING frames, as fast as the connection lets it, and says how it ended.
"""

import asyncio
import sys

from aioquic.asyncio.client import connect
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.h3.connection import H3Connection
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import ConnectionTerminated, ProtocolNegotiated


class Client(QuicConnectionProtocol):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.http = None
        self.ended = asyncio.get_running_loop().create_future()

    def quic_event_received(self, event):
        if isinstance(event, ProtocolNegotiated):
            self.http = H3Connection(self._quic)
        if isinstance(event, ConnectionTerminated) and not self.ended.done():
            self.ended.set_result(f"closed {hex(event.error_code)}")


async def main(host, port, ca, cert, key, count):
    configuration = QuicConfiguration(is_client=True, alpn_protocols=["h3"])
    configuration.load_verify_locations(ca)
    configuration.load_cert_chain(cert, key)
    async with connect(host, int(port), configuration=configuration, create_protocol=Client) as client:
        await client.wait_connected()
        for sent in range(int(count)):
            client._quic.send_ping(sent)
            client.transmit()
            if sent % 50 == 49:
                await asyncio.sleep(0.001)
            if client.ended.done():
                break
        try:
            print(f"ended={await asyncio.wait_for(client.ended, 10)}", flush=True)
        except asyncio.TimeoutError:
            print("ended=not", flush=True)


asyncio.run(main(*sys.argv[1:]))
