"""Run ablations: the three stages and the evaluation with other settings, and print a table of results.

    python scripts/ablate.py --seeds 0 1 2                              # all of configs/tiny/ablations.yaml
    python scripts/ablate.py --only default "linear, ridge" --things held_out

An ablation is a set of overrides by stage. Runs are stored under a hash of their inputs (settings, seed, data, the
zoo's parts and the preceding run), so that runs shared by several ablations are trained once, finished ones are not
repeated, and interrupted ones continue. `--things validation`, the default, leaves some of the seen things out of
training and measures on them, for choosing settings. `--things held_out` trains on all seen things, for reporting.
"""

import hashlib
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from anygpt.commands import REPOSITORY, execute, new_parser
from anygpt.errors import InputError, refusing
from anygpt.toyworld.datasets import write_dataset
from anygpt.toyworld.evaluation.answers import Settings
from anygpt.toyworld.world import SEEN, VALIDATION
from anygpt.toyworld.zoo import digest, zoo

import yaml
from pydantic import BaseModel, ValidationError, model_validator

SCRIPTS = {
    "stage1": "stages/stage1_encoder_llm.py",
    "stage2": "stages/stage2_llm_decoder.py",
    "stage3": "stages/stage3_instruction_tuning.py",
}
TRAINING_THINGS = {"validation": tuple(thing for thing in SEEN if thing not in VALIDATION), "held_out": SEEN}
Report = Mapping[str, Any]  # content of a `matrix.json`


class Ablation(BaseModel, extra="forbid"):
    """Overrides by stage, and skipped stages."""

    stage1: dict[str, Any] = {}
    stage2: dict[str, Any] = {}
    stage3: dict[str, Any] = {}
    skip: tuple[Literal["stage1", "stage2"], ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _split(cls, body: Any) -> Any:
        found: dict[str, Any] = {}
        for key, value in body.items() if isinstance(body, dict) else ():
            for name in key.replace(",", " ").split():
                found[name] = found.get(name, {}) | value if isinstance(value, dict) else value
        return found if isinstance(body, dict | None) else body


class Plan(BaseModel, extra="forbid"):
    """The YAML file's content: config files by stage, rows per dataset, evaluation arguments, ablations by name."""

    stages: dict[Literal["stage1", "stage2", "stage3"], str]
    rows: int
    evaluate: dict[str, Any]
    ablations: dict[str, Ablation]


def read_plan(path: Path) -> Plan:
    with refusing(f"{path} cannot be read as YAML", (OSError, yaml.YAMLError)):
        content = yaml.safe_load(path.read_text())
    try:
        return Plan.model_validate(content)
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise InputError(f"{path} is no list of ablations: {'; '.join(faults)}") from error


def expand(overrides: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Expand `model.decoders.*.signal` to every decoder in the config; other keys are unchanged."""
    expanded: dict[str, Any] = {}
    for key, value in overrides.items():
        head, star, tail = key.partition(".*.")
        section: Any = config
        for part in head.split(".") if star else ():
            section = section.get(part, {})
        if not section:
            raise InputError(f"the override {key!r} finds nothing under {head} in the stage's config")
        expanded |= {f"{head}.{name}.{tail}": value for name in section} if star else {key: value}
    return expanded


def commands(plan: Plan, ablation: Ablation, seed: int, data: Path, folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield the folder and the command of each stage's run, in order."""
    start: Path | None = None
    inherited: dict[str, Any] = {}
    for stage, script in SCRIPTS.items():
        config = yaml.safe_load((REPOSITORY / plan.stages[stage]).read_text())
        if stage in ablation.skip:
            # The next stage makes the parts that this one would have made.
            inherited = {f"model.{k}": v for k, v in config.get("model", {}).items() if k != "init_from"}
            continue
        settings = inherited | {"data.train": [{"path": str(data / f"{stage}.jsonl")}], "run.seed": seed}
        settings["model.init_from"] = None if start is None else str(start / "final")
        settings |= expand(getattr(ablation, stage), config)
        manifest = (data / stage / "manifest.json").read_text()
        start = folder / f"{stage}-{short_hash([config, settings, manifest, digest(zoo())])}"
        arguments = [sys.executable, script, "--config", plan.stages[stage], "--run.output_dir", str(start)]
        yield start, arguments + [f"--{key}={json.dumps(value)}" for key, value in settings.items()]
        inherited = {}


def short_hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def run(plan: Plan, name: str, seed: int, things: str, output: Path) -> Report:
    """Train and evaluate whatever is not done yet, and return the content of `matrix.json`."""
    data, final = output / f"data-{things}", output
    for stage in SCRIPTS:
        write_dataset(data, stage, plan.rows, seed=0, things=TRAINING_THINGS[things], progress=True)
    for final, command in commands(plan, plan.ablations[name], seed, data, output / "runs"):
        if not (final / "final").is_dir():
            call(command, final.name)
    options = ["--things", things, "--seed", str(seed)]
    options += [f"--{key.replace('_', '-')}={value}" for key, value in plan.evaluate.items()]
    slug = "".join(c if c.isalnum() else "-" for c in name).strip("-")
    report = output / "reports" / f"{slug}-{seed}-{short_hash([final.name, options, asdict(Settings())])}"
    if not (report / "matrix.json").is_file():
        command = [sys.executable, "scripts/evaluate.py", "--checkpoint", str(final / "final"), "--output", str(report)]
        call([*command, *options], report.name)
    return json.loads((report / "matrix.json").read_text())


def call(command: Sequence[str], name: str) -> None:
    print(f"== {name}: {' '.join(command[1:])}", flush=True)
    if code := subprocess.run(command, cwd=REPOSITORY).returncode:
        raise InputError(f"{name} ended with exit code {code}, see above; run it again: finished runs are kept")


def table(results: Mapping[str, Sequence[Report]]) -> str:
    """Format results as Markdown, one line per ablation; with several seeds mean ± standard deviation."""

    def shown(values: Sequence[float]) -> str:
        deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{100 * statistics.mean(values):.1f}{deviation}"

    lines = []
    for name, reports in results.items():
        found: dict[str, list[float]] = {"mean": [r["mean"] for r in reports], "least": [r["min"] for r in reports]}
        for target in next(iter(reports[0]["matrix"].values())):
            found[f"to {target}"] = [statistics.mean(row[target] for row in r["matrix"].values()) for r in reports]
        found |= {name: [r[name]["rate"] for r in reports] for name in ("unasked", "missing")}
        found["questions"] = [r["text_only"]["question"]["rate"] for r in reports]
        lines = lines or [f"| | {' | '.join(found)} |", f"|---|{'---|' * len(found)}"]
        lines.append(f"| {name} | {' | '.join(map(shown, found.values()))} |")
    return "\n".join(lines)


def ablate(arguments: list[str]) -> None:
    parser = new_parser(None, __doc__)
    add = parser.add_argument
    add("--config", type=Path, default=REPOSITORY / "configs/tiny/ablations.yaml", help="(default: %(default)s)")
    add("--output", type=Path, default=REPOSITORY / "runs/ablations", help="(default: %(default)s)")
    add("--only", nargs="*", default=[], metavar="NAME", help="run these alone")
    add("--seeds", nargs="+", type=int, default=[0], help="train and measure with each of them (default: 0)")
    add("--things", choices=sorted(TRAINING_THINGS), default="validation", help="things to measure on (%(default)s)")
    options = parser.parse_args(arguments)
    plan, results = read_plan(options.config), dict[str, list[Report]]()
    if unknown := sorted(set(options.only) - set(plan.ablations)):
        raise InputError(f"--only names {', '.join(unknown)}; the ablations are {', '.join(plan.ablations)}")
    output = options.output.resolve()
    for name in (name for name in plan.ablations if name in options.only or not options.only):
        results[name] = [run(plan, name, seed, options.things, output) for seed in options.seeds]
        (output / f"table-{options.things}.md").write_text(table(results) + "\n")
        print(table(results), flush=True)


if __name__ == "__main__":
    raise SystemExit(execute(ablate))
