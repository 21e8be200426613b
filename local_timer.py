"""Kill a process that is stuck in a piece of code longer than it promised to be.

    @watchdog_expires(after=30)  # seconds
    def step(): ...

If a call of `step()` is still running after 30 seconds, the process prints the Python stack of every thread and dies,
whatever it is stuck in: asleep, in a lock, in C code that holds the GIL. The first guarded call starts a small watchdog
process for that, which ends with the last process that it guards.

The file tells its story in this order: a request, the queue that carries it, the scoreboard that makes do without, the
client, the server, the decorator, the watchdog process, the demo (`python3 local_timer.py`). The names are those of
`torch.distributed.elastic.timer`. All times are seconds, all deadlines on `time.monotonic()`.
"""

# Copyright (c) 2026 the local_timer authors. License: MIT; its text, LICENSE, goes with every copy.
# To vendor it, copy this file; it needs CPython 3.9 or later and nothing else.

from __future__ import annotations

import os
import sys

if os.name != "posix":
    raise ImportError("local_timer does not run on Windows: it needs the signals and the record locks of POSIX")
if sys.version_info < (3, 9):
    raise ImportError("local_timer needs CPython 3.9 or later; this is " + sys.version.split()[0])

import abc
import contextlib
import errno
import faulthandler
import fcntl
import functools
import itertools
import math
import mmap
import operator
import select
import signal
import struct
import threading
import time
import weakref

TYPE_CHECKING = False  # type checkers take it for typing.TYPE_CHECKING, whose import would cost the watchdog 1 MB
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from typing_extensions import Any, ParamSpec, Self, TypeVar

    P = ParamSpec("P")
    R = TypeVar("R")

if sys.argv[1:2] != ["--watchdog"] or __name__ != "__main__":  # they would cost it 3 MB
    import inspect
    import logging
    from multiprocessing import reduction
    from multiprocessing.context import assert_spawning

    logger = logging.getLogger(__name__)

__version__ = "2.0.0"
__all__ = ["LocalTimerClient", "LocalTimerServer", "MultiprocessingRequestQueue", "RequestQueue", "Scoreboard"]
__all__ += ["TimerClient", "TimerRequest", "TimerServer", "configure", "expires", "start_watchdog", "watchdog_expires"]

_NEVER = math.inf
_STALL = 1.0  # seconds: a server that wakes later than that did not run, whatever the reason
_HEARTBEAT = 0.25  # seconds: the longest sleep while a timer runs, or else a stall could not be measured
_WALL_CLOCK = 1e9  # time.time() passed it in 2001; time.monotonic() gets there after 31 years of uptime


class _Clock:
    """The clock of all deadlines, kept where tools that freeze the time of a test (freezegun) don't replace it."""

    now = staticmethod(time.monotonic)


# ---------------------------------------------------------------------------------------------------------- request
class TimerRequest:
    """One acquisition of a timer or, with a negative `expiration_time`, its release: the pid of the worker, the name of
    the timer in it, and the deadline in seconds on `time.monotonic()`, which all processes of a host share."""

    __slots__ = ("worker_id", "scope_id", "expiration_time")

    def __init__(self, worker_id: Any, scope_id: str, expiration_time: float) -> None:
        self.worker_id, self.scope_id, self.expiration_time = worker_id, scope_id, expiration_time

    def __eq__(self, other: object) -> bool:
        return repr(self) == repr(other) if isinstance(other, TimerRequest) else NotImplemented

    def __repr__(self) -> str:
        return f"TimerRequest({self.worker_id!r}, {self.scope_id!r}, {self.expiration_time!r})"


# ------------------------------------------------------------------------------------------------------------ queue
class RequestQueue(abc.ABC):
    """The consumer's side of a queue of timer requests: `size()` tells how many wait now, `get(size, timeout)` returns
    up to `size` of them and waits no longer than `timeout` seconds for these."""

    @abc.abstractmethod
    def size(self) -> int: ...

    @abc.abstractmethod
    def get(self, size: int, timeout: float) -> list[TimerRequest]: ...


class MultiprocessingRequestQueue(RequestQueue):
    """A `RequestQueue` over any `multiprocessing` queue, for programs that were written for PyTorch's timer.

    Such a queue sends through a thread that needs the GIL: a worker that hangs with the GIL held right after `acquire`
    is missed. One killed while it holds the queue's lock silences all others; and if one died with a timer running,
    whoever has its pid by then is killed. A `Scoreboard` has none of these weaknesses.
    """

    def __init__(self, mp_queue: Any) -> None:
        if not hasattr(mp_queue, "get") or not hasattr(mp_queue, "qsize"):
            raise TypeError(f"a Scoreboard or a multiprocessing queue with get and qsize is needed, not {mp_queue!r}")
        self._mp_queue = mp_queue
        self._taken_out: list[TimerRequest] = []  # what had to be taken out to count it

    def size(self) -> int:
        try:
            return int(self._mp_queue.qsize())
        except NotImplementedError:  # macOS has no sem_getvalue; a queue holds 32,767 requests there (SEM_VALUE_MAX)
            self._taken_out = self.get(32767, 0.0)
            return len(self._taken_out)

    def get(self, size: int, timeout: float) -> list[TimerRequest]:
        from queue import Empty

        requests, self._taken_out = self._taken_out[:size], self._taken_out[size:]
        deadline = _Clock.now() + timeout
        with contextlib.suppress(Empty):
            while len(requests) < size:
                requests.append(self._mp_queue.get(True, max(0.0, deadline - _Clock.now())))
        return requests


# ------------------------------------------------------------------------------------------------------- scoreboard
# The table is one sparse file, mapped by all. Each byte of it has one writer: of the header that is the server (and who
# starts one), of a row the process that has locked it. The locks are on numbers, not on content: 0 is the server's; of
# a row, 1 + row is locked to clear it, and 1 + _ROWS + row once it is clear: only then is the process its owner.
# A worker stores a deadline, then reads when the server looks; the server stores that, then reads the deadlines. There
# is no fence: either store is visible long before the interpreter gets to the read.
_ROWS, _ROW = 15_625, 16  # of so many timers: two cache lines of deadlines, so that processes don't share any
_USED = 64  # where a byte for each row tells whether it was ever claimed; before that comes the header
_DEADLINES = 16_384  # a double for each timer, infinite where none runs
_NAMES = _DEADLINES + 8 * _ROWS * _ROW
_NAME = 240  # bytes: the limit as a double, then a text in UTF-8
_SIZE = _NAMES + _NAME * _ROWS * _ROW
_LINUX = sys.platform == "linux"
_FLOCK = "hhqqi" if _LINUX else "qqihhi"  # struct flock (fcntl(2))


def _record(limit: float, name: str, where: str = "") -> bytes:
    text, tail = (part.encode(errors="backslashreplace") for part in (name, where))
    room = _NAME - 8 - len(tail)
    text = text if len(text) <= room else text[: room - 3] + b"..."
    return (struct.pack("d", limit) + text + tail)[:_NAME].ljust(_NAME, b"\0")


def _text(record: bytes) -> str:
    return record[8:].rstrip(b"\0").decode(errors="replace")


def _identity(descriptor: int) -> tuple[int, int] | None:
    try:
        status = os.fstat(descriptor)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise  # it may come from a signal handler: TimeoutError is an OSError
        return None
    return status.st_dev, status.st_ino


class _NobodyLeft(Exception):
    """Nobody is left who could poke: there is nothing to serve any more."""


class _Slot:
    """A place for one timer in a row of this process. Whoever took it from the free ones uses it alone."""

    __slots__ = ("board", "free", "look", "cell", "place", "record")

    def __init__(self, board: Scoreboard) -> None:
        self.board, self.free, self.record = board, board._free, b""
        self.cell: Any = [_NEVER]

    def move_to(self, number: int) -> None:
        """Be at this place of the table, with the timer that runs if one does."""
        self.look, self.place = self.board._look, _NAMES + number * _NAME
        if self.record:
            self.describe(self.record)
        self.board._deadlines[number] = self.cell[0]
        self.cell = self.board._deadlines[number : number + 1]

    def start(self, record: bytes, after: float) -> None:
        if self.record is not record:
            self.describe(record)
        now = _Clock.now()
        self.cell[0] = deadline = now + after
        # _poke asks the same, but its call would take as long as the rest.
        if not (now <= self.look[0] <= deadline and now < self.board._check_again_at):
            self.board._poke(now, deadline)

    def describe(self, record: bytes) -> None:
        self.board._table[self.place : self.place + _NAME] = self.record = record

    def give_back(self) -> None:
        self.cell[0] = _NEVER
        self.free.append(self)


_cell = operator.attrgetter("cell")


def _store_all(slots: Iterable[Any], deadline: float) -> bool:
    # The user of a slot may be any thread, and another may just give it back. So this is in C from end to end: the GIL
    # stays here from the look-up of the first of `slots` to the store.
    return bool(list(map(operator.setitem, map(_cell, slots), (0,), (deadline,))))


class Scoreboard(RequestQueue):
    """The table in which workers note their deadlines and a server reads them: state instead of messages.

    A worker's `acquire` is a store into shared memory, its `release` another. The server is poked, through a pipe, only
    if it would look too late. What nobody has to send can't be full, stale, half written or lost. As a `RequestQueue`
    it is always empty.

    A process owns its rows by record locks, which the kernel drops when it dies or calls `exec` (fcntl(2)): of the
    kernel the server learns whom to kill. A scoreboard is passed on by fork, or to a process that is being spawned. It
    holds up to 250,000 running timers; one more is a `RuntimeError`.
    """

    # fcntl(2): closing any descriptor of a file drops all record locks of the process on it. So a process attaches a
    # scoreboard once (it is pickled only for a process that is being spawned) and closes nothing of it while a timer
    # runs.
    _attached: weakref.WeakSet[Scoreboard] = weakref.WeakSet()
    _kept: list[Any] = []  # what must not end while the process lives
    _settings: tuple[Any, ...] = ()
    _descriptors: dict[int, Any] = {}  # the reader and the writer of the pipe, the file; and what they are
    _rows: dict[int, list[_Slot]] = {}  # what this process owns: the slots by row, the free ones, those with a name
    _free: list[_Slot] = []
    _scopes: dict[str, _Slot] = {}
    _poked = _poked_for = _NEVER  # of the pokes that were just read: the first moment of one, the first deadline in one

    def __init__(self) -> None:
        self._forget()
        self._open(self._made())

    @staticmethod
    def _made() -> Iterator[int]:
        yield from os.pipe()
        if hasattr(os, "memfd_create") and hasattr(fcntl, "F_ADD_SEALS"):
            file = os.memfd_create("local_timer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            yield file
            os.ftruncate(file, _SIZE)
            # Who made it shorter would kill us all, by SIGBUS (memfd_create(2)).
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
        else:  # macOS, or an interpreter that was built for an old libc (conda's, Amazon Linux)
            import tempfile

            shared = "/dev/shm"  # in memory: a store into the map of a file on a disk may wait for the disk
            with tempfile.TemporaryFile(dir=shared if os.access(shared, os.W_OK) else None) as made:
                os.ftruncate(made.fileno(), _SIZE)
                yield os.dup(made.fileno())

    def _open(self, descriptors: Iterable[int]) -> None:
        """Attach what is behind these descriptors, and move there what timers this process has. If that fails, what was
        lost before stays lost, and is opened anew at the next use."""
        rows = self._rows
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as taken:
            # In a program that has closed some of 0, 1 and 2, ours must not get their numbers: it may open them anew,
            # which closes ours.
            descriptor = -1
            while descriptor < 3:
                descriptor = os.open("/", os.O_RDONLY)
                taken.callback(os.close, descriptor)
            opened = {}
            for descriptor in descriptors:
                undo.callback(os.close, descriptor)
                os.set_inheritable(descriptor, False)  # to a spawned process it comes inheritable
                os.set_blocking(descriptor, False)
                opened[descriptor] = _identity(descriptor)
            try:
                self._attach(*opened)
                self._rows = {}
                for slot in itertools.chain(*rows.values()):
                    slot.cell = [slot.cell[0]]  # out of a row that may be another process's soon
                for slots in list(rows.values()):
                    self._claim(slots)
            except BaseException:
                self._rows = rows
                raise
            undo.pop_all()
        self._close()
        self._descriptors = opened

    def _attach(self, reader: int, writer: int, file: int) -> None:
        table = memoryview(mmap.mmap(file, _SIZE))
        self._reader, self._writer, self._file, self._table = reader, writer, file, table
        self._look: Any = table[:8].cast("d")  # when the server looks next; negative: not before it is poked
        self._starting: Any = table[8:24].cast("d")  # when one was started that does not serve yet, first and last
        self._deadlines: Any = table[_DEADLINES:_NAMES].cast("d")
        self._last_poke = _NEVER, _NEVER, 0.0  # what _look was at the last poke, since when; when to poke again
        self._attached.add(self)

    def _forget(self) -> None:
        """Forget what belongs to one process: a forked child has no rows yet. What runs in the frames of its parent
        ends timers there, in slots of which nothing leads to the table any more."""
        for slot in itertools.chain(*self._rows.values()):
            slot.cell = [_NEVER]
        self._rows, self._free, self._scopes = {}, [], {}
        self._candidates = itertools.count()  # for a row: each thread tries other ones
        self._check_again_at = 0.0
        self._serving = self._opening = False

    def _close(self) -> None:
        for descriptor, identity in self._descriptors.items():
            if _identity(descriptor) == identity:
                os.close(descriptor)

    def __del__(self) -> None:
        if sys is None or sys.is_finalizing():
            return
        if self._scopes:  # timers outlive their client
            self._kept.append(self)
            return
        if not self._is_ours():
            self._kept.append(self._table)  # a map has a descriptor of its own, which it would close
        self._close()

    def __reduce__(self) -> tuple[Any, ...]:
        assert_spawning(self)
        self._ensure_ours()
        return self._unpickle, (self._settings, *map(reduction.DupFd, self._descriptors))

    @classmethod
    def _unpickle(cls, settings: tuple[Any, ...], *passed: Any) -> Scoreboard:
        board = cls.__new__(cls)
        board._settings = settings
        board._forget()
        board._open(descriptor.detach() for descriptor in passed)
        return board

    def _is_ours(self) -> bool:
        """Ask whether the descriptors still are this scoreboard's: a daemon closes all, and opens files of its own."""
        return all(_identity(descriptor) == identity for descriptor, identity in self._descriptors.items())

    def _holder(self, byte: int) -> int | None:
        """Ask the kernel which other process has locked `byte`: its pid, seen from here, or 0 or -1 if it has none."""
        lock, place = (fcntl.F_WRLCK, os.SEEK_SET), (byte, 1, 0)
        query = struct.pack(_FLOCK, *lock, *place) if _LINUX else struct.pack(_FLOCK, *place, *lock, 0)
        answer = struct.unpack(_FLOCK, fcntl.fcntl(self._file, fcntl.F_GETLK, query))
        kind, pid = (answer[0], answer[4]) if _LINUX else (answer[3], answer[2])
        return None if kind == fcntl.F_UNLCK else int(pid)

    def _lock(self, byte: int) -> bool:
        with contextlib.suppress(BlockingIOError, PermissionError):  # POSIX allows either
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
            return True
        return False

    # What a worker does.

    def _find(self, scope: str) -> Iterator[_Slot]:
        return filter(None, map(self._scopes.get, (scope,)))

    def _take(self) -> _Slot:
        try:
            return self._free.pop()
        except IndexError:
            pass
        self._ensure_ours()
        if not self._rows:
            self._ensure_stack()
        self._free.extend(self._claim([_Slot(self) for _ in range(_ROW)]))
        return self._take()

    def _claim(self, slots: list[_Slot]) -> list[_Slot]:
        """Make one more row this process's, and put `slots` there."""
        rows = self._rows
        for row in itertools.islice(self._candidates, _ROWS):
            row %= _ROWS
            if row not in rows and self._lock(1 + row):  # a lock that this process holds would be granted again
                break
        else:
            raise RuntimeError(f"the scoreboard is full: {_ROWS * _ROW:,} timers, a process keeps what it had")
        if self._rows is not rows:  # a signal handler has forked: the row is the parent's
            return []
        for number, slot in enumerate(slots, row * _ROW):
            slot.move_to(number)
        if not self._lock(1 + _ROWS + row):  # one that was forked just now was faster, and has it
            return []
        self._table[_USED + row] = 1
        rows[row] = slots
        return slots

    def _ensure_stack(self) -> None: ...

    def _ensure_ours(self) -> None:
        if not self._is_ours():
            self._lost()

    def _lost(self) -> None:
        raise BrokenPipeError("this process has closed the descriptors of its scoreboard: nothing guards it")

    def _check_server(self) -> None:
        if not self._serving and self._holder(0) is None:
            cure = "call start() of its LocalTimerServer, or start_watchdog() for a watchdog process of your own"
            raise BrokenPipeError(f"no timer server serves this scoreboard, or it has ended: {cure}")

    def _poke(self, now: float, deadline: float) -> None:
        """Wake the server, unless it means to look between `now` and `deadline`. Once a second, see whether this
        process has lost its scoreboard in the meantime."""
        look, (known, since, quiet) = self._look[0], self._last_poke
        if now <= look <= deadline and now < self._check_again_at:
            return
        if look == known and look < now < quiet:
            return  # nobody has looked since the last poke, and the look that it brings will see this deadline too
        self._ensure_ours()
        look = self._look[0]  # perhaps of another one now
        self._check_again_at = now + 1.0
        if now <= look <= deadline:
            return
        self._send_poke(deadline)
        self._check_server()
        if look != known:
            since = now
        if now - since > 10:
            logger.warning("local_timer: the timer server lives, but has not looked for 10 s")
            since = _NEVER
        self._last_poke = look, since, now + 0.02

    def _send_poke(self, deadline: float) -> None:
        with contextlib.suppress(BlockingIOError):  # full of pokes
            os.write(self._writer, struct.pack("dd", _Clock.now(), deadline))

    # What a server does. It writes nothing but the header.

    def _serve(self) -> float:
        """Become the server; return since when, on the monotonic clock: a new process counts from its start."""
        if self._serving or not self._lock(0):
            raise RuntimeError("another timer server serves this scoreboard already")
        self._serving = True
        return float(self._starting[0]) or _Clock.now()

    def _unserve(self) -> None:
        self._serving = False
        if self._is_ours():
            self._look[0] = 0.0
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, 0)

    def size(self) -> int:
        return 0

    def get(self, size: int, timeout: float) -> list[TimerRequest]:
        """Wait for a poke, no longer than `timeout` seconds, and return []."""
        end = _Clock.now() + timeout
        poller = select.poll()
        poller.register(self._reader, select.POLLIN)
        self._poked = self._poked_for = _NEVER
        if not poller.poll(int(1000 * min(timeout, 1e6))):
            time.sleep(max(0.0, min(end - _Clock.now(), 0.001)))  # poll() counts in whole milliseconds
            return []
        pokes = os.read(self._reader, 65536) if self._is_ours() else b""  # all of them: a pipe holds no more
        if not pokes:
            raise _NobodyLeft
        moments = memoryview(pokes[: len(pokes) & -16]).cast("d")
        self._poked, self._poked_for = min(moments[::2], default=end), min(moments[1::2], default=0.0)
        return []

    def _running(self) -> list[float]:
        """Return the deadlines by number of the slot; 0, which is none, where a claim was broken off."""
        # What was never claimed is not read: to read a hole of a memory file is to fill it.
        rows = bytes(self._table[_USED : _USED + _ROWS]).rfind(b"\1") + 1
        deadlines: list[float] = self._deadlines[: rows * _ROW].tolist()
        return deadlines

    def _limit(self, number: int) -> float:
        return float(struct.unpack_from("d", self._table, _NAMES + number * _NAME)[0])

    def _ask(self, timers: Iterable[Any]) -> Iterator[tuple[Any, TimerRequest | None]]:
        """Ask the kernel whose timers these are: yield each with a request, or None if the process is gone. Those that
        have ended or moved are left out."""
        pid, last = None, None
        for number, deadline in timers:
            if self._deadlines[number] == deadline:
                row, place = number // _ROW, _NAMES + number * _NAME
                if row != last:  # F_GETLK says nothing of the locks of its caller
                    pid, last = os.getpid() if row in self._rows else self._holder(1 + _ROWS + row), row
                name = _text(bytes(self._table[place : place + _NAME]))
                if pid in (0, -1):
                    logger.error("local_timer: %a is overdue where this pid namespace can't reach it", name)
                yield (number, deadline), TimerRequest(pid, name, deadline) if pid and pid > 0 else None


class _Process:
    """The configuration of this process. A class, since a guarded function that is pickled by value (as Ray and Dask
    do) takes the values of plain globals along."""

    client: TimerClient | None = None
    switched_off = False  # by configure(None): then no watchdog starts by itself
    lock = threading.RLock()  # for starting a server or a watchdog
    starters: set[int] = set()  # the pids of the children that start a watchdog and end


def _after_fork_in_child() -> None:
    _Process.lock = threading.RLock()  # another thread of the parent may have held it
    _Process.starters.clear()
    for board in list(Scoreboard._attached):
        board._forget()


os.register_at_fork(after_in_child=_after_fork_in_child)  # hooks that were registered before this import run before


# ----------------------------------------------------------------------------------------------------------- client
class TimerClient(abc.ABC):
    """What a worker uses: `acquire` starts or moves its timer `scope_id`, which then expires at `expiration_time`;
    `release` ends it, and ignores an unknown one."""

    _direct: Scoreboard | None = None  # where watchdog_expires goes without a call of acquire

    @abc.abstractmethod
    def acquire(self, scope_id: str, expiration_time: float) -> None: ...

    @abc.abstractmethod
    def release(self, scope_id: str) -> None: ...


class _Scope(str):
    """The name of a timer, with what a report says of it."""

    record = b""

    def __new__(cls, scope: Any) -> _Scope:
        if not isinstance(scope, str):
            raise TypeError(f"a scope must be a str, not {scope!r}")
        if len(scope.encode(errors="surrogatepass")) > 200:
            raise ValueError(f"a scope has 200 bytes at most, {scope[:60]!r}... is longer")
        return scope if isinstance(scope, _Scope) else super().__new__(cls, scope)


class LocalTimerClient(TimerClient):
    """Acquires and releases the timers of this process, on a `Scoreboard` or through any `multiprocessing` queue.

    A forked child that uses it is a worker of its own. What a queue can't do is said at `MultiprocessingRequestQueue`.
    """

    def __init__(self, mp_queue: Any) -> None:
        self._mp_queue = mp_queue
        self._board = mp_queue if isinstance(mp_queue, Scoreboard) else None
        if self._board is None and not hasattr(mp_queue, "put"):
            raise TypeError(f"a Scoreboard or a multiprocessing queue is needed, not {mp_queue!r}")
        if type(self) is LocalTimerClient:  # else its acquire may be another one
            self._direct = self._board

    def acquire(self, scope_id: str, expiration_time: float) -> None:
        """Start or move a timer of this process; when this returns, a server of the `Scoreboard` will see it.

        `expiration_time` is in seconds on `time.monotonic()`; a `ValueError` says so where it can't be. Raises
        `BrokenPipeError` if no server serves the scoreboard, `RuntimeError` if that is full.
        """
        now = _Clock.now()
        if not 0 <= expiration_time < _WALL_CLOCK:
            hint = ", a value of time.time()" if _WALL_CLOCK <= expiration_time < 1e10 else ""
            raise ValueError(f"expiration_time must be like time.monotonic() + 30, not {expiration_time!r}{hint}")
        scope, board, deadline = _Scope(scope_id), self._board, float(expiration_time) or 5e-324  # 0: an unclaimed slot
        if board is None:
            self._mp_queue.put(TimerRequest(os.getpid(), str(scope_id), deadline))
            return
        record = scope.record or _record(deadline - now, scope)
        try:
            stored = False
            while not stored:  # for another thread may release it
                # The key comes before the deadline: an interrupt in between must leave no deadline without a key to it.
                slot = board._scopes.get(scope)
                if slot is None:
                    new = board._take()
                    slot = board._scopes.setdefault(scope, new)
                    if slot is not new:  # another thread was faster
                        new.give_back()
                slot.describe(record)
                stored = _store_all(board._find(scope), deadline)
            board._poke(_Clock.now(), deadline)
        except BaseException:
            self.release(scope_id)
            raise

    def release(self, scope_id: str) -> None:
        """End a timer of this process; if the server is gone, there is nothing to end."""
        if self._board is None:
            self._mp_queue.put(TimerRequest(os.getpid(), str(scope_id), -1.0))
            return
        try:
            _store_all(self._board._find(scope_id), _NEVER)  # the deadline goes before the key, for the same reason
        except BaseException:
            _store_all(self._board._find(scope_id), _NEVER)
            raise
        slot = self._board._scopes.pop(scope_id, None)
        if slot is not None:
            slot.give_back()


class _ClientTimer:
    """A timer with a scope, or of any other client, to be used like a `_Slot`. It is its own cell."""

    _count = itertools.count(1)

    def __init__(self, client: TimerClient, scope: str | None, record: bytes) -> None:
        self._client, self._scope = client, scope or f"{_text(record[:180])} #{next(self._count)}"
        self._ended = False
        self.cell = self

    def __setitem__(self, index: int, deadline: float) -> None:
        self._ended = self._ended or deadline == _NEVER
        if deadline < _NEVER:
            self._client.acquire(self._scope, deadline)
        if self._ended:  # perhaps by another thread, in the meantime
            self._client.release(self._scope)

    def start(self, record: bytes, after: float) -> None:
        self[0] = _Clock.now() + after

    def give_back(self) -> None: ...


# ----------------------------------------------------------------------------------------------------------- server
class TimerServer(abc.ABC):
    """The watchdog loop: it waits for requests, keeps the deadlines and reaps the workers that let one pass.

    A subclass says what a timer is and how a worker is reaped. `max_interval` is the longest time in seconds that the
    loop waits for a request; `daemon` is whether its thread lets the program end.
    """

    def __init__(self, request_queue: RequestQueue, max_interval: float, daemon: bool = True) -> None:
        if not isinstance(max_interval, (int, float)) or not 0 < max_interval <= threading.TIMEOUT_MAX:
            raise ValueError(f"max_interval must be a positive number of seconds, not {max_interval!r}")
        self._request_queue, self._max_interval, self._daemon = request_queue, max_interval, daemon
        self._patience = min(max_interval + 1.0, threading.TIMEOUT_MAX)  # with a loop that was told to end
        self._watchdog_thread: threading.Thread | None = None
        # Of the running loop: its process, what tells it to end, what tells that it has.
        self._loop: tuple[int, threading.Event, threading.Event] | None = None

    @abc.abstractmethod
    def register_timers(self, timer_requests: list[TimerRequest]) -> None:
        """Take in acquisitions and, with a negative `expiration_time`, releases, in their order."""

    @abc.abstractmethod
    def clear_timers(self, worker_ids: set[Any]) -> None:
        """Forget all timers of these workers."""

    @abc.abstractmethod
    def get_expired_timers(self, deadline: float) -> dict[Any, list[TimerRequest]]:
        """Return by worker the timers whose `expiration_time` is not after `deadline`."""

    @abc.abstractmethod
    def _reap_worker(self, worker_id: Any) -> bool:
        """Reap the worker. `True`: done, its timers are cleared. `False`: not yet, try again."""

    def _begin(self) -> None: ...

    def _end(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None:
            loop[2].set()

    def _wake(self) -> None: ...

    def _wake_at(self, now: float, size: int) -> float:
        """Return when the loop must wake at the latest, `size` requests being in the queue."""
        return _NEVER

    def _run_watchdog(self) -> None:
        """Run one turn of the loop."""
        start = _Clock.now()
        size = self._request_queue.size()
        until = min(self._wake_at(start, size), start + self._max_interval)
        requests = self._request_queue.get(max(1, size), max(0.0, until - _Clock.now()))
        # Judge by a moment before which every request has been read: behind one that came, a release may wait.
        known = start if requests else min(until, _Clock.now())
        self.register_timers(requests)
        reaped = set()
        for worker_id in self.get_expired_timers(known):
            try:
                if self._reap_worker(worker_id):
                    reaped.add(worker_id)
            except Exception:
                logger.exception("local_timer: reaping worker %r failed; its timers are dropped", worker_id)
                reaped.add(worker_id)
        self.clear_timers(reaped)

    def _watchdog_loop(self, stop: threading.Event) -> None:
        try:
            while not stop.is_set():
                try:
                    self._run_watchdog()
                except _NobodyLeft:
                    return
                except Exception:
                    logger.exception("local_timer: a turn of the watchdog loop failed; going on in a second")
                    stop.wait(1.0)
        finally:
            self._end()

    def _own_loop(self) -> tuple[int, threading.Event, threading.Event] | None:
        loop = self._loop
        return loop if loop is not None and loop[0] == os.getpid() else None  # a forked child has not the loop

    def _enter_loop(self) -> threading.Event | None:
        loop = self._own_loop()
        if loop is not None and loop[1].is_set():
            loop[2].wait(self._patience)
        with _Process.lock:
            if self._own_loop() is not None:
                return None
            self._begin()
            self._loop = os.getpid(), threading.Event(), threading.Event()
            return self._loop[1]

    def run(self) -> None:
        """Run the loop in the calling thread until `stop()`. (A watchdog process ends with the last that it guards.)

        Raises `RuntimeError` if this server runs already, or another one serves its scoreboard.
        """
        stop = self._enter_loop()
        if stop is None:
            raise RuntimeError("this timer server is running already")
        self._watchdog_loop(stop)

    def start(self) -> None:
        """Run the loop in a thread; if it runs already, do nothing. Raises `RuntimeError` as `run()` does."""
        stop = self._enter_loop()
        if stop is not None:
            self._watchdog_thread = threading.Thread(target=self._watchdog_loop, args=(stop,), daemon=self._daemon)
            try:
                self._watchdog_thread.start()
            except BaseException:
                stop.set()
                self._wake()
                if self._watchdog_thread.ident is None:  # it has not begun
                    self._end()
                raise

    def stop(self) -> None:
        """End the loop and wait for its thread: at once, unless a foreign queue keeps it; `start()` continues it."""
        loop, thread = self._own_loop(), self._watchdog_thread
        if loop is not None:
            loop[1].set()
            self._wake()
            if thread is not None and thread is not threading.current_thread():
                thread.join(self._patience)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


def _check_escalation(signum: int, grace: float) -> None:
    if signum not in set(signal.Signals):
        raise ValueError(f"signum must be a signal of this system, not {signum!r}")
    if not isinstance(grace, (int, float)) or not 0 <= grace <= threading.TIMEOUT_MAX:
        raise ValueError(f"grace must be a number of seconds from 0 up, not {grace!r}")


class LocalTimerServer(TimerServer):
    """Kills processes of this host that let a deadline pass.

    Each expired timer earns its worker `signum`; a worker that has neither released it nor died `grace` seconds later
    gets SIGKILL. With the default it is SIGKILL at once. Start it in the launcher, hand `client()` to the workers:

    >>> with LocalTimerServer() as server:
    ...     worker = multiprocessing.Process(target=work, args=(server.client(),))

    It looks at a `Scoreboard`, by default one of its own, or takes requests from any `multiprocessing` queue. It holds
    no descriptor for a worker.
    """

    # A timer is a pair, which one (the number of its slot; of a queue, worker and scope) and its deadline: once that
    # has moved, it is another.

    def __init__(
        self,
        mp_queue: Any = None,
        max_interval: float = 60.0,
        daemon: bool = True,
        *,
        signum: int = signal.SIGKILL,
        grace: float = 5.0,
    ) -> None:
        _check_escalation(signum, grace)
        self._mp_queue: Any = Scoreboard() if mp_queue is None else mp_queue
        self._board = self._mp_queue if isinstance(self._mp_queue, Scoreboard) else None
        super().__init__(self._board or MultiprocessingRequestQueue(mp_queue), max_interval, daemon)
        self._signum, self._grace = signal.Signals(signum), grace
        self._awake_by = _NEVER  # by when it had to be awake
        self._requests: dict[tuple[int, str], TimerRequest] = {}  # of a queue, the running timers
        # When to act on a timer, and how, if not at its deadline: a grace that runs, a refused kill, a forgiven stall.
        self._later: dict[Any, tuple[float, signal.Signals]] = {}
        self._expired: dict[int, list[Any]] = {}  # by worker, the timers that get_expired_timers found last

    def client(self) -> LocalTimerClient:
        """Return a client of this server, for this process and those it forks or spawns."""
        return LocalTimerClient(self._mp_queue)

    def _begin(self) -> None:
        self._awake_by = _Clock.now() if self._board is None else self._board._serve()
        self._later.clear()

    def _end(self) -> None:
        if self._board is not None:
            self._board._unserve()
        super()._end()

    def register_timers(self, timer_requests: list[TimerRequest]) -> None:
        for request in timer_requests:
            try:  # kill(0) and kill(-1) would hit many
                if type(request.worker_id) is not int or not 0 < request.worker_id < 2**31:
                    raise ValueError("its worker_id is not a pid")
                if not request.expiration_time < _WALL_CLOCK:
                    raise ValueError("its expiration_time is not on time.monotonic()")
                key = request.worker_id, request.scope_id
                self._requests.pop(key, None)
                if request.expiration_time >= 0:
                    self._requests[key] = request
            except (AttributeError, TypeError, ValueError) as error:
                logger.error("local_timer: dropped a request that makes no sense: %r (%s)", request, error)
        self._forgive()

    def clear_timers(self, worker_ids: set[Any]) -> None:
        self._requests = {key: request for key, request in self._requests.items() if key[0] not in worker_ids}
        if worker_ids and self._board is not None:  # who is dying has its timers still, for a moment
            for timer, request in self._board._ask(self._due(_Clock.now() + 1.0)[0]):
                if request is not None and request.worker_id in worker_ids:
                    self._later[timer] = _NEVER, signal.SIGKILL

    def get_expired_timers(self, deadline: float) -> dict[Any, list[TimerRequest]]:
        due, _ = self._due(deadline)
        passed = set(due)
        self._later = {timer: act for timer, act in self._later.items() if timer[1] > deadline or timer in passed}
        self._expired = {}
        expired: dict[Any, list[TimerRequest]] = {}
        for timer, request in self._ask([timer for timer in due if self._act_on(timer)[0] <= deadline]):
            if request is None:
                self._later[timer] = _NEVER, signal.SIGKILL
            else:
                self._expired.setdefault(request.worker_id, []).append(timer)
                expired.setdefault(request.worker_id, []).append(request)
        return expired

    def _due(self, now: float) -> tuple[list[Any], list[float]]:
        """Return the timers whose deadline is not after `now`, and all deadlines."""
        keys: Iterable[Any] = self._requests
        deadlines = [request.expiration_time for request in self._requests.values()]
        if self._board is not None:
            keys, deadlines = itertools.count(), self._board._running()
        if min(deadlines, default=_NEVER) > now:
            return [], deadlines  # as nearly always, and with 100,000 timers this counts
        return [(key, deadline) for key, deadline in zip(keys, deadlines) if deadline <= now and deadline], deadlines

    def _next(self, now: float) -> float:
        due, deadlines = self._due(now)
        if min(deadlines, default=_NEVER) <= now:
            deadlines = [*(self._act_on(timer)[0] for timer in due), *(each for each in deadlines if each > now)]
        return min(deadlines, default=_NEVER)

    def _act_on(self, timer: Any) -> tuple[float, signal.Signals]:
        return self._later.get(timer) or (timer[1], self._signum)

    def _ask(self, timers: list[Any]) -> list[tuple[Any, TimerRequest | None]]:
        if self._board is None:
            return [(timer, self._requests[timer[0]]) for timer in timers]
        return list(self._board._ask(timers))

    def _wake_at(self, now: float, size: int) -> float:
        self._forgive()
        soon, poked = now + _HEARTBEAT, self._board._poked_for if self._board else _NEVER
        until = self._next(now)
        if min(until, poked) < _NEVER:  # after a poke it stays up for a while, or each short call would have to poke
            until = min(until, poked, soon)
        if self._board is not None:
            # Look again once that is known: who stored a deadline before could only go by the old one.
            self._board._look[0] = until if until < _NEVER else -now
            self._board._starting[0] = self._board._starting[1] = 0.0  # also if somebody starts another one just now
            until = min(until, self._next(now))
        elif size:
            until = min(until, soon)  # a killed worker may have counted a request that never comes
        self._awake_by = max(until, now)
        return until

    def _forgive(self) -> None:
        """Move all deadlines by the time in which the server, and probably the workers too, did not run; but none by
        more than the time for which its timer has been running."""
        now = _Clock.now()
        if self._awake_by == _NEVER and self._board is not None:  # it slept until poked
            self._awake_by = min(self._board._poked, now)
        stalled, self._awake_by = now - self._awake_by, now
        running = self._due(_WALL_CLOCK)[0] if stalled > _STALL else []
        if running:
            logger.warning("local_timer: the watchdog did not run for %.1f s: all deadlines move by that", stalled)
        for timer in running:
            when, signum = self._act_on(timer)
            running_for = now - timer[1] + self._board._limit(timer[0]) if self._board else stalled
            moved = max(0.0, min(stalled, running_for)) + _HEARTBEAT  # it may have begun anywhere in the sleep
            self._later[timer] = when + moved, signum

    def _reap_worker(self, worker_id: int) -> bool:
        try:
            send, pidfd = signal.pidfd_send_signal, os.pidfd_open(worker_id)
        except ProcessLookupError:
            return True
        except (AttributeError, OSError):  # macOS, an old kernel or libc, no descriptor left: the pid must do
            return self._signal(worker_id, functools.partial(os.kill, worker_id))
        try:
            return self._signal(worker_id, functools.partial(send, pidfd))
        finally:
            os.close(pidfd)

    def _signal(self, pid: int, send: Callable[[int], None]) -> bool:
        # In this order no stranger can be hit: the process is held already, now ask once more whose the timers are.
        asked = self._ask(self._expired.get(pid, []))
        found = [(timer, request) for timer, request in asked if request and request.worker_id == pid]
        if not found:
            return False
        kill = any(self._act_on(timer)[1] == signal.SIGKILL for timer, _ in found)
        signum, now = signal.SIGKILL if kill else self._signum, _Clock.now()
        try:
            # SIGKILL comes before all else. Another signal may make the worker print, so there our line comes first, if
            # the worker may be signalled at all.
            send(signum if kill else 0)
            reports = ", ".join(self._report(timer, request.scope_id, now) for timer, request in found)
            logger.warning("local_timer: %s for pid %d: %s", signum.name, pid, reports)
            if not kill:
                send(signum)
        except ProcessLookupError:
            return True
        except PermissionError as error:
            logger.error("local_timer: %s for pid %d failed, next try in a second: %s", signum.name, pid, error)
            self._later.update((timer, (now + 1.0, signum)) for timer, _ in found)
            return False
        self._later.update((timer, (now + self._grace, signal.SIGKILL)) for timer, _ in found)
        return kill

    def _report(self, timer: Any, name: str, now: float) -> str:
        name = name if name.isprintable() else ascii(name)
        if self._board is None:
            return f"{name} is still running {1000 * (now - timer[1]):.1f} ms after its deadline"
        return f"{name} is still running after {self._board._limit(timer[0]) + now - timer[1]:.2f} s"

    def _wake(self) -> None:
        with contextlib.suppress(Exception):  # if the queue is full there is no wait; if it is closed, no server
            if self._board is not None and self._board._is_ours():
                self._board._send_poke(0.0)
            elif self._board is None:
                self._mp_queue.put(TimerRequest(os.getpid(), "", -1.0), False)


# -------------------------------------------------------------------------------------------------------- decorator
def configure(timer_client: TimerClient | None) -> None:
    """Set the client of this process and those it forks; `None` clears it, and no watchdog starts by itself then."""
    if not isinstance(timer_client, (TimerClient, type(None))):
        raise TypeError(f"configure() takes a TimerClient, like server.client(), or None, not {timer_client!r}")
    _Process.switched_off = timer_client is None
    _Process.client = timer_client


def _to_seconds(after: Any) -> float:
    with contextlib.suppress(TypeError):  # of a comparison with what is no number
        if not 0 < after < _WALL_CLOCK:
            raise ValueError(f"after must be a positive number of seconds, or None for no limit, not {after!r:.40}")
        return float(after)
    form = "write `@watchdog_expires(after=30)` or `with watchdog_expires(after=30):`"
    raise TypeError(f"after must be a number of seconds or None, not {after!r}: {form}")


def _qualified(module: str, function: str, file: str) -> str:
    if module in ("__main__", "__mp_main__"):
        module = file.partition(".")[0]
    return module if function == "<module>" else f"{module}.{function}"


class _Exit(property):
    """A property that `contextlib.ExitStack` can call, for that looks `__exit__` up on the class."""

    def __call__(self, timer: watchdog_expires, *exc_info: object) -> None:
        timer._leave()


class watchdog_expires:
    """Guard a function or a block: if it runs longer than `after` seconds, this process is killed.

    >>> @watchdog_expires(after=30)
    ... def step(): ...

    >>> with watchdog_expires(after=30) as timer:
    ...     for batch in batches:
    ...         train(batch)
    ...         timer.reset()

    It works on functions, methods and `async def` (put it right above the `def`); the timer ends on return, on any
    exception and on cancellation. `after=None` means no deadline. Every call and every block has a timer of its own,
    also nested, recursive, in threads and in tasks. With a `scope`, the timer has that name in this process: acquiring
    it again moves its deadline, releasing it ends it, wherever that is done. The `client` is the given one, else that
    of `configure()`, looked up at each call, else that of a watchdog process which is started then.

    Raises `ValueError` and `TypeError` for bad arguments here, not at the call. A guarded call raises
    `BrokenPipeError` if the server is gone and `RuntimeError` after `configure(None)`.
    """

    __slots__ = ("client", "_site", "_held", "_guard")
    # By place in the code and arguments: seconds, scope, record, text of the place; and the code, so that its id in the
    # key stays its own.
    _sites: dict[Any, Any] = {}
    _frame = staticmethod(sys._getframe)
    _guard: Any

    def __init__(self, after: float | None, scope: str | None = None, client: TimerClient | None = None) -> None:
        if client is not None and not isinstance(client, TimerClient):
            raise TypeError(f"client must be a TimerClient or None, not {client!r}")
        self.client = client
        self._held: list[Any] = []  # the slot of the running timer
        frame = self._frame(1)
        key = id(frame.f_code), frame.f_lasti, after, scope
        try:
            self._site = self._sites[key]
        except (KeyError, TypeError):  # what can't be hashed is refused there
            if len(self._sites) >= 1000:
                self._sites.clear()
            self._site = self._sites[key] = self._new_site(frame, after, scope)

    @staticmethod
    def _new_site(frame: Any, after: float | None, scope: str | None) -> Any:
        seconds = None if after is None else _to_seconds(after)
        code, function = frame.f_code, getattr(frame.f_code, "co_qualname", frame.f_code.co_name)
        file = code.co_filename.rpartition("/")[2]
        where = f" ({file[-60:]}:{frame.f_lineno}, limit {seconds or 0:g} s)"
        if scope is None:
            record = _record(seconds or 0.0, _qualified(frame.f_globals.get("__name__", "?"), function, file), where)
        else:
            scope = _Scope(scope)
            scope.record = record = _record(seconds or 0.0, scope, where)
        return seconds, scope, record, where, code

    def __enter__(self) -> Self:
        after, scope, record, _, _ = self._site
        if after is None:
            return self
        client = self.client
        if client is None:
            client = _Process.client
        if client is None:
            if _Process.switched_off:
                raise RuntimeError("configure(None) has switched it off: call configure(client) or start_watchdog()")
            client = start_watchdog()
        board = client._direct if scope is None else None
        slot: Any = board._take() if board is not None else _ClientTimer(client, scope, record)
        self._held.append(slot)
        if self._held[0] is not slot:
            self._held.remove(slot)
            slot.give_back()
            self._guard = None  # or the death of this block's `__exit__` would end the other one's timer
            raise RuntimeError("this timer is running: make one for each block that is entered at the same time")
        try:
            slot.start(record, after)
        except BaseException:
            self._leave()
            raise
        return self

    def _leave(self, kind: object = None, error: object = None, traceback: object = None) -> None:
        held = self._held
        if held:
            held[0].cell[0] = _NEVER
            held.pop(0).give_back()
        self._guard = None

    @_Exit
    def __exit__(self) -> Callable[..., None]:
        # Each `with` statement looks this up for itself and alone holds what it gets: that dies when the block is over,
        # however that came about. If it has not done its work by then, since an interrupt struck in __enter__ or at the
        # entry of the call (CPython gh-74174), its death ends the timer.
        leave = self._leave
        if not self._held:
            self._guard = weakref.ref(leave, self._leave)
        return leave

    def reset(self) -> None:
        """Start the `after` seconds of the running timer again: a heartbeat."""
        after = self._site[0]
        if after is None:
            return
        slot, now = next(iter(self._held), None), _Clock.now()
        if slot is None:
            raise RuntimeError("reset() works inside its block only: `with watchdog_expires(...) as timer:`")
        if _store_all(self._held, now + after) and isinstance(slot, _Slot):
            slot.board._poke(now, now + after)

    def _copy(self, record: bytes | None = None) -> watchdog_expires:
        timer = watchdog_expires.__new__(watchdog_expires)
        timer.client, timer._held = self.client, []
        timer._site = (*self._site[:2], record or self._site[2], None, None)  # it may have to be pickled
        return timer

    def __call__(self, func: Callable[P, R]) -> Callable[P, R]:
        if not callable(func) or isinstance(func, (type, staticmethod, classmethod)):
            place = "right above its def, below @staticmethod and the like; of a class its methods"
            raise TypeError(f"watchdog_expires guards a function or a method, put {place}; not {func!r}")
        if inspect.isgeneratorfunction(func) or inspect.isasyncgenfunction(func):
            cure = "put `with watchdog_expires(...):` inside"
            raise TypeError(f"a generator runs after its call has returned, so {func!r} can't be guarded: {cure}")
        after, scope, record, where, code = self._site
        if after is None:
            return func
        if scope is None:
            function = getattr(func, "__qualname__", None) or type(func).__qualname__
            module = getattr(func, "__module__", None) or "?"
            record = _record(after, _qualified(module, function, code.co_filename.rpartition("/")[2]), where)
        timer = self._copy(record)

        if inspect.iscoroutinefunction(func):

            @functools.wraps(func)
            async def guarded_coroutine(*args: P.args, **kwargs: P.kwargs) -> Any:
                with timer._copy():
                    return await func(*args, **kwargs)

            return guarded_coroutine  # type: ignore[return-value]

        never = _NEVER
        source: Any = None if scope is not None else _Process if self.client is None else timer

        @functools.wraps(func)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                board = source.client._direct
            except AttributeError:
                board = None
            if board is not None:
                slot = board._take()
                try:  # twice, since an interrupt may strike also between the end of a `try` and its `finally`
                    try:
                        slot.start(record, after)
                        return func(*args, **kwargs)
                    finally:
                        slot.cell[0] = never
                finally:
                    slot.cell[0] = never
                    slot.free.append(slot)
            with timer._copy():  # the long way: the first call, a scope, another kind of client
                return func(*args, **kwargs)

        return guarded


expires = watchdog_expires


# ------------------------------------------------------------------------------------------------- watchdog process
_THIS_FILE = os.path.abspath(globals().get("__file__", ""))  # now, before the program changes its directory
_WAY_OUT = "run a LocalTimerServer in the program that starts this process and configure() its client here"
# Signals that are meant for the program, but are often sent to its whole process group: they stay blocked.
_SHIELDED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}


def start_watchdog(*args: object, signum: int = signal.SIGABRT, grace: float = 5.0) -> LocalTimerClient:
    """Start the watchdog process of this process and those it forks, configure its client and return that.

    An expired call gets `signum`, then SIGKILL after `grace` seconds. The default makes a hung program print the stack
    of every thread (`faulthandler` is enabled for it); one with a handler that raises, like SIGINT's, is a soft limit.
    If such a watchdog serves this process already, that is its client; one with other arguments ends when the timers
    that it guards have ended. Raises `RuntimeError` where no interpreter can be started on this file.
    """
    if args:
        raise TypeError(f"start_watchdog() takes keywords only: write signum={args[0]!r}")
    _check_escalation(signum, grace)
    with _Process.lock:
        client = _Process.client
        if isinstance(client, LocalTimerClient) and getattr(client._board, "_settings", ()) == (signum, grace):
            return client
        board = _WatchedScoreboard(signum, grace)
        board._check_server()
        board._ensure_stack()
        client = LocalTimerClient(board)
        configure(client)
    if os.getpid() == 1:
        cure = "run the container with an init process (docker run --init)"
        logger.warning("local_timer: this is PID 1 of a container, which no signal from inside can kill: %s", cure)
    return client


class _WatchedScoreboard(Scoreboard):
    """A scoreboard whose server is a watchdog process. Any worker that finds none starts one."""

    _failed = False

    def __init__(self, signum: int, grace: float) -> None:
        self._settings = signum, grace
        super().__init__()

    def _ensure_stack(self) -> None:
        custom = callable(signal.getsignal(signal.SIGABRT))  # which makes it a soft limit
        if custom or self._settings[0] != signal.SIGABRT:
            return
        if _identity(2) is None or not os.get_inheritable(2):  # a file that the program has opened is no stderr
            return
        # is_enabled() is not enough: signal.signal(SIGABRT, ...) takes the handler away and doesn't tell (see proc(5)).
        enabled = faulthandler.is_enabled()
        if enabled:
            try:
                with open("/proc/self/status") as status:
                    caught = next((line.split()[1] for line in status if line.startswith("SigCgt:")), "-1")
                enabled = bool(int(caught, 16) >> (signal.SIGABRT - 1) & 1)
            except OSError as error:  # no /proc, or no descriptor left
                if error.errno is None:
                    raise  # it comes from a signal handler
        if not enabled:
            faulthandler.disable()
            faulthandler.enable(2)  # not sys.stderr, which the program may have detached

    def _lost(self) -> None:
        with _Process.lock:
            if self._opening:
                raise BrokenPipeError("a signal handler has made a guarded call while the scoreboard was opened anew")
            if not self._is_ours():  # else another thread was faster
                self._opening = True
                try:
                    self._kept.append(self._table)  # a map has a descriptor of its own, which it would close
                    self._open(self._made())
                finally:
                    self._opening = False

    def _check_server(self) -> None:
        with _Process.lock:
            served = self._look[0]
            started = self._start_server()
        if started and served:  # not in the lock: a handler may have one of its own, for which others wait in here
            logger.warning("local_timer: the watchdog process was lost; another one starts")

    def _start_server(self) -> bool:
        """Start a watchdog process if there is none, and none about to serve; return whether that was done."""
        first, last = self._starting  # now, since a new server takes the lock before it clears that
        for child in set(_Process.starters):
            with contextlib.suppress(ChildProcessError):
                ended, status = os.waitpid(child, os.WNOHANG)
                if not ended:
                    continue
                self._failed = self._failed or os.waitstatus_to_exitcode(status) > 0
            _Process.starters.discard(child)
        if self._holder(0) is not None:
            self._failed = False
            return False
        now = _Clock.now()
        due = bool(now - last >= 1.0)  # else one is about to serve
        if due:
            self._spawn(first or now, now)
        if self._failed or due and last - first > 10.0:  # of those that start for so long we may not see the status
            raise RuntimeError(f"the watchdog process ends when it has just been started: {_WAY_OUT}")
        return due

    def _spawn(self, first: float, now: float) -> None:
        before = tuple(self._starting)
        python, settings = sys.executable or "", [str(int(self._settings[0])), str(float(self._settings[1]))]
        command = [python, "-IS", "-OO", _THIS_FILE, "--watchdog", *settings]
        # Who waits for the end of the program's output must not wait for the watchdog: its stdout is our file.
        files = [(os.POSIX_SPAWN_DUP2, self._reader, 0), (os.POSIX_SPAWN_DUP2, self._file, 1)]
        try:
            if not python or getattr(sys, "frozen", False) or sys.is_finalizing() or not os.path.isfile(_THIS_FILE):
                raise OSError(errno.ENOENT, "no interpreter or no such file now")
            self._starting[0], self._starting[1] = first, now
            pid = os.posix_spawn(python, command, os.environ, file_actions=files, setsigmask=_SHIELDED)
            _Process.starters.add(pid)
        except OSError as error:
            self._starting[0], self._starting[1] = before
            if error.errno is None:
                raise  # it comes from a signal handler
            raise RuntimeError(f"can't start {python!r} on {_THIS_FILE!r} ({error}): {_WAY_OUT}") from error


class _Stderr:
    """The logger of the watchdog process, in place of 3 MB of imports. It never waits for who reads stderr."""

    def error(self, message: str, *values: object) -> None:
        stderr = select.poll()
        stderr.register(2, select.POLLOUT)
        with contextlib.suppress(OSError):
            if stderr.poll(0):
                line = (message % values).encode(errors="backslashreplace")
                os.write(2, line[: select.PIPE_BUF - 1] + b"\n")  # for which there is room then

    warning = exception = error


def _watchdog_main(signum: str, grace: str) -> None:
    os.closerange(3, 65536)  # what a C library has left open to be inherited
    if _identity(2) is None:
        os.dup2(0, 2)  # or the next file would be our stderr
    if os.fork():
        os._exit(0)  # the program has no child then for which it waits in vain, unless it adopts orphans (prctl(2))
    board = Scoreboard.__new__(Scoreboard)
    board._forget()
    board._attach(0, -1, 1)
    with contextlib.suppress(RuntimeError):  # another one was faster
        LocalTimerServer(board, threading.TIMEOUT_MAX, signum=int(signum), grace=float(grace)).run()


# ------------------------------------------------------------------------------------------------------------- demo
def _demo() -> int:
    """Show on real processes what a guarded one becomes; return 0 exactly if each ended as it should."""
    import asyncio

    last = "in C code that holds the GIL"
    healthy: dict[str, Callable[[], object]] = {
        "returns in time": lambda: time.sleep(0.4),
        "makes many calls": lambda: [watchdog_expires(after=0.5)(len)("") for _ in range(100)],
    }
    hung: dict[str, Callable[[], object]] = {
        "asleep": lambda: time.sleep(60),
        "in a Python loop": lambda: [None for _ in iter(int, 1) if False],
        "in a lock": lambda: [lock.acquire() for lock in 2 * [threading.Lock()]],
        "in async code": lambda: asyncio.run(asyncio.sleep(60)),
        last: lambda: sum(itertools.repeat(0)),
    }
    print(f"Workers, each under a limit of 1 s; what is killed {last} leaves its stack:\n", flush=True)
    start_watchdog()
    start, workers, failures = time.monotonic() + 0.3, {}, 0
    for case, work in {**healthy, **hung}.items():
        pid = os.fork()
        if not pid:
            if case != last:
                os.dup2(os.open("/", os.O_RDONLY), 2)  # keeps it from being written to
            signal.alarm(8)
            time.sleep(max(0.0, start - time.monotonic()))
            with watchdog_expires(after=1, scope=case):
                work()
            os._exit(0)
        workers[pid] = case
    while workers:
        pid, status = os.wait()
        late, case = 1000 * (time.monotonic() - start - 1), workers.pop(pid, "")
        status = os.waitstatus_to_exitcode(status)
        if case:
            good = status == (0 if case in healthy else -signal.SIGABRT)
            failures += not good
            end = f"died of {signal.Signals(-status).name}, {late:.1f} ms late" if status < 0 else f"returned {status}"
            print(f"{'ok  ' if good else 'FAIL'}  {case:30} {end}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--watchdog"]:
        logger = _Stderr()  # type: ignore[assignment]
        _watchdog_main(*sys.argv[2:])
    else:
        sys.exit(_demo())
