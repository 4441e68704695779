"""Object storage on the loopback interface that can be made to fail, and remembers what was written."""

import contextlib
import itertools
import logging
import re
import socket
import threading
import time

from pyarrow.fs import FileSystem
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wsgi import get_input_stream

HANG_S = 60.0  # that a call without an answer is kept waiting
SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"


class Store:
    """moto's S3 behind a gate of ours.

    Attributes:
        uri: of storage in it.
        mode: what happens to a call: "" nothing, "fail" (an error or a connection that ends), "hang" (no answer).
        every: the calls that it happens to: each one, each tenth.
        puts: names of all objects that were written, and hashes of what they held, in order; a client that has waited
            too long for its answer writes the same once more.
        hit: calls that were made to fail.
    """

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app

        self.app = DomainDispatcherApplication(create_backend_app)
        self.mode, self.every = "", 10
        self.puts: list[tuple[str, str]] = []
        self.hit, self._calls = 0, itertools.count(1)
        logging.getLogger("werkzeug").setLevel(logging.CRITICAL)  # of connections that end
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        options = f"scheme=http&region=us-east-1&allow_bucket_creation=true&endpoint_override=127.0.0.1%3A{self.port}"
        self.uri = f"s3://user:secret@bucket/pdiff?{options}"
        self.fs = FileSystem.from_uri(self.uri)[0]
        self.fs.create_dir("bucket")

    @property
    def port(self) -> int:
        return self._server.server_port

    @contextlib.contextmanager
    def spared(self):
        """Fails no call for as long as who disturbs looks into it."""
        mode, self.mode = self.mode, ""
        try:
            yield
        finally:
            self.mode = mode

    def stop(self) -> None:
        from moto.moto_api._internal import moto_api_backend

        self.mode = ""
        self._server.shutdown()
        self._server.server_close()
        moto_api_backend.reset()  # what was written would outlive the server

    def _answer(self, environ, start_response):
        number = next(self._calls)
        if self.mode and number % self.every == 0:
            self.hit += 1
            if self.mode == "hang":
                until = time.monotonic() + HANG_S
                while self.mode == "hang" and time.monotonic() < until:
                    time.sleep(0.1)
            elif number // self.every % 2:
                get_input_stream(environ).read()  # off the connection, which is used again
                start_response("503 Slow Down", [("Content-Type", "application/xml")])
                return [b"" if environ["REQUEST_METHOD"] == "HEAD" else SLOW_DOWN]
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionError("made to end")
        wrote = {}

        def started(status, headers, *rest):
            wrote.update(status=status, etag=dict(headers).get("ETag", ""))
            return start_response(status, headers, *rest)

        answer = self.app(environ, started)
        done = wrote["status"].startswith("200") and environ["REQUEST_METHOD"] in ("PUT", "POST")
        if done and not re.search(r"^(uploads|delete)\b|\bpartNumber\b", environ["QUERY_STRING"]):
            self.puts.append((environ["PATH_INFO"].removeprefix("/bucket/"), wrote["etag"]))
        return answer


class _Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *arguments) -> None:
        pass
