"""WebSockets in Python: ws.py serve PORT, or ws.py call URL [CERT KEY CA]. The
client prints ok when all came back as it was, and how it was closed."""

import asyncio
import os
import ssl
import sys

import websockets


async def echo(ws, *_):
    async for message in ws:
        await ws.send(message)


async def serve(port):
    async with websockets.serve(echo, "127.0.0.1", port, max_size=32 << 20):
        await asyncio.Future()


async def call(url, *files):
    context = None
    if files:
        cert, key, ca = files
        context = ssl.create_default_context(cafile=ca)
        context.load_cert_chain(cert, key)
    async with websockets.connect(url, ssl=context, max_size=32 << 20) as ws:
        for i in range(100):
            await ws.send("message %d" % i)
            assert await ws.recv() == "message %d" % i
        for size in (0, 125, 126, 65535, 65536, 4 << 20):
            message = os.urandom(size)  # what is compressed stays as large
            await ws.send(message)
            assert await ws.recv() == message
        await asyncio.wait_for(await ws.ping("are you there"), 10)
        print("ok", flush=True)
        try:
            await ws.recv()
        except websockets.ConnectionClosed:
            print("closed", ws.close_code, flush=True)


if sys.argv[1] == "serve":
    asyncio.run(serve(int(sys.argv[2])))
else:
    asyncio.run(call(*sys.argv[2:]))
