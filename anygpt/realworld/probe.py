"""What the image encoder's features tell of names: R@1 and R@5 of a linear map to MiniLM's space.

    python -m anygpt.realworld.probe runs/realworld

The map is ridge regression from a picture's mean feature to its name's embedding, fitted to the pictures of
`image_names.jsonl`; its penalty is chosen on a tenth of them. Answers are ranked as by the metric `retrieval`.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from anygpt.commands import execute
from anygpt.evaluation.metrics.features import PretrainedNetwork
from anygpt.media.types import read_media

PENALTIES = [10.0**power for power in range(-2, 6)]


def main(arguments: list[str]) -> None:
    folder = Path(arguments[0])
    eyes = PretrainedNetwork(str(folder / "parts/image_encoder"), "image")
    judge = PretrainedNetwork(str(folder / "parts/sentence_encoder"), "text")

    def read(name: str) -> tuple[Tensor, Tensor]:
        said = [json.loads(line)["messages"] for line in (folder / "data" / name).read_bytes().splitlines()]
        rows = [(asked["content"][0]["path"], answer["content"][0]["text"]) for asked, answer in said]
        media = (read_media("image", folder / "data" / path) for path, _ in rows)
        features = torch.cat([eyes.of_media([medium]) for medium in media])
        return features.double(), F.normalize(judge.of_texts([text for _, text in rows]), dim=-1).double()

    (x, y), (held, names) = read("image_names.jsonl"), read("held_image_names.jsonl")
    fold = torch.arange(len(x)) % 10 == 0
    tried = {recalls(ridge(x[~fold], y[~fold], x[fold], penalty), y[fold])[1]: penalty for penalty in PENALTIES}
    penalty = tried[max(tried)]
    first, fifth = recalls(ridge(x, y, held, penalty), names)
    print(f"R@1 {first:.3f}, R@5 {fifth:.3f} among {len(names)}; {len(x)} fitted, penalty {penalty:g}")


def ridge(x: Tensor, y: Tensor, new: Tensor, penalty: float) -> Tensor:
    """Predictions `(M, D)` for `new (M, H)` of ridge regression with a bias, fitted to `x (N, H)` and `y (N, D)`."""
    mean, centre = x.mean(0), y.mean(0)
    x = x - mean
    weight = torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype), x.T @ (y - centre))
    return (new - mean) @ weight + centre


def recalls(found: Tensor, right: Tensor) -> list[float]:
    """R@1 and R@5 of `found (M, D)`, each with the row of `right` as its own, by cosine."""
    scores = F.normalize(found, dim=-1) @ F.normalize(right, dim=-1).T
    closer = (scores > scores.diag()[:, None]).sum(1)
    return [float((closer < k).double().mean()) for k in (1, 5)]


if __name__ == "__main__":
    sys.exit(execute(main))
