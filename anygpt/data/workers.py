"""Worker processes of data loaders."""

import ctypes
import multiprocessing
import os
import signal
import sys


def end_with_parent(worker: int) -> None:
    """A loader's `worker_init_fn`: end with the process that started the workers, even if it is killed, or with the
    thread of it that did.

    Torch's own watchdog works only from a worker's first row on, too late if the parent was killed before.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    parent = multiprocessing.parent_process()
    if parent is not None and multiprocessing.get_start_method() != "forkserver" and os.getppid() != parent.pid:
        os._exit(1)
