"""Performance of a run: the time of its phases, and its arithmetic relative to the device's peak."""

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from anygpt.training.folder import GIB

DONE, LEFT_OUT = ("tok", "samples"), ("skipped", "cut")
PHASES = ("data", "forward", "backward", "optimizer")
PEAKS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "A6000": 155, "4090": 165, "3090": 71, "L4": 121}
"""Dense bfloat16 TFLOP/s by a substring of the device's name (NVIDIA's data sheets)."""
_COUNTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Meter:
    """Measures throughput since its last reading; phases are timed with GPU events if there is a GPU.

    Counts operations of linear and convolution layers: 2 · weights · positions forward, and as much for each computed
    gradient (of inputs, of weights). Attention products, the head's logits and recomputed activations are not counted,
    so the true utilization is slightly higher.
    """

    def __init__(self, accelerator: Accelerator):
        self.device, self.processes = accelerator.device, accelerator.num_processes
        self.peak = peak_rate(self.device, torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32)
        self.left_out = Counter[str]()  # rows of the whole run
        self.start()

    def start(self) -> None:
        self.since, self.flops = time.perf_counter(), 0
        self.done = Counter[str]()
        self.marks: list[tuple[str, Any, Any]] = []

    def count(self, totals: Mapping[str, float]) -> None:
        """Count an update's tokens and samples (`DONE`), and the rows skipped and cut (`LEFT_OUT`)."""
        self.done.update({name: int(totals[name]) for name in DONE})
        self.left_out.update({name: int(totals[name]) for name in LEFT_OUT})

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = self._mark()
        hook = register_module_forward_hook(self._count) if name == "forward" else None
        try:
            yield
        finally:
            self.marks.append((name, begin, self._mark()))
            if hook is not None:
                hook.remove()

    def _count(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, _COUNTED):
            positions = output.numel() // output.shape[-1 if isinstance(module, nn.Linear) else 1]
            passes = 1 + (output.requires_grad and inputs[0].requires_grad) + module.weight.requires_grad
            self.flops += 2 * module.weight.numel() * positions * passes

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude a block (evaluation, checkpoints, samples) from the throughput."""
        begin = time.perf_counter()
        yield
        self.since += time.perf_counter() - begin

    def read(self) -> dict[str, float]:
        """Throughput over all processes, shares of time, and memory since the last reading."""
        memory = psutil.Process().memory_info().rss
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            memory = torch.cuda.max_memory_allocated(self.device)
        seconds = time.perf_counter() - self.since
        phases: Counter[str] = Counter()
        for name, begin, end in self.marks:
            phases[name] += end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3
        rate = self.flops * self.processes / seconds / 1e12
        values = {f"{what}/s": self.done[what] / seconds for what in DONE}
        values |= {"TFLOP/s": rate, "MFU": rate / self.peak / self.processes}
        values |= {f"{name}_share": phases[name] / seconds for name in PHASES}
        values |= {"memory_gib": memory / GIB, **{name: count for name, count in self.left_out.items() if count}}
        self.start()
        return values


@cache
def peak_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Peak TFLOP/s of a device: for bfloat16 from its data sheet if known, otherwise measured by a matrix product."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = next((rate for part, rate in PEAKS.items() if part in name), None)
    if known is not None and dtype == torch.bfloat16:
        return known
    size, best = 4096 if device.type == "cuda" else 768, float("inf")
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    for _ in range(3):
        begin = time.perf_counter()
        float((matrix @ matrix)[0, 0])
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best / 1e12


def profiler(updates: int, folder: Path, process: int) -> Any:
    """torch's profiler for `updates` updates after the first two; writes `<folder>/trace-<process>.json`."""
    if not updates:
        return contextlib.nullcontext()
    folder.mkdir(parents=True, exist_ok=True)
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=updates, repeat=1),
        on_trace_ready=lambda trace: trace.export_chrome_trace(str(folder / f"trace-{process}.json")),
    )
