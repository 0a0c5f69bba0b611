"""What a run shows: lines and metrics in the console, `log.txt` and accelerate's trackers, and the model's answers."""

from __future__ import annotations

import copy
import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from anygpt.composition import evaluating
from anygpt.data.dataset import ConversationDataset, LoadedSample
from anygpt.errors import InputError
from anygpt.evaluation.report import flat_values
from anygpt.evaluation.rows import conversation
from anygpt.evaluation.run import evaluate
from anygpt.evaluation.store import AnswerStore
from anygpt.evaluation.suite import read_suite
from anygpt.media.types import Clip, Picture, Sound, media_type
from anygpt.model.freezing import PartSummary
from anygpt.model.multimodal import MultimodalModel
from anygpt.outputs import Answer
from anygpt.settings import flatten
from anygpt.training.config import Config
from anygpt.training.folder import LOG, SAMPLES
from anygpt.training.sharding import is_sharded

TEXT_TOKENS = 64
DENOISING_STEPS = 20


def part_table(parts: list[PartSummary]) -> str:
    """Table of parts: parameters, trainable parameters, share."""
    total = PartSummary("total", sum(p.parameters for p in parts), sum(p.trainable for p in parts))
    lines = [f"{'part':<28}{'parameters':>14}{'trainable':>14}{'share':>9}"]
    for p in (*parts, total):
        share = p.trainable / p.parameters if p.parameters else 0
        lines.append(f"{p.part:<28}{p.parameters:>14,}{p.trainable:>14,}{share:>9.2%}")
    return "\n".join(lines)


class RunLog:
    """Writes lines to the console and `log.txt`, and metrics to the tracker; on the main process only.

    The tracker also gets the settings and `facts`; its `run_id` is saved in checkpoints, so that it can resume the run.
    """

    def __init__(self, accelerator: Accelerator, config: Config, done: int, facts: dict[str, Any], run_id: str | None):
        self.accelerator, self.main = accelerator, accelerator.is_main_process
        self.folder = Path(config.run.output_dir)
        self.run_id = run_id or secrets.token_hex(4)
        self.bar = tqdm(
            total=config.train.max_steps,
            initial=done,
            desc=self.folder.name,
            unit="update",
            disable=None if self.main else True,  # None: on a terminal only; a file gets the lines below
            dynamic_ncols=True,
            mininterval=1,
        )
        if config.run.tracker == "none":
            return
        settings = flatten(config.to_dict() | facts)
        name, project = config.run.name or self.folder.name, config.run.project
        if config.run.tracker == "tensorboard":  # it separates projects by folder and takes no nulls
            project = name
            settings = {key: "null" if value is None else value for key, value in settings.items()}
        os.environ.setdefault("WANDB_SILENT", "true")
        wandb = {"name": name, "dir": str(self.folder), "id": self.run_id, "resume": "allow"}
        try:
            self.accelerator.init_trackers(project, settings, init_kwargs={"wandb": wandb})
        except Exception as error:  # each tracker raises its own types
            self.accelerator.trackers.clear()  # a tracker that did not start cannot be closed
            reason = " ".join(str(error).split())
            raise InputError(f"run.tracker {config.run.tracker} cannot start: {reason}") from error

    def say(self, text: str) -> None:
        if self.main:
            tqdm.write(text)
            with (self.folder / LOG).open("a") as file:
                file.write(f"{text}\n")

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Log metrics as one line and to the tracker."""
        self.say(f"update {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))
        self.accelerator.log(values, step=step)


def take_samples(
    model: MultimodalModel,
    processor: Any,
    dataset: ConversationDataset,
    accelerator: Accelerator,
    config: Config,
    step: int,
) -> str:
    """Generate answers on every process, and write and track them on the main one; returns a line for the log."""
    folder = Path(config.run.output_dir) / SAMPLES / f"{step:06d}"
    try:
        with accelerator.autocast(), ExitStack() as stack:
            if is_sharded(accelerator):  # `generate` runs parts of the model without its `forward`, which gathers them
                model.unshard()
                stack.callback(model.reshard)
            answers = dict(generate_answers(model, processor, dataset, config))
    except InputError as error:
        return f"warning: no samples after update {step}: {error}"
    if accelerator.is_main_process:
        store = AnswerStore(folder)
        for name, answer in answers.items():
            store.add(name, answer)
        for name, line in store.read().items():
            paths = [folder / file["path"] for file in line["files"]]
            for tracker in accelerator.trackers:
                _track(tracker, f"samples/{name}", answers[name], paths, step)
    return f"samples after update {step}: {folder}"


def run_suite(path: str, folder: Path, model: Any, processor: Any, accelerator: Accelerator) -> dict[str, float]:
    """Run a suite and write its results to `folder`; returns `{"<suite>/<metric>": value}`, equal on all processes."""
    if is_sharded(accelerator):
        raise InputError("train.eval_suite: with a sharded model, processes cannot answer different rows")
    suite = read_suite(path)
    suite.baselines = suite.baselines or []  # baselines do not change during training
    with evaluating(model), torch.random.fork_rng(), accelerator.autocast():
        report = evaluate(suite, folder, accelerator, model, processor, facts={"updates": folder.name})
    return broadcast_object_list([flat_values(report) if report else {}])[0]


@torch.no_grad()
def generate_answers(
    model: MultimodalModel, processor: Any, dataset: ConversationDataset, config: Config
) -> Iterator[tuple[str, Answer]]:
    """Yield `(sample id, answer)` for the first readable rows, requiring the same media as in the row's own answer.

    Restores the random state of the process, so that sampling does not change the training.
    """
    seed, dataset = config.run.seed, copy.copy(dataset)
    dataset.cache = None  # the processor reads media, not their features
    for item in (dataset[i] for i in range(min(config.train.sample_rows, len(dataset)))):
        if not isinstance(item, LoadedSample):
            continue
        messages = item.sample.messages
        turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
        if not turns:
            continue
        asked = {part.type for part in messages[turns[-1]].content if part.type != "text"}
        require = [processor.decoder_key(modality) for modality in sorted(asked)]
        prompt = conversation(item.first_messages(turns[-1]), answered=bool(model.tokenizer_keys))
        batch = processor.apply_chat_template(prompt, tokenize=True, add_generation_prompt=True)
        options = {key: {"seed": seed, "num_inference_steps": DENOISING_STEPS} for key in model.decoder_keys}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            output = model.generate(
                **batch.to(model.device),
                max_new_tokens=TEXT_TOKENS + sum(len(model.signal_tokens.spans[key]) for key in require),
                require=require,
                decoder_kwargs=options | {key: {"seed": seed} for key in model.makers if key not in options},
            )
        yield item.sample.id, output.answers[0]


def _track(tracker: Any, tag: str, answer: Answer, paths: list[Path], step: int) -> None:
    """Log an answer. tensorboard gets single frames of clips, since its videos need another package."""
    segments = [segment for segment in answer.segments if segment.type != "text"]
    made = [(f"{tag}/{number}-{one.type}", media_type(one.type), one) for number, one in enumerate(segments)]
    if tracker.name == "wandb":
        import wandb

        kinds = {Picture: wandb.Image, Clip: wandb.Video, Sound: wandb.Audio}
        shown = {
            place: kinds[type(kind)](str(path), caption=answer.text)
            for (place, kind, _), path in zip(made, paths, strict=True)
        }
        tracker.log({tag: answer.text} | shown, step=step)
        return
    tracker.writer.add_text(tag, answer.text, step)
    for place, kind, one in made:
        if isinstance(kind, Picture):
            tracker.writer.add_image(place, np.asarray(one.content.convert("RGB")), step, dataformats="HWC")
        elif isinstance(kind, Clip):
            tracker.writer.add_images(place, one.content, step, dataformats="NHWC")
        else:
            tracker.writer.add_audio(place, torch.from_numpy(one.content)[None], step, sample_rate=int(one.rate))
