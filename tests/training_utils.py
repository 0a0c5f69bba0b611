"""Helpers of the training tests: small ToyWorld data, the stages as a user runs them, and what they wrote."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from forked import Forked
from safetensors.torch import load_file, save_file

from anygpt.toyworld.datasets import write_dataset
from anygpt.training.cli import run_stage
from anygpt.training.config import parse_config
from anygpt.training.loading import make_loader, take_updates
from anygpt.training.setup import build
from anygpt.training.stages import ALL_AT_ONCE, ENCODER_LLM, INSTRUCTION_TUNING, LLM_DECODER, prepare_stage
from anygpt.training.trainer import Trainer, train

REPOSITORY = Path(__file__).resolve().parent.parent
STAGES = {1: ENCODER_LLM, 2: LLM_DECODER, 3: INSTRUCTION_TUNING, "all_at_once": ALL_AT_ONCE}
SCRIPTS = {
    1: "stages/stage1_encoder_llm.py",
    2: "stages/stage2_llm_decoder.py",
    3: "stages/stage3_instruction_tuning.py",
    "all_at_once": "stages/all_at_once.py",
}
ROWS = {"stage1": 12, "stage2": 12, "stage3": 24}
PATIENCE = 600  # seconds that a process may take on a busy machine
SEED = 10  # with it the first 12 rows of a run of stage 3 are of all four kinds


def shared(tmp_path_factory, name, make):
    """`make(folder)` once for a whole test session, however many workers it has; returns the folder."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, done = base / name, base / f"{name}.done"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


def toy_data(tmp_path_factory):
    """A folder with `stage1.jsonl`, `stage2.jsonl`, `stage3.jsonl` and their media."""

    def make(folder):
        for kind, rows in ROWS.items():
            write_dataset(folder, kind, rows, seed=SEED)

    return shared(tmp_path_factory, "toy_data", make)


def stage2_start(tmp_path_factory, data):
    """A `final/` folder with all parts, for stage 3 to start from."""

    def make(folder):
        args = arguments(2, data / "stage2.jsonl", folder / "run", "--model.init_from", "null", steps=1)
        train_here(2, args)

    return shared(tmp_path_factory, "stage2_start", make) / "run/final"


def argument_maker(tmp_path_factory):
    """`make(stage, output, *more, **options)`, each stage with its own data and start."""
    data = toy_data(tmp_path_factory)
    final = stage2_start(tmp_path_factory, data)

    def make(stage, output, *more, **options):
        more = ("--model.init_from", "null", *more) if stage == 2 else more
        start = final if stage == 3 else None
        return arguments(stage, data / f"stage{stage}.jsonl", output, *more, init_from=start, **options)

    return make


def arguments(stage, data, output, *more, init_from=None, steps=2, batch_size=6, config=None):
    """The command line of a short run on the tiny zoo; `more` are further arguments."""
    return [
        *("--config", str(config or REPOSITORY / f"tests/configs/stage{stage}.yaml")),
        *("--run.output_dir", str(output), "--run.device", "cpu"),
        *("--data.train", f"[{{path: {data}}}]"),
        *("--train.max_steps", str(steps), "--train.batch_size", str(batch_size), "--train.log_steps", "1"),
        *("--train.warmup_steps", "0"),
        *(("--model.init_from", str(init_from)) if init_from else ()),
        *map(str, more),
    ]


def environment():
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}


def load_script(name):
    """A file of `scripts/` as a module, whose `main` then runs in this process; its folder is on the path, as then."""
    if (folder := str(REPOSITORY / "scripts")) not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def start_process(*command):
    """A command in the repository, in a process group of its own, with its output in pipes."""
    return subprocess.Popen(
        list(map(str, command)),
        cwd=REPOSITORY,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def run_process(*command, timeout=PATIENCE):
    """A command in the repository, to its end."""
    return subprocess.run(
        list(map(str, command)), cwd=REPOSITORY, env=environment(), text=True, capture_output=True, timeout=timeout
    )


def run_script(stage, args, timeout=PATIENCE):
    """`python stages/…`, to its end."""
    return run_process(sys.executable, SCRIPTS[stage], *args, timeout=timeout)


def start_forked(*command, **variables):
    """`python *command` in the repository, as a process of its own that need not import the libraries again."""
    return Forked(command, environment() | variables)


def run_forked(*command, timeout=PATIENCE):
    """`start_forked`, to its end."""
    process = start_forked(*command)
    out, err = process.communicate(timeout)
    return subprocess.CompletedProcess(process.command, process.returncode, out, err)


def wait_for(condition, process, seconds=PATIENCE):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode}: {process.communicate()[1]}"
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.002)


def launch_command(stage, args, processes="one_process"):
    """`accelerate launch --config_file … stages/…`."""
    accelerate = Path(sys.executable).parent / "accelerate"
    options = ["--config_file", f"configs/accelerate/{processes}.yaml"]
    if processes != "one_process":
        options += ["--main_process_port", 0]  # a free one: tests that run at the same time must not meet
    return [accelerate, "launch", *options, SCRIPTS[stage], *args]


def launch(stage, args, processes="one_process", timeout=PATIENCE):
    """`accelerate launch --config_file … stages/…`, to its end."""
    return run_process(*launch_command(stage, args, processes), timeout=timeout)


def reset_accelerate():
    """A process can make only one kind of `Accelerator`, unless it forgets the one before."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def train_here(stage, args):
    """The run in this process; returns its `final/` folder."""
    reset_accelerate()
    return train(parse_config(args), STAGES[stage])


def cli_here(stage, args, capsys, out=None):
    """The command line in this process: exit code, and the lines on stderr; what it prints is added to `out`."""
    reset_accelerate()
    capsys.readouterr()
    try:
        run_stage(STAGES[stage], "", args)
        code = 0
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr()
    if out is not None:
        out.append(printed.out)
    return code, printed.err.splitlines()


def check_mistake(code, lines, *said):
    """A mistake of the user's: exit code 2, and one line on stderr that says all of `said`."""
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    missing = [text for text in map(str, said) if text not in lines[0]]
    assert not missing, f"{missing} not in {lines[0]!r}"


def start_of(stage, args):
    """The model of a run as it stands before the first update, its processor, and the names that train."""
    config = parse_config(args)
    set_seed(config.run.seed)
    model, processor = build(config)
    names = prepare_stage(model, STAGES[stage], config)
    return model, processor, names


def tensors_of(model):
    """Every parameter and buffer by name, those that are not saved included."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def trained_tensors(final):
    """What a run's folder holds itself: projectors, signal tokens, adapters."""
    tensors = load_file(Path(final) / "model.safetensors")
    for path in sorted(Path(final).glob("adapters/*/adapter_model.safetensors")):
        tensors |= {f"{path.parent.name}/{name}": tensor for name, tensor in load_file(path).items()}
    return tensors


def change_tensors(final, change):
    """Rewrite `model.safetensors` of a folder with what `change(tensors)` returns; its manifest would tell."""
    (Path(final) / "manifest.json").unlink(missing_ok=True)
    path = Path(final) / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def logged(folder):
    """`{update: {metric: value}}` from a run's tensorboard files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = {}
    for events in {path.parent for path in Path(folder).rglob("events.out.tfevents.*")}:
        reader = EventAccumulator(str(events), size_guidance={"scalars": 0})
        reader.Reload()
        for tag in reader.Tags()["scalars"]:
            for event in reader.Scalars(tag):
                values.setdefault(event.step, {})[tag] = event.value
    return values


def losses_of(folder):
    """`logged`, without the metrics of speed and memory."""
    machine = ("/s", "MFU", "_share", "memory_gib")
    return {
        step: {name: value for name, value in metrics.items() if not name.endswith(machine)}
        for step, metrics in logged(folder).items()
    }


def assert_same_losses(first, second, relative, absolute=0.0):
    """Two results of `losses_of` agree."""
    assert first.keys() == second.keys()
    for step in first:
        assert first[step].keys() == second[step].keys()
        for name, value in first[step].items():
            bound = max(relative * abs(value), absolute)
            assert abs(value - second[step][name]) <= bound, (step, name, value, second[step][name])


def sgd(parameters):
    """At rate 1, what moves is the gradient itself."""
    return torch.optim.SGD(parameters, lr=1.0)


class Bench:
    """The pieces of a run, with its first batches at hand."""

    def __init__(self, stage, args, optimizer, folder):
        reset_accelerate()
        self.config = parse_config(args)
        self.accelerator = Accelerator(cpu=True)
        self.trainer = Trainer(self.config, STAGES[stage], self.accelerator).setup()
        trainer, self.model = self.trainer, self.trainer.model
        self.names = self.model.trainable_names()
        loader = make_loader(trainer.dataset, trainer.collator, self.config, self.accelerator, start=0)
        self.batches = next(take_updates(loader, self.config))
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        trainer.optimizer = self.accelerator.prepare(optimizer(self.parameters.values()))

    def update(self, step=0):
        self.trainer.done = step
        return self.trainer.step(self.batches)
