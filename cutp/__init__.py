"""cutp: LLM transformer inference as an MPI program.

    from cutp import LLM, SamplingParams
    with LLM("path/to/model") as llm:
        print(llm.generate("Once upon a time", SamplingParams(max_tokens=32))[0].text)

Importing this package imports neither MPI nor CUDA nor NumPy: public names load when they are first used.
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "LLM": "cutp.engine.llm",
    "SamplingParams": "cutp.engine.sampling_params",
    "GenerationOutput": "cutp.engine.outputs",
    "ScoreOutput": "cutp.engine.outputs",
    "Communicator": "cutp.comm",
    "run_threads": "cutp.comm",
    "CutpError": "cutp.errors",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'cutp' has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
