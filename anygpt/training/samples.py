"""Samples during training: the model's answers to the first rows of data.eval, as files and in the tracker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from anygpt.data.dataset import ConversationDataset, LoadedSample
from anygpt.errors import InputError
from anygpt.evaluation.report import flat_values
from anygpt.evaluation.rows import conversation
from anygpt.evaluation.run import evaluate
from anygpt.evaluation.store import AnswerStore
from anygpt.evaluation.suite import read_suite
from anygpt.media.types import Clip, Picture, Sound, media_type
from anygpt.model.multimodal import MultimodalModel
from anygpt.outputs import Answer
from anygpt.training.sharding import is_sharded, whole_parameters

TEXT_TOKENS = 64
DENOISING_STEPS = 20


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
            answers = dict(generate_answers(model, processor, dataset, rows, seed))
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
            if not isinstance(item, LoadedSample):
                continue
            messages = item.sample.messages
            turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
            if not turns:
                continue
            asked = {part.type for part in messages[turns[-1]].content if part.type != "text"}
            require = [processor.decoder_key(modality) for modality in sorted(asked)]
            prompt = conversation(item.first_messages(turns[-1]))
            batch = processor.apply_chat_template(prompt, tokenize=True, add_generation_prompt=True)
            options = {"seed": seed, "num_inference_steps": DENOISING_STEPS}
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                output = model.generate(
                    **batch.to(model.device),
                    max_new_tokens=TEXT_TOKENS + sum(len(model.signal_tokens.names[key]) for key in require),
                    require=require,
                    decoder_kwargs=dict.fromkeys(model.decoder_keys, options),
                )
            yield item.sample.id, output.answers[0]
    finally:
        model.train(training)


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
