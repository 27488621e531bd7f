"""What every section of a configuration is."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """Settings; the text beneath each says what it means, and `grpo settings` reads it from the source.

    pydantic can read it too (use_attribute_docstrings), while it makes the classes: for half a second in every process.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_flag_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic takes true for 1, and `kl_coef: true` for a thousand times its default."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and _takes(annotation, int, float) and not _takes(annotation, bool, Any):
            raise PydanticCustomError("flag", "it takes a number, not true or false")
        return value


def _takes(annotation: Any, *kinds: Any) -> bool:
    return annotation in kinds or any(_takes(each, *kinds) for each in get_args(annotation))
