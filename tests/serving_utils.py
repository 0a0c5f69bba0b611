"""What the tests of the servers share: a server in a thread, and a client that goes on and on."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import httpx
import uvicorn

from anygpt.serving.gate import server_config


@contextlib.contextmanager
def serving(app):
    """`app` on a free port, in a thread; gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        server = uvicorn.Server(server_config(app, timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.05)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join()


def send_without_end(url, kind="application/json"):
    """POST far more than any server here would read; returns the status, or None where the server hung up before."""
    pieces = 16_384  # a gibibyte, so that a server that reads on fails the test rather than hangs it

    def body():
        nonlocal pieces
        while pieces:
            pieces -= 1
            yield b" " * 65_536

    try:
        answer = httpx.post(url, content=body(), headers={"Content-Type": kind}, timeout=120)
        status = answer.status_code
        assert answer.headers["Connection"] == "close"
    except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
        status = None
    assert pieces, "the server read on and on"
    return status
