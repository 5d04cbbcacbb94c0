"""Laws of the notice that AWS gives in an instance's metadata, with a server that answers as the User Guide says."""

import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from segfleet import spot
from segfleet.spot import Metadata, watch

AT = datetime(2026, 11, 24, 8, 22, 0, tzinfo=UTC)


class Service(ThreadingHTTPServer):
    """The metadata service: a token for PUT, 401 without it or with an old one, 404 until there is a notice."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokens = 0
        self.notice: dict[str, str] | None = None
        self.asked = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def token(self) -> str:
        return f"token {self.tokens}"


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_PUT(self) -> None:
        is_right = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        if is_right:
            self.server.tokens += 1
        self._answer(200 if is_right else 400, self.server.token)

    def do_GET(self) -> None:
        self.server.asked += 1
        if self.headers["X-aws-ec2-metadata-token"] != self.server.token:
            self._answer(401)
        elif self.path != "/latest/meta-data/spot/instance-action" or self.server.notice is None:
            self._answer(404)
        else:
            self._answer(200, json.dumps(self.server.notice))

    def _answer(self, status: int, text: str = "") -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def service() -> Iterator[Service]:
    server = Service()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_there_is_no_notice_until_there_is_one_and_a_token_that_is_too_old_is_asked_for_again(
    service: Service,
) -> None:
    metadata = Metadata(service.address)
    assert [metadata.taken_back_at() for _ in range(2)] == [None, None]
    assert service.tokens == 1
    service.notice = {"action": "terminate", "time": AT.strftime("%Y-%m-%dT%H:%M:%SZ")}
    service.tokens += 1  # the old one is no longer taken
    assert metadata.taken_back_at() is None
    assert metadata.taken_back_at() == AT


class Counted(Metadata):
    """Counts how often it is asked."""

    asked = 0

    def taken_back_at(self) -> datetime | None:
        self.asked += 1
        return super().taken_back_at()


def test_a_service_that_is_away_is_waited_for(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    metadata = Counted("http://127.0.0.1:9")
    found: list[datetime] = []
    thread = threading.Thread(target=lambda: found.append(watch(metadata, poll_s=0.02)), daemon=True)
    thread.start()
    service.notice = {"action": "stop", "time": AT.isoformat()}
    deadline = time.monotonic() + 60
    while metadata.asked < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    metadata._address = service.address
    thread.join(60)
    assert found == [AT]
    said = capsys.readouterr().out
    assert said.startswith("waiting for the instance's metadata")
    assert said.count("\n") == 1  # once, however often it is asked


def test_the_program_says_when_and_fails_plainly_where_no_cluster_is(
    service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    service.notice = {"action": "terminate", "time": (datetime.now(UTC) + timedelta(seconds=120)).isoformat()}
    monkeypatch.setattr(sys, "argv", ["spot", "--address", "127.0.0.1:9", "--metadata", service.address])
    monkeypatch.setattr(spot, "DRAIN_TIMEOUT_S", 3.0)
    with pytest.raises(SystemExit, match=r"The cluster at 127\.0\.0\.1:9 must be told"):
        spot.main()
    assert re.fullmatch(
        r"this instance is taken back at \d\d:\d\d:\d\d UTC, in 1[12]\d s\n", capsys.readouterr().out
    )
