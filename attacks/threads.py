"""The tasks of an attack dealt out to several threads, each with a copy of the model.

On small networks an attack's own arithmetic, and the calls themselves, take as long as a share of the network's
products does; one thread's then run beside another's products.
"""

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from queue import SimpleQueue

import torch
from torch import Tensor, nn

from attacks.attack import Outcome, Task

Model = Callable[[Tensor], Tensor]


def in_threads(
    work: Callable[[Model, Sequence[Task]], Iterator[Outcome]], models: Sequence[nn.Module], tasks: Sequence[Task]
) -> Generator[Outcome]:
    """What `work` yields for each of the models on its share of the tasks: of n models the k-th has every n-th task
    from the k-th on, whatever the others do. The threads of torch's own are divided among them.

    What a thread raises is raised here, after the others have stopped. A generator that is closed stops them too,
    each at its next evaluation.
    """
    found: SimpleQueue[Outcome | BaseException | None] = SimpleQueue()
    stopped = threading.Event()
    threads = torch.get_num_threads()

    def run(model: nn.Module, share: Sequence[Task]) -> None:
        torch.set_num_threads(max(1, threads // len(models)))

        def ask(x: Tensor) -> Tensor:
            if stopped.is_set():
                raise _Stopped
            return model(x)

        try:
            for outcome in work(ask, share):
                found.put(outcome)
            found.put(None)
        except BaseException as error:
            found.put(error)

    workers = [
        threading.Thread(target=run, args=(model, tasks[k :: len(models)]), daemon=True)
        for k, model in enumerate(models)
    ]
    try:
        for worker in workers:
            worker.start()
        running = len(workers)
        while running:
            got = found.get()
            if got is None:
                running -= 1
            elif isinstance(got, BaseException):
                raise got
            else:
                yield got
    finally:
        stopped.set()
        for worker in workers:
            worker.join()
        torch.set_num_threads(threads)


class _Stopped(Exception):
    """Ends a thread whose outcomes nobody waits for."""
