"""Every error this package raises on purpose. Catch `QwenRefError` for all of them.

A message says what is wrong, where (file, tensor, field, layer) and what to do about it.
"""


class QwenRefError(Exception):
    """Base class: the input, the checkpoint or the request is at fault, not the program."""


class ConfigError(QwenRefError):
    """config.json or generation_config.json holds a value that is wrong or not implemented."""


class CheckpointError(QwenRefError):
    """A model folder, weight file or index is missing, damaged or does not match its config."""


class TokenizerError(QwenRefError):
    """Tokenizer files are damaged, or text or ids cannot be converted."""


class TemplateError(QwenRefError):
    """A chat template failed, or messages do not have the form it needs."""


class RequestError(QwenRefError, ValueError):
    """An argument of a call is outside what it accepts."""


class NumericsError(QwenRefError):
    """A forward pass produced NaN or infinity."""


class EmulatorError(RequestError):
    """What the emulator of a GPU does not know: no fault of the kernel that it runs."""
