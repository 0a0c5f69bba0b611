"""Kill training runs at random moments, continue them, and compare them bit for bit with runs that were left alone.

    python tests/killing.py                               # stages 1, 2 and 3, ten kills each, then two processes
    python tests/killing.py --stages 3 --kills 2 --steps 8 --processes 1

On the tiny parts, on the CPU. Every run writes a checkpoint after each update and evaluates now and then; stage 3 has
dropout. Half of the kills (SIGKILL, to all processes of a run) wait for a checkpoint to be under way. Exit code 0 if
all trained tensors are equal, 1 if not.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from forked import server
from safetensors.torch import load_file

from anygpt.parts.manifest import find_fault
from anygpt.toyworld.datasets import write_dataset
from anygpt.training.folder import find_checkpoints, step_of

REPOSITORY = Path(__file__).resolve().parent.parent
ROWS = 24
START_SECONDS = 600  # until a run that was started has done something


def arguments(stage: int, output: Path, folder: Path, steps: int, processes: int) -> list[str]:
    """The run's command line; every option but the folder is the same for all runs of a stage."""
    data, held_out = ((folder / f"{name}{stage}.jsonl") for name in ("stage", "eval"))
    start = folder / "start/final" if stage == 3 else None
    return [
        *("--config", str(REPOSITORY / f"configs/tiny/stage{stage}.yaml")),
        *("--run.output_dir", str(output), "--run.device", "cpu", "--loss.denoising", "1"),
        *("--model.init_from", "null" if start is None else str(start)),
        *("--data.train", f"[{{path: {data}, media_root: {folder}}}]"),
        *("--data.eval", f"[{{path: {held_out}, media_root: {folder}}}]"),
        *("--train.max_steps", str(steps), "--train.batch_size", str(4 // processes), "--train.log_steps", "1"),
        *("--train.save_steps", "1", "--train.eval_steps", str(max(2, steps // 3))),
        *("--train.warmup_steps", str(min(2, steps))),
        *(("--lora.dropout", "0.1") if stage == 3 else ()),
    ]


def run(stage: int, command: list[str], environment: dict[str, str], log: str) -> None:
    """What a run's process does: `python stages/…`, with its output in a file."""
    from anygpt.training.cli import run_stage
    from anygpt.training.stages import ENCODER_LLM, INSTRUCTION_TUNING, LLM_DECODER

    multiprocessing.set_start_method(None, force=True)  # the platform's own: a run's workers are not the server's
    os.environ.update(environment)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    run_stage({1: ENCODER_LLM, 2: LLM_DECODER, 3: INSTRUCTION_TUNING}[stage], "", command)


class Runner:
    """Starts runs in processes of their own."""

    def __init__(self):
        os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # before the server reads them
        self.context = server()

    def start(self, stage: int, command: list[str], processes: int, log: Path) -> list[BaseProcess]:
        """The processes of a run, as a launcher would start them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        started = []
        for rank in range(processes):
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            environment = {name: str(value) for name, value in places.items()} if processes > 1 else {}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            process = self.context.Process(target=run, args=(stage, command, environment, str(log)))
            process.start()
            started.append(process)
        return started

    def finish(self, stage: int, command: list[str], processes: int, log: Path) -> None:
        """A run to its end.

        Raises:
            SystemExit: it did not get there.
        """
        started = self.start(stage, command, processes, log)
        for process in started:
            process.join()
        if any(process.exitcode for process in started):
            sys.exit(f"FAIL: stage {stage} {' '.join(command)}\nended with {started[0].exitcode}; see {log}")

    def kill(self, run: list[BaseProcess], output: Path, step: int, in_write: bool, draw: random.Random) -> str:
        """SIGKILL at a random moment of an update or of the writing of its checkpoint; says what it hit."""
        awaited = output / (f".checkpoint-{step}.incomplete" if in_write else f"checkpoint-{step}")
        end = time.monotonic() + START_SECONDS
        while not awaited.exists():
            if max((step_of(path) for path in find_checkpoints(output)), default=0) >= step:
                break  # the write was too quick to be seen
            if run[0].exitcode is not None or time.monotonic() > end:
                sys.exit(f"FAIL: the run did not get to update {step}")
            time.sleep(0.0005)
        wanted = draw.randint(0, 14)  # a checkpoint has about as many files
        while in_write and awaited.exists() and sum(path.is_file() for path in awaited.rglob("*")) < wanted:
            time.sleep(0.0005)
        time.sleep(draw.uniform(0, 0.01 if in_write else 0.5))
        for process in run:
            process.kill()
        for process in run:
            process.join()
        left = [path for path in output.glob(".*.incomplete") if ".removed" not in path.name]
        if left:
            files = [path.name for path in left[0].rglob("*") if path.is_file()]
            return f"inside the write of {left[0].name.split('.')[1]}, after {len(files)} files"
        whole = find_checkpoints(output)
        return f"after {whole[-1].name}" if whole else "before the first checkpoint"


def trained(final: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(final / "model.safetensors")
    for path in sorted(final.glob("adapters/*/adapter_model.safetensors")):
        tensors |= {f"{path.parent.name}/{name}": tensor for name, tensor in load_file(path).items()}
    return tensors


def survives(runner: Runner, stage: int, folder: Path, kills: int, steps: int, processes: int, seed: int) -> bool:
    """Whether a run that was killed again and again ends as one that was not."""
    name = f"stage {stage}, {processes} process{'es' if processes > 1 else ''}"
    whole, broken = (folder / f"stage{stage}-{processes}-{kind}" for kind in ("whole", "killed"))
    runner.finish(stage, arguments(stage, whole, folder, steps, processes), processes, Path(f"{whole}.log"))
    draw, log = random.Random(f"{seed}/{stage}/{processes}"), Path(f"{broken}.log")
    command = arguments(stage, broken, folder, steps, processes)
    inside = 0
    last = max(kills + 1, steps - 8)  # a quick run may make several updates before the kill, and must not end before it
    for number, step in enumerate(sorted(draw.sample(range(1, last), kills))):
        run = runner.start(stage, command, processes, log)
        hit = runner.kill(run, broken, step, number % 2 == 0, draw)
        inside += hit.startswith("inside")
        print(f"{name}: kill {number + 1} at update {step}, {hit}", flush=True)
        damaged = [path.name for path in find_checkpoints(broken) if find_fault(path)]
        if damaged or (broken / "final").exists():
            print(f"FAIL {name}: {', '.join(damaged) or 'final'} should not be there so")
            return False
    runner.finish(stage, command, processes, log)
    first, second = trained(whole / "final"), trained(broken / "final")
    different = [n for n in first if n not in second or not torch.equal(first[n], second[n])]
    same = not different and first.keys() == second.keys()
    told = f"{len(first)} trained tensors bit-identical" if same else f"{len(different)} tensors differ"
    print(f"{'PASS' if same else 'FAIL'} {name}: {kills} kills, {inside} of them inside a write; {told}", flush=True)
    return same


def prepare(runner: Runner, folder: Path, stages: list[int]) -> None:
    """Data of all stages, and what stage 3 starts from."""
    for stage in (1, 2, 3):
        write_dataset(folder, f"stage{stage}", ROWS, seed=0)
        rows = (folder / f"stage{stage}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"eval{stage}.jsonl").write_text("".join(rows[:4]))
    if 3 in stages:
        runner.finish(2, arguments(2, folder / "start", folder, 1, 1), 1, folder / "start.log")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3], choices=(1, 2, 3))
    parser.add_argument("--kills", type=int, default=10, help="of each run (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="updates of a run (default: %(default)s)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="1: every stage; 2: the last stage")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    options = parser.parse_args()
    if not 0 < options.kills < options.steps:
        parser.error(f"--kills is {options.kills}, expected from 1 to one less than --steps, {options.steps}")
    folder, runner = Path(tempfile.mkdtemp(prefix="kill_test_")), Runner()
    print(f"runs and their output: {folder}", flush=True)
    prepare(runner, folder, options.stages)
    chosen = [(stage, 1) for stage in options.stages if 1 in options.processes]
    chosen += [(options.stages[-1], n) for n in options.processes if n > 1]
    results = [survives(runner, stage, folder, options.kills, options.steps, n, options.seed) for stage, n in chosen]
    if all(results):
        shutil.rmtree(folder)
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
