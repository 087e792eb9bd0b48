"""Calls of gRPC in Python: calls.py ADDRESS [CERT KEY CA]. It prints ok when
all ended as they should."""

import queue
import sys

import grpc

address = sys.argv[1]
options = [("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", 16 << 20)]
if len(sys.argv) > 2:
    cert, key, ca = (open(name, "rb").read() for name in sys.argv[2:])
    channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, key, cert), options + [("grpc.ssl_target_name_override", "localhost")])
else:
    channel = grpc.insecure_channel(address, options)


def ends(call, want):
    """Waits until a call ends, which has to be with that code."""
    try:
        for _ in call:
            pass
        got = call.code()
    except grpc.RpcError as error:
        got = error.code()
    assert got == want, (got, call.details())


class Talk:
    """A call whose messages go both ways."""

    def __init__(self, method, **how):
        self.to_say = queue.Queue()
        self.call = channel.stream_stream("/test.Calls/" + method)(iter(self.to_say.get, None), **how)

    def say(self, message):
        self.to_say.put(message)
        got = next(self.call)
        assert got == message, got


unary = channel.unary_unary("/test.Calls/Unary")
said = (("x-say", "hello"), ("x-say-bin", b"\x00\xff\x80"))
for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip):
    for size in (0, 1, 65536, 3 << 20):
        answer, call = unary.with_call(b"x" * size, metadata=said, timeout=20, compression=compression)
        assert answer == b"x" * size, len(answer)
        for told in (dict(call.initial_metadata()), dict(call.trailing_metadata())):
            for name, value in said:
                assert told[name] == value, told
calls = [unary.future(b"call %d" % i, timeout=20) for i in range(50)]
assert [c.result() for c in calls] == [b"call %d" % i for i in range(50)]

talk = Talk("Stream", timeout=20)
for i in range(100):
    talk.say(b"message %d" % i)
talk.to_say.put(None)
ends(talk.call, grpc.StatusCode.OK)

failing = Talk("Failing", timeout=20)
failing.say(b"hello")
ends(failing.call, grpc.StatusCode.FAILED_PRECONDITION)
assert failing.call.details() == "not today: 100% ☃\n", failing.call.details()

late = Talk("Holding", timeout=1)
late.say(b"hello")
ends(late.call, grpc.StatusCode.DEADLINE_EXCEEDED)

left = Talk("Holding", timeout=20)
left.say(b"hello")
left.call.cancel()
ends(left.call, grpc.StatusCode.CANCELLED)
for open_talk in (failing, late, left):
    open_talk.to_say.put(None)
channel.close()
print("ok")
