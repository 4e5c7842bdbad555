"""HTTP server of one model: OpenAI-compatible completions and chat, with continuous batching.

`listening.serve` runs it. One thread owns the inference engine (`generation_thread.py`); the asyncio side reads and
checks requests (`requests.py`, `limits.py`), and turns tokens into replies (`choices.py`, `chat_output.py`,
`replies.py`). Which parts trust what: docs/security/server.md.
"""
