"""Run ablations: the three stages and the evaluation with other settings, and print a table of results.

    python scripts/ablate.py --seeds 0 1 2                              # all of configs/tiny/ablations.yaml
    python scripts/ablate.py --only default "linear, ridge" --things held_out

An ablation is a set of overrides by stage. Runs are stored under a hash of their inputs (settings, seed, data, the
zoo's parts and the preceding run), so that runs shared by several ablations are trained once, finished ones are not
repeated, and interrupted ones continue. `--things validation`, the default, leaves some of the seen things out of
training and measures on them, for choosing settings. `--things held_out` trains on all seen things, for reporting.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from anygpt.errors import InputError
from anygpt.toyworld.datasets import write_dataset
from anygpt.toyworld.evaluation.answers import Settings
from anygpt.toyworld.world import SEEN, VALIDATION
from anygpt.toyworld.zoo import zoo
from anygpt.training.cli import MISTAKE

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = {
    "stage1": "stages/stage1_encoder_llm.py",
    "stage2": "stages/stage2_llm_decoder.py",
    "stage3": "stages/stage3_instruction_tuning.py",
}
TRAINING_THINGS = {"validation": tuple(thing for thing in SEEN if thing not in VALIDATION), "held_out": SEEN}


@dataclass(frozen=True)
class Ablation:
    """A name, overrides by stage, and skipped stages."""

    name: str
    overrides: Mapping[str, Mapping[str, Any]]
    skip: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """The YAML file's content: config files by stage, rows per dataset, evaluation arguments, ablations."""

    configs: Mapping[str, str]
    rows: int
    evaluate: Mapping[str, Any]
    ablations: tuple[Ablation, ...]


def read_plan(path: Path) -> Plan:
    """Read and check the list of ablations.

    Raises:
        InputError: no such file, or unknown keys.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    expected = {"stages", "rows", "evaluate", "ablations"}
    if not isinstance(content, dict) or set(content) != expected or set(content["stages"] or {}) != set(SCRIPTS):
        raise InputError(f"{path} must have the keys {', '.join(sorted(expected))}, and stages {', '.join(SCRIPTS)}")
    if not isinstance(content["ablations"], dict):
        raise InputError(f"{path}: ablations must be a mapping of names to overrides")
    ablations = []
    for name, body in content["ablations"].items():
        if not isinstance(body or {}, dict):
            raise InputError(f"{path}, ablation {name!r} must be a mapping of stages to overrides, but is {body!r}")
        overrides: dict[str, dict[str, Any]] = {stage: {} for stage in SCRIPTS}
        skip: tuple[str, ...] = ()
        for key, value in (body or {}).items():
            if key == "skip":
                skip = tuple(value)
                continue
            for stage in key.replace(",", " ").split():
                if stage not in SCRIPTS:
                    raise InputError(
                        f"{path}, ablation {name!r}: {stage!r} is no stage; those are {', '.join(SCRIPTS)}"
                    )
                if not isinstance(value, dict):
                    raise InputError(f"{path}, ablation {name!r}: {key} must be a mapping of settings, not {value!r}")
                overrides[stage] |= value
        if "stage3" in skip or set(skip) - set(SCRIPTS):
            raise InputError(f"{path}, ablation {name!r}: skip is {list(skip)}; it can name stage1 and stage2")
        ablations.append(Ablation(str(name), overrides, skip))
    return Plan(content["stages"], content["rows"], content["evaluate"] or {}, tuple(ablations))


def expand(overrides: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Expand `model.decoders.*.signal` to every decoder in the config; other keys are unchanged."""
    expanded: dict[str, Any] = {}
    for key, value in overrides.items():
        head, star, tail = key.partition(".*.")
        if not star:
            expanded[key] = value
            continue
        section: Any = config
        for part in head.split("."):
            section = section.get(part, {})
        if not section:
            raise InputError(f"the override {key!r} finds nothing under {head} in the stage's config")
        expanded |= {f"{head}.{name}.{tail}": value for name in section}
    return expanded


def commands(plan: Plan, ablation: Ablation, seed: int, data: Path, folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield the folder and the command of each stage's run, in order."""
    start: Path | None = None
    inherited: dict[str, Any] = {}
    for stage, script in SCRIPTS.items():
        config = yaml.safe_load((REPOSITORY / plan.configs[stage]).read_text())
        parts = {k: v for k, v in config.get("model", {}).items() if k != "init_from"}
        if stage in ablation.skip:
            inherited = parts  # the next stage makes the parts that this one would have made
            continue
        settings = {f"model.{name}": part for name, part in inherited.items()}
        settings |= {"data.train": [{"path": str(data / f"{stage}.jsonl")}], "run.seed": seed}
        settings["model.init_from"] = None if start is None else str(start / "final")
        settings |= expand(ablation.overrides[stage], config)
        manifest = (data / stage / "manifest.json").read_text()
        decides = json.dumps([config, settings, manifest, zoo_digest()], sort_keys=True)
        start = folder / f"{stage}-{hashlib.sha256(decides.encode()).hexdigest()[:12]}"
        arguments = [sys.executable, script, "--config", plan.configs[stage], "--run.output_dir", str(start)]
        yield start, arguments + [f"--{key}={json.dumps(value)}" for key, value in settings.items()]
        inherited = {}


@cache
def zoo_digest() -> str:
    """Hash of the tiny parts, without their model cards."""
    digest = hashlib.sha256()
    for path in sorted(path for path in zoo().rglob("*") if path.is_file() and path.suffix != ".md"):
        digest.update(str(path.relative_to(zoo())).encode() + path.read_bytes())
    return digest.hexdigest()


def run(plan: Plan, ablation: Ablation, seed: int, things: str, output: Path) -> dict[str, Any]:
    """Train and evaluate whatever is not done yet, and return the content of `matrix.json`."""
    data = output / f"data-{things}"
    for stage in SCRIPTS:
        write_dataset(data, stage, plan.rows, seed=0, things=TRAINING_THINGS[things], progress=True)
    final = output
    for final, command in commands(plan, ablation, seed, data, output / "runs"):
        if not (final / "final").is_dir():
            call(command, final.name)
    options = [f"--{key.replace('_', '-')}={value}" for key, value in plan.evaluate.items()]
    decides = json.dumps([final.name, things, options, asdict(Settings())])
    report = output / "reports" / f"{slug(ablation.name)}-{seed}-{hashlib.sha256(decides.encode()).hexdigest()[:8]}"
    if not (report / "matrix.json").is_file():
        command = [sys.executable, "scripts/evaluate.py", "--checkpoint", str(final / "final"), "--output", str(report)]
        call([*command, "--things", things, "--seed", str(seed), *options], report.name)
    return json.loads((report / "matrix.json").read_text())


def call(command: Sequence[str], name: str) -> None:
    """Run a command in the repository, with its output on the terminal; raises `InputError` if it fails."""
    print(f"== {name}: {' '.join(command[1:])}", flush=True)
    code = subprocess.run(command, cwd=REPOSITORY).returncode
    if code:
        raise InputError(
            f"{name} ended with exit code {code}, see above; mend it and start again, what is done is kept"
        )


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name).strip("-")


def columns(report: Mapping[str, Any]) -> dict[str, float]:
    """The table's columns for a report."""
    matrix = report["matrix"]
    shown = {"mean": report["mean"], "least": report["min"]}
    shown |= {f"to {o}": statistics.mean(row[o] for row in matrix.values()) for o in next(iter(matrix.values()))}
    return shown | {
        "unasked": report["unasked"]["rate"],
        "missing": report["missing"]["rate"],
        "questions": report["text_only"]["question"]["rate"],
    }


def table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Format results as Markdown, one line per ablation; with several seeds mean ± standard deviation."""
    rows = {name: [columns(report) for report in reports] for name, reports in results.items() if reports}
    names = list(next(iter(rows.values()))[0])
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for name, found in rows.items():
        shown = []
        for column in names:
            shown.append(spread([one[column] for one in found]))
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Format as a percentage; several values as mean ± standard deviation."""
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation}"


def cells(reports: Sequence[Mapping[str, Any]]) -> str:
    """Format the matrix and its baselines over the seeds as Markdown, followed by counts over all answers."""
    matrices = {source: [report["matrix"][source] for report in reports] for source in reports[0]["matrix"]}
    matrices["upper bound"] = [report["upper_bound"] for report in reports]
    for source in reports[0]["caption_baseline"]:
        matrices[f"caption baseline, from {source}"] = [report["caption_baseline"][source] for report in reports]
    targets = list(next(iter(reports[0]["matrix"].values())))
    lines = [f"| in \\ out | {' | '.join(targets)} |", f"|---|{'---|' * len(targets)}"]
    for name, rows in matrices.items():
        shown = (spread([row[target] for row in rows]) if target in rows[0] else "–" for target in targets)
        lines.append(f"| {name} | {' | '.join(shown)} |")

    def total(name: str, shares: Sequence[Mapping[str, Any]]) -> str:
        return f"{name} {sum(one['right'] for one in shares)} of {sum(one['n'] for one in shares)}"

    counts = [total(name, [report[name] for report in reports]) for name in ("unasked", "missing")]
    counts.append(total("questions", [report["text_only"]["question"] for report in reports]))
    for source, row in reports[0]["motion"].items():
        counts += [total(f"motion {source} → {o}", [report["motion"][source][o] for report in reports]) for o in row]
    each = ", ".join(f"{100 * report['mean']:.1f} ({100 * report['min']:.1f})" for report in reports)
    return "\n".join([*lines, "", f"mean (least cell) by seed: {each}; {'; '.join(counts)}"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--config", type=Path, default=REPOSITORY / "configs/tiny/ablations.yaml", help="(default: %(default)s)")
    add("--output", type=Path, default=REPOSITORY / "runs/ablations", help="(default: %(default)s)")
    add("--only", nargs="*", default=[], metavar="NAME", help="run these alone")
    add("--seeds", nargs="+", type=int, default=[0], help="train and measure with each of them (default: 0)")
    add("--things", choices=sorted(TRAINING_THINGS), default="validation", help="to measure on (default: %(default)s)")
    add("--cells", action="store_true", help="also print every cell of each matrix, and the counts beside it")
    options = parser.parse_args(arguments)
    results: dict[str, list[dict[str, Any]]] = {}
    try:
        plan = read_plan(options.config)
        known = [ablation.name for ablation in plan.ablations]
        if unknown := sorted(set(options.only) - set(known)):
            raise InputError(f"--only names {', '.join(unknown)}; the ablations are {', '.join(known)}")
        output = options.output.resolve()
        for ablation in plan.ablations:
            if options.only and ablation.name not in options.only:
                continue
            reports = results.setdefault(ablation.name, [])
            reports += [run(plan, ablation, seed, options.things, output) for seed in options.seeds]
            text = table(results)
            if options.cells:
                text = "\n\n".join([text, *(f"{name}:\n\n{cells(found)}" for name, found in results.items())])
            (output / f"table-{options.things}.md").write_text(text + "\n")
            print(text, flush=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(main())
