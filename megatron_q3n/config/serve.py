"""Where the serve stage listens."""

from pydantic import Field

from megatron_q3n.config.section import Section


class ServeConfig(Section):
    """An HTTP server for completions, as OpenAI's interface has them."""

    host: str = Field("127.0.0.1", description="0.0.0.0 listens on every interface, to whoever asks")
    port: int = Field(8000, ge=0, lt=65536, description="0: any free one, which it then names")
