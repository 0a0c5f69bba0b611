"""The demo page: a chat with text, images, videos and sounds as input and output, built on gradio without telemetry."""

import html
import os
import queue
import secrets
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Disables telemetry; must be set before gradio is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio as gr
import gradio.queueing
from fastapi import FastAPI
from gradio.components import Component

from anygpt.chat.chat_model import Reply, Settings, modality_of, write_segment
from anygpt.errors import InputError
from anygpt.generation.events import DecodingStep, Event, MediumCalled, MediumDone, TextPiece
from anygpt.media.types import MEDIA, media_type_of
from anygpt.processing.chat_template import answer_message
from anygpt.serving.engine import Busy, Engine
from anygpt.serving.gate import Gate, Guard, log_refused_event, logger, refuse
from anygpt.serving.http import FAULT

MAX_FILES = 8
MAX_CHARACTERS = 4000
MAX_FILE_SIZE = "16mb"
MAX_QUEUE = 16
KEPT_SECONDS = 3600
MAX_CONVERSATIONS = 100
REDRAW_SECONDS = 0.1
SLIDERS = {
    "num_inference_steps": (1, 100, 1, "Denoising steps"),
    "guidance_scale": (0, 20, 0.5, "Guidance"),
    "temperature": (0, 2, 0.05, "Temperature of codes"),
    "top_k": (0, 1000, 1, "Most probable codes to draw from (0: all)"),
}
"""Lowest and highest value, step (of the option's type), and label of the options of decoders and tokenizers."""
SYSTEM_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONOSPACE_FONTS = ["ui-monospace", "Menlo", "Consolas", "monospace"]
EXAMPLES = [
    "Draw a red ring.",
    "Make a clip of a green square moving left.",
    "Let me hear a blue circle.",
    "Something yellow has three corners. What is it?",
    "Which shapes do you know?",
]
STYLE = """
.gradio-container { width: 100%; max-width: 1100px !important; margin: 0 auto !important; }
footer { display: none !important; }
html, body { overflow-x: clip; }
/* generated media may be very small */
#chat img, #chat video { image-rendering: pixelated; width: min(256px, 60vw); height: auto; object-fit: contain; }
#chat .image-container, #chat .image-frame { height: auto !important; width: fit-content; }
#chat button[title="Share"], #chat button[aria-label="Share"] { display: none; }
#chat [data-testid="waveform-Audio"] { height: auto; }
@media (max-width: 640px) { .gradio-container .main { padding: 8px !important; } }
"""
# gradio omits the `alt_text` of images in a chat
DESCRIBE_PICTURES = """() => {
    const describe = () => document.querySelectorAll("#chat .message img[alt='']").forEach((image) => {
        image.alt = image.closest(".bot") ? "generated image" : "attached image";
    });
    new MutationObserver(describe).observe(document.body, {childList: true, subtree: true});
}"""


@dataclass
class Conversation:
    """A visitor's conversation, for the model and as shown; the server keeps it under a token in the browser."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    shown: list[dict[str, Any]] = field(default_factory=list)
    used: float = 0.0


@dataclass
class Page:
    """Builds the page and answers its events.

    `folder` holds uploads and generated media; `conversations` are by token, the least recently used first.
    """

    engine: Engine
    folder: Path
    conversations: dict[str, Conversation] = field(default_factory=dict)

    def conversation(self, token: str | None) -> tuple[str, Conversation]:
        """The token and conversation of a visitor, new ones if the token is unknown; removes old conversations."""
        now, kept = time.monotonic(), self.conversations
        for old in [one for one, held in kept.items() if now - held.used > KEPT_SECONDS]:
            del kept[old]
        if not isinstance(token, str) or token not in kept:
            token = secrets.token_urlsafe()
        found = kept[token] = kept.pop(token, None) or Conversation()
        found.used = now
        while len(kept) > MAX_CONVERSATIONS:
            del kept[next(iter(kept))]
        return token, found

    def build(self) -> gr.Blocks:
        cache = (600, KEPT_SECONDS)
        with gr.Blocks(title="AnyGPT", analytics_enabled=False, delete_cache=cache, fill_height=True) as page:
            gr.Markdown("# AnyGPT\nText, pictures, clips and sounds, in and out.")
            token = gr.BrowserState(None, storage_key="anygpt-conversation")
            with gr.Sidebar(label="Settings", position="right", open=False):
                settings = self._build_settings()
            chat = gr.Chatbot(
                [],
                elem_id="chat",
                label="Conversation",
                height="60vh",
                render_markdown=False,  # but HTML would be rendered, so texts are escaped
                buttons=["copy"],
                feedback_options=None,
                layout="bubble",
                scale=1,
            )
            box = gr.MultimodalTextbox(
                elem_id="message",
                show_label=False,
                placeholder="Say something, and attach pictures, clips or sounds",
                file_count="multiple",
                file_types=[suffix for kind in self.engine.chat_model.reads for suffix in MEDIA[kind].suffixes],
                max_plain_text_length=MAX_CHARACTERS,
            )
            new = gr.Button("New conversation", size="sm", variant="secondary")
            examples = gr.Dataset(
                components=[gr.Textbox(visible=False)], samples=[[text] for text in EXAMPLES], label="For example"
            )
            # All events are queued: gradio sends others to `run/`, which bypasses the queue and is closed by `Guard`.
            private: dict[str, Any] = {"api_visibility": "private"}
            one_by_one = {"concurrency_limit": 1, "concurrency_id": "answer", "show_progress": "hidden"}
            answering = [
                begin(self.answer, [given, token, *settings], [chat, box, token], **one_by_one, **private)
                for begin, given in ((box.submit, box), (examples.click, examples))
            ]
            box.stop(idle_box, None, box, cancels=answering, **private)
            for forget in (new.click, chat.clear):
                forget(lambda: ([], idle_box(), None), None, [chat, box, token], cancels=answering, **private)
            page.load(None, None, None, js=DESCRIBE_PICTURES, **private)
            page.load(self.restore, token, [chat, token], show_progress="hidden", **private)
        return page.queue(max_size=MAX_QUEUE, default_concurrency_limit=1, api_open=False)

    def _build_settings(self) -> list[Component]:
        """The inputs that `_settings` reads, in its order."""
        makes = list(self.engine.chat_model.makes)
        gr.Markdown("## Settings")
        settings = [
            gr.CheckboxGroup(makes, label="The answer must contain", elem_id="require"),
            gr.CheckboxGroup(makes, label="The answer must not contain"),
            gr.Slider(8, 512, 128, step=1, label="Maximum number of tokens"),
            gr.Slider(0, 2, 0, step=0.05, label="Temperature (0: always the most probable token)"),
            gr.Number(0, label="Seed", precision=0, minimum=0),
        ]
        for key in makes:
            own = self.engine.chat_model.options(key)
            with gr.Accordion(f"Decoder: {key}", open=False, elem_id=f"decoder-{key}"):
                for name, (least, most, step, label) in SLIDERS.items():
                    value, shown = own.get(name, least), name in own
                    named = f"steps-{key}" if name == "num_inference_steps" else None
                    settings.append(
                        gr.Slider(least, max(most, value), value, step=step, label=label, elem_id=named, visible=shown)
                    )
        return settings

    def restore(self, token: str | None) -> tuple[list[dict[str, Any]], str]:
        token, conversation = self.conversation(token)
        return conversation.shown, token

    def answer(
        self, message: dict[str, Any] | list[str], token: str | None, *values: Any
    ) -> Iterator[tuple[list[dict[str, Any]], Any, str]]:
        """Answer a message, or the text of an example; yields messages to show, the input box, and the token."""
        token, conversation = self.conversation(token)
        message = {"text": message[0]} if isinstance(message, list) else message
        text, files = _whole(message.get("text") or "").strip(), message.get("files") or []
        if not text and not files:
            yield conversation.shown, gr.skip(), token
            return
        conversation.shown = [
            *conversation.shown,
            *({"role": "user", "content": shown_file(path, "attached")} for path in files),
            *([{"role": "user", "content": html.escape(text)}] if text else []),
        ]
        busy = gr.MultimodalTextbox(value={"text": "", "files": []}, submit_btn=False, stop_btn=True)
        yield [*conversation.shown, {"role": "assistant", "content": "…"}], busy, token
        drawn = Drawing(self.folder)
        try:
            messages = [*conversation.messages, {"role": "user", "content": self._read(text, files)}]
            for event in self._events(messages, self._settings(values)):
                if isinstance(event, Reply):
                    conversation.messages = [*messages, answer_message(event.answer)]
                elif drawn.draw(event):
                    yield [*conversation.shown, *drawn.messages()], gr.skip(), token
            conversation.shown = [*conversation.shown, *drawn.messages()]
        except (InputError, Busy) as error:
            conversation.shown = [*conversation.shown, _said_error(str(error))]
        except Exception:
            logger.exception("an answer failed")
            conversation.shown = [*conversation.shown, _said_error(FAULT)]
        yield conversation.shown, idle_box(), token

    def _read(self, text: str, files: list[str]) -> list[dict[str, Any]]:
        if len(files) > MAX_FILES:
            raise InputError(f"{len(files)} files are attached; attach at most {MAX_FILES}")
        parts = []
        for path in files:
            try:
                parts.append(self.engine.chat_model.read(modality_of(path), path))
            except InputError as error:  # show the file's name, but not the server's folders
                raise InputError(str(error).replace(path, Path(path).name)) from error
        return parts + ([{"type": "text", "text": text}] if text else [])

    def _settings(self, values: tuple[Any, ...]) -> Settings:
        require, forbid, tokens, temperature, seed, *by_decoder = values
        decoders = {}
        for place, key in enumerate(self.engine.chat_model.makes):
            count, own = len(SLIDERS), self.engine.chat_model.options(key)
            chosen = zip(SLIDERS.items(), by_decoder[count * place : count * (place + 1)], strict=True)
            decoders[key] = {name: type(step)(value) for (name, (*_, step, _)), value in chosen if name in own}
        return Settings(
            max_new_tokens=int(tokens),
            temperature=float(temperature),
            seed=max(0, int(seed or 0)),
            require=tuple(require or ()),
            forbid=tuple(forbid or ()),
            decoder_kwargs=decoders,
        )

    def _events(self, messages: list[dict[str, Any]], settings: Settings) -> Iterator[Event | Reply]:
        events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        job = self.engine.submit(messages, settings, events.put)
        try:
            while not isinstance(event := events.get(), Reply):
                if isinstance(event, Exception):
                    raise event
                yield event
            yield event
        finally:
            job.cancel()  # no effect on a finished job


class Drawing:
    def __init__(self, folder: Path):
        self.folder = Path(tempfile.mkdtemp(dir=folder))
        self.contents: dict[int, Any] = {}
        self._called: dict[int, MediumCalled] = {}
        self._drawn = 0.0

    def draw(self, event: Event) -> bool:
        """Process an event; returns whether to update the page."""
        if isinstance(event, TextPiece):
            self.contents[event.segment] = self.contents.get(event.segment, "") + event.text
        elif isinstance(event, MediumCalled):
            self.contents[event.segment] = f"[{event.type}: waits]"
            self._called[event.segment] = event
        elif isinstance(event, DecodingStep):
            for segment, called in self._called.items():
                if called.key == event.key:
                    self.contents[segment] = f"[{called.type}: step {event.step} of {event.steps}]"
        elif isinstance(event, MediumDone):
            path = write_segment(event.content, self.folder / str(event.segment))
            self.contents[event.segment] = shown_file(str(path), "generated")
        now = time.monotonic()
        if isinstance(event, MediumDone) or now - self._drawn > REDRAW_SECONDS:
            self._drawn = now
            return True
        return False

    def messages(self) -> list[dict[str, Any]]:
        shown = {i: html.escape(what) if isinstance(what, str) else what for i, what in self.contents.items()}
        return [{"role": "assistant", "content": shown[index]} for index in sorted(shown)]


def idle_box() -> gr.MultimodalTextbox:
    return gr.MultimodalTextbox(submit_btn=True, stop_btn=False)


def shown_file(path: str, how: str) -> Any:
    """A file in a message; videos play in a loop, with controls."""
    kind = media_type_of(path)
    if kind is not None and kind.timed:
        return gr.Video(path, autoplay=True, loop=True, label=f"{how} {kind.name}", buttons=["download"])
    return {"path": path, "alt_text": f"{how} {kind.name if kind else 'file'}"}


def _whole(text: str) -> str:
    """Text without lone surrogates, which JSON can hold, but neither tokenizers nor the page can."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _said_error(sentence: str) -> dict[str, Any]:
    return {"role": "assistant", "content": html.escape(sentence), "metadata": {"title": "This did not work"}}


def make_app(engine: Engine, folder: Path, host: str = "127.0.0.1", hosts: Sequence[str] = ()) -> Gate:
    """The page as an ASGI application; `folder` is for its uploads and generated media only."""
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    gradio.queueing.traceback = SimpleNamespace(print_exc=log_refused_event)  # it prints one for any invalid request
    page = Page(engine, folder).build()
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="/",
        max_file_size=MAX_FILE_SIZE,
        allowed_paths=[],
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        show_error=False,
        theme=gr.themes.Soft(font=SYSTEM_FONTS, font_mono=MONOSPACE_FONTS),
        css=STYLE,
    )
    page.has_launched = True  # otherwise gradio does not check the paths in events
    return Gate(Guard(app, folder), partial(refuse, 403), host, hosts)
