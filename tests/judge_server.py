"""A chat-completions endpoint on 127.0.0.1 that answers as a test tells it to, and remembers what it was asked."""

from __future__ import annotations

import contextlib
import json
import threading
import time

from local_server import LocalServer


def verdict(score, *, reason="fine", usage=(10, 5)):
    """What a well-behaved endpoint answers."""
    content = json.dumps({"reason": reason, "score": score})
    return 200, {"choices": [{"message": {"role": "assistant", "content": content}}],
                 "usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1]}}  # fmt: skip


def says(content):
    return 200, {"choices": [{"message": {"role": "assistant", "content": content}}]}


class JudgeServer(LocalServer):
    """`answer(text, attempt)` gives (status, JSON or raw text[, headers]); `text` is what stands in <response>, attempt counts from 0.

    In place of the text a function may write to the connection: then it alone says what is sent.
    """

    def __init__(self, answer, *, delay=0.0):
        self.answer, self.delay = answer, delay
        self.bodies, self.headers, self.paths = [], [], []
        self.active = self.most = 0
        self.lock = threading.Lock()
        super().__init__()
        self.url += "/v1"

    @property
    def texts(self):
        return [text_in(body) for body in self.bodies]

    def handle(self, request, body):
        with self.lock:
            attempt = sum(text_in(other) == text_in(body) for other in self.bodies)
            self.bodies.append(body)
            self.headers.append(dict(request.headers))
            self.paths.append(request.path)
            self.active += 1
            self.most = max(self.most, self.active)
        if self.delay:
            time.sleep(self.delay)
        status, content, *headers = self.answer(text_in(body), attempt)
        if callable(content):  # writes what it likes to the socket
            with contextlib.suppress(OSError):
                content(request.wfile)
            request.close_connection = True
            return
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        with self.lock:
            self.active -= 1
        try:
            request.send_response(status)
            for name, value in (headers[0] if headers else {}).items():
                request.send_header(name, value)
            request.send_header("Content-Length", str(len(data)))
            request.end_headers()
            request.wfile.write(data)
        except OSError:  # who asked is gone
            pass


def text_in(body):
    content = body["messages"][-1]["content"]
    return content.split("<response>\n")[1].split("\n</response>")[0]
