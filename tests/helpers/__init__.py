"""What several tests share, one file for one need.

Models and data: models.py has tiny random models of every family and a tokenizer of words, tiny_run.py a whole run
that takes seconds, runs.py and rollouts.py configurations and rollout batches, logprob.py problems of the log-prob
op, answer_pairs.py answers whose sameness is known, custom_reward.py reward functions of users. Plain references:
plain_training.py is a train step in transformers and float64. Running things: whole_runs.py trains in this process,
torchrun.py and ranks.py start several ranks, side_by_side.py says what `pytest -n` may run at the same time.
Collecting: collecting.py and stepping_engine.py drive the collector with an engine in memory. SGLang: sglang_server.py
shares the one real server; fake_server.py is the state behind every fake one, plain_http.py what they listen with;
on these stand fake_fleet.py (several servers in memory), fake_memory.py (memory that comes and goes),
faulty_server.py (generation with faults) and fake_sglang.py (a process in place of SGLang's). executables.py writes
stand-ins for programs. breadth.py tells which combinations of parameters run always. pictures.py spares whole runs the
painting of their figures. source_tree.py reads the package's source for the tests of its rules.
"""
