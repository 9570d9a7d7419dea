"""What is told and drawn from what a run or an evaluation recorded.

`run_report` writes the report of training runs (`run_data` reads them; `comparison_table`, `conclusions`, `plots/`),
`benchmark_report` that of `megatron-laser eval`.
"""
