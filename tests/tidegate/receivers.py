"""A real HTTP receiver of webhooks on loopback, which answers what it is told to and keeps what it got."""

import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class Receiver(ThreadingHTTPServer):
    """`answers` are the status codes to come, then 200; `got` is (headers, body) of each request."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers, self.got, self.said = [], [], b"thanks"

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/hook"

    def told(self):
        """(type, data) of each request."""
        bodies = [json.loads(body) for _, body in self.got]
        return [(body["type"].removeprefix("tidegate."), body["data"]) for body in bodies]


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.got.append((dict(self.headers), body))
        self.send_response(self.server.answers.pop(0) if self.server.answers else 200)
        self.send_header("location", "http://127.0.0.1:9/elsewhere")
        self.send_header("content-length", str(len(self.server.said)))
        self.end_headers()
        self.wfile.write(self.server.said)

    def log_message(self, *_arguments):
        pass


@contextmanager
def receiving():
    """A receiver that listens."""
    with Receiver() as server:
        thread = Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
