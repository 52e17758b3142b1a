"""Which strategy a recipe's word stands for, and what it cannot do."""

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from umbif.errors import Problem, nearest
from umbif.scale.strategies import DDP, FSDP2, Checkpointed, Single

UNUSED = "ddp_find_unused_parameters_true"
ZERO, OFFLOAD = "deepspeed_stage_", "_offload"
ZERO_WORDS = [*(f"{ZERO}{stage}" for stage in (1, 2, 3)), *(f"{ZERO}{stage}{OFFLOAD}" for stage in (2, 3))]
IN_SHARDS = ("fsdp2", *(word for word in ZERO_WORDS if word.startswith(f"{ZERO}3")))
WORDS = ("auto", "ddp", UNUSED, "fsdp2", *ZERO_WORDS)
STAGE_3_CANNOT = {"average": "model.ema_decay", "compile_backend": "model.compile_backend"}
INSTALL = "pip install 'umbif[deepspeed]'"


def strategy_of(trainer: Mapping[str, Any], devices: Sequence[torch.device]) -> Checkpointed:
    """The strategy for a `trainer:` block without `strategy_problems`, on these devices of each node."""
    word, num_processes = _word_of(trainer), len(devices) * (trainer.get("num_nodes") or 1)
    if isinstance(word, DDP):
        return word
    if word.startswith(ZERO):
        from umbif.scale.deepspeed import DeepSpeed

        precision, on_cpu = str(trainer.get("precision") or "32-true"), devices[0].type == "cpu"
        return DeepSpeed(int(word[len(ZERO)]), word.endswith(OFFLOAD), precision, on_cpu)
    if word == "fsdp2":
        return FSDP2()
    if word == "auto" and num_processes == 1:
        return Single(device=devices[0])
    return DDP(find_unused_parameters=word == UNUSED)


def strategy_problems(trainer: Mapping[str, Any], model: Any) -> Iterator[Problem]:
    """Words that stand for nothing, and what is known not to go together."""
    word = _word_of(trainer)
    if isinstance(word, DDP):
        yield from _option_problems(word, trainer)
        return
    if not isinstance(word, str) or word not in WORDS:
        name = str(word) if isinstance(word, str) else type(word).__name__
        yield Problem("trainer.strategy is none of UMBIF's", name, _cure(word))
        return
    if word.startswith(ZERO) and find_spec("deepspeed") is None:
        cure = f"Install it ({INSTALL}), or set trainer.strategy=fsdp2"
        yield Problem(f"trainer.strategy={word} needs DeepSpeed, which is not installed", cure=cure)
    if word == "fsdp2" and trainer.get("accelerator") == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        what, cure = "trainer.strategy=fsdp2 needs a newer torch on CPUs", "Update it, or set trainer.strategy=ddp"
        yield Problem(what, str(torch.__version__), cure)
    if word in IN_SHARDS and not model.encoder.can_mask:
        what = f"trainer.strategy={word} gathers weights with all processes, which a CNN asks for at different times"
        yield Problem(what, cure="Set trainer.strategy=ddp: it is small enough")
    for name, key in STAGE_3_CANNOT.items() if word.startswith(f"{ZERO}3") else ():
        if getattr(model, name, None) is not None:
            cure = f"Set {key}=null, or trainer.strategy=fsdp2, which can"
            yield Problem(f"trainer.strategy={word} does not go with {key}: it takes weights apart by hooks", cure=cure)


def _option_problems(strategy: DDP, trainer: Mapping[str, Any]) -> Iterator[Problem]:
    steps = trainer.get("accumulate_grad_batches") or 1
    if strategy._ddp_kwargs.get("static_graph") and steps > 1:
        what = f"static_graph=true does not go with trainer.accumulate_grad_batches={steps}: torch fails at once"
        yield Problem(what, cure="Leave one of them out")


def _cure(word: Any) -> str:
    if not isinstance(word, str):
        return f"Take a word ({', '.join(WORDS)}), or {DDP.__module__}.{DDP.__name__} with options"
    return "FSDP2 is offered, which is called fsdp2" if word.startswith("fsdp") else nearest(word, WORDS)


def _word_of(trainer: Mapping[str, Any]) -> Any:
    return trainer.get("strategy") or "auto"
