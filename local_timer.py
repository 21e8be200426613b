"""Kill a process that is stuck in a piece of code longer than it promised to be.

    from local_timer import watchdog_expires

    @watchdog_expires(after=30)  # seconds
    def step(): ...

If a call of `step()` is still running after 30 seconds, the process prints the Python stack of every thread and dies,
whatever it is stuck in: asleep, in a lock, in C code that holds the GIL. Nothing has to be set up: the first guarded
call starts a small watchdog process, which ends with the last process that it guards.

The file tells its story in this order: a request, the queues that carry it, the client that puts it, the server that
keeps the deadlines and kills, the decorator, the watchdog process, the demo (`python3 local_timer.py`). The names are
those of `torch.distributed.elastic.timer`. All times are seconds, all deadlines are on `time.monotonic()`.
"""

# Copyright (c) 2026 the local_timer authors. License: MIT; its text, LICENSE, goes with every copy.
# To vendor it, copy this file; it needs CPython 3.9 or later and nothing else.

from __future__ import annotations

import os

if os.name != "posix":
    raise ImportError("local_timer needs the signals and pipes of POSIX, which this system does not have")

import abc
import binascii
import codecs
import collections
import contextlib
import copy
import errno
import faulthandler
import fcntl
import functools
import heapq
import itertools
import logging
import math
import queue
import resource
import select
import signal
import struct
import sys
import threading
import time
import weakref
from multiprocessing import reduction, util
from multiprocessing.context import assert_spawning

TYPE_CHECKING = False  # type checkers take it for typing.TYPE_CHECKING, whose import would cost the watchdog 1 MB
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any, TypeVar

    from typing_extensions import ParamSpec, Self

    P = ParamSpec("P")
    R = TypeVar("R")
    _Timer = tuple[float, int, "TimerRequest", bool]  # see LocalTimerServer

__version__ = "1.0.0"
__all__ = [
    "LocalTimerClient",
    "LocalTimerServer",
    "MultiprocessingRequestQueue",
    "RequestPipe",
    "RequestQueue",
    "TimerClient",
    "TimerRequest",
    "TimerServer",
    "configure",
    "expires",
    "start_watchdog",
    "watchdog_expires",
]

logger = logging.getLogger(__name__)

_STALL = 1.0  # seconds: a server that wakes later than that did not run, whatever the reason
_WALL_CLOCK = 1e9  # time.time() passed it in 2001; time.monotonic() gets there after 31 years of uptime


# ---------------------------------------------------------------------------------------------------------- request


class TimerRequest:
    """One acquisition of a timer or, with a negative `expiration_time`, its release.

    `worker_id` is the pid of the worker, `scope_id` the name of the timer in it, `expiration_time` the deadline in
    seconds on `time.monotonic()`, which all processes of a host share.
    """

    __slots__ = ("worker_id", "scope_id", "expiration_time")

    def __init__(self, worker_id: Any, scope_id: str, expiration_time: float) -> None:
        self.worker_id = worker_id
        self.scope_id = scope_id
        self.expiration_time = expiration_time

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TimerRequest):
            return NotImplemented
        return (self.worker_id, self.scope_id, self.expiration_time) == (
            other.worker_id,
            other.scope_id,
            other.expiration_time,
        )

    def __repr__(self) -> str:
        return f"TimerRequest({self.worker_id!r}, {self.scope_id!r}, {self.expiration_time!r})"


# A request on the wire is one line, "\n<deadline> <pid> <scope>\n". It starts with a newline too, so that half a line
# of somebody else's in front of it spoils nothing. The deadline is a double as 16 hex digits: exact, and formatted in
# a third of the time of repr(). A line of up to 512 bytes is written whole or not at all (POSIX, PIPE_BUF).
_RECORD_MAX = 512
_TAIL = 17  # where " <pid> <scope>\n" starts in a record
_write = os.write  # names of their own, since each look-up counts on the fast path
_hexlify = binascii.hexlify
_pack = struct.Struct(">d").pack
_unpack = struct.Struct(">d").unpack


def _encode(request: TimerRequest) -> bytes:
    if not isinstance(request.scope_id, str):
        raise TypeError(f"scope_id must be a str, not {request.scope_id!r}")
    scope, _ = codecs.unicode_escape_encode(request.scope_id)  # built in: encode() would import a module first
    record = b"\n%b %d %b\n" % (_hexlify(_pack(request.expiration_time)), request.worker_id, scope)
    if len(record) > _RECORD_MAX:
        raise ValueError(f"the scope is too long for one record of {_RECORD_MAX} bytes: {request.scope_id[:60]!r}...")
    return record


_RELEASE = _hexlify(_pack(-1.0)).decode()


def _decode(line: str) -> TimerRequest:
    deadline, pid, scope = line.split(" ", 2)
    expiration_time = -1.0 if deadline == _RELEASE else _unpack(binascii.unhexlify(deadline))[0]
    if "\\" in scope:
        scope, _ = codecs.unicode_escape_decode(scope)
    return TimerRequest(int(pid), scope, expiration_time)


def _pid_namespace() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0  # not known: no /proc, as on macOS or in a chroot


# What must be put right in a forked child. Hooks that were registered before this import run before.
_fork_aware: weakref.WeakSet[RequestPipe | LocalTimerClient | TimerServer] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    global _start_lock
    _start_lock = threading.RLock()  # another thread of the parent may have held it
    _Process.watchdogs.clear()
    for thing in _fork_aware:
        thing._after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)


# ----------------------------------------------------------------------------------------------------------- queues


class RequestQueue(abc.ABC):
    """The consumer's side of a queue of timer requests."""

    @abc.abstractmethod
    def size(self) -> int:
        """Return how many requests are in the queue now; it does not shrink until `get` is called."""

    @abc.abstractmethod
    def get(self, size: int, timeout: float) -> list[TimerRequest]:
        """Return up to `size` requests, waiting no longer than `timeout` seconds for them."""


class _NoWriters(EOFError):
    """Raised by a pipe that nobody can write to any more."""


class RequestPipe:
    """The transport: many writers, one reader, no lock and no thread.

    It has the methods of a `multiprocessing` queue that the timer uses. When `put` has returned, the request is in
    the kernel, whatever becomes of the writer: it may hang with the GIL held or be killed at any instant. The process
    that makes the pipe is its reader; forked and spawned ones can only write to it.
    """

    def __init__(self) -> None:
        ends = [os.pipe()]
        while min(ends[-1]) < 3:  # a daemon has closed 0 to 2; what it opens or prints there must not meet this pipe
            ends.append(os.pipe())
        for end in itertools.chain(*ends[:-1]):
            os.close(end)
        self._attach(*ends[-1])
        self._pid = os.getpid()

    def _attach(self, reader: int, writer: int, namespace: int = 0) -> None:
        self._reader = reader
        self._writer = writer
        self._pid = 0  # no process has checked the writer yet
        self._ready: collections.deque[TimerRequest] = collections.deque()
        self._rest = ""  # the beginning of a line whose end has not been read yet
        self._exhausted = False
        # What ends a wait in get(): a request and, for a server, the death of a worker.
        self._poller = select.poll()
        if reader >= 0:
            os.set_blocking(reader, False)
            self._poller.register(reader, select.POLLIN)
            self._capacity = 16384  # macOS starts with that
            if sys.platform == "linux":
                # F_SETPIPE_SZ and F_GETPIPE_SZ have their names from CPython 3.10 on. With pages of 64 KiB a pipe
                # would be larger than one read; a user with too many pipes gets a smaller one.
                with contextlib.suppress(OSError):
                    fcntl.fcntl(reader, 1031, 65536)
                self._capacity = fcntl.fcntl(reader, 1032)
            self._read_at = time.monotonic()
            self._kept_waiting = False  # a writer, perhaps, by a full pipe that had not been read for long
        if writer >= 0:
            os.set_blocking(writer, False)
            os.set_inheritable(writer, False)
        self._gave_up_at = -math.inf
        status = os.fstat(max(reader, writer))
        self._identity = status.st_dev, status.st_ino
        self._namespace = namespace or _pid_namespace()
        _fork_aware.add(self)

    def put(self, request: TimerRequest, block: bool = True) -> None:
        """Write one request; when this returns, the reader will see it.

        While the pipe is full it waits, or raises `queue.Full` if not `block`. Raises `TimeoutError` after 10 seconds
        in which nobody read, `BrokenPipeError` if nobody can read any more, `ValueError` if the scope is too long.
        """
        record = _encode(request)
        if self._pid != os.getpid():
            self._check_writer()
        patience = 10 if time.monotonic() - self._gave_up_at > 1 else 1  # for the release after a failed acquire
        while True:
            try:
                os.write(self._writer, record)
                return
            except BlockingIOError:
                if not block:
                    raise queue.Full from None
            except OSError as error:
                if error.errno not in (errno.EPIPE, errno.EBADF):
                    raise
                raise BrokenPipeError(errno.EPIPE, "the timer server is gone: nobody reads its requests") from None
            room = select.poll()
            room.register(self._writer, select.POLLOUT)
            # In seconds, each of which counts only if this process ran in it: it may have been stopped, too.
            patience = 10 if room.poll(1000) else patience - 1
            if not patience:
                self._gave_up_at = time.monotonic()
                raise TimeoutError(
                    errno.ETIMEDOUT, "no timer server is reading: the pipe of requests has been full for 10 s"
                )

    def _check_writer(self) -> None:
        # A daemon closes what it inherited and opens files of its own under the same numbers; and in another pid
        # namespace this process has another number for the server, one that may be a stranger's.
        here = _pid_namespace()
        if not self._is_this_pipe(self._writer) or (here and self._namespace and here != self._namespace):
            raise BrokenPipeError(
                errno.EPIPE,
                f"descriptor {self._writer} is not the pipe of the timer server any more: this process has closed it,"
                " or is in another pid namespace",
            )
        self._pid = os.getpid()

    def _is_this_pipe(self, descriptor: int) -> bool:
        try:
            status = os.fstat(descriptor)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self._identity

    def get(self, block: bool = True, timeout: float | None = None) -> TimerRequest:
        """Return the next request, waiting for it up to `timeout` seconds (`None`: for ever) if `block`.

        Raises `queue.Empty` if there is none, `EOFError` if there can be none any more.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            if self._ready:
                return self._ready.popleft()
            self._read()
            if self._ready:
                continue
            if self._exhausted:
                raise _NoWriters("all writers of the pipe are gone")
            wait = deadline - time.monotonic() if block else 0.0
            if wait <= 0:
                raise queue.Empty
            if wait < 0.001:
                time.sleep(wait)  # poll() counts in whole milliseconds
                continue
            woken_by = self._poller.poll(int(min(wait, 1e6) * 1000))
            if woken_by and all(descriptor != self._reader for descriptor, _ in woken_by):
                raise queue.Empty

    def qsize(self) -> int:
        """Return how many requests there are to get at once."""
        self._read()
        return len(self._ready)

    def _read(self) -> None:
        # One read takes all there is: a pipe holds 64 KiB. So a request that is in the pipe now is in _ready next.
        try:
            data = os.read(self._reader, 65536)
        except BlockingIOError:
            return
        except OSError as error:
            error.strerror = "this is not the process that reads the pipe, or the pipe is closed"
            raise
        last, self._read_at = self._read_at, time.monotonic()
        # A full page has room for a record less at its end.
        if len(data) >= self._capacity * 7 // 8 and self._read_at - last > _STALL:
            self._kept_waiting = True
        self._exhausted = not data
        *lines, rest = (self._rest + data.decode("ascii", "replace")).split("\n")
        self._rest = rest[:_RECORD_MAX]
        for line in filter(None, lines):
            try:
                self._ready.append(_decode(line))
            except Exception:
                logger.error("local_timer: dropped a line that is no timer request: %.60r", line)

    def close(self) -> None:
        """Close the pipe in this process."""
        self._close_reader()
        if self._is_this_pipe(self._writer):
            os.close(self._writer)
        self._writer = -1

    def _close_reader(self) -> None:
        # The reader alone may keep a read end: when it is gone, a writer's next put shall fail.
        if self._is_this_pipe(self._reader):
            os.close(self._reader)
        self._reader = -1

    _after_fork_in_child = _close_reader

    def __del__(self) -> None:
        if hasattr(self, "_identity"):
            self.close()

    def __getstate__(self) -> tuple[Any, int]:
        assert_spawning(self)
        return reduction.DupFd(self._writer), self._namespace

    def __setstate__(self, state: tuple[Any, int]) -> None:
        self._attach(-1, state[0].detach(), state[1])


class MultiprocessingRequestQueue(RequestQueue):
    """A `RequestQueue` over a `RequestPipe` or any `multiprocessing` queue.

    A `multiprocessing.Queue` sends through a thread that needs the GIL: a worker that hangs with the GIL held right
    after `acquire` is missed, and one killed while it holds the queue's lock silences all others. The pipe has
    neither weakness.
    """

    def __init__(self, mp_queue: Any = None) -> None:
        self._mp_queue = mp_queue = RequestPipe() if mp_queue is None else mp_queue
        if not hasattr(mp_queue, "get") or not hasattr(mp_queue, "qsize"):
            raise TypeError(f"a RequestPipe or a multiprocessing queue with get and qsize is needed, not {mp_queue!r}")
        # What has been taken out of the queue already; a pipe keeps that itself, since it reads in batches.
        self._ahead = mp_queue._ready if isinstance(mp_queue, RequestPipe) else collections.deque()

    def size(self) -> int:
        try:
            return int(self._mp_queue.qsize())
        except NotImplementedError:
            # macOS can't count a queue, so it is emptied: it holds 32,767 requests at most (SEM_VALUE_MAX there).
            while len(self._ahead) < 32767:
                try:
                    self._ahead.append(self._mp_queue.get(False))
                except queue.Empty:
                    break
            return len(self._ahead)

    def get(self, size: int, timeout: float) -> list[TimerRequest]:
        deadline = time.monotonic() + timeout
        requests = [self._ahead.popleft() for _ in range(min(size, len(self._ahead)))]
        while len(requests) < size:
            try:
                requests.append(self._mp_queue.get(True, max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                break
        return requests


# ----------------------------------------------------------------------------------------------------------- client


class TimerClient(abc.ABC):
    """What a worker acquires and releases its timers with."""

    @abc.abstractmethod
    def acquire(self, scope_id: str, expiration_time: float) -> None:
        """Start the timer `scope_id` of this worker, or move it: it expires at `expiration_time`."""

    @abc.abstractmethod
    def release(self, scope_id: str) -> None:
        """End the timer `scope_id` of this worker; an unknown one is ignored."""


class LocalTimerClient(TimerClient):
    """Puts the requests of this process into the queue of a `LocalTimerServer` on the same host.

    Over a `RequestPipe`, the lines of a scope are made once and then written again with another deadline: that is the
    fast path, one system call. All else goes through the queue's `put`: the first use of a scope, a full or broken
    pipe, another kind of queue.
    """

    def __init__(self, mp_queue: Any) -> None:
        if not hasattr(mp_queue, "put"):
            raise TypeError(f"a RequestPipe or a multiprocessing queue is needed, not {mp_queue!r}")
        self._mp_queue = mp_queue
        # By scope, " <pid> <scope>\n" and the whole line of a release. The pid is in them, since asking for it would
        # cost as much as a third of the write; so a fork empties them.
        self._tails: dict[str, bytes] = {}
        self._releases: dict[str, bytes] = {}
        _fork_aware.add(self)

    def acquire(self, scope_id: str, expiration_time: float) -> None:
        """Start or move a timer of this process; when this returns, a server that reads a `RequestPipe` will know.

        `expiration_time` is in seconds on `time.monotonic()`; a `ValueError` says so where it can't be. Raises
        `BrokenPipeError` if the server is gone, `TimeoutError` if it has not read for 10 seconds.
        """
        if not 0 <= expiration_time < _WALL_CLOCK:
            raise ValueError(
                f"expiration_time must be a deadline on time.monotonic(), which is at {time.monotonic():.0f} s now, not"
                f" {expiration_time!r}" + (", a value of time.time()" if _WALL_CLOCK <= expiration_time < 1e10 else "")
            )
        try:
            _write(self._mp_queue._writer, b"\n" + _hexlify(_pack(expiration_time)) + self._tails[scope_id])
        except (KeyError, AttributeError):
            self._put(scope_id, expiration_time)
        except OSError as error:
            self._put_instead(error, scope_id, expiration_time)

    def release(self, scope_id: str) -> None:
        """End a timer of this process; if the server is gone, there is nothing to end."""
        try:
            _write(self._mp_queue._writer, self._releases[scope_id])
        except (KeyError, AttributeError):
            self._put(scope_id, -1.0)
        except OSError as error:
            self._put_instead(error, scope_id, -1.0)

    def _put_instead(self, error: OSError, scope_id: str, expiration_time: float) -> None:
        # A signal handler may have raised an OSError of its own (TimeoutError is one); that must go through.
        if error.errno not in (errno.EAGAIN, errno.EPIPE, errno.EBADF):
            raise error
        self._put(scope_id, expiration_time)

    def _put(self, scope_id: str, expiration_time: float) -> None:
        request = TimerRequest(os.getpid(), scope_id, expiration_time)
        try:
            self._mp_queue.put(request)
        except BrokenPipeError:
            if expiration_time < 0:
                return
            raise
        if isinstance(self._mp_queue, RequestPipe):
            if len(self._tails) >= 1024:  # scopes that are used once must not pile up
                self._tails.clear()
                self._releases.clear()
            request.expiration_time = -1.0
            release = _encode(request)
            self._releases[scope_id] = release
            self._tails[scope_id] = release[_TAIL:]

    def _after_fork_in_child(self) -> None:
        self._tails.clear()
        self._releases.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._mp_queue,)


# ----------------------------------------------------------------------------------------------------------- server


_HEARTBEAT = 0.25  # seconds: the longest sleep with a timer pending, or else a stall could not be measured


class TimerServer(abc.ABC):
    """The watchdog loop: it reads requests, keeps the deadlines and reaps the workers that let one pass.

    A subclass says what a timer is and how a worker is reaped. `max_interval` is the longest time in seconds that the
    loop waits for a request; `daemon` is whether its thread keeps the program alive.
    """

    def __init__(self, request_queue: RequestQueue, max_interval: float, daemon: bool = True) -> None:
        if not 0 < max_interval <= threading.TIMEOUT_MAX:
            raise ValueError(f"max_interval must be a positive number of seconds, not {max_interval!r}")
        self._request_queue = request_queue
        self._max_interval = max_interval
        self._daemon = daemon
        self._watchdog_thread: threading.Thread | None = None
        self._stop: threading.Event | None = None  # that of the running loop
        self._stalled = 0.0  # seconds by which the deadlines have to move yet
        self._turned_at: float | None = None  # when the running loop ended its last turn
        _fork_aware.add(self)

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

    def _wait(self, now: float, size: int) -> float:
        """Return how many seconds the loop may wait for a request if `size` of them are there already."""
        return self._max_interval

    def _postpone(self, seconds: float) -> None:
        """Move all deadlines: for that long the watchdog, and probably the workers too, did not run."""

    def _wake(self) -> None:
        """End the wait of the loop, if there is a way."""

    def _run_watchdog(self) -> None:
        """Run one turn of the loop."""
        start = time.monotonic() if self._turned_at is None else self._turned_at
        stalled, self._stalled = self._stalled, 0.0
        size = self._request_queue.size()
        wait = 0.0 if stalled else min(self._wait(start, size), self._max_interval)
        requests = self._request_queue.get(max(1, size), wait)
        self.register_timers(requests)
        if stalled:
            self._postpone(stalled)
        # Judge by a moment up to which every request is known: a release may be waiting in the queue. That is the
        # start or, if it ended as meant and nothing came, the end of the wait.
        known = start
        if not requests and 0 <= time.monotonic() - start - wait <= _STALL:
            known += wait
        reaped = set()
        for worker_id in self.get_expired_timers(known):
            if self._reap_worker_no_throw(worker_id):
                reaped.add(worker_id)
        self.clear_timers(reaped)
        end = time.monotonic()
        if end - start - wait > _STALL:
            self._stalled = end - start - wait + _HEARTBEAT  # it may have begun anywhere in the sleep
        if self._turned_at is not None:
            self._turned_at = end

    def _reap_worker_no_throw(self, worker_id: Any) -> bool:
        try:
            return self._reap_worker(worker_id)
        except Exception:
            logger.exception("local_timer: reaping worker %r failed; its timers are dropped", worker_id)
            return True

    def _watchdog_loop(self, stop: threading.Event) -> None:
        try:
            while not stop.is_set():
                self._turned_at = self._turned_at or time.monotonic()
                try:
                    self._run_watchdog()
                except _NoWriters:
                    return  # nobody is left to watch
                except Exception:
                    logger.exception("local_timer: a turn of the watchdog loop failed; going on in a second")
                    stop.wait(1.0)
                    self._turned_at = None
        finally:
            self._turned_at = None
            if self._stop is stop:
                self._stop = None

    def run(self) -> None:
        """Run the loop in the calling thread until `stop()`, or until nobody can put requests any more."""
        if self._stop is not None:
            raise RuntimeError("this timer server is running already")
        self._stop = threading.Event()
        self._watchdog_loop(self._stop)

    def start(self) -> None:
        """Run the loop in a thread; if it runs already, do nothing."""
        with _start_lock:
            if self._stop is not None:
                return
            self._stop = stop = threading.Event()
            self._watchdog_thread = threading.Thread(
                target=self._watchdog_loop, args=(stop,), name="local_timer watchdog", daemon=self._daemon
            )
            try:
                self._watchdog_thread.start()
            except BaseException:
                self._stop = None
                raise

    def stop(self) -> None:
        """End the loop and wait for its thread, `max_interval` at most; `start()` continues it."""
        stop, self._stop = self._stop, None
        thread, self._watchdog_thread = self._watchdog_thread, None
        if stop is not None:
            stop.set()
            self._wake()
        if thread is not None and thread is not threading.current_thread():
            thread.join(self._max_interval)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def _after_fork_in_child(self) -> None:
        self._stop = self._watchdog_thread = None  # the loop runs in the parent


def _check_escalation(signum: int, grace: float) -> None:
    if signum not in set(signal.Signals):
        raise ValueError(f"signum must be a signal of this system, not {signum!r}")
    if not 0 <= grace <= threading.TIMEOUT_MAX:
        raise ValueError(f"grace must be a number of seconds from 0 up, not {grace!r}")


class LocalTimerServer(TimerServer):
    """Kills processes of this host that let a deadline pass.

    Each expired timer earns its worker `signum`; a worker that has neither released it nor died `grace` seconds later
    gets SIGKILL. With the default it is SIGKILL at once. Start it in the launcher, hand `client()` to the workers:

    >>> with LocalTimerServer() as server:
    ...     worker = multiprocessing.Process(target=work, args=(server.client(),))

    It owns one pidfd for each live worker that has made a request, where the system has pidfds, and touches no process
    that has made none.
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
        _check_escalation(signum, grace)
        requests = MultiprocessingRequestQueue(mp_queue)
        super().__init__(requests, max_interval, daemon)
        self._mp_queue = requests._mp_queue
        self._signum = signal.Signals(signum)
        self._grace = grace
        # A timer is a tuple: when to act on it, a number that breaks ties, its request, whether it has had its signal.
        # The heap keeps the tuples of ended timers until they are many or on top.
        self._timers: dict[tuple[int, str], _Timer] = {}
        self._heap: list[_Timer] = []
        self._serial = itertools.count()
        self._truce = 0.0  # until then nobody is killed
        self._expired: dict[int, list[_Timer]] = {}  # what get_expired_timers found last
        self._pidfds: dict[int, int] = {}
        self._pids: dict[int, int] = {}  # by pidfd
        self._poller = self._mp_queue._poller if isinstance(self._mp_queue, RequestPipe) else select.poll()

    def client(self) -> LocalTimerClient:
        """Return a client of this server, for this process and those it forks or spawns."""
        return LocalTimerClient(self._mp_queue)

    def register_timers(self, timer_requests: list[TimerRequest]) -> None:
        self._drop_dead()  # first, since a new worker may have the pid of a dead one
        if getattr(self._mp_queue, "_kept_waiting", False):
            self._mp_queue._kept_waiting = False
            self._call_truce()
        timers, pidfds, serial, truce = self._timers, self._pidfds, self._serial, self._truce
        for request in timer_requests:
            try:
                worker_id = request.worker_id
                key = (worker_id, request.scope_id)
                expiration_time = request.expiration_time
                if expiration_time < 0:
                    timers.pop(key, None)
                elif not expiration_time < _WALL_CLOCK:
                    raise ValueError("expiration_time is not on time.monotonic()")
                elif type(worker_id) is not int or worker_id <= 0:
                    raise ValueError("worker_id is not a pid")  # kill(0) and kill(-1) would hit many
                elif worker_id in pidfds or self._hold(worker_id):
                    when = expiration_time if expiration_time > truce else truce
                    timers[key] = timer = (when, next(serial), request, False)
                    heapq.heappush(self._heap, timer)
            except (AttributeError, OverflowError, TypeError, ValueError) as error:
                logger.error("local_timer: dropped a request that makes no sense: %r (%s)", request, error)
        if len(self._heap) > 2 * len(timers) + 1000:
            self._heap = list(timers.values())
            heapq.heapify(self._heap)

    def _hold(self, pid: int) -> bool:
        # A pidfd stays with the process it was opened for, whoever gets the pid next.
        if sys.platform != "linux" or not hasattr(os, "pidfd_open"):
            return True
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            # ESRCH: it is dead. EINVAL: a thread. Else out of descriptors, or a kernel without: the pid must do.
            return error.errno not in (errno.ESRCH, errno.EINVAL)
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if limit != resource.RLIM_INFINITY and 2 * pidfd > limit:
            os.close(pidfd)  # the other half is for the program that runs this server
            return True
        self._pidfds[pid] = pidfd
        self._pids[pidfd] = pid
        self._poller.register(pidfd, select.POLLIN)
        return True

    def _drop_dead(self) -> None:
        # A pidfd is readable once its process is dead (pidfd_open(2)).
        dead = {self._pids[fd] for fd, _ in self._poller.poll(0) if fd in self._pids}
        for pid in dead:
            self._let_go(pid)
        self.clear_timers(dead)

    def _let_go(self, pid: int) -> None:
        pidfd = self._pidfds.pop(pid)
        del self._pids[pidfd]
        self._poller.unregister(pidfd)
        os.close(pidfd)

    def clear_timers(self, worker_ids: set[Any]) -> None:
        if worker_ids:
            for key in [key for key in self._timers if key[0] in worker_ids]:
                del self._timers[key]

    def _is_pending(self, timer: _Timer) -> bool:
        request = timer[2]
        return self._timers.get((request.worker_id, request.scope_id)) is timer

    def get_expired_timers(self, deadline: float) -> dict[Any, list[TimerRequest]]:
        found = []
        while self._heap and self._heap[0][0] <= deadline:
            timer = heapq.heappop(self._heap)
            if self._is_pending(timer):
                found.append(timer)
        self._expired = {}
        for timer in found:
            heapq.heappush(self._heap, timer)  # asking changes nothing
            self._expired.setdefault(timer[2].worker_id, []).append(timer)
        return {worker_id: [timer[2] for timer in timers] for worker_id, timers in self._expired.items()}

    def _reap_worker(self, worker_id: int) -> bool:
        timers = self._expired.pop(worker_id, [])
        now = time.monotonic()
        signum = signal.SIGKILL if any(signalled for _, _, _, signalled in timers) else self._signum
        names = ", ".join(
            f"{request.scope_id if request.scope_id.isprintable() else ascii(request.scope_id)} is"
            f" {1000 * (now - request.expiration_time):.1f} ms late"
            for _, _, request, _ in timers
        )
        try:
            # SIGKILL is silent and comes before all else. Another signal may make the worker print, so there our line
            # comes first, if the worker is there at all.
            if signum != signal.SIGKILL:
                self._send_signal(worker_id, 0)
                logger.warning("local_timer: %s for pid %d: %s", signum.name, worker_id, names)
            self._send_signal(worker_id, signum)
        except ProcessLookupError:
            return True
        except OSError as error:
            logger.error(
                "local_timer: %s for pid %d failed (%s), next try in a second: %s", signum.name, worker_id, error, names
            )
            self._act_later(timers, now + 1.0)
            return False
        if signum == signal.SIGKILL:
            logger.warning("local_timer: %s for pid %d: %s", signum.name, worker_id, names)
            return True
        self._act_later(timers, now + self._grace, signalled=True)
        return False

    def _send_signal(self, pid: int, signum: int) -> None:
        if sys.platform == "linux" and pid in self._pidfds:
            signal.pidfd_send_signal(self._pidfds[pid], signum)
        else:
            os.kill(pid, signum)

    def _act_later(self, timers: Iterable[_Timer], when: float, signalled: bool = False) -> None:
        for timer in timers:
            request = timer[2]
            later = (when, next(self._serial), request, signalled or timer[3])
            self._timers[request.worker_id, request.scope_id] = later
            heapq.heappush(self._heap, later)

    def _wait(self, now: float, size: int) -> float:
        while self._heap and not self._is_pending(self._heap[0]):
            heapq.heappop(self._heap)
        if not self._heap:
            # A worker that was killed took counted requests of a multiprocessing.Queue along: don't wait for them.
            return _HEARTBEAT if size else self._max_interval
        return max(0.0, min(self._heap[0][0] - now, _HEARTBEAT))

    def _call_truce(self) -> None:
        # For a second after a stall: a worker may have been kept from putting its request, or from putting it in time.
        self._truce = time.monotonic() + _STALL
        self._act_later([timer for timer in self._timers.values() if timer[0] < self._truce], self._truce)

    def _postpone(self, seconds: float) -> None:
        if self._timers:
            logger.warning("local_timer: the watchdog did not run for %.1f s: all deadlines move by that", seconds)
        for timer in list(self._timers.values()):
            self._act_later([timer], timer[0] + seconds)
        self._call_truce()

    def _wake(self) -> None:
        # A release of no timer ends the wait. If the queue is full there is no wait; if it is closed, no server.
        with contextlib.suppress(queue.Full, OSError, ValueError):
            self._mp_queue.put(TimerRequest(os.getpid(), "", -1.0), False)

    def _after_fork_in_child(self) -> None:
        super()._after_fork_in_child()
        for pid in list(self._pidfds):
            self._let_go(pid)
        self._timers.clear()
        self._heap.clear()

    def __del__(self) -> None:
        for pid in list(getattr(self, "_pidfds", ())):
            self._let_go(pid)


# -------------------------------------------------------------------------------------------------------- decorator


class _Process:
    """The configuration of this process. A class, since a guarded function that is pickled by value (as Ray and Dask
    do) takes the values of plain globals along."""

    client: TimerClient | None = None
    switched_off = False  # by configure(None): then no watchdog starts by itself
    watchdogs: set[int] = set()  # the pids of those that this process has started


_timer_number = itertools.count(1)


def configure(timer_client: TimerClient | None) -> None:
    """Set the client of this process and those it forks; `None` clears it, and no watchdog starts by itself then."""
    if not isinstance(timer_client, (TimerClient, type(None))):
        raise TypeError(f"configure() takes a TimerClient or None, not {timer_client!r}")
    _Process.switched_off = timer_client is None
    _Process.client = timer_client


def _configured_client() -> TimerClient:
    if _Process.client is not None:
        return _Process.client
    if _Process.switched_off:
        raise RuntimeError("configure(None) has switched the timer off: call configure(client) or start_watchdog()")
    return start_watchdog()


class _ScopeIds(list[str]):
    """The names of a guarded function's timers that no call uses now: a client is fastest on one that it knows.

    A copy of the function that came by pickle starts without any, or two copies would share a timer.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _ScopeIds, ()


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

    _scope_id: str | None = None
    _running_on: TimerClient | None = None
    _ending = False

    def __init__(self, after: float | None, scope: str | None = None, client: TimerClient | None = None) -> None:
        if after is not None:
            after = _to_seconds(after)
        if not isinstance(client, (TimerClient, type(None))):
            raise TypeError(f"client must be a TimerClient or None, not {client!r}")
        if not isinstance(scope, (str, type(None))):
            raise TypeError(f"scope must be a str or None, not {scope!r}")
        if scope is not None:
            _encode(TimerRequest(2**31 - 1, scope, 0.0))
        frame = sys._getframe(1)
        self._after = after
        self._scope = scope
        self._client = client
        self._module: str = frame.f_globals.get("__name__", "?")
        self._function: str = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)
        self._file = frame.f_code.co_filename
        self._line = frame.f_lineno

    def _new_scope_id(self) -> str:
        """Return the given scope, or a name that no other timer has and that a reader of a report finds."""
        if self._scope is not None:
            return self._scope
        file = self._file.rpartition("/")[2]
        module = file.partition(".")[0] if self._module in ("__main__", "__mp_main__") else self._module
        name = module if self._function == "<module>" else f"{module}.{self._function}"
        if len(ascii(name + file)) > 300:
            name, file = (text.encode("ascii", "replace").decode()[:150] for text in (name, file))
        return f"{name} ({file}:{self._line}, limit {self._after:g} s) #{next(_timer_number)}"

    def __enter__(self) -> Self:
        if self._running_on is not None:
            raise RuntimeError(
                "this timer is running already: make one for each block that is entered at the same time"
            )
        if self._after is None:
            return self
        if self._scope_id is None:
            self._scope_id = self._new_scope_id()
        self._ending = False
        self._running_on = client = _configured_client() if self._client is None else self._client
        try:
            client.acquire(self._scope_id, time.monotonic() + self._after)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        client = self._running_on
        if client is not None and self._scope_id is not None:
            self._ending = True
            try:
                client.release(self._scope_id)
            except BaseException:
                client.release(self._scope_id)  # interrupted, perhaps before it was out
                raise
            finally:
                self._running_on = None

    def __del__(self) -> None:
        # An interrupt can strike between the `with` and the methods that it calls (CPython gh-74174).
        self.__exit__()

    def reset(self) -> None:
        """Start the `after` seconds of the running timer again: a heartbeat."""
        if self._after is None:
            return
        client, scope_id = self._running_on, self._scope_id
        if client is None or scope_id is None:
            raise RuntimeError("reset() is for a running timer: call it inside the block")
        client.acquire(scope_id, time.monotonic() + self._after)
        if self._ending:
            client.release(scope_id)  # the block has ended in another thread in the meantime

    def __call__(self, func: Callable[P, R]) -> Callable[P, R]:
        import inspect  # here, since the watchdog process decorates nothing and would have to carry it

        if not callable(func) or isinstance(func, (type, staticmethod, classmethod)):
            raise TypeError(f"watchdog_expires guards a function or a method, put right above its def; not {func!r}")
        if inspect.isgeneratorfunction(func) or inspect.isasyncgenfunction(func):
            raise TypeError(
                f"a generator runs after its call has returned, so {func!r} can't be guarded from outside: put"
                " `with watchdog_expires(...):` inside"
            )
        after = self._after
        if after is None:
            return func
        timer = copy.copy(self)
        timer._scope_id = timer._running_on = None
        timer._module = getattr(func, "__module__", None) or self._module
        timer._function = getattr(func, "__qualname__", None) or type(func).__qualname__

        if inspect.iscoroutinefunction(func):

            @functools.wraps(func)
            async def guarded_coroutine(*args: P.args, **kwargs: P.kwargs) -> Any:
                with copy.copy(timer):
                    return await func(*args, **kwargs)

            return guarded_coroutine  # type: ignore[return-value]

        own_client = self._client
        idle = _ScopeIds()
        take, give_back = idle.pop, idle.append
        process, monotonic = _Process, time.monotonic

        @functools.wraps(func)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            client = process.client if own_client is None else own_client
            if client is None:
                client = _configured_client()
            try:
                scope_id = take()
            except IndexError:
                scope_id = timer._new_scope_id()
            # An interrupt may come at any instruction. A release too many is ignored, one too few would kill.
            try:
                client.acquire(scope_id, monotonic() + after)
                return func(*args, **kwargs)
            finally:
                try:
                    client.release(scope_id)
                except BaseException:
                    client.release(scope_id)
                    raise
                give_back(scope_id)

        return guarded


expires = watchdog_expires


def _to_seconds(after: Any) -> float:
    if not hasattr(type(after), "__float__") and not hasattr(type(after), "__index__"):
        raise TypeError(
            f"after must be a number of seconds or None, not {after!r}: write `@watchdog_expires(after=30)` or"
            " `with watchdog_expires(after=30):`"
        )
    try:
        seconds = float(after)
    except OverflowError:
        seconds = math.inf
    if not 0 < seconds < _WALL_CLOCK:
        raise ValueError(
            f"after must be a positive number of seconds below {_WALL_CLOCK:g}, or None, not {after!r:.40}"
        )
    return seconds


# ------------------------------------------------------------------------------------------------- watchdog process


_start_lock = threading.RLock()
_THIS_FILE = os.path.abspath(globals().get("__file__", ""))  # now, before the program changes its directory
# Signals that are meant for the program, but are often sent to its whole process group.
_SHIELDED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}


def start_watchdog(*, signum: int = signal.SIGABRT, grace: float = 5.0) -> LocalTimerClient:
    """Start the watchdog process of this process and those it forks, configure its client and return that.

    An expired call gets `signum`, then SIGKILL after `grace` seconds. The default makes a hung program print the stack
    of every thread (`faulthandler` is enabled for it); one with a handler that raises, like SIGINT's, is a soft limit.
    If a watchdog process serves this process already, its client is returned; if its arguments were others, a
    `RuntimeError` says so. A `RuntimeError` is raised also where no interpreter can be started on this file.
    """
    _check_escalation(signum, grace)
    with _start_lock:
        client = _Process.client
        if not isinstance(client, _WatchdogClient):
            client = _WatchdogClient(signum, grace)
            configure(client)
        elif (client._signum, client._grace) != (signum, grace):
            raise RuntimeError(
                f"a watchdog process with signum={signal.Signals(client._signum).name} and grace={client._grace!r}"
                " serves this process already: start yours before the first guarded call, or call configure(None)"
            )
        return client


def _reap_watchdogs() -> dict[int, int]:
    """Reap those that have ended; return their exit codes by pid, as far as nobody else has reaped them."""
    codes = {}
    for pid in list(_Process.watchdogs):
        with contextlib.suppress(ChildProcessError):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            codes[pid] = os.waitstatus_to_exitcode(status)
        _Process.watchdogs.discard(pid)
    return codes


class _WatchdogClient(LocalTimerClient):
    """The client of a watchdog process, which it starts, and starts again if that has died."""

    def __init__(self, signum: int, grace: float, pipe: RequestPipe | None = None) -> None:
        self._signum = signum
        self._grace = grace
        self._child = 0
        super().__init__(pipe or self._launch())
        if signum == signal.SIGABRT and not faulthandler.is_enabled() and sys.__stderr__ is not None:
            with contextlib.suppress(OSError, ValueError):  # a closed stderr: no stack then
                faulthandler.enable(sys.__stderr__)
        if os.getpid() == 1:
            logger.warning(
                "local_timer: this is PID 1 of a container, which no signal from inside can kill, so the watchdog can't"
                " either, though it prints the stack: run the container with an init process (docker run --init)"
            )

    def _launch(self) -> RequestPipe:
        works = os.access(sys.executable or "", os.X_OK) and not getattr(sys, "frozen", False)
        if not works or not os.path.isfile(_THIS_FILE):
            raise RuntimeError(
                f"no interpreter ({sys.executable!r}) can be started on this file ({_THIS_FILE!r}): run a"
                " LocalTimerServer in the program that starts this process and configure() its client here"
            )
        _reap_watchdogs()
        pipe = RequestPipe()
        arguments = [str(pipe._reader), str(int(self._signum)), repr(float(self._grace))]
        # The child inherits the mask, so that nothing can strike before it ignores these signals.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, _SHIELDED)
            self._child = util.spawnv_passfds(
                os.fsencode(sys.executable),
                [sys.executable, "-I", "-S", _THIS_FILE, "--watchdog", *arguments],
                [pipe._reader],
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _Process.watchdogs.add(self._child)
        pipe._close_reader()
        return pipe

    def _put(self, scope_id: str, expiration_time: float) -> None:
        pipe = self._mp_queue
        try:
            super()._put(scope_id, expiration_time)
        except BrokenPipeError as error:
            with _start_lock:
                if self._mp_queue is pipe:  # else another thread was faster
                    code = _reap_watchdogs().get(self._child)
                    reason = error.strerror if code is None else f"exit code {code}"
                    logger.warning("local_timer: the watchdog process is lost (%s); starting another", reason)
                    self._mp_queue = self._launch()
                    self._lost = pipe  # a thread may be about to write to its descriptor, so that must stay taken
            super()._put(scope_id, expiration_time)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._signum, self._grace, self._mp_queue)


class _StderrHandler(logging.Handler):
    """Writes to stderr, but never waits for who reads it: the kill comes first."""

    def emit(self, record: logging.LogRecord) -> None:
        stderr = select.poll()
        stderr.register(2, select.POLLOUT)
        with contextlib.suppress(OSError):
            if stderr.poll(0):
                line = self.format(record).encode(errors="backslashreplace")
                os.write(2, line[: select.PIPE_BUF - 1] + b"\n")  # for which there is room then


def _watchdog_main(reader: int, signum: int, grace: float) -> None:
    for shielded in _SHIELDED:
        signal.signal(shielded, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SHIELDED)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)  # who waits for the end of the program's output must not wait for us
    if null > 2:
        os.close(null)
    logging.basicConfig(format="%(message)s", handlers=[_StderrHandler()])
    pipe = RequestPipe.__new__(RequestPipe)
    pipe._attach(reader, -1)
    LocalTimerServer(pipe, threading.TIMEOUT_MAX, signum=signum, grace=grace).run()


# ------------------------------------------------------------------------------------------------------------- demo


_DEMO_LIMIT = 1.0  # seconds


def _demo_heartbeats() -> None:
    with watchdog_expires(after=_DEMO_LIMIT / 2) as timer:
        for _ in range(4):
            time.sleep(_DEMO_LIMIT / 5)
            timer.reset()


def _demo_python_loop() -> None:
    while True:
        pass


def _demo_lock() -> None:
    lock = threading.Lock()
    with lock, lock:
        pass


async def _demo_task() -> None:
    _demo_python_loop()


def _demo_gil() -> None:
    collections.deque(itertools.repeat(0), maxlen=0)


# What a worker does under the limit, and the exit code that it should have.
_DEMO: dict[str, tuple[Callable[[], Any], int]] = {
    "returns just in time": (lambda: time.sleep(0.9 * _DEMO_LIMIT), 0),
    "sends heartbeats": (_demo_heartbeats, 0),
    "is asleep": (lambda: time.sleep(60), -signal.SIGABRT),
    "is in a Python loop": (_demo_python_loop, -signal.SIGABRT),
    "takes a lock twice": (_demo_lock, -signal.SIGABRT),
    "is in a task that never yields": (_demo_task, -signal.SIGABRT),
    "is in C code that holds the GIL": (_demo_gil, -signal.SIGABRT),
}


def _demo_worker(name: str, report: Any) -> None:
    import asyncio

    os.dup2(report.fileno(), 2)  # for the line of the watchdog and the stack
    report.close()
    work = watchdog_expires(after=_DEMO_LIMIT)(_DEMO[name][0])
    start_watchdog()
    os.write(2, b"%.6f\n" % (time.monotonic() + _DEMO_LIMIT))
    result = work()
    if asyncio.iscoroutine(result):
        asyncio.run(result)


def _demo() -> int:
    """Show on real processes what a guarded one becomes; return 0 exactly if each ended as it should."""
    import multiprocessing.connection

    spawn = multiprocessing.get_context("spawn")
    workers, reports = {}, {}
    ended: dict[str, float] = {}
    for name in _DEMO:
        reports[name], report = spawn.Pipe(duplex=False)
        workers[name] = spawn.Process(target=_demo_worker, args=(name, report), daemon=True)
        workers[name].start()
        report.close()
    print(f"{len(_DEMO)} workers, each under a limit of {_DEMO_LIMIT:g} s:\n")
    give_up = time.monotonic() + 8 * _DEMO_LIMIT
    while len(ended) < len(workers) and time.monotonic() < give_up:
        multiprocessing.connection.wait([workers[name].sentinel for name in workers if name not in ended], 1.0)
        for name in workers:
            if not workers[name].is_alive():
                ended.setdefault(name, time.monotonic())
    failures, output = 0, ""
    for name, worker in workers.items():
        worker.kill()  # if it has not ended by itself
        worker.join()
        exit_code = worker.exitcode or 0
        with open(reports[name].fileno(), closefd=False) as report_file:
            deadline, _, output = report_file.read().partition("\n")
        as_expected = name in ended and exit_code == _DEMO[name][1]
        failures += not as_expected
        became, late = f"exited with {exit_code}", ""
        if exit_code < 0:
            became = f"died of {signal.Signals(-exit_code).name}"
            late = f"{1000 * (ended.get(name, math.inf) - float(deadline or 0)):.1f} ms after its deadline"
        print(f"{'ok  ' if as_expected else 'FAIL'}  {name:33} {became:16}  {late}")
    print(f"\nThe last one left this on stderr:\n\n{output}")
    return 1 if failures else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--watchdog"]:
        _watchdog_main(int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
    else:
        sys.exit(_demo())
