"""The few-row kernel in CUDA C++: its source, its build and its launch."""
