"""Samples during training: the model's answers to the first rows of data.eval, as files and in the tracker."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from anygpt.data.dataset import ConversationDataset, LoadedSample
from anygpt.errors import InputError
from anygpt.evaluation.report import flat_values
from anygpt.evaluation.rows import conversation
from anygpt.evaluation.run import evaluate
from anygpt.evaluation.suite import read_suite
from anygpt.media.types import Clip, Picture, Sound, media_type
from anygpt.model.multimodal import MultimodalModel
from anygpt.outputs import Answer
from anygpt.training.sharding import is_sharded, whole_parameters

TEXT_TOKENS = 64
DENOISING_STEPS = 20


@dataclass
class SampleFile:
    """One generated medium.

    Attributes:
        type: media type.
        content: as in `outputs.Segment`.
        path: path of the file.
        rate: frames or samples per second; None for an image.
    """

    type: str
    content: Any
    path: Path
    rate: float | None = None


@dataclass
class SampleAnswer:
    """The model's answer to one row."""

    id: str
    text: str
    files: list[SampleFile] = field(default_factory=list)


def take_samples(
    model: MultimodalModel,
    processor: Any,
    dataset: ConversationDataset,
    rows: int,
    seed: int,
    folder: Path,
    accelerator: Accelerator,
    step: int,
) -> str:
    """Generate answers on every process, and write and track them on the main one; returns a line for the log."""
    try:
        with accelerator.autocast(), whole_parameters(model, accelerator):
            answers = list(generate_answers(model, processor, dataset, rows, seed))
    except InputError as error:
        return f"warning: no samples after update {step}: {error}"
    if accelerator.is_main_process:
        log_answers(write_answers(answers, model, folder), accelerator, step)
    return f"samples after update {step}: {folder}"


def run_suite(path: str, folder: Path, model: Any, processor: Any, accelerator: Accelerator) -> dict[str, float]:
    """Run a suite and write its results to `folder`; returns `{"<suite>/<metric>": value}`, equal on all processes.

    Raises:
        InputError: see `evaluate`; or the model is sharded.
    """
    if is_sharded(accelerator):
        raise InputError("train.eval_suite: processes that share a model's layers cannot answer rows of their own")
    suite, training = read_suite(path), model.training
    suite.baselines = suite.baselines or []  # baselines do not change during training
    model.eval()
    try:
        with torch.random.fork_rng(), accelerator.autocast():
            report = evaluate(suite, folder, accelerator, model, processor, facts={"updates": folder.name})
    finally:
        model.train(training)
    return broadcast_object_list([flat_values(report) if report else {}])[0]


@torch.no_grad()
def generate_answers(
    model: MultimodalModel, processor: Any, dataset: ConversationDataset, rows: int, seed: int
) -> Iterator[tuple[str, Answer]]:
    """Yield `(sample id, answer)` for the first readable rows, requiring the same media as in the row's own answer.

    Restores the random state of the process, so that sampling does not change the training.
    """
    training = model.training
    model.eval()
    try:
        for item in (dataset[i] for i in range(min(rows, len(dataset)))):
            if not _loaded(item):
                continue
            turns = [i for i, m in enumerate(item.sample.messages) if m.role == "assistant"]
            if not turns:
                continue
            asked = {part.type for part in item.sample.messages[turns[-1]].content if part.type != "text"}
            require = [processor.decoder_key(modality) for modality in sorted(asked)]
            messages = conversation(item.first_messages(turns[-1]))
            batch = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
            spans = sum(len(model.signal_tokens.names[key]) for key in require)
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                generator = torch.Generator().manual_seed(seed)
                options = {"generator": generator, "num_inference_steps": DENOISING_STEPS}
                output = model.generate(
                    **batch.to(model.device),
                    max_new_tokens=TEXT_TOKENS + spans,
                    require=require,
                    decoder_kwargs=dict.fromkeys(model.decoder_keys, options),
                )
            yield item.sample.id, output.answers[0]
    finally:
        model.train(training)


def _loaded(item: Any) -> TypeGuard[LoadedSample]:
    return isinstance(item, LoadedSample)


def write_answers(answers: Iterable[tuple[str, Answer]], model: MultimodalModel, folder: Path) -> list[SampleAnswer]:
    """Write the media of answers as `<row>-<number>.<png|mp4|wav>`, and an `index.jsonl` with one line per row."""
    written = []
    for row, (name, answer) in enumerate(answers):
        written.append(SampleAnswer(name, answer.text))
        for number, segment in enumerate(s for s in answer.segments if s.type != "text"):
            kind = media_type(segment.type)
            path = folder / f"{row}-{number}{kind.suffixes[0]}"
            kind.write(path, segment.content, segment.rate)
            written[-1].files.append(SampleFile(segment.type, segment.content, path, segment.rate))
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"id": w.id, "text": w.text, "files": [file.path.name for file in w.files]} for w in written]
    (folder / "index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return written


def log_answers(answers: list[SampleAnswer], accelerator: Accelerator, step: int) -> None:
    """Log answers to the trackers. tensorboard gets single frames of clips, since videos need another package."""
    for tracker in accelerator.trackers:
        for answer in answers:
            if tracker.name == "tensorboard":
                _log_to_board(answer, tracker.writer, step)
            elif tracker.name == "wandb":
                _log_to_wandb(answer, tracker, step)


def _log_to_board(answer: SampleAnswer, writer: Any, step: int) -> None:
    writer.add_text(f"samples/{answer.id}", answer.text, step)
    for number, file in enumerate(answer.files):
        tag = f"samples/{answer.id}/{number}-{file.type}"
        kind = media_type(file.type)
        if isinstance(kind, Picture):
            writer.add_image(tag, np.asarray(file.content.convert("RGB")), step, dataformats="HWC")
        elif isinstance(kind, Clip):
            writer.add_images(tag, file.content, step, dataformats="NHWC")
        else:
            writer.add_audio(tag, torch.from_numpy(file.content)[None], step, sample_rate=int(file.rate))


def _log_to_wandb(answer: SampleAnswer, tracker: Any, step: int) -> None:
    import wandb

    kinds = {Picture: wandb.Image, Clip: wandb.Video, Sound: wandb.Audio}
    media = {
        f"samples/{answer.id}/{number}-{file.type}": kinds[type(media_type(file.type))](
            str(file.path), caption=answer.text
        )
        for number, file in enumerate(answer.files)
    }
    tracker.log({f"samples/{answer.id}": answer.text, **media}, step=step)
