"""Base class of all configuration sections: frozen, without unknown names, with strict types."""

from pydantic import BaseModel, ConfigDict

# NumPy's generators take 32 bits
MAX_SEED = 2**32 - 1


class Section(BaseModel):
    """A group of settings; `extra="forbid"` makes a misspelt name an error, `frozen` makes it safe to share."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
