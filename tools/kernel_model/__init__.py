"""The model of `tools/predict_kernels.py`: seconds of the log-prob op from its operations and bytes."""
