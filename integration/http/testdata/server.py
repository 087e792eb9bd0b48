"""A service in Python: server.py PORT. It gives out bytes of a pattern and
keeps what it is given."""

import http.server
import sys

store = {}


def pattern(size):
    return (bytes(range(251)) * (size // 251 + 1))[:size]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status, body=b""):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self):
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", "0")))
        parts = []
        while True:
            size = int(self.rfile.readline(), 16)
            parts.append(self.rfile.read(size))
            self.rfile.readline()
            if size == 0:
                return b"".join(parts)

    def do_GET(self):
        _, kind, name = self.path.split("/")
        if kind == "bytes":
            self.answer(200, pattern(int(name)))
        elif self.path in store:
            self.answer(200, store[self.path])
        else:
            self.answer(404)

    do_HEAD = do_GET

    def do_PUT(self):
        store[self.path] = self.body()
        self.answer(201)

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
