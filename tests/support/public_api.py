"""What is public: of each name its signature, and what the sections of its docstring name."""

import importlib.util
import inspect
import re

import lora_kernels as lk
from lora_kernels import tensor_parallel

PUBLIC = {name: getattr(lk, name) for name in lk.__all__}
PUBLIC |= {name: getattr(tensor_parallel, name) for name in ("ColwiseLoRA", "RowwiseLoRA")}
if importlib.util.find_spec("transformers"):
    PUBLIC["TrainerCallback"] = lk.TrainerCallback
NAMING, OTHERS = ("Args", "Raises", "Attributes"), ("Returns", "Example")


def described():
    """Return lines that describe each public name, and the methods and properties of classes."""
    found = {}
    for name, public in PUBLIC.items():
        found[name] = _lines(name, public)
        for member, static in _own(public).items() if inspect.isclass(public) else ():
            function = getattr(static, "__func__", static)  # of a class method
            if not member.startswith("_") and (callable(function) or isinstance(static, property)):
                found[f"{name}.{member}"] = _lines(f"{name}.{member}", function)
    return dict(sorted(found.items()))


def _own(kind):
    """Return the attributes of a class that this package gave it, inherited ones too."""
    ours = [base for base in kind.__mro__ if base.__module__.startswith("lora_kernels")]
    return {name: value for base in reversed(ours) for name, value in vars(base).items()}


def _lines(name, public):
    if isinstance(public, property):
        return [f"{name}: property", *_sections(public.fget)]
    # Where a type lies is no part of the interface.
    signature = re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Za-z])", "", str(inspect.signature(public)))
    return [name + signature, *_sections(public)]


def _sections(public):
    text = inspect.getdoc(public) or ""
    parts = re.split(rf"^({'|'.join(NAMING + OTHERS)}):\n", text, flags=re.MULTILINE)
    for section, body in zip(parts[1::2], parts[2::2], strict=True):
        names = ", ".join(re.findall(r"^    (\w[\w, ]*):", body, re.MULTILINE))
        yield f"    {section}: {names}" if section in NAMING else f"    {section}"
