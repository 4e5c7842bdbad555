"""Display of a conversation: the tokens with a loss are marked, in text and by color."""

import numpy as np

from megatron_q3n.data.chat_template import PLAIN, ChatTemplate
from megatron_q3n.data.conversations import Conversation, TokenizedConversation, apply_chat_template
from megatron_q3n.data.loss_display import loss_display
from megatron_q3n.data.tokenizer import train_bpe

TALK = [
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "数?"},
    {"role": "assistant", "content": "yes", "weight": 0.5},
]


def test_tokens_with_a_loss_are_marked() -> None:
    tokenizer = train_bpe(["user assistant"], 270)
    tokenized = apply_chat_template(Conversation(TALK, "here"), ChatTemplate(PLAIN, tokenizer))
    plain, shown = loss_display(tokenized, tokenizer)
    count = int((tokenized.weights > 0).sum())
    assert plain == (
        f"a training conversation: {count} of {len(tokenized.tokens)} tokens have a loss, those in ⟦⟧\n"
        "user:\n1 + 1?<|endoftext|>\nassistant:\n⟦2<|endoftext|>⟧\nuser:\n数?<|endoftext|>\nassistant:\n"
        "⟦0.5 × yes<|endoftext|>⟧\n"
    )
    green = [plain[span.start : span.end] for span in shown.spans if "green" in str(span.style)]
    assert green == ["⟦2<|endoftext|>⟧", "⟦0.5 × yes<|endoftext|>⟧"]
    assert shown.plain == plain


def test_long_conversations_are_shortened() -> None:
    tokenizer = train_bpe(["user assistant"], 270)
    tokens = np.array(tokenizer.encode("ab" * 5000), np.int64)
    weights = np.zeros(len(tokens), np.float32)
    weights[5000::2] = 1
    plain, _ = loss_display(TokenizedConversation(tokens, weights), tokenizer)
    assert len(plain) < 2000
    assert plain.endswith(" …")
