"""Every Qwen in PyTorch you can read, proven layer by layer against transformers."""

__version__ = "0.1.0"
