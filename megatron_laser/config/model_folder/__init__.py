"""A Hugging Face folder as its JSON files and safetensors headers describe it. No torch, no weights."""
