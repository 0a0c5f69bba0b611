"""Chat with a trained model in the terminal: text and files as input, text and media as output.

    anygpt chat                                                # a conversation
    anygpt chat --prompt "What is this?" --attach picture.png  # one answer

In a conversation, text is streamed, media are written to the folder `--output` and their paths printed, and generated
media become inputs of your next message. Commands:

    /attach PATH   add a file to your next message (image, video or sound, by its suffix)
    /history       show the conversation so far
    /save PATH     write the conversation as JSON, with paths of media files
    /reset         start a new conversation
    /quit          end
"""

import argparse
import io
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

from anygpt.chat.chat_model import ChatModel, Settings, modality_of, write_segment
from anygpt.commands import REPOSITORY, add_model_arguments, check_range, new_parser
from anygpt.data.schema import checked_text
from anygpt.decoders.options import MAX_SEED
from anygpt.errors import InputError, refusing
from anygpt.generation.events import DecodingStarted, DecodingStep, Event, MediumCalled, MediumDone, TextPiece
from anygpt.processing.chat_template import answer_message

COMMANDS = "/attach PATH, /history, /save PATH, /reset, /quit"


class Chat:
    """A conversation with a model in a terminal, by the options of the command line."""

    def __init__(self, options: argparse.Namespace):
        self.chat_model = ChatModel(options.checkpoint, options.device, options.offload)
        asked = {"num_inference_steps": options.steps, "guidance_scale": options.guidance}
        kwargs = {name: value for name, value in asked.items() if value is not None}
        self.settings = Settings(
            max_new_tokens=options.max_new_tokens,
            temperature=1.0 if options.sample else 0.0,
            seed=options.seed,
            require=tuple(options.require),
            forbid=tuple(options.forbid),
            decoder_kwargs=dict.fromkeys(self.chat_model.makes, kwargs),
        )
        self.chat_model.check(self.settings)
        self.output: Path = options.output
        # turn numbers of existing media, which must not be overwritten
        names = [path.name for path in options.output.iterdir()] if options.output.is_dir() else []
        self.turns = max((int(found[1]) for name in names if (found := re.match(r"(\d+)-\d+\.\w+$", name))), default=0)
        self.reset()

    def reset(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.history: list[dict[str, Any]] = []  # the messages with media as paths
        self.files: list[str] = []  # of the next message

    def say(self, text: str, prefix: str = "") -> None:
        """Send the user's text and files and stream the answer; a failed turn is not kept."""
        said = [{"type": "text", "text": checked_text(text, "what you say")}] if text else []
        shown = [{"type": modality_of(path), "path": path} for path in self.files]
        parts = [self.chat_model.read(part["type"], part["path"]) for part in shown]
        messages = [*self.messages, {"role": "user", "content": parts + said}]
        printer = Printer(self.output, self.turns + 1, prefix)
        try:
            reply = self.chat_model.answer(messages, self.settings, on_event=printer)
        finally:
            printer.end_line()
        self.turns, self.files = self.turns + 1, []
        self.messages = [*messages, answer_message(reply.answer)]
        answered = [
            {"type": s.type, "text": s.content} if s.type == "text" else {"type": s.type, "path": printer.paths[index]}
            for index, s in enumerate(reply.answer.segments)
        ]
        self.history += [{"role": "user", "content": shown + said}, {"role": "assistant", "content": answered}]

    def save(self, path: str) -> None:
        content = json.dumps({"messages": self.history}, indent=2, ensure_ascii=False) + "\n"
        try:
            Path(path).write_text(content, encoding="utf-8", errors="replace")
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}") from error

    def run(self) -> None:
        print(f"Say something, or {COMMANDS}.")
        while True:
            try:
                text = input("you: ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if text.split(" ")[0] == "/quit":
                return
            try:
                self.turn(text)
            except InputError as error:
                print(f"error: {error}")
            except KeyboardInterrupt:
                print("\nstopped; this turn is forgotten")

    def turn(self, text: str) -> None:
        command, _, argument = text.partition(" ")
        # as typed or dropped into a terminal
        path = os.path.expanduser(argument.strip().strip("'\"").replace("\0", ""))
        if command in ("/attach", "/save") and not path:
            raise InputError(f"{command} needs the path of a file")
        if command == "/reset":
            self.reset()
            print("Everything is forgotten.")
        elif command == "/history":
            for message in self.history:
                print("you:" if message["role"] == "user" else "model:")
                for part in message["content"]:
                    print("  " + (part["text"] if part["type"] == "text" else f"[{part['type']}: {part['path']}]"))
        elif command == "/save":
            self.save(path)
            print(f"saved: {path}")
        elif command == "/attach":
            part = self.chat_model.read(modality_of(path), path)
            self.files.append(path)
            print(f"attached {part['type']}: {path}")
        elif command.startswith("/"):
            raise InputError(f"there is no command {command}; there are {COMMANDS}")
        elif text or self.files:
            self.say(text, prefix="model: ")


class Printer:
    """Prints the events of an answer: streamed text, progress (on a terminal only), paths of media in a folder, whose
    names begin with the number of the turn."""

    def __init__(self, folder: Path, turn: int, prefix: str = ""):
        self.folder, self.turn = folder, turn
        self.paths: dict[int, str] = {}
        self.begun = False  # whether the current line has text
        self.write(prefix)

    def write(self, text: str) -> None:
        print(text, end="", flush=True)
        self.begun = self.begun or bool(text)

    def end_line(self) -> None:
        if self.begun:
            print()
        self.begun = False

    def __call__(self, event: Event) -> None:
        if isinstance(event, TextPiece):
            self.write(event.text)
        elif isinstance(event, MediumCalled):
            self.write(f"[{event.type} {event.segment}]")
        elif isinstance(event, DecodingStarted):
            self.end_line()
        elif isinstance(event, DecodingStep) and sys.stdout.isatty():
            self.write(f"\r{event.key}: step {event.step} of {event.steps}")
        elif isinstance(event, MediumDone):
            self.end_line()
            with refusing(f"--output {self.folder} cannot be written", (OSError,)):
                path = write_segment(event.content, self.folder / f"{self.turn:02d}-{event.segment}")
            self.paths[event.segment] = str(path)
            print(f"[{event.content.type} {event.segment}: {path}]", flush=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = new_parser("chat", __doc__)
    add_model_arguments(parser)
    add = parser.add_argument
    add("--prompt", help="answer this, then exit")
    add("--attach", nargs="*", default=[], metavar="PATH", help="files that precede the prompt")
    add("--output", type=Path, default=REPOSITORY / "runs/chat", help="folder for generated media")
    add("--require", nargs="*", default=[], metavar="KEY", help="decoders that every answer must call")
    add("--forbid", nargs="*", default=[], metavar="KEY", help="decoders that no answer may call")
    add("--max-new-tokens", type=int, default=128, help="including signal tokens (default: %(default)s)")
    add("--sample", action="store_true", help="sample text instead of choosing the most probable token")
    add("--steps", type=int, help="denoising steps (default: the checkpoint's own)")
    add("--guidance", type=float, help="guidance scale (default: the checkpoint's own)")
    add("--seed", type=int, default=0, help="seed of sampled text and of media (default: %(default)s)")
    options = parser.parse_args(arguments)
    check_range(options, 1, 2**31, "max_new_tokens", "steps")
    check_range(options, 0, MAX_SEED, "seed")
    if options.guidance is not None and not math.isfinite(options.guidance):
        raise InputError(f"--guidance is {options.guidance}, expected a finite number")
    if options.output.exists() and not options.output.is_dir():
        raise InputError(f"--output {options.output} is a file; give a folder")
    if options.prompt is not None and not options.prompt.strip() and not options.attach:
        raise InputError("--prompt is empty; say something, or attach a file")
    return options


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # for terminals without UTF-8
            stream.reconfigure(errors="replace")
    chat = Chat(options)
    if options.prompt is None and not options.attach:
        chat.run()
        return
    chat.files = options.attach
    chat.say(options.prompt or "")
