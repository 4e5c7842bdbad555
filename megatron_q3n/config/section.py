"""The parent of every configuration section: frozen, closed to unknown names, strict about types."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A group of settings; `extra="forbid"` makes a misspelt name an error, `frozen` makes it safe to share."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
