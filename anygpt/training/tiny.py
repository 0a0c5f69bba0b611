"""Default of a stage without `--config`: its tiny configuration, with data that are made if missing."""

import fcntl
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from anygpt.settings import asks_for_help
from anygpt.toyworld.__main__ import main as write_toyworld
from anygpt.training.stages import ENCODER_LLM, INSTRUCTION_TUNING, LLM_DECODER, Stage

FOLDER = Path(__file__).resolve().parent.parent.parent / "configs" / "tiny"
FILES = {ENCODER_LLM: "stage1.yaml", LLM_DECODER: "stage2.yaml", INSTRUCTION_TUNING: "stage3.yaml"}


def with_tiny_config(stage: Stage, arguments: Sequence[str], main: bool) -> list[str]:
    """The arguments, preceded by the stage's tiny configuration if they name none.

    It starts from the output of the previous stage if present, otherwise from the parts; the main process prints which.
    """
    given = [argument.partition("=")[0] for argument in arguments]
    if stage not in FILES or "--config" in given or asks_for_help(arguments) or not FOLDER.is_dir():
        return list(arguments)
    path = FOLDER / FILES[stage]
    added, start = [f"--config={path}"], "what is given"
    if not {"--model", "--model.init_from"} & set(given):
        model = start_of(path)
        start = model.get("init_from") or "the pretrained parts"
        added.append(f"--model={json.dumps(model)}")
    if main:
        shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        how = "another with --config FILE, single settings with --train.max_steps 100"
        print(f"No --config: this is {shown}, from {start}; {how}", flush=True)
    if "--data.train" not in given:
        for source in yaml.safe_load(path.read_text())["data"]["train"]:
            make_data(Path(source["path"]))
    return [*added, *arguments]


def start_of(path: Path) -> dict[str, Any]:
    """The `model` section of a stage's file; if its start is missing, with the parts of earlier stages instead."""
    model = yaml.safe_load(path.read_text())["model"]
    if "init_from" not in model or (Path(model["init_from"]) / "config.json").is_file():
        return model
    files = list(FILES.values())
    before = start_of(path.with_name(files[files.index(path.name) - 1]))
    return before | model | {"init_from": before.get("init_from")}


def make_data(path: Path) -> None:
    """Make ToyWorld's file of that name if it is missing; one process makes it while the others wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            write_toyworld(["--output", str(path.parent), "--kinds", path.stem])
