"""Patch embeddings of pictures, videos and other volumes as one of ours.

A picture's kernel is spread along z, as I3D does for video (Carreira & Zisserman 2017, arXiv:1705.07750): a volume that
is constant along z gives what the picture gave.
Shapes: E width, C colours, p voxels along an edge of a patch, t frames.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Axes of kernels as ours; a minus where they run the other way. Rows of an axial picture run to the back (-y) and its
# columns to the patient's left (-x), as in `pages.pictures`; frames of a video become slices from the bottom up.
IN_PICTURE, IN_VIDEO = ("-y", "-x"), ("z", "-y", "-x")
IN_RAS, IN_LAS = ("x", "y", "z"), ("-x", "y", "z")


def inflate(kernel: Tensor, axes: Sequence[str], patch_size: int) -> Tensor:
    """A kernel (E, C, ...) with the named axes to (E, p * p * p) in the order X, Y, Z.

    Its answer to a patch is the kernel's own to that patch in grey, averaged to the kernel's size. So the answer to
    what is constant stays, and so does the answer to a picture that is repeated along z.
    """
    kernel = kernel.float().sum(1)  # a grey picture shows the same in every colour
    kernel = kernel.flip([1 + i for i, axis in enumerate(axes) if axis.startswith("-")])
    order = [axis.lstrip("-") for axis in axes]
    if "z" not in order:
        kernel, order = kernel[..., None], [*order, "z"]
    kernel = kernel.permute(0, *(1 + order.index(axis) for axis in "xyz"))
    for axis in (1, 2, 3):
        kernel = _spread(kernel, axis, patch_size)
    return kernel.flatten(1)


def kernel_axes(kernel: Tensor, volume: tuple[str, ...], pictures: bool) -> tuple[str, ...] | None:
    """The axes of a kernel, those of a cube being `volume`; None if it is neither that nor, if allowed, a picture's."""
    if kernel.ndim == 5 and len(set(kernel.shape[2:])) == 1:
        return volume
    return {4: IN_PICTURE, 5: IN_VIDEO}.get(kernel.ndim) if pictures else None


def unflattened(kernel: Tensor) -> Tensor:
    """MONAI's `perceptron` embedding (E, p * p * p) as a kernel of one colour; others as they are."""
    side = round(kernel.shape[-1] ** (1 / 3))
    return kernel.reshape(-1, 1, side, side, side) if kernel.ndim == 2 and side**3 == kernel.shape[-1] else kernel


def said(kernel: Tensor, axes: tuple[str, ...], patch_size: int) -> str:
    """What `inflate` does to a kernel, for people; empty if nothing."""
    colours, sides = kernel.shape[1], tuple(kernel.shape[2:])
    flat = sides[-2:] if axes in (IN_PICTURE, IN_VIDEO) else sides
    parts = {
        f"{colours} colours summed": colours > 1,
        f"inflated: spread over {patch_size} voxels of z": axes == IN_PICTURE,
        f"inflated: {sides[0]} frames spread over {patch_size} voxels of z": axes == IN_VIDEO,
        "mirrored from LAS to RAS": axes == IN_LAS,
        f"resampled from {'×'.join(map(str, flat))} to {patch_size} along an edge": set(flat) != {patch_size},
    }
    return ", ".join(part for part, is_so in parts.items() if is_so)


def _spread(kernel: Tensor, axis: int, size: int) -> Tensor:
    """Hands every weight to the new voxels that its own lies over, in proportion to the overlap."""
    old = kernel.shape[axis]
    if old == size:
        return kernel
    new_edges = torch.arange(size + 1, dtype=torch.float64, device=kernel.device) / size
    old_edges = torch.arange(old + 1, dtype=torch.float64, device=kernel.device) / old
    upper = torch.minimum(new_edges[1:, None], old_edges[None, 1:])
    lower = torch.maximum(new_edges[:-1, None], old_edges[None, :-1])
    overlap = ((upper - lower).clamp_min(0) * old).to(kernel)  # (size, old), columns sum to 1
    return (kernel.movedim(axis, -1) @ overlap.T).movedim(-1, axis)
