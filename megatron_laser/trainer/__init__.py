"""Policy training on Megatron-Core: process groups, log-prob pass, train step, optimizer."""
