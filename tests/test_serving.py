"""The HTTP interface, driven by OpenAI's own client, and by clients that mean no good."""

import base64
import ctypes
import gc
import http.client
import importlib
import io
import json
import os
import queue
import re
import resource
import socket
import threading
import time
import wave
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from urllib.parse import urlparse

import av
import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from serving_utils import serving
from training_utils import REPOSITORY, run_forked

from anygpt import InputError, commands
from anygpt.chat.chat_model import ChatModel, Reply, Settings, TooLong
from anygpt.generation.events import Closed, DecodingStarted, DecodingStep, MediumDone, TextPiece
from anygpt.media.writing import write_audio, write_video
from anygpt.outputs import Segment
from anygpt.serving.engine import Busy, Engine, Job
from anygpt.serving.http import Interface
from anygpt.serving.openai_form import Limits, _of_answer

QUICK = {"decoders": {key: {"num_inference_steps": 2} for key in ("image", "video", "audio")}}
get, ask_options = partial(httpx.get, timeout=240), partial(httpx.options, timeout=240)
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
    limits = Limits(body_bytes=2 * 1024**2, characters=5000, media=3)
    with serving(Interface(engine, "anygpt", limits).app()) as address:
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


@pytest.mark.parametrize(("index", "types"), [(1, ["text", "image_url"]), (0, ["image_url", "text"])])
def test_a_streamed_answer_is_sent_back_whole(index, types):
    """Its pieces of text are its content, and its media have their places in parts."""
    parts = [{"type": "image_url", "image_url": {"url": "data:"}, "index": index}]
    assert [part["type"] for part in _of_answer("Here it is.", parts, "parts")] == types


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
    assert get(f"{address}/health").json()["status"] == "ok"


def bomb():
    """A small PNG of a very large picture."""
    return png(Image.new("L", (8_000, 8_000)))


def said(content, **more):
    return [{"role": "user", "content": content, **more}]


def answered(content, **more):
    return [*HELLO, {"role": "assistant", "content": content, **more}, *HELLO]


def image_part(url, **more):
    return said([{"type": "image_url", "image_url": {"url": url, **more}}])


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"messages": []}, 400, r"messages is \[\]: List should have at least 1 item"),
        ({"messages": [{"role": "user", "content": "  "}]}, 400, r"messages\[0\] is empty"),
        ({"messages": [{"role": "robot", "content": "a"}]}, 400, "the role is 'robot'; expected system"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "a"}]}, 400, "last message is the assistant's"),
        ({"messages": [{"role": "user", "content": "a" * 5001}]}, 400, "characters is 5001"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, 400, "lone surrogate"),
        ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, 400, "type is 'file'; expected text"),
        ({"messages": image_part("http://127.0.0.1:1/a.png")}, 400, "URLs are not fetched"),
        ({"messages": image_part("file:///etc/passwd")}, 400, "URLs are not fetched"),
        ({"messages": image_part("data:image/png;base64,!!")}, 400, "not base64"),
        ({"messages": image_part("data:image/png,abc")}, 400, "not a data URL in base64"),
        ({"messages": image_part(data_url(b"GIF89a nonsense", "image/png"))}, 400, "cannot be read as an image"),
        ({"messages": image_part(data_url(bomb(), "image/png"))}, 400, "pixels, more than max_pixels"),
        ({"messages": image_part(data_url(b"RIFF", "audio/wav"))}, 400, "of the type audio/wav; expected one of image"),
        ({"messages": image_part(data_url(b"a", "image/png"), detail="low")}, 400, "image_url.detail is not supported"),
        ({"messages": image_part(data_url(b"a", "image/png"), crop=[1])}, 400, "image_url.crop is not supported"),
        ({"messages": said([{"type": "text", "text": "a", "foo": 1}])}, 400, r"content\[0\].foo is not supported"),
        ({"messages": said([{"type": "input_audio", "input_audio": {"format": 5}}])}, 400, "format is 5; expected wav"),
        ({"messages": said("Hi", parts=[{"type": "text", "text": "a"}])}, 400, r"messages\[0\].parts is not supported"),
        ({"messages": said("Hi", name="Bob")}, 400, r"messages\[0\].name is not supported"),
        ({"messages": answered(None, tool_calls=[{"id": "a"}])}, 400, r"messages\[1\].tool_calls is not supported"),
        ({"messages": answered(None, audio={"id": "a"})}, 400, r"messages\[1\].audio is not supported"),
        ({"messages": answered(None, refusal="No.")}, 400, r"messages\[1\].refusal is not supported"),
        ({"messages": answered("b", parts=[{"type": "text", "text": "a"}])}, 400, "have another text than content"),
        ({"messages": answered("b", parts=["a"])}, 400, "parts must be a list of parts"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options has no effect without stream"),
        (
            {"stream": True, "stream_options": {"include_usage": "no"}},
            400,
            "stream_options.include_usage is 'no': .*valid boolean",
        ),
        ({"stream": True, "stream_options": {"foo": 1}}, 400, "stream_options.foo is 1: .*not permitted"),
        ({"max_completion_tokens": 5}, 400, "max_tokens and max_completion_tokens differ"),
        ({"modalities": ["image"]}, 400, "also name text"),
        ({"modalities": []}, 400, "also name text"),
        ({"decoders": {"image": {"seed": [5, 6]}}}, 400, "seed is a list; expected one whole number"),
        ({"max_tokens": "many"}, 400, "max_tokens is 'many'"),
        ({"temperature": 3}, 400, "temperature is 3"),
        ({"temperature": True}, 400, "temperature is True"),
        ({"top_p": -0.1}, 400, "top_p is -0.1"),
        ({"stop": [""]}, 400, r"stop\[0\] is '': .*at least 1 character"),
        ({"stop": list("abcde")}, 400, "at most 4 items"),
        ({"tool_choice": "required"}, 400, "'tool_choice' is not supported"),
        ({"seed": 1.5}, 400, "seed is 1.5"),
        ({"n": 2}, 400, "n is 2: Input should be 1"),
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
        ({"messages": {"role": "user"}}, 400, "messages is .*: Input should be a valid list"),
        ({"messages": ["Draw."]}, 400, r"messages\[0\] is 'Draw.': Input should be a valid dictionary"),
        ({"stream": "yes"}, 400, "stream is 'yes': Input should be a valid boolean"),
        ({"seed": 2**63}, 400, "seed is 9223372036854775808"),
        ({"temperature": 1e-300, "seed": True}, 400, "seed is True"),
        ({"temperature": 10**400}, 400, "temperature is 1000"),
        ({"decoders": {"image": {"height": 8 * 10**400}}}, 400, "is 8000"),
        ({"decoders": {"image": {"guidance_scale": 10**400}}}, 400, "expected a finite number"),
        ({"decoders": []}, 400, r"decoders is \[\]: Input should be a valid dictionary"),
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


def test_a_body_that_does_not_come(engine):
    with serving(Interface(engine, "anygpt", Limits(body_seconds=2.0)).app()) as address:
        parsed = urlparse(address)
        connection = http.client.HTTPConnection(parsed.hostname, parsed.port, timeout=240)
        connection.putrequest("POST", "/v1/chat/completions")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", "100")
        connection.endheaders(b"{")
        answer = connection.getresponse()
        assert answer.status == 408 and "2 seconds" in answer.read().decode()
        assert connection.sock is None, "the rest of the body would be taken for a request"
        connection.close()


@pytest.mark.parametrize(("path", "status"), [("chat/completions", 415), ("nowhere", 404)])
def test_a_body_without_an_end_ends_its_connection(engine, path, status):
    with serving(Interface(engine, "anygpt").app(), timeout_keep_alive=1) as address:
        parsed, start = urlparse(address), time.monotonic()
        with socket.create_connection((parsed.hostname, parsed.port), timeout=240) as client:
            head = f"POST /v1/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\n"
            client.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
            assert str(status) in client.recv(4096).decode()
            with pytest.raises(OSError):
                while time.monotonic() < start + 240:
                    client.sendall(b"1\r\na\r\n")
                    time.sleep(0.05)


def test_wrong_routes(address):
    answer = get(f"{address}/v1/chat/completions")
    assert answer.status_code == 405 and "Method Not Allowed" in answer.json()["error"]["message"]
    assert get(f"{address}/../../etc/passwd").status_code == 404


def complete(client, **options):
    return client.chat.completions.create(**{"model": "anygpt", "messages": HELLO, "max_tokens": 12} | options)


NO_MEDIA = {"forbid": ["image", "video", "audio"]}


@pytest.mark.parametrize(
    "options",
    [
        {"tool_choice": "none"},
        {"tool_choice": "none", "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        {"parallel_tool_calls": False},
        {"max_completion_tokens": 4000, "max_tokens": None, "stop": ["e"]},
        {"seed": -1, "top_p": 0, "temperature": 1},
        {"messages": answered("", refusal=None, tool_calls=None, annotations=[], audio=None, function_call=None)},
        {"messages": image_part(data_url(png(Image.new("RGB", (8, 8))), "image/png"), detail="auto")},
        {"max_completion_tokens": 12, "modalities": ["text"], "stream_options": None},
        {"stop": None, "logit_bias": {}, "frequency_penalty": 0.0, "reasoning_effort": "low"},
    ],
)
def test_what_openais_clients_send_by_habit(checkpoint, options):
    """With the limits that a server has without flags."""
    engine = Engine(ChatModel(checkpoint))
    with serving(Interface(engine, "anygpt").app()) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=240)
        assert complete(client, extra_body=NO_MEDIA, **options).choices[0].message.refusal is None
    engine.close()


def test_stop_texts_end_an_answer_and_are_not_in_it(client, engine):
    """Whole and streamed, also where a stop text is spread over several tokens; the reason is `stop` then."""
    whole = complete(client, max_tokens=40, extra_body=NO_MEDIA).choices[0]
    text = whole.message.content
    assert whole.finish_reason == "length" and len(text) > 30
    for stop in (text[9:11], [text[20:31], "never said"], [text[25], text[12:25]]):
        texts = [stop] if isinstance(stop, str) else stop
        expected = text[: min(place for t in texts if (place := text.find(t)) >= 0)]
        found = complete(client, max_tokens=40, stop=stop, extra_body=NO_MEDIA)
        assert found.choices[0].message.content == expected and found.choices[0].finish_reason == "stop"
        assert found.usage.completion_tokens < 40, "it goes on behind the stop text"
        stream = complete(client, max_tokens=40, stop=stop, stream=True, extra_body=NO_MEDIA)
        pieces = [(chunk.choices[0].delta.content or "", chunk.choices[0].finish_reason) for chunk in stream]
        assert "".join(piece for piece, _ in pieces) == expected and pieces[-1][1] == "stop"
    held = complete(client, max_tokens=40, stop=text[-1] + "!", stream=True, extra_body=NO_MEDIA)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in held) == text, "what was held back is given"


def test_finish_reasons_and_usage(client, engine):
    """`length` where the tokens, or the model's context, are over; `stop` where the answer ended, also with the last
    token that it may have."""
    model = engine.chat_model.model
    long = [{"role": "user", "content": "a " * 1005}]
    full = complete(client, messages=long, max_tokens=400, extra_body=NO_MEDIA)
    assert full.choices[0].finish_reason == "length"
    assert full.usage.total_tokens == model.language_model.config.max_position_embeddings
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, messages=[{"role": "user", "content": "a " * 2100}], extra_body=NO_MEDIA)
    assert refused.value.code == "context_length_exceeded"
    said = engine.chat_model.answer(HELLO, Settings(max_new_tokens=3, forbid=("image", "video", "audio")))
    config = model.language_model.generation_config
    batch = engine.chat_model.processor.apply_chat_template(HELLO, tokenize=True, add_generation_prompt=True)
    third = model.generate(**batch, max_new_tokens=3, forbid=("image", "video", "audio")).sequences[0, 2].item()
    assert said.new_tokens == 3 and not said.complete
    before, config.eos_token_id = config.eos_token_id, third
    try:
        engine.chat_model.__dict__.pop("_ends", None)
        assert complete(client, max_tokens=3, extra_body=NO_MEDIA).choices[0].finish_reason == "stop"
    finally:
        config.eos_token_id = before
        engine.chat_model.__dict__.pop("_ends", None)
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}, extra_body=NO_MEDIA))
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 12


def test_media_with_line_breaks_in_their_base64(client, media):
    """As `base64` of the shell and MIME write it, and percent-encoded as a URL may be."""
    data = base64.encodebytes(png(media.image(0))).decode()
    assert "\n" in data.strip()
    percent = data.replace("\n", "%0A").replace("+", "%2B").replace("=", "%3D")
    for encoded in (data, data.replace("\n", "\r\n"), percent):
        content = image_part(f"data:image/png;base64,{encoded}")
        assert complete(client, messages=content, max_tokens=2, extra_body=NO_MEDIA).usage.prompt_tokens > 10


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
def test_an_answer_ends_when_its_client_is_gone(address, engine, monkeypatch, stream):
    """Plain requests as streamed ones, while tokens come and while a decoder works."""
    model, tell, work = engine.chat_model.model, Job.tell, []
    denoiser = model.decoders["image"].module.denoiser
    worked = [m.register_forward_pre_hook(lambda *_: work.append(1)) for m in (model.language_model, denoiser)]
    slow = {"decoders": {"image": {"num_inference_steps": 200, "height": 64, "width": 64}}, "require": ["image"]}
    for kind, more in ((TextPiece, {"max_tokens": 400, **NO_MEDIA}), (DecodingStep, {"max_tokens": 12, **slow})):
        begun, at_end = threading.Event(), []

        def wait_for_its_end(job, event, kind=kind, begun=begun, at_end=at_end):
            if isinstance(event, kind) and not begun.is_set():
                begun.set()
                deadline = time.monotonic() + 240
                while not job.cancelled and time.monotonic() < deadline:
                    time.sleep(0.01)
                at_end.append(len(work))
            tell(job, event)

        monkeypatch.setattr(Job, "tell", wait_for_its_end)
        body = json.dumps({"model": "anygpt", "messages": HELLO, "stream": stream, **more}).encode()
        host = urlparse(address)
        connection = socket.create_connection((host.hostname, host.port))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host.netloc}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert begun.wait(240)
        connection.close()
        nothing_more = Settings(max_new_tokens=1, forbid=("image", "video", "audio"))
        engine.submit(HELLO, nothing_more, (done := queue.SimpleQueue()).put)
        while not isinstance(done.get(timeout=240), Reply):
            pass
        assert len(work) - at_end[0] < 5
    for hook in worked:
        hook.remove()


def test_connections_that_say_nothing_shut_nobody_out(address):
    """1,100 of them, some in the middle of a line."""
    host = urlparse(address)
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    silent = []
    try:
        for number in range(1100):
            silent.append(socket.create_connection((host.hostname, host.port), timeout=240))
            if number % 2:
                silent[-1].sendall(b"POST /v1/chat/com")
        seconds = []
        for _ in range(5):
            began = time.monotonic()
            assert get(f"{address}/health").status_code == 200
            seconds.append(time.monotonic() - began)
        assert min(seconds) < 1  # a busy machine may take longer for some
        body = json.dumps({"model": "anygpt", "messages": HELLO, "max_tokens": 1, **NO_MEDIA})
        assert post(address, body).status_code == 200
    finally:
        for one in silent:
            one.close()


def test_foreign_pages_are_refused(engine):
    """By the name that they call the server by, and by their own; both can be allowed."""

    def ask(address, path="/v1/models", method="GET", **headers):
        return httpx.request(method, f"{address}{path}", headers=headers, timeout=240)

    with serving(Interface(engine, "anygpt").app()) as address:
        port = urlparse(address).port
        for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"LOCALHOST:{port}", f"[::1]:{port}", "127.0.0.1"):
            assert ask(address, Host=host).status_code == 200, host
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "192.168.1.5", "a@b:c:d"):
            for path in ("/v1/models", "/health", "/metrics"):
                answer = ask(address, path, Host=host)
                assert answer.status_code == 403 and "--allow-host" in answer.json()["error"]["message"], host
        assert ask(address, Origin=address).status_code == 200
        for origin in ("https://evil.example", "null", f"http://evil.example:{port}", "http://127.0.0.1:1"):
            answer = ask(address, Origin=origin)
            assert answer.status_code == 403 and answer.json()["error"]["type"] == "invalid_request_error"
            assert "access-control-allow-origin" not in answer.headers
    app = Interface(engine, "anygpt").app("0.0.0.0", ["models.example"], ["https://good.example"])
    with serving(app) as address:
        for host in ("models.example", "192.168.1.5:80", "[fe80::1]:80"):
            assert ask(address, Host=host).status_code == 200, host
        assert ask(address, Host="evil.example").status_code == 403
        assert ask(address, Origin="https://evil.example").status_code == 403
        answer = ask(address, Origin="https://good.example")
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://good.example"
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        assert ask(address, method="OPTIONS", Origin="https://good.example", **asked).status_code == 200


def test_an_api_key(engine):
    with serving(Interface(engine, "anygpt", key="s\u00e9cret").app(origins=["*"])) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0)
        with pytest.raises(openai.AuthenticationError) as refused:
            client.models.list()
        assert refused.value.code == "invalid_api_key"
        for given in ("", "Bearer", "Bearer s\u00e9cre", "Bearer s\u00e9crets", "Basic s\u00e9cret"):
            headers = {"Authorization": given.encode()}
            assert get(f"{address}/v1/models", headers=headers).status_code == 401, given
        good = get(f"{address}/v1/models", headers={"Authorization": "Bearer s\u00e9cret".encode()})
        assert good.status_code == 200
        assert get(f"{address}/health").status_code == get(f"{address}/metrics").status_code == 200
        asked = {"Access-Control-Request-Method": "POST", "Origin": "https://a.example"}
        assert ask_options(f"{address}/v1/models", headers=asked).status_code == 200, "a browser asks without it"


def test_metrics(client, address):
    def read():
        lines = get(f"{address}/metrics").text.splitlines()
        return {name: float(value) for name, value in (ln.rsplit(" ", 1) for ln in lines if not ln.startswith("#"))}

    before = read()
    done = complete(client, extra_body={"require": ["image"], **QUICK})
    after = read()
    new = {name: after[name] - before.get(name, 0) for name in after}
    assert new['anygpt_requests_total{status="200"}'] == 1
    assert new['anygpt_tokens_total{kind="prompt"}'] == done.usage.prompt_tokens
    assert new['anygpt_tokens_total{kind="generated"}'] == done.usage.completion_tokens
    assert new['anygpt_decoder_seconds_count{decoder="image"}'] == 1
    assert 0 < new['anygpt_decoder_seconds_sum{decoder="image"}'] < 60
    assert after["anygpt_requests_waiting"] == 0


def test_a_decoders_seconds_are_those_of_its_own_batch(monkeypatch):
    """Those of an answer whose client hung up meanwhile end with it."""
    told, clock = queue.SimpleQueue(), iter([0.0, 100.0, 100.25])
    monkeypatch.setattr("anygpt.serving.engine.time", SimpleNamespace(perf_counter=lambda: next(clock)))

    def answer_together(conversations, settings, tell):
        tell(DecodingStarted("image", (0,)))
        if conversations[0] == "hangs up":
            raise Closed
        tell(MediumDone(0, Segment("image", None, "image")))
        raise InputError("the rest is of no interest")

    engine = Engine(SimpleNamespace(answer_together=answer_together))
    engine.submit("hangs up", Settings(), told.put)
    told.get(timeout=240)
    engine.submit("stays", Settings(), told.put)
    engine.close()
    text = engine.metrics.text().decode()
    assert 'anygpt_decoder_seconds_count{decoder="image"} 1.0' in text
    assert 'anygpt_decoder_seconds_sum{decoder="image"} 0.25' in text


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
    deadline = time.monotonic() + 240  # a handler ends a moment after its client has the answer
    # type, since isinstance would touch dead weak proxies
    while left := [found for found in gc.get_objects() if type(found) is Job]:
        assert time.monotonic() < deadline, left
        del left
        time.sleep(0.1)
        gc.collect()
    assert engine.waiting == 0
    assert after < before + 48 * 1024**2, f"{(after - before) / 1024**2:.0f} MiB more than before"


def test_clients_that_hang_up_and_ask_again(address, engine, monkeypatch):
    """`anygpt benchmark serving --sides hang-ups`, which takes minutes, for some seconds."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    hang_ups = importlib.import_module("benchmarks.serving").hang_ups
    found = hang_ups(f"{address}/v1/chat/completions", 8)
    assert min(found["answered"], found["hung_up"], found["refused"]) > 0
    deadline = time.monotonic() + 240
    while engine.waiting:  # those that hung up last are still in the queue
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_requests_that_wait_are_answered_together_each_as_alone(engine):
    """Like ones in one batch, with their own seeds; others, and those that come late, wait for the next."""
    chat_model, asked = engine.chat_model, ["Draw a ring.", "What is a long blue square?", "Draw.", "Hello there."]
    busy = Engine(chat_model, max_batch=3)
    held, go_on = threading.Event(), threading.Event()
    busy.submit(HELLO, Settings(max_new_tokens=2, temperature=0.1), lambda event: (held.set(), go_on.wait()))
    held.wait()
    options = {"decoder_kwargs": {"image": {"num_inference_steps": 2}}, "require": ("image",)}
    jobs, events = [], [[] for _ in asked]
    done = queue.SimpleQueue()
    for number, text in enumerate(asked):
        settings = Settings(max_new_tokens=8 + number, seed=number, temperature=1.0, **options)
        messages = [{"role": "user", "content": text}]
        jobs.append((messages, settings))
        busy.submit(messages, settings, lambda event, n=number: (events[n].append(event), done.put((n, event))))
    other = busy.submit(HELLO, Settings(max_new_tokens=2), lambda event: done.put((None, event)))
    assert busy.waiting == 5
    go_on.set()
    replies = {}
    while len(replies) < 5:
        number, event = done.get(timeout=120)
        if isinstance(event, Reply):
            replies[number] = event
    text = busy.metrics.text().decode()
    assert 'anygpt_batch_size_bucket{le="2.0"} 3.0' in text and 'anygpt_batch_size_bucket{le="4.0"} 4.0' in text
    assert "anygpt_batch_size_sum 6.0" in text, "the one that held, three together, one that was too many, the other"
    assert other.settings.max_new_tokens == 2
    for number, (messages, settings) in enumerate(jobs):
        alone, found = chat_model.answer(messages, settings), replies[number]
        assert (found.prompt_tokens, found.new_tokens, found.complete) == (
            *(alone.prompt_tokens, alone.new_tokens, alone.complete),
        )
        assert found.answer.text == alone.answer.text
        for one, same in zip(found.answer.images, alone.answer.images, strict=True):
            assert np.abs(np.asarray(one, np.int16) - np.asarray(same, np.int16)).max() <= 1
        pieces = "".join(event.text for event in events[number] if isinstance(event, TextPiece))
        assert pieces == alone.answer.text and len({event.row for event in events[number][:-1]}) == 1
    busy.close()


def test_one_bad_request_of_a_batch_leaves_the_others(engine):
    busy = Engine(engine.chat_model)
    held, go_on = threading.Event(), threading.Event()
    busy.submit(HELLO, Settings(max_new_tokens=1, temperature=0.1), lambda event: (held.set(), go_on.wait()))
    held.wait()
    done = [queue.SimpleQueue() for _ in range(3)]
    settings = Settings(max_new_tokens=2, forbid=("image", "video", "audio"))
    for one, text in zip(done, ("Hello", "a " * 2000, "Draw."), strict=True):
        busy.submit([{"role": "user", "content": text}], settings, one.put)
    go_on.set()
    last = [next(e for e in iter(one.get, None) if isinstance(e, Reply | Exception)) for one in done]
    assert [type(one) for one in last] == [Reply, TooLong, Reply]
    busy.close()


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
    second = engine.submit(HELLO, settings, ended.append)
    with serving(Interface(engine, "anygpt").app()) as address:
        answer = post(address, json.dumps({"model": "anygpt", "messages": HELLO}))
        assert answer.status_code == 429 and "try again" in answer.json()["error"]["message"]
        assert answer.headers["Retry-After"]
    with pytest.raises(Busy, match="1 requests are already waiting"):
        engine.submit(HELLO, settings, hold)
    second.cancel()
    assert engine.waiting == 0
    engine.submit(HELLO, settings, ended.append).cancel()  # there is room where clients have hung up
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
    for decoder in model.decoders.values():
        decoder.module.pipeline.enable_model_cpu_offload(device="cpu")
    assert all(hasattr(d.module.denoiser, "_hf_hook") for d in model.decoders.values())
    for _ in range(2):
        found = model.generate(**batch, **options).answers[0]
        assert np.array_equal(np.asarray(found.images[0]), np.asarray(expected.images[0]))
        assert np.array_equal(found.audios[0], expected.audios[0])


def test_anygpt_does_not_import_the_servers():
    servers = "m.split('.')[0] in ('gradio', 'starlette', 'fastapi', 'uvicorn') or m.startswith('anygpt.serving')"
    code = f"import sys, anygpt, anygpt.chat.chat_model; print([m for m in sys.modules if {servers}])"
    assert run_forked("-c", code).stdout.strip() == "[]"


@pytest.mark.parametrize("script", ["serve", "demo"])
def test_the_scripts_find_mistakes_first(script, capsys):
    for arguments, message in (
        (["--port", "99999"], "cannot listen"),
        (["--device", "nonsense"], "--device 'nonsense'"),
        (["--offload"], "--offload"),
    ):
        assert commands.run(script, arguments) == 2
        said = capsys.readouterr().err
        assert message in said and len(said.splitlines()) == 1, said
