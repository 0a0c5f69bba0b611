"""What the tests of the servers share: a server in a thread."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import uvicorn

from anygpt.serving.gate import server_config


@contextlib.contextmanager
def serving(app, **options):
    """`app` on a free port, in a thread, with options of uvicorn; gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        server = uvicorn.Server(server_config(app, timeout_graceful_shutdown=2, **options))
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
