"""On-policy distillation with the bounded power reward, on Megatron-Core."""

__version__ = "0.1.0"
