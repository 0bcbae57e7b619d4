"""HTTP of a loopback Hub: an origin that turns every request into a call, and the answer into bytes on the wire."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from .errors import HubError
from .faults import Fault, Faults

CHUNK = 1 << 20
UNSATISFIABLE = 416


class ConnectionCutError(Exception):
    """A fault ends the connection here."""


@dataclass(frozen=True)
class Call:
    """A request: ``path`` is percent-encoded and without the query, ``body`` is to be read at most once."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Message
    body: Iterator[bytes]

    def json(self) -> Any:
        return json.loads(self.read() or b"{}")

    def read(self) -> bytes:
        return b"".join(self.body)

    def form(self) -> list[tuple[str, str]]:
        """The fields of a form, from JSON or URL encoding."""
        content = self.read()
        if self.headers.get_content_type() == "application/json":
            return [(key, item) for key, items in json.loads(content).items() for item in _as_list(items)]
        return parse_qsl(content.decode())

    @property
    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None


@dataclass(frozen=True)
class Answer:
    """A response; a body that is a file is sent in ranges where the request asks for one."""

    body: bytes | Path = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
        """JSON."""
        return cls(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    @classmethod
    def refusal(cls, error: HubError) -> Answer:
        return cls.of({"error": error.message}, error.status, error.headers)


@dataclass(frozen=True)
class Request:
    """What the log keeps of a request.

    Args:
        origin: "hub" or "cdn".
        method, path: as asked, percent-decoded and without the query.
        headers: by lower-case name, without Authorization.
        authorized: an Authorization header was sent.
        status: of the answer; 0 for a connection cut before one.
        length: bytes in the answer's body.
    """

    origin: str
    method: str
    path: str
    headers: Mapping[str, str]
    authorized: bool
    status: int
    length: int


class Origin:
    """A server on a loopback port, which stays the same when stopped and started again.

    Args:
        name: "hub" or "cdn", in the log and for faults.
        host: in URLs; it has to mean 127.0.0.1.
        answer: what answers a call.
        faults: consulted before each call is answered.
        log: receives every request before its answer is sent.
    """

    def __init__(
        self, name: str, host: str, answer: Callable[[Call], Answer], faults: Faults, log: Callable[[Request], None]
    ) -> None:
        self.name = name
        self.host = host
        self.answer = answer
        self.faults = faults
        self.log = log
        self.port = 0
        self._server: _Server | None = None

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def start(self) -> None:
        self._server = _Server(("127.0.0.1", self.port), type("Handler", (_Handler,), {"origin": self}))
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Drop every connection, as a killed server does."""
        if self._server is not None:
            self._server.close()
            self._server = None


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 64

    def __init__(self, *args: Any) -> None:
        self._open: set[socket.socket] = set()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def close_request(self, request: Any) -> None:
        self._open.discard(request)
        super().close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error of the server."""

    def close(self) -> None:
        self.shutdown()
        for connection in list(self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    origin: Origin
    place: tuple[str, str, str]

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        self.place = self.origin.name, self.command, unquote(parts.path)
        fault = self.origin.faults.take(*self.place)
        try:
            body = self._body()
            answer = self._faulty(fault) or self._answered(parts.path, parts.query, body)
            for _ in body:
                pass
            self._send(answer)
        except ConnectionCutError:
            self._log(0, 0)
            self._hang_up()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _answered(self, path: str, query: str, body: Iterator[bytes]) -> Answer:
        try:
            return self.origin.answer(Call(self.command, path, dict(parse_qsl(query)), self.headers, body))
        except HubError as error:
            return Answer.refusal(error)
        except ConnectionCutError:
            raise
        except Exception as error:  # a server answers whatever happens; the test sees it
            return Answer.of({"error": f"{type(error).__name__}: {error}"}, 500)

    def _faulty(self, fault: Fault | None) -> Answer | None:
        if fault is None:
            return None
        if fault.action is not None:
            fault.action()
        time.sleep(fault.seconds)
        if not isinstance(fault.status, int):
            return None
        headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
        return Answer.refusal(HubError(fault.status, "Out of order", None, headers))

    def _body(self) -> Iterator[bytes]:
        chunked = "chunked" in self.headers.get("Transfer-Encoding", "")
        length = int(self.headers.get("Content-Length", sys.maxsize if chunked else 0))
        fault = self.origin.faults.take_body(*self.place, length) if self.command in ("POST", "PUT") else None
        received = 0
        for chunk in self._chunked() if chunked else self._sized(length):
            received += len(chunk)
            if fault is not None and received > fault.after_bytes:
                raise ConnectionCutError
            yield chunk

    def _sized(self, left: int) -> Iterator[bytes]:
        while left:
            chunk = self.rfile.read(min(CHUNK, left))
            if not chunk:
                raise ConnectionCutError
            left -= len(chunk)
            yield chunk

    def _chunked(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _send(self, answer: Answer) -> None:
        size = answer.body.stat().st_size if isinstance(answer.body, Path) else len(answer.body)
        status, start, end, headers = answer.status, 0, size, dict(answer.headers)
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if status == 200 and "Accept-Ranges" in headers and asked and asked.group() != "bytes=-":
            first, last = asked.groups()
            start = int(first) if first else max(0, size - int(last))
            end = min(size, int(last) + 1) if first and last else size
            if start >= size or start >= end:
                return self._send(Answer(b"", UNSATISFIABLE, {"Content-Range": f"bytes */{size}"}))
            status = 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        self._log(status, 0 if self.command == "HEAD" else end - start)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(end - start)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._send_body(answer.body, start, end)
        return None

    def _send_body(self, body: bytes | Path, start: int, end: int) -> None:
        fault = self.origin.faults.take_body(*self.place, end - start) if self.command == "GET" else None
        cut = fault is not None and fault.status == "cut"
        stop = min(end, start + fault.after_bytes) if cut and fault else end
        corrupt = fault is not None and fault.status == "corrupt"
        for chunk in _slices(body, start, stop):
            self.wfile.write(bytes([chunk[0] ^ 0xFF]) + chunk[1:] if corrupt else chunk)
            corrupt = False
        if cut:
            self._hang_up()

    def _hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _log(self, status: int, length: int) -> None:
        headers = {name.lower(): value for name, value in self.headers.items() if name.lower() != "authorization"}
        path, sent = unquote(urlsplit(self.path).path), "Authorization" in self.headers
        self.origin.log(Request(self.origin.name, self.command, path, headers, sent, status, length))

    def log_message(self, *args: object) -> None:
        """Nothing on stderr: the log of requests is a list."""


def _slices(body: bytes | Path, start: int, end: int) -> Iterator[bytes]:
    if isinstance(body, bytes):
        if end > start:
            yield body[start:end]
        return
    with body.open("rb") as file:
        file.seek(start)
        while start < end:
            chunk = file.read(min(CHUNK, end - start))
            start += len(chunk)
            yield chunk


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
