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

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

from anygpt.chat.chat_model import ChatModel, Settings, check_device, modality_of, write_segment
from anygpt.commands import CHECKPOINT, REPOSITORY, new_parser
from anygpt.data.schema import checked_text
from anygpt.decoders.options import MAX_SEED
from anygpt.errors import InputError
from anygpt.generation.events import DecodingStarted, DecodingStep, Event, MediumCalled, MediumDone, TextPiece
from anygpt.processing.chat_template import answer_message

COMMANDS = "/attach PATH, /history, /save PATH, /reset, /quit"


class Chat:
    """A conversation with a model in a terminal.

    Args:
        options: the parsed command line.
    """

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.chat_model = ChatModel(options.checkpoint, options.device, options.offload)
        kwargs = {"num_inference_steps": options.steps, "guidance_scale": options.guidance}
        self.settings = Settings(
            max_new_tokens=options.max_new_tokens,
            temperature=1.0 if options.sample else 0.0,
            seed=options.seed,
            require=tuple(options.require),
            forbid=tuple(options.forbid),
            decoder_kwargs=dict.fromkeys(self.chat_model.makes, kwargs),
        )
        self.chat_model.check(self.settings)
        self.messages: list[dict[str, Any]] = []
        self.history: list[dict[str, Any]] = []  # the messages with media as paths
        self.turns = last_turn(options.output)

    def say(self, text: str, files: list[str], prefix: str = "") -> None:
        """Send the user's text and files and stream the answer; a failed turn is not kept."""
        parts = [self.chat_model.read(modality_of(path), path) for path in files]
        shown = [{"type": part["type"], "path": path} for part, path in zip(parts, files, strict=True)]
        said = [{"type": "text", "text": checked_text(text, "what you say")}] if text else []
        messages = [*self.messages, {"role": "user", "content": parts + said}]
        printer = Printer(self.options.output, self.turns + 1, prefix)
        try:
            reply = self.chat_model.answer(messages, self.settings, on_event=printer)
        finally:
            printer.end_line()
        self.turns += 1
        self.messages = [*messages, answer_message(reply.answer)]
        answered = [
            {"type": s.type, "text": s.content} if s.type == "text" else {"type": s.type, "path": printer.paths[index]}
            for index, s in enumerate(reply.answer.segments)
        ]
        self.history += [{"role": "user", "content": shown + said}, {"role": "assistant", "content": answered}]

    def show_history(self) -> None:
        for message in self.history:
            print("you:" if message["role"] == "user" else "model:")
            for part in message["content"]:
                print("  " + (part["text"] if part["type"] == "text" else f"[{part['type']}: {part['path']}]"))

    def save(self, path: str) -> None:
        """Write the conversation as JSON.

        Raises:
            InputError: no path, or one that cannot be written.
        """
        if not path:
            raise InputError("/save needs the path of a file")
        content = json.dumps({"messages": self.history}, indent=2, ensure_ascii=False) + "\n"
        try:
            Path(path).write_text(content, encoding="utf-8", errors="replace")
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}") from error
        print(f"saved: {path}")

    def attach(self, path: str, files: list[str]) -> None:
        """Attach a file, checking that it can be read."""
        if not path:
            raise InputError("/attach needs the path of a file")
        part = self.chat_model.read(modality_of(path), path)
        files.append(path)
        print(f"attached {part['type']}: {path}")

    def run(self) -> None:
        """Read turns from the terminal until the end of input."""
        files: list[str] = []
        print(f"Say something, or {COMMANDS}.")
        while True:
            try:
                text = input("you: ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            command, _, argument = text.partition(" ")
            argument = as_path(argument)
            try:
                if command == "/quit":
                    return
                if command == "/reset":
                    self.messages, self.history, files = [], [], []
                    print("Everything is forgotten.")
                elif command == "/history":
                    self.show_history()
                elif command == "/save":
                    self.save(argument)
                elif command == "/attach":
                    self.attach(argument, files)
                elif command.startswith("/"):
                    raise InputError(f"there is no command {command}; there are {COMMANDS}")
                elif text or files:
                    self.say(text, files, prefix="model: ")
                    files = []
            except InputError as error:
                print(f"error: {error}")
            except KeyboardInterrupt:
                print("\nstopped; this turn is forgotten")


def as_path(argument: str) -> str:
    """Path as typed or dropped into a terminal, possibly quoted or with `~`."""
    argument = argument.strip()
    if len(argument) > 1 and argument[0] == argument[-1] and argument[0] in "'\"":
        argument = argument[1:-1]
    return os.path.expanduser(argument.replace("\0", ""))


def last_turn(folder: Path) -> int:
    """Highest turn number among existing media in the folder, which must not be overwritten."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(found[1]) for name in names if (found := re.match(r"(\d+)-\d+\.\w+$", name))), default=0)


class Printer:
    """Prints the events of an answer: streamed text, progress (on a terminal only), paths of media.

    Args:
        folder: folder for media.
        turn: number in their names.
        prefix: printed before the answer.
    """

    def __init__(self, folder: Path, turn: int, prefix: str = ""):
        self.folder, self.turn = folder, turn
        self.paths: dict[int, str] = {}
        self.terminal = sys.stdout.isatty()
        print(prefix, end="", flush=True)
        self.begun = bool(prefix)  # whether the current line has text

    def __call__(self, event: Event) -> None:
        if isinstance(event, TextPiece):
            print(event.text, end="", flush=True)
            self.begun = True
        elif isinstance(event, MediumCalled):
            print(f"[{event.type} {event.segment}]", end="", flush=True)
            self.begun = True
        elif isinstance(event, DecodingStarted):
            self.end_line()
        elif isinstance(event, DecodingStep) and self.terminal:
            print(f"\r{event.key}: step {event.step} of {event.steps}", end="", flush=True)
            self.begun = True
        elif isinstance(event, MediumDone):
            if self.terminal:
                self.end_line()
            try:
                path = write_segment(event.content, self.folder / f"{self.turn:02d}-{event.segment}")
            except OSError as error:
                raise InputError(f"--output {self.folder} cannot be written: {error.strerror}") from error
            self.paths[event.segment] = str(path)
            print(f"[{event.content.type} {event.segment}: {path}]", flush=True)

    def end_line(self) -> None:
        if self.begun:
            print()
        self.begun = False


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = new_parser("chat", __doc__)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=CHECKPOINT,
        help="a run's final/ folder (default: the quickstart's last)",
    )
    parser.add_argument("--prompt", help="give one answer to this, and end")
    parser.add_argument("--attach", nargs="*", default=[], metavar="PATH", help="files that stand before the prompt")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "runs/chat", help="folder for generated media")
    parser.add_argument("--require", nargs="*", default=[], metavar="KEY", help="decoders that every answer must call")
    parser.add_argument("--forbid", nargs="*", default=[], metavar="KEY", help="decoders that no answer may call")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="signal tokens included (default: %(default)s)")
    parser.add_argument("--sample", action="store_true", help="sample text instead of taking the likeliest token")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the checkpoint's own)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the checkpoint's own)")
    parser.add_argument("--seed", type=int, default=0, help="of sampled text and media (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where to run, for example cuda (default: %(default)s)")
    parser.add_argument("--offload", action="store_true", help="decoders are on the device only while they are used")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    """Validate options before anything is loaded."""
    for name, least, most in (("max_new_tokens", 1, 2**31), ("steps", 1, 2**31), ("seed", 0, MAX_SEED)):
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} is {value}, expected a whole number from {least} to {most}")
    if options.guidance is not None and not math.isfinite(options.guidance):
        raise InputError(f"--guidance is {options.guidance}, expected a finite number")
    if options.output.exists() and not options.output.is_dir():
        raise InputError(f"--output {options.output} is a file; give a folder")
    if options.prompt is not None and not options.prompt.strip() and not options.attach:
        raise InputError("--prompt is empty; say something, or attach a file")
    check_device(options.device, options.offload)


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # for terminals without UTF-8
            stream.reconfigure(errors="replace")
    check(options)
    chat = Chat(options)
    if options.prompt is None and not options.attach:
        chat.run()
    else:
        chat.say(options.prompt or "", options.attach)
