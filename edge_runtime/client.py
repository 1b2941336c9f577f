"""A small blocking client of the daemon's Unix socket, for the command line."""

import http.client
import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

from edge_runtime.core.errors import EdgeRuntimeError, InvalidRequest, RefusalKind, Refused, StorageError
from edge_runtime.core.messages import InferReply, InferRequest, OutputRequest
from edge_runtime.core.protocol import oip
from edge_runtime.storage.files import check_owner

_UNAVAILABLE = {429: RefusalKind.FULL, 503: RefusalKind.DRAINING, 504: RefusalKind.LATE}


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """Connect, if the socket and its folder belong to this user. Raises OSError, StorageError.

        In a folder that is predictable anybody could have made a socket first, to read requests and to invent answers.
        A folder that only this user can write keeps the socket from being exchanged between the check and the connect.
        """
        for place in (self._path.parent, self._path):
            try:
                check_owner(place)
            except StorageError as error:
                raise StorageError(f"[server] socket: {self._path} is not used: {error}") from None
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Client:
    """Talks to the daemon behind one socket path; one connection per call.

    Every call raises StorageError, and sends nothing, where the socket or its folder belongs to another user.
    """

    def __init__(self, path: Path, timeout_s: float = 30.0) -> None:
        self._path = path
        self._timeout_s = timeout_s

    def is_alive(self) -> bool:
        """Whether a daemon answers here. Raises StorageError where the socket is not this user's."""
        try:
            return self._call("GET", "/v2/health/live", b"", {})[0] == 200
        except StorageError:
            raise
        except EdgeRuntimeError:
            return False

    def get(self, path: str) -> dict[str, Any]:
        """A JSON resource. Raises EdgeRuntimeError."""
        status, _, body = self._call("GET", path, b"", {})
        if status != 200:
            raise EdgeRuntimeError(self._error_of(body, status))
        tree: dict[str, Any] = json.loads(body)
        return tree

    def infer(self, model: str, request: InferRequest) -> InferReply:
        """Ask a model. Raises Refused, InvalidRequest or EdgeRuntimeError as the daemon answered."""
        # Outputs come in binary: 1024 rows with all their scores are more JSON than a reader accepts.
        outputs = tuple(OutputRequest(output.name, binary=True) for output in request.outputs)
        body, json_length = oip.encode_request(
            replace(request, outputs=outputs, binary_default=True), binary=True
        )
        headers = {"Inference-Header-Content-Length": str(json_length)}
        status, found, answer = self._call("POST", f"/v2/models/{model}/infer", body, headers)
        if status == 200:
            length = found.get("inference-header-content-length")
            try:
                return oip.decode_reply(answer, None if length is None else int(length))
            except (InvalidRequest, ValueError) as error:
                raise EdgeRuntimeError(
                    f"The reply of the daemon at {self._path} cannot be read ({error}); is it of another version?"
                ) from None
        message = self._error_of(answer, status)
        if status in _UNAVAILABLE:
            raise Refused(_UNAVAILABLE[status], message)
        raise InvalidRequest(message) if status < 500 else EdgeRuntimeError(message)

    def _error_of(self, body: bytes, status: int) -> str:
        try:
            return oip.decode_error(body)[0]
        except InvalidRequest:
            return f"The daemon at {self._path} answered with status {status} and no reason; see its log."

    def _call(
        self, method: str, path: str, body: bytes, headers: dict[str, str]
    ) -> tuple[int, dict[str, str], bytes]:
        connection = _UnixConnection(self._path, self._timeout_s)
        try:
            connection.request(method, path, body or None, headers)
            reply = connection.getresponse()
            return reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read()
        except (OSError, http.client.HTTPException) as error:
            raise EdgeRuntimeError(
                f"The daemon at {self._path} does not answer ({error}); start one with: edge-runtime serve"
            ) from None
        finally:
            connection.close()
