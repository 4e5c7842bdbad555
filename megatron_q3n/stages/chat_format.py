"""The tokenizer and chat template of a post-training run: found once, then kept in the run directory."""

from pathlib import Path

from megatron_q3n import checkpoint
from megatron_q3n.checkpoint.folders import FOLDER
from megatron_q3n.config import RunConfig, UserError
from megatron_q3n.conversion.importing import KEPT
from megatron_q3n.data.chat_template import TEMPLATE_FILE, ChatTemplate, chat_template
from megatron_q3n.data.conversations import texts_of
from megatron_q3n.data.manifest import verify_prepared
from megatron_q3n.data.sft_rows import read_all
from megatron_q3n.data.stdlib import corpus_of
from megatron_q3n.data.tokenizer import TextTokenizer, train_bpe
from megatron_q3n.run_directory import TOKENIZER_FOLDER, write_atomically
from megatron_q3n.stages.trained_model import tokenizer_of


def chat_format(config: RunConfig, run_dir: Path) -> tuple[TextTokenizer, ChatTemplate]:
    """Return the run's own tokenizer and template, or those its settings and its starting weights mean.

    Raises: UserError if they cannot be found, or the model has no row for a token.
    """
    kept = run_dir / TOKENIZER_FOLDER
    if (kept / TEMPLATE_FILE).is_file():
        tokenizer = TextTokenizer.load(kept)
        return tokenizer, chat_template(None, kept, tokenizer)
    tokenizer, folder = _tokenizer(config)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, model.vocab_size={config.model.vocab_size}; the model "
            "needs a row for every token."
        )
    return tokenizer, chat_template(config.sft.chat_template, folder, tokenizer)


def keep(run_dir: Path, tokenizer: TextTokenizer, template: ChatTemplate) -> None:
    """Leave tokenizer and template in the run directory, so that the run and its checkpoints need no other."""
    folder = run_dir / TOKENIZER_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    write_atomically(folder / "tokenizer_config.json", f'{{"eos_token": "{tokenizer.eod_token}"}}')
    write_atomically(folder / TEMPLATE_FILE, template.source)


def _tokenizer(config: RunConfig) -> tuple[TextTokenizer, Path | None]:
    """Return the tokenizer, and where a template of its own may lie."""
    data = config.data
    if config.sft.tokenizer_vocab_size is not None:
        texts = (text for c in read_all(config.sft.train) for text in texts_of(c))
        return train_bpe(texts, config.sft.tokenizer_vocab_size, single_digits=True), None
    if data.tokenizer is not None:
        return TextTokenizer.load(data.tokenizer), Path(data.tokenizer).expanduser()
    if config.checkpoint.load is not None:
        source = checkpoint.find(config.checkpoint.load)
        kept = source.parent.parent / TOKENIZER_FOLDER if source.parent.name == FOLDER else None
        folders = [source / KEPT, *([kept] if kept else [])]
        found = next((f for f in folders if (f / "tokenizer.json").is_file()), None)
        return tokenizer_of(source, None), found
    if data.source == "stdlib":
        return TextTokenizer.load(corpus_of(data).train), None
    path = data.train[0].path
    return TextTokenizer.load(path, verify_prepared(path).tokenizer.eod_token), None
