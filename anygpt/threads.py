"""Number of torch's threads for models so small that further threads may cost more than they compute.

`python -m anygpt.threads` prints the best number for batches of the tiny zoo's language model, with which
scripts/quickstart.sh trains and evaluates; a single row is often fastest with one thread, a batch with more.
"""

import os
import time

import torch
from torch import nn

TINY = 50_000_000  # parameters
REPEATS = 5


def choose_threads(model: nn.Module, rows: int = 1) -> int:
    """Set torch's threads to the number with which a composition's language model is fastest here; returns it.

    Tries powers of two up to the current number for batches of `rows`. It stays if `OMP_NUM_THREADS` is set, on GPUs,
    and for models of more than `TINY` parameters.
    """
    language_model, most = getattr(model, "language_model", model), torch.get_num_threads()
    large = sum(parameter.numel() for parameter in model.parameters()) > TINY
    if "OMP_NUM_THREADS" in os.environ or large or language_model.device.type != "cpu":
        return most
    times = {}
    for threads in {most, *(2**n for n in range(most.bit_length()))}:
        torch.set_num_threads(threads)
        times[threads] = min(seconds_of_forward(language_model, rows) for _ in range(REPEATS))
    best = min(times, key=times.__getitem__)
    torch.set_num_threads(best)
    return best


@torch.no_grad()
def seconds_of_forward(language_model: nn.Module, rows: int) -> float:
    """Seconds for rows of 64 tokens."""
    ids = torch.zeros(rows, 64, dtype=torch.long)
    begin = time.perf_counter()
    language_model(input_ids=ids)
    return time.perf_counter() - begin


if __name__ == "__main__":
    from anygpt.model.language_models import load_language_model
    from anygpt.training.cli import quiet_libraries

    quiet_libraries()
    print(choose_threads(load_language_model("zoo:language_model"), rows=32))
