"""Talk to a trained model in the terminal: text and files in, text and media out.

    python scripts/chat.py                                                # a conversation
    python scripts/chat.py --prompt "What is this?" --attach picture.png  # one answer

In a conversation, `/attach PATH` adds a file to the next message, `/reset` forgets everything, `/quit` ends.
Generated media are written into the folder `--output`, and their paths are printed.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch

from anygpt import InputError, MultimodalModel, MultimodalProcessor
from anygpt.data import read_media, write_audio, write_image, write_video
from anygpt.errors import reading
from anygpt.outputs import Answer
from anygpt.training.cli import MISTAKE, quiet_libraries

SUFFIXES = {
    ".png .jpg .jpeg .bmp .webp": "image",
    ".mp4 .webm .mkv .mov .avi .gif": "video",
    ".wav .flac .mp3 .ogg .m4a": "audio",
}
REPOSITORY = Path(__file__).resolve().parent.parent


def media_part(path: str) -> dict[str, Any]:
    """A file as a content part; its suffix says what it is."""
    for suffixes, modality in SUFFIXES.items():
        if Path(path).suffix.lower() in suffixes.split():
            return {"type": modality, modality: read_media(modality, path)}
    raise InputError(f"cannot tell what {path} is by its suffix; known are {' '.join(SUFFIXES)}")


def as_message(answer: Answer) -> dict[str, Any]:
    """An answer as a turn of the conversation, its media as the signal spans that called for them."""
    parts = [
        {"type": "text", "text": segment.content} if segment.type == "text" else {"type": segment.type}
        for segment in answer.segments
    ]
    return {"role": "assistant", "content": parts}


def save_answer(answer: Answer, model: MultimodalModel, folder: Path, number: int) -> list[str]:
    """Write an answer's media; returns its segments in order, media as their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, segment in enumerate(answer.segments):
        if segment.type == "text":
            lines.append(segment.content)
            continue
        decoder = model.decoders[segment.key].module
        path = folder / f"{number:02d}-{index}.{ {'image': 'png', 'video': 'mp4', 'audio': 'wav'}[segment.type] }"
        if segment.type == "image":
            write_image(path, segment.content)
        elif segment.type == "video":
            write_video(path, segment.content, decoder.frame_rate)
        else:
            write_audio(path, segment.content, decoder.sampling_rate)
        lines.append(f"[{segment.type}: {path}]")
    return lines


class Chat:
    """A conversation with a model.

    Args:
        options: the parsed command line.
    """

    def __init__(self, options: argparse.Namespace):
        self.options = options
        with reading(options.checkpoint):
            self.model = MultimodalModel.from_pretrained(options.checkpoint)
            self.processor = MultimodalProcessor.from_pretrained(options.checkpoint, model=self.model)
        self.model.to(options.device)
        self.messages: list[dict[str, Any]] = []
        self.turns = 0

    def say(self, text: str, files: list[str]) -> list[str]:
        """One turn: what the user says and attaches; returns the answer's lines."""
        content = [media_part(path) for path in files] + ([{"type": "text", "text": text}] if text else [])
        messages = [*self.messages, {"role": "user", "content": content}]
        batch = self.processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
        generator = torch.Generator().manual_seed(self.options.seed)
        torch.manual_seed(self.options.seed)
        kwargs = {"num_inference_steps": self.options.steps, "guidance_scale": self.options.guidance}
        answer = self.model.generate(
            **batch.to(self.model.device),
            max_new_tokens=self.options.max_new_tokens,
            do_sample=self.options.sample,
            require=self.options.require,
            forbid=self.options.forbid,
            decoder_kwargs={key: {"generator": generator, **kwargs} for key in self.model.decoders},
        ).answers[0]
        self.messages = [*messages, as_message(answer)]
        self.turns += 1
        return save_answer(answer, self.model, self.options.output, self.turns)

    def run(self) -> None:
        """Read turns from the terminal until the end of input."""
        files: list[str] = []
        print("/attach PATH adds a file to your next message, /reset forgets everything, /quit ends.")
        while True:
            try:
                text = input("you: ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            command, _, argument = text.partition(" ")
            try:
                if command == "/quit":
                    return
                if command == "/reset":
                    self.messages, files = [], []
                elif command == "/attach":
                    media_part(argument.strip())
                    files.append(argument.strip())
                elif text or files:
                    print("model:", *self.say(text, files), sep="\n  ")
                    files = []
            except InputError as error:
                print(f"error: {error}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=REPOSITORY / "runs/quickstart/stage3/final",
        help="a run's final/ folder (default: the quickstart's last)",
    )
    parser.add_argument("--prompt", help="give one answer to this, and end")
    parser.add_argument("--attach", nargs="*", default=[], metavar="PATH", help="files that stand before the prompt")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "runs/chat", help="folder for generated media")
    parser.add_argument("--require", nargs="*", default=[], metavar="KEY", help="decoders that every answer must call")
    parser.add_argument("--forbid", nargs="*", default=[], metavar="KEY", help="decoders that no answer may call")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="signal tokens included (default: %(default)s)")
    parser.add_argument("--sample", action="store_true", help="sample text instead of taking the likeliest token")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=None, help="guidance scale (default: the pipeline's own)")
    parser.add_argument("--seed", type=int, default=0, help="of sampled text and media (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where to run, for example cuda (default: %(default)s)")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    """Find mistakes before anything is loaded."""
    for name, least in (("max_new_tokens", 1), ("steps", 1), ("seed", 0)):
        if getattr(options, name) < least:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} is {getattr(options, name)}, expected at least {least}")
    if options.guidance is not None and not math.isfinite(options.guidance):
        raise InputError(f"--guidance is {options.guidance}, expected a finite number")
    if options.output.exists() and not options.output.is_dir():
        raise InputError(f"--output {options.output} is a file; give a folder")
    if options.prompt is not None and not options.prompt.strip() and not options.attach:
        raise InputError("--prompt is empty; say something, or attach a file")
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {options.device!r} cannot be used: {str(error).splitlines()[0]}") from error


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    quiet_libraries()
    try:
        check(options)
        chat = Chat(options)
        if options.prompt is None and not options.attach:
            chat.run()
        else:
            print(*chat.say(options.prompt or "", options.attach), sep="\n")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(main())
