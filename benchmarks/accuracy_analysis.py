"""The command ``python -m benchmarks.accuracy_analysis``; what it does is in :mod:`benchmarks.accuracy.analysis`."""

from benchmarks.accuracy.analysis import main

if __name__ == "__main__":
    main()
