"""Settings of callbacks: classes of the user, named by import path, that extend a training run."""

import re
from typing import Any

from pydantic import Field, model_validator

from megatron_q3n.config.errors import UserError
from megatron_q3n.config.section import Section


class CallbackConfig(Section):
    """One callback: the class, and the arguments of its constructor."""

    path: str = Field(
        description="import path of a subclass of megatron_q3n.training.callbacks.Callback, e.g. "
        "my_package.my_module.MyCallback"
    )
    arguments: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of its constructor")

    @model_validator(mode="after")
    def _legal(self) -> "CallbackConfig":
        if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", self.path):
            raise UserError(
                f"callbacks: path={self.path!r} is not an import path; give module and class, separated by dots, e.g. "
                "my_package.my_module.MyCallback."
            )
        return self
