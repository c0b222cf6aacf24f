"""Measure send_recv: `ringfold bench send_recv -n 2`. The driver is _sweep.py, the operation is in _operations.py."""

from ringfold.benchmarks._sweep import command

main = command("send_recv")

if __name__ == "__main__":
    main()
