"""The HTTP interface, driven by OpenAI's own client, and by clients that mean no good."""

import base64
import ctypes
import gc
import http.client
import io
import json
import os
import re
import subprocess
import sys
import threading
import wave
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlparse

import av
import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from serving_utils import send_without_end, serving
from training_utils import load_script

from anygpt.chat.chat_model import ChatModel, Settings, place
from anygpt.media.writing import write_audio, write_video
from anygpt.serving.engine import Busy, Engine, Job
from anygpt.serving.http import BodyLimits, Interface
from anygpt.serving.openai_form import Limits

QUICK = {"decoders": {key: {"num_inference_steps": 2} for key in ("image", "video", "audio")}}
HELLO = [{"role": "user", "content": "Draw a ring."}]


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("final")
    for one in tiny_model():
        one.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(checkpoint):
    engine = Engine(ChatModel(checkpoint), max_waiting=40)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def address(engine):
    limits = Limits(new_tokens=400, messages=20, characters=5000, media=3)
    with serving(Interface(engine, "anygpt", limits, BodyLimits(bytes=2 * 1024**2, seconds=2.0)).app()) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=240)


def data_url(data, kind):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def attachments(media, tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    write_video(folder / "a.mp4", media.video(0), 8)
    write_audio(folder / "a.wav", media.audio(0), 16_000)
    return {
        "image": {"type": "image_url", "image_url": {"url": data_url(png(media.image(0)), "image/png")}},
        "video": {"type": "video_url", "video_url": {"url": data_url((folder / "a.mp4").read_bytes(), "video/mp4")}},
        "audio": {
            "type": "input_audio",
            "input_audio": {"data": base64.b64encode((folder / "a.wav").read_bytes()).decode(), "format": "wav"},
        },
    }


def decode_part(part):
    kind = part["type"]
    if kind == "input_audio":
        return base64.b64decode(part[kind]["data"])
    head, _, data = part[kind]["url"].partition(",")
    assert head == {"image_url": "data:image/png;base64", "video_url": "data:video/mp4;base64"}[kind]
    return base64.b64decode(data)


def test_four_modalities_in_and_out(client, attachments):
    content = [*attachments.values(), {"type": "text", "text": "What are these?"}]
    done = client.chat.completions.create(
        model="anygpt",
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}],
        max_tokens=16,
        extra_body={"require": ["image", "video", "audio"], **QUICK},
    )
    message = done.choices[0].message
    assert message.role == "assistant" and message.content and done.choices[0].finish_reason in ("stop", "length")
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    assert done.usage.completion_tokens <= 16 and done.usage.prompt_tokens > 60
    parts = {part["type"]: part for part in message.parts}
    assert message.content == "".join(p["text"] for p in message.parts if p["type"] == "text")
    with Image.open(io.BytesIO(decode_part(parts["image_url"]))) as image:
        assert (image.format, image.size) == ("PNG", (32, 32))
    with av.open(io.BytesIO(decode_part(parts["video_url"]))) as container:
        assert container.streams.video[0].width == 32
    with wave.open(io.BytesIO(decode_part(parts["input_audio"]))) as sound:
        assert sound.getframerate() == 16_000 and sound.getnframes() > 0

    # the answer goes on as it came, media and all: they are inputs then
    going_on = [
        {"role": "user", "content": "Draw."},
        message.model_dump(),
        {"role": "user", "content": "Again."},
    ]
    again = client.chat.completions.create(
        model="anygpt", messages=going_on, max_tokens=2, extra_body={"forbid": ["image", "video", "audio"]}
    )
    assert again.usage.prompt_tokens > 60


def test_a_stream_says_the_same(client):
    options = {"model": "anygpt", "messages": HELLO, "max_tokens": 12, "seed": 3}
    extra = {"require": ["image"], **QUICK}
    whole = client.chat.completions.create(**options, extra_body=extra)
    text, parts, progress, finish, usage = "", [], [], None, None
    stream = client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}, extra_body=extra
    )
    for chunk in stream:
        usage = chunk.usage or usage
        progress += [chunk.progress] if getattr(chunk, "progress", None) else []
        for choice in chunk.choices:
            text += choice.delta.content or ""
            parts += getattr(choice.delta, "parts", None) or []
            finish = choice.finish_reason or finish
    assert text == whole.choices[0].message.content
    assert finish == whole.choices[0].finish_reason and usage == whole.usage
    expected = [p | {"index": i} for i, p in enumerate(whole.choices[0].message.parts) if p["type"] != "text"]
    assert parts == expected
    assert progress[0] == {"decoder": "image", "step": 0}
    assert progress[1:] == [{"decoder": "image", "step": step, "steps": 2} for step in (1, 2)]


def test_sampling_is_by_the_seed_and_modalities_are_kept(client):
    def say(seed):
        return (
            client.chat.completions.create(
                model="anygpt", messages=HELLO, max_tokens=12, temperature=1.5, seed=seed, modalities=["text"]
            )
            .choices[0]
            .message
        )

    assert say(1).content == say(1).content != say(2).content
    assert all(part["type"] == "text" for part in say(1).parts)


def test_models_and_health(client, address):
    assert [model.id for model in client.models.list()] == ["anygpt"]
    assert client.models.retrieve("anygpt").id == "anygpt"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client.models.retrieve("other")
    assert httpx.get(f"{address}/health").json()["status"] == "ok"


def bomb():
    """A small PNG of a very large picture."""
    return png(Image.new("L", (8_000, 8_000)))


def image_part(url):
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"messages": []}, 400, "at least one message"),
        ({"messages": [{"role": "user", "content": "  "}]}, 400, r"messages\[0\] is empty"),
        ({"messages": [{"role": "robot", "content": "a"}]}, 400, "the role is 'robot'; expected system"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "a"}]}, 400, "last message is the assistant's"),
        ({"messages": HELLO * 21}, 400, "number of messages is 21, more than the 20"),
        ({"messages": [{"role": "user", "content": "a" * 5001}]}, 400, "characters is 5001"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, 400, "lone surrogate"),
        ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, 400, "type is 'file'; expected text"),
        ({"messages": image_part("http://127.0.0.1:1/a.png")}, 400, "URLs are not fetched"),
        ({"messages": image_part("file:///etc/passwd")}, 400, "URLs are not fetched"),
        ({"messages": image_part("data:image/png;base64,!!")}, 400, "not base64"),
        ({"messages": image_part("data:image/png,abc")}, 400, "not a data URL in base64"),
        ({"messages": image_part(data_url(b"GIF89a nonsense", "image/png"))}, 400, "cannot be read as an image"),
        ({"messages": image_part(data_url(bomb(), "image/png"))}, 400, "pixels, more than max_pixels"),
        ({"max_tokens": 401}, 400, "max_tokens is 401, more than the 400"),
        ({"max_tokens": "many"}, 400, "max_tokens is 'many'"),
        ({"temperature": 3}, 400, "temperature is 3"),
        ({"temperature": True}, 400, "temperature is True"),
        ({"top_p": 0}, 400, "top_p is 0"),
        ({"seed": 1.5}, 400, "seed is 1.5"),
        ({"n": 2}, 400, "n is not 1"),
        ({"tools": [{"type": "function"}]}, 400, "'tools' is not supported"),
        ({"require": ["smell"]}, 400, "require is .*expected a list of image, video, audio"),
        ({"require": ["image"], "forbid": ["image"]}, 400, "required and forbidden"),
        ({"require": ["image"], "max_tokens": 1}, 400, "no room for the 4 signal tokens"),
        ({"decoders": {"image": {"steps": 3}}}, 400, "no option 'steps'"),
        ({"decoders": {"image": {"num_inference_steps": 900}}}, 400, "is 900, more than the 200"),
        ({"decoders": {"image": {"height": 8192}}}, 400, "is 8192, more than the 1024"),
        ({"decoders": {"video": {"num_frames": 1000}}}, 400, "is 1000, more than the 64"),
        ({"decoders": {"image": {"negative_prompt": "\ud83d"}}}, 400, "expected a text of whole characters"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, 400, r"the role is \['user'\]"),
        ({"messages": [{"role": "user", "content": {"type": "text"}}]}, 400, "a text or a list of parts"),
        ({"messages": {"role": "user"}}, 400, "messages must be a list"),
        ({"messages": ["Draw."]}, 400, r"messages\[0\] must be an object"),
        ({"stream": "yes"}, 400, "stream must be true or false"),
        ({"seed": 2**63}, 400, "seed is 9223372036854775808"),
        ({"temperature": 1e-300, "seed": True}, 400, "seed is True"),
        ({"max_tokens": 10**400}, 400, "max_tokens is 1000"),
        ({"temperature": 10**400}, 400, "temperature is 1000"),
        ({"decoders": {"image": {"height": 8 * 10**400}}}, 400, "is 8000"),
        ({"decoders": {"image": {"guidance_scale": 10**400}}}, 400, "expected a finite number"),
        ({"decoders": []}, 400, "decoders must be an object"),
        ({"modalities": ["smell"]}, 400, "modalities is"),
        ({"model": "gpt-4o"}, 404, "there is no model 'gpt-4o'"),
        ({"messages": [{"role": "user", "content": "a " * 2400}], "max_tokens": 400}, 400, "begin a new conversation"),
    ],
)
def test_bad_requests_get_a_sentence(address, change, status, message):
    body = json.dumps({"model": "anygpt", "messages": HELLO, "max_tokens": 4} | change)
    answer = httpx.post(
        f"{address}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}, timeout=240
    )
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert re.search(message, error["message"]), error["message"]


def post(address, body, **headers):
    headers = {"Content-Type": "application/json"} | headers
    return httpx.post(f"{address}/v1/chat/completions", content=body, headers=headers, timeout=240)


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        (b"{", {}, 400, "not JSON"),
        (b"\xff\xfe{}", {}, 400, "not JSON"),
        (b"[]", {}, 400, "a JSON list"),
        (b'{"messages": NaN}', {}, 400, "NaN"),
        (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", {}, 400, "nested too deeply"),
        (b'{"seed": ' + b"9" * 5000 + b"}", {}, 400, "not JSON"),
        (b"{}", {"Content-Type": "text/plain"}, 415, "expected application/json"),
        (b" " * (2 * 1024**2 + 1), {}, 413, "2,097,152"),
    ],
    ids=["cut", "bytes", "list", "nan", "deep", "digits", "plain", "large"],
)
def test_broken_bodies(address, body, headers, status, message):
    answer = post(address, body, **headers)
    assert answer.status_code == status and message in answer.json()["error"]["message"], answer.text


@pytest.mark.parametrize(
    ("path", "kind", "status"),
    [
        ("/v1/chat/completions", "application/json", 413),
        ("/v1/chat/completions", "text/plain", 415),
        ("/v1/models", "application/json", 405),
        ("/nowhere", "application/json", 404),
    ],
)
def test_a_body_without_an_end_ends_the_connection(address, path, kind, status):
    assert send_without_end(f"{address}{path}", kind) in (status, None)


def test_a_body_that_does_not_come(address):
    parsed = urlparse(address)
    connection = http.client.HTTPConnection(parsed.hostname, parsed.port, timeout=30)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", "100")
    connection.endheaders(b"{")
    answer = connection.getresponse()
    assert answer.status == 408 and "2 seconds" in answer.read().decode()
    assert connection.sock is None, "the rest of the body would be taken for a request"
    connection.close()


def test_wrong_routes(address):
    answer = httpx.get(f"{address}/v1/chat/completions")
    assert answer.status_code == 405 and "Method Not Allowed" in answer.json()["error"]["message"]
    assert httpx.get(f"{address}/../../etc/passwd").status_code == 404


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads memory from /proc")
def test_32_clients_at_once(client, address, engine):
    """Good ones, ones that hang up midway, broken ones and too large ones; memory returns to where it was."""

    def good(number):
        extra = {"require": ["image"], **QUICK}
        done = client.chat.completions.create(
            model="anygpt", messages=HELLO, max_tokens=8, seed=number, extra_body=extra
        )
        assert any(part["type"] == "image_url" for part in done.choices[0].message.parts)
        return "good"

    def hangs_up(number):
        body = {"model": "anygpt", "messages": HELLO, "max_tokens": 300, "stream": True, "forbid": ["image"]}
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=240) as answer:
            next(answer.iter_lines())
        return "hung up"

    def goes_before_its_turn(number):
        body = {"model": "anygpt", "messages": HELLO, "max_tokens": 300}
        try:
            httpx.post(f"{address}/v1/chat/completions", json=body, timeout=httpx.Timeout(0.05, connect=60))
        except (httpx.ReadTimeout, httpx.WriteTimeout):
            return "gone"
        raise AssertionError("an answer of 300 tokens cannot be there so soon")

    def broken(number):
        assert post(address, b'{"messages": [').status_code == 400
        return "broken"

    def too_large(number):
        url = data_url(b"0" * 2 * 1024**2, "image/png")
        body = json.dumps({"model": "anygpt", "messages": image_part(url)})
        assert post(address, body).status_code == 413
        return "too large"

    kinds = [good, good, hangs_up, goes_before_its_turn, good, broken, good, too_large]

    def round_of_clients():
        with ThreadPoolExecutor(32) as pool:
            found = list(pool.map(lambda number: kinds[number % len(kinds)](number), range(32)))
        assert [found.count(kind) for kind in ("good", "hung up", "gone", "broken", "too large")] == [16, 4, 4, 4, 4]
        good(0)  # the queue is empty behind it
        gc.collect()
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc keeps what is free until it is told
            trim(0)
        return resident()

    before = [round_of_clients() for _ in range(3)][-1]  # what the first rounds leave are caches, oneDNN's among them
    after = round_of_clients()
    assert engine.waiting == 0
    assert not [found for found in gc.get_objects() if type(found) is Job]  # isinstance would touch dead weak proxies
    assert after < before + 48 * 1024**2, f"{(after - before) / 1024**2:.0f} MiB more than before"


def test_a_full_queue_says_so(checkpoint):
    engine = Engine(ChatModel(checkpoint), max_waiting=1)
    held, go_on = threading.Event(), threading.Event()

    def hold(event):
        held.set()
        go_on.wait()

    settings = Settings(max_new_tokens=4, forbid=("image", "video", "audio"))
    first = engine.submit(HELLO, settings, hold)
    held.wait()
    ended = []
    engine.submit(HELLO, settings, ended.append).cancel()
    with serving(Interface(engine, "anygpt").app()) as address:
        answer = post(address, json.dumps({"model": "anygpt", "messages": HELLO}))
        assert answer.status_code == 429 and "try again" in answer.json()["error"]["message"]
        assert answer.headers["Retry-After"]
    with pytest.raises(Busy, match="1 requests are waiting"):
        engine.submit(HELLO, settings, hold)
    first.cancel()
    go_on.set()
    engine.close()
    assert ended == [], "one that was cancelled before its turn never begins"


def test_faults_are_not_told_to_clients(engine, address, caplog):
    """Something that is the server's fault gives 500 without its inside, and the next request is answered."""
    body = json.dumps({"model": "anygpt", "messages": HELLO, "max_tokens": 2, "forbid": ["image", "video", "audio"]})
    tokenizer, engine.chat_model.model.tokenizer = engine.chat_model.model.tokenizer, object()
    try:
        answer = post(address, body)
    finally:
        engine.chat_model.model.tokenizer = tokenizer
    assert answer.status_code == 500 and "tokenizer" not in answer.text and "log" in answer.json()["error"]["message"]
    assert "AttributeError" in caplog.text
    assert post(address, body).status_code == 200


def test_offloaded_decoders_make_the_same(tiny_model):
    """Diffusers' helper with the CPU as the device: the way through the code, not the memory that it saves."""
    model, processor = tiny_model((), ("image", "audio"))
    batch = processor.apply_chat_template(HELLO, tokenize=True, add_generation_prompt=True)
    kwargs = {key: {"num_inference_steps": 2, "seed": 1, "negative_prompt": "a"} for key in model.decoder_keys}
    options = {"max_new_tokens": 8, "require": ["image", "audio"], "decoder_kwargs": kwargs}
    expected = model.generate(**batch, **options).answers[0]
    place(model, "cpu", offload=True)
    assert all(hasattr(d.module.denoiser, "_hf_hook") for d in model.decoders.values())
    for _ in range(2):
        found = model.generate(**batch, **options).answers[0]
        assert np.array_equal(np.asarray(found.images[0]), np.asarray(expected.images[0]))
        assert np.array_equal(found.audios[0], expected.audios[0])


def test_anygpt_does_not_import_the_servers():
    servers = "m.split('.')[0] in ('gradio', 'starlette', 'fastapi', 'uvicorn') or m.startswith('anygpt.serving')"
    code = f"import sys, anygpt, anygpt.chat.chat_model; print([m for m in sys.modules if {servers}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("script", ["serve", "demo"])
def test_the_scripts_find_mistakes_first(script, capsys):
    for arguments, message in (
        (["--port", "99999"], "cannot listen"),
        (["--device", "nonsense"], "--device 'nonsense'"),
        (["--offload"], "--offload"),
    ):
        assert load_script(script).main(arguments) == 2
        said = capsys.readouterr().err
        assert message in said and len(said.splitlines()) == 1, said
