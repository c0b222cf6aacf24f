"""Measure reduce: `ringfold bench reduce -n 2`. The driver is _sweep.py, the operation is in _operations.py."""

from ringfold.benchmarks._sweep import command

main = command("reduce")

if __name__ == "__main__":
    main()
