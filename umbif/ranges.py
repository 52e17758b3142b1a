"""Numbers and lists with their ranges, as types: what a recipe says is held against them before anything is built."""

from typing import Annotated

from pydantic import Field

PositiveInt = Annotated[int, Field(strict=True, ge=1)]
NonNegativeInt = Annotated[int, Field(strict=True, ge=0)]
PositiveFloat = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
PositiveShare = Annotated[float, Field(strict=True, gt=0, le=1)]
ShareBelowOne = Annotated[float, Field(strict=True, ge=0, lt=1)]
OpenShare = Annotated[float, Field(strict=True, gt=0, lt=1)]
Percent = Annotated[float, Field(strict=True, ge=0, le=100)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**32)]  # what NumPy takes
ZstdLevel = Annotated[int, Field(strict=True, ge=0, le=9)]
Spellings = Annotated[list[str], Field(min_length=1)]
