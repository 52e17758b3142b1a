"""Warnings of dependencies that a user can do nothing about. Each is named, with the reason; all others are shown."""

import logging
import os
import threading
import warnings

HARMLESS = {
    # A frozen encoder is meant to be.
    r".*module\(s\) in eval mode at the start of training.*": UserWarning,
    # Nothing is changed in place of what a network gives back.
    r".*FSDP2-wrapped module .* returned a view tensor.*": UserWarning,
    # The guard clips, and tells DeepSpeed to.
    r".*DeepSpeed handles gradient clipping internally.*": UserWarning,
    # Inside torch and DeepSpeed, about each other.
    r".*`torch\.distributed\.\w+` is deprecated.*": FutureWarning,
    # Few workers are a choice of the recipe; on two cores they are the best one.
    r".*does not have many workers.*": UserWarning,
    # A scheduler that steps after a skipped step is what the guard means.
    r".*lr_scheduler\.step\(\).*before.*optimizer\.step\(\).*": UserWarning,
    # Inside Lightning and torch, about each other.
    r".*isinstance\(treespec, LeafSpec\).*": Warning,
    r".*torch\.jit\..* is deprecated.*": Warning,
    r".*Checkpoint directory .* exists and is not empty.*": UserWarning,
    # Pinned memory is asked for only where there is a GPU.
    r".*'pin_memory' argument is set as true but no accelerator is found.*": UserWarning,
    # A corpus with too few held-out exams for a batch is validated on none.
    r".*Total length of .* across ranks is zero.*": Warning,
    # Training is one endless epoch: there is no end of an epoch to aggregate over.
    r".*log_every_n_steps=\d+.*": UserWarning,
    # Processes that a recipe asks for and srun did not start are refused; one alone needs no srun.
    r".*The `srun` command is available.*": UserWarning,
}
CHATTY = ("lightning.pytorch", "lightning.fabric", "lightning", "torch.distributed", "nilearn", "matplotlib")


def quiet() -> None:
    """Silences `HARMLESS` warnings and the banners of libraries."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if threading.excepthook is threading.__excepthook__:  # a test's own sees more
        threading.excepthook = _of_a_thread
    for message, category in HARMLESS.items():
        warnings.filterwarnings("ignore", message=message, category=category)
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)


def _of_a_thread(args: threading.ExceptHookArgs) -> None:
    """TensorBoard's ends where a disk is full, which its logger says."""
    if not (issubclass(args.exc_type, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
        threading.__excepthook__(args)
