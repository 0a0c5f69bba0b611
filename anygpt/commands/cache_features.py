"""Write the feature cache of a run: outputs of its frozen parts for all media and captions, computed once.

    anygpt cache-features --stage 2 --config configs/tiny/stage2.yaml --data.cache_dir runs/cache
    accelerate launch scripts/cache_features.py --stage 2 --config … --num-workers 8 --batch-size 64

Then train with the same settings; both use `data.cache_dir` of the YAML. Parts that train in the run are left out. An
interrupted command resumes when repeated. Every setting can be overridden, as in the stages. The exit code is 0, or 2
after a user error, which is printed as one line.
"""

import shutil
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm

from anygpt.cache.reading import LANGUAGE_MODEL, entries
from anygpt.cache.store import KEY
from anygpt.commands import check_range, new_parser
from anygpt.data.caching import CacheWriter
from anygpt.data.collation import Collator
from anygpt.data.dataset import ConversationDataset
from anygpt.errors import InputError
from anygpt.training import stages
from anygpt.training.config import parse_config
from anygpt.training.loading import use_frames_of
from anygpt.training.setup import build, feed_back

STAGES = {
    "1": stages.ENCODER_LLM,
    "2": stages.LLM_DECODER,
    "3": stages.INSTRUCTION_TUNING,
    "all_at_once": stages.ALL_AT_ONCE,
}


def main(arguments: list[str]) -> None:
    parser = new_parser("cache-features", __doc__)
    add = parser.add_argument
    add("--config", required=True, help="the run's YAML; its other settings as in the stages")
    add("--stage", choices=STAGES, help="the run's stage; without it, language model states are left out")
    add("--batch-size", type=int, default=8, help="media or captions at once (default: %(default)s)")
    add("--num-workers", type=int, help="processes that decode (default: data.num_workers)")
    add("--overwrite", action="store_true", help="remove this model's stores first, stale ones too")
    options, settings = parser.parse_known_args(arguments)
    check_range(options, 1, float("inf"), "batch_size")
    check_range(options, 0, float("inf"), "num_workers")
    config = parse_config(["--config", options.config, *settings])
    data, precision = config.data, config.train.mixed_precision
    if data.cache_dir is None:
        raise InputError("data.cache_dir is null; name the folder to write, with --data.cache_dir or in the YAML")
    folder = Path(data.cache_dir)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"data.cache_dir {folder} is a file; name a folder")
    on_cpu = config.run.device == "cpu" or not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=precision)
    set_seed(config.run.seed)  # gives new signal tokens the same random rows as in the run
    model, processor = build(config)
    if options.stage is None:
        model.train_only([] if config.train.parts is None else stages.choose_networks(model, config.train.parts))
        accelerator.print(f"{LANGUAGE_MODEL}: left out, since what trains below its states is unknown without --stage")
    else:
        stages.prepare_stage(model, STAGES[options.stage], config)
    datasets = [
        ConversationDataset.from_files(sources, on_bad_sample=data.on_bad_sample)
        for sources in (data.train, data.eval)
        if sources
    ]
    for dataset in datasets:
        feed_back(dataset, model, STAGES[options.stage or "3"])
        use_frames_of(dataset, processor)
    model.to(accelerator.device).eval()
    if options.overwrite and accelerator.is_main_process:
        for place in (*(folder / entry.name for entry in entries(model)), *folder.glob(f"{LANGUAGE_MODEL}-*")):
            if (place / KEY).is_file():  # any other folder is not a store
                shutil.rmtree(place)
    accelerator.wait_for_everyone()
    shown = {"unit": "batch", "disable": not accelerator.is_main_process}
    shown["mininterval"] = 0.1 if sys.stderr.isatty() else 60  # so that a log also shows progress
    CacheWriter(
        folder,
        model,
        processor,
        datasets,
        accelerator,
        precision=precision,
        batch_size=options.batch_size,
        num_workers=data.num_workers if options.num_workers is None else options.num_workers,
        on_bad_sample=data.on_bad_sample,
        leave_out=[] if options.stage else [LANGUAGE_MODEL],
        collator=Collator(processor, data.max_length, cut=data.on_long_sample == "cut"),
        progress=lambda batches, name: tqdm(batches, name, **shown),
        say=accelerator.print,
    ).write()
