"""Model directories: safetensors slices, configuration, tokenizer and chat template. Nothing in them is executed.

`tokenizers` and `jinja2` are imported when a tokenizer or template is first loaded.
"""

from cutp.checkpoint.chat_template import ChatTemplate
from cutp.checkpoint.checkpoint import Checkpoint
from cutp.checkpoint.config import REQUIRED, ModelConfig, load_config
from cutp.checkpoint.detokenizer import Detokenizer
from cutp.checkpoint.files import cache_directory, resolve_model
from cutp.checkpoint.generation_config import GenerationDefaults, load_generation_config
from cutp.checkpoint.safetensors import SafetensorsFile, TensorInfo, write_safetensors
from cutp.checkpoint.tokenizer import Tokenizer

__all__ = [
    "REQUIRED",
    "ChatTemplate",
    "Checkpoint",
    "Detokenizer",
    "GenerationDefaults",
    "ModelConfig",
    "SafetensorsFile",
    "TensorInfo",
    "Tokenizer",
    "cache_directory",
    "load_config",
    "load_generation_config",
    "resolve_model",
    "write_safetensors",
]
