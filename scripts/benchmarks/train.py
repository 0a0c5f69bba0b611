"""The training loop on stages 1 and 3: its overhead beside the model, its wait for data, the cache, and packing.

`tiny` are the parts of configs/tiny on ToyWorld's rows, `135m` the same with a language model of SmolLM2-135M's shape,
`photographs` that language model and ViT-B/16 on JPEGs of 512 × 384; `pooled` gives one feature a medium. `stage 3` is
the tiny configuration with padded rows, packed rows, or padded batches of about 3,200 tokens.
"""

import argparse
import tempfile
from pathlib import Path

from anygpt.commands import REPOSITORY
from anygpt.toyworld.datasets import write_dataset

from benchmarks._shared import WARM_UP, run_stage, write_parts, write_photographs

POOLED, CACHED = "{projection_type: pooled}", "cached"
PADDED, PACKED, TOKENS = "padded", "packed", "batches of tokens"
UNPACKED = "--data.pack_to=null"
WAYS = {PADDED: [UNPACKED], PACKED: [], TOKENS: [UNPACKED, "--data.max_batch_tokens=3200"]}
STAGE_1 = ("tiny", "tiny pooled", "135m", "photographs", "photographs pooled")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=20, help="timed updates, after two (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode (default: %(default)s)")
    parser.add_argument("--rows", help="stage 3's data, not ToyWorld's: [{path: rows.json, media_root: media}]")


def sides(options: argparse.Namespace) -> list[str]:
    stage_1 = [f"{size}: {way}" for size in STAGE_1 for way in ("computed", CACHED)]
    return stage_1 + [f"stage 3: {way}" for way in (PADDED, PACKED, TOKENS)]


def measure(side: str, options: argparse.Namespace) -> dict[str, float]:
    """Medians of an update's time and shares, and label tokens per second."""
    size, _, way = side.partition(": ")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = [f"--data.num_workers={options.workers}", f"--train.batch_size={options.batch_size}"]
        if size == "stage 3":
            settings = [*start_of_stage_3(folder, options.rows), *WAYS[way], *common]
            return run_stage(3, folder, settings, options.steps)
        settings = [*start_of_stage_1(folder, size, options), *common]
        if way == CACHED:
            settings.append(f"--data.cache_dir={folder / 'cache'}")
        return run_stage(1, folder, settings, options.steps)


def start_of_stage_1(folder: Path, size: str, options: argparse.Namespace) -> list[str]:
    """Write parts and data of a size; returns the settings."""
    rows, pooled = options.batch_size * (options.steps + WARM_UP + 1), size.endswith("pooled")
    if size.startswith("photographs"):
        parts = write_parts(folder, "language_model", "encoders")
        data = write_photographs(folder / "rows.jsonl", rows, asked_for=False)
        settings, keys = [f"--config={parts}"], ["image"]
    else:
        data = write_dataset(folder, "stage1", rows, seed=0)
        settings, keys = tiny(1), ["image", "video", "audio"]
    if size == "135m":
        write_parts(folder, "language_model")
        settings.append(f"--model.language_model.path={folder / 'language_model'}")
    settings += [f"--model.encoders.{key}.projector={POOLED}" for key in keys if pooled]
    return [*settings, f"--data.train=[{{path: {data}}}]"]


def start_of_stage_3(folder: Path, rows: str | None) -> list[str]:
    """Write data and a model that stage 2 has made one update on; returns the settings."""
    before = write_dataset(folder, "stage2", 8, seed=0)
    rows = rows or f"[{{path: {write_dataset(folder, 'stage3', 256, seed=0)}}}]"
    start = [*tiny(2), f"--data.train=[{{path: {before}}}]", "--train.batch_size=2", "--train.projector_init=random"]
    run_stage(2, folder / "start", start, 1)
    return [*tiny(3), f"--model.init_from={folder / 'start/run/final'}", f"--data.train={rows}"]


def tiny(stage: int) -> list[str]:
    return [f"--config={REPOSITORY}/configs/tiny/stage{stage}.yaml", "--model.init_from=null"]
