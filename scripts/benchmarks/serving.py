"""HTTP requests: clients that request pictures, answered one by one or in batches; and clients that disconnect.

    anygpt benchmark serving                                     # eight clients
    anygpt benchmark serving --sides hang-ups --seconds 300      # 32 clients that disconnect and ask again

`hang-ups` fails if a request is lost or an error is not in OpenAI's form; `grown_mib` is the growth of resident memory
from the second to the last third of the time, by medians.
"""

import argparse
import itertools
import random
import socket
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from anygpt.chat.chat_model import ChatModel
from anygpt.commands import CHECKPOINT
from anygpt.serving.engine import Engine
from anygpt.serving.gate import server_config
from anygpt.serving.http import Interface

import httpx
import psutil
import uvicorn

HANG_UPS = "hang-ups"
BATCHES = {"one by one": 1, "together": 8}
CLIENTS, REQUESTS = 8, 32  # clients that ask for pictures, and the requests of all of them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="(default: the quickstart's last)")
    parser.add_argument("--seconds", type=float, default=30, help="duration of hang-ups (default: %(default)s)")
    parser.add_argument("--sides", nargs="*", default=list(BATCHES), choices=[*BATCHES, HANG_UPS])


def sides(options: argparse.Namespace) -> list[str]:
    return options.sides


def measure(side: str, options: argparse.Namespace) -> dict[str, float]:
    engine = Engine(ChatModel(options.checkpoint), max_waiting=64, max_batch=BATCHES.get(side, 8))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(server_config(Interface(engine, "anygpt").app()))
        threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/chat/completions"
        while not server.started:
            time.sleep(0.05)
        ask(url, 0)  # warm-up
        found = hang_ups(url, options.seconds) if side == HANG_UPS else pictures(url)
        server.should_exit = True
    return found


def ask(url: str, seed: int, timeout: float = 600, **more) -> httpx.Response:
    body = {"model": "anygpt", "seed": seed, "max_tokens": 64, "require": ["image"], **more}
    return httpx.post(url, json=body | {"messages": [{"role": "user", "content": "Draw a red ring."}]}, timeout=timeout)


def pictures(url: str) -> dict[str, float]:
    """Seconds per request, with all clients active."""
    began = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        for answer in pool.map(lambda seed: ask(url, seed), range(REQUESTS)):
            answer.raise_for_status()
    return {"request_s": (time.perf_counter() - began) / REQUESTS}


def hang_ups(url: str, seconds: float, clients: int = 32) -> dict[str, float]:
    """Run clients of which some wait for the answer, some disconnect, and some send invalid requests."""
    end, memory, process = time.monotonic() + seconds, [], psutil.Process()

    def client(number: int) -> tuple[int, int, int]:
        answered, gone, refused = 0, 0, 0
        draw = random.Random(number)
        for request in itertools.count():
            if time.monotonic() > end:
                return answered, gone, refused
            kind = draw.choice(["wait", "hang up", "hang up", "wrong"])
            try:
                more = {"require": ["smell"]} if kind == "wrong" else {}
                timeout = draw.uniform(0.01, 2) if kind == "hang up" else 600
                answer = ask(url, request, timeout, **more)
            except httpx.TimeoutException:
                gone += 1
                continue
            if answer.status_code == 200:
                answered += 1
            else:
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, answer.text
                assert answer.status_code == (400 if kind == "wrong" else 429), answer.text
                refused += 1

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client, number) for number in range(clients)]
        while time.monotonic() < end:
            time.sleep(seconds / 30)
            memory.append(process.memory_info().rss)
        counts = [sum(kind) for kind in zip(*(one.result() for one in running), strict=True)]
    third = len(memory) // 3
    grown = statistics.median(memory[-third:]) - statistics.median(memory[third : 2 * third])
    return dict(zip(("answered", "hung_up", "refused"), counts, strict=True)) | {"grown_mib": grown / 2**20}
