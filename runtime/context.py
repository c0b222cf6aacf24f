"""The mesh of this process: `rf.init()` joins the job and lays the ranks out, `rf.shutdown()` leaves it.

The one piece of state is the current mesh. Everything else takes its communicator as an argument, so several Engines, and meshes made by
hand, live beside it; init and shutdown may be repeated in one process as often as one likes.

The first init also sees to the end of the process: an exception that nobody catches is written into the rank's shared page, where the
launcher finds it whatever becomes of the output, and a forgotten shutdown happens at exit.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import sys
import threading
from types import TracebackType

import torch
from ringfold.collectives.communicator import Communicator
from ringfold.collectives.communicator import world as join_world
from ringfold.collectives.environment import VERBOSE, Job
from ringfold.collectives.errors import ConfigError, PeerLost, RingfoldError
from ringfold.collectives.page import Page
from ringfold.collectives.work import Work
from ringfold.parallel.layout import Layout
from ringfold.parallel.mesh import DeviceMesh
from ringfold.runtime.allocator import arrange
from ringfold.runtime.checkpoint.saver import close_savers
from torch import Tensor

__all__ = ["all_reduce", "current_mesh", "init", "shutdown"]

BAD_INPUT = ConfigError.exit_code

_mesh: DeviceMesh | None = None
_joining: Job | None = None  # the job while there is no mesh of it yet, so that whoever fails then can tell


def init(layout: str | Layout | None = None) -> DeviceMesh:
    """Join the job this process was started in and return the ranks as a grid, the same one until `shutdown`.

    Without a layout the launcher's `--layout` decides, else dp is the size of the world. Works under `ringfold run`, torchrun, mpirun,
    srun, and alone. Collective: every rank of the job calls it.

    Raises: ConfigError if the script and the launcher, or two calls, ask for different layouts; LayoutError if it does not fit the world;
        ConnectError, AuthenticationError.
    """
    global _mesh, _joining
    _see_to_the_end()
    job = Job.from_environment()
    given = Layout.parse(layout) if isinstance(layout, str) else layout
    if _mesh is not None:
        if given is not None and given.resolve(_mesh.size) != _mesh.layout:
            raise ConfigError(
                f'rf.init("{given}"): this process is already laid out as "{_mesh.layout}". Call rf.shutdown() first, or leave the layout out.'
            )
        return _mesh
    chosen = _choose(given, job).resolve(job.world_size)
    chosen.require_built()
    _joining = job
    world = join_world(job)
    try:
        _mesh = DeviceMesh(chosen, world)
        if _mesh.device.type == "cuda":
            torch.cuda.set_device(_mesh.device)  # what the script calls "cuda" is this rank's
        else:
            done = _arrange_allocator()
            if os.environ.get(VERBOSE) == "1":
                print(f"ringfold: {_mesh!r} on {_mesh.device}; malloc {done}", file=sys.stderr)
    except BaseException:
        world.close()
        raise
    _joining = None
    return _mesh


def shutdown() -> None:
    """Leave the job: wait for asynchronous saves, and close every communicator of the current mesh; does nothing where there is none.

    Raises: CheckpointError if such a save has failed; the job is left all the same.
    """
    global _mesh
    if _mesh is not None:
        mesh, _mesh = _mesh, None
        with contextlib.ExitStack() as stack:
            stack.callback(mesh.world.close)
            stack.callback(mesh.close)
            close_savers(mesh.world)


def current_mesh() -> DeviceMesh:
    """Return the mesh that `init` made.

    Raises: ConfigError if there is none.
    """
    if _mesh is None:
        raise ConfigError("no mesh: call rf.init() first.")
    return _mesh


def all_reduce(tensor: Tensor, op: str = "sum", *, async_op: bool = False) -> Work | None:
    """Fold a tensor over all ranks of the world, in place; with `async_op` return the Work to wait for."""
    world: Communicator = current_mesh().world
    return world.all_reduce(tensor, op, async_op=async_op)


def _choose(given: Layout | None, job: Job) -> Layout:
    if job.layout is None:
        return given or Layout()
    launched = Layout.parse(job.layout)
    if given is not None and given.resolve(job.world_size) != launched.resolve(job.world_size):
        raise ConfigError(
            f'the launcher was given --layout "{job.layout}", the script asks for rf.init("{given}"). '
            "Leave one of them out: with rf.init() the launcher decides."
        )
    return launched


@functools.cache
def _see_to_the_end() -> None:
    """Install the hooks once a process; whatever hooks were there are called after ours."""
    before, thread_before = sys.excepthook, threading.excepthook

    def write_and_report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        launcher_tells = _write_failure(error)
        if launcher_tells and isinstance(error, PeerLost):
            # A victim's traceback from every rank would only bury the culprit's.
            print(f"PeerLost: {error}", file=sys.stderr)
            return
        if not isinstance(error, RingfoldError) or error.exit_code != BAD_INPUT:
            before(kind, error, trace)
            return
        # Bad input is no crash: one message instead of a traceback from every rank, and the exit code that says so.
        if not launcher_tells:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)

    def write_and_report_thread(failed: threading.ExceptHookArgs) -> None:
        if failed.exc_value is not None and not isinstance(failed.exc_value, SystemExit):
            _write_failure(failed.exc_value)
        thread_before(failed)

    sys.excepthook = write_and_report
    threading.excepthook = write_and_report_thread
    atexit.register(shutdown)
    os.register_at_fork(after_in_child=_forget)


@functools.cache
def _arrange_allocator() -> str:
    return arrange()


def _forget() -> None:
    """In a forked child (a DataLoader's worker): the mesh, and the page that tells of failures, are the parent's."""
    global _mesh, _joining
    _mesh = _joining = None


def _write_failure(error: BaseException) -> bool:
    """Write it into the page; tell whether the launcher reads it there."""
    if _mesh is not None:
        _mesh.world.page.write_failure(error)
        return _mesh.world.session.job.page_fd is not None
    if _joining is None or _joining.page_fd is None:
        return False
    page = Page.attach(os.dup(_joining.page_fd))
    page.write_failure(error)
    page.close()
    return True
