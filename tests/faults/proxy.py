"""A server between a client and MLflow that loses answers: MLflow has done what it was asked, nobody hears of it."""

import contextlib
import http.client
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class LossyProxy(ThreadingHTTPServer):
    """Passes everything on, and loses the first `num_lost` answers to each kind of request that changes something."""

    daemon_threads = True

    def __init__(self, upstream_port: int, num_lost: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream_port, self.num_lost = upstream_port, num_lost
        self.uri = f"http://127.0.0.1:{self.server_port}"
        self.lost: Counter[str] = Counter()
        self._lock = threading.Lock()

    def is_to_lose(self, kind: str) -> bool:
        """Whether the answer to a request of this kind is lost."""
        with self._lock:
            is_lost = self.lost[kind] < self.num_lost
            self.lost[kind] += is_lost
            return is_lost

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that gave up is nothing to report."""


class _Handler(BaseHTTPRequestHandler):
    server: LossyProxy

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream_port, timeout=60)
        headers = dict(self.headers) | {"Host": f"127.0.0.1:{self.server.upstream_port}"}
        upstream.request(self.command, self.path, body, headers)
        reply = upstream.getresponse()
        content = reply.read()
        upstream.close()
        kind = f"{self.command} {self.path.partition('?')[0]}"
        is_change = self.command != "GET" and not self.path.partition("?")[0].endswith("/search")
        if is_change and reply.status < 300 and self.server.is_to_lose(_without_ids(kind)):
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.send_response(reply.status)
        for name, value in reply.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _without_ids(kind: str) -> str:
    """Return the request without the parts that differ from run to run."""
    return "/".join(
        part if part.replace("-", "").replace("_", "").isalpha() else "ID" for part in kind.split("/")
    )


@contextlib.contextmanager
def lossy_proxy(upstream_port: int, *, num_lost: int) -> Iterator[LossyProxy]:
    """Run a `LossyProxy` in a thread."""
    proxy = LossyProxy(upstream_port, num_lost)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
