"""A client in Python: client.py http|urllib BASE [CERT KEY CA]. It fetches
bytes of all sizes and stores some, counted and in chunks. It prints ok when
all came back as it was."""

import http.client
import ssl
import sys
import urllib.parse
import urllib.request

kind, base = sys.argv[1:3]
context = None
if len(sys.argv) > 3:
    cert, key, ca = sys.argv[3:]
    context = ssl.create_default_context(cafile=ca)
    context.load_cert_chain(cert, key)


def pattern(size):
    return (bytes(range(251)) * (size // 251 + 1))[:size]


def by_connection():
    """One connection for all requests."""
    where = urllib.parse.urlsplit(base)
    if context:
        c = http.client.HTTPSConnection(where.hostname, where.port, timeout=10, context=context)
    else:
        c = http.client.HTTPConnection(where.hostname, where.port, timeout=10)
    c.auto_open = 1
    socks = set()

    def ask(method, path, body=None, chunked=False):
        c.request(method, path, body=body, headers={"Transfer-Encoding": "chunked"} if chunked else {}, encode_chunked=chunked)
        socks.add(id(c.sock))
        r = c.getresponse()
        assert len(socks) == 1, "a connection was closed"
        return r.status, r.headers, r.read()

    return ask


def by_urllib():
    def ask(method, path, body=None, chunked=False):
        request = urllib.request.Request(base + path, method=method, data=body)
        with urllib.request.urlopen(request, timeout=10, context=context) as r:
            return r.status, r.headers, r.read()

    return ask


ask = by_connection() if kind == "http" else by_urllib()
for size in (0, 1024, 1 << 20):
    want = pattern(size)
    status, _, got = ask("GET", "/bytes/%d" % size)
    assert (status, got) == (200, want), "GET of %d bytes: %d" % (size, status)
    for how in ("counted", "chunked"):
        path = "/store/%s-%s-%d" % (kind, how, size)
        # An iterable goes in chunks, with urllib, too.
        body = want if how == "counted" else iter([part for part in (want[: size // 3], want[size // 3 :]) if part])
        status, _, _ = ask("PUT", path, body, how == "chunked")
        assert status in (201, 204), "PUT %s: %d" % (path, status)
        assert ask("GET", path)[2] == want, "GET " + path
_, headers, got = ask("HEAD", "/bytes/1024")
assert (headers["Content-Length"], got) == ("1024", b""), "HEAD"
print("ok")
