"""A pool of processes joined by gloo, for what is computed over `torch.distributed`."""

import sys
import tempfile
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(seconds=60)


class Pool:
    """Runs one function in `n` of its processes at once; `n` is even, or all."""

    def __init__(self, size):
        # Forked from a process that has imported torch with this module; on macOS, libraries do not survive a fork.
        context = mp.get_context("spawn" if sys.platform == "darwin" else "forkserver")
        context.set_forkserver_preload([__name__])
        self._folder = tempfile.TemporaryDirectory()
        self._tasks = [context.Queue() for _ in range(size)]
        self._results = context.Queue()
        self._processes = [
            context.Process(target=_work, args=(rank, size, self._folder.name, self._tasks[rank], self._results))
            for rank in range(size)
        ]

    def __enter__(self):
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, *exception):
        for tasks in self._tasks:
            tasks.put(None)
        for process in self._processes:
            process.join(10)
            process.kill()
        self._folder.cleanup()

    def run(self, world_size, function, *args):
        """`[function(rank, group, *args) for each rank]` of `world_size`; arguments and results are pickled."""
        for tasks in self._tasks[:world_size]:
            tasks.put((world_size, function, args))
        # All of them, so that an error in one leaves nothing behind for the next run.
        results = [self._results.get(timeout=2 * TIMEOUT.total_seconds()) for _ in range(world_size)]
        for rank, _, error in results:
            assert error is None, f"rank {rank}:\n{error}"
        return [result for _, result, _ in sorted(results, key=lambda rank_and_result: rank_and_result[0])]


def _work(rank, size, folder, tasks, results):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    groups = {n: dist.new_group(list(range(n))) for n in range(2, size + 1, 2)}
    while (task := tasks.get()) is not None:
        world_size, function, args = task
        try:
            results.put((rank, function(rank, groups[world_size], *args), None))
        except BaseException:
            results.put((rank, None, traceback.format_exc()))
    dist.destroy_process_group()
