"""Measure all_to_all: `ringfold bench all_to_all -n 2`. The driver is _sweep.py, the operation is in _operations.py."""

from ringfold.benchmarks._sweep import command

main = command("all_to_all")

if __name__ == "__main__":
    main()
