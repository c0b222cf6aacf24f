"""Map the fixed top-level folders into the `ringfold` namespace and build the C++ core.

Wheels and sdists use `package_dir`. An editable install gets a farm of links, build/dev/ringfold/<part> -> <part>, so that mypy, pyright
and editors (which cannot run import hooks) resolve `ringfold.*` too, and new files appear without a reinstall.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup

HERE = Path(__file__).resolve().parent
FRONT = "runtime/ringfold"  # the front door: __init__.py, __main__.py, py.typed, _core.pyi
PARTS = ["runtime", "collectives", "parallel", "mixed_precision", "launch", "benchmarks"]
FARM = "build/dev"


def packages() -> dict[str, str]:
    """Return {package name: folder} for every folder of PARTS that holds an __init__.py."""
    found = {"ringfold": FRONT}
    for part in PARTS:
        for root, subfolders, files in os.walk(HERE / part):
            folder = os.path.relpath(root, HERE).replace(os.sep, "/")
            if folder == FRONT or "__init__.py" not in files:
                subfolders[:] = []
                continue
            subfolders[:] = sorted(s for s in subfolders if s != "__pycache__")
            found["ringfold." + folder.replace("/", ".")] = folder
    return found


def link_farm() -> None:
    """Link build/dev/ringfold/{runtime,...} and the front door's files to the real ones."""
    top = HERE / FARM / "ringfold"
    top.mkdir(parents=True, exist_ok=True)
    targets = {part: HERE / part for part in PARTS}
    targets.update({f.name: f for f in (HERE / FRONT).iterdir() if f.suffix in {".py", ".pyi", ".typed"}})
    for name, target in targets.items():
        link = top / name
        if link.is_symlink():
            link.unlink()
        link.symlink_to(os.path.relpath(target, top))


folders = packages()
package_dir = folders
if {"editable_wheel", "develop"} & set(sys.argv):
    link_farm()
    package_dir = {"": FARM}

core = Extension(
    "ringfold._core",
    sorted(str(p.relative_to(HERE)) for p in (HERE / "csrc").rglob("*.cpp") if "test" not in p.parts),
    depends=sorted(str(p.relative_to(HERE)) for p in (HERE / "csrc").rglob("*.h")),
    include_dirs=["csrc"],
    define_macros=[("Py_LIMITED_API", "0x030B0000")],
    # -ffp-contract=off: a fold rounds after every operation, whatever the compiler and the processor.
    extra_compile_args=["-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-pthread"],
    extra_link_args=["-pthread"],
    py_limited_api=True,
)

setup(
    packages=sorted(folders),
    package_dir=package_dir,
    package_data={"ringfold": ["py.typed", "*.pyi"]},
    include_package_data=False,
    ext_modules=[core],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
