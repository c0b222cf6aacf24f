"""The `ringfold` command. `ringfold --help` imports click and nothing else, and no command here ever imports torch:
what needs it runs in the ranks, or in a process that takes this one's place.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click
from ringfold.collectives.errors import ConfigError, RingfoldError, nearest

_PASS_ON: dict[str, Any] = {"ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": []}


class _Failure(click.ClickException):
    """An error of ours as click prints it: one `Error:` block and its exit code."""

    def __init__(self, error: RingfoldError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code  # type: ignore[misc]


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RingfoldError as error:
            if ctx.params.get("debug"):
                raise
            raise _Failure(error) from None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            meant = nearest(name, self.list_commands(ctx))
            hint = f"did you mean {meant}?" if meant else f"to run a script: ringfold run {name}"
            ctx.fail(f"No such command {name!r}; {hint}")
        return super().resolve_command(ctx, args)


class _RunCommand(click.Command):
    """Options up to the script, `-m` or `--`; everything after belongs to what is run, also what looks like our options."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        from ringfold.launch.options import Target

        end, target = len(args), None
        at = 0
        while at < len(args):
            word = args[at]
            if word == "--" or not word.startswith("-") or word == "-" or word.startswith("-m"):
                end = at
                break
            # An option with its value attached (-n2, --timeout=3), a flag, or one that takes the next word.
            known = next((option for option in self.params if word in option.opts), None)
            at += 2 if isinstance(known, click.Option) and not known.is_flag else 1
        rest = args[end:]
        if rest and rest[0].startswith("-m"):
            name = [rest[0][2:]] if len(rest[0]) > 2 else []
            words = [*name, *rest[1:]]
            target = Target("module", words[0], tuple(words[1:])) if words else None
        elif rest and rest[0] == "--":
            target = Target("executable", rest[1], tuple(rest[2:])) if len(rest) > 1 else None
        elif rest:
            target = Target("script", rest[0], tuple(rest[1:]))
        left = super().parse_args(ctx, args[:end])
        ctx.params["target"] = target
        return left

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return ["[OPTIONS]", "SCRIPT.PY | -m MODULE | -- EXECUTABLE", "[ARGS]..."]


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--debug", is_flag=True, help="Show the traceback of an error of ringfold itself.")
@click.version_option(package_name="ringfold", message="ringfold %(version)s")
def ringfold(debug: bool) -> None:
    """Run a PyTorch training script on any number of processes.

    \b
    ringfold run -n 4 train.py --lr 3e-4     train on four processes
    ringfold doctor                          what works on this machine
    ringfold bench all_reduce -n 2           how fast the ranks talk to each other
    ringfold verify                          that a layout does not change the numbers
    ringfold checkpoint ls run               which checkpoints there are
    """


@ringfold.command(cls=_RunCommand, short_help="Run a script, a module or any executable on N ranks.")
@click.option("-n", "n", metavar="N", help="Number of ranks (processes).  [default: 1]")
@click.option("--layout", metavar="TEXT", help='Arrangement of the ranks, such as "dp4 micro2".  [default: dpN]')
@click.option("--timeout", metavar="S", help="Seconds after which a collective gives up.")
@click.option("--transport", metavar="NAME", help="auto, shm or tcp.  [default: auto]")
@click.option("--interface", metavar="NAME", help="Network between hosts: an interface, or addresses such as 10.1.0.0/16.")
@click.option("--log-dir", metavar="DIR", help="Write rank-0.log, rank-1.log, ... and the metrics there.")
@click.option("--report", metavar="FILE", help="Write how the job and each rank ended, as JSON.")
@click.option("--omp-threads", metavar="K", help="OMP_NUM_THREADS of each rank.  [default: cores / N, or your own]")
@click.option("-v", "--verbose", is_flag=True, help="Say what each process has set up for training.")
def run(target: Any, verbose: bool, **texts: str | None) -> None:
    """Run a script, a module or any executable on N ranks of this machine.

    Everything after it belongs to it. Each line is printed with the number of its rank; when a rank fails the others are ended, and the
    last block says which rank failed first, with its traceback, and what the others were doing.

    \b
    ringfold run -n 4 train.py --lr 3e-4
    ringfold run -n 4 --layout "dp4 micro2" -m my.trainer
    ringfold run -n 2 -- ./wrapper.sh train.py

    Exit code: 0, that of the rank that failed first, 128 + a signal's number, or 2 for bad options.
    """
    from ringfold.launch.options import check_options
    from ringfold.launch.run import run_job

    sys.exit(run_job(check_options(target, verbose=verbose, **texts)))


@ringfold.command(short_help="Measure the collectives and training.", context_settings={"ignore_unknown_options": True})
@click.argument("benchmark", required=False)
@click.option("-n", "n", metavar="N", default="2", show_default=True, help="Number of ranks.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(benchmark: str | None, n: str, arguments: tuple[str, ...]) -> None:
    """Measure: `ringfold bench all_reduce -n 2` is `python -m ringfold.benchmarks.all_reduce -n 2`.

    Other options belong to the benchmark. Without a name, the benchmarks are listed.
    """
    names = _benchmarks()
    if benchmark is None:
        click.echo("\n".join(names))
        return
    if benchmark not in names:
        meant = nearest(benchmark, names)
        raise ConfigError(f"no benchmark {benchmark}; " + (f"did you mean {meant}?" if meant else f"there are: {', '.join(names)}"))
    os.execv(sys.executable, [sys.executable, "-m", f"ringfold.benchmarks.{benchmark}", "-n", n, *arguments])


@ringfold.command(short_help="Check that a layout does not change the numbers.", context_settings=_PASS_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def verify(arguments: tuple[str, ...]) -> None:
    """Check that a model trains to the same numbers under a layout as in one process."""
    os.execv(sys.executable, [sys.executable, "-m", "ringfold.runtime.verify", *arguments])


@ringfold.command(short_help="List, verify and export checkpoints.", context_settings=_PASS_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def checkpoint(arguments: tuple[str, ...]) -> None:
    """List, verify and export checkpoints: `ringfold checkpoint ls DIR`, `verify DIR`, `export DIR --to model.safetensors`."""
    os.execv(sys.executable, [sys.executable, "-m", "ringfold.runtime.checkpoint", *arguments])


@ringfold.command(short_help="Say what works on this machine.")
def doctor() -> None:
    """Say what works on this machine, and what to do about what does not."""
    from ringfold.launch.doctor import examine, show

    show(examine())


def _benchmarks() -> list[str]:
    from importlib.util import find_spec

    package = find_spec("ringfold.benchmarks")
    folders = [Path(folder) for folder in (package.submodule_search_locations if package else None) or ()]
    return sorted(file.stem for folder in folders for file in folder.glob("*.py") if not file.stem.startswith("_"))


def main() -> None:
    """Run the command line."""
    ringfold(prog_name="ringfold")
