"""Distillation of large language models: hidden states from an engine, a fused loss, FSDP2."""


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version

        return version("kdflow")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
