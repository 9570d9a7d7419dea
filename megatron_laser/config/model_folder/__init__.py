"""A Hugging Face folder as its JSON files and safetensors headers describe it. No torch, no weights.

`architecture` reads config.json, `parameters` counts what follows from it; `safetensors_headers` says which tensors are
stored, `weight_checks` whether they are the model's; `special_tokens` and `spare_tokens` read the tokenizer's files.
"""
