"""The processes that ``torchrun`` started for one command, which share its work in whole batches.

They meet in the store that ``torchrun`` gives them and need no process group: nobody waits in a
collective. Who has nothing left to do looks into the store now and then.

A batch is one piece of work, whoever does it, and results are put together in the order of the
batches. What comes out so does not depend on the number of processes, to the last bit.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from lsgm.errors import Interrupted, UserError
from lsgm.system.device import choose_device
from lsgm.system.signals import STOP_SIGNALS

__all__ = ["ALONE", "Job", "meeting_point", "shared_job"]

R = TypeVar("R")

PIECE = 4 << 20
"""Bytes of one value in the store, which refuses more than 8 MiB."""

SHORTEST_LOOK, LONGEST_LOOK = 0.01, 0.2
"""Seconds between two looks into the store."""

FAREWELL = 10.0
"""Seconds that a process which failed waits for the others to end."""

SPOKEN = 0.5
"""Seconds that the others leave it then for its line, before ``torchrun`` ends everything."""


class _AnotherFailed(Exception):
    """Another process of the job failed, and has said why."""


class Job:
    """This process among those that share a command's work; by default the only one.

    All processes call the methods in the same order.

    Args:
        rank: Index of this process, in [0, size).
        size: Number of processes.
        store: Where they meet; None for one process.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None) -> None:
        self.rank = rank
        self.size = size
        self._store = store
        self._calls = 0

    @property
    def is_main(self) -> bool:
        """Whether this process prints, and writes what there is only one of."""
        return self.rank == 0

    def choose_device(self, name: str = "auto") -> torch.device:
        """:func:`lsgm.system.device.choose_device`, one accelerator a process unless ``name`` says
        which.
        """
        device = choose_device(name, int(os.environ.get("LOCAL_RANK", "0")))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device

    def take(self, num: int) -> Iterator[int]:
        """The numbers below ``num``, each given to one process alone: the next to whoever asks
        first. One process gets all, in order.
        """
        if self.size == 1:
            return iter(range(num))
        return self._take(self._name(), num)

    def _take(self, name: str, num: int) -> Iterator[int]:
        while (number := self._ask("add", f"{name}/taken", 1) - 1) < num:
            self.check()
            yield number

    def gather(
        self,
        parts: Iterable[tuple[Any, R]],
        *,
        everywhere: bool = True,
        done: Callable[[R], object] | None = None,
    ) -> list[R]:
        """The results of all processes, in the order of their keys.

        Typically ``job.gather((i, work(i)) for i in job.take(num))``.

        Args:
            parts: Keys, which can be sorted, and (picklable) results of this process: they are
                taken one by one, and each is passed on before the next is worked out.
            everywhere: Give the results to all processes, which then wait for the last of them;
                otherwise to the main one alone, and the others get an empty list at once.
            done: Called on the main process with each result of any process, as soon as it is
                known, in any order.

        Raises:
            Exception: Another process failed; :func:`shared_job` ends this one for that.
        """
        done = done if done is not None and self.is_main else lambda _: None
        found: list[tuple[Any, R]] = []
        post = _Post(self, self._name(), everywhere)
        for key, result in parts:
            found.append((key, result))
            done(result)
            if self.size > 1 and (everywhere or not self.is_main):
                post.send((key, result))
            if self.size > 1 and self.is_main:
                found += post.receive(done)
            self.check()
        if self.size > 1 and (everywhere or not self.is_main):
            post.send(None)
        if self.size > 1 and not (everywhere or self.is_main):
            return []

        def all_there() -> bool:
            found.extend(post.receive(done))
            return post.complete

        self._until(all_there)
        return [result for _, result in sorted(found, key=lambda item: item[0])]

    def on_main(self, action: Callable[[], R]) -> R:
        """Run ``action`` on the main process alone and give its (picklable) result to all, however
        long it takes.
        """
        if self.size == 1:
            return action()
        (result,) = self.gather((0, action()) for _ in range(self.is_main))
        return result

    def check(self) -> None:
        """Do nothing unless another process failed, for which :func:`shared_job` ends this one."""
        if self.size > 1 and self._ask("check", ["failure"]):
            raise _AnotherFailed

    def _name(self) -> str:
        """Where this call of all processes has its keys."""
        self._calls += 1
        return f"call_{self._calls}"

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self._store, method)(*arguments)
        except dist.DistError as error:
            raise ConnectionError("the process that all others report to is gone") from error

    def _until(self, condition: Callable[[], bool], seconds: float | None = None) -> None:
        """Wait until the condition holds: at most so many seconds if they are given, and as long as
        no other process fails if not.
        """
        look, end = SHORTEST_LOOK, time.monotonic() + (seconds or 0.0)
        while not condition() and (seconds is None or time.monotonic() < end):
            if seconds is None:
                self.check()
            time.sleep(look)
            look = min(1.5 * look, LONGEST_LOOK)

    def _all_ended(self) -> bool:
        return self._ask("add", "ended", 0) >= self.size

    def _end(self) -> None:
        """Say that this process is done; the main one, which may hold the store, waits for all."""
        self._ask("add", "ended", 1)
        if self.is_main:
            self._until(self._all_ended)

    def _fail(self, error: BaseException) -> int | None:
        """End the others for an error of this process, which is to be raised on; for an error that
        follows from another's, return the exit code of that one, to be used without a word.
        """
        _stop_listening()
        try:
            if self._ask("add", "failures", 1) == 1:
                self._ask("set", "failure", str(_exit_code(error)))
                self._ask("add", "ended", 1)
                self._until(self._all_ended, FAREWELL)
                return None
            self._until(lambda: self._ask("check", ["failure"]), FAREWELL)
            code = int(self._ask("get", "failure"))
            self._ask("add", "ended", 1)
            if self.is_main:
                self._until(self._all_ended, FAREWELL)
            time.sleep(SPOKEN)
            return code
        except ConnectionError:  # the store went with the process that held it
            return 1 if isinstance(error, _AnotherFailed | KeyboardInterrupt) else None

    def _interrupt_on_failure(self, ended: threading.Event) -> None:
        """Watch for the failure of another process, and interrupt the work of this one where a
        signal does (:func:`lsgm.commands.run.run`); otherwise it ends with its batch.
        """
        with contextlib.suppress(ConnectionError):  # which the main thread will notice
            while not ended.wait(LONGEST_LOOK):
                if self._ask("check", ["failure"]):
                    if callable(signal.getsignal(signal.SIGTERM)):
                        main = threading.main_thread().ident
                        signal.pthread_kill(main or 0, signal.SIGTERM)  # ends a sleep, too
                    return


ALONE = Job()
"""The job of one process."""


class _Post:
    """The results that the processes send each other in one call, as entries in the store."""

    def __init__(self, job: Job, name: str, everywhere: bool) -> None:
        self.job = job
        self.name = name
        self.readers = job.size - 1 if everywhere else 1
        self.open = job.size - 1
        """Processes that may still send something to this one."""
        self._sent: set[int] = set()
        self._next = 0

    @property
    def complete(self) -> bool:
        return self.open == 0

    def send(self, message: Any) -> None:
        """Send a key and a result; None: there are no more."""
        ask = self.job._ask
        number = ask("add", f"{self.name}/sent", 1) - 1
        self._sent.add(number)
        content = pickle.dumps(message)
        starts = range(0, len(content), PIECE)
        for piece, start in enumerate(starts):
            ask("set", f"{self.name}/{number}/{piece}", content[start : start + PIECE])
        ask("set", f"{self.name}/{number}", str(len(starts)))

    def receive(self, done: Callable[[Any], object]) -> list[tuple[Any, Any]]:
        """What has come from the others since."""
        found = []
        while not self.complete:
            if self._next not in self._sent:
                if not self.job._ask("check", [f"{self.name}/{self._next}"]):
                    break
                message = self._read(f"{self.name}/{self._next}")
                if message is None:
                    self.open -= 1
                else:
                    found.append(message)
                    done(message[1])
            self._next += 1
        return found

    def _read(self, entry: str) -> Any:
        ask = self.job._ask
        keys = [f"{entry}/{piece}" for piece in range(int(ask("get", entry)))]
        message = pickle.loads(b"".join(ask("get", key) for key in keys))
        if ask("add", f"{entry}/read", 1) == self.readers:
            for key in keys:
                ask("delete_key", key)
        return message


@contextlib.contextmanager
def shared_job() -> Iterator[Job]:
    """Join the processes that ``torchrun`` started, if it did, and leave them at the end.

    An error on one process ends all of them, each with its exit code; it alone is raised, the
    others end without a word. Warnings are those of the main process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Job()
        return
    job, ended = Job(**meeting_point()), threading.Event()
    with warnings.catch_warnings():
        if not job.is_main:
            warnings.simplefilter("ignore")
        try:
            try:
                threading.Thread(
                    target=job._interrupt_on_failure, args=(ended,), daemon=True
                ).start()
                yield job
                job._end()
            finally:
                ended.set()
        except SystemExit:  # --help
            raise
        except BaseException as error:
            code = job._fail(error)
            if code is None:
                raise
            raise SystemExit(code) from None


def meeting_point() -> dict[str, Any]:
    """Where the processes of ``torchrun`` find each other, as ``store``, ``rank``, ``size``: under
    a name of its own for every restart, whose store still holds what the processes that died said.
    """
    store, rank, size = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return {"store": dist.PrefixStore(f"attempt_{attempt}", store), "rank": rank, "size": size}


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return error.exit_code if isinstance(error, Interrupted) else 128 + signal.SIGINT
    return 2 if isinstance(error, UserError) else 1


def _stop_listening() -> None:
    """Ignore signals from here on: this process ends, and ``torchrun`` need not tell it to."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, *STOP_SIGNALS):
            signal.signal(number, signal.SIG_IGN)
