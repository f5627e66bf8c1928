"""Ranks: the processes of a torch process group as one communicator (docs/cp.md).

The group says who they are, and its store is where they meet. What carries bytes is made of that:
on the CPU gloo among the same processes, called by the library through functions of ours; on GPUs
the library's own NCCL, one process a GPU, whose meeting point travels through the store. The group
itself carries nothing, so what else runs on it is not disturbed, and a failure here leaves it
whole.

Nothing hangs. Every process has a thread that watches the store, whatever its caller does
meanwhile. Who fails, writes there why, and who waits too long, or loses a connection, calls the
roll: each thread answers with the number of collectives it has begun, who is dead or stopped
doesn't, and the first to know writes it down for all.
"""

import atexit
import ctypes
import functools
import hashlib
import itertools
import os
import socket
import threading
import time
import weakref
from datetime import timedelta

import torch
import torch.distributed as dist

from . import _lib, core
from .errors import RegraphError

TICK = 0.1  # how often the store is looked at, seconds
ROLL = 1.5  # how long the roll takes at most, where someone does not answer: many ticks
HEADER = 128  # bytes in which a rank says what it calls
_open: dict = {}  # name of a group, deadline → Ranks


class Failed(Exception):
    """The communicator has failed: a sentence."""


def group_of(cp):
    """The process group that is meant: itself, or that of a mesh of one dimension."""
    if hasattr(cp, "get_group"):
        if cp.ndim != 1:
            raise RegraphError("RG_E_USAGE", f"cp is a mesh of {cp.ndim} dimensions; expected a "
                               "process group or one dimension of a mesh, as mesh[\"cp\"]")
        return cp.get_group()
    if not isinstance(cp, dist.ProcessGroup):
        raise RegraphError("RG_E_USAGE", f"cp is {cp!r}; expected a process group or one dimension "
                           "of a mesh, of which this process is part")
    return cp


def named(name):
    """The group of that name in this process."""
    try:
        return dist.distributed_c10d._resolve_process_group(name)
    except Exception:  # which one differs between versions of torch
        raise RegraphError("RG_E_USAGE", f"there is no process group '{name}' in this process; "
                           "make it before what was made for its ranks is used") from None


# ---- the watch ----


class Watch:
    """This rank's place in the store of a group, and the thread that looks after it."""

    def __init__(self, group, name, deadline):
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.deadline = deadline
        store = dist.distributed_c10d._get_default_store()
        try:
            own = store.clone()  # a connection of its own: others may wait on theirs
        except (AttributeError, RuntimeError, NotImplementedError):
            own = store
        members = ",".join(map(str, dist.get_process_group_ranks(group)))
        digest = hashlib.sha1(f"{name} {members} {deadline}".encode()).hexdigest()[:16]
        for attempt in itertools.count():  # those before have failed
            self.store = dist.PrefixStore(f"regraph/{digest}/{attempt}", own)
            if not self.store.check(["failed"]):
                break
        self.failed: str | None = None
        self.begun, self.last = 0, "nothing"  # collectives, and the last one's name
        self._stop, self._answered = threading.Event(), False
        self._thread = threading.Thread(target=self._look, name="regraph ranks", daemon=True)
        self._thread.start()

    def _look(self):
        try:
            while not self._stop.wait(TICK):
                if self.failed is None and self.store.check(["failed"]):
                    self.failed = self.store.get("failed").decode()
                if not self._answered and self.store.check(["roll"]):
                    self._answer()
                if self.failed is not None and self._answered:
                    return
        except Exception:
            pass  # the store went with its host; gloo and deadlines say what that means

    def _answer(self):
        self._answered = True
        self.store.set(f"at/{self.rank}", str(self.begun))

    def fail(self, sentence):
        """Writes down why all end; what another rank wrote before counts. Returns that."""
        if self.failed is None:
            try:
                self.failed = self.store.compare_set("failed", "", sentence).decode()
            except Exception:
                self.failed = sentence
        return self.failed

    def roll(self):
        """{rank: how many collectives it has begun} of those that answer; None: nobody can."""
        try:
            self._answer()
            self.store.set("roll", "1")
            until, there = time.monotonic() + ROLL, {}
            while len(there) < self.size and time.monotonic() < until and self.failed is None:
                for rank in range(self.size):
                    if rank not in there and self.store.check([f"at/{rank}"]):
                        there[rank] = int(self.store.get(f"at/{rank}"))
                time.sleep(TICK / 5)
            return there
        except Exception:
            return None

    def meet(self, what):
        """Waits until all ranks have come here."""
        until = time.monotonic() + self.deadline
        self.store.set(f"{what}/{self.rank}", "1")
        missing = list(range(self.size))
        while missing:
            missing = [rank for rank in missing if not self.store.check([f"{what}/{rank}"])]
            if self.failed is not None:
                raise Failed(self.failed)
            if missing and time.monotonic() > until:
                raise Failed(self.fail(f"rank {missing[0]} did not come to the start within "
                                       f"{self.deadline:g} s"))
            time.sleep(TICK / 20)

    def lost(self, what, before, told):
        """Why a connection ended in the collective `what`, which came after `before`."""
        there = self.roll()
        if there is None:
            return self.fail(f"{what}: a connection was lost, and so is the group's store, which "
                             "rank 0 holds or its launcher")
        gone = [rank for rank in range(self.size) if rank not in there]
        return self.fail(f"rank {gone[0]} ended without a word (its last: {before})" if gone else
                         f"{what}: {told}")

    def late(self, what, before):
        """Who was not there within the deadline."""
        there = self.roll()
        if there is None:
            return self.fail(f"{what} did not end within {self.deadline:g} s, and the group's "
                             "store does not answer")
        for rank in range(self.size):
            if rank not in there:
                return self.fail(f"rank {rank} does not answer, and did not reach {what} within "
                                 f"{self.deadline:g} s (its last: {before})")
            if there[rank] < self.begun:
                return self.fail(f"rank {rank} did not reach {what} within {self.deadline:g} s "
                                 f"(its last: {before})")
        return self.fail(f"{what} did not end within {self.deadline:g} s")

    def close(self):
        self._stop.set()
        self._thread.join(10 * TICK)


# ---- gloo ----


def _guarded(function):
    """A method as the library calls it: what goes wrong is written to the rg_error."""

    @functools.wraps(function)
    def call(self, _, *arguments):
        *arguments, error = arguments
        try:
            function(self, *arguments)
            return 0
        except Failed as why:
            sentence = str(why)
        except BaseException as why:  # KeyboardInterrupt, too: it comes up where the run returns
            self.raised = why
            sentence = self.watch.fail(f"rank {self.watch.rank} failed: {type(why).__name__} {why}")
        if error and error.contents.status == 0:
            error.contents.status = _lib.COMM_FAILED
            error.contents.message = sentence.encode()[:600]
        return _lib.COMM_FAILED

    return call


class Gloo:
    """An rg_comm of functions of ours. Bytes are copied to tensors of torch's and back: a
    collective that is left behind by a failure has nothing of the library's to write to."""

    def __init__(self, watch):
        self.watch, self.raised = watch, None
        watch.meet("gloo")
        try:
            self.group = dist.ProcessGroupGloo(dist.PrefixStore("connect", watch.store), watch.rank,
                                               watch.size, timedelta(seconds=watch.deadline + 5))
        except RuntimeError as error:
            raise Failed(watch.fail(f"rank {watch.rank} has no connection to the others: {error}"))
        methods = (self._all_gather, self._all_to_all, self._halo, self._barrier, self._abort,
                   self._destroy)
        self._functions = [kind(method) for kind, method in zip(_lib.COMM_FUNCTIONS, methods)]
        self.comm = _lib.Comm(_lib.OP_ABI, watch.size, watch.rank, None, *self._functions)
        self.handle = ctypes.addressof(self.comm)

    def _wait(self, work, what, before):
        watch, until = self.watch, time.monotonic() + self.watch.deadline
        while True:
            try:
                work.wait(timedelta(seconds=TICK))
                return
            except RuntimeError:
                pass
            if work.is_completed():
                try:
                    work.wait()  # it came to its end meanwhile
                    return
                except RuntimeError as error:
                    raise Failed(watch.lost(what, before, str(error))) from None
            if watch.failed is not None:
                raise Failed(watch.failed)
            if time.monotonic() > until:
                raise Failed(watch.late(what, before)) from None

    def _begin(self, word, node, size):
        """All say what they call before they do: bytes that don't fit would end in confusion."""
        watch = self.watch
        if watch.failed is not None:
            raise Failed(watch.failed)
        what, before = f"{word} {(node or b'').decode()}".strip(), watch.last
        watch.begun, watch.last = watch.begun + 1, what
        said = f"{what} of {size} bytes".encode()[:HEADER].ljust(HEADER)
        mine = torch.frombuffer(bytearray(said), dtype=torch.uint8)
        everyone = torch.empty(watch.size * HEADER, dtype=torch.uint8, device="cpu")
        self._wait(self.group._allgather_base(everyone, mine), what, before)
        calls = [bytes(row.tolist()).decode(errors="replace").strip()
                 for row in everyone.view(watch.size, HEADER)]
        for rank, other in enumerate(calls):
            if other != calls[0]:
                raise Failed(watch.fail(f"rank {rank} calls {other}, rank 0 {calls[0]}"))
        return what

    def _move(self, what, gives, takes, begin):
        """Runs `begin(received, sent)` with `gives` [(address, bytes)] end to end, and copies what
        was received to `takes`."""
        sent = torch.empty(sum(n for _, n in gives), dtype=torch.uint8, device="cpu")
        received = torch.empty(sum(n for _, n in takes), dtype=torch.uint8, device="cpu")
        at = sent.data_ptr()
        for address, n in gives:
            ctypes.memmove(at, address, n)
            at += n
        self._wait(begin(received, sent), what, what)
        at = received.data_ptr()
        for address, n in takes:
            ctypes.memmove(address, at, n)
            at += n

    @_guarded
    def _all_gather(self, node, send, recv, size, stream):
        what = self._begin("all_gather", node, size)
        if size:
            self._move(what, [(send, size)], [(recv, self.watch.size * size)],
                       self.group._allgather_base)

    @_guarded
    def _all_to_all(self, node, send, recv, size, stream):
        what, everything = self._begin("all_to_all", node, size), self.watch.size * size
        if size:
            self._move(what, [(send, everything)], [(recv, everything)],
                       lambda received, sent: self.group.alltoall_base(received, sent, [], []))

    @_guarded
    def _halo(self, node, halo, size, stream):
        what, rank, h = self._begin("halo", node, size), self.watch.rank, halo.contents
        pieces = [size if abs(other - rank) == 1 else 0 for other in range(self.watch.size)]
        if size and self.watch.size > 1:
            before, after = rank > 0, rank + 1 < self.watch.size
            self._move(what,
                       [(h.to_previous, size)] * before + [(h.to_next, size)] * after,
                       [(h.from_previous, size)] * before + [(h.from_next, size)] * after,
                       lambda received, sent: self.group.alltoall_base(received, sent, pieces,
                                                                       pieces))

    @_guarded
    def _barrier(self, node):
        self._begin("barrier", node, 0)  # all have said so: all are there

    def _abort(self, _, why):
        why = why.contents if why else None
        said = why.message.decode(errors="replace") if why else "no reason given"
        self.watch.fail(said if why and why.status == _lib.COMM_FAILED else
                        f"rank {self.watch.rank} failed: {said}")

    def _destroy(self, _):
        pass

    def abort(self, sentence):
        pass  # who waits looks at the watch

    def close(self):
        if self.watch.failed is not None:  # it would wait for what is under way
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.group))
        self.group = None


# ---- the library's processes ----


class Processes:
    """An rg_comm of the library's: sockets, and with `cuda` NCCL. The store carries the address."""

    def __init__(self, watch, cuda):
        self.watch, self.raised = watch, None
        if watch.rank == 0:
            with socket.socket() as free:
                free.bind(("", 0))
                port = free.getsockname()[1]
            watch.store.set("address", f"{socket.gethostname()} {_address()} {port}")
        watch.meet("processes")
        host, address, port = watch.store.get("address").decode().split()
        options = _lib.CommOptions(rank=watch.rank, ranks=watch.size, port=int(port), cuda=cuda,
                                   address=(b"127.0.0.1" if host == socket.gethostname() else
                                            address.encode()), deadline=watch.deadline)
        self._context = core.default_context()
        try:
            self.handle = _lib.create("rg_comm_processes", self._context.handle,
                                      ctypes.byref(options))
        except RegraphError as error:
            raise Failed(watch.fail(error.message)) from None
        self.comm = _lib.Comm.from_address(self.handle)

    def abort(self, sentence):
        error = _lib.Error(status=_lib.COMM_FAILED, message=sentence.encode()[:600])
        self.comm.abort(self.handle, ctypes.byref(error))

    def close(self):
        _lib.lib.rg_comm_destroy(self.handle, None)


def _address():
    """This host's, for others."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"


# ---- ranks ----


class Ranks:
    """The ranks of a group. Programs share them, and their order of collectives."""

    def __init__(self, group, name, deadline):
        self.group = weakref.ref(group)
        self.watch = Watch(group, name, deadline)
        self.rank, self.size = self.watch.rank, self.watch.size
        self.lock = threading.RLock()  # an end is used from one thread at a time
        self._engines: dict = {}  # "cpu", "cuda" → what carries bytes

    def engine(self, device):
        """What carries bytes of that device; collective at the first call."""
        with self.lock:
            if self.watch.failed is not None:
                raise RegraphError("RG_E_COMM", self.watch.failed)
            if device.type not in self._engines:
                try:
                    self._engines[device.type] = self._make(device)
                except Failed as error:
                    raise RegraphError("RG_E_COMM", str(error)) from None
            return self._engines[device.type]

    def _make(self, device):
        if device.type != "cuda":
            return Gloo(self.watch)
        with torch.cuda.device(device):  # NCCL takes the current one
            return Processes(self.watch, cuda=True)

    def fail(self, error):
        """This rank takes part no more: the others would wait for it in vain."""
        sentence = self.watch.fail(error.message if error.status == "RG_E_COMM" else
                                   f"rank {self.rank} failed: {str(error).splitlines()[0]}")
        for engine in self._engines.values():
            engine.abort(sentence)

    def raised(self):
        """What was raised inside a function of ours, once."""
        for engine in self._engines.values():
            error, engine.raised = engine.raised, None
            if error is not None:
                return error
        return None

    def close(self):
        self.watch.close()
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()


def ranks_of(name, deadline, anew=False):
    """The Ranks of the group of that name. `anew`: where they have failed, or another group has the
    name now, others are made, on all of its processes."""
    key = name, deadline
    group, old = named(name), _open.get(key)
    if old is None or anew and (old.watch.failed is not None or old.group() is not group):
        if old:
            old.watch.fail("the process group has come to its end")
            old.close()
        _open[key] = Ranks(group, name, deadline)
    return _open[key]


@atexit.register
def _close(mine=os.getpid()):
    if os.getpid() != mine:  # a child that was forked has none of the threads
        return
    for ranks in _open.values():
        ranks.close()
    _open.clear()
