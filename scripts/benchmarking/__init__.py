"""Speed and memory, measured and shown: the parts of the benchmarks."""
