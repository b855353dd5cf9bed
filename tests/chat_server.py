"""A real HTTP server that speaks OpenAI's chat completions, on this machine, with faults on request."""

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

Answer = str | int | bytes
"""A reply; a status code to fail with; or bytes to send in place of JSON."""


class ChatServer(ThreadingHTTPServer):
    """Answers with what `answer(body, number of the request)` says, and remembers requests.

    Attributes:
        requests: the bodies that came in.
        authorizations: their Authorization headers.
        most_at_once: how many were under way together at the most.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, answer: Callable[[dict[str, Any], int], Answer], delay_s: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.delay_s = answer, delay_s
        self.requests: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        self.lock, self.at_once, self.most_at_once = threading.Lock(), 0, 0

    @property
    def url(self) -> str:
        """What endpoint.url is set to."""
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_POST(self) -> None:
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.requests)
            server.requests.append(body)
            server.authorizations.append(self.headers.get("Authorization"))
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            time.sleep(server.delay_s)
            answer = 404 if self.path != "/v1/chat/completions" else server.answer(body, number)
        finally:
            with server.lock:
                server.at_once -= 1
        if isinstance(answer, int):
            key = self.headers.get("Authorization", "no key")
            self._send(answer, json.dumps({"error": {"message": f"fault {answer} for {key}"}}).encode())
        elif isinstance(answer, bytes):
            self._send(200, answer)
        else:
            choice = {"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}
            self._send(200, json.dumps({"object": "chat.completion", "choices": [choice]}).encode())

    def _send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Stay silent."""


@contextmanager
def chat_server(answer: Callable[[dict[str, Any], int], Answer], delay_s: float = 0.0) -> Iterator[ChatServer]:
    """A server for the time of the block."""
    server = ChatServer(answer, delay_s)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def shown_picture(body: dict[str, Any]) -> Image.Image | None:
    """The picture that a request shows, decoded."""
    for part in body["messages"][-1]["content"]:
        if isinstance(part, dict) and part["type"] == "image_url":
            return Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2])))
    return None


def asked_text(body: dict[str, Any]) -> str:
    """The words of a request."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else next(part["text"] for part in content if part["type"] == "text")
