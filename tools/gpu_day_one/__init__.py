"""The stages of tools/gpu_day_one.sh: one module each, run by `__main__` in processes of their own."""
