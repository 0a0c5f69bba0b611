"""Python programs in processes of their own, forked from a server that has imported `anygpt` and the libraries.

`python FILE …`, `python -m MODULE …` and `python -c CODE …` spend most of a short run on these imports; here a test
process pays for them once. Of ours the server knows nothing but `import anygpt`, so that a program still has to import
what it needs. What matters before that, as variables that libraries read when they are imported, needs a real start.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PRELOADED = [
    "anygpt",
    "accelerate",
    "av",
    "datasets",
    "jsonargparse",
    "diffusers.pipelines.audioldm.pipeline_audioldm",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.text_to_video_synthesis.pipeline_text_to_video_synth",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "transformers.models.whisper.modeling_whisper",
]


def server():
    """The context whose processes are forked from the server, which starts with the first of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run_program(command, environment, output):
    """What a process does: the program, with its output in files, as the first of a process group."""
    import torch  # the server has it

    gc.freeze()  # as a program's start does
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # the platform's own, for its workers
    for number, name in ((1, "out"), (2, "err")):
        with open(output / name, "wb") as file:
            os.dup2(file.fileno(), number)
    os.chdir(REPOSITORY)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    program, *arguments = command
    if program == "-c":
        sys.argv = ["-c", *arguments[1:]]
        exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
    elif program == "-m":
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(command)
        sys.path.insert(0, str(Path(program).resolve().parent))
        runpy.run_path(program, run_name="__main__")


class Forked:
    """A program that was started; what the tests use of `subprocess.Popen`."""

    def __init__(self, command, environment):
        self.command, self.folder = list(map(str, command)), tempfile.TemporaryDirectory()
        self.output = Path(self.folder.name)
        self.process = server().Process(target=run_program, args=(self.command, environment, self.output))
        self.process.start()
        self.pid, self.kill = self.process.pid, self.process.kill

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.returncode

    def communicate(self, timeout=None):
        """What it wrote to stdout and stderr until its end."""
        self.process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.command, timeout)
        return tuple((self.output / name).read_text() for name in ("out", "err"))
