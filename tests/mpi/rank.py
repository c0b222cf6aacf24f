"""One rank under mpirun: see launching.py."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from ringfold.collectives.environment import Job


def main(module: str, function: str, arguments: str, folder: str) -> None:
    """Call the function; its answer, or its error, is what the test gets."""
    file = Path(folder, f"{Job.from_environment().rank}.json")
    try:
        answer = getattr(importlib.import_module(module), function)(*json.loads(arguments))
    except BaseException as error:
        write(file, {"error": type(error).__name__, "message": str(error)})
        raise
    write(file, answer)


def write(file: Path, answer: Any) -> None:
    """Write the file at once: a rank may be killed at any moment."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(answer))
    os.replace(temporary, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
