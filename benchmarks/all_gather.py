"""Measure all_gather: `ringfold bench all_gather -n 2`. The driver is _sweep.py, the operation is in _operations.py."""

from ringfold.benchmarks._sweep import command

main = command("all_gather")

if __name__ == "__main__":
    main()
