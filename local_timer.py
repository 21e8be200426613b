"""Kill a process that is stuck in a piece of code longer than it promised to be.

    @watchdog_expires(after=30)  # seconds
    def step(): ...

If a call of `step()` is still running after 30 seconds, the process prints the Python stack of
every thread and dies, whatever it is stuck in: asleep, in a lock, in C code that holds the GIL. The
first guarded call starts a small watchdog process, which ends with the last one that it guards.

The file tells its story in this order: the queue that programs for PyTorch's timer use, the
scoreboard that makes do without, the client, the server, the decorator, the watchdog process, the
demo. Names are those of `torch.distributed.elastic.timer`. All times are seconds, all deadlines on
`time.monotonic()`, which the processes of a host share.
"""

# Copyright (c) 2026 the local_timer authors. License: MIT; its text, LICENSE, goes with every copy.

from __future__ import annotations

import os
import sys

if os.name != "posix" or sys.version_info < (3, 9):
    raise ImportError("local_timer needs CPython 3.9 or later on Linux or macOS, not Windows")

# All are up here: an import that another thread has begun never ends in a forked child.
import abc
import contextlib
import errno
import fcntl
import functools
import inspect
import itertools
import logging
import mmap
import queue
import select
import signal
import struct
import tempfile
import threading
import time
import weakref
from types import CoroutineType
from typing import TYPE_CHECKING, Any, NamedTuple

try:
    import faulthandler
except ImportError:  # in an isolated subinterpreter
    faulthandler = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from typing_extensions import ParamSpec, Self, TypeVar

    P = ParamSpec("P")
    R = TypeVar("R")

__version__ = "3.0.0"
__all__ = ["LocalTimerClient", "LocalTimerServer", "MultiprocessingRequestQueue", "RequestQueue"]
__all__ += ["TimerRequest", "configure", "expires", "start_watchdog", "watchdog_expires"]

# The clock of time.monotonic(), which freezegun and time-machine replace, by another way.
_CLOCK_ID = getattr(time, "CLOCK_UPTIME_RAW", time.CLOCK_MONOTONIC)  # the first one on macOS
_clock = functools.partial(time.clock_gettime, _CLOCK_ID)
_NEVER = float("inf")
_LOOK = 0.25  # a server looks at least so often, and a worker at its server
_STALL = 1.0  # a server that wakes so much too late did not run, whatever the reason
_TOGETHER = 0.05  # timers of a worker that expire so close to each other get one signal
_FAR = 1e9  # time.time() passed it in 2001; time.monotonic() gets there after 31 years
_OFF = os.environ.get("LOCAL_TIMER") == "off"
# "Virtual timer expired": it ends a program and writes no core file; hardly one uses it for itself.
_EXPIRED = signal.SIGVTALRM


def _log() -> logging.Logger:
    logger = logging.getLogger("local_timer")
    logger.disabled = False  # dictConfig() disables all loggers that exist
    return logger


def _seconds(name: str, value: Any, least: float = 1e-9) -> float:
    """Return a number of seconds that makes sense."""
    if not hasattr(value, "__float__"):
        raise TypeError(f"{name} is in seconds, as in @watchdog_expires(after=30), not {value!r}")
    if not least <= value < _FAR:
        hint = "; use time.monotonic(), not time.time()" if _FAR <= value < 1e10 else ""
        raise ValueError(f"{name} must be from {least:g} to {_FAR:g} seconds, not {value!r}{hint}")
    return float(value)


# ------------------------------------------------------------------------------------------ queue
class TimerRequest(NamedTuple):
    """One acquisition of a timer or, with a negative `expiration_time`, its release."""

    worker_id: int  # a pid
    scope_id: str
    expiration_time: float  # on time.monotonic()


class RequestQueue(abc.ABC):
    """The consumer's side of a queue of timer requests."""

    @abc.abstractmethod
    def size(self) -> int:
        """Return how many requests wait now."""

    @abc.abstractmethod
    def get(self, size: int, timeout: float) -> list[TimerRequest]:
        """Return up to `size` requests; wait no longer than `timeout` seconds for them."""


class MultiprocessingRequestQueue(RequestQueue):
    """A `RequestQueue` over any `multiprocessing` queue, as programs for PyTorch's timer have it.

    It sends through a thread that needs the GIL: a worker that hangs with the GIL held right after
    `acquire` is missed. One killed while it holds the queue's lock silences all others; and if one
    died with a timer running, whoever has its pid by then is killed. A server that was made without
    a queue has none of these weaknesses. Raises `TypeError` for what is no queue.
    """

    def __init__(self, mp_queue: Any) -> None:
        if not hasattr(mp_queue, "qsize"):  # a SimpleQueue can't be asked either
            raise TypeError(f"a multiprocessing.Queue is needed, not {mp_queue!r}")
        self._mp_queue = mp_queue

    def size(self) -> int:
        try:
            return int(self._mp_queue.qsize())
        except NotImplementedError:  # macOS has no sem_getvalue
            return int(not self._mp_queue.empty())

    def get(self, size: int, timeout: float) -> list[TimerRequest]:
        requests: list[TimerRequest] = []
        deadline = _clock() + timeout
        with contextlib.suppress(queue.Empty):
            while len(requests) < size:
                requests.append(self._mp_queue.get(True, max(0.0, deadline - _clock())))
        return requests


# ------------------------------------------------------------------------------------- scoreboard
# The table is one sparse file, mapped by all. The owner of a row writes it; a server only reads.
_ROWS = 8_192
_ROW = 16  # timers: two cache lines of deadlines, so that processes don't share any
_TIMERS = _ROWS * _ROW
# It begins with a byte for each row, which tells whether that was ever claimed.
_DEADLINES = _ROWS  # then comes a double for each timer, infinite where none runs
_NAMES = _DEADLINES + 8 * _TIMERS  # then what a report says of each
_NAME = struct.Struct("160s80s")  # its label and where it stands in the code, in UTF-8
_SIZE = _NAMES + _NAME.size * _TIMERS

# Its record locks are on numbers, not on content. A row has two: who has the first may clear it,
# and owns it once he has the second too. With one, a server could take the deadline that a dead
# worker has left for one of the process that has just locked the row.
_SERVER, _CLEAR, _OWN = 0, 1, 1 + _ROWS


class _Process:
    """What belongs to this process alone. In a class, since plain globals would travel with a
    guarded function that is pickled by value (Ray, Dask)."""

    client: Any = None
    board: _Scoreboard | None = None  # of that client, for the fast path
    switched_off = False  # by configure(None): then no watchdog starts by itself
    lock = threading.RLock()  # held while a watchdog is started
    boards: weakref.WeakSet[_Scoreboard] = weakref.WeakSet()
    named: dict[tuple[_Scoreboard, str], _Slot] = {}  # the timers that acquire() has started
    # Tables whose descriptors the program has closed: the end of a map closes one by its number.
    cut_off: list[Any] = []


# 1, but 0 in a process that was forked since, also by C code that runs no hook (madvise(2)).
_alive = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
_alive[0] = 1
if sys.platform == "linux":
    with contextlib.suppress(OSError):
        _alive.madvise(18)  # MADV_WIPEONFORK


def _after_fork_in_child() -> None:
    # Another thread of the parent may have held the lock.
    _Process.lock, _Process.named = threading.RLock(), {}
    for board in list(_Process.boards):
        board.forget()
    _alive[0] = 1


def _notice_fork() -> None:
    if not _alive[0]:
        _after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)


class _Scoreboard:
    """The table in which workers note their deadlines and a server reads them: state, no messages.

    To start a timer is a store into shared memory, to end it another. The server looks four times a
    second, and when a deadline that it has seen is there. A process owns its rows by record locks,
    which the kernel drops when it dies or calls `exec`: the kernel tells whom to kill.
    """

    def __init__(self, signum: int, grace: float, file: int = -1, stderr: int = -1) -> None:
        """Make a new one, or take over the two descriptors of one that was passed on."""
        self.settings = signum, grace
        self._rows: dict[int, list[_Slot]] = {}
        try:
            with contextlib.ExitStack() as undo, _low_numbers_taken():
                # Where 2 is closed, this is the end of a pipe that nobody reads.
                self.stderr = os.dup(2) if stderr < 0 else stderr
                undo.callback(os.close, self.stderr)
                self.file = _memory_file() if file < 0 else file
                undo.callback(os.close, self.file)
                os.ftruncate(self.file, _SIZE)
                self.table = memoryview(mmap.mmap(self.file, _SIZE))
                undo.pop_all()
        except OSError as error:
            what = f"no shared memory for the scoreboard of the timers: {error.strerror}"
            raise OSError(error.errno, what) from error
        self.deadlines: Any = self.table[_DEADLINES:_NAMES].cast("d")
        self.inode = _inode(self.file)
        self._end = weakref.finalize(self, _close, self.file, self.stderr, self.inode, self.table)
        self._end.atexit = False
        self.forget()
        _Process.boards.add(self)

    def forget(self) -> None:
        """Be as new: a forked child has no rows, and its parent's frames end no timer in it."""
        for slot in itertools.chain(*self._rows.values()):
            slot.cell = [_NEVER]
        self._rows = {}
        self._untried = itertools.count()  # shared by threads: no two of them try the same row
        self.free: list[_Slot] = []
        self.is_serving, self.check_at = False, 0.0

    def __reduce__(self) -> Any:
        # It is multiprocessing that pickles it, so this imports nothing anew.
        from multiprocessing import context, reduction

        context.assert_spawning(self)
        self.check_descriptors()
        passed = reduction.DupFd(self.file), reduction.DupFd(self.stderr)
        return _unpickle, (type(self), *self.settings, *passed)

    def close(self) -> None:
        self._end()  # fcntl(2): closing any descriptor of the file drops all locks of the process
        # The slots refer to it: without them nothing does, and the map goes too.
        self.free.clear()
        self._rows.clear()

    def is_ours(self) -> bool:
        """Whether the program has not closed its file, and opened another of that number."""
        return _inode(self.file) == self.inode

    def check_descriptors(self) -> None:
        if not self.is_ours():
            cure = "call start_watchdog() after that"
            raise BrokenPipeError(f"this process has closed the files of its watchdog: {cure}")

    def lock(self, byte: int) -> bool:
        with contextlib.suppress(BlockingIOError, PermissionError):  # POSIX allows either
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
            return True
        return False

    def unlock(self, byte: int) -> None:
        if self.is_ours():
            fcntl.lockf(self.file, fcntl.LOCK_UN, 1, byte)

    def holder(self, byte: int, size: int = 1) -> int | None:
        """Return the pid of another process that has locked one of `size` bytes, 0 if that is out
        of sight in another pid namespace, None if there is none (struct flock of fcntl(2))."""
        if sys.platform == "linux":
            query = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, byte, size, 0)
            answer = fcntl.fcntl(self.file, fcntl.F_GETLK, query)
            kind, _, _, _, pid = struct.unpack("hhqqi", answer)
        else:
            query = struct.pack("qqihh", byte, size, 0, fcntl.F_WRLCK, os.SEEK_SET)
            answer = fcntl.fcntl(self.file, fcntl.F_GETLK, query)
            _, _, pid, kind, _ = struct.unpack("qqihh", answer)
        return None if kind == fcntl.F_UNLCK else max(0, pid)

    def take(self) -> _Slot:
        """Return a slot for one timer, for the caller alone until he gives it back."""
        if not _alive[0]:
            _notice_fork()
        try:
            return self.free.pop()
        except IndexError:
            return self.claim_row()

    def claim_row(self) -> _Slot:
        """Own one more row; return one of its slots and make the others free."""
        self.check_descriptors()
        prints = faulthandler and self.settings[0] != signal.SIGKILL
        if prints and signal.getsignal(_EXPIRED) == signal.SIG_DFL:
            # It prints the stacks, for which it needs no GIL, and then the process dies of it.
            faulthandler.unregister(_EXPIRED)  # a forked child may have reset the signal since
            faulthandler.register(_EXPIRED, self.stderr, chain=True)
        for number in itertools.islice(self._untried, _ROWS):
            row = number % _ROWS
            if row not in self._rows and self.lock(_CLEAR + row):
                break
        else:
            raise RuntimeError(f"the scoreboard is full: {_TIMERS:,} timers")
        try:
            self._write(struct.pack("d", _NEVER) * _ROW, _DEADLINES + 8 * _ROW * row)
            self._write(bytes(_NAME.size * _ROW), _NAMES + _NAME.size * _ROW * row)
            self._write(b"\1", row)
            self.lock(_OWN + row)
        except BaseException:
            self.unlock(_CLEAR + row)
            raise
        slots = [_Slot(self, number) for number in range(row * _ROW, row * _ROW + _ROW)]
        self._rows[row] = slots
        self.free.extend(slots[1:])
        return slots[0]

    def _write(self, data: bytes, place: int) -> None:
        # Not through the map: if memory is short, that would be a SIGBUS.
        if os.pwrite(self.file, data, place) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def check(self) -> None:
        """See that the process has its scoreboard still, and that a server."""
        self.check_descriptors()
        if not self.is_serving and self.holder(_SERVER) is None:
            self.find_server()
        self.check_at = _clock() + _LOOK

    def find_server(self) -> None:
        cure = "call start() of its LocalTimerServer, or start_watchdog()"
        raise BrokenPipeError(f"no server guards this process, or it has ended: {cure}")

    def serve(self) -> None:
        if not self.lock(_SERVER):
            raise RuntimeError("another server guards with this scoreboard already")
        self.is_serving = True

    def unserve(self) -> None:
        self.is_serving = False
        self.unlock(_SERVER)

    def is_unused(self) -> bool:
        """Whether no other process has a row."""
        return self.holder(_CLEAR, 2 * _ROWS) is None

    def wait(self, until: float) -> float:
        """Sleep; return the moment up to which deadlines can be judged."""
        time.sleep(max(0.0, until - _clock()))
        return _clock()

    def scan(self, until: float) -> list[_Timer]:
        """Return the timers whose deadline is not after `until`."""
        # By pread: if memory is short, even to read a hole through the map is a SIGBUS.
        rows = os.pread(self.file, _ROWS, 0).rfind(b"\1") + 1
        table = memoryview(os.pread(self.file, 8 * _ROW * rows, _DEADLINES)).cast("d")
        timers = []
        for start in range(0, len(table), 1024):
            part = table[start : start + 1024]
            if min(part) <= until:  # most parts need not be looked at one by one, which is slow
                timers += [_Timer(n, t) for n, t in enumerate(part, start) if t <= until]
        return timers

    def ask(self, timer: _Timer) -> tuple[TimerRequest, str] | None:
        """Return the request of a timer, its owner as the kernel knows it, and where it stands in
        the code; None if it has ended or moved, or its owner is dead or out of sight."""
        row = timer.key // _ROW
        # F_GETLK says nothing of the locks of its caller.
        pid = os.getpid() if row in self._rows else self.holder(_OWN + row)
        if not pid or self.deadlines[timer.key] != timer.deadline:
            return None
        label, where = _unpack_name(self.table, _NAMES + timer.key * _NAME.size)
        return TimerRequest(pid, label, timer.deadline), where


class _Timer(NamedTuple):
    """A timer as a server sees it. Once its deadline has moved, it is another."""

    key: Any
    deadline: float


class _Slot:
    """The place of one timer in a row of this process.

    Against interrupts, a deadline goes before all else and comes after it, by a plain store.
    """

    __slots__ = ("board", "free", "cell", "place", "name")

    def __init__(self, board: _Scoreboard, number: int) -> None:
        self.board, self.free = board, board.free  # the free list of a forked child is another
        self.cell: Any = board.deadlines[number : number + 1]
        self.place, self.name = _NAMES + number * _NAME.size, b""

    def start(self, name: bytes, after: float) -> None:
        if self.name is not name:
            self.board.table[self.place : self.place + _NAME.size] = self.name = name
        now = _clock()
        if now > self.board.check_at:
            self.board.check()
            now = _clock()
        self.cell[0] = now + after

    def stop(self, _: object = None) -> None:
        self.cell[0] = _NEVER

    def give_back(self) -> None:
        self.cell[0] = _NEVER
        self.free.append(self)


@contextlib.contextmanager
def _low_numbers_taken() -> Iterator[None]:
    """Let nothing that is opened meanwhile be 0, 1 or 2, which a program may have closed."""
    with contextlib.ExitStack() as taken:
        for _ in range(2):
            for number in os.pipe():
                taken.callback(os.close, number)
        yield


def _memory_file() -> int:
    try:
        return os.memfd_create("local_timer")
    except (AttributeError, OSError):  # macOS, an old libc, a sandbox
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        with tempfile.TemporaryFile(dir=memory) as file:
            return os.dup(file.fileno())


def _inode(number: int) -> tuple[int, ...]:
    with contextlib.suppress(OSError):
        return os.fstat(number)[1:3]  # and device
    return ()


def _unpickle(kind: Any, signum: int, grace: float, file: Any, stderr: Any) -> Any:
    with _low_numbers_taken():
        return kind(signum, grace, file.detach(), stderr.detach())


def _close(file: int, stderr: int, inode: Any, table: Any) -> None:
    if _inode(file) == inode:
        os.close(file)
        os.close(stderr)
    else:
        _Process.cut_off.append(table)


def _pack_name(label: str, where: str) -> bytes:
    text = label.encode("utf-8", "backslashreplace")  # what is too long is cut
    return _NAME.pack(text, where.encode("utf-8", "backslashreplace"))


def _unpack_name(table: bytes | memoryview, place: int = 0) -> list[str]:
    return [x.rstrip(b"\0").decode("utf-8", "replace") for x in _NAME.unpack_from(table, place)]


def _report(request: TimerRequest, where: str, now: float) -> str:
    late = 1000 * max(0.0, now - request.expiration_time)
    text = f"{request.scope_id}{where} is still running {late:.1f} ms after its deadline"
    return text if text.isprintable() else repr(text)


# ----------------------------------------------------------------------------------------- client
class LocalTimerClient:
    """Acquires and releases the timers of this process, on the scoreboard of a server or through
    a queue (see `MultiprocessingRequestQueue`). A forked child that uses it is a worker too.
    """

    def __init__(self, mp_queue: Any) -> None:
        self._mp_queue = mp_queue
        self._board = mp_queue if isinstance(mp_queue, _Scoreboard) else None
        if self._board is None and not hasattr(mp_queue, "put"):
            raise TypeError(f"a multiprocessing queue is needed, not {mp_queue!r}")

    def acquire(self, scope_id: str, expiration_time: float) -> None:
        """Start a timer of this process, or move it, to a moment on `time.monotonic()`.

        Each thread needs scopes of its own. Raises `ValueError` for what can't be such a moment,
        `BrokenPipeError` if no server looks at the scoreboard, `RuntimeError` if that is full.
        """
        deadline = _seconds("expiration_time", expiration_time, 0.0)
        if self._board is None:
            self._mp_queue.put(TimerRequest(os.getpid(), scope_id, deadline))
            return
        _notice_fork()
        # First the key, then the deadline, and back in the other order: an interrupt in between
        # leaves no timer that can't be ended.
        key = self._board, scope_id
        slot = _Process.named.get(key)
        if slot is None:
            slot = _Process.named[key] = self._board.take()
        try:
            after = deadline - _clock()
            slot.start(_pack_name(scope_id, f" (limit {after:.3g} s)"), after)
            slot.cell[0] = deadline  # however long that took
        except BaseException:
            self.release(scope_id)
            raise

    def release(self, scope_id: str) -> None:
        """End a timer of this process; an unknown one is ignored."""
        if self._board is None:
            self._mp_queue.put(TimerRequest(os.getpid(), scope_id, -1.0))
            return
        _notice_fork()
        key = self._board, scope_id
        slot = _Process.named.get(key)
        if slot is not None:
            slot.stop()
            if _Process.named.pop(key, None) is slot:
                slot.give_back()


class _ClientTimer:
    """A timer of any client, to be used like a `_Slot`."""

    _count = itertools.count(1)

    def __init__(self, client: Any, scope: str | None, name: bytes) -> None:
        # Such a client tells timers apart by it.
        unique = f"{''.join(_unpack_name(name))} #{next(self._count)}"
        self._client, self._scope = client, unique if scope is None else scope

    def start(self, name: bytes, after: float) -> None:
        self._client.acquire(self._scope, _clock() + after)

    def stop(self, _: object = None) -> None:
        self._client.release(self._scope)

    def give_back(self) -> None: ...


# ----------------------------------------------------------------------------------------- server
class _QueuedTimers:
    """The timers that a queue has told of, for a server to look at like at a scoreboard."""

    def __init__(self, requests: RequestQueue) -> None:
        self._queue = requests
        self._requests: dict[tuple[int, str], TimerRequest] = {}

    def serve(self) -> None: ...

    def unserve(self) -> None: ...

    def wait(self, until: float) -> float:
        """Take in what was sent; a later deadline may have its release in the queue still."""
        now = _clock()
        for request in self._queue.get(max(1, self._queue.size()), max(0.0, until - now)):
            try:
                pid, scope, deadline = request
                # kill(-1) would hit all
                if type(pid) is not int or not 0 < pid < 2**31 or not deadline < _FAR:
                    raise ValueError("it has no pid or no time.monotonic()")
                self._requests.pop((pid, scope), None)
                if deadline >= 0:
                    self._requests[pid, scope] = TimerRequest(pid, scope, deadline)
            except (TypeError, ValueError) as error:
                _log().error("dropped a request that makes no sense: %r (%s)", request, error)
        return now

    def scan(self, until: float) -> list[_Timer]:
        timers = (_Timer(key, request.expiration_time) for key, request in self._requests.items())
        return [timer for timer in timers if timer.deadline <= until]

    def ask(self, timer: _Timer) -> tuple[TimerRequest, str] | None:
        try:
            os.kill(timer.key[0], 0)
        except ProcessLookupError:
            del self._requests[timer.key]
            return None
        except PermissionError:
            pass
        return self._requests[timer.key], ""


class LocalTimerServer:
    """Kills processes of this host that let a deadline pass.

    An expired timer earns its worker `signum`. A worker that has neither released it nor died
    `grace` seconds later gets SIGVTALRM, which prints its stacks, and after as long again SIGKILL.
    With the default it is SIGKILL at once. Start it in the launcher, hand `client()` to workers:

        with LocalTimerServer() as server:
            worker = multiprocessing.Process(target=work, args=(server.client(),))

    It looks at a scoreboard of its own, or takes requests from any `multiprocessing` queue: every
    `max_interval` seconds, at least four times a second, and at each deadline that it has seen.
    `daemon` is whether its thread lets the program end. `killed` lists the timers for which it has
    sent a signal; each kill is a warning of the logger `local_timer`. Raises `ValueError` and
    `TypeError` for bad arguments, `OSError` if there is no memory to share.
    """

    def __init__(
        self,
        mp_queue: Any = None,
        max_interval: float = 60.0,
        daemon: bool = True,
        *,
        signum: int = signal.SIGKILL,
        grace: float = 5.0,
    ) -> None:
        first, rest = signal.Signals(signum), [_EXPIRED, signal.SIGKILL]
        # What a worker gets, one after the other.
        self._signals = rest[rest.index(first) :] if first in rest else [first, *rest]
        self._grace, self._daemon = _seconds("grace", grace, 0.0), daemon
        self._interval = min(_LOOK, _seconds("max_interval", max_interval))
        self._mp_queue = _Scoreboard(signum, grace) if mp_queue is None else mp_queue
        self._timers: Any = self._mp_queue
        if not isinstance(self._mp_queue, _Scoreboard):
            self._timers = _QueuedTimers(MultiprocessingRequestQueue(mp_queue))
        self.killed: list[TimerRequest] = []
        # When to act on a timer, and with which of the signals, if not at its deadline with the
        # first: a grace that runs, a refused kill, a forgiven stall.
        self._later: dict[_Timer, tuple[float, int]] = {}
        self._lines: list[str] = []  # for the log
        self._thread: threading.Thread | None = None
        self._stop_signaled, self._awake_by = threading.Event(), _clock()

    def client(self) -> LocalTimerClient:
        """Return a client of this server, for this process and those it forks or spawns."""
        return LocalTimerClient(self._mp_queue)

    def start(self) -> None:
        """Run the loop in a thread, unless it runs. Raises `RuntimeError` if another process does
        so, or no thread is to be had."""
        if self._thread is not None and self._thread.is_alive():
            return
        self._stop_signaled.clear()
        self._awake_by = _clock()
        self._timers.serve()
        loop, is_over = self._watchdog_loop, self._stop_signaled.is_set
        self._thread = threading.Thread(target=loop, args=(is_over,), daemon=self._daemon)
        try:
            self._thread.start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the loop, within a quarter of a second; `start()` continues it."""
        self._stop_signaled.set()
        if self._thread is not None and self._thread.is_alive():
            self._thread.join()
        self._timers.unserve()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def _watchdog_loop(self, is_over: Callable[[], bool]) -> None:
        while not is_over():
            try:
                self._look()
            except Exception:
                _log().exception("the watchdog could not look; it tries again in a second")
                time.sleep(1.0)
                self._awake_by = _clock()
        self._write_lines()

    def _look(self) -> None:
        """Sleep until there is something to do, do it, and see until when to sleep next."""
        now = self._timers.wait(self._awake_by)
        self._forgive(_clock() - self._awake_by)
        lines = len(self._lines)
        for pid, timers in self._due_workers(now).items():
            self._reap_worker(pid, timers)
        soon = [self._next_step(timer)[0] for timer in self._timers.scan(now + self._interval)]
        # Counted from a moment before all this: wherever the server was stopped, it is too late.
        self._awake_by = max(now, min([*soon, now + self._interval]))
        # A log handler may block: after a kill first another look, if there is one just after it.
        if len(self._lines) == lines or self._awake_by > now + _TOGETHER:
            self._write_lines()

    def _next_step(self, timer: _Timer) -> tuple[float, int]:
        """Return when to act on a timer and with which of the signals."""
        return self._later.get(timer, (timer.deadline, 0))

    def _forgive(self, stalled: float) -> None:
        """Move all deadlines by the time for which the server, and so the workers, did not run."""
        if stalled > _STALL:
            self._lines.append(f"the watchdog did not run for {stalled:.1f} s: all deadlines move")
            for timer in self._timers.scan(_FAR):
                when, step = self._next_step(timer)
                self._later[timer] = when + stalled + _LOOK, step

    def _due_workers(self, now: float) -> dict[int, list[_Timer]]:
        """Return the workers on which it is time to act, and because of which timers."""
        soon = now + _TOGETHER
        due = dict.fromkeys(self._timers.scan(soon))
        self._later = {t: step for t, step in self._later.items() if t in due or t.deadline > soon}
        workers: dict[int, list[_Timer]] = {}
        for timer in due:
            if self._next_step(timer)[0] <= soon:
                answer = self._timers.ask(timer)
                if answer is None:
                    self._later[timer] = _NEVER, 0  # its worker is dead
                else:
                    workers.setdefault(answer[0].worker_id, []).append(timer)
        return workers

    def _reap_worker(self, pid: int, timers: list[_Timer]) -> None:
        now = _clock()
        # Ask once more, right before the kill: timers may have ended meanwhile, or the worker.
        answers = [(timer, self._timers.ask(timer)) for timer in timers]
        mine = {timer: answer for timer, answer in answers if answer and answer[0].worker_id == pid}
        steps = [self._next_step(timer) for timer in mine]
        step = max((step for when, step in steps if when <= now), default=None)
        if step is None:
            return
        signum = self._signals[step]
        self.killed += [request for request, _ in mine.values() if request not in self.killed]
        reports = [_report(request, where, now) for request, where in mine.values()]
        self._lines.append(f"{signum.name} for pid {pid}: {', '.join(reports)}")
        # What may make the worker print comes after its line.
        if signum != signal.SIGKILL:
            self._write_lines()
        then = _NEVER if signum == signal.SIGKILL else now + self._grace, step + 1
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            pass
        except PermissionError as error:
            self._lines.append(f"pid {pid} can't be killed, next try in a second: {error}")
            then = now + 1.0, step
        self._later.update((timer, then) for timer in mine)

    def _write_lines(self) -> None:
        while self._lines:
            _log().warning("%s", self._lines.pop(0))


# -------------------------------------------------------------------------------------- decorator
def configure(timer_client: Any) -> None:
    """Set the client of this process and those it forks: anything that has `acquire` and `release`,
    else a `TypeError`. `None` clears it, and no watchdog starts by itself then."""
    _check_client("timer_client", timer_client)
    _Process.client, _Process.board = timer_client, _board_of(timer_client)
    _Process.switched_off = timer_client is None


def _check_client(name: str, client: Any) -> None:
    if client is not None and not (hasattr(client, "acquire") and hasattr(client, "release")):
        raise TypeError(f"{name} must be like LocalTimerServer.client(), or None, not {client!r}")


def _board_of(client: Any) -> _Scoreboard | None:
    # A subclass may have an acquire() of its own.
    return client._board if type(client) is LocalTimerClient else None


@functools.lru_cache(1000)
def _name(module: str, name: str, file: str, line: int, after: Any, scope: str | None) -> bytes:
    file = os.path.basename(file)
    if module in ("__main__", "__mp_main__"):
        module = file.partition(".")[0]
    what = module if name == "<module>" else f"{module}.{name}"
    where = f" ({file[-40:]}:{line}, limit {after or 0:g} s)"
    return _pack_name(what if scope is None else scope, where)


class watchdog_expires:
    """Guard a function or a block: if it runs longer than `after` seconds, this process is killed.

        @watchdog_expires(after=30)
        def step(): ...

        with watchdog_expires(after=30) as timer:
            for batch in batches:
                train(batch)
                timer.reset()

    It works on functions, methods and `async def` (put it right above the `def`); the timer ends on
    return, on any exception and on cancellation. Every call and every block has a timer of its own,
    also nested, recursive, in threads and in tasks; `scope` is its label in a report. `after=None`
    means no deadline, and so does `LOCAL_TIMER=off` in the environment, for a debugger. The
    `client` is the given one, else that of `configure()`, looked up at each call, else that of a
    watchdog process which is started then.

    Raises `ValueError` and `TypeError` for bad arguments here, not at the call. A guarded call
    raises `BrokenPipeError` if the server is gone, `OSError` or `RuntimeError` if none can be
    started. Where a signal handler raises just as a block is left, a timer with a name of its own
    (`as timer`) runs on until that is gone.
    """

    __slots__ = ("_after", "_scope", "_client", "_name", "_timer", "_guard", "__weakref__")

    def __init__(self, after: float | None, scope: str | None = None, client: Any = None) -> None:
        if scope is not None and not isinstance(scope, str):
            raise TypeError(f"scope must be a str or None, not {scope!r}")
        if client is not None:
            _check_client("client", client)
        limit = None if after is None else _seconds("after", after)
        self._after, self._scope, self._client = None if _OFF else limit, scope, client
        frame = sys._getframe(1)
        code, module = frame.f_code, frame.f_globals.get("__name__", "?")
        self._name = _name(module, code.co_name, code.co_filename, frame.f_lineno, limit, scope)
        self._timer: Any = None

    def __enter__(self) -> Self:
        if self._after is None:
            return self
        if self._timer is not None:
            raise RuntimeError("this timer is running: make another one for this block")
        client = _Process.client if self._client is None else self._client
        if client is None:
            if _Process.switched_off:
                cure = "call configure(client) or start_watchdog()"
                raise RuntimeError(f"configure(None) has switched it off: {cure}")
            if sys.is_finalizing():
                return self  # where nothing can be started any more
            client = start_watchdog()
        board = _board_of(client)
        timer = board.take() if board else _ClientTimer(client, self._scope, self._name)
        try:
            self._timer = timer
            # An interrupt may strike before `with` has begun, or at the very entry of __exit__
            # (CPython gh-74174): then the death of this object ends the timer.
            self._guard: Any = weakref.ref(self, timer.stop)
            timer.start(self._name, self._after)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        timer = self._timer
        if timer is not None:
            timer.stop()
            self._guard = self._timer = None
            timer.give_back()  # last: from here on it is another's

    def reset(self) -> None:
        """Start the `after` seconds of the running timer again: a heartbeat, from the thread that
        runs the block. Raises `RuntimeError` outside it."""
        if self._timer is not None:
            self._timer.start(self._name, self._after)
        elif self._after is not None:
            raise RuntimeError("reset() works inside `with watchdog_expires(...) as timer:` only")

    def __call__(self, func: Callable[P, R]) -> Callable[P, R]:
        if not callable(func) or isinstance(func, (type, staticmethod, classmethod)):
            place = "right above its def, below @staticmethod and the like; of a class its methods"
            raise TypeError(f"watchdog_expires guards a function, put {place}; not {func!r}")
        for each in (func, inspect.unwrap(func), type(func).__call__):
            if inspect.isgeneratorfunction(each) or inspect.isasyncgenfunction(each):
                cure = "put `with watchdog_expires(...):` inside"
                raise TypeError(f"a generator runs after its call has returned: {cure} {func!r}")
        if self._after is None:
            return func
        after, scope, client, frame = self._after, self._scope, self._client, sys._getframe(1)
        own_board = _board_of(client)
        qualname = getattr(func, "__qualname__", type(func).__qualname__)
        file, line = frame.f_code.co_filename, frame.f_lineno
        name = _name(getattr(func, "__module__", "?"), qualname, file, line, after, scope)

        def timer() -> watchdog_expires:
            timer = watchdog_expires(after, scope, client)
            timer._name = name
            return timer

        async def guarded_await(coroutine: Coroutine[Any, Any, Any]) -> Any:
            with timer():
                return await coroutine

        @functools.wraps(func)
        async def guarded_coroutine(*args: P.args, **kwargs: P.kwargs) -> Any:
            return await guarded_await(func(*args, **kwargs))  # type: ignore[arg-type]

        @functools.wraps(func)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> Any:
            board = _Process.board if client is None else own_board
            if board is None:
                with timer():
                    result: Any = func(*args, **kwargs)
            else:
                slot = board.take()
                try:  # twice: an interrupt may strike between the end of `try` and its `finally`
                    try:
                        slot.start(name, after)
                        result = func(*args, **kwargs)
                    finally:
                        slot.cell[0] = _NEVER
                finally:
                    slot.cell[0] = _NEVER
                    slot.free.append(slot)
            # A partial, an object or a wrapper may have made one.
            return guarded_await(result) if type(result) is CoroutineType else result

        is_coroutine = inspect.iscoroutinefunction(func)
        return guarded_coroutine if is_coroutine else guarded  # type: ignore[return-value]


expires = watchdog_expires


# ------------------------------------------------------------------------------- watchdog process
_THIS_FILE = os.path.abspath(__file__)  # before the program changes directory
# What is meant for the program but often sent to its whole process group.
_SHIELDED = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
_SHIELDED += [signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2]


def start_watchdog(*, signum: int = _EXPIRED, grace: float = 5.0) -> LocalTimerClient:
    """Start the watchdog process of this process and those it forks, configure its client and
    return that. If one with these settings serves already, return its client.

    An expired call gets `signum`, as `LocalTimerServer` has it. The default makes a hung program
    print the stack of every thread and die; one with a handler that raises, like SIGINT's, is a
    soft limit. Lines and stacks go to what is stderr now.

    Raises `RuntimeError` where no interpreter can be started on this file, `OSError` if there is no
    memory to share, `ValueError` for bad arguments. A program that closes all its descriptors
    (a daemon) calls it after that, outside all guarded calls: their timers are lost.
    """
    settings = int(signal.Signals(signum)), _seconds("grace", grace, 0.0)
    _notice_fork()
    with _Process.lock:
        board = _Process.board
        if not (isinstance(board, _Watched) and board.settings == settings and board.is_ours()):
            board = _Watched(*settings)
            try:
                board.take().give_back()  # a watchdog ends when nobody has a row
                board.check()
            except BaseException:
                board.close()
                raise
            configure(LocalTimerClient(board))
            if os.getpid() == 1:
                cure = "run the container with an init process (docker run --init)"
                _log().warning("PID 1 of a container can't be killed from inside: %s", cure)
    return _Process.client  # type: ignore[no-any-return]


class _Watched(_Scoreboard):
    """A scoreboard whose server is a watchdog process. Any worker that finds none starts one."""

    def find_server(self) -> None:
        python = "" if getattr(sys, "frozen", False) else sys.executable or ""
        argv = [python, "-IS", _THIS_FILE, "--watchdog", *map(str, self.settings)]
        # It keeps no end of our stdout: who reads that must not wait for the watchdog.
        files = [(os.POSIX_SPAWN_DUP2, self.file, number) for number in (0, 1)]
        files += [(os.POSIX_SPAWN_DUP2, self.stderr, 2)]
        problem = "it ended"
        try:
            pid = os.posix_spawn(python, argv, os.environ, file_actions=files, setsigmask=_SHIELDED)
            os.waitpid(pid, 0)  # until the watchdog serves; an interrupt here leaves a zombie
        except (OSError, ValueError) as error:  # ChildProcessError if the program has waited for it
            problem = str(error)
        if self.holder(_SERVER) is None:
            cure = "set sys.executable to a Python, or configure() the client of a server"
            raise RuntimeError(f"can't start {' '.join(argv)!r}: {problem}; {cure}")


class _Stderr(logging.Handler):
    """Writes to stderr, but never waits for who reads it."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            if select.select([], [2], [], 0)[1]:
                line = f"local_timer: {self.format(record)}".encode("utf-8", "backslashreplace")
                os.write(2, line[: select.PIPE_BUF - 1] + b"\n")


def _watchdog_main(signum: str, grace: str) -> None:
    os.chdir("/")
    os.closerange(3, 65_536)  # what C code of the program has left open
    # The program may have taken a core for itself, in real time.
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    ready, told = os.pipe()
    if os.fork():  # the program waits for this one; the other is no child of it
        os.close(told)
        os.read(ready, 1)
        os._exit(0)
    _log().addHandler(_Stderr())
    _log().propagate = False
    board = _Scoreboard(int(signum), float(grace), file=1, stderr=2)
    server = LocalTimerServer(board, signum=int(signum), grace=float(grace))
    serving = board.lock(_SERVER)  # unless another one was faster
    os.close(ready)
    os.close(told)
    while serving:
        server._watchdog_loop(board.is_unused)
        board.unserve()
        # A worker that came meanwhile has seen the lock, and started no other.
        serving = not board.is_unused() and board.lock(_SERVER)


# ------------------------------------------------------------------------------------------- demo
def _demo() -> int:
    """Show on real processes what a guarded one becomes; return 0 if each ended as it should."""
    cases: dict[str, Callable[[], object]] = {
        "returns in time": lambda: time.sleep(0.4),
        "asleep": lambda: time.sleep(60),
        "in a Python loop": lambda: [None for _ in iter(int, 1) if False],
        "in a lock": threading.Event().wait,
        "in C code that holds the GIL": lambda: sum(itertools.repeat(0)),
    }
    print("Workers under a limit of 1 s; who hangs leaves a line and its stack:\n", flush=True)
    start_watchdog()
    workers = {}
    for case, work in cases.items():
        pid = os.fork()
        if pid == 0:
            watchdog_expires(after=1, scope=case)(work)()
            os._exit(0)
        workers[pid] = case
        time.sleep(0.2)  # so that their stacks don't mix
    all_good = True
    for _ in cases:
        pid, status = os.wait()
        code = os.waitstatus_to_exitcode(status)
        good = code == (0 if workers[pid] == "returns in time" else -_EXPIRED)
        all_good = all_good and good
        print(f"{'ok  ' if good else 'FAIL'}  {workers[pid]:30} exit status {code}", flush=True)
    return 0 if all_good else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--watchdog"]:
        _watchdog_main(*sys.argv[2:])
    elif sys.argv[1:]:
        print("local_timer is a module: import it, or run it alone for a demo", file=sys.stderr)
        sys.exit(2)
    else:
        sys.exit(_demo())
